"""Every operation with real tensors: loaded, held against torch's own words for it, and restored bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

Tensors = dict[str, torch.Tensor]


def numbers(*shape: int) -> torch.Tensor:
    """Different values everywhere, and in every tensor."""
    return torch.randn(shape)


@dataclass(frozen=True)
class Case:
    """One rule for the target ``t``, its sources, and what the target must then hold."""

    rule: str
    sources: dict[str, tuple[int, ...]]
    expected: Callable[[Tensors], torch.Tensor]
    config: dict[str, Any] = field(default_factory=dict)


def grouped(t: Tensors) -> torch.Tensor:
    """Query heads of each group, then its key head, then its value head; by an explicit loop."""
    groups, heads, d = 3, 2, 4  # heads of a group, rows of a head
    rows = []
    for group in range(groups):
        rows += [t["q"][(group * heads + head) * d + row] for head in range(heads) for row in range(d)]
        rows += [t["k"][group * d + row] for row in range(d)]
        rows += [t["v"][group * d + row] for row in range(d)]
    return torch.stack(rows)


def in_blocks(t: Tensors) -> torch.Tensor:
    """Two rows of each part in turn; by an explicit loop."""
    rows = []
    for block in range(3):
        for part in ("gate", "up"):
            rows += [t[part][block * 2], t[part][block * 2 + 1]]
    return torch.stack(rows)


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The permutation that turns pairs into halves, as conversion scripts for Llama write it."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


CASES = {
    "rename": Case("a", {"a": (3, 4)}, lambda t: t["a"]),
    "rename of a scalar": Case("a", {"a": ()}, lambda t: t["a"]),
    "rename of an empty tensor": Case("a", {"a": (0, 4)}, lambda t: t["a"]),
    "rename of a tensor without columns": Case("a", {"a": (4, 0)}, lambda t: t["a"]),
    "concat of equal parts": Case(
        "{concat: [a, b]}", {"a": (3, 4), "b": (3, 4)}, lambda t: torch.cat([t["a"], t["b"]])
    ),
    "concat of unequal parts": Case(
        "{concat: [q, k, v], sizes: [heads * d, d, d]}",
        {"q": (8, 5), "k": (2, 5), "v": (2, 5)},
        lambda t: torch.cat([t["q"], t["k"], t["v"]]),
        {"heads": 4, "d": 2},
    ),
    "concat along another dimension": Case(
        "{concat: [a, b], dim: 1, sizes: [4, 2]}",
        {"a": (3, 4), "b": (3, 2)},
        lambda t: torch.cat([t["a"], t["b"]], dim=1),
    ),
    "concat along the last dimension": Case(
        "{concat: [a, b], dim: -1}",
        {"a": (2, 3, 4), "b": (2, 3, 4)},
        lambda t: torch.cat([t["a"], t["b"]], dim=-1),
    ),
    "concat of biases": Case("{concat: [a, b, c]}", dict.fromkeys("abc", (4,)), lambda t: torch.cat(list(t.values()))),
    "interleave of groups": Case(
        "{interleave: [q, k, v], over: g, sizes: [2 * d, d, d]}",
        {"q": (24, 5), "k": (12, 5), "v": (12, 5)},
        grouped,
        {"g": 3, "d": 4},
    ),
    "interleave of the biases of groups": Case(
        "{interleave: [q, k, v], over: 3, sizes: [8, 4, 4]}", {"q": (24,), "k": (12,), "v": (12,)}, grouped
    ),
    "interleave of equal parts": Case(
        "{interleave: [a, b], over: 3}",
        {"a": (6, 2), "b": (6, 2)},
        lambda t: torch.stack([t["a"].view(3, 2, 2), t["b"].view(3, 2, 2)], dim=1).reshape(12, 2),
    ),
    "interleave of blocks": Case("{interleave: [gate, up], block: 2}", {"gate": (6, 3), "up": (6, 3)}, in_blocks),
    "interleave of single columns": Case(
        "{interleave: [a, b], block: 1, dim: 1}",
        {"a": (3, 4), "b": (3, 4)},
        lambda t: torch.stack([t["a"], t["b"]], dim=-1).reshape(3, 8),
    ),
    "stack of experts": Case(
        "{stack: 'e.{expert}.w', over: expert}",
        {f"e.{i}.w": (3, 4) for i in range(5)},
        lambda t: torch.stack(list(t.values())),
    ),
    "stack along another dimension": Case(
        "{stack: 'e.{expert}.w', over: expert, dim: 1}",
        {f"e.{i}.w": (3, 4) for i in range(5)},
        lambda t: torch.stack(list(t.values()), dim=1),
    ),
    "stack along the last dimension": Case(
        "{stack: 'e.{expert}.w', over: expert, dim: -1}",
        {f"e.{i}.w": (3,) for i in range(5)},
        lambda t: torch.stack(list(t.values()), dim=-1),
    ),
    "stack of concats": Case(
        "{stack: {concat: ['e.{expert}.w1', 'e.{expert}.w3']}, over: expert}",
        {f"e.{i}.{w}": (3, 4) for i in range(5) for w in ("w1", "w3")},
        lambda t: torch.stack([torch.cat([t[f"e.{i}.w1"], t[f"e.{i}.w3"]]) for i in range(5)]),
    ),
    "stack of transposed concats": Case(
        "{stack: {concat: ['e.{expert}.w1', 'e.{expert}.w3'], transpose: true}, over: expert}",
        {f"e.{i}.{w}": (3, 4) for i in range(5) for w in ("w1", "w3")},
        lambda t: torch.stack([torch.cat([t[f"e.{i}.w1"], t[f"e.{i}.w3"]]).t() for i in range(5)]),
    ),
    "concat of stacks": Case(
        "{concat: [{stack: 'e.{expert}.w', over: expert}, shared], sizes: [5, 2]}",
        {**{f"e.{i}.w": (3, 4) for i in range(5)}, "shared": (2, 3, 4)},
        lambda t: torch.cat([torch.stack([t[f"e.{i}.w"] for i in range(5)]), t["shared"]]),
    ),
    "stack that uses its capture in a size": Case(
        "{stack: {concat: ['a.{pair}', 'b.{pair}'], sizes: [pair + 1, 3 - pair]}, over: pair}",
        {"a.0": (1, 2), "b.0": (3, 2), "a.1": (2, 2), "b.1": (2, 2)},
        lambda t: torch.stack([torch.cat([t["a.0"], t["b.0"]]), torch.cat([t["a.1"], t["b.1"]])]),
    ),
    "transpose": Case("{of: a, transpose: true}", {"a": (3, 4)}, lambda t: t["a"].t()),
    "transpose of the last two": Case("{of: a, transpose: true}", {"a": (2, 3, 4)}, lambda t: t["a"].transpose(1, 2)),
    "axes permuted": Case("{of: a, axes: i o k -> k i o}", {"a": (2, 3, 4)}, lambda t: t["a"].permute(2, 0, 1)),
    "axes split and permuted": Case(
        "{of: a, axes: (h two k) i -> (h k two) i}",
        {"a": (12, 5)},
        lambda t: t["a"].view(3, 2, 2, 5).transpose(1, 2).reshape(12, 5),
        {"h": 3, "two": 2},
    ),
    "axes of another rank": Case(
        "{of: a, axes: g d i -> (g d) i}", {"a": (3, 4, 5)}, lambda t: t["a"].reshape(12, 5), {"g": 3}
    ),
    "axes around parts": Case(
        "{concat: [a, b], axes: (b f) i -> (f b) i}",
        {"a": (6, 2), "b": (6, 2)},
        lambda t: torch.cat([t["a"], t["b"]]).view(4, 3, 2).transpose(0, 1).reshape(12, 2),
        {"f": 3},
    ),
    "axes that only pin a shape": Case(
        "{concat: [a, b], sizes: [5, 7], axes: (g d) i}",
        {"a": (5, 2), "b": (7, 2)},
        lambda t: torch.cat([t["a"], t["b"]]),
        {"g": 4},
    ),
    "axes for rope": Case(
        "{of: a, axes: (h r 2) i -> (h 2 r) i}", {"a": (24, 5)}, lambda t: permuted(t["a"], 3), {"h": 3}
    ),
    "axes for rope in parts": Case(
        "{concat: [{of: q, axes: (h r 2) i -> (h 2 r) i}, {of: k, axes: (g r 2) i -> (g 2 r) i}, v], "
        "sizes: [16, 8, 8]}",
        {"q": (16, 3), "k": (8, 3), "v": (8, 3)},
        lambda t: torch.cat([permuted(t["q"], 4), permuted(t["k"], 2), t["v"]]),
        {"h": 4, "g": 2},
    ),
    "axes for rope of a bias": Case(
        "{of: a, axes: (h r 2) -> (h 2 r)}",
        {"a": (24,)},
        lambda t: permuted(t["a"][:, None], 3).squeeze(1),
        {"h": 3},
    ),
    "pad": Case(
        "{of: a, pad: {size: vocab}}",
        {"a": (5, 3)},
        lambda t: torch.cat([t["a"], torch.zeros(3, 3)]),
        {"vocab": 5},
    ),
    "pad with a value along another dimension": Case(
        "{of: a, pad: {size: 5, dim: -1, value: -1.5}}",
        {"a": (3, 5)},
        lambda t: torch.cat([t["a"], torch.full((3, 3), -1.5)], dim=1),
    ),
    "pad by nothing": Case("{of: a, pad: {size: 8}}", {"a": (8, 3)}, lambda t: t["a"]),
    "pad of one part": Case(
        "{concat: [{of: a, pad: {size: 2}}, b]}",
        {"a": (2, 3), "b": (4, 3)},
        lambda t: torch.cat([t["a"], torch.zeros(2, 3), t["b"]]),
    ),
    "constants among parts": Case(
        "{concat: [a, {create: 0}, {create: 2.5}, b]}",
        {"a": (3,), "b": (3,)},
        lambda t: torch.cat([t["a"], torch.zeros(3), torch.full((3,), 2.5), t["b"]]),
    ),
    "any_of, packed": Case("{any_of: [packed, {concat: [a, b]}]}", {"packed": (6, 4)}, lambda t: t["packed"]),
    "any_of, separate": Case(
        "{any_of: [packed, {concat: [a, b]}]}",
        {"a": (3, 4), "b": (3, 4)},
        lambda t: torch.cat([t["a"], t["b"]]),
    ),
    "any_of inside parts": Case(
        "{concat: [{any_of: [a1, a2]}, {any_of: [b1, b2]}]}",
        {"a2": (3, 4), "b1": (3, 4)},
        lambda t: torch.cat([t["a2"], t["b1"]]),
    ),
    "any_of with modifiers around it": Case(
        "{any_of: [old, new], transpose: true}", {"new": (3, 4)}, lambda t: t["new"].t()
    ),
    "any_of of stacks": Case(
        "{any_of: [packed, {stack: 'e.{expert}', over: expert}], transpose: true}",
        {f"e.{i}": (3, 4) for i in range(5)},
        lambda t: torch.stack(list(t.values())).transpose(1, 2),
    ),
    "nothing but nesting": Case(
        "{of: {of: {of: a, transpose: true}, transpose: true}}", {"a": (3, 4)}, lambda t: t["a"]
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_layout_is_what_torch_makes_of_it_and_comes_back(case: Case, travel: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    sources = {name: numbers(*shape) for name, shape in case.sources.items()}
    expected = case.expected(sources)
    sizes = ", ".join(f"{name}: {value}" for name, value in case.config.items())
    text = f"captures: {{expert: 5, pair: 2}}\nsizes: {{{sizes}}}\nparameters:\n  t: {case.rule}\n"
    trip = travel(text, sources, {"t": tuple(expected.shape)})
    assert torch.equal(trip.loaded["t"], expected)
    assert trip.restored.keys() == sources.keys()
    for name, tensor in sources.items():
        assert torch.equal(trip.restored[name], tensor), name
    assert trip.plan.inexact() == {}


def test_a_fused_source_is_split_over_several_targets(travel: Callable[..., Any]) -> None:
    text = """parameters:
  q: {of: qkv, take: {out_of: 12, start: 0, size: 8}}
  k: {of: qkv, take: {out_of: 12, start: 8, size: 2}}
  v: {of: qkv, take: {out_of: 12, start: 10, size: 2}}
"""
    fused = numbers(12, 3)
    trip = travel(text, {"qkv": fused}, {"q": (8, 3), "k": (2, 3), "v": (2, 3)})
    assert torch.equal(torch.cat([trip.loaded[name] for name in "qkv"]), fused)
    assert torch.equal(trip.restored["qkv"], fused)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_a_stacked_source_is_taken_apart_along_any_dimension(dim: int, travel: Callable[..., Any]) -> None:
    text = f"""captures: {{expert: 4}}
parameters:
  e.{{expert}}.w: {{of: w, take: {{out_of: 4, index: expert, dim: {dim}}}}}
"""
    shape = [2, 3]
    shape.insert(dim % 3, 4)
    stacked = numbers(*shape)
    trip = travel(text, {"w": stacked}, {f"e.{i}.w": (2, 3) for i in range(4)})
    for i in range(4):
        assert torch.equal(trip.loaded[f"e.{i}.w"], stacked.select(dim, i))
    assert torch.equal(trip.restored["w"], stacked)


def test_both_halves_of_a_packed_source_go_where_they_belong(travel: Callable[..., Any]) -> None:
    text = """parameters:
  gate: {of: packed, take: {out_of: 6, start: 0, size: 3, dim: 1}, transpose: true}
  up: {of: packed, take: {out_of: 6, start: 3, size: 3, dim: 1}, transpose: true}
"""
    packed = numbers(4, 6)
    trip = travel(text, {"packed": packed}, {"gate": (3, 4), "up": (3, 4)})
    assert torch.equal(trip.loaded["gate"], packed[:, :3].t())
    assert torch.equal(trip.loaded["up"], packed[:, 3:].t())
    assert torch.equal(trip.restored["packed"], packed)


def test_a_condition_can_hold_for_some_layers_only(travel: Callable[..., Any]) -> None:
    text = """captures: {layer: num_layers}
parameters:
  l.{layer}:
    dense: {when: layer in dense_layers, of: mlp.w}
    experts: {when: layer not in dense_layers, concat: [moe.a, moe.b]}
"""
    sources = {"l.0.mlp.w": numbers(4, 2), "l.1.moe.a": numbers(2, 2), "l.1.moe.b": numbers(2, 2)}
    trip = travel(text, sources, {"l.0.dense": (4, 2), "l.1.experts": (4, 2)}, num_layers=2, dense_layers=[0])
    assert torch.equal(trip.loaded["l.0.dense"], sources["l.0.mlp.w"])
    assert torch.equal(trip.loaded["l.1.experts"], torch.cat([sources["l.1.moe.a"], sources["l.1.moe.b"]]))


def test_the_condition_of_a_scope_turns_off_all_rules_in_it(travel: Callable[..., Any]) -> None:
    text = """captures: {layer: 2}
parameters:
  l.{layer}:
    when: layer > 0
    a: same
    deeper:
      when: biases
      b: same
"""
    trip = travel(text, {"l.1.a": numbers(2)}, {"l.1.a": (2,)}, biases=False)
    assert [(rule.state, rule.count) for rule in trip.plan.rules] == [("used", 1), ("off", 0)]
    sources = {"l.1.a": numbers(2), "l.1.deeper.b": numbers(2)}
    trip = travel(text, sources, dict.fromkeys(sources, (2,)), biases=True)
    assert [(rule.state, rule.count) for rule in trip.plan.rules] == [("used", 1), ("used", 1)]


def test_the_first_choice_whose_condition_holds_is_taken(travel: Callable[..., Any]) -> None:
    text = """captures: {layer: 3}
parameters:
  l.{layer}:
    - {when: layer == 0, of: first}
    - {when: layer < 2, of: second}
    - third
"""
    sources = {"first": numbers(2), "second": numbers(2), "third": numbers(2)}
    trip = travel(text, sources, {f"l.{i}": (2,) for i in range(3)})
    for layer, name in enumerate(sources):
        assert torch.equal(trip.loaded[f"l.{layer}"], sources[name])


def test_layers_may_differ_in_their_sizes(travel: Callable[..., Any]) -> None:
    text = """captures: {layer: 2}
sizes: {width: 'widths[layer]'}
parameters:
  l.{layer}: {concat: ['a.{layer}', 'b.{layer}'], sizes: [width, 1]}
"""
    sources = {"a.0": numbers(2), "b.0": numbers(1), "a.1": numbers(5), "b.1": numbers(1)}
    trip = travel(text, sources, {"l.0": (3,), "l.1": (6,)}, widths=[2, 5])
    assert torch.equal(trip.loaded["l.1"], torch.cat([sources["a.1"], sources["b.1"]]))
    assert torch.equal(trip.restored["a.0"], sources["a.0"])


def test_a_list_of_numbers_names_layers_that_are_not_in_a_row(travel: Callable[..., Any]) -> None:
    text = "captures: {layer: '[1, 4]'}\nparameters:\n  l.{layer} <- h.{layer - 1}: same\n"
    sources = {"h.0": numbers(2), "h.3": numbers(2)}
    trip = travel(text, sources, {"l.1": (2,), "l.4": (2,)})
    assert torch.equal(trip.loaded["l.4"], sources["h.3"])


def test_a_created_parameter_is_filled_and_not_saved(travel: Callable[..., Any]) -> None:
    text = "parameters:\n  zero: {create: 0}\n  half: {create: 0.5}\n  a: same\n"
    trip = travel(text, {"a": numbers(2)}, {"zero": (3, 2), "half": (4,), "a": (2,)})
    assert torch.equal(trip.loaded["zero"], torch.zeros(3, 2))
    assert torch.equal(trip.loaded["half"], torch.full((4,), 0.5))
    assert trip.restored.keys() == {"a"}


def test_a_tied_parameter_is_loaded_once_and_its_copy_is_kept(travel: Callable[..., Any]) -> None:
    text = "parameters:\n  embed: same\n  head: same\n"
    weight = numbers(4, 3)
    targets, ties = {"embed": (4, 3)}, {"head": "embed"}
    trip = travel(text, {"embed": weight}, targets, ties=ties)
    assert trip.loaded.keys() == trip.restored.keys() == {"embed"}
    trip = travel(text, {"embed": weight, "head": weight.clone()}, targets, ties=ties)
    assert trip.loaded.keys() == {"embed"}
    assert torch.equal(trip.restored["head"], weight)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("{of: a, offset: 1}", lambda a: a + 1),
        ("{of: a, scale: 2}", lambda a: a * 2),
        ("{of: a, scale: 2, offset: shift}", lambda a: a * 2 + 0.5),
        ("{of: {of: a, offset: 1}, scale: 4}", lambda a: (a + 1) * 4),
        ("{of: {of: a, scale: 4}, offset: 1}", lambda a: a * 4 + 1),
        ("{of: {of: a, transpose: true}, offset: -1, transpose: true}", lambda a: a - 1),
        ("{of: {of: a, pad: {size: 4}}, offset: 1}", lambda a: a + 1),
    ],
)
def test_values_are_scaled_and_shifted_and_the_plan_says_so(
    rule: str, expected: Callable[[torch.Tensor], torch.Tensor], travel: Callable[..., Any]
) -> None:
    source = torch.randint(-64, 64, (4, 3)).float() / 64  # small fractions: exact in float32, with and without offset
    trip = travel(f"parameters:\n  t: {rule}\n", {"a": source}, {"t": (4, 3)}, shift=0.5)
    assert torch.equal(trip.loaded["t"], expected(source))
    assert torch.equal(trip.restored["a"], source)
    assert list(trip.plan.inexact()) == ["a"]


def test_what_fills_up_is_shifted_with_the_rest_only_from_outside(travel: Callable[..., Any]) -> None:
    text = """parameters:
  inside: {of: {of: a, pad: {size: 1}}, offset: 1}
  outside: {of: b, pad: {size: 1}, offset: 1}
  constant: {of: {concat: [c, {create: 5}]}, scale: 2}
"""
    sources = {name: torch.ones(1) for name in "abc"}
    trip = travel(text, sources, {"inside": (2,), "outside": (2,), "constant": (2,)})
    assert trip.loaded["inside"].tolist() == [2.0, 1.0]
    assert trip.loaded["outside"].tolist() == [2.0, 0.0]
    assert trip.loaded["constant"].tolist() == [2.0, 10.0]


def test_a_scale_of_one_and_an_offset_of_zero_change_nothing(travel: Callable[..., Any]) -> None:
    trip = travel("parameters:\n  t: {of: a, scale: 1, offset: 0}\n", {"a": numbers(3)}, {"t": (3,)})
    assert trip.plan.inexact() == {}


def test_a_model_of_lower_precision_rounds_and_the_plan_says_so(travel: Callable[..., Any]) -> None:
    source = numbers(64)
    trip = travel("parameters:\n  a: same\n", {"a": source}, {"a": (64,)}, dtype=torch.bfloat16)
    assert torch.equal(trip.loaded["a"], source.bfloat16())
    assert torch.equal(trip.restored["a"], source.bfloat16().float())
    assert trip.plan.inexact() == {"a": "F32 is rounded to BF16"}


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_a_model_of_higher_precision_gives_back_every_bit(source: torch.dtype, travel: Callable[..., Any]) -> None:
    bits = torch.arange(1 << 16).to(torch.uint16).view(source)
    values = bits[bits.isfinite()]
    trip = travel("parameters:\n  a: same\n", {"a": values}, {"a": tuple(values.shape)}, dtype=torch.float32)
    assert torch.equal(trip.restored["a"].view(torch.int16), values.view(torch.int16))
    assert trip.plan.inexact() == {}
