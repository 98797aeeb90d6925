"""``tepatch certify``: verdicts, exit codes, and what is wrong usage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from tepatch.certification.certificate import CERTIFICATE, PAGE

if TYPE_CHECKING:
    from conftest import Run


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(tiny, folder)
    return folder


@pytest.fixture
def te(run: Run, source: Path, tmp_path: Path) -> Path:
    assert run("convert", "llama", source, tmp_path / "te", "--quiet").exit_code == 0
    return tmp_path / "te"


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_conversion_is_certified_and_checked_again(run: Run, source: Path, te: Path) -> None:
    result = run("certify", "auto", source, te, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"PASSED: {source} (hf) -> {te} (te), patch llama"
    assert (te / CERTIFICATE).is_file()
    assert (te / PAGE).is_file()
    for path in (te, te / CERTIFICATE):
        result = run("certify", "--check", path, "--source", source)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith(f"PASSED: {te}, ")


def test_damage_fails_and_is_named(run: Run, source: Path, te: Path) -> None:
    assert run("certify", "llama", source, te).exit_code == 0
    damage(te / "tepatch.safetensors")
    result = run("certify", "--check", te)
    assert result.exit_code == 1
    assert result.stdout.startswith("FAILED (1 problem): ")
    assert f"{te}/tepatch.safetensors: " in result.stderr
    result = run("certify", "llama", source, te)
    assert result.exit_code == 1
    assert result.stdout.startswith("FAILED: ")
    assert "1 of " in result.stderr
    assert "elements differ from the source's" in result.stderr


def test_a_checkpoint_that_can_not_be_opened_fails_in_words(run: Run, source: Path, te: Path) -> None:
    path = te / "tepatch.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    result = run("certify", "llama", source, te)
    assert result.exit_code == 1
    assert f"{path}: is truncated" in result.stderr


def test_json_is_the_certificate_and_the_result_of_a_check(run: Run, source: Path, te: Path) -> None:
    found = json.loads(run("certify", "llama", source, te, "--json").stdout)
    written = json.loads((te / CERTIFICATE).read_text())
    assert found == {key: value for key, value in written.items() if key != "page_sha256"}
    assert json.loads(run("certify", "--check", te, "--json").stdout)["passed"] is True
    damage(te / "config.json")
    result = run("certify", "--check", te, "--json")
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert problem["where"] == str(te / "config.json")


def test_a_certificate_elsewhere_is_checked_with_its_destination(
    run: Run, source: Path, te: Path, tmp_path: Path
) -> None:
    out = tmp_path / "proof"
    assert run("certify", "llama", source, te, "--out", out).exit_code == 0
    assert not (te / CERTIFICATE).exists()
    assert run("certify", "--check", out, "--destination", te).exit_code == 0
    assert run("certify", "--check", out).exit_code == 1


def test_logits_are_compared_over_our_text_or_another(run: Run, source: Path, te: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("three ships had been lost")
    result = run("certify", "llama", source, te, "--verify", "--text", tmp_path / "text", "--json")
    assert result.exit_code == 0, result.stderr
    parity = json.loads(result.stdout)["parity"]
    assert (parity["tokens"], parity["passed"]) == (5, True)


def test_values_that_were_rounded_on_the_way_are_declared(run: Run, source: Path, tmp_path: Path) -> None:
    half, back = tmp_path / "half", tmp_path / "back"
    assert run("convert", "llama", source, half, "--dtype", "bfloat16").exit_code == 0
    assert run("convert", "llama", half, back).exit_code == 0
    result = run("certify", "llama", source, back)
    assert result.exit_code == 1
    assert "say dtype=bfloat16 (--dtype)" in result.stderr
    assert run("certify", "llama", source, back, "--dtype", "bfloat16").exit_code == 0


AS_BARE = ("--auto-class", "AutoModel", "--drop", "lm_head")


def test_what_was_converted_as_another_class_is_certified_as_such(run: Run, source: Path, tmp_path: Path) -> None:
    te, back = tmp_path / "te", tmp_path / "back"
    assert run("convert", "llama", source, te, *AS_BARE).exit_code == 0
    assert run("convert", "llama", te, back).exit_code == 0
    for destination in (te, back):
        assert run("certify", "llama", source, destination).exit_code == 1
        result = run("certify", "llama", source, destination, *AS_BARE)
        assert result.exit_code == 0, result.stderr
        assert "  1 ignored\n" in result.stdout
        assert "note: both are taken for LlamaModel, the class that was asked for\n" in result.stdout
        assert "note: dropped from the source by the caller: lm_head.weight\n" in result.stdout
        written = json.loads((destination / CERTIFICATE).read_text())
        (row,) = [tensor for tensor in written["tensors"] if tensor["status"] == "ignored"]
        assert (row["name"], row["note"]) == ("lm_head.weight", "dropped by the caller")
        assert run("certify", "--check", destination, "--source", source).exit_code == 0


def test_nothing_is_dropped_from_a_source_of_parameters(run: Run, source: Path, te: Path) -> None:
    result = run("certify", "llama", te, source, "--drop", "lm_head")
    assert result.exit_code == 1
    assert "fresh, drop: a checkpoint in the layout of the layers holds the parameters of one model" in result.stderr


def test_what_the_source_drops_may_not_be_in_the_destination(run: Run, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "copy")
    result = run("certify", "llama", source, tmp_path / "copy", *AS_BARE)
    assert result.exit_code == 1
    assert "lm_head.weight" in result.stderr


def test_logits_are_compared_without_what_the_source_drops(run: Run, source: Path, tmp_path: Path) -> None:
    weights = source / "model.safetensors"
    save_file({**load_file(weights), "extra.weight": torch.ones(2)}, weights, metadata={"format": "pt"})
    dropped = ("--drop", "extra", "--auto-class", "AutoModelForCausalLM")
    te, back = tmp_path / "te", tmp_path / "back"
    assert run("convert", "llama", source, te, *dropped).exit_code == 0
    assert run("convert", "llama", te, back).exit_code == 0
    for destination, compared in ((te, source), (back, back)):
        result = run("certify", "llama", source, destination, *dropped, "--verify", "--json")
        assert result.exit_code == 0, result.stderr
        parity = json.loads(result.stdout)["parity"]
        assert (parity["location"], parity["passed"]) == (str(compared), True)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("llama",),
        ("llama", "a"),
        ("llama", "a", "b", "--source", "c"),
        ("llama", "a", "b", "--destination", "c"),
        ("llama", "a", "b", "--text", __file__),
        ("--check", "nowhere"),
        ("llama", "--check", "."),
        ("--check", ".", "--out", "x"),
        ("--check", ".", "--verify"),
        ("--check", ".", "--variant", "fp16"),
        ("--check", ".", "--subfolder", "x"),
        ("--check", ".", "--revision", "main"),
        ("--check", ".", "--dtype", "bfloat16"),
        ("--check", ".", "--auto-class", "AutoModel"),
        ("--check", ".", "--drop", "lm_head"),
        ("no-such-patch", "a", "b"),
        ("llama", "a", "b", "--workers", "0"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...], run: Run) -> None:
    assert run("certify", *arguments).exit_code == 2


def test_options_of_the_comparison_are_refused_by_name_with_check(run: Run) -> None:
    result = run(
        "certify", "--check", ".", "--variant", "a", "--subfolder", "b", "--revision", "c", "--dtype", "float16"
    )
    assert result.exit_code == 2
    text = " ".join(result.stderr.replace("│", " ").split())
    assert "takes no --variant, --subfolder, --revision, --dtype" in text


def test_the_text_is_tokenized_by_the_checkpoint_that_is_named(run: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "above").mkdir()
    below = source.rename(tmp_path / "above" / "sub")
    assert run("convert", "llama", below, tmp_path / "te").exit_code == 0
    for path in (tmp_path / "te").glob("tokenizer*"):
        path.unlink()
    result = run("certify", "llama", tmp_path / "above", tmp_path / "te", "--subfolder", "sub", "--verify")
    assert result.exit_code == 0, result.stderr


def test_a_folder_without_a_certificate_is_a_failure(run: Run, te: Path) -> None:
    result = run("certify", "--check", te)
    assert result.exit_code == 1
    assert "there is no certificate here" in result.stderr


def test_the_help_explains_both_uses(run: Run) -> None:
    text = run("certify", "--help").stdout
    assert "tepatch certify PATCH SRC DST " in text
    assert "tepatch certify --check DST " in text
    assert "not a signature" in " ".join(text.split())
