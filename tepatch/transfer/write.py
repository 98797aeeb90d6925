"""Writing a whole checkpoint, from anything that can be read: what ``save`` and ``convert`` share.

Everything is decided before the first byte is written: which files there will be, how long each is, and where in it
each tensor goes. So several threads write one file at once, the space is checked first, and what a killed run had
finished is known.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import xxhash

from tepatch.checkpoint import TensorInfo
from tepatch.checkpoint.containment import file_inside
from tepatch.checkpoint.manifest import MANIFEST, printable
from tepatch.checkpoint.resolve import is_companion
from tepatch.checkpoint.staging import Staging
from tepatch.checkpoint.writing import Shard, index_json, index_name, plan_shards
from tepatch.errors import CheckpointError, Problem, SaveError, first_line
from tepatch.planning.plan import Plan
from tepatch.progress import ProgressBar
from tepatch.transfer.steps import Digests, Pieces, Read, WriteAt, damaged, is_out_of_memory, write_tensor

MAX_SHARD_SIZE = "5GB"
"""Default size of the files of a checkpoint."""
SHARDS_AT_ONCE = 2
"""One that is being written, and one that is being brought to the disk."""
CONFIGS = ("config.json", "generation_config.json")
"""A model's settings, which are written with its weights."""
MAX_COMPANION_BYTES = 1 << 28
"""A file beside the weights that is larger than this is left where it is."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The files of a checkpoint that is to be written: the shards of ``plan.writes``, and the small ones."""

    plan: Plan
    shards: tuple[Shard, ...]
    files: dict[str, bytes]
    """Small files by name: config, index, tokenizer."""

    @classmethod
    def of(cls, plan: Plan, files: Mapping[str, bytes], *, max_shard_size: int | str, stem: str = "model") -> Outline:
        """Raises ``PlanError`` for a size that is none, and for tensors that no file can hold."""
        shards = plan_shards(plan.writes, max_shard_size=max_shard_size, stem=stem)
        files = dict(files)
        if len(shards) > 1:
            files[index_name(stem)] = index_json(shards).encode()
        return cls(plan=plan, shards=shards, files=files)

    @property
    def need(self) -> dict[str, int]:
        """Bytes of every file."""
        return {s.file: s.nbytes for s in self.shards} | {name: len(data) for name, data in self.files.items()}

    def write_weights(
        self,
        staging: Staging,
        read: Read,
        pieces: Pieces | None = None,
        *,
        workers: int = 1,
        progress: bool | None = None,
        digests: Digests | None = None,
        expected: Mapping[str, str] = MappingProxyType({}),
    ) -> int:
        """Write the shards that ``staging`` does not have yet, and return their bytes.

        ``workers`` threads read and write tensors; while one file is brought to the disk they are busy with the next.
        ``digests`` gets those of tensors that were read. ``expected`` has those that written tensors must have: raises
        ``CheckpointError`` for a file with one that has not, which is then not complete.
        """
        todo = [shard for shard in self.shards if not staging.is_done(shard.file)]
        stop = threading.Event()
        with (
            ProgressBar(sum(shard.nbytes for shard in todo), progress, "writing") as bar,
            ThreadPoolExecutor(workers) as pool,
            ThreadPoolExecutor(SHARDS_AT_ONCE) as files,
        ):

            def write_tensor_of(info: TensorInfo, write: WriteAt, differing: list[str]) -> None:
                if stop.is_set():
                    raise _Stopped  # and not return: the file would be taken for complete
                digest = xxhash.xxh3_128() if info.name in expected else None
                if digest is not None:
                    write = _digesting(write, digest)
                try:
                    write_tensor(self.plan, info.name, read, write, info.offset, pieces=pieces, digests=digests)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    raise SaveError(
                        Problem(
                            where=info.name,
                            what="out of memory while this tensor was put together",
                            expected=f"{info.nbytes:,} bytes, and as much for what it is made of",
                            found=first_line(error),
                            fix="use fewer workers, or a machine with more memory",
                        )
                    ) from error
                if digest is not None and digest.hexdigest() != expected[info.name]:
                    differing.append(info.name)
                bar.advance(info.nbytes)

            def write_shard(shard: Shard) -> None:
                if stop.is_set():
                    raise _Stopped
                with staging.create(shard.file) as stream:
                    file = stream.fileno()
                    os.posix_fallocate(file, 0, shard.nbytes)  # a full disk shows now, and the file is in one piece
                    write_at(file, memoryview(shard.header), 0)
                    write = partial(write_at, file)
                    # The largest first: no worker is left alone with it at the end.
                    tensors = sorted(shard.tensors, key=lambda info: -info.nbytes)
                    differing: list[str] = []
                    _finish([pool.submit(write_tensor_of, info, write, differing) for info in tensors], stop)
                    if differing:
                        names = [info.name for info in shard.tensors if info.name in differing]
                        raise damaged(self.plan.location, names)

            _finish([files.submit(write_shard, shard) for shard in todo], stop)
        return sum(shard.nbytes for shard in todo)

    def write_files(self, staging: Staging) -> None:
        """Write the small files that ``staging`` does not have yet."""
        for name, data in self.files.items():
            if not staging.is_done(name):
                staging.write(name, data)


def _digesting(write: WriteAt, digest: xxhash.xxh3_128) -> WriteAt:
    """``write``, with what is written also going into ``digest``: a tensor is written from its beginning to its end."""

    def write_and_digest(data: memoryview, position: int) -> None:
        digest.update(data)
        write(data, position)

    return write_and_digest


class _Stopped(Exception):
    """What ends the work of others after an error: never the reason itself."""


def _finish(futures: Sequence[Future[None]], stop: threading.Event) -> None:
    """Wait for all; after the first error the others stop as soon as they can, and it is raised."""
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        if not all(future.done() and future.exception() is None for future in futures):
            stop.set()
            wait(futures)  # nothing may write to a file that is being given up
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, _Stopped))  # the first that is a reason


def write_at(file: int, data: memoryview, position: int) -> None:
    """Write all of ``data`` at a position of an open file. Raises ``OSError``."""
    data = data.cast("B")
    while data:
        count = os.pwrite(file, data, position)
        data, position = data[count:], position + count


def companions(
    folder: Path, *, select: Callable[[str], bool] = is_companion, known: Collection[str] = ()
) -> tuple[dict[str, bytes], list[str]]:
    """The files beside a checkpoint's weights that belong to the model (tokenizer, templates, licence), and notes.

    Not its config. ``select`` chooses by name. Whatever else is there is left where it is, and a note says so: files
    that are not chosen or have more than ``MAX_COMPANION_BYTES``, and sub-folders. Not told are the settings that are
    written anew, and files of the checkpoint that are ``known`` to be read or told. Raises ``CheckpointError`` for a
    link that leads out of the folder.
    """
    out: dict[str, bytes] = {}
    left: list[str] = []
    told = {*CONFIGS, MANIFEST, *(name.split("/")[0] for name in known)}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(Problem(where=str(folder), what="cannot be read", found=str(error))) from error
    for name in names:
        if name in told:
            continue
        is_folder = (folder / name).is_dir()
        if is_folder or not select(name):
            left.append(f"{printable(name)}{'/' if is_folder else ''}")
            continue
        path = file_inside(folder, name)
        try:
            if path.is_file() and path.stat().st_size <= MAX_COMPANION_BYTES:
                out[name] = path.read_bytes()
            else:
                left.append(name)
        except OSError as error:
            raise CheckpointError(Problem(where=str(folder / name), what="cannot be read", found=str(error))) from error
    return out, [f"left in {folder}, not copied: {', '.join(left)}"] if left else []
