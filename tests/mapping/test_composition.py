"""Random mappings, nested at will: what is loaded is what torch computes, and the source comes back bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any, cast

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tepatch.errors import PlanError

Env = dict[str, int]
Value = Callable[[Env], torch.Tensor]
"""What an operand is, for one value of each capture."""

CAPTURES = {"expert": 2, "slot": 3}
NOT_ONE_VIEW = ("begin or end inside a block", "can not be cut into blocks")
"""What is refused and not computed: parts that no single strided view can show."""


class Composer:
    """Draws an operand of a given shape, and computes the same with torch."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.sources: dict[str, torch.Tensor] = {}
        self.sizes: dict[str, int] = {}
        self.counter = 0

    def operand(self, shape: tuple[int, ...], depth: int, free: frozenset[str]) -> tuple[Any, Value]:
        kinds = ["leaf"]
        if depth:
            kinds += ["concat", "interleave", "block", "stack", "axes", "regroup", "transpose", "rope", "any_of", "pad"]
        kind = self.draw(st.sampled_from(kinds))
        made = getattr(self, f"_{kind}")(shape, depth - 1, free) if kind != "leaf" else None
        if made is None:  # a leaf, or a shape that does not allow the operation
            return self._leaf(shape, free)
        return cast("tuple[Any, Value]", made)

    def _pick(self, options: list[int]) -> int:
        return self.draw(st.sampled_from(options))

    def _name(self, prefix: str) -> str:
        self.counter += 1
        return f"{prefix}{self.counter}"

    def _leaf(self, shape: tuple[int, ...], free: frozenset[str]) -> tuple[Any, Value]:
        bound = sorted(CAPTURES.keys() - free)
        name = ".".join([self._name("s"), *(f"{{{capture}}}" for capture in bound)])

        def value(env: Env) -> torch.Tensor:
            return self.sources.setdefault(name.format_map(env), torch.randn(shape))

        return name, value

    def _cut(self, total: int) -> list[int]:
        """Two or three sizes that add up to ``total``, often equal ones."""
        count = self._pick([2, 3] if total > 2 else [2])
        if total % count == 0 and self.draw(st.booleans()):
            return [total // count] * count
        cuts = sorted(self.draw(st.sets(st.integers(1, total - 1), min_size=count - 1, max_size=count - 1)))
        return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]

    def _parts(self, shapes: list[tuple[int, ...]], depth: int, free: frozenset[str]) -> tuple[list[Any], list[Value]]:
        made = [self.operand(shape, depth, free) for shape in shapes]
        return [operand for operand, _ in made], [value for _, value in made]

    def _concat(self, shape: tuple[int, ...], depth: int, free: frozenset[str]) -> tuple[Any, Value] | None:
        dims = [dim for dim, size in enumerate(shape) if size > 1]
        if not dims:
            return None
        dim = self._pick(dims)
        sizes = self._cut(shape[dim])
        operands, values = self._parts([_with(shape, dim, size) for size in sizes], depth, free)
        return (
            {"concat": operands, "dim": dim, "sizes": sizes},
            lambda env: torch.cat([value(env) for value in values], dim),
        )

    def _interleave(self, shape: tuple[int, ...], depth: int, free: frozenset[str]) -> tuple[Any, Value] | None:
        choices = [(d, g) for d, size in enumerate(shape) for g in range(1, size) if size % g == 0 and size // g > 1]
        if not choices:
            return None
        dim, groups = self.draw(st.sampled_from(choices))
        sizes = self._cut(shape[dim] // groups)
        operands, values = self._parts([_with(shape, dim, groups * size) for size in sizes], depth, free)

        def value(env: Env) -> torch.Tensor:
            chunks = [part(env).chunk(groups, dim) for part in values]
            return torch.cat([chunk[group] for group in range(groups) for chunk in chunks], dim)

        return {"interleave": operands, "over": groups, "dim": dim, "sizes": sizes}, value

    def _block(self, shape: tuple[int, ...], depth: int, free: frozenset[str]) -> tuple[Any, Value] | None:
        choices = [(d, b) for d, size in enumerate(shape) for b in range(1, size) if size % (2 * b) == 0]
        if not choices:
            return None
        dim, block = self.draw(st.sampled_from(choices))
        half = _with(shape, dim, shape[dim] // 2)
        operands, values = self._parts([half, half], depth, free)

        def value(env: Env) -> torch.Tensor:
            first, second = (part(env).split(block, dim) for part in values)
            return torch.cat([each for turn in zip(first, second, strict=True) for each in turn], dim)

        return {"interleave": operands, "block": block, "dim": dim}, value

    def _stack(self, shape: tuple[int, ...], depth: int, free: frozenset[str]) -> tuple[Any, Value] | None:
        choices = [(d, c) for d, size in enumerate(shape) for c in sorted(free) if CAPTURES[c] == size]
        if not choices or len(shape) < 2:
            return None
        dim, capture = self.draw(st.sampled_from(choices))
        operand, inner = self.operand((*shape[:dim], *shape[dim + 1 :]), depth, free - {capture})
        return (
            {"stack": operand, "over": capture, "dim": dim},
            lambda env: torch.stack([inner({**env, capture: i}) for i in range(CAPTURES[capture])], dim),
        )

    def _axes(self, shape: tuple[int, ...], depth: int, free: frozenset[str]) -> tuple[Any, Value]:
        order = self.draw(st.permutations(range(len(shape))))
        source = tuple(shape[order.index(dim)] for dim in range(len(shape)))
        operand, inner = self.operand(source, depth, free)
        letters = "abcd"[: len(shape)]
        text = f"{' '.join(letters)} -> {' '.join(letters[i] for i in order)}"
        return {"of": operand, "axes": text}, lambda env: inner(env).permute(order)

    def _regroup(self, shape: tuple[int, ...], depth: int, free: frozenset[str]) -> tuple[Any, Value] | None:
        choices = [(d, n) for d, size in enumerate(shape) for n in range(2, size) if size % n == 0]
        if not choices:
            return None
        dim, outer = self.draw(st.sampled_from(choices))
        name = self._name("n")
        self.sizes[name] = outer
        operand, inner = self.operand(shape, depth, free)
        letters = list("abcd"[: len(shape)])
        sides = []
        for group in (f"({name} rest)", f"(rest {name})"):
            letters[dim] = group
            sides.append(" ".join(letters))

        def value(env: Env) -> torch.Tensor:
            return inner(env).unflatten(dim, (outer, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)

        return {"of": operand, "axes": " -> ".join(sides)}, value

    def _transpose(self, shape: tuple[int, ...], depth: int, free: frozenset[str]) -> tuple[Any, Value] | None:
        if len(shape) < 2:
            return None
        operand, inner = self.operand((*shape[:-2], shape[-1], shape[-2]), depth, free)
        return {"of": operand, "transpose": True}, lambda env: inner(env).transpose(-1, -2)

    def _rope(self, shape: tuple[int, ...], depth: int, free: frozenset[str]) -> tuple[Any, Value] | None:
        choices = [heads for heads in range(1, shape[0]) if shape[0] % (2 * heads) == 0]
        if not choices:
            return None
        heads, name = self._pick(choices), self._name("h")
        self.sizes[name] = heads
        operand, inner = self.operand(shape, depth, free)

        def value(env: Env) -> torch.Tensor:
            return inner(env).unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

        others = " ".join("bcd"[: len(shape) - 1])
        return {"of": operand, "axes": f"({name} r 2) {others} -> ({name} 2 r) {others}"}, value

    def _any_of(self, shape: tuple[int, ...], depth: int, free: frozenset[str]) -> tuple[Any, Value]:
        operand, value = self.operand(shape, depth, free)
        return {"any_of": [self._name("absent"), operand]}, value

    def _pad(self, shape: tuple[int, ...], depth: int, free: frozenset[str]) -> tuple[Any, Value] | None:
        dims = [dim for dim, size in enumerate(shape) if size > 1]
        if not dims:
            return None
        dim = self._pick(dims)
        real = self.draw(st.integers(1, shape[dim] - 1))
        operand, inner = self.operand(_with(shape, dim, real), depth, free)
        rest = torch.full(_with(shape, dim, shape[dim] - real), 7.0)
        pad = {"size": real, "dim": dim, "value": 7}
        return {"of": operand, "pad": pad}, lambda env: torch.cat([inner(env), rest], dim)


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def test_any_composition_is_loaded_as_torch_computes_it_and_comes_back(travel: Callable[..., Any]) -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=1, max_size=3)))
        assume(prod(shape) <= 600)
        composer = Composer(data.draw)
        operand, value = composer.operand(shape, 4, frozenset(CAPTURES))
        expected = value({})
        sections = {"captures": CAPTURES, "sizes": composer.sizes, "parameters": {"t": operand}}
        text = "\n".join(f"{name}: {json.dumps(section)}" for name, section in sections.items())
        try:
            trip = travel(text, composer.sources, {"t": shape})
        except PlanError as error:
            if not any(reason in str(error) for reason in NOT_ONE_VIEW):
                raise
            outcomes["refused"] += 1
            return
        outcomes["accepted"] += 1
        assert torch.equal(trip.loaded["t"], expected)
        assert trip.restored.keys() == composer.sources.keys()
        for name, tensor in composer.sources.items():
            assert torch.equal(trip.restored[name], tensor), name

    check()
    assert outcomes["accepted"] > 4 * outcomes["refused"]
