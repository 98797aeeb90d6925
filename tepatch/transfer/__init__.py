"""From a checkpoint's files to tensors in their final place, on the CPU or a GPU, in pieces of a few megabytes.

``pieces`` says what is read and where it goes (plain data), ``shards`` what of it a process needs, ``memory`` is the
host's ring of buffers, ``placing`` writes what was read, and ``stream`` runs it with several threads.
"""
