"""Code written for NVIDIA's te_llama example runs after a change of its import."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from tepatch.contract import passes_on
from tepatch.errors import PlanError, ReplaceError, UnsupportedError
from tepatch.testing.cases import cache_name
from tepatch_llama import TELlamaDecoderLayer, TELlamaForCausalLM, replace_decoder

Make = Callable[..., Any]
Save = Callable[..., Path]


def ids() -> torch.Tensor:
    return torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_from_pretrained_local_loads_a_real_llama(name: str, tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(dtype=torch.bfloat16)
    folder = save_checkpoint(stock, shards=2)
    model = TELlamaForCausalLM.from_pretrained_local(folder, config=stock.config, **{name: torch.float32})
    assert type(model) is LlamaForCausalLM
    assert type(model.model.layers[0]) is TELlamaDecoderLayer
    assert model.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    device = model.device
    with torch.no_grad():
        theirs = stock.float().to(device)(ids().to(device)).logits
        ours = model(ids().to(device)).logits
    if device.type == "cpu":
        assert_close(ours, theirs, terms=forward_terms(stock.config, 24))
    else:
        assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 5e-3


def test_a_single_file_checkpoint_loads_too(tiny_llama: Make, save_checkpoint: Save) -> None:
    model = TELlamaForCausalLM.from_pretrained_local(save_checkpoint(tiny_llama()))
    assert model.tepatch.patch == "llama"


def test_a_missing_tensor_is_an_error_and_not_a_random_one(tiny_llama: Make, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_llama(), drop=("model.layers.1.mlp.up_proj.weight",))
    with pytest.raises(PlanError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        TELlamaForCausalLM.from_pretrained_local(folder)


def test_a_model_is_made_from_a_config(tiny_llama: Make) -> None:
    model = TELlamaForCausalLM(tiny_llama().config)
    assert type(model) is LlamaForCausalLM
    assert type(model.model.layers[0]) is TELlamaDecoderLayer
    loss = model(ids().to(model.device), labels=ids().to(model.device)).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_replace_decoder_works_as_a_context_manager(tiny_llama: Make) -> None:
    config = tiny_llama().config
    with replace_decoder(te_decoder_cls=TELlamaDecoderLayer) as report:
        model = LlamaForCausalLM(config)
    assert report.total == config.num_hidden_layers
    assert {type(layer) for layer in model.model.layers} == {TELlamaDecoderLayer}
    assert {type(layer) for layer in LlamaForCausalLM(config).model.layers} == {modeling_llama.LlamaDecoderLayer}


def test_replace_decoder_takes_a_layer_of_ones_own(tiny_llama: Make) -> None:
    class MyLayer(torch.nn.Module):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__()
            self.layer_idx = layer_idx

        @passes_on
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return args[0]

    with replace_decoder(te_decoder_cls=MyLayer):
        model = LlamaForCausalLM(tiny_llama().config)
    assert [layer.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert type(model.model.rotary_emb) is modeling_llama.LlamaRotaryEmbedding


class LayerOfTheExample(torch.nn.Module):
    """With the signature that the layer of NVIDIA's example has: the cache and the positions are dropped."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, hidden_states: torch.Tensor, *args: Any, attention_mask: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def test_a_layer_that_drops_what_it_is_given_has_to_say_why(tiny_llama: Make) -> None:
    config = tiny_llama().config
    with (
        pytest.raises(ReplaceError, match=r"(?s)does not take 'position_ids'.*replace_layers\(\.\.\., ignores="),
        replace_decoder(LayerOfTheExample),
    ):
        LlamaForCausalLM(config)
    parameters = inspect.signature(modeling_llama.LlamaDecoderLayer.forward).parameters
    cache = str(cache_name(modeling_llama.LlamaDecoderLayer.forward))
    names = [name for name in parameters if name in ("position_ids", "position_embeddings", "use_cache", cache)]
    with replace_decoder(LayerOfTheExample, ignores=dict.fromkeys([*names, "layer_idx"], "as in the example")):
        model = LlamaForCausalLM(config)
    assert model(torch.tensor([[1, 2]]), use_cache=False).logits.shape == (1, 2, config.vocab_size)


def test_a_block_that_builds_nothing_is_an_error() -> None:
    with pytest.raises(ReplaceError), replace_decoder():
        pass


def test_a_model_built_in_the_block_is_initialised_as_hugging_face_would(tiny_llama: Make) -> None:
    config = tiny_llama(hidden_size=256, initializer_range=0.05).config
    with replace_decoder():
        model = LlamaForCausalLM(config)
    layer = model.model.layers[1]
    for weight in (layer.self_attn.qkv.weight, layer.mlp.fc2_weight):
        assert float(weight.detach().std()) == pytest.approx(0.05, rel=0.05)
        assert abs(float(weight.detach().mean())) < 0.002
    assert torch.equal(layer.mlp.layernorm_weight.cpu(), torch.ones(256))
    assert type(model.model.rotary_emb).__module__ == "tepatch_llama.layer"


def test_from_pretrained_in_the_block_is_refused(tiny_llama: Make, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_llama())
    with pytest.raises(UnsupportedError, match="from_pretrained_local"), replace_decoder():
        LlamaForCausalLM.from_pretrained(folder)
