"""The tables of supported architectures say what the reports say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "supported.py"


def functions() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def case(**checks: Any) -> dict[str, Any]:
    named = {name.replace("_", "-"): result for name, result in checks.items()}
    return {"model": "MineForCausalLM", "model_type": "mine", "traits": ["GQA", "windows"], "checks": named}


def measured(ours: float, theirs: float) -> dict[str, Any]:
    return {"status": "passed", "figures": {"ours": ours, "theirs": theirs, "largest": 0.0}}


def test_a_row_has_the_largest_error_and_what_has_passed() -> None:
    one = case(
        round_trip={"status": "proven"},
        no_mask=measured(2e-7, 3e-7),
        left_padding=measured(4e-7, 1e-7),
        right_padding=measured(1e-7, 1e-7),
        packing={"status": "skipped", "detail": "why"},
        gpu={"status": "passed", "figures": {"no mask, ours": 2e-2, "no mask, theirs": 2.1e-2}},
    )
    text = functions()["table"]([{"patch": "mine", "cases": {"one": one}}])
    assert text.splitlines()[-1] == (
        "| `mine` | `MineForCausalLM` | GQA, windows | bit-exact round trips, padding | 4.0e-07 (Hugging Face 1.0e-07) "
        "| 2.0e-02 (Hugging Face 2.1e-02) |"
    )


def test_what_fails_in_one_case_is_claimed_for_none() -> None:
    cases = [case(generation={"status": "passed"}), case(generation={"status": "failed"})]
    assert functions()["features"](cases) == ["**generation fails**"]
    assert functions()["features"](cases[:1]) == ["generation"]
    assert functions()["features"]([case(generation={"status": "not run"})]) == []
    assert functions()["gpu"](cases) == functions()["cpu"](cases) == "not measured"


def test_only_what_stands_between_the_marks_is_rewritten(tmp_path: Path) -> None:
    script = functions()
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script['BEGIN']}\nold\n{script['END']}\nafter\n")
    assert not script["update"](page, "new\n", check=True)
    assert "old" in page.read_text()
    assert not script["update"](page, "new\n", check=False)
    assert page.read_text() == f"before\n{script['BEGIN']}\nnew\n{script['END']}\nafter\n"
    assert script["update"](page, "new\n", check=True)
    plain = tmp_path / "plain.md"
    plain.write_text("nothing\n")
    assert script["update"](plain, "new\n", check=False)
