"""The tests that a plugin gets, and the report that they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tepatch.errors import PluginError
from tepatch.testing import Case, Conformance, conformance_tests
from tepatch.testing.report import CaseReport, Outcome
from tepatch.testing.suite import CHECKS

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=128,
    max_position_embeddings=256,
    pad_token_id=0,
)


@pytest.fixture(autouse=True)
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests find out is in nobody's report."""
    monkeypatch.delenv("TEPATCH_CONFORMANCE", raising=False)


def items(test: Any) -> list[Any]:
    (mark,) = test.pytestmark
    parameters: list[Any] = mark.args[1]
    return parameters


def test_there_is_a_test_for_every_check_of_every_case() -> None:
    test = conformance_tests("llama", {"one": CONFIG, "two": CONFIG})
    assert [item.id for item in items(test)] == [f"{case}-{name}" for case in ("one", "two") for name in CHECKS]
    marked = [item.id for item in items(test) if any(mark.name == "gpu" for mark in item.marks)]
    assert marked == ["one-gpu", "two-gpu"]


def test_no_patch_is_looked_for_before_a_test_runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    case = Case("tiny", CONFIG)
    test = conformance_tests("lama", [case])  # a module that fails to import would take its other tests with it
    with pytest.raises(PluginError, match="lama"):
        test(case, "plan", tmp_path_factory)


def test_a_failing_check_says_what_is_wrong(tmp_path_factory: pytest.TempPathFactory) -> None:
    case = Case("tiny", CONFIG, refuse={"initializer_range": 0.5})
    test = conformance_tests("llama", [case])
    test(case, "plan", tmp_path_factory)
    with pytest.raises(AssertionError, match=r"llama, tiny, refusals: initializer_range = 0.5 is not refused"):
        test(case, "refusals", tmp_path_factory)


def test_a_check_that_does_not_apply_is_skipped_with_the_reason(tmp_path_factory: pytest.TempPathFactory) -> None:
    case = Case("tiny", CONFIG, skip={"plan": "of no use here"})
    test = conformance_tests("llama", [case])
    for name, reason in (("plan", "of no use here"), ("router-logits", "no routers")):
        with pytest.raises(pytest.skip.Exception, match=reason):
            test(case, name, tmp_path_factory)


def test_tests_leave_a_report_in_the_folder_that_the_environment_names(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("tiny", CONFIG)
    test = conformance_tests("llama", [case])
    test(case, "plan", tmp_path_factory)
    monkeypatch.setenv("TEPATCH_CONFORMANCE", str(tmp_path))
    test(case, "no-mask", tmp_path_factory)
    data = json.loads((tmp_path / "llama.json").read_text())
    assert (data["format"], data["patch"], data["model_types"]) == ("tepatch-conformance-1", "llama", ["llama"])
    assert data["versions"].keys() >= {"tepatch", "torch", "transformers"}
    found = data["cases"]["tiny"]
    assert found["model"] == "LlamaForCausalLM"
    assert found["traits"] == ["MHA", "rope default"]
    assert list(found["checks"]) == list(CHECKS)
    assert found["checks"]["plan"]["status"] == "proven"
    assert found["checks"]["no-mask"]["figures"].keys() == {"ours", "theirs", "largest"}
    assert found["checks"]["gradients"] == {"status": "not run"}


def report(cases: dict[str, dict[str, Outcome]], *, requires: tuple[str, ...] = ()) -> Conformance:
    return Conformance(
        patch="mine",
        summary="",
        model_types=("mine",),
        cases={
            name: CaseReport(model="MineForCausalLM", model_type="mine", traits=(), outcomes=outcomes)
            for name, outcomes in cases.items()
        },
        requires=requires,
        versions={"tepatch": "0.1.0"},
    )


def test_a_report_keeps_what_an_earlier_run_had_and_this_one_has_not(tmp_path: Path) -> None:
    measured = Outcome(status="passed", detail="a GPU", figures={"ours": 1.0})
    away = Outcome(status="skipped", detail="no GPU")
    passed, failed = Outcome(status="passed"), Outcome(status="failed", detail="wrong")
    report({"one": {"gpu": measured, "plan": passed, "no-mask": passed}, "old": {"plan": passed}}).write(tmp_path)
    later = {"one": {"gpu": away, "plan": failed, "no-mask": Outcome(status="not run")}}
    path = report(later).write(tmp_path)
    assert path == tmp_path / "mine.json"
    cases = json.loads(path.read_text())["cases"]
    assert list(cases) == ["one", "old"]
    assert cases["one"]["checks"]["gpu"] == {"status": "passed", "detail": "a GPU", "figures": {"ours": 1.0}}
    assert cases["one"]["checks"]["plan"] == {"status": "failed", "detail": "wrong"}
    assert cases["one"]["checks"]["no-mask"] == {"status": "passed"}


def test_what_another_case_refutes_counts_for_the_whole_report(tmp_path: Path) -> None:
    refused = Outcome(status="proven", notes={"refused": {"a = 1": ["a > 1"]}})
    requires = ("a > 1", "b > 1")
    report({"one": {"refusals": refused}}, requires=requires).write(tmp_path)
    later = report({"two": {"refusals": Outcome(status="skipped")}}, requires=requires)
    assert later.not_refuted == ["a > 1", "b > 1"]
    assert json.loads(later.write(tmp_path).read_text())["not_refuted"] == ["b > 1"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "else"}'])
def test_a_file_that_is_no_report_is_not_written_over(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(PluginError, match="not written over"):
        report({"one": {"plan": Outcome(status="passed")}}).write(tmp_path)
    assert path.read_text() == text


def test_the_table_has_a_line_for_every_check() -> None:
    outcomes = {
        "plan": Outcome(status="proven", detail="9 used"),
        "no-mask": Outcome(status="passed", figures={"ours": 2e-7, "theirs": 3e-7}),
        "mutations": Outcome(status="failed", detail="nobody notices these mistakes:\n  drop x"),
    }
    assert str(report({"one": outcomes})).splitlines() == [
        "mine: tepatch 0.1.0",
        "  one  plan       proven  9 used",
        "  one  no-mask    passed  2.0e-07 (Hugging Face 3.0e-07)",
        "  one  mutations  failed  nobody notices these mistakes:",
        "      drop x",
    ]
