"""``tepatch verify``: the table, the verdict, and the tokens that it is about."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from tepatch.cli.output import print_json
from tepatch.cli.tokens import SAMPLE
from tepatch.verify import Agreement, Verification, judge

if TYPE_CHECKING:
    from conftest import Run

SHORT = ("--backend", "reference", "--device", "cpu")


def agreement(**fields: float) -> Agreement:
    zero = dict.fromkeys(Agreement.__dataclass_fields__, 0.0)
    return Agreement(**{**zero, **fields})


def verification(dtype: str, ours: Agreement, theirs: Agreement) -> Verification:
    return Verification(
        patch="llama",
        location="here",
        tokens=1,
        dtype=dtype,
        device="cpu",
        backend="reference",
        ours=ours,
        hf_bfloat16=theirs,
        versions={},
    )


def tokens_of(run: Run, tiny: Path, *arguments: str | Path) -> int:
    result = run("verify", "llama", tiny, *SHORT, "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    count: int = json.loads(result.stdout)["tokens"]
    return count


def test_a_sound_model_passes_and_its_errors_are_shown_beside_transformers_own(run: Run, tiny: Path) -> None:
    result = run("verify", "llama", tiny, *SHORT)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    heading = next(line for line in lines if "max error" in line)
    assert [name for name in ("largest logit", "mean", "relative", "KL", "top-1") if name not in heading] == []
    assert any(line.startswith("tepatch (float32, reference) ") and line.endswith("100.00%") for line in lines)
    assert any(line.startswith("transformers bfloat16 ") for line in lines)
    assert lines[-1].startswith("passed: largest error / largest logit ")
    assert "Loading weights" not in result.stderr


def test_json_has_the_errors_and_the_verdict(run: Run, tiny: Path) -> None:
    result = run("verify", "auto", tiny, *SHORT, "--json")
    found = json.loads(result.stdout)
    assert (found["patch"], found["location"], found["dtype"]) == ("llama", str(tiny), "float32")
    assert found["verdict"] == {
        "passed": True,
        "measure": "max_error_relative",
        "value": found["ours"]["max_error_relative"],
        "bound": 1e-4,
    }


def test_a_hub_id_is_verified_from_the_cache_alone(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def no_network(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        raise OSError("there is no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny, repo / "snapshots" / ("0" * 40))
    result = run("verify", "llama", "org/tiny", *SHORT, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["location"] == "org/tiny"
    assert asked == []


def test_another_class_is_verified_without_what_is_dropped(run: Run, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        dtype="float32",
    )
    tensors = {**LlamaForSequenceClassification(config).state_dict(), "lm_head.weight": torch.ones(64, 32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path)
    (tmp_path / "tokens").write_text("[[3, 1, 4], [1, 5, 9]]")
    words = ["verify", "llama", tmp_path, *SHORT, "--tokens", tmp_path / "tokens"]
    as_classifier = ["--auto-class", "LlamaForSequenceClassification"]
    for one_alone in (as_classifier, ["--drop", "lm_head"]):
        refused = run(*words, *one_alone)
        assert refused.exit_code == 1
        assert "lm_head.weight" in refused.stderr
    result = run(*words, *as_classifier, "--drop", "lm_head")
    assert result.exit_code == 0, result.stderr


def test_a_real_model_passes_in_float32(run: Run, smollm2: Path) -> None:
    result = run("verify", "llama", smollm2, *SHORT, "--dtype", "float32", "--max-tokens", "12", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["tokens"] == 12


@pytest.mark.parametrize("as_json", [False, True])
def test_a_model_with_swapped_weights_fails(
    as_json: bool, run: Run, tiny: Path, tmp_path: Path, llama_mapping: str
) -> None:
    mapping = tmp_path / "swapped.yaml"
    right, wrong = "[mlp.gate_proj.weight, mlp.up_proj.weight]", "[mlp.up_proj.weight, mlp.gate_proj.weight]"
    assert right in llama_mapping
    mapping.write_text(llama_mapping.replace(right, wrong))
    result = run("verify", "llama", tiny, *SHORT, "--mapping", mapping, *(["--json"] if as_json else []))
    assert result.exit_code == 1
    if as_json:
        assert json.loads(result.stdout)["verdict"]["passed"] is False
    else:
        assert result.stdout.splitlines()[-1].startswith("FAILED: ")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_full_precision_is_held_to_the_largest_logit(dtype: str) -> None:
    bad = agreement(relative_error=9.0)  # bounds half precision only
    assert judge(verification(dtype, agreement(max_error_relative=1.0e-4), bad)).passed
    assert not judge(verification(dtype, agreement(max_error_relative=1.1e-4), bad)).passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_held_to_transformers_own_error(dtype: str) -> None:
    theirs = agreement(relative_error=0.01)
    assert judge(verification(dtype, agreement(relative_error=0.0149, max_error_relative=9.0), theirs)).passed
    assert not judge(verification(dtype, agreement(relative_error=0.0151), theirs)).passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_error_that_is_not_a_number_passes_nothing(dtype: str) -> None:
    nan = agreement(relative_error=math.nan, max_error_relative=math.nan)
    assert not judge(verification(dtype, nan, agreement(relative_error=1.0))).passed


def test_numbers_that_json_has_not_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(verification("float32", agreement(max_error=math.inf, mean_error=math.nan), agreement()).to_json())

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    ours = json.loads(capsys.readouterr().out, parse_constant=refuse)["ours"]
    assert (ours["max_error"], ours["mean_error"], ours["kl_divergence"]) == (None, None, 0.0)


@pytest.mark.parametrize(
    ("content", "count"), [("[1, 2, 3]", 3), (" [[1, 2], [3, 4]]\n", 4), ("1 2\n3\n4 5\n", 5), ("7", 1)]
)
def test_token_ids_are_read_from_a_file(content: str, count: int, run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text(content)
    assert tokens_of(run, tiny, "--tokens", tmp_path / "ids") == count


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no token at all"),
        ("[]", "no token at all"),
        ("[[]]", "no token at all"),
        ("[[1, 2], [3]]", "sequences of different lengths"),
        ("[[1], 2]", "not token ids"),
        ("[1, true]", "not token ids"),
        ("[1.5]", "not token ids"),
        ("[-1]", "not token ids"),
        (f"[{2**63}]", "not token ids"),
        ("[1, 2", "not token ids"),
        ("[" * 100_000, "not token ids"),
        ("1, 2", "not token ids"),
        ("9" * 5000, "not token ids"),
    ],
)
def test_what_is_not_token_ids_is_refused(content: str, said: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text(content)
    result = run("verify", "llama", tiny, *SHORT, "--tokens", tmp_path / "ids")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{tmp_path / 'ids'}: {said}")


def test_a_token_outside_the_vocabulary_is_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("1 64")
    result = run("verify", "llama", tiny, *SHORT, "--tokens", tmp_path / "ids")
    assert result.exit_code == 1
    assert "outside the vocabulary" in result.stderr


def test_text_goes_through_the_checkpoints_tokenizer(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("three ships had been lost")
    assert tokens_of(run, tiny, "--text", tmp_path / "text") == 5


def test_text_that_makes_no_token_is_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("  \n")
    result = run("verify", "llama", tiny, *SHORT, "--text", tmp_path / "text")
    assert result.exit_code == 1
    assert "makes no token" in result.stderr


def test_a_file_that_is_not_text_is_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe\x00")
    result = run("verify", "llama", tiny, *SHORT, "--text", tmp_path / "text")
    assert result.exit_code == 1
    assert "UTF-8" in result.stderr


def test_without_tokens_a_paragraph_of_plain_english_is_used(run: Run, tiny: Path) -> None:
    assert SAMPLE.isascii()
    assert tokens_of(run, tiny) > len(SAMPLE.split()) * 0.9


def test_each_sequence_is_cut(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("[[1, 2, 3], [4, 5, 6]]")
    assert tokens_of(run, tiny, "--tokens", tmp_path / "ids", "--max-tokens", "2") == 4


def test_a_checkpoint_without_a_tokenizer_needs_token_ids(run: Run, tiny: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    result = run("verify", "llama", bare, *SHORT)
    assert result.exit_code == 1
    assert "there is no tokenizer beside the weights" in result.stderr
    assert "fix: pass token ids with --tokens FILE" in result.stderr


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "not JSON",
        '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}',
    ],
)
def test_a_damaged_tokenizer_is_an_error_without_a_traceback(
    content: str, run: Run, tiny: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny, damaged)
    (damaged / "tokenizer.json").write_text(content)
    result = run("verify", "llama", damaged, *SHORT)
    assert result.exit_code == 1
    assert "the tokenizer can not be used" in result.stderr
    assert "--tokens FILE" in result.stderr


def test_tokens_and_text_together_are_wrong_usage(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("1")
    result = run("verify", "llama", tiny, "--tokens", tmp_path / "ids", "--text", tmp_path / "ids")
    assert result.exit_code == 2
    assert "give one of --tokens and --text" in result.stderr


def test_one_file_is_no_location_to_verify(run: Run, tiny: Path) -> None:
    result = run("verify", "llama", tiny / "model.safetensors")
    assert result.exit_code == 2
    assert "a folder, not one file" in result.stderr


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_can_not_be_used_is_refused_before_anything_is_read(device: str, run: Run, tiny: Path) -> None:
    result = run("verify", "llama", tiny, "--device", device, "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "BackendError"
    assert error["problems"][0]["where"] == f"device={device}"


def test_transformer_engine_in_float32_is_held_to_what_tf32_can_do() -> None:
    fine = agreement(relative_error=0.0)
    te = dataclasses.replace(verification("float32", agreement(max_error_relative=4.9e-3), fine), backend="te")
    assert judge(te).passed
    assert not judge(dataclasses.replace(te, ours=agreement(max_error_relative=5.1e-3))).passed


def test_a_checkpoint_in_the_layout_of_the_layers_is_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    assert run("convert", "llama", tiny, tmp_path / "te", "--quiet").exit_code == 0
    result = run("verify", "llama", tmp_path / "te", *SHORT)
    assert result.exit_code == 1
    assert "tepatch certify" in result.stderr
