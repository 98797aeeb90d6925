"""``tepatch check``: a mapping by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Run

GOOD = """\
version: 1
captures: {layer: num_hidden_layers}
sizes: {half: hidden_size // 2}
requires:
  - hidden_act == 'silu': another activation [such as gelu] is not this layer
ignore:
  - rotary.inv_freq: computed from the config
parameters:
  norm.weight: same
  layers.{layer}:
    fc.weight: {concat: [up.weight, gate.weight]}
"""
BAD = """\
version: 1
parametres: {}
parameters:
  a.weight: {conact: [x.weight, y.weight]}
  b.weight: "[red]b[/red]"
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two mappings in ``maps/``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "good.yaml").write_text(GOOD)
    (tmp_path / "maps" / "bad.yaml").write_text(BAD)
    (tmp_path / "maps" / "child.yaml").write_text("version: 1\nextends: good.yaml\nparameters:\n  bias: {create: 0}\n")
    return tmp_path


def test_a_good_mapping_is_summed_up(run: Run, write: Path) -> None:
    result = run("check", "maps/good.yaml")
    assert result.exit_code == 0
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert lines[0].startswith("maps/good.yaml: no problems (sha256 ")
    assert lines[1:] == [
        "captures: layer = num_hidden_layers",
        "sizes: half = hidden_size // 2",
        "requires 1:",
        "hidden_act == 'silu'",
        "ignores 1:",
        "rotary.inv_freq: computed from the config",
        "rules 2:",
        "norm.weight",
        "layers.{layer}.fc.weight",
    ]


def test_json_tells_the_same(run: Run, write: Path) -> None:
    found = json.loads(run("check", "maps/good.yaml", "--json").stdout)
    assert len(found.pop("digest")) == 64
    assert found == {
        "mapping": "maps/good.yaml",
        "extends": None,
        "captures": {"layer": "num_hidden_layers"},
        "sizes": {"half": "hidden_size // 2"},
        "requires": [
            {"condition": "hidden_act == 'silu'", "sentence": "another activation [such as gelu] is not this layer"}
        ],
        "ignored": [{"source": "rotary.inv_freq", "reason": "computed from the config"}],
        "rules": [
            {"where": "maps/good.yaml:9:3", "target": "norm.weight"},
            {"where": "maps/good.yaml:11:5", "target": "layers.{layer}.fc.weight"},
        ],
    }


def test_what_a_mapping_extends_is_named_and_counted(run: Run, write: Path) -> None:
    result = run("check", "maps/child.yaml")
    assert "  extends good.yaml" in result.stdout.splitlines()
    assert "  rules 3:" in result.stdout.splitlines()


def test_every_problem_goes_to_stderr_as_file_line_and_column(run: Run, write: Path) -> None:
    result = run("check", "maps/bad.yaml")
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert any(line.startswith("maps/bad.yaml:2:1: unknown key 'parametres'") for line in lines)
    assert any(line.startswith("maps/bad.yaml:4:") for line in lines)


def test_brackets_in_a_message_are_kept(run: Run, write: Path) -> None:
    (write / "maps" / "bad.yaml").write_text("version: 1\nparameters:\n  b.weight: '[red]b[/red]'\n")
    assert "[red]b[/red]" in run("check", "maps/bad.yaml").stderr


def test_json_gives_the_problems_of_a_bad_mapping_on_stdout_and_the_text_on_stderr(run: Run, write: Path) -> None:
    result = run("check", "maps/bad.yaml", "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "MappingError"
    assert len(error["problems"]) == 2
    problem = next(each for each in error["problems"] if each["where"] == "maps/bad.yaml:2:1")
    assert problem["what"] == "unknown key 'parametres'"
    assert problem.keys() == {"where", "what", "details", "expected", "found", "fix"}
    assert "maps/bad.yaml:2:1: unknown key 'parametres'" in result.stderr


def test_a_file_that_is_not_there_is_named(run: Run, write: Path) -> None:
    result = run("check", "maps/absent.yaml")
    assert result.exit_code == 1
    assert result.stderr.startswith("maps/absent.yaml: can not read the mapping")


def test_a_patch_is_checked_by_its_name(run: Run, write: Path) -> None:
    result = run("check", "llama")
    assert result.exit_code == 0
    assert "llama.tepatch.yaml: no problems" in result.stdout


def test_a_folder_of_a_patchs_name_does_not_hide_the_patch(run: Run, write: Path) -> None:
    (write / "llama").mkdir()
    assert run("check", "llama").exit_code == 0


def test_a_name_that_is_neither_file_nor_patch_is_wrong_usage(run: Run, write: Path) -> None:
    result = run("check", "lama")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("lama: neither a file nor the name of a patch\n")
    assert "Did you mean 'llama'" in result.stderr
