"""What a file is that is not what its name says, told by its first bytes.

Most files that can not be read were never weights: what git leaves without LFS, a page that asks to log in, a download
that has not ended, weights under the ending of another format. Each has another way out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from tepatch.errors import Problem

PEEK = 4096
"""Bytes of a file's beginning that are enough to know it by."""
ZIP_MAGIC = b"PK\x03\x04"
AGAIN = "download or copy the file again"
_LFS = b"version https://git-lfs.github.com/spec/"
_PARTIAL = (
    ".incomplete",
    ".part",
    ".partial",
    ".filepart",
    ".crdownload",
    ".download",
    ".aria2",
    ".tmp",
    ".opdownload",
)
_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}
_PICKLED_NAME = re.compile(r"pytorch_model((?:\.[A-Za-z0-9_]+)?)\.bin")
_SAFETENSORS_NAME = re.compile(r"model((?:\.[A-Za-z0-9_]+)?)\.safetensors")


def not_weights(start: bytes, path: Path, *, where: str, wanted: str) -> Problem:
    """The problem with a file whose first bytes are ``start`` and which is no ``wanted``."""
    if (known := recognised(start, path)) is not None:
        what, fix = known
        return Problem(where=where, what=f"is not a {wanted}: it is {what}", fix=fix, details=_beside(path))
    return Problem(
        where=where, what=f"is not a {wanted}", found=repr(start[:20]), fix=f"{AGAIN}, and check where it comes from"
    )


def recognised(start: bytes, path: Path) -> tuple[str, str] | None:
    """What a file with these first bytes is, and what to do; None if that is not known."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "empty", AGAIN
    if start.startswith(_LFS):
        return "a Git LFS pointer", f"run 'git lfs pull' in this folder, or {AGAIN} (hf download)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "a web page", f"{AGAIN} (hf download); a page instead of a file mostly asks to log in: hf auth login"
    if start.startswith(ZIP_MAGIC):
        return "a zip, as torch.save writes it", _as_pickled(path)
    if start.startswith(b"\x80") and len(start) > 1 and 2 <= start[1] <= 5:
        return "a bare pickle", "save it as safetensors: loading a pickle can run code"
    if is_safetensors(start, path):
        return "a safetensors file", _as_safetensors(path)
    if start.startswith(b"GGUF"):
        return "a GGUF file", "tepatch does not read GGUF: convert it to safetensors with transformers"
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "an HDF5 file, as TensorFlow writes it", "use the checkpoint's safetensors, or convert it to them"
    for magic, kind in _ARCHIVES.items():
        if start.startswith(magic):
            return f"an archive ({kind})", "unpack it, and open what is in it"
    if start[257:262] == b"ustar":
        return "an archive (tar)", "unpack it, and open what is in it"
    if not start.strip(b"\0"):
        return "full of zeros where it begins, as a download that was never filled in is", AGAIN
    if text.startswith((b"{", b"[")):
        is_index = b'"weight_map"' in text
        fix = "an index is called model.safetensors.index.json (pytorch_model.bin.index.json)" if is_index else AGAIN
        return "an index in JSON" if is_index else "JSON", fix
    if _is_text(start):
        line = start.decode("utf-8", "replace").strip().splitlines()[:1]
        return f"text ({line[0][:60] if line else ''!r})", AGAIN
    return None


def is_safetensors(start: bytes, path: Path) -> bool:
    """Whether a file begins as a safetensors file does: with the length of a JSON object, and then that."""
    length = int.from_bytes(start[:8], "little")
    try:
        size = path.stat().st_size
    except OSError:
        return False
    return start[8:9] == b"{" and length <= size - 8


def unfinished(folder: Path, names: Iterable[str] = ()) -> tuple[str, ...]:
    """Files in a folder that a download has not finished, by their names; with ``names`` only those of one of them."""
    wanted = tuple(names)
    try:
        here = sorted(os.listdir(folder))
    except OSError:
        return ()
    return tuple(n for n in here if n.lower().endswith(_PARTIAL) and (not wanted or n.startswith(wanted)))


def _beside(path: Path) -> tuple[str, ...]:
    found = unfinished(path.parent, [path.name])
    return tuple(f"{name} is beside it: its download has not ended" for name in found[:1])


def _as_pickled(path: Path) -> str:
    if match := _SAFETENSORS_NAME.fullmatch(path.name):
        return f"rename it to pytorch_model{match[1]}.bin"
    return "save it as safetensors, or rename it to an ending of .bin, with its index (pytorch_model.bin.index.json)"


def _as_safetensors(path: Path) -> str:
    if match := _PICKLED_NAME.fullmatch(path.name):
        return f"rename it to model{match[1]}.safetensors"
    return "rename it to an ending of .safetensors, with its index (model.safetensors.index.json)"


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # else a character that the end of what was read has cut
            return False
        text = start[: error.start].decode("utf-8")
    return all(char >= " " or char in "\t\r\n" for char in text)
