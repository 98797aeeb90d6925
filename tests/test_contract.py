"""What a replacement has to take, and what it may not drop: whatever a release calls its parameters."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama as hf

import tepatch
from tepatch import contract
from tepatch.errors import PluginError, ReplaceError, UnsupportedError


class Stock(nn.Module):
    def __init__(self, size: int, layer_idx: int = 0) -> None:
        super().__init__()

    def forward(self, hidden_states: Tensor, mask: Any = None, cache: Any = None, **kwargs: Any) -> Tensor:
        return hidden_states


def kept(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Decorated(Stock):
    forward = kept(Stock.forward)


class Silent(nn.Module):
    """As a plugin's layer was that knew an older name of the cache."""

    def __init__(self, size: int, layer_idx: int = 0) -> None:
        super().__init__()

    def forward(self, hidden_states: Tensor, mask: Any = None, past: Any = None, **kwargs: Any) -> Tensor:
        return hidden_states


class Named(nn.Module):
    def __init__(self, size: int, layer_idx: int = 0) -> None:
        super().__init__()

    def forward(self, hidden_states: Tensor, *, mask: Any = None, cache: Any = None, **kwargs: Any) -> Tensor:
        return hidden_states


def made(replacement: type, target: type = Stock, **options: Any) -> Any:
    with tepatch.replace_layers({target: replacement}, **options):
        return target(3)


@pytest.mark.parametrize("target", [Stock, Decorated])
def test_a_parameter_that_nobody_takes_is_an_error_before_anything_is_built(target: type) -> None:
    with pytest.raises(ReplaceError) as caught:
        made(Silent, target)
    text = str(caught.value)
    assert f"{target.__name__}: forward of its replacement does not take 'cache'" in text
    assert "Silent.forward(hidden_states, mask, past, kwargs)" in text
    assert "in Patch.ignores, or with replace_layers(" in text


def test_the_error_names_the_library_and_its_version() -> None:
    class Layer(hf.LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
            return hidden_states

    import transformers

    with pytest.raises(ReplaceError, match=rf"transformers {transformers.__version__}"):
        made(Layer, hf.LlamaDecoderLayer)


def test_advice_is_right_a_parameter_that_is_ignored_with_a_reason_may_be_missing() -> None:
    class Without(Named):
        def forward(self, hidden_states: Tensor, *, mask: Any = None, **kwargs: Any) -> Tensor:
            return hidden_states

    layer = made(Without, ignores={"cache": "these layers are an encoder's"})
    assert layer(torch.ones(1), cache=3) is not None


def test_parameters_in_another_order_are_an_error_unless_they_are_keyword_only() -> None:
    class Turned(Named):
        def forward(self, hidden_states: Tensor, cache: Any = None, mask: Any = None, **kwargs: Any) -> Tensor:
            return hidden_states

    with pytest.raises(ReplaceError, match=r"other parameters by position.*\n.*\n.*'mask' where it has 'cache'|'mask'"):
        made(Turned)
    assert type(made(Named)) is Named


def test_a_parameter_that_only_the_replacement_needs_is_an_error() -> None:
    class Needs(Named):
        def forward(
            self, hidden_states: Tensor, *, angle: float, mask: Any = None, cache: Any = None, **kwargs: Any
        ) -> Tensor:
            return hidden_states

    with pytest.raises(ReplaceError, match="needs 'angle'"):
        made(Needs)


def test_constructors_are_compared_too_and_may_hand_all_on() -> None:
    class Narrow(Named):
        def __init__(self, size: int) -> None:
            super().__init__(size)

    class Open(Named):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    with pytest.raises(ReplaceError, match="__init__ of its replacement does not take 'layer_idx'"):
        made(Narrow)
    assert type(made(Open)) is Open


def test_what_takes_everything_without_names_has_to_say_that_it_passes_it_on() -> None:
    class Swallows(Stock):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args)

    class Passes(Stock):
        @contract.passes_on
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    with pytest.raises(ReplaceError, match="does not take 'hidden_states', 'mask', 'cache'"):
        made(Swallows)
    assert made(Passes)(torch.ones(1), cache=1, other=2) is not None


def test_a_subclass_that_keeps_the_stock_forward_is_not_asked() -> None:
    class Same(hf.LlamaDecoderLayer):
        pass

    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
    with tepatch.replace_layers({hf.LlamaDecoderLayer: Same}):
        model = LlamaForCausalLM(config)
    assert model(torch.tensor([[1, 2]]), anything=3) is not None


@pytest.mark.parametrize("name", ["cache_of_tomorrow", "is_causal"])
def test_a_keyword_with_a_value_that_is_not_known_is_an_error(name: str) -> None:
    layer = made(Named)
    assert layer(torch.ones(1), **{name: None}) is not None
    with pytest.raises(UnsupportedError, match=f"{name}: Named was called with a keyword that it does not know"):
        layer(torch.ones(1), **{name: False})


def test_harmless_keywords_have_reasons_and_go_through() -> None:
    layer = made(Named)
    assert layer(torch.ones(1), **dict.fromkeys(contract.HARMLESS, True)) is not None
    assert all(contract.HARMLESS.values())


def test_copies_and_pickles_of_a_layer_refuse_too() -> None:
    layer = made(Named)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for each in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        with pytest.raises(UnsupportedError, match="cache_of_tomorrow"):
            each(torch.ones(1), cache_of_tomorrow=1)


@pytest.mark.filterwarnings("ignore:.*is not known to torch.compile:UserWarning")
def test_a_compiled_layer_refuses_too() -> None:
    layer = made(Named)
    compiled = torch.compile(layer, backend="eager")
    assert torch.equal(compiled(torch.ones(1), mask=None), torch.ones(1))
    with pytest.raises(UnsupportedError, match="cache_of_tomorrow"):
        compiled(torch.ones(1), cache_of_tomorrow=1)


def test_a_patched_model_does_not_drop_what_its_caller_says(tiny_llama: Any, save_checkpoint: Any) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    ids = torch.randint(1, 128, (1, 5))
    assert model(ids, num_items_in_batch=3).logits is not None
    with pytest.raises(UnsupportedError, match="is_causal: LlamaDecoderLayer was called"):
        model(ids, is_causal=False)


def test_a_layer_takes_one_cache_by_either_name(tiny_llama: Any, save_checkpoint: Any) -> None:
    from transformers import DynamicCache

    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    attention, states = model.model.layers[0].self_attn, torch.randn(1, 3, 64)
    given = {"attention_mask": None, "position_embeddings": None}
    lengths = []
    for name in ("cache", "past_key_values"):
        cache = DynamicCache()
        attention(states, **given, **{name: cache})
        lengths.append(cache.get_seq_length(0))
    assert lengths == [3, 3]
    with pytest.raises(UnsupportedError, match="two different caches"):
        attention(states, **given, cache=DynamicCache(), past_key_values=DynamicCache())
    with pytest.raises(UnsupportedError, match=r"(?s)can not write keys and values to this.*found:    list"):
        attention(states, **given, cache=[1])


def test_what_a_patch_ignores_needs_reasons() -> None:
    fields = {"name": "mine", "model_types": ("mine",), "replace": {"a:B": "c:D"}, "mapping": "a:b.yaml"}
    for bad in ({"cache": ""}, {"": "why"}, ["cache"], {"cache": None}):
        with pytest.raises(PluginError, match="bad 'ignores'"):
            tepatch.Patch(**fields, ignores=bad)  # type: ignore[arg-type]
    patch = tepatch.Patch(**fields, ignores={"cache": "an encoder"})  # type: ignore[arg-type]
    assert copy.deepcopy(patch).ignores == {"cache": "an encoder"}
