"""Which layers of Qwen 3 have experts, and that their router's loss is Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import tepatch
from tepatch.testing import small_sizes

SIZES = small_sizes(
    num_hidden_layers=4, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, initializer_range=0.2
)
CONFIGS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "all": ({}, [0, 1, 2, 3]),
    "every_second": ({"decoder_sparse_step": 2, "norm_topk_prob": True}, [1, 3]),
    "some_dense": ({"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 8}, [0, 2, 3]),
}
"""What is said of the layers, and those that have experts then."""


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_have_experts_where_the_config_says(name: str, packed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields, sparse = CONFIGS[name]
    stock = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **fields)).eval()
    stock.save_pretrained(tmp_path / "checkpoint", save_original_format=not packed)
    ours = tepatch.load("qwen3_moe", tmp_path / "checkpoint", backend="reference")
    assert [i for i, layer in enumerate(ours.model.layers) if hasattr(layer.mlp, "experts")] == sparse
    ids = torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    found, expected = (model(ids, labels=ids, output_router_logits=True) for model in (ours, stock))
    assert len(found.router_logits) == len(sparse)
    for key in ("logits", "loss", "aux_loss"):
        assert_close(getattr(found, key), getattr(expected, key), terms=forward_terms(stock.config, 24), name=key)
    held = ours.state_dict()
    assert held.keys() == stock.state_dict().keys()
    assert all(torch.equal(held[key], tensor) for key, tensor in stock.state_dict().items())
    ours.save_pretrained(tmp_path / "saved")
    saved, original = (load_file(tmp_path / folder / "model.safetensors") for folder in ("saved", "checkpoint"))
    assert (f"model.layers.{sparse[0]}.mlp.experts.gate_up_proj" in original) is packed
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in original.items())
