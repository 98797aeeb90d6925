"""The masks that Hugging Face builds for attention implementation "tepatch", against those it builds for "sdpa"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms, gradient_terms, scores
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
)

import tepatch
from tepatch.errors import UnsupportedError
from tepatch.hf import attention
from tepatch.te.attention import SelfAttention
from tepatch.te.sequences import Varlen, direction, is_plain, layout_of, visible
from tepatch.testing.cases import cache_name

CACHE = str(cache_name(LlamaModel.forward))
"""What models call their cache in this version of transformers."""
MASK_CACHE = str(cache_name(create_causal_mask))

BATCH, TOKENS = 3, 6
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def masks(
    make: Any, config: Any, *, tokens: int = TOKENS, cache: Any = None, **kwargs: Any
) -> tuple[Tensor | None, Tensor]:
    """Our mask, and the boolean mask that "sdpa" gets, never skipped."""
    out = []
    for name in (attention.NAME, "sdpa"):
        config._attn_implementation = name
        kwargs.setdefault("attention_mask", None)
        embeds = torch.zeros(BATCH, tokens, config.hidden_size)
        skip = {} if name == attention.NAME else {"allow_is_causal_skip": False}
        try:
            out.append(make(config, embeds, **{MASK_CACHE: cache}, **kwargs, **skip))
        except TypeError:  # before 5.18 it can only be made to build the mask by another rule
            out.append(make(config, embeds, **{MASK_CACHE: cache}, **kwargs, and_mask_function=everything))
    return out[0], out[1]


def everything(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query.new_ones((), dtype=torch.bool)


def padding(*lengths: int, size: int = TOKENS, side: str = "left") -> Tensor:
    ones = torch.arange(size) < torch.tensor(lengths)[:, None]
    return (ones.flip(1) if side == "left" else ones).long()


def fill(cache: Any, tokens: int, layers: int = 2) -> Any:
    for layer in range(layers):
        states = torch.zeros(BATCH, 1, tokens, 16)
        cache.update(states, states, layer)
    return cache


def assert_same(ours: Tensor | None, theirs: Tensor, num_queries: int, window: int | None = None) -> None:
    if ours is None:
        size = theirs.shape[-1]
        ours = visible(torch.ones(BATCH, 1, 1, size, dtype=torch.int32), num_queries, window)
    elif ours.dtype == torch.int32:
        ours = visible(ours, num_queries, window)
    assert torch.equal(ours, theirs.expand_as(ours))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_told_by_one_number_a_key(side: str) -> None:
    mask = padding(2, 6, 5, side=side)
    ours, theirs = masks(create_causal_mask, LlamaConfig(**SIZES), attention_mask=mask)
    assert ours is not None
    assert (ours.dtype, ours.shape) == (torch.int32, (BATCH, 1, 1, TOKENS))
    assert_same(ours, theirs, TOKENS)


@pytest.mark.parametrize("mask", [None, torch.ones(BATCH, TOKENS, dtype=torch.long)])
def test_a_plainly_causal_batch_gets_no_mask(mask: Tensor | None) -> None:
    ours, theirs = masks(create_causal_mask, LlamaConfig(**SIZES), attention_mask=mask)
    assert ours is None if mask is None else is_plain(ours)
    assert_same(ours, theirs, TOKENS)


def test_packed_rows_are_told_by_their_sequences() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]])
    ours, theirs = masks(create_causal_mask, LlamaConfig(**SIZES), position_ids=positions)
    assert ours is not None
    assert ours[:, 0, 0].tolist() == [[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1]]
    assert_same(ours, theirs, TOKENS)


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("lengths", [(6, 6, 6), (2, 6, 5)])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_counts_what_it_holds_and_what_is_empty(kind: str, lengths: tuple[int, ...], new: int) -> None:
    config = LlamaConfig(**SIZES)
    cache = fill(DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=16), 6)
    mask = torch.cat([padding(*lengths), torch.ones(BATCH, new, dtype=torch.long)], dim=1)
    ours, theirs = masks(create_causal_mask, config, tokens=new, cache=cache, attention_mask=mask)
    assert is_plain(ours) == (kind == "dynamic" and min(lengths) == TOKENS)
    assert_same(ours, theirs, new)


@pytest.mark.parametrize("held", [3, 9])
@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_with_a_window_begins_where_the_window_does(kind: str, new: int, held: int) -> None:
    config = MistralConfig(**SIZES, sliding_window=5)
    cache = fill(
        DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=16), held
    )
    mask = torch.ones(BATCH, held + new, dtype=torch.long)
    mask[0, :2] = 0
    make = create_sliding_window_causal_mask
    ours, theirs = masks(make, config, tokens=new, cache=cache, attention_mask=mask)
    assert_same(ours, theirs, new, window=5)


def test_a_rule_of_somebody_else_becomes_a_boolean_mask() -> None:
    def prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key < 2

    ours, theirs = masks(create_causal_mask, LlamaConfig(**SIZES), or_mask_function=prefix)
    assert ours is not None
    assert ours.dtype == torch.bool
    assert torch.equal(ours, theirs)
    assert ours[0, 0, 0].tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("named", [(-1, 0, 7), (2**62, -(2**62), 2**31), (3, 3, 3)])
def test_packed_rows_are_told_whatever_their_numbers_are(named: tuple[int, int, int]) -> None:
    rows = [[0, 0, 1, 1, 2, 2], [2, 1, 1, 1, 1, 0], [0, 1, 0, 2, 2, 1]]
    packed = torch.tensor([[named[each] for each in row] for row in rows])
    rule = packed_sequence_mask_function(packed)
    ours, theirs = masks(create_causal_mask, LlamaConfig(**SIZES), and_mask_function=rule)
    assert ours is not None
    assert ours.dtype == torch.int32
    assert_same(ours, theirs, TOKENS)


def test_packed_rows_that_are_told_twice_are_apart_where_either_says_so() -> None:
    """By positions, and by a rule besides: two lists of numbers are no list of numbers."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4]])
    rule = packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2], [0] * 6]))
    ours, theirs = masks(create_causal_mask, LlamaConfig(**SIZES), position_ids=positions, and_mask_function=rule)
    assert ours is not None
    assert_same(ours, theirs, TOKENS)
    assert not ours[0, 0, 2, :2].any(), "of three tokens at places 0 to 2, the third is apart"


def test_a_mask_that_is_given_by_its_place_is_taken(tiny_llama: Any, save_checkpoint: Any) -> None:
    stock = tiny_llama()
    model = tepatch.load("llama", save_checkpoint(stock), backend="reference")
    ids, mask = torch.randint(1, 128, (2, 12)), padding(7, 12, size=12)
    expected, found = (each.model(ids, mask).last_hidden_state[mask.bool()] for each in (stock, model))
    assert_close(found, expected, terms=forward_terms(model.config, 12))
    packed = torch.tensor([[*range(5), *range(7)]] * 2)
    expected, found = (each.model(ids, None, packed, use_cache=False).last_hidden_state for each in (stock, model))
    assert_close(found, expected, terms=forward_terms(model.config, 12))


def test_a_stock_module_with_a_window_takes_no_numbers_that_stand_for_nothing() -> None:
    query, wrong = torch.randn(1, 2, 4, 8), torch.tensor([[[[1, 1, -3, 1]]]], dtype=torch.int32)
    for window in (None, 2):
        with pytest.raises(UnsupportedError, match="no sequence numbers"):
            attention.attention_of_stock_modules(
                torch.nn.Module(), query, query, query, wrong, scaling=1.0, sliding_window=window
            )


PADDED = {
    "left": [[0] * 5 + [1] * 7, [1] * 12, [0] * 11 + [1]],
    "right": [[1] * 7 + [0] * 5, [1] * 12, [1] + [0] * 11],
    "holes": [[1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1], [1] * 12],
    "holes and nothing": [[1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 0], [0] * 12, [0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0]],
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, {}),
    "llama with biases": (LlamaForCausalLM, {"attention_bias": True}),
    "mistral with a window": (MistralForCausalLM, {"sliding_window": 3}),
    "gemma": (GemmaForCausalLM, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", PADDED)
def test_the_loss_over_tokens_is_the_stock_models_wherever_padding_is(
    name: str, use_cache: bool, family: str, tmp_path: Any
) -> None:
    """A token that follows on padding is predicted from there, as the first one of a row that is padded on the left."""
    cls, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = cls.config_class(
        **SIZES, intermediate_size=48, vocab_size=64, head_dim=16, initializer_range=0.3, pad_token_id=0, **fields
    )
    stock = cls(config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    stock.save_pretrained(tmp_path)
    model = tepatch.load(config.model_type, tmp_path, backend="reference")
    mask = torch.tensor(PADDED[name])
    ids = torch.randint(1, 64, mask.shape)
    labels = torch.where(mask.bool(), ids, -100)
    losses, gradients = [], []
    for each in (stock, model):
        embeds = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = each(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=use_cache)
        out.loss.backward()
        losses.append(out.loss)
        gradients.append(torch.cat([embeds.grad.flatten(), each.lm_head.weight.grad.flatten()]))  # type: ignore[union-attr]
    assert_close(losses[1], losses[0], terms=forward_terms(config, 12))
    assert_close(gradients[1], gradients[0], terms=gradient_terms(config, 12, int(mask.sum())))


def test_a_rule_that_only_looks_like_a_known_one_is_not_taken_for_it() -> None:
    def causal_mask_function(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key <= query + 1

    out = attention.mask_for_layers(BATCH, TOKENS, TOKENS, mask_function=causal_mask_function)
    assert out is not None
    assert out.dtype == torch.bool
    assert out[0, 0, 0, 1]


def test_bidirectional_attention_is_never_taken_for_causal() -> None:
    config = LlamaConfig(**SIZES)
    config.is_causal = False
    config._attn_implementation = attention.NAME
    mask = create_causal_mask(config, torch.zeros(BATCH, TOKENS, 32), None, None)
    assert mask is not None
    assert direction(mask) is False
    assert visible(mask, TOKENS).all()


@pytest.mark.parametrize("mask", [None, padding(2, 6, 5)])
@pytest.mark.parametrize("num_keys", [TOKENS, TOKENS + 3])
def test_a_stock_module_attends_by_the_same_masks(mask: Tensor | None, num_keys: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(BATCH, 2, TOKENS, 16)
    key, value = (torch.randn(BATCH, 2, num_keys, 16) for _ in range(2))
    ones = torch.ones(BATCH, num_keys - TOKENS, dtype=torch.long)
    numbers = torch.ones(BATCH, num_keys, dtype=torch.int32) if mask is None else torch.cat([ones, mask], 1).int()
    numbers = numbers[:, None, None]
    given = None if mask is None else numbers
    out, _ = attention.attention_of_stock_modules(torch.nn.Module(), query, key, value, given, scaling=0.25)
    bias = torch.zeros(()).masked_fill(~visible(numbers, TOKENS), float("-inf"))
    weights = torch.nan_to_num((query.double() @ key.double().transpose(-1, -2) * 0.25 + bias).softmax(-1))
    expected = (weights @ value.double()).transpose(1, 2)
    rows = visible(numbers, TOKENS).any(-1)[:, 0, :, None, None]
    assert_close(out * rows, expected * rows, terms=16 + 2 * num_keys, condition=scores(query, key, 0.25))


class Reads(TorchDispatchMode):
    """Counts how often a value was read from a tensor: on a GPU, each time the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_step_on_a_plain_batch_reads_nothing_back(tiny_llama: Any, save_checkpoint: Any, use_cache: bool) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference").train()
    ids = torch.randint(1, 128, (2, 12))
    with Reads() as reads:
        loss = model(ids, labels=ids, use_cache=use_cache).loss
        loss.backward()
    assert reads.count == 0
    with Reads() as reads:
        model(ids, attention_mask=torch.ones_like(ids))
    assert reads.count > 0, "a mask has to be read"


def test_a_plain_batch_keeps_what_its_caller_says(tiny_llama: Any, save_checkpoint: Any) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    ids = torch.randint(1, 128, (2, 12))
    embeds = model.get_input_embeddings()(ids)
    expected, terms = model(ids, use_cache=False).logits, forward_terms(model.config, 12)
    assert_close(model(input_ids=ids).logits, expected, terms=terms)
    assert_close(model(inputs_embeds=embeds).logits, expected, terms=terms)
    packed = torch.cat([torch.arange(5), torch.arange(7)])[None]
    alone = model(ids[:, 5:], use_cache=False).logits
    for use_cache in (False, True):
        found = model(ids, position_ids=packed, use_cache=use_cache).logits[:, 5:]
        assert_close(found, alone, terms=terms)


@pytest.mark.parametrize("positions", [[*range(6), *range(6)], [each // 2 for each in range(12)]])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_mask_of_ones_says_that_a_row_is_one_sequence(
    positions: list[int], tiny_llama: Any, save_checkpoint: Any, use_cache: bool
) -> None:
    stock = tiny_llama()
    model = tepatch.load("llama", save_checkpoint(stock), backend="reference")
    ids = torch.randint(1, 128, (2, 12))
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.tensor([positions]), "use_cache": use_cache}
    assert_close(model(ids, **given).logits, stock(ids, **given).logits, terms=forward_terms(model.config, 12))


def test_rules_of_other_models_hold_for_a_plain_batch() -> None:
    """A chunked rule: its stock modules compute by our implementation, and the batch is told to be plain."""
    from transformers import Llama4TextConfig, Llama4TextModel

    torch.manual_seed(0)
    config = Llama4TextConfig(
        **{**SIZES, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        intermediate_size=64,
        intermediate_size_mlp=64,
        vocab_size=64,
        attention_chunk_size=4,
        num_local_experts=1,
        moe_layers=[],
        pad_token_id=0,
    )
    model = Llama4TextModel(config).eval()
    ids = torch.randint(1, 64, (2, 12))
    with torch.no_grad():
        expected = model(ids, use_cache=False)[0]
        model.config._attn_implementation = attention.NAME
        model.register_forward_pre_hook(attention.spare_the_question, with_kwargs=True)
        assert_close(model(ids, use_cache=False)[0], expected, terms=forward_terms(config, 12))


def test_a_stock_module_that_is_not_causal_sees_all_keys() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    wide = key.double()
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), wide, wide).transpose(1, 2)
    for given in ({}, {"is_causal": False}):
        found, _ = attention.attention_of_stock_modules(module, query, key, key, None, **given)
        assert_close(found, expected, terms=8 + 2 * 5, condition=scores(query, key, 8**-0.5))


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.ones(3, 12).long(), "another batch"),
        (torch.ones(2, 3, 12, 12, dtype=torch.bool), r"(?s)another number of heads.*1 or 4"),
        (torch.ones(3, 1, 12, 12, dtype=torch.bool), "another batch"),
        (torch.ones(2, 7).long(), r"(?s)which of all tokens so far.*at least 12"),
    ],
)
def test_a_mask_that_does_not_fit_the_batch_is_named(
    mask: Tensor, found: str, tiny_llama: Any, save_checkpoint: Any
) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    with pytest.raises(UnsupportedError, match=found):
        model(torch.randint(1, 128, (2, 12)), attention_mask=mask)


def test_a_mask_of_the_new_tokens_only_does_not_fit_a_cache(tiny_llama: Any, save_checkpoint: Any) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    ids = torch.randint(1, 128, (2, 12))
    cache = model(ids, use_cache=True)[CACHE]
    with pytest.raises(UnsupportedError, match=r"(?s)which of all tokens so far.*at least 16"):
        model(ids[:, :4], attention_mask=torch.ones(2, 4).long(), **{CACHE: cache})


def test_a_mask_beside_the_places_of_packed_sequences_has_to_say_the_same(
    tiny_llama: Any, save_checkpoint: Any
) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    ids, starts = torch.randint(1, 128, (1, 12)), torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = torch.tensor([[*range(5), *range(7)]])
    given = {"cu_seq_lens_q": starts, "use_cache": False}
    expected = model(ids, position_ids=packed, use_cache=False).logits
    for more in ({}, {"position_ids": packed}, {"attention_mask": torch.ones_like(ids), "position_ids": packed}):
        assert_close(model(ids, **given, **more).logits, expected, terms=forward_terms(model.config, 12))
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    for mask in (padded, torch.ones(1, 1, 12, 12, dtype=torch.bool)):
        with pytest.raises(UnsupportedError, match="say different things"):
            model(ids, attention_mask=mask, **given)
    other = torch.tensor([[*range(6), *range(6)]])
    with pytest.raises(UnsupportedError, match="say different things"):
        model(ids, position_ids=other, **given)
    with pytest.raises(UnsupportedError, match="where sequences begin"):
        model(ids, cu_seq_lens_k=starts, use_cache=False)
    with pytest.raises(UnsupportedError, match="where sequences begin"):
        model(ids, cu_seq_lens_q=[0, 5, 12], use_cache=False)
    with pytest.raises(UnsupportedError, match="where sequences begin"):
        model(ids, cu_seq_lens_q=starts.float(), use_cache=False)
    with pytest.raises(UnsupportedError, match="longest packed sequence"):
        model(ids, cu_seq_lens_q=starts, max_length_q=7.5, use_cache=False)
    cache = model(ids, use_cache=True)[CACHE]
    with pytest.raises(UnsupportedError, match=r"(?s)not continue from a cache.*pass no cache, and use_cache=False"):
        model(ids, **given, **{CACHE: cache})
    assert_close(model(ids, **given).logits, expected, terms=forward_terms(model.config, 12))


def test_a_batch_of_nothing_gives_nothing(tiny_llama: Any, save_checkpoint: Any) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference")
    assert model(torch.zeros(0, 5, dtype=torch.long)).logits.shape == (0, 5, 128)


def test_attention_both_ways_goes_by_lengths_where_there_is_padding() -> None:
    """On an encoder and on a causal layer alike: the mask says which way."""
    config = LlamaConfig(**SIZES)
    config._attn_implementation = attention.NAME
    mask = create_bidirectional_mask(config, torch.zeros(BATCH, TOKENS, 32), padding(2, 6, 5))
    assert direction(mask) is False
    layout = layout_of(mask, TOKENS, TOKENS)
    assert isinstance(layout, Varlen)
    torch.manual_seed(0)
    hidden = torch.randn(BATCH, TOKENS, 32)
    tokens = padding(2, 6, 5).bool()
    for is_causal in (True, False):
        options = {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "layer_idx": 0}
        module = SelfAttention(**options, norm_eps=1e-5, is_causal=is_causal)
        out = module(hidden, attention_mask=mask, position_embeddings=None)
        expected = module(
            hidden, attention_mask=tokens[:, None, None].expand(-1, 1, TOKENS, -1), position_embeddings=None
        )
        # Two products, of 32 terms each, around attention.
        assert_close(out[tokens], expected[tokens], terms=3 * 32 + 16 + 2 * TOKENS)
        # What the last token holds reaches the first one.
        later = hidden.clone()
        later[0, tokens[0].nonzero()[-1]] += 1
        first = tokens[0].nonzero()[0]
        moved = module(later, attention_mask=mask, position_embeddings=None)[0, first]
        assert (moved - out[0, first]).abs().max() > 1e-4


def test_a_mask_for_both_ways_is_refused_by_a_layer_with_a_causal_window() -> None:
    config = LlamaConfig(**SIZES)
    config._attn_implementation = attention.NAME
    mask = create_bidirectional_mask(config, torch.zeros(BATCH, TOKENS, 32), padding(2, 6, 5))
    options = {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "layer_idx": 0}
    module = SelfAttention(**options, norm_eps=1e-5, window=4)
    with pytest.raises(UnsupportedError, match="both ways"):
        module(torch.randn(BATCH, TOKENS, 32), attention_mask=mask, position_embeddings=None)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(TOKENS, TOKENS), (3, TOKENS), (1, TOKENS)])
def test_a_stock_module_keeps_its_window_where_there_is_no_mask(num_queries: int, num_keys: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(BATCH, 2, num_queries, 16)
    key, value = (torch.randn(BATCH, 2, num_keys, 16) for _ in range(2))
    given = {"scaling": 0.25, "sliding_window": 4}
    out, _ = attention.attention_of_stock_modules(torch.nn.Module(), query, key, value, None, **given)
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)[None]
    bias = torch.zeros(distance.shape).masked_fill((distance < 0) | (distance >= 4), float("-inf"))
    weights = (query.double() @ key.double().transpose(-1, -2) * 0.25 + bias).softmax(-1)
    expected = (weights @ value.double()).transpose(1, 2)
    assert_close(out, expected, terms=16 + 2 * num_keys, condition=scores(query, key, 0.25))


def test_a_mask_for_all_rows_of_a_batch_is_the_mask_of_each(tiny_llama: Any, save_checkpoint: Any) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama()), backend="reference", progress=False)
    ids = torch.arange(12).view(2, 6)
    mask = (torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5) | torch.eye(6, dtype=torch.bool)
    each = model(ids, attention_mask=mask.expand(2, 1, 6, 6)).logits
    assert torch.equal(model(ids, attention_mask=mask).logits, each)
