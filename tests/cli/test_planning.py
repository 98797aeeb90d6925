"""``tepatch plan``: the library's plan, printed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

import tepatch
from tepatch.cli.options import DtypeName
from tepatch.te import probe

if TYPE_CHECKING:
    from conftest import Run, Site

CODES = {"auto": "F32", "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def test_the_plan_is_printed(run: Run, tiny: Path) -> None:
    result = run("plan", "llama", tiny)
    assert result.exit_code == 0
    assert result.stdout == f"{tepatch.plan('llama', tiny)}\n"


def test_json_is_the_plan_as_data(run: Run, tiny: Path) -> None:
    result = run("plan", "auto", tiny, "--json")
    assert json.loads(result.stdout) == tepatch.plan("llama", tiny).to_json()


@pytest.mark.parametrize("dtype", get_args(DtypeName))
def test_each_dtype_on_offer_can_be_planned(dtype: str, run: Run, tiny: Path) -> None:
    result = run("plan", "llama", tiny, "--dtype", dtype, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["targets"]["model.norm.weight"]["dtype"] == CODES[dtype]


def test_the_plan_of_a_real_checkpoint_reads_every_tensor(run: Run, smollm2: Path) -> None:
    plan = json.loads(run("plan", "auto", smollm2, "--json").stdout)
    assert {entry["state"] for entry in plan["sources"].values()} == {"used"}
    assert plan["inexact"] == {}


def test_json_stands_alone_on_stdout_while_warnings_go_to_stderr(site: Site, tiny: Path) -> None:
    site.install("warns", "import logging\nprint('printed')\nlogging.getLogger('x').warning('logged')\nimport tepatch")
    result = site.run("plan", "llama", tiny, "--json", "--backend", "auto")
    assert result.returncode == 0
    assert json.loads(result.stdout)["patch"] == "llama"
    assert {"printed", "logged"} <= set(result.stderr.splitlines())


def test_variant_and_subfolder_are_passed_on(run: Run, tiny: Path, tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    shutil.copytree(tiny, inner)
    (inner / "model.safetensors").rename(inner / "model.fp16.safetensors")
    assert run("plan", "llama", tmp_path / "outer", "--subfolder", "inner").exit_code == 1
    assert run("plan", "llama", tmp_path / "outer", "--subfolder", "inner", "--variant", "fp16").exit_code == 0


def test_a_revision_is_passed_on(run: Run, tiny: Path) -> None:
    result = run("plan", "llama", tiny, "--revision", "main")
    assert result.exit_code == 1
    assert "revision='main' has no meaning" in result.stderr


def test_a_mapping_of_ones_own_is_used(run: Run, tiny: Path, tmp_path: Path, llama_mapping: str) -> None:
    mapping = tmp_path / "mine.yaml"
    mapping.write_text(llama_mapping.replace("model.norm.weight: same", "model.norm.weight: {create: 1}"))
    result = run("plan", "llama", tiny, "--mapping", mapping, "--json")
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["error"]["problems"]
    assert "model.norm.weight" in str(problem)


def test_another_class_is_planned_with_what_is_fresh_and_dropped(run: Run, tiny: Path, tmp_path: Path) -> None:
    words = ["plan", "llama", tiny, "--auto-class", "AutoModelForSequenceClassification"]
    refused = run(*words, "--json")
    assert refused.exit_code == 1
    assert len(json.loads(refused.stdout)["error"]["problems"]) == 2
    choices = ["--drop", "lm_head", "--fresh", "score"]
    result = run(*words, *choices, "--json")
    assert result.exit_code == 0, result.stderr
    chosen: dict[str, Any] = {"auto_class": words[-1], "drop": ["lm_head"], "fresh": ["score"]}
    assert json.loads(result.stdout) == tepatch.plan("llama", tiny, **chosen).to_json()
    (tmp_path / "old.json").write_text(result.stdout)
    assert run(*words, *choices, "--diff", tmp_path / "old.json").exit_code == 0


@pytest.mark.parametrize("option", ["--drop", "--fresh"])
def test_names_that_mean_no_tensor_are_all_told(option: str, run: Run, tiny: Path) -> None:
    result = run("plan", "llama", tiny, option, "scores", option, "heads", "--json")
    assert result.exit_code == 1
    problems = json.loads(result.stdout)["error"]["problems"]
    assert [(each["where"], each["found"]) for each in problems] == [(option[2:], "'scores'"), (option[2:], "'heads'")]


@pytest.mark.skipif(probe().usable, reason="Transformer Engine can be used here")
def test_a_backend_that_can_not_be_used_is_an_error(run: Run, tiny: Path) -> None:
    result = run("plan", "llama", tiny, "--backend", "te", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "BackendError"


def test_a_missing_checkpoint_is_an_error_without_a_traceback(run: Run, tmp_path: Path) -> None:
    result = run("plan", "llama", tmp_path / "absent")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"{tmp_path / 'absent'}: ")
    assert "Traceback" not in result.stderr


def test_an_unknown_patch_is_wrong_usage(run: Run, tiny: Path) -> None:
    result = run("plan", "lama", tiny, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "PluginError"
    assert result.stderr.startswith("no patch named 'lama'. Did you mean 'llama'")


def test_a_model_that_no_patch_serves_is_an_error_of_the_checkpoint(run: Run, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    result = run("plan", "auto", tmp_path / "gpt2")
    assert result.exit_code == 1
    assert "no patch for model_type 'gpt2'" in result.stderr


@pytest.mark.parametrize("option", ["--dtype", "--backend"])
def test_a_value_that_is_not_on_offer_is_wrong_usage(option: str, run: Run, tiny: Path) -> None:
    result = run("plan", "llama", tiny, option, "int4")
    assert result.exit_code == 2
    assert "auto" in result.stderr


# -- another plan, and the page --


@pytest.fixture
def swapped(tmp_path: Path, llama_mapping: str) -> Path:
    """A mapping file of which the gate and up projections have changed places."""
    path = tmp_path / "swapped.yaml"
    text = llama_mapping.replace("mlp.gate_proj.weight", "mlp.x").replace("mlp.up_proj.weight", "mlp.gate_proj.weight")
    path.write_text(text.replace("mlp.x", "mlp.up_proj.weight"))
    assert path.read_text() != llama_mapping
    return path


def test_a_plan_is_the_same_as_the_one_that_was_saved(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(run("plan", "llama", tiny, "--json").stdout)
    result = run("plan", "llama", tiny, "--diff", tmp_path / "old.json")
    assert result.exit_code == 0
    assert result.stdout.endswith("the same: every parameter and every tensor\n")


@pytest.mark.parametrize("is_saved", [True, False])
def test_what_changed_since_another_plan_or_mapping_is_shown(
    is_saved: bool, run: Run, tiny: Path, tmp_path: Path, swapped: Path
) -> None:
    other = swapped
    if is_saved:
        other = tmp_path / "old.json"
        other.write_text(run("plan", "llama", tiny, "--mapping", swapped, "--json").stdout)
    result = run("plan", "llama", tiny, "--diff", other)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert f"mapping {swapped} " in lines[0]
    assert "mapping llama.tepatch.yaml " in lines[1]
    assert lines[2:] == [
        "2 parameters changed",
        "  laid out otherwise: model.layers.{0..1}.mlp.fc1_weight",
        "    mlp.gate_proj.weight: rows 48..96 -> rows 0..48",
        "    mlp.up_proj.weight: rows 0..48 -> rows 48..96",
    ]


def test_a_difference_can_be_had_as_json(run: Run, tiny: Path, swapped: Path) -> None:
    result = run("plan", "llama", tiny, "--diff", swapped, "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert [change["kind"] for change in data["changes"]] == ["layout", "layout"]
    assert (data["same"], data["old"]["mapping"]) == (False, str(swapped))


def test_a_saved_plan_that_is_damaged_is_an_error_and_no_difference(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"format": "tepatch-plan-1"}')
    result = run("plan", "llama", tiny, "--diff", tmp_path / "old.json", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "PlanError"
    assert "copies: is missing" in result.stderr


def test_another_plan_that_is_not_there_is_wrong_usage(run: Run, tiny: Path, tmp_path: Path) -> None:
    result = run("plan", "llama", tiny, "--diff", tmp_path / "absent.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--diff" in result.stderr


def test_the_page_is_written_and_named(run: Run, tiny: Path, tmp_path: Path) -> None:
    from tepatch.planning.page import plan_page

    result = run("plan", "llama", tiny, "--html", tmp_path / "page.html")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'page.html'}\n")
    assert (tmp_path / "page.html").read_text() == plan_page(tepatch.plan("llama", tiny))


def test_with_a_page_stdout_is_for_what_else_is_asked_for(run: Run, tiny: Path, tmp_path: Path, swapped: Path) -> None:
    result = run("plan", "llama", tiny, "--html", tmp_path / "1.html", "--json")
    assert json.loads(result.stdout)["format"] == "tepatch-plan-1"
    assert str(tmp_path / "1.html") in result.stderr.splitlines()
    result = run("plan", "llama", tiny, "--html", tmp_path / "2.html", "--diff", swapped)
    assert result.exit_code == 1
    assert result.stdout.startswith("old: ")
    assert (tmp_path / "2.html").is_file()


def test_a_page_takes_the_place_of_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "link.html").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "there.html", tmp_path / "link.html", tmp_path, tmp_path / "absent" / "page.html"):
        # Before anything is planned: the checkpoint is not even there.
        result = run("plan", "llama", tmp_path / "absent", "--html", path)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "--html" in result.stderr
    assert (tmp_path / "there.html").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_no_page_is_written_of_a_plan_that_is_not_made(run: Run, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").unlink()
    assert run("plan", "llama", tmp_path / "broken", "--html", tmp_path / "page.html").exit_code == 1
    assert not (tmp_path / "page.html").exists()
