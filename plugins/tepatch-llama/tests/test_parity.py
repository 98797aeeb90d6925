"""The patched Llama computes what Hugging Face's computes, over every kind of Llama config, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms, gradient_terms
from transformers import LlamaModel

import tepatch
from tepatch.errors import PlanError, UnsupportedError
from tepatch.testing.cases import cache_name
from tepatch.transfer.fill import restore_tensors

CACHE = str(cache_name(LlamaModel.forward))
"""What models call their cache in this version of transformers."""

LONG = {"rope_theta": 10000.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, **LONG},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **LONG},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.0 + 0.5 * i for i in range(8)],
        "factor": 8.0,
        **LONG,
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 8},
    "head_dim_large": {"head_dim": 32, "num_key_value_heads": 1},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "both_biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    **{
        f"act_{name}": {"hidden_act": name} for name in ("gelu_pytorch_tanh", "gelu_new", "relu", "relu2", "quick_gelu")
    },
    **{f"rope_{name}": {"rope_parameters": rope} for name, rope in ROPES.items()},
}

Make = Callable[..., Any]
Save = Callable[..., Path]


def ids(batch: int = 2, tokens: int = 48) -> torch.Tensor:
    return torch.randint(1, 128, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_those_of_hugging_face(name: str, tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(**CONFIGS[name])
    model = tepatch.load("llama", save_checkpoint(stock, shards=3), backend="reference")
    assert type(model) is type(stock)
    ours, theirs = (m(ids(), labels=ids()) for m in (model, stock))
    assert_close(ours.logits, theirs.logits, terms=forward_terms(stock.config, 48))
    ours.loss.backward()
    theirs.loss.backward()
    # The plan backwards turns our gradients into Hugging Face's, tensor by tensor.
    gradients = {key: p.grad for key, p in model.named_parameters()}
    expected = {key: p.grad for key, p in stock.named_parameters()}
    restored = dict(restore_tensors(model.tepatch.plan, gradients))
    assert restored.keys() == expected.keys()
    for key, gradient in restored.items():
        assert_close(gradient, expected[key], terms=gradient_terms(stock.config, 48, 2 * 48), name=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_comes_back_bit_for_bit(name: str, tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(dtype=torch.bfloat16, **CONFIGS[name])
    model = tepatch.load("llama", save_checkpoint(stock, shards=3), backend="reference")
    restored = dict(restore_tensors(model.tepatch.plan, dict(model.named_parameters())))
    expected = dict(stock.named_parameters())
    assert restored.keys() == expected.keys()
    for key, tensor in restored.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("rope", ROPES)
def test_positions_past_the_original_length_agree(rope: str, tiny_llama: Make, save_checkpoint: Save) -> None:
    """Dynamic and longrope change their frequencies by length: in both models alike, back and forth."""
    stock = tiny_llama(rope_parameters=ROPES[rope])
    model = tepatch.load("llama", save_checkpoint(stock), backend="reference")
    for tokens in (16, 200, 16):
        with torch.no_grad():
            ours, theirs = (m(ids(1, tokens)).logits for m in (model, stock))
        assert_close(ours, theirs, terms=forward_terms(stock.config, tokens))


def test_angles_stay_in_float32_when_the_model_is_cast(tiny_llama: Make, save_checkpoint: Save) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    before = model.model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_the_same(use_cache: bool, tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama()
    model = tepatch.load("llama", save_checkpoint(stock), backend="reference")
    arguments = {"max_new_tokens": 24, "do_sample": False, "use_cache": use_cache}
    assert torch.equal(model.generate(ids(2, 8), **arguments), stock.generate(ids(2, 8), **arguments))


def test_left_padded_batches_generate_the_same(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama()
    model = tepatch.load("llama", save_checkpoint(stock), backend="reference")
    tokens, mask = ids(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[0, :4], mask[1, :7] = 0, 0
    arguments = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    assert torch.equal(model.generate(tokens, **arguments), stock.generate(tokens, **arguments))


@pytest.mark.parametrize("padding", ["none", "left", "right", "packed"])
def test_masks_and_positions_agree(padding: str, tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama()
    model = tepatch.load("llama", save_checkpoint(stock), backend="reference")
    tokens, arguments, keep = ids(2, 12), {}, torch.ones(2, 12, dtype=torch.bool)
    if padding == "packed":
        # The stock model keeps packed sequences apart only where there is no cache.
        arguments["position_ids"] = torch.tensor([[*range(5), *range(7)], [*range(9), *range(3)]])
        arguments["use_cache"] = False
    elif padding != "none":
        keep[0, :5] = padding != "left"
        keep[0, -5:] &= padding != "right"
        arguments["attention_mask"] = keep.long()
    with torch.no_grad():
        ours, theirs = (m(tokens, **arguments).logits[keep] for m in (model, stock))
    assert_close(ours, theirs, terms=forward_terms(stock.config, 12))


def test_a_prompt_in_chunks_equals_a_prompt_at_once(tiny_llama: Make, save_checkpoint: Save) -> None:
    from transformers import DynamicCache

    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        whole = model(ids(1, 24)).logits
        for chunk in ids(1, 24).split((9, 1, 14), dim=1):
            parts.append(model(chunk, **{CACHE: cache}).logits)
    assert_close(torch.cat(parts, dim=1), whole, terms=forward_terms(model.config, 24))


def test_hidden_states_and_gradient_checkpointing_work_as_in_hugging_face(
    tiny_llama: Make, save_checkpoint: Save
) -> None:
    stock = tiny_llama()
    model = tepatch.load("llama", save_checkpoint(stock), backend="reference")
    ours, theirs = (m(ids(), output_hidden_states=True).hidden_states for m in (model, stock))
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, terms=forward_terms(stock.config, 48))
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    model.train()
    enable()
    model(ids(), labels=ids()).loss.backward()
    assert len(calls) == 2, "the layer is computed again in the backward pass"


def test_attention_weights_are_refused_instead_of_left_empty(tiny_llama: Make, save_checkpoint: Save) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    with pytest.raises(UnsupportedError, match="attention weights"):
        model(ids(), output_attentions=True)


def test_a_mask_that_weighs_instead_of_hiding_is_refused_by_name(tiny_llama: Make, save_checkpoint: Save) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    with pytest.raises(UnsupportedError, match="values between zero and the minimum"):
        model(ids(), attention_mask=torch.full((2, 1, 48, 48), -1.5))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "tanh approximation"),
        ({"hidden_act": "mish"}, "no gated activation"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 10000.0}}, "rope type has not been proven"),
        ({"is_causal": False}, "bidirectional"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weights are quantized"),
    ],
)
def test_what_the_layer_can_not_compute_is_refused_before_reading(
    config: dict[str, Any], message: str, tiny_llama: Make, save_checkpoint: Save
) -> None:
    folder = save_checkpoint(tiny_llama())
    settings = tepatch.hf.config.read_config(folder)
    for key, value in config.items():
        setattr(settings, key, value)
    with pytest.raises(PlanError, match=message) as caught:
        tepatch.load("llama", folder, config=settings)
    assert caught.value.problems[0].where.startswith("decoder.tepatch.yaml:")


@pytest.mark.parametrize("padded", [False, True])
def test_a_static_cache_generates_the_same(padded: bool, tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama()
    model = tepatch.load("llama", save_checkpoint(stock), backend="reference")
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0 if padded else 1
    arguments = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "disable_compile": True}
    ours, theirs = (m.generate(ids(2, 8), cache_implementation="static", **arguments) for m in (model, stock))
    assert torch.equal(ours, theirs)


def test_a_prompt_into_a_static_cache_sees_no_empty_slots(tiny_llama: Make, save_checkpoint: Save) -> None:
    from transformers import StaticCache

    stock = tiny_llama()
    model = tepatch.load("llama", save_checkpoint(stock), backend="reference")
    cache, parts = StaticCache(config=model.config, max_cache_len=40), []
    with torch.no_grad():
        for chunk in ids(1, 24).split((9, 1, 14), dim=1):
            parts.append(model(chunk, **{CACHE: cache}).logits)
        expected = stock(ids(1, 24)).logits
    assert_close(torch.cat(parts, dim=1), expected, terms=forward_terms(stock.config, 24))


def test_a_layer_called_alone_in_chunks_is_causal_to_the_bottom_right(tiny_llama: Make, save_checkpoint: Save) -> None:
    """Hugging Face's model gives masks for later chunks; who calls a layer without one gets the same."""
    from transformers import DynamicCache, StaticCache

    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    states = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = layer(states, position_embeddings=rotary(states, torch.arange(12)[None]))
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
            parts = []
            for start, stop in ((0, 5), (5, 12)):
                positions = rotary(states, torch.arange(start, stop)[None])
                parts.append(layer(states[:, start:stop], position_embeddings=positions, **{CACHE: cache}))
            assert_close(torch.cat(parts, dim=1), whole, terms=forward_terms(model.config, 12))


def test_a_mask_for_other_keys_is_refused(tiny_llama: Make, save_checkpoint: Save) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    with pytest.raises(UnsupportedError, match="48 keys"):
        model(ids(), attention_mask=torch.ones(2, 1, 48, 60, dtype=torch.bool))
