"""Whatever the texts of a checkpoint hold: an error of ours, soon, and nothing in it that a terminal obeys."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tepatch
from tepatch.cli import app
from tepatch.cli.output import say
from tepatch.errors import CheckpointError, MappingError, PlanError, Problem, TepatchError, visible
from tepatch.hf.config import read_config
from tepatch.mapping import parse_mapping
from tepatch.mapping.values import BindError
from tepatch.planning.bind import Binder

Make = Callable[..., Any]
Save = Callable[..., Path]
ESCAPE, BIDI = "\x1b[31m", "\u202e"


@pytest.fixture
def folder(tiny_llama: Make, save_checkpoint: Save) -> Path:
    return save_checkpoint(tiny_llama())


def put(folder: Path, file: str = "config.json", **fields: Any) -> None:
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**data, **fields}))


def refused(folder: Path, patch: str = "llama", **options: Any) -> str:
    """What ``load`` says, in less than the few seconds that any answer may take."""
    started = time.process_time()
    with pytest.raises(TepatchError) as caught:
        tepatch.load(patch, folder, backend="reference", progress=False, **options)
    assert time.process_time() - started < 5
    error: BaseException | None = caught.value
    while error is not None:  # a traceback shows them all
        assert visible(str(error)) == str(error)
        error = None if error.__suppress_context__ and error.__cause__ is None else error.__cause__ or error.__context__
    return str(caught.value)


WRONG: dict[str, Any] = {
    "architectures": (3, "x", [3], {"a": 1}, [["LlamaForCausalLM"]], [ESCAPE]),
    "text_config": ("x", 3, ["x"], True),
    "model_type": (3, ["llama"], f"{ESCAPE}llama", f"llama{BIDI}", "\ud800"),
    "num_hidden_layers": ("x", [3], {}, 10**6, 10**9, 2**64, 10**300, 1e300),
    "hidden_size": ("x", None, 0, 10**12, 10**30, [64]),
    "num_attention_heads": ("x", 0, -4, 10**9, {}),
    "head_dim": ("x", 10**12, 10**8 * 3),
    "vocab_size": ("x", 10**12, None),
    "num_labels": (10**9, "x"),
    "num_key_value_heads": ("x", 0, 10**9),
    "rope_parameters": (3, "x", [1], {"rope_type": 3}, {"rope_type": f"{ESCAPE}x"}),
    "hidden_act": (3, ESCAPE, {}, "none of them"),
    "configuration_files": (3, "x", [3], ["config.../../x.json"], ["config./etc/passwd.json"]),
    "transformers_version": (3, {}),
}


@pytest.mark.parametrize("patch", ["llama", "auto"])
@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG.items() for value in values],
    ids=lambda v: ascii(v)[:30],
)
def test_a_config_that_makes_no_sense_is_an_error_of_ours(field: str, value: Any, patch: str, folder: Path) -> None:
    put(folder, **{field: value})
    refused(folder, patch)


TEXTS = {
    "deep": "[" * 100_000,
    "deep, and closed": '{"a": ' + "[" * 200 + "]" * 200 + "}",
    "twice": '{"model_type": "llama", "model_type": "gemma"}',
    "no object": "[1]",
    "digits": '{"hidden_size": ' + "9" * 5000 + "}",
    "no UTF-8": b"\xff\xfe{}".decode("latin1"),
    "empty": "",
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_that_is_no_config_is_an_error_of_ours(kind: str, file: str, folder: Path) -> None:
    (folder / file).write_bytes(TEXTS[kind].encode("latin1"))
    assert file in refused(folder)


@pytest.mark.parametrize("count", [3_000, 4_000])
def test_more_layers_than_tensors_are_refused_by_the_headers(count: int, folder: Path, tmp_path: Path) -> None:
    te = tepatch.convert("llama", folder, tmp_path / "te", progress=False).destination
    for where in (folder, te):
        put(where, num_hidden_layers=count)
        started = time.process_time()
        with pytest.raises(PlanError, match=rf"tensor for each 'layer'(.|\n)*found: +{count:,}"):
            tepatch.plan("llama", where)
        assert time.process_time() - started < 1


def test_a_versioned_config_is_looked_at_as_the_first_is(folder: Path, tmp_path: Path) -> None:
    put(folder, configuration_files=["config.4.0.0.json"])
    (tmp_path / "outside.json").write_text((folder / "config.json").read_text())
    (folder / "config.4.0.0.json").symlink_to(tmp_path / "outside.json")
    assert "leads out of the checkpoint's folder" in refused(folder)
    (folder / "config.4.0.0.json").unlink()
    (folder / "config.4.0.0.json").write_text((folder / "config.json").read_text())
    put(folder, "config.4.0.0.json", num_hidden_layers=10**9)
    assert "is beyond anything that this checkpoint could hold" in refused(folder)
    put(folder, "config.4.0.0.json", num_hidden_layers=3)
    assert read_config(folder).num_hidden_layers == 3


def test_what_real_configs_have_is_taken(tmp_path: Path) -> None:
    """Large numbers where they are meant, texts of several lines, signs of any script."""
    fields = {
        "model_type": "llama",
        "max_position_embeddings": 10_485_760,
        "vocab_size": 262_144,
        "num_hidden_layers": 126,
        "sliding_window": None,
        "id2label": {str(n): f"классы\n{n} \u200d" for n in range(3)},
        "bos_token_id": 128_000,
        "routed_scaling_factor": 1e9,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path, {}).max_position_embeddings == 10_485_760


@pytest.mark.parametrize("text", [ESCAPE, BIDI, "\x9b2J", "\r", "\x07", "\u2066", "\x7f"])
def test_an_error_shows_what_a_terminal_would_obey(text: str) -> None:
    problem = Problem(where=text, what=text, details=(text,), expected=text, found=text, fix=text)
    error = TepatchError([problem, problem], heading=text)
    assert text not in str(error)
    assert text not in str(problem)
    assert str(error).count(ascii(text)[1:-1]) == 13


def test_a_line_of_a_message_has_an_end() -> None:
    assert len(str(Problem(where="x", what="y" * 10**7))) < 3_000


def test_a_mapping_shows_no_controls(folder: Path, tmp_path: Path) -> None:
    for text in (r'"\e[31m"', r'"\u202e"', r'"a\x9b"'):
        with pytest.raises(MappingError, match="characters that can not be printed") as caught:
            parse_mapping(f"version: 1\nignore:\n  - x.weight: {text}\nparameters:\n  a: b\n", name="m.yaml")
        assert str(caught.value).isprintable() or "\x1b" not in str(caught.value)
        with pytest.raises(MappingError, match="characters that can not be printed"):
            parse_mapping(f"version: 1\nparameters:\n  {text}: b\n", name="m.yaml")


CAPTURES = {
    "product": "captures: {layer: num_hidden_layers, a: 100000, b: 100000}\nparameters:\n  x.{a}.{b}: y.{a}.{b}\n",
    "one": "captures: {layer: num_hidden_layers, a: 131072}\nparameters:\n  model.x.{a}: model.y.{a}\n",
    "range": "captures: {a: range(10000000)}\nparameters:\n  x.{a}: y.{a}\n",
    "of a config": "captures: {a: vocab_size * 100000000000}\nparameters:\n  x.{a}: y.{a}\n",
    "sizes": "sizes: {a: b * 4000000000, b: c * 4000000000, c: 4000000000}\nparameters:\n  model.norm.weight: "
    "{of: y, axes: 'a -> a'}\n",
}


@pytest.mark.parametrize("kind", CAPTURES)
def test_a_mapping_whose_numbers_multiply_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("version: 1\n" + CAPTURES[kind])
    refused(folder, mapping=tmp_path / "m.yaml")


# -- the command line --


def test_nothing_in_a_checkpoint_reaches_the_terminal_raw(folder: Path, tmp_path: Path) -> None:
    hostile = folder.rename(tmp_path / f"a{ESCAPE}{BIDI}b")
    (hostile / f"notes{ESCAPE}.txt").write_text("x")
    torch.save({}, hostile / "other.bin")
    runner = CliRunner()
    calls = [
        ["plan", "llama", str(hostile)],
        ["convert", "llama", str(hostile), str(tmp_path / f"te{ESCAPE}"), "--quiet"],
        ["plan", "llama", str(tmp_path / f"te{ESCAPE}")],
        ["certify", "llama", str(hostile), str(tmp_path / f"te{ESCAPE}"), "--quiet"],
        ["certify", "--check", str(tmp_path / f"te{ESCAPE}")],
        ["plan", "llama", str(tmp_path / f"none{ESCAPE}")],
        ["check", str(tmp_path / f"none{ESCAPE}.yaml")],
        ["plan", f"none{ESCAPE}", str(hostile)],
    ]
    for call in calls:
        result = runner.invoke(app, call)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert visible(result.output) == result.output, call
        assert result.output.strip()
    model = tepatch.load("llama", hostile, backend="reference", progress=False)
    assert visible(str(model.tepatch)) == str(model.tepatch)


def test_commands_print_in_one_place_only(pytestconfig: pytest.Config) -> None:
    """What a command prints goes through ``say`` or a table, and both show what a terminal would obey."""
    for path in (pytestconfig.rootpath / "tepatch" / "cli").glob("*.py"):
        if path.name not in ("output.py", "tables.py"):
            assert not re.search(
                r"typer\.(echo|secho)|\bprint\(|Console\(|sys\.std(out|err)\.write", path.read_text()
            ), path


def test_an_unknown_class_is_told_without_controls(folder: Path) -> None:
    put(folder, architectures=[f"X{ESCAPE}"])
    with pytest.raises(CheckpointError) as caught:
        read_config(folder)
    assert ESCAPE not in str(caught.value)


@pytest.mark.parametrize("text", [ESCAPE, BIDI, "\x9b2J", "\ud800"])
def test_a_text_of_a_config_that_a_terminal_would_obey_is_refused(text: str, folder: Path) -> None:
    """Also in a field that nothing reads: transformers may log what it holds."""
    put(folder, of_no_use=[{"deep": text}])
    assert "of_no_use.deep: holds characters that a terminal would obey" in refused(folder)


def test_captures_that_multiply_are_counted_before_names_are_made() -> None:
    text = "version: 1\ncaptures: {a: 100000, b: 100000}\nparameters:\n  x.{a}.{b}: y.{a}.{b}\n"
    mapping = parse_mapping(text, name="m.yaml")
    with pytest.raises(BindError, match="stand for more than"):
        next(Binder(mapping, {}).instances(mapping.rules[0]))


def test_what_a_command_says_is_visible(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"a{ESCAPE}{BIDI}b")
    assert capsys.readouterr().out == "a\\x1b[31m\\u202eb\n"
