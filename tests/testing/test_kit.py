"""The kit on the layers of a real plugin, and on such as have one mistake each: every check has to be able to fail."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama import modeling_llama as hf

import tepatch
from tepatch import te
from tepatch.contract import passes_on
from tepatch.errors import PluginError
from tepatch.te.attention import SelfAttention
from tepatch.te.decoder import attention_options
from tepatch.te.rope import Float32Rotary
from tepatch.testing import Case, Conformance, check_patch, small_sizes
from tepatch.testing.cases import cache_name
from tepatch_llama import layer as llama

CACHE = str(cache_name(LlamaModel.forward))
"""What models call their cache in this version of transformers."""

MAPPING = Path(te.__file__).with_name("decoder.tepatch.yaml")
"""All that Llama's mapping is for a model without biases."""
PARITY = [
    *("no-mask", "left-padding", "right-padding", "lengths", "positions", "packing", "decoding", "chunks"),
    *("chunks-left-padded", "static-caches", "generation", "hidden-states", "gradients"),
]


def tiny(**config: Any) -> LlamaConfig:
    return LlamaConfig(**small_sizes(**{"num_hidden_layers": 2, **config}))


def kind(base: type, name: str) -> Callable[[type], type]:
    """Gives a class the name of Hugging Face's, which it must have, and another one in this module."""

    def rename(cls: type) -> type:
        globals()[name] = cls
        cls.__name__ = cls.__qualname__ = base.__name__
        return cls

    return rename


@kind(hf.LlamaDecoderLayer, "WrongScale")
class _WrongScale(llama.LlamaDecoderLayer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = SelfAttention(**{**attention_options(config, layer_idx), "softmax_scale": 0.26})


@kind(hf.LlamaDecoderLayer, "NoMask")
class _NoMask(llama.LlamaDecoderLayer):
    @passes_on  # it does not: that is the mistake
    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states, **kwargs)


@kind(hf.LlamaDecoderLayer, "NoCache")
class _NoCache(llama.LlamaDecoderLayer):
    @passes_on
    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        if kwargs.get(CACHE) is not None and hidden_states.shape[1] == 1:
            kwargs[CACHE] = attention_mask = None
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)


@kind(hf.LlamaDecoderLayer, "NoGradient")
class _NoGradient(llama.LlamaDecoderLayer):
    def after_mlp(self, out: Tensor) -> Tensor:
        return out.detach()


@kind(hf.LlamaDecoderLayer, "RoundedOutput")
class _RoundedOutput(llama.LlamaDecoderLayer):
    def after_mlp(self, out: Tensor) -> Tensor:
        return out.bfloat16().float()


@kind(hf.LlamaDecoderLayer, "Halved")
class _Halved(llama.LlamaDecoderLayer):
    """Right if the mapping doubles what it halves."""

    def after_mlp(self, out: Tensor) -> Tensor:
        return out * 0.5


@kind(hf.LlamaRotaryEmbedding, "OneBase")
class _OneBase(Float32Rotary, hf.LlamaRotaryEmbedding):
    """Right for the base that the cases have, and for no other."""

    def __init__(self, config: Any, device: Any = None) -> None:
        super().__init__(tiny())


def patch(*, layer: str = "", rotary: str = "", mapping: Path = MAPPING) -> tepatch.Patch:
    """Llama's patch with a class of this module in it."""
    ours = f"{__name__}:{layer}" if layer else f"{llama.__name__}:LlamaDecoderLayer"
    return tepatch.Patch(
        name="broken",
        model_types=("llama",),
        replace={
            f"{hf.__name__}:LlamaDecoderLayer": ours,
            f"{hf.__name__}:LlamaRotaryEmbedding": f"{__name__ if rotary else llama.__name__}:"
            f"{rotary or 'LlamaRotaryEmbedding'}",
        },
        mapping=str(mapping),
    )


def edited(folder: Path, old: str, new: str) -> Path:
    """The mapping with another text in it."""
    text = MAPPING.read_text()
    assert text.count(old) == 1
    path = folder / "edited.tepatch.yaml"
    path.write_text(text.replace(old, new))
    return path


def statuses(found: Conformance) -> dict[str, str]:
    ((_, report),) = found.cases.items()
    return {name: outcome.status for name, outcome in report.outcomes.items() if outcome.status != "not run"}


def failed(found: Conformance) -> set[str]:
    return {name for name, status in statuses(found).items() if status == "failed"}


def test_a_right_patch_passes_every_check() -> None:
    found = check_patch("llama", [Case("tiny", tiny(), refuse={"hidden_act": "tanh"})])
    assert found.failures == []
    assert found.passed
    skipped = {name for name, status in statuses(found).items() if status == "skipped"}
    assert skipped - {"gpu"} == {"round-trip-unconverted", "router-logits"}
    outcomes = found.cases["tiny"].outcomes
    assert {name for name in outcomes if outcomes[name].status == "proven"} == {"plan", "round-trip", "refusals"}
    assert all(outcomes[name].figures["theirs"] > 0 for name in PARITY if name != "generation")
    assert outcomes["mutations"].figures["mistakes"] > 30


def test_a_config_alone_is_a_case() -> None:
    found = check_patch("llama", {"plain": tiny()}, checks=["plan"])
    assert list(found.cases) == ["plain"]
    assert statuses(found) == {"plan": "proven"}


@pytest.mark.parametrize(
    ("layer", "wrong"),
    [
        ("WrongScale", set(PARITY) - {"generation"}),
        ("NoMask", {"left-padding", "packing", "chunks-left-padded", "generation", "static-caches"}),
        ("NoCache", {"decoding", "chunks", "chunks-left-padded", "static-caches", "generation"}),
        ("NoGradient", {"gradients"}),
        ("RoundedOutput", set(PARITY) - {"generation"}),
    ],
)
def test_a_layer_with_a_mistake_fails_where_the_mistake_shows(layer: str, wrong: set[str]) -> None:
    found = failed(check_patch(patch(layer=layer), [Case("tiny", tiny())], checks=PARITY))
    assert found - {"generation"} == wrong - {"generation"}
    assert "generation" not in wrong or "generation" in found


def test_swapped_parts_fail_in_parity_and_in_no_proof(tmp_path: Path) -> None:
    mapping = edited(tmp_path, "mlp.gate_proj.weight, mlp.up_proj.weight", "mlp.up_proj.weight, mlp.gate_proj.weight")
    names = ["plan", "round-trip", "no-mask", "gradients"]
    found = check_patch(patch(mapping=mapping), [Case("tiny", tiny())], checks=names)
    assert statuses(found) == {"plan": "proven", "round-trip": "proven", "no-mask": "failed", "gradients": "failed"}


def test_a_missing_rule_fails_every_check_by_its_name(tmp_path: Path) -> None:
    mapping = edited(tmp_path, "    mlp.fc2_weight: mlp.down_proj.weight\n", "")
    found = check_patch(patch(mapping=mapping), [Case("tiny", tiny())], checks=["plan", "no-mask"])
    assert failed(found) == {"plan", "no-mask"}
    assert "mlp.down_proj.weight" in found.failures[0]


def test_a_tensor_that_does_not_come_back_is_named(tmp_path: Path) -> None:
    text = edited(tmp_path, "  model.norm.weight: same", "  model.norm.weight: {create: 1}").read_text()
    mapping = tmp_path / "lossy.tepatch.yaml"
    mapping.write_text(text.replace("ignore:\n", "ignore:\n  - model.norm.weight: nobody needs it\n"))
    found = check_patch(patch(mapping=mapping), [Case("tiny", tiny())], checks=["plan", "round-trip"])
    assert statuses(found) == {"plan": "proven", "round-trip": "failed"}
    assert "model.norm.weight: missing" in found.failures[0]


def test_values_that_the_mapping_changes_are_changed_back_in_gradients(tmp_path: Path) -> None:
    doubled = "mlp.fc2_weight: {of: mlp.down_proj.weight, scale: 2}"
    mapping = edited(tmp_path, "mlp.fc2_weight: mlp.down_proj.weight", doubled)
    names = ["no-mask", "gradients", "round-trip", "mutations"]
    found = check_patch(patch(layer="Halved", mapping=mapping), [Case("tiny", tiny())], checks=names)
    assert found.passed, found
    outcomes = found.cases["tiny"].outcomes
    assert "the values of 2 only nearly, as the plan says" in outcomes["round-trip"].detail
    weight = "model.layers.{layer}.mlp.fc2_weight"
    mistakes = outcomes["mutations"].notes["mutants"]
    assert f"{weight} without its scale and offset" in mistakes
    assert f"{weight} scaled and offset" not in mistakes


def test_a_type_of_rope_that_is_let_through_and_computed_wrong_is_named(tmp_path: Path) -> None:
    case = Case("tiny", tiny())
    found = check_patch("llama", [case], checks=["rope-types"])
    assert list(found.cases["tiny"].outcomes["rope-types"].figures) == [
        *("linear", "dynamic", "llama3", "yarn", "longrope")
    ]
    found = check_patch(patch(rotary="OneBase"), [case], checks=["rope-types"])
    assert statuses(found) == {"rope-types": "failed"}
    assert "rope type linear" in found.failures[0]
    # What the mapping does not let through needs not be right.
    types = "['default', 'linear', 'dynamic', 'llama3', 'yarn', 'longrope']"
    mapping = edited(tmp_path, types, "['default']")
    found = check_patch(patch(rotary="OneBase", mapping=mapping), [case], checks=["rope-types"])
    assert statuses(found) == {"rope-types": "skipped"}


def test_a_layer_that_ignores_its_config_is_told_by_a_mutation_only() -> None:
    found = check_patch(patch(rotary="OneBase"), [Case("tiny", tiny())], checks=["no-mask", "mutations"])
    assert statuses(found) == {"no-mask": "passed", "mutations": "failed"}
    assert "three times rope_parameters.rope_theta" in found.failures[0]
    assert len(found.failures[0].splitlines()) == 2, "the only one that nobody notices"


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        ({"initializer_range": 0.5}, "initializer_range = 0.5 is not refused"),
        ({"vocab_size": 5}, "not by a 'requires' of the mapping"),
    ],
)
def test_a_config_that_is_not_refused_as_promised_fails(refuse: dict[str, Any], message: str) -> None:
    found = check_patch("llama", [Case("tiny", tiny(), refuse=refuse)], checks=["refusals"])
    assert failed(found) == {"refusals"}
    assert message in found.failures[0]


def test_a_refusal_that_does_not_name_the_field_fails(tmp_path: Path) -> None:
    text = edited(tmp_path, "\nrequires:\n", "\nrequires:\n  - spread < 0.5: too much\n").read_text()
    mapping = tmp_path / "hidden.tepatch.yaml"
    mapping.write_text(text.replace("\nsizes:\n", "\nsizes:\n  spread: initializer_range\n"))
    case = Case("tiny", tiny(), refuse={"initializer_range": 0.9})
    found = check_patch(patch(mapping=mapping), [case], checks=["refusals"])
    assert "does not name the field" in found.failures[0]


def test_requirements_that_no_case_refutes_are_listed() -> None:
    cases = [
        Case("one", tiny(), refuse={"hidden_act": "tanh"}),
        Case("other", tiny(), refuse=[{"num_attention_heads": 3}, {"rope_parameters.rope_type": "mine"}]),
    ]
    found = check_patch("llama", cases, checks=["refusals"])
    assert found.passed
    left = [text.split()[0] for text in found.not_refuted]
    assert left == ["num_hidden_layers", "d", "optional(is_causal)", "optional(quantization_config)"]
    assert found.to_json()["not_refuted"] == found.not_refuted
    assert "shown by no case to refuse anything" in str(found)


def test_mistakes_are_not_made_in_a_model_that_is_wrong_already() -> None:
    found = check_patch(patch(layer="RoundedOutput"), [Case("tiny", tiny())], checks=["mutations"])
    assert statuses(found) == {"mutations": "skipped"}
    assert "see no-mask" in found.cases["tiny"].outcomes["mutations"].detail


def test_a_mapping_that_can_not_be_written_again_is_no_caught_mistake(tmp_path: Path) -> None:
    # One condition may have 400 characters; that of a scope and that of a rule become one.
    long = " and ".join(["layer >= 0"] * 20)
    text = edited(
        tmp_path,
        "    mlp.fc2_weight: mlp.down_proj.weight",
        f"""\
    mlp <- mlp:
      when: {long}
      fc2_weight: {{when: {long}, of: down_proj.weight}}""",
    ).read_text()
    mapping = tmp_path / "long.tepatch.yaml"
    mapping.write_text(text)
    found = check_patch(patch(mapping=mapping), [Case("tiny", tiny())], checks=["plan", "mutations"])
    assert statuses(found) == {"plan": "proven", "mutations": "failed"}
    assert "written down again without a change, the mapping is not what it was" in found.failures[0]


def test_what_is_called_invisible_must_be_so() -> None:
    case = Case("tiny", tiny(), invisible={"three times rope_parameters.rope_theta": "there is one base"})
    assert check_patch(patch(rotary="OneBase"), [case], checks=["mutations"]).passed
    wrong = Case("tiny", tiny(num_hidden_layers=1), invisible={"drop model.norm.weight": "it is never used"})
    found = check_patch("llama", [wrong], checks=["mutations"])
    assert found.failures == [
        "tiny, mutations: not among the mistakes that nobody notices, as 'invisible' says: drop model.norm.weight"
    ]


def test_a_check_is_left_out_for_a_reason_that_is_kept() -> None:
    found = check_patch("llama", [Case("tiny", tiny(), skip={"plan": "of no use here"})], checks=["plan"])
    outcome = found.cases["tiny"].outcomes["plan"]
    assert (outcome.status, outcome.detail) == ("skipped", "of no use here")


def test_an_error_of_a_layer_is_a_failed_check_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    @passes_on
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("the layer has failed")

    monkeypatch.setattr(llama.LlamaDecoderLayer, "forward", forward)
    found = check_patch("llama", [Case("tiny", tiny())], checks=["plan", "no-mask"])
    assert statuses(found) == {"plan": "proven", "no-mask": "failed"}
    assert found.failures == ["tiny, no-mask: RuntimeError: the layer has failed"]
    with pytest.raises(PluginError, match="the layer has failed"):
        found.raise_for_failures()


def test_other_heads_are_chosen_by_their_auto_class() -> None:
    case = Case("classes", tiny(), auto_class="AutoModelForSequenceClassification")
    found = check_patch("llama", [case], checks=["plan"])
    # Llama's mapping may not know this head: what counts is which model was asked for.
    assert found.cases["classes"].model == "LlamaForSequenceClassification"


def test_lengths_and_windows_that_a_test_can_not_pass_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = tiny(max_position_embeddings=4096, rope_parameters=rope)
    with pytest.raises(PluginError, match="the original length of rope_parameters is so large that 4104 tokens"):
        check_patch("llama", [Case("long", config)], checks=["no-mask"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: check_patch("llama", []), "no cases to check"),
        (lambda: check_patch("llama", [Case("a", tiny()), Case("a", tiny())]), "two cases have this name"),
        (lambda: check_patch("llama", [Case("a", tiny())], checks=["plans"]), "there is no check 'plans'"),
        (lambda: check_patch("llama", [Case("a", tiny(), skip={"plans": "why"})]), "there is no check 'plans'"),
        (lambda: check_patch("lama", {"a": tiny()}, checks=["plan"]), "lama"),
        (lambda: check_patch("llama", [Case("a", tiny(), auto_class="AutoModelForPoems")], checks=["plan"]), "no such"),
        (lambda: check_patch("llama", [Case("a", tiny(), refuse={"x.y": 1})], checks=["refusals"]), "no such field"),
        (
            lambda: check_patch("llama", [Case("a", tiny(), refuse={"vocab_size": "x"})], checks=["refusals"]),
            "its own class",
        ),
        (lambda: Case("", tiny()), "needs a name"),
        (lambda: Case("a", {"hidden_size": 64}), "its config is none"),  # type: ignore[arg-type]
        (lambda: Case("a", tiny(), gpu={"hidden_size": 64}), "its config is none"),  # type: ignore[arg-type]
        (lambda: Case("a", tiny(), skip={"plan": ""}), "needs a reason"),
        (lambda: Case("a", tiny(), invisible={"drop x": ""}), "needs a reason"),
    ],
)
def test_a_case_that_is_not_well_formed_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        make()


def test_nothing_of_the_process_is_left_changed() -> None:
    threads = torch.get_num_threads()
    config = tiny()
    before = config.to_dict()
    check_patch("llama", [Case("tiny", config, refuse={"hidden_act": "tanh"})], checks=["refusals", "no-mask"])
    assert torch.get_num_threads() == threads
    assert config.to_dict() == before
    assert isinstance(hf.LlamaDecoderLayer.__init__, types.FunctionType)
