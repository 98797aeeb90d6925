"""A patched Llama is used as any Llama is: one table, each row a way to call the model.

Each row runs on Hugging Face's model and on ours with the same weights (the models, and what counts as equal, are in
``conftest.py``). The same rows run on a CPU and on a GPU. What is compared are logits of real tokens: at padding a
model computes something, and no two of Hugging Face's own implementations agree on what.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaModel

import tepatch
from tepatch.errors import UnsupportedError
from tepatch.testing.cases import cache_name

CACHE = str(cache_name(LlamaModel.forward))
"""What models call their cache in this version of transformers."""

Row = Callable[[Any, Any], Tensor]
"""From a model and the ``Trio`` that it is of, to the numbers that have to agree."""

ROWS: dict[str, Row] = {}
ON_GPU_ONLY = {"offloaded_cache", "offloaded_static_cache"}
"""Hugging Face's offloaded caches want the streams of an accelerator."""


def row(compute: Row) -> Row:
    ROWS[compute.__name__] = compute
    return compute


def is_patched(model: Any) -> bool:
    return hasattr(model, "tepatch")


def lengths(t: Any) -> list[int]:
    return [t.length, t.length * 2 // 3, t.length // 3, 1]


def mask_of(t: Any, side: str) -> Tensor:
    """Which tokens are real, bool [4, length]; ``side`` is where the padding is."""
    place = torch.arange(t.length)
    if side == "left":
        place = place.flip(0)
    return torch.stack([place < length for length in lengths(t)]).to(t.device)


def positions_of(mask: Tensor) -> Tensor:
    """The positions that ``generate`` gives for a mask: counted from the first real token."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def logits(model: Any, ids: Tensor | None, **arguments: Any) -> Tensor:
    out: Tensor = model(ids, **arguments).logits
    return out


# Masks of two dimensions


@row
def no_mask(model: Any, t: Any) -> Tensor:
    return logits(model, t.tokens())


@row
def one_row(model: Any, t: Any) -> Tensor:
    return logits(model, t.tokens(1))


@row
def one_token(model: Any, t: Any) -> Tensor:
    return logits(model, t.tokens(64, 1))


@row
def without_a_cache(model: Any, t: Any) -> Tensor:
    return logits(model, t.tokens(), use_cache=False)


@row
def all_ones(model: Any, t: Any) -> Tensor:
    return logits(model, t.tokens(), attention_mask=torch.ones_like(t.tokens()))


@row
def right_padded(model: Any, t: Any) -> Tensor:
    mask = mask_of(t, "right")
    return logits(model, t.tokens(), attention_mask=mask.long())[mask]


@row
def left_padded(model: Any, t: Any) -> Tensor:
    mask = mask_of(t, "left")
    return logits(model, t.tokens(), attention_mask=mask.long())[mask]


@row
def left_padded_without_a_cache(model: Any, t: Any) -> Tensor:
    mask = mask_of(t, "left")
    return logits(model, t.tokens(), attention_mask=mask.long(), use_cache=False)[mask]


@row
def left_padded_with_positions(model: Any, t: Any) -> Tensor:
    mask = mask_of(t, "left")
    return logits(model, t.tokens(), attention_mask=mask.long(), position_ids=positions_of(mask))[mask]


@row
def padded_on_both_sides(model: Any, t: Any) -> Tensor:
    mask = mask_of(t, "left")
    mask[:2, -t.length // 4 :] = False
    return logits(model, t.tokens(), attention_mask=mask.long())[mask]


@row
def holes_in_the_middle(model: Any, t: Any) -> Tensor:
    mask = mask_of(t, "right")
    mask[0, 3:7], mask[0, 9], mask[1, ::3] = False, False, False
    return logits(model, t.tokens(), attention_mask=mask.long())[mask]


@row
def a_row_of_padding_only(model: Any, t: Any) -> Tensor:
    mask = mask_of(t, "left")
    mask[1] = False
    return logits(model, t.tokens(), attention_mask=mask.long())[mask]


@row
def mask_of_booleans(model: Any, t: Any) -> Tensor:
    mask = mask_of(t, "left")
    return logits(model, t.tokens(), attention_mask=mask)[mask]


@row
def mask_of_floats(model: Any, t: Any) -> Tensor:
    mask = mask_of(t, "right")
    return logits(model, t.tokens(), attention_mask=mask.float())[mask]


# Masks of four dimensions


def prefix_mask(t: Any) -> Tensor:
    """Bidirectional over a prefix, causal after it: bool [4, 1, length, length]."""
    mask = torch.ones(t.length, t.length, dtype=torch.bool, device=t.device).tril().repeat(4, 1, 1)
    for index, length in enumerate((1, 3, t.length // 2, t.length)):
        mask[index, :length, :length] = True
    return mask[:, None]


@row
def custom_boolean_mask(model: Any, t: Any) -> Tensor:
    return logits(model, t.tokens(), attention_mask=prefix_mask(t))


@row
def custom_mask_of_each_head(model: Any, t: Any) -> Tensor:
    mask = prefix_mask(t).repeat(1, model.config.num_attention_heads, 1, 1)
    mask[:, 1] &= torch.ones_like(mask[0, 0]).triu(-3)
    return logits(model, t.tokens(), attention_mask=mask)


@row
def custom_mask_with_rows_that_see_nothing(model: Any, t: Any) -> Tensor:
    mask = prefix_mask(t)
    mask[:, :, 5:8] = False
    mask[:, :, :, 5:8] = False  # whatever these tokens become, nobody looks at it
    sees = mask[:, 0].any(-1)
    if not is_patched(model):
        # Some kernels of torch make NaN of such rows, and it spreads. That they see themselves changes no other row.
        mask |= torch.eye(t.length, dtype=torch.bool, device=t.device)
    return logits(model, t.tokens(), attention_mask=mask)[sees]


@row
def custom_additive_mask(model: Any, t: Any) -> Tensor:
    mask = torch.zeros(4, 1, t.length, t.length, dtype=model.dtype, device=t.device)
    mask.masked_fill_(~prefix_mask(t), torch.finfo(model.dtype).min)
    return logits(model, t.tokens(), attention_mask=mask)


@row
def custom_additive_mask_with_infinities(model: Any, t: Any) -> Tensor:
    mask = torch.zeros(4, 1, t.length, t.length, dtype=model.dtype, device=t.device)
    mask.masked_fill_(~prefix_mask(t), -torch.inf)
    return logits(model, t.tokens(), attention_mask=mask)


@row
def custom_mask_onto_a_cache(model: Any, t: Any) -> Tensor:
    mask, half = prefix_mask(t), t.length // 2
    mask[:, :, :half, half:] = False
    cache = dynamic(model)
    parts = [
        logits(model, ids, attention_mask=part, **{CACHE: cache})
        for ids, part in (
            (t.tokens()[:, :half], mask[:, :, :half, :half]),
            (t.tokens()[:, half:], mask[:, :, half:]),
        )
    ]
    return torch.cat(parts, dim=1)


# Positions and packing


@row
def shifted_positions(model: Any, t: Any) -> Tensor:
    return logits(model, t.tokens(), position_ids=torch.arange(t.length, device=t.device)[None] + 500)


@row
def positions_of_each_row(model: Any, t: Any) -> Tensor:
    start = torch.tensor([[0], [7], [100], [1000]], device=t.device)
    return logits(model, t.tokens(), position_ids=torch.arange(t.length, device=t.device) + start)


@row
def positions_with_gaps(model: Any, t: Any) -> Tensor:
    """With a cache, which Hugging Face never takes for packed sequences."""
    return logits(model, t.tokens(), position_ids=torch.arange(t.length, device=t.device)[None] * 3)


@row
def positions_and_all_ones(model: Any, t: Any) -> Tensor:
    """A mask of ones says that it is one sequence, also where positions restart."""
    ids, positions = t.tokens(1), packed_positions(t, [5, 9])
    return logits(model, ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False)


def packed_positions(t: Any, ends: list[int]) -> Tensor:
    """Positions of one row [1, length] whose sequences end at ``ends`` and at the end of the row."""
    places = [0, *ends, t.length]
    pieces = [torch.arange(stop - start) for start, stop in pairwise(places)]
    return torch.cat(pieces)[None].to(t.device)


@row
def packed_row(model: Any, t: Any) -> Tensor:
    return logits(model, t.tokens(1), position_ids=packed_positions(t, [5, 6, 15]), use_cache=False)


@row
def packed_row_into_a_new_cache(model: Any, t: Any) -> Tensor:
    """Sequences stay apart. Hugging Face looks for them only without a cache, and is asked for the right answer so."""
    return logits(model, t.tokens(1), position_ids=packed_positions(t, [5, 6, 15]), use_cache=is_patched(model))


@row
def packed_rows(model: Any, t: Any) -> Tensor:
    ends = ([5, 6, 15], [t.length - 1], [], [1, 2, 3])
    positions = torch.cat([packed_positions(t, each) for each in ends])
    return logits(model, t.tokens(), position_ids=positions, use_cache=False)


def flattened(t: Any, *, position_ids: bool, labels: bool = False) -> dict[str, Any]:
    """What Hugging Face's collator makes of sequences of several lengths, with the arguments of flash attention."""
    from transformers import DataCollatorWithFlattening

    collate = DataCollatorWithFlattening(return_position_ids=position_ids, return_flash_attn_kwargs=True)
    features = [{"input_ids": each[:n]} for each, n in zip(t.tokens().tolist(), lengths(t), strict=True)]
    batch = collate(features)
    if not labels:
        del batch["labels"]
    return {key: value.to(t.device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@row
def flattened_with_positions(model: Any, t: Any) -> Tensor:
    batch = flattened(t, position_ids=True)
    return logits(model, batch.pop("input_ids"), **batch, use_cache=False)


@row
def flattened_without_positions(model: Any, t: Any) -> Tensor:
    """Rotary positions are relative. Stock sdpa is told the positions: the lengths, which suffice, it ignores."""
    batch = flattened(t, position_ids=not is_patched(model))
    return logits(model, batch.pop("input_ids"), **batch, use_cache=False)


@row
def flattened_loss(model: Any, t: Any) -> Tensor:
    batch = flattened(t, position_ids=True, labels=True)
    count = torch.tensor(17, device=t.device)
    outs = [model(**batch, use_cache=False, **more) for more in ({}, {"num_items_in_batch": count})]
    # A loss is one number, and may be right to any digit by chance; the logits are not.
    return torch.cat([*(out.logits.flatten() for out in outs), *(out.loss[None] for out in outs)])


# Caches


def dynamic(model: Any, **arguments: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config, **arguments)


def static(model: Any, t: Any, **arguments: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=t.length + 9, **arguments)


def in_chunks(model: Any, t: Any, cache: Any, *, side: str = "", sizes: tuple[int, ...] = (7, 1, 9, 1, 1)) -> Tensor:
    """Logits of a batch that is fed piece by piece (the last piece is the rest), at real tokens only."""
    ids = t.tokens()
    mask = mask_of(t, side) if side else torch.ones_like(ids).bool()
    parts, start = [], 0
    for size in (*sizes, t.length - sum(sizes)):
        stop = start + size
        arguments: dict[str, Any] = {}
        if side:
            # The mask is longer than the input: it covers what the cache holds.
            arguments = {"attention_mask": mask[:, :stop].long(), "position_ids": positions_of(mask)[:, start:stop]}
        parts.append(logits(model, ids[:, start:stop], **{CACHE: cache}, **arguments))
        start = stop
    return torch.cat(parts, dim=1)[mask]


@row
def chunks_into_a_dynamic_cache(model: Any, t: Any) -> Tensor:
    return in_chunks(model, t, dynamic(model))


@row
def chunks_into_a_dynamic_cache_left_padded(model: Any, t: Any) -> Tensor:
    return in_chunks(model, t, dynamic(model), side="left")


@row
def chunks_into_a_dynamic_cache_right_padded(model: Any, t: Any) -> Tensor:
    return in_chunks(model, t, dynamic(model), side="right")


@row
def chunks_into_a_static_cache(model: Any, t: Any) -> Tensor:
    return in_chunks(model, t, static(model, t))


@row
def chunks_into_a_static_cache_left_padded(model: Any, t: Any) -> Tensor:
    return in_chunks(model, t, static(model, t), side="left")


def with_slow_gpu(model: Any, t: Any, cache: Callable[[bool], Any]) -> Tensor:
    """Ours on an offloaded cache, the host ahead of the GPU; Hugging Face's, which is wrong then, on a plain one."""
    if model is not t.ours:
        return in_chunks(model, t, cache(False), side="left")

    def sleep(*_: Any) -> None:
        torch.cuda._sleep(10_000_000)  # cycles, some 5 ms

    handles = [layer.register_forward_pre_hook(sleep) for layer in model.model.layers]
    handles += [layer.self_attn.core_attention.register_forward_pre_hook(sleep) for layer in model.model.layers]
    try:
        return in_chunks(model, t, cache(True), side="left")
    finally:
        for handle in handles:
            handle.remove()


@row
def offloaded_cache(model: Any, t: Any) -> Tensor:
    return with_slow_gpu(model, t, lambda offloading: dynamic(model, offloading=offloading))


@row
def offloaded_static_cache(model: Any, t: Any) -> Tensor:
    return with_slow_gpu(model, t, lambda offloading: static(model, t, offloading=offloading))


@row
def prompt_into_a_static_cache_with_a_mask_of_its_length(model: Any, t: Any) -> Tensor:
    mask = mask_of(t, "left")
    cache = static(model, t)
    longer = torch.cat([mask, torch.ones(4, 9, dtype=torch.bool, device=t.device)], dim=1).long()
    positions = positions_of(mask)
    return logits(model, t.tokens(), attention_mask=longer, position_ids=positions, **{CACHE: cache})[mask]


@row
def cropped_cache(model: Any, t: Any) -> Tensor:
    cache, ids = dynamic(model), t.tokens()
    parts = [logits(model, ids, **{CACHE: cache})]
    cache.crop(-(t.length // 2))
    parts.append(logits(model, ids[:, : t.length // 4], **{CACHE: cache}))
    return torch.cat(parts, dim=1)


@row
def reordered_cache(model: Any, t: Any) -> Tensor:
    cache, ids, mask = dynamic(model), t.tokens(), mask_of(t, "left")
    order = torch.tensor([2, 0, 0, 1], device=t.device)
    model(ids, attention_mask=mask.long(), position_ids=positions_of(mask), **{CACHE: cache})
    cache.reorder_cache(order)
    longer = torch.cat([mask[order], torch.ones_like(mask)], dim=1)
    more = {"attention_mask": longer.long(), "position_ids": positions_of(longer)[:, t.length :]}
    return logits(model, ids, **{CACHE: cache}, **more)


@row
def cache_of_a_window(model: Any, t: Any) -> Tensor:
    """A cache that forgets, as for models with a sliding window: single tokens after a prompt that fits."""
    from transformers import DynamicCache

    config = tepatch.hf.config.read_config(t.folder)
    config.sliding_window = 8
    cache = DynamicCache(config=config)
    ids = t.tokens()
    pieces = [ids[:, :6], *ids[:, 6:22].split(1, dim=1)]
    return torch.cat([logits(model, piece, **{CACHE: cache}) for piece in pieces], dim=1)


# What goes in and comes out


@row
def last_logits_only(model: Any, t: Any) -> Tensor:
    return logits(model, t.tokens(), logits_to_keep=t.length // 3)


@row
def chosen_logits_only(model: Any, t: Any) -> Tensor:
    return logits(model, t.tokens(), logits_to_keep=torch.arange(t.length - 1, 2, -3, device=t.device))


@row
def embeddings_for_tokens(model: Any, t: Any) -> Tensor:
    return logits(model, None, inputs_embeds=model.get_input_embeddings()(t.tokens()))


@row
def as_a_tuple(model: Any, t: Any) -> Tensor:
    out: Tensor = model(t.tokens(), return_dict=False)[0]
    return out


@row
def the_model_inside(model: Any, t: Any) -> Tensor:
    mask = mask_of(t, "left")
    out: Tensor = model.model(t.tokens(), attention_mask=mask.long()).last_hidden_state
    return out[mask]


# Generation with given tokens: what generate feeds its model, and what it gets, with real steps and real caches


def steps(model: Any, t: Any, side: str = "left", **arguments: Any) -> Tensor:
    """The logits of each step of ``generate``, which has to take the tokens that it is told: [4, new, vocab]."""
    told = t.tokens(4, 16, seed=2)
    mask = mask_of(t, side) if side else torch.ones(4, t.length, device=t.device)

    def allowed(index: int, ids: Tensor) -> list[int]:
        return [int(told[index, len(ids) - t.length])]

    out = model.generate(
        t.tokens(),
        attention_mask=mask.long(),
        max_new_tokens=told.shape[1],
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
        **arguments,
    )
    assert torch.equal(out.sequences[:, t.length :], told)
    return torch.stack(out.logits, dim=1)


@row
def generation_steps(model: Any, t: Any) -> Tensor:
    return steps(model, t)


@row
def generation_steps_without_padding(model: Any, t: Any) -> Tensor:
    return steps(model, t, side="")


@row
def generation_steps_static_cache(model: Any, t: Any) -> Tensor:
    return steps(model, t, cache_implementation="static")


@row
def generation_steps_without_a_cache(model: Any, t: Any) -> Tensor:
    return steps(model, t, use_cache=False)


@row
def generation_steps_prompt_in_chunks(model: Any, t: Any) -> Tensor:
    return steps(model, t, prefill_chunk_size=5 if t.device == "cpu" else 50)


@row
def generation_steps_prompt_in_chunks_static_cache(model: Any, t: Any) -> Tensor:
    return steps(model, t, prefill_chunk_size=5 if t.device == "cpu" else 50, cache_implementation="static")


@pytest.mark.parametrize("name", ROWS)
def test_logits_are_those_of_hugging_face(name: str, trio: Any) -> None:
    if name in ON_GPU_ONLY and trio.device == "cpu":
        pytest.skip("offloaded caches need an accelerator")
    with torch.no_grad():
        trio.judge(lambda model: ROWS[name](model, trio), name)


@pytest.mark.parametrize("side", ["", "left"])
def test_every_hidden_state_is_there_and_right(side: str, trio: Any) -> None:
    mask = mask_of(trio, side) if side else torch.ones_like(trio.tokens()).bool()
    arguments = {"attention_mask": mask.long()} if side else {}
    with torch.no_grad():
        states = [m(trio.tokens(), output_hidden_states=True, **arguments).hidden_states for m in trio.all]
    assert [len(each) for each in states] == [trio.ours.config.num_hidden_layers + 1] * 3
    for index, (truth, theirs, ours) in enumerate(zip(*states, strict=True)):
        trio.judge_values(truth[mask], theirs[mask], ours[mask], f"hidden state {index}")


# Configs

LONG = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
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
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "small_heads": {"head_dim": 8, "num_attention_heads": 4},
    "large_heads": {"head_dim": 128, "num_attention_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    **{
        f"rope_{name}": {"rope_parameters": rope, "head_dim": 16, "num_attention_heads": 4}  # longrope has 8 factors
        for name, rope in ROPES.items()
    },
}

CONFIGS["rope_dynamic"]["max_position_embeddings"] = 16  # the original length, for this type


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_computes_and_learns_as_in_hugging_face(name: str, make_trio: Callable[..., Any]) -> None:
    trio = make_trio(**CONFIGS[name])
    found: dict[str, list[Tensor]] = defaultdict(list)
    ids = trio.tokens(4, 96)
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    mask[1, 50:] = 0
    for model in trio.all:
        # Types that change their frequencies with the length change them back.
        for length in (12, 96, 12):
            with torch.no_grad():
                found[f"{length} tokens"].append(logits(model, ids[:, :length]))
        out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        found["left and right padded"].append(out.logits[mask.bool()])
        out.loss.backward()
        found["gradients"].append(trio.flat(trio.gradients(model)))
    found["12 tokens"] = [torch.cat(found["12 tokens"][i : i + 2]) for i in (0, 2, 4)]
    for what, values in found.items():
        trio.judge_values(*values, f"{name}, {what}")


# Generation: the same tokens


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a model has generated."""

    ids: Tensor
    """Prompt and what follows, [b, n]."""
    mask: Tensor
    """Which of them are no padding, [b, n]."""
    new: int
    """How many of them are the model's."""
    scores: Tensor | None = None
    """What a beam search thinks of its texts: their mean log-likelihood [b]."""
    logits: Tensor | None = None
    """What the model said at each step, [b, new, vocab]."""


Generation = Callable[[Any, Any], Text]
GENERATIONS: dict[str, Generation] = {}
GREEDY: set[str] = set()
"""Those of which every token should be the most likely one."""


def generation(*, greedy: bool) -> Callable[[Generation], Generation]:
    def add(compute: Generation) -> Generation:
        GENERATIONS[compute.__name__] = compute
        if greedy:
            GREEDY.add(compute.__name__)
        return compute

    return add


def generate(model: Any, t: Any, batch: int = 4, *, new: int = 24, **arguments: Any) -> Text:
    """A text after left-padded prompts of mixed lengths (after one prompt without padding if ``batch`` is 1)."""
    mask = mask_of(t, "left")[:batch].long()
    ids = t.tokens()[:batch].masked_fill(mask == 0, 0)
    return text_after(model, ids, mask, new=new, **arguments)


def text_after(model: Any, ids: Tensor, mask: Tensor, *, new: int, **arguments: Any) -> Text:
    torch.manual_seed(3)
    arguments = {"do_sample": False, "disable_compile": True, "return_dict_in_generate": True, **arguments}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, **arguments)
    said = out.sequences[:, ids.shape[1] :]
    before = mask.repeat_interleave(len(said) // len(mask), dim=0)
    return Text(
        ids=out.sequences,
        mask=torch.cat([before, torch.ones_like(said)], dim=1),
        new=said.shape[1],
        scores=out.get("sequences_scores"),
        logits=torch.stack(out.logits, dim=1) if out.get("logits") else None,
    )


def draft(t: Any) -> Any:
    """A stock model that guesses for others: their first layers, so that some of its guesses are right."""
    from transformers import AutoModelForCausalLM

    config = tepatch.hf.config.read_config(t.folder)
    config.num_hidden_layers -= 1
    # Hugging Face reports the tensors of the layer that is not there, and goes on.
    return AutoModelForCausalLM.from_pretrained(t.folder, config=config, dtype=t.ours.dtype).to(t.device).eval()


@generation(greedy=True)
def greedy(model: Any, t: Any) -> Text:
    return generate(model, t, new=64)


@generation(greedy=True)
def greedy_static_cache(model: Any, t: Any) -> Text:
    return generate(model, t, new=64, cache_implementation="static")


@generation(greedy=True)
def greedy_one_prompt(model: Any, t: Any) -> Text:
    return generate(model, t, 1, new=64)


@generation(greedy=True)
def greedy_without_a_cache(model: Any, t: Any) -> Text:
    return generate(model, t, use_cache=False)


@generation(greedy=True)
def greedy_prompt_in_chunks(model: Any, t: Any) -> Text:
    return generate(model, t, prefill_chunk_size=7)


@generation(greedy=True)
def greedy_offloaded_cache(model: Any, t: Any) -> Text:
    return generate(model, t, cache_implementation="offloaded")


@generation(greedy=False)
def greedy_with_rows_that_end(model: Any, t: Any) -> Text:
    return generate(model, t, new=64, eos_token_id=list(range(1, model.config.vocab_size // 10)))


@generation(greedy=False)
def sampling(model: Any, t: Any) -> Text:
    return generate(model, t, do_sample=True, top_k=20, temperature=0.8, output_logits=True)


@generation(greedy=False)
def sampling_several(model: Any, t: Any) -> Text:
    return generate(model, t, do_sample=True, top_p=0.9, num_return_sequences=3, output_logits=True)


@generation(greedy=False)
def beam_search(model: Any, t: Any) -> Text:
    return generate(model, t, num_beams=4, num_return_sequences=2, output_scores=True)


@generation(greedy=False)
def beam_search_static_cache(model: Any, t: Any) -> Text:
    return generate(model, t, num_beams=3, cache_implementation="static", output_scores=True)


@generation(greedy=False)
def beam_sampling(model: Any, t: Any) -> Text:
    return generate(model, t, num_beams=3, do_sample=True, output_scores=True)


@generation(greedy=True)
def assisted_by_a_stock_model(model: Any, t: Any) -> Text:
    return generate(model, t, 1, assistant_model=draft(t))


@generation(greedy=True)
def assisted_by_a_patched_model(model: Any, t: Any) -> Text:
    """By our own, which makes the same guesses: all that differs between the two is who computes."""
    return generate(model, t, 1, assistant_model=t.ours)


@generation(greedy=False)
def assisted_sampling(model: Any, t: Any) -> Text:
    return generate(model, t, 1, assistant_model=draft(t), do_sample=True)


@generation(greedy=True)
def prompt_lookup(model: Any, t: Any) -> Text:
    ids = t.tokens(1, 5).repeat(1, 4)  # something to be found again
    return text_after(model, ids, torch.ones_like(ids), new=24, prompt_lookup_num_tokens=3)


@generation(greedy=True)
def from_embeddings(model: Any, t: Any) -> Text:
    ids = t.tokens()
    out = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=24, do_sample=False)
    ids = torch.cat([ids, out], dim=1)
    return Text(ids=ids, mask=torch.ones_like(ids), new=out.shape[1])


@generation(greedy=True)
def from_the_cache_of_the_last_turn(model: Any, t: Any) -> Text:
    """Two turns of a conversation; the second begins with the cache of the first."""
    first = model.generate(t.tokens(1), max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, t.tokens(1, 5, seed=4)], dim=1)
    return text_after(model, longer, torch.ones_like(longer), new=9, **{CACHE: first[CACHE]})


@generation(greedy=True)
def streamed(model: Any, t: Any) -> Text:
    from transformers.generation.streamers import BaseStreamer

    seen: list[Tensor] = []

    class Streamer(BaseStreamer):
        def put(self, value: Tensor) -> None:
            seen.append(value.cpu().flatten())

        def end(self) -> None:
            seen.append(torch.tensor([-1]))

    out = generate(model, t, 1, streamer=Streamer())
    assert len(seen) == 1 + out.new + 1, "the prompt, each token, the end"
    assert torch.equal(torch.cat(seen)[:-1], out.ids.cpu().flatten())
    return out


@pytest.mark.parametrize("name", GENERATIONS)
def test_generated_tokens_are_those_of_hugging_face(name: str, trio: Any) -> None:
    if "offloaded" in name and trio.device == "cpu":
        pytest.skip("offloaded caches need an accelerator")
    ours = GENERATIONS[name](trio.ours, trio)
    assert ours.new
    if trio.device == "cpu":
        theirs = GENERATIONS[name](trio.theirs, trio)
        assert torch.equal(ours.ids, theirs.ids)
    # bfloat16 turns near ties, after which two texts have nothing in common. So on a GPU a text is held against what
    # float32 thinks of each token in its context.
    with torch.no_grad():
        arguments = {"attention_mask": ours.mask, "position_ids": positions_of(ours.mask)}
        truth, theirs = (m(ours.ids, **arguments).logits[:, -ours.new - 1 : -1].double() for m in trio.all[:2])
    said = ours.ids[:, -ours.new :, None]
    noise = float((theirs - truth).abs().max())
    if ours.logits is not None:
        trio.judge_values(truth, theirs, ours.logits, name)
    if ours.scores is not None:
        expected = truth.log_softmax(-1).gather(-1, said)[..., 0].mean(-1)
        found = float((ours.scores - expected).abs().max())
        print(f"\n{name}: scores off by {found:.2e} (largest error of a logit of Hugging Face's {noise:.2e})")
        assert found <= 4 * noise  # a logit off by e is a log-likelihood off by 2e; ours may have twice their e
    if name in GREEDY:
        # The token with the largest logit has a true logit within 2e of the largest.
        regret = float((truth.amax(-1) - truth.gather(-1, said)[..., 0]).max())
        print(f"\n{name}: largest regret {regret:.2e} (largest error of a logit of Hugging Face's {noise:.2e})")
        assert regret <= 4 * noise


# Which kernels attend


@pytest.mark.parametrize(
    ("name", "is_fused"),
    [
        ("no_mask", True),
        ("right_padded", True),
        ("left_padded", True),
        ("holes_in_the_middle", True),
        ("packed_row", True),
        ("packed_rows", True),
        ("flattened_with_positions", True),
        ("flattened_without_positions", True),
        ("chunks_into_a_dynamic_cache_left_padded", True),
        ("chunks_into_a_static_cache", True),
        ("custom_boolean_mask", False),  # no fused kernel takes it; that it is seen here is what the others rely on
    ],
)
@pytest.mark.filterwarnings("ignore:.*[Pp]rofiler:UserWarning")
def test_padding_and_packing_attend_in_fused_kernels(name: str, is_fused: bool, trio: Any) -> None:
    if trio.device == "cpu":
        pytest.skip("about kernels of a GPU")
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad():
        ROWS[name](trio.ours, trio)
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            ROWS[name](trio.ours, trio)
            torch.cuda.synchronize()
    kernels = {event.key for event in profiler.key_averages()}
    softmax = sorted(kernel for kernel in kernels if "softmax" in kernel.lower())
    print(f"\n{name}: {softmax or [kernel for kernel in kernels if 'sdpa' in kernel or 'flash' in kernel]}")
    assert not softmax if is_fused else softmax


# What is refused


def flex_mask(t: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, 1, 1, t.length, t.length, device=t.device)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "flex attention's mask": (flex_mask, "BlockMask"),
    "biases instead of a mask": (lambda t: torch.randn(4, 1, t.length, t.length), "values between"),
    "positive biases": (lambda t: torch.ones(4, 1, t.length, t.length), "values between"),
    "integers": (lambda t: torch.ones(4, 1, t.length, t.length, dtype=torch.int64), "int64"),
    "other keys": (lambda t: torch.ones(4, 1, t.length, t.length + 1, dtype=torch.bool), r"\d+ keys"),
    "other queries": (lambda t: torch.ones(4, 1, t.length - 1, t.length, dtype=torch.bool), "queries"),
    "three dimensions": (lambda t: torch.ones(4, t.length, t.length, dtype=torch.bool), "attention_mask"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mask_that_can_not_be_computed_is_refused_by_name(name: str, trio: Any) -> None:
    make, message = REFUSED[name]
    mask = make(trio).to(trio.device)
    with pytest.raises(UnsupportedError, match=message) as caught, torch.no_grad():
        trio.ours(trio.tokens(), attention_mask=mask)
    problem = caught.value.problems[0]
    assert problem.where == "attention_mask"
    assert problem.expected
    assert problem.found


def test_sequence_lengths_that_do_not_fit_are_refused(trio: Any) -> None:
    batch = flattened(trio, position_ids=True)
    ids = batch.pop("input_ids")[:, :-1]
    batch["position_ids"] = batch["position_ids"][:, :-1]
    with pytest.raises(UnsupportedError, match="packed sequences begin and end"):
        trio.ours(ids, **batch, use_cache=False)


def test_attention_weights_are_refused_however_they_are_asked_for(trio: Any) -> None:
    with pytest.raises(UnsupportedError, match="attention weights"):
        trio.ours(trio.tokens(), output_attentions=True)
    with pytest.raises(UnsupportedError, match="attention weights"):
        trio.ours.generate(
            trio.tokens(), max_new_tokens=2, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    with pytest.raises(ValueError, match="output_attentions"):  # Hugging Face's own refusal
        trio.ours.config.output_attentions = True
    config = tepatch.hf.config.read_config(trio.folder)
    config.output_attentions = True
    backend = trio.ours.tepatch.backend
    with pytest.raises(UnsupportedError, match="attention weights"):
        tepatch.load("llama", trio.folder, config=config, backend=backend)(trio.tokens())
    with torch.no_grad():
        trio.judge(lambda model: no_mask(model, trio), "after these errors")
