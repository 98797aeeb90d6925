"""No file outside the checkpoint's folder is ever opened.

The names of shards come from an index that anybody may have written, and a downloaded folder may hold
symbolic links: either could point at any file of the machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from tepatch.errors import CheckpointError, Problem

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""The name of a blob: git's digest of a small file, or the sha256 of a large one."""


def name_fault(name: str) -> str:
    """Why ``name`` may not be a file of a checkpoint; empty when it may."""
    if not name or not name.isprintable():
        return "it is empty, or holds characters that cannot be printed"
    if "\\" in name:
        return "it holds a backslash"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        return "it is an absolute path"
    if ".." in name.split("/"):
        return "it leads out of the folder"
    return ""


def file_inside(folder: Path, name: str) -> Path:
    """The real path of ``folder/name``, which need not exist.

    Symbolic links are followed, and must end inside ``folder``. One other place is allowed: where the folder
    is a snapshot in a Hugging Face cache, its files are links to ``blobs`` of the same repository; in any other folder
    they may be links to such ``blobs`` of the user's own cache. Raises ``CheckpointError`` for anything else.
    """
    where = str(folder / name) if name.isprintable() else f"{folder}: {name!a}"
    fault = name_fault(name)
    if fault:
        raise CheckpointError(Problem(where=where, what=f"this name is refused: {fault}"))
    root = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(root / name))
    if target.is_relative_to(root):
        return target
    blobs = _blobs_of(root)
    if target.is_relative_to(blobs) if blobs is not None else _is_in_cache(target):
        return target
    raise CheckpointError(
        Problem(
            where=where,
            what="this is a link that leads out of the checkpoint's folder, and is refused",
            found=f"a link to {target}",
            fix="copy what it points to into the folder, or open the folder that holds it",
        )
    )


def _is_in_cache(target: Path) -> bool:
    """Whether ``target`` is a blob of a model in the local cache, where older hub clients' ``local_dir`` has links to.

    A blob is named by the digest of what it holds, so that a link leads to nothing that its author does not know.
    """
    from huggingface_hub import constants

    blobs = target.parent
    if blobs.name != "blobs" or not blobs.parent.name.startswith("models--") or not _DIGEST.fullmatch(target.name):
        return False
    return blobs.parent.parent == Path(os.path.realpath(constants.HF_HUB_CACHE))


def _blobs_of(root: Path) -> Path | None:
    """``models--org--name/blobs`` when ``root`` is, or is below, ``models--org--name/snapshots/REVISION``."""
    for folder in root.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return folder.parent / "blobs"
    return None
