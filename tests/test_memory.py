"""Loading takes the memory of the model and next to nothing more. Time is measured by ``benchmarks/load.py``."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ALLOWANCE = 150_000_000  # bytes beyond the model and its largest parameter


def test_private_memory_stays_within_model_and_largest_parameter(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    load = runpy.run_path(str(pytestconfig.rootpath / "benchmarks" / "load.py"))
    shape = "llama-3.2-1b"
    load["make"](tmp_path, shape, layers=4)
    size = load["size_of"](tmp_path)
    largest = load["SHAPES"][shape]["vocab_size"] * load["SHAPES"][shape]["hidden_size"] * 2
    assert size > 900_000_000
    process = load["Process"]("tepatch", tmp_path, "cpu")
    try:
        assert "failed" not in process.ask()
        used = process.ask("first")["private_bytes"]
    finally:
        process.close()
    print(f"\n{used:,} bytes for {size:,} of weights")
    assert used >= size, "the weights are really in memory"
    assert used <= size + largest + ALLOWANCE
