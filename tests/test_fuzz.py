"""A few mutations of the fuzzer, and that it sees what it is there to see."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def fuzz(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = pytestconfig.rootpath / "scripts" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fuzz", module)
    spec.loader.exec_module(module)
    return module


def test_some_mutations_do_no_harm(fuzz: ModuleType, tmp_path: Path) -> None:
    fuzzer = fuzz.Fuzzer(tmp_path, 5)
    for number in range(60):
        fuzzer.run(number)
    assert fuzzer.failures == []
    assert sum(fuzzer.counts.values()) == 60
    assert any("refused" in each for each in fuzzer.counts)
    assert any("accepted" in each for each in fuzzer.counts)


def test_what_is_whole_is_accepted_and_what_a_digest_tells_is_not(fuzz: ModuleType, tmp_path: Path) -> None:
    """Each case as it is, then with the last bit changed of a file that digests or checksums are over."""
    fuzzer = fuzz.Fuzzer(tmp_path, 0)
    for case in fuzz.CASES:
        work = tmp_path / "work"
        fuzz.shutil.rmtree(work, ignore_errors=True)
        fuzz.shutil.copytree(tmp_path / case.form, work / "checkpoint")
        assert fuzzer._outcome(case, work, is_same=True) == "accepted"
        if case.file == "tepatch.safetensors":
            fuzz.shutil.rmtree(work / "back")
            path = work / "checkpoint" / case.file
            path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
            assert fuzzer._outcome(case, work, is_same=False) == "refused"


def test_a_mutation_follows_from_its_seed(fuzz: ModuleType) -> None:
    case = fuzz.CASES[1]
    data = b'{"architectures": ["LlamaForCausalLM"], "hidden_size": 32}'
    made = [[fuzz.changed(case, data, random.Random(f"3 {number}")) for number in range(50)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 25


def test_what_is_no_error_of_ours_is_a_failure(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzzer = fuzz.Fuzzer(tmp_path, 0)

    def broken(*_: object) -> str:
        raise KeyError("a rule")

    monkeypatch.setattr(fuzzer, "_try", broken)
    fuzzer.run(0)
    (failure,) = fuzzer.failures
    assert failure.startswith("--seed 0 --only 0")
    assert "not an error of ours" in failure
    assert "KeyError" in failure
