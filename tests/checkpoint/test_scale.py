"""The largest checkpoints are looked at in a moment, and not a byte of a weight is read."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tepatch.checkpoint import open_checkpoint


def test_a_file_of_a_hundred_gigabytes_is_described_at_once(tmp_path: Path, write_raw: Callable[..., Path]) -> None:
    nbytes = 100 * 2**30
    header = {"w": {"dtype": "BF16", "shape": [nbytes // 2], "data_offsets": [0, nbytes]}}
    path = write_raw(tmp_path / "model.safetensors", header, data=nbytes)
    assert path.stat().st_blocks * 512 < 2**20
    start = time.process_time()
    checkpoint = open_checkpoint(tmp_path)
    assert time.process_time() - start < 2
    assert checkpoint.tensors["w"].nbytes == nbytes


def test_thirty_six_thousand_tensors_in_118_files_take_a_moment(
    tmp_path: Path, write_raw: Callable[..., Path], write_index: Callable[..., Path]
) -> None:
    num_files, num_tensors = 118, 36_000
    headers: list[dict[str, object]] = [{"__metadata__": {"format": "pt"}} for _ in range(num_files)]
    nbytes, per_file = 2048 * 768 * 2, -(-num_tensors // num_files)
    weight_map = {}
    for i in range(num_tensors):
        name = f"model.layers.{i // 400}.mlp.experts.{i % 400 // 3}.{('gate', 'up', 'down')[i % 3]}_proj.{i}"
        start = i % per_file * nbytes
        headers[i // per_file][name] = {
            "dtype": "BF16",
            "shape": [2048, 768],
            "data_offsets": [start, start + nbytes],
        }
        weight_map[name] = f"model-{i // per_file + 1:05}-of-{num_files:05}.safetensors"
    for i, header in enumerate(headers):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        write_raw(tmp_path / file, header, data=(len(header) - 1) * nbytes)
    write_index(tmp_path, weight_map)
    start_time = time.process_time()
    checkpoint = open_checkpoint(tmp_path)
    seconds = time.process_time() - start_time
    print(f"{num_tensors} tensors in {num_files} files: {seconds:.2f} s")
    assert len(checkpoint.tensors) == num_tensors
    # About 0.6 s on a small machine. It is the time of a processor: other tests may keep the machine busy.
    assert seconds < 5


def test_neither_importing_nor_opening_safetensors_imports_torch(
    tmp_path: Path, write_raw: Callable[..., Path]
) -> None:
    header = {"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    write_raw(tmp_path / "model.safetensors", header, data=4)
    program = (
        "import sys; from tepatch.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1]);"
        "sys.exit(bool({'torch', 'safetensors', 'huggingface_hub'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
