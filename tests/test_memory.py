"""Loading takes the memory of the model and next to nothing more. Time is measured by ``benchmarks/load_cpu.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ALLOWANCE = 150_000_000  # bytes beyond the model and its largest parameter


def test_private_memory_stays_within_model_and_largest_parameter(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    sys.path.insert(0, str(pytestconfig.rootpath / "benchmarks"))
    try:
        import load_cpu
    finally:
        sys.path.pop(0)
    load_cpu.make(tmp_path, layers=4)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    largest = load_cpu.SHAPE["vocab_size"] * load_cpu.SHAPE["hidden_size"] * 2
    assert size > 900_000_000
    script = pytestconfig.rootpath / "benchmarks" / "load_cpu.py"
    command = [sys.executable, str(script), "--folder", str(tmp_path), "--one", "tepatch"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    used = json.loads(done.stdout.splitlines()[-1])["private_bytes"]
    print(f"\n{used:,} bytes for {size:,} of weights")
    assert used >= size, "the weights are really in memory"
    assert used <= size + largest + ALLOWANCE
