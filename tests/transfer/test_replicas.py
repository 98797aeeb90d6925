"""Processes that each load all of a model, as data parallel ones do: its bytes come from the disk once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tepatch.transfer.raw import cached_share, forget

PROGRAM = """
import sys
import torch
from tepatch.checkpoint import open_checkpoint
from tepatch.transfer.raw import stream_bytes
from tepatch.transfer.settings import Reading

def from_disk():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("read_bytes"))

path = sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
before = from_disk()
checkpoint = open_checkpoint(path)
out, measured = stream_bytes(checkpoint, Reading(), device=torch.device("cpu"))
print(from_disk() - before, measured.nbytes, flush=True)
"""


def test_two_processes_at_once_have_the_disk_read_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.randn(1 << 25), "other": torch.randn(1 << 24)}, path)
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.randn(1 << 22)}, other)
    command = [sys.executable, "-c", PROGRAM, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    try:
        for rank in ranks:
            assert rank.stdout.readline() == "ready\n"
        forget([path, other])
        if cached_share([other]) != 0:
            pytest.skip("this file system keeps its files in memory")
        for rank in ranks:
            rank.stdin.write("\n")
            rank.stdin.flush()
        found = [tuple(map(int, rank.stdout.readline().split())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    size = path.stat().st_size
    assert [nbytes for _, nbytes in found] == [size, size]
    if sum(disk for disk, _ in found) == 0:
        pytest.skip("this system does not count what comes from a disk")
    assert sum(disk for disk, _ in found) < 1.05 * size
