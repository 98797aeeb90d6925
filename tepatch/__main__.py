"""``python -m tepatch``: the command line, for where the script ``tepatch`` is not on the path."""

from __future__ import annotations

from tepatch.cli import main

main()
