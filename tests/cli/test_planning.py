"""``tepatch plan``: the library's plan, printed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, get_args

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
