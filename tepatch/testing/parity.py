"""Comparisons with Hugging Face's model: every way to call one, in float32, and the same in bfloat16 on a GPU.

A row calls a model and gives numbers as one vector: those of real tokens, since at padding a model computes something,
and no two of Hugging Face's own implementations agree on what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from tepatch.planning import Plan
from tepatch.planning.bind import Affine
from tepatch.te import probe
from tepatch.testing.cases import Bench
from tepatch.testing.checkpoints import read_all
from tepatch.testing.results import Broken, Check, Finding, NotApplicable
from tepatch.transfer.fill import restore_tensors

LARGEST_ERROR = 1e-4
"""Of float32, over the largest number that is compared."""
NEW_TOKENS = 16
ROOM_IN_CACHE = 9

T = TypeVar("T")
Row = Callable[[Bench, Any], Tensor]
"""From a bench and one of its models to the numbers that have to agree: float [n]."""


def distance(found: Tensor, expected: Tensor) -> float:
    """``||found - expected|| / ||expected||``."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def hold_to_rounding(bench: Bench, truth: Tensor, theirs: Tensor, ours: Tensor) -> Finding:
    """Raise ``Broken`` if ``ours`` is further from ``truth`` than it may be; all are float [n]."""
    if not (ours.shape == theirs.shape == truth.shape):
        raise Broken(f"{ours.numel()} numbers, and {theirs.numel()} of Hugging Face's")
    if not truth.numel() or not bool(truth.isfinite().all()):
        raise Broken("Hugging Face's own model gives nothing to compare with: no number, or one that is not finite")
    found, usual = distance(ours, truth), distance(theirs, truth)
    largest = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
    figures = {"ours": found, "theirs": usual, "largest": largest}
    if bench.has_truth and not found <= bench.limit * usual:
        raise Broken(
            f"the relative error is {found:.2e}, and may be {bench.limit} times Hugging Face's own, {usual:.2e}"
        )
    if not bench.is_gpu and not largest <= LARGEST_ERROR:
        raise Broken(f"the largest difference is {largest:.2e} of the largest number, and may be {LARGEST_ERROR}")
    return Finding(figures=figures)


def row(function: Row) -> Check:
    """Makes a check of a row: what it gives for our model is held against what it gives for Hugging Face's."""

    @wraps(function)
    def compare(bench: Bench) -> Finding:
        with torch.no_grad():
            return hold_to_rounding(bench, *each_once(bench.models, lambda model: function(bench, model)))

    return compare


def each_once(models: Iterable[Any], compute: Callable[[Any], T]) -> list[T]:
    """What ``compute`` gives for each of the models, asked once for one that is there twice."""
    known: dict[int, T] = {}
    out = []
    for model in models:
        if id(model) not in known:
            known[id(model)] = compute(model)
        out.append(known[id(model)])
    return out


def numbers(out: Any, mask: Tensor | None = None, *, is_pooled: bool = True) -> Tensor:
    """Every floating-point tensor at the top of a model's output, as one vector; of real tokens if ``mask`` tells.

    Without ``is_pooled``, only those that have a row for each token.
    """
    parts = []
    for name, value in out.items():
        if isinstance(value, Tensor) and value.is_floating_point() and "loss" not in name:
            is_by_token = mask is not None and value.shape[:2] == mask.shape
            if is_by_token or is_pooled:
                parts.append((value[mask] if is_by_token else value).flatten())
    if not parts:
        raise NotApplicable("the model gives no floating-point tensor" + ("" if is_pooled else " for each token"))
    return torch.cat(parts)


def needs_cache(bench: Bench) -> None:
    if not bench.has_cache:
        raise NotApplicable("the model keeps no cache")


@row
def no_mask(bench: Bench, model: Any) -> Tensor:
    return numbers(model(bench.tokens()))


@row
def left_padding(bench: Bench, model: Any) -> Tensor:
    ids, mask = bench.padded("left")
    # An encoder pools its first token, which is padding here, and so nobody's.
    return numbers(model(ids, attention_mask=mask.long()), mask, is_pooled=bench.has_cache)


@row
def right_padding(bench: Bench, model: Any) -> Tensor:
    ids, mask = bench.padded("right")
    return numbers(model(ids, attention_mask=mask.long(), **bench.without_cache), mask)


@row
def lengths(bench: Bench, model: Any) -> Tensor:
    """Short, long and short again: rope types that change their frequencies with the length change them back."""
    batches = [bench.tokens(2, length) for length in (bench.length // 3, bench.length, bench.length // 3, 1)]
    return torch.cat([numbers(model(ids)) for ids in batches])


@row
def positions(bench: Bench, model: Any) -> Tensor:
    """Positions of each row, which do not begin with 0."""
    if not bench.accepts("position_ids"):
        raise NotApplicable("the model takes no positions")
    start = torch.tensor([[0], [1], [3], [5]], device=bench.device)
    steps = torch.arange(bench.length, device=bench.device)
    mask = torch.ones_like(bench.tokens())  # or Hugging Face would look for packed sequences in them
    return numbers(model(bench.tokens(), attention_mask=mask, position_ids=steps + start, **bench.without_cache))


@row
def packing(bench: Bench, model: Any) -> Tensor:
    """Several sequences in a row, told by positions that begin again."""
    needs_cache(bench)  # what has none is an encoder, for which positions have no such meaning
    if not bench.accepts("position_ids"):
        raise NotApplicable("the model takes no positions")
    rows = [[5, 6, 15], [bench.length - 1], [], [1, 2, 3]]
    ends = [[0, *row, bench.length] for row in rows]
    steps = [torch.cat([torch.arange(stop - start) for start, stop in pairwise(places)]) for places in ends]
    ids = torch.stack(steps).to(bench.device)
    return numbers(model(bench.tokens(), position_ids=ids, use_cache=False))


def dynamic_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def static_cache(bench: Bench, model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=bench.length + ROOM_IN_CACHE)


def fed(bench: Bench, model: Any, cache: Any, sizes: list[int], *, is_padded: bool = False) -> Tensor:
    """What a model gives for a batch that it is fed in pieces of these sizes, the last being what is left."""
    needs_cache(bench)
    ids, mask = bench.padded("left") if is_padded else (bench.tokens(), torch.ones_like(bench.tokens()).bool())
    places = (mask.long().cumsum(-1) - 1).clamp(min=0)
    parts, start = [], 0
    for size in (*sizes, bench.length - sum(sizes)):
        stop = start + size
        arguments: dict[str, Any] = {str(bench.cache_argument): cache}
        if is_padded:  # the mask covers what the cache holds
            arguments |= {"attention_mask": mask[:, :stop].long(), "position_ids": places[:, start:stop]}
        parts.append(numbers(model(ids[:, start:stop], **arguments), mask[:, start:stop]))
        start = stop
    return torch.cat(parts)


@row
def decoding(bench: Bench, model: Any) -> Tensor:
    """A prompt (longer than any window) and then token by token, into the cache that is made for this config."""
    needs_cache(bench)
    return fed(bench, model, dynamic_cache(model), [bench.length - 6, 1, 1, 1, 1, 1])


@row
def chunks(bench: Bench, model: Any) -> Tensor:
    """A prompt in pieces, across the end of any window, and some tokens between."""
    needs_cache(bench)
    return fed(bench, model, dynamic_cache(model), [7, 1, 9, 1, 1])


@row
def chunks_left_padded(bench: Bench, model: Any) -> Tensor:
    needs_cache(bench)
    return fed(bench, model, dynamic_cache(model), [7, 1, 9, 1, 1], is_padded=True)


@row
def static_caches(bench: Bench, model: Any) -> Tensor:
    needs_cache(bench)
    plain = fed(bench, model, static_cache(bench, model), [bench.length - 6, 1, 1, 1, 1, 1])
    return torch.cat([plain, fed(bench, model, static_cache(bench, model), [7, 1, 9, 1, 1], is_padded=True)])


@row
def hidden_states(bench: Bench, model: Any) -> Tensor:
    states = asked(bench, model, "hidden_states", output_hidden_states=True)
    return torch.cat([state.flatten() for state in states])


@row
def router_logits(bench: Bench, model: Any) -> Tensor:
    """What the routers of experts say, and the loss that balances them."""
    if not hasattr(bench.config.get_text_config(), "output_router_logits"):
        raise NotApplicable("the model has no routers that its config can ask")
    parts = [logits.flatten() for logits in asked(bench, model, "router_logits", output_router_logits=True)]
    loss = model(bench.tokens(), output_router_logits=True, **bench.without_cache).get("aux_loss")
    return torch.cat([*parts, *([] if loss is None else [loss[None]])])


def asked(bench: Bench, model: Any, name: str, **arguments: Any) -> tuple[Tensor, ...]:
    """A part of the output that has to be asked for."""
    values: tuple[Tensor, ...] | None = model(bench.tokens(), **arguments, **bench.without_cache).get(name)
    if values is None and model is bench.models.ours:
        raise Broken(f"the output has no {name}, and that of Hugging Face's model has")
    if values is None:
        raise NotApplicable(f"the model gives no {name}")
    return values


def generation(bench: Bench) -> Finding:
    """Greedy text after left-padded prompts: the same tokens."""
    if not bench.stock.can_generate():
        raise NotApplicable("the model generates no text")
    ids, mask = bench.padded("left")
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "disable_compile": True}
    # In float32 only: which of two nearly equal tokens the truth would say decides nothing.
    theirs, ours = (
        model.generate(ids, attention_mask=mask.long(), **arguments)
        for model in (bench.models.theirs, bench.models.ours)
    )
    if theirs.shape != ours.shape or not torch.equal(theirs, ours):
        rows = [i for i, (one, other) in enumerate(zip(theirs, ours, strict=True)) if not torch.equal(one, other)]
        raise Broken(f"other tokens than Hugging Face's after {len(rows)} of {len(ids)} prompts (rows {rows})")
    return Finding(detail=f"the same {NEW_TOKENS} tokens after {len(ids)} prompts")


def gradients(bench: Bench) -> Finding:
    """Gradients of a loss over everything, in the checkpoint's names and shapes."""
    ids, mask = bench.padded("right")

    def of(model: Any) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        out = numbers(model(ids, attention_mask=mask.long(), **bench.without_cache), mask)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
        (out * direction).mean().backward()  # type: ignore[no-untyped-call]
        named = _restored(bench, model) if model is bench.models.ours else _stored(bench, model)
        model.zero_grad(set_to_none=True)
        return named

    found = each_once(bench.models, of)
    names = set(found[0])
    if names != set(found[2]):
        raise Broken(f"gradients of other tensors: {', '.join(sorted(names ^ set(found[2])))}")
    finding = hold_to_rounding(bench, *(torch.cat([each[name].flatten() for name in sorted(names)]) for each in found))
    return replace(finding, detail=f"{len(names)} tensors")


def _restored(bench: Bench, model: Any) -> dict[str, Tensor]:
    """The gradients of a patched model in the checkpoint's names: its plan backwards."""
    plan: Plan = model.tepatch.plan
    # A parameter that is scale * x + offset has a gradient by x that is scale times its own; the plan would divide.
    copies = tuple(replace(copy, affine=Affine(1 / copy.affine.scale, 0.0)) for copy in plan.copies)
    own = {name: _gradient(parameter) for name, parameter in model.named_parameters()}
    own |= {name: torch.zeros_like(buffer) for name, buffer in model.named_buffers()}
    plan = replace(plan, copies=copies, fills=())
    return dict(restore_tensors(plan, own))


def _stored(bench: Bench, model: Any) -> dict[str, Tensor]:
    """The gradients of a stock model in the checkpoint's names: saved by transformers as if they were weights."""
    values = {name: parameter.data for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    folder = bench.folder / f"gradients-{str(model.dtype).removeprefix('torch.')}"
    try:
        for parameter in model.parameters():
            parameter.data = _gradient(parameter)
        for buffer in model.buffers():
            buffer.zero_()
        model.save_pretrained(folder)
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = values[name]
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return read_all(folder)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def gpu(bench: Bench) -> Finding:
    """Transformer Engine's layers in bfloat16, as near to float32 as Hugging Face's own bfloat16.

    A token that rounding sends to another expert says nothing of arithmetic, nor does one that attends to it. So all
    three models send tokens where the float32 one does; how many each would have sent there is told.
    """
    if bench.case.gpu is None:
        raise NotApplicable("the case has no config for a GPU: of few numbers an error is chance")
    if not (status := probe()).usable:
        raise NotApplicable(f"needs a GPU with Transformer Engine: {status.reason}")
    bench = Bench(bench.patch, bench.case, bench.folder / "gpu", is_gpu=True)
    bench.folder.mkdir()
    models = bench.models  # on the GPU from here on
    # An encoder pools its first token, which must not be padding.
    side = "left" if bench.has_cache else "right"
    padded, tokens = bench.padded(side)
    figures: dict[str, float] = {}
    for name, ids, mask in (("no mask", bench.tokens(), None), (f"{side} padding", padded, tokens)):
        arguments = {} if mask is None else {"attention_mask": mask.long()}
        outs: list[Tensor] = []
        routes = Routes()
        for model in models:
            with torch.no_grad(), routes.followed_by(model):
                outs.append(numbers(model(ids, **arguments, **bench.without_cache), mask))
        finding = hold_to_rounding(bench, *outs)
        figures |= {f"{name}, {which}": value for which, value in finding.figures.items() if which != "largest"}
        if routes.seen:
            figures[f"{name}, routing agrees"] = routes.agreement
    return Finding(detail=torch.cuda.get_device_name(), figures=figures)


class Routes:
    """Where the routers of a first model send each token, for others to do the same."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        """By router: the weights ``[tokens, k]`` and experts ``[tokens, k]`` that it gave in the first model."""
        self._alike: list[Tensor] = []

    @property
    def agreement(self) -> float:
        """The share of choices (a token at a router) that the other models would have made themselves."""
        return float(torch.cat(self._alike).float().mean()) if self._alike else 1.0

    @contextmanager
    def followed_by(self, model: Any) -> Iterator[None]:
        """Within the block ``model`` routes as the first model did, or is the first."""
        is_first = not self.seen
        handles = [
            router.register_forward_hook(self._record if is_first else partial(self._replace, index))
            for index, router in enumerate(routers_of(model))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, router: Any, args: Any, out: tuple[Any, ...]) -> None:
        self.seen.append(tuple(out[1:]))

    def _replace(self, index: int, router: Any, args: Any, out: tuple[Any, ...]) -> tuple[Any, ...]:
        weights, experts = self.seen[index]
        self._alike.append((out[2].sort().values == experts.sort().values).all(-1).flatten())
        return (out[0], weights.to(out[1].dtype), experts.to(out[2].dtype))


def routers_of(model: Any) -> list[Any]:
    """The modules whose logits Hugging Face's model records as ``router_logits``, in the order of the layers."""
    classes = []
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if recorded is not None:
            classes.append(getattr(recorded, "target_class", recorded))
    return [module for module in model.modules() if isinstance(module, tuple(classes))] if classes else []
