"""What patches are proven with, and the proof that a first load makes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
)

import tepatch
from tepatch import proof, proven
from tepatch.errors import PlanError, PluginError, ProofError
from tepatch.patch import Patch
from tepatch.plugins import default_host
from tepatch.testing import Case, check_patch, conformance_tests
from tepatch.testing.cases import rope_tables
from tepatch.testing.sizes import shrunk, small_sizes
from tepatch.testing.suite import CHECKS, Suite

Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def as_users_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(proof.VARIABLE)
    monkeypatch.delenv("TEPATCH_PROVEN", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def llama(tmp_path: Path) -> Patch:
    """Llama's patch with a mapping file of its own, and so without a record."""
    given = default_host().patch("llama")
    path = tmp_path / "plugin" / "mapping.yaml"
    path.parent.mkdir()
    path.write_text(given.mapping_path().read_text(encoding="utf-8"), encoding="utf-8")
    return Patch(name="llama", model_types=("llama",), replace=dict(given.replace), mapping=str(path))


@contextlib.contextmanager
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers that forget their cache, as those of 0.1.0 did with transformers 5.24."""
    from tepatch.te.attention import SelfAttention

    forward = SelfAttention.forward
    with monkeypatch.context() as patched:
        forgetful = {"cache": None, "past_key_values": None}
        patched.setattr(SelfAttention, "forward", lambda self, *a, **k: forward(self, *a, **{**k, **forgetful}))
        yield


@pytest.mark.parametrize("name", sorted(default_host().patches))
def test_every_patch_is_proven_with_what_is_installed_here(name: str) -> None:
    patch = default_host().patch(name)
    assert proven.is_proven(patch, proven.installed(patch)), "run the kit with TEPATCH_PROVEN=1"


def test_what_is_known_is_not_tried(tiny_llama: Any, save_checkpoint: Save) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    assert not [note for note in model.tepatch.notes if "proven" in note]
    assert not proof.cache_folder().exists()


def test_another_combination_is_tried_once_and_remembered(llama: Patch, tiny_llama: Any, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_llama())
    state = torch.random.get_rng_state()
    model = tepatch.load(llama, folder, backend="reference")
    assert torch.equal(state, torch.random.get_rng_state())
    (note,) = (note for note in model.tepatch.notes if "proven" in note)
    assert note.startswith("proven with transformers ")
    assert "no-mask, left-padding, packing, chunks, static-caches, gradients" in note
    (path,) = proof.cache_folder().glob("*.json")
    assert json.loads(path.read_text())["patch"] == "llama"
    again = tepatch.load(llama, folder, backend="reference")
    assert not [note for note in again.tepatch.notes if "proven" in note]
    other = tepatch.load(llama, save_checkpoint(tiny_llama(rms_norm_eps=1e-3), name="other"), backend="reference")
    assert [note for note in other.tepatch.notes if "proven" in note], "another config has a proof of its own"


def test_what_differs_is_refused_before_a_weight_is_read(
    llama: Patch, tiny_llama: Any, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint(tiny_llama())
    size = (folder / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    os.truncate(folder / "model.safetensors", header)  # no weight can be read
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(size)
    with broken(monkeypatch), pytest.raises(ProofError) as caught:
        tepatch.load(llama, folder, backend="reference")
    text = str(caught.value)
    assert text.startswith("'llama' was not proven with transformers ")
    assert "chunks: the largest difference is" in text
    assert "no-mask" not in text, "without a cache nothing is wrong"
    assert "pass prove=False or set TEPATCH_PROVE=0" in text
    assert not proof.cache_folder().exists(), "only what passed is remembered"


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_the_advice_is_right_both_switches_go_on_and_the_report_says_so(
    how: str, llama: Patch, tiny_llama: Any, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "environment":
        monkeypatch.setenv("TEPATCH_PROVE", "0")
    options: dict[str, Any] = {"prove": False} if how == "argument" else {}
    with broken(monkeypatch):
        model = tepatch.load(llama, save_checkpoint(tiny_llama()), backend="reference", **options)
    (note,) = model.tepatch.notes
    assert note.startswith("the patch 'llama' was not proven with transformers ")
    assert note.endswith(", and was not tried")
    assert note in str(model.tepatch)


def test_a_model_that_is_built_is_proven_too(llama: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**small_sizes())
    with broken(monkeypatch), pytest.raises(ProofError):
        tepatch.build(llama, config, backend="reference")
    model = tepatch.build(llama, config, backend="reference")
    assert "proven with" in model.tepatch.notes[0]


def test_whether_to_prove_is_a_yes_or_a_no(tiny_llama: Any, save_checkpoint: Save) -> None:
    with pytest.raises(PlanError, match="prove: is a yes or a no"):
        tepatch.load("llama", save_checkpoint(tiny_llama()), prove="never")  # type: ignore[arg-type]


def test_a_proof_is_not_disturbed_by_what_is_around_it(llama: Patch, tiny_llama: Any, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_llama())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            model = tepatch.load(llama, folder, backend="reference")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert "proven with" in model.tepatch.notes[0]


def test_a_folder_that_can_not_be_written_costs_the_memory_only(
    llama: Patch, tiny_llama: Any, save_checkpoint: Save, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    model = tepatch.load(llama, save_checkpoint(tiny_llama()), backend="reference")
    assert [note for note in model.tepatch.notes if note.startswith("the proof could not be remembered")]


def test_other_files_of_the_same_version_are_another_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = default_host().patch("llama")
    versions = proven.installed(patch)
    assert not proven.is_proven(patch, {**versions, "source": "0"})
    assert "with changes in the files of transformers" in proof._described(patch, {**versions, "source": "0"})
    assert not proven.is_proven(patch, {**versions, "transformers": "5.99.0"})
    without = {name: version for name, version in versions.items() if name not in ("peft", "accelerate")}
    assert proven.is_proven(patch, without), "what is not installed can not be another version"
    assert not proven.is_proven(patch, {**versions, "transformer-engine": "99"})


WIDE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 128256}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + i / 50 for i in range(48)],
    "long_factor": [2 + i / 5 for i in range(48)],
    "original_max_position_embeddings": 4096,
}
REAL: dict[str, Any] = {
    "llama": LlamaConfig(
        **WIDE, num_key_value_heads=8, rope_parameters=LLAMA3, max_position_embeddings=131072, eos_token_id=[128001]
    ),
    "phi3": Phi3Config(
        max_position_embeddings=131072, original_max_position_embeddings=4096, pad_token_id=0, rope_parameters=LONG
    ),
    "qwen2": Qwen2Config(use_sliding_window=True, max_window_layers=28),
    "qwen3_moe": Qwen3MoeConfig(mlp_only_layers=[5], decoder_sparse_step=2),
    "gemma2": Gemma2Config(),
    "gemma3": Gemma3TextConfig(),
    "bert": BertConfig(),
}


@pytest.mark.parametrize("name", REAL)
def test_a_small_model_of_a_real_config_is_proven_in_seconds(name: str, llama: Patch) -> None:
    from tepatch.hf.config import model_class

    config = REAL[name]
    passed = proof.try_patch(default_host().patch(name), config, model_class(config))
    expected = list(proof._CHECKS) if name != "bert" else ["no-mask", "left-padding", "gradients"]
    assert passed == expected


def test_a_small_config_has_each_kind_of_layer_and_keeps_what_is_computed() -> None:
    small = {name: shrunk(config) for name, config in REAL.items()}
    assert [small[name].layer_types for name in ("qwen2", "gemma2")] == [
        ["full_attention", "sliding_attention"],
        ["sliding_attention", "full_attention"],
    ]
    moe = small["qwen3_moe"]
    assert (moe.num_hidden_layers, moe.mlp_only_layers, moe.num_experts, moe.num_experts_per_tok) == (2, [0], 4, 2)
    heads = {name: (each.num_attention_heads, getattr(each, "num_key_value_heads", 0)) for name, each in small.items()}
    assert heads["llama"] == (4, 2)
    assert heads["phi3"] == (4, 4)
    assert small["gemma2"].head_dim * 4 != small["gemma2"].hidden_size
    assert small["llama"].rope_parameters == {**LLAMA3, "original_max_position_embeddings": 32}
    (rope,) = rope_tables(small["phi3"]).values()
    assert len(rope["short_factor"]) == len(rope["long_factor"]) == 8
    assert small["phi3"].max_position_embeddings / small["phi3"].original_max_position_embeddings == 32
    assert small["llama"].rms_norm_eps == REAL["llama"].rms_norm_eps
    assert REAL["llama"].hidden_size == 4096, "the config itself is left as it is"


def test_a_config_that_stays_large_is_told(llama: Patch) -> None:
    class Large(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.table = torch.nn.Linear(10_000, 10_000)

    with pytest.raises(ProofError, match=r"a small model of this config would have 100,\d+,\d+ parameters"):
        proof.try_patch(llama, LlamaConfig(**small_sizes()), Large)


CASE = Case("tiny", LlamaConfig(**small_sizes(num_hidden_layers=2)))


def test_the_kit_writes_what_it_has_proven_and_nothing_that_failed(
    llama: Patch, tmp_path: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = proven.record_path(llama)
    assert path == tmp_path / "plugin" / "proven.json"
    suite = Suite(llama, [CASE])
    for name in list(CHECKS)[:-1]:
        if name not in ("mutations", "gpu"):
            suite.run(CASE, name, lambda: tmp_path_factory.mktemp("case"))
    suite.record()
    assert not path.exists(), "checks are missing"
    suite.run(CASE, "mutations", lambda: tmp_path_factory.mktemp("case"))
    suite.record()
    suite.record()
    entry = json.loads(path.read_text())["patches"]["llama"]
    assert entry["with"] == [proven.installed(llama)]
    assert entry["skipped"]["tiny"].keys() == {"refusals", "router-logits", "round-trip-unconverted"}
    assert proven.is_proven(llama, proven.installed(llama))
    suite._outcomes["tiny"]["plan"] = suite._outcomes["tiny"]["no-mask"].__class__(status="failed")
    path.unlink()
    suite.record()
    assert not path.exists()


def test_what_was_proven_and_is_skipped_is_a_failure(llama: Patch, tmp_path_factory: Any) -> None:
    proven.write_record(llama, proven.installed(llama), {"tiny": {"router-logits": "no routers"}})
    test = conformance_tests(llama, [Case("tiny", CASE.config, skip={"packing": "of no use"})])
    case = test.pytestmark[0].args[1][0].values[0]  # type: ignore[attr-defined]
    with pytest.raises(pytest.skip.Exception, match="no routers"):
        test(case, "router-logits", tmp_path_factory)
    with pytest.raises(AssertionError, match=r"packing: was proven and is skipped now: of no use; .*proven\.json"):
        test(case, "packing", tmp_path_factory)


def test_a_cache_under_a_name_that_the_kit_does_not_know_is_no_skip(
    llama: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tepatch.testing.cases.CACHE_NAMES", ("of_old",))
    found = check_patch(llama, [CASE], checks=["decoding"])
    assert "the model gives a cache as" in found.failures[0]


def test_records_of_several_versions_are_kept_in_order(llama: Patch) -> None:
    for version in ("5.9.0", "5.24.0", "5.17.0", "5.24.0"):
        proven.write_record(llama, {"transformers": version, "torch": "2.13.0"}, {})
    assert [each["transformers"] for each in proven.combinations(llama)] == ["5.9.0", "5.17.0", "5.24.0"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": "else"}', '{"format": "tepatch-proven-1", "patches": {"llama": 1}}']
)
def test_a_record_that_is_none_is_told(text: str, llama: Patch) -> None:
    proven.record_path(llama).write_text(text)
    with pytest.raises(PluginError, match="this does not say what patches were proven with"):
        proven.is_proven(llama, {})
