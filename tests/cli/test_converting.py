"""``tepatch convert``: the library's conversion, its options, and what is told of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import tepatch

if TYPE_CHECKING:
    from conftest import Run, Site


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_there_and_back_is_the_original(run: Run, tiny: Path, tmp_path: Path) -> None:
    for arguments in (("llama", tiny, tmp_path / "te"), ("auto", tmp_path / "te", tmp_path / "back")):
        result = run("convert", *arguments)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith(f"converted {arguments[1]} (")
        assert f"to {arguments[2]} (" in result.stdout
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", tiny))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    tepatch.convert("llama", tiny, tmp_path / "library")
    assert contents(tmp_path / "te") == contents(tmp_path / "library")


def test_json_is_the_result_as_data(run: Run, tiny: Path, tmp_path: Path) -> None:
    result = run("convert", "llama", tiny, tmp_path / "te", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert (found["source"], found["destination"]) == (str(tiny), str(tmp_path / "te"))
    assert (found["from"], found["to"]) == ("hf", "te")
    assert found["files"] == {path.name: path.stat().st_size for path in (tmp_path / "te").iterdir()}
    assert found["bytes_written"] == found["files"]["tepatch.safetensors"]
    assert found["inexact"] == {}
    assert found["seconds"].keys() == {"plan", "write"}


OPTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "dtype": (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
    "shards": (["--max-shard-size", "20KB"], {"max_shard_size": "20KB"}),
    "layout": (["--to", "te"], {"to": "te"}),
    "workers": (["--workers", "3"], {"workers": 3}),
    "class": (["--auto-class", "AutoModel", "--drop", "lm_head"], {"auto_class": "AutoModel", "drop": ["lm_head"]}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_mean_what_the_librarys_arguments_mean(option: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    words, arguments = OPTIONS[option]
    result = run("convert", "llama", tiny, tmp_path / "ours", *words)
    assert result.exit_code == 0, result.stderr
    tepatch.convert("llama", tiny, tmp_path / "library", **arguments)
    assert contents(tmp_path / "ours") == contents(tmp_path / "library")


def test_variant_and_subfolder_are_passed_on(run: Run, tiny: Path, tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    shutil.copytree(tiny, inner)
    (inner / "model.safetensors").rename(inner / "model.fp16.safetensors")
    words = ["convert", "llama", tmp_path / "outer", tmp_path / "te", "--subfolder", "inner"]
    assert run(*words).exit_code == 1
    assert run(*words, "--variant", "fp16").exit_code == 0
    assert (tmp_path / "te" / "tepatch.json").exists()


def test_a_revision_is_passed_on(run: Run, tiny: Path, tmp_path: Path) -> None:
    result = run("convert", "llama", tiny, tmp_path / "te", "--revision", "main")
    assert result.exit_code == 1
    assert "revision='main' has no meaning" in result.stderr


def test_a_mapping_of_ones_own_is_used_and_needed_again(
    run: Run, tiny: Path, tmp_path: Path, llama_mapping: str
) -> None:
    plain = "{concat: [mlp.gate_proj.weight, mlp.up_proj.weight]}"
    assert plain in llama_mapping
    mapping = tmp_path / "mine.yaml"
    mapping.write_text(
        llama_mapping.replace(plain, plain.replace("concat", "interleave").replace("]}", "], block: 1}"))
    )
    assert run("convert", "llama", tiny, tmp_path / "te", "--mapping", mapping).exit_code == 0
    refused = run("convert", "llama", tmp_path / "te", tmp_path / "back")
    assert refused.exit_code == 1
    assert "--mapping" in refused.stderr
    assert not (tmp_path / "back").exists()
    assert run("convert", "llama", tmp_path / "te", tmp_path / "back", "--mapping", mapping).exit_code == 0
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > 1000


def test_a_destination_that_exists_needs_overwrite(run: Run, tiny: Path, tmp_path: Path) -> None:
    words = ["convert", "llama", tiny, tmp_path / "te"]
    assert run(*words).exit_code == 0
    (tmp_path / "te" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "te")
    refused = run(*words, "--json")
    assert refused.exit_code == 1
    error = json.loads(refused.stdout)["error"]
    assert error["type"] == "SaveError"
    assert "--overwrite" in error["problems"][0]["fix"]
    assert contents(tmp_path / "te") == before
    assert run(*words, "--overwrite").exit_code == 0
    assert set(os.listdir(tmp_path / "te")) == before.keys() - {"notes.txt"}


@pytest.mark.parametrize("to", ["hf", "te"])
def test_the_layout_that_it_is_in_already_is_an_error(to: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    source = tiny
    if to == "te":
        source = tmp_path / "te"
        run("convert", "llama", tiny, source)
    result = run("convert", "llama", source, tmp_path / "out", "--to", to)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"in the layout '{to}' already" in result.stderr


@pytest.mark.parametrize("words", [["--to", "onnx"], ["--workers", "0"], ["--dtype", "int8"], ["--no-such-option"]])
def test_wrong_usage_is_exit_code_2_and_writes_nothing(words: list[str], run: Run, tiny: Path, tmp_path: Path) -> None:
    result = run("convert", "llama", tiny, tmp_path / "te", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert not os.listdir(tmp_path)


def test_an_unknown_patch_is_wrong_usage(run: Run, tiny: Path, tmp_path: Path) -> None:
    result = run("convert", "lama", tiny, tmp_path / "te", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "PluginError"


def test_a_size_that_is_none_is_an_error_without_a_traceback(run: Run, tiny: Path, tmp_path: Path) -> None:
    result = run("convert", "llama", tiny, tmp_path / "te", "--max-shard-size", "big")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("max_shard_size: is not a size")


def test_a_missing_source_is_an_error_without_a_traceback(run: Run, tmp_path: Path) -> None:
    result = run("convert", "llama", tmp_path / "absent", tmp_path / "te")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"{tmp_path / 'absent'}: ")


def test_what_stays_behind_is_said_in_the_notes(run: Run, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    (source / "pytorch_model.bin").write_bytes(b"another form of the weights")
    result = run("convert", "llama", source, tmp_path / "te")
    assert "note: pytorch_model.bin is also in the folder and was not read" in result.stdout
    assert not (tmp_path / "te" / "pytorch_model.bin").exists()


def test_the_program_prints_its_result_alone_on_stdout(site: Site, tiny: Path, tmp_path: Path) -> None:
    """As a program: no progress where stderr is no terminal, and what libraries print goes to stderr."""
    site.install("prints", "print('printed')\nimport tepatch")
    result = site.run("convert", "llama", tiny, tmp_path / "te", "--quiet")
    assert result.returncode == 0
    assert result.stdout.startswith("converted ")
    assert "printed" in result.stderr
    assert "writing" not in result.stderr
    assert len(result.stdout.splitlines()) == 2
