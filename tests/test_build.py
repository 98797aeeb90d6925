"""Fresh weights are those that Hugging Face's initialiser draws for the same architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, gradient_terms
from transformers import LlamaConfig, LlamaForCausalLM

import tepatch
from tepatch.errors import BackendError, PlanError
from tepatch.transfer.fill import restore_tensors

CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "pad_token_id": 3,
    "attention_bias": True,
    "mlp_bias": True,
    "initializer_range": 0.05,
}


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_has_the_statistics_of_hugging_faces(tied: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG, tie_word_embeddings=tied)
    model = tepatch.build("llama", config, backend="reference")
    stock = dict(LlamaForCausalLM(config).named_parameters())
    made = dict(restore_tensors(model.tepatch.plan, dict(model.named_parameters())))
    assert made.keys() == stock.keys()
    for name, tensor in made.items():
        expected = stock[name].detach()
        if expected.std() == 0:
            assert torch.equal(tensor, expected), name
        else:
            assert float(tensor.std()) == pytest.approx(float(expected.std()), rel=0.03), name
            assert abs(float(tensor.mean())) < 0.002, name
    assert not made["model.embed_tokens.weight"][3].any(), "the padding token's embedding is zero"


def test_the_fused_qkv_is_not_ones_and_the_norms_are() -> None:
    model = tepatch.build("llama", LlamaConfig(**CONFIG), backend="reference")
    fused = model.model.layers[0].self_attn.qkv
    assert float(fused.weight.detach().std()) == pytest.approx(0.05, rel=0.03)
    assert torch.equal(fused.layernorm_weight, torch.ones(256))


def test_seeds_decide_the_weights_and_layers_differ() -> None:
    def made(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = tepatch.build("llama", LlamaConfig(**CONFIG), backend="reference")
        return torch.stack([layer.mlp.fc2_weight.detach() for layer in model.model.layers])

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))
    assert not torch.equal(*made(1))


def test_a_fresh_model_trains_as_hugging_faces_does() -> None:
    """The same start, the same batch, the same losses and changes for five steps."""
    ids = torch.randint(0, 1000, (2, 32), generator=torch.Generator().manual_seed(5))
    model = tepatch.build("llama", LlamaConfig(**CONFIG), backend="reference")
    stock = LlamaForCausalLM(LlamaConfig(**CONFIG))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stock.load_state_dict(before)
    losses: list[torch.Tensor] = []
    for each in (model, stock):
        each.train()
        # Its epsilon is larger than gradients are: else those that are nothing but rounding would be whole steps.
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2, eps=0.1)
        history = []
        for _ in range(5):
            loss = each(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.detach())
        losses.append(torch.stack(history))
    terms = 5 * gradient_terms(stock.config, 32, 2 * 32)
    assert_close(*losses, terms=terms)
    found = model.state_dict()
    for name, tensor in stock.state_dict().items():
        assert_close(found[name] - before[name], tensor - before[name], terms=terms, condition=2, name=name)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "foo"},
        {"rope_parameters": {"rope_type": "bogus", "rope_theta": 1e4}},
        {"num_key_value_heads": 0},
        {"num_hidden_layers": 0},
    ],
    ids=str,
)
def test_what_the_layer_can_not_compute_is_refused(fields: dict[str, Any]) -> None:
    config = LlamaConfig(**CONFIG)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(PlanError) as caught:
        tepatch.build("llama", config, backend="reference")
    assert caught.value.problems[0].where


def test_te_that_is_absent_is_what_the_error_names() -> None:
    from tepatch.te import probe

    if probe().usable:
        pytest.skip("Transformer Engine can be used here")
    with pytest.raises(BackendError, match="backend"):
        tepatch.build("llama", LlamaConfig(**CONFIG), backend="te")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "auto"])
def test_dtype_follows_the_argument_then_the_config(dtype: Any) -> None:
    model = tepatch.build("llama", LlamaConfig(**CONFIG, dtype="float16"), dtype=dtype, backend="reference")
    assert model.dtype == (torch.float16 if dtype == "auto" else torch.bfloat16)


def test_a_fresh_model_is_in_training_mode_like_hugging_faces() -> None:
    assert tepatch.build("llama", LlamaConfig(**CONFIG), backend="reference").training


def test_the_users_config_is_not_touched(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    config = LlamaConfig(**CONFIG)
    before = config.to_dict()
    tepatch.build("llama", config, backend="reference", dtype=torch.bfloat16)
    assert config.to_dict() == before
