"""A plan is plain data that accounts for everything, and it is the same data every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tepatch.planning import Plan, Spec

PlanOf = Callable[..., Plan]

EVERYTHING = """captures: {layer: 2, expert: 2}
ignore:
  - old.{layer}: no longer needed
parameters:
  embed: {of: embed, pad: {size: 5, value: 1}}
  head: same
  zero: {create: 0}
  never: {when: false == true, of: nothing}
  layers.{layer}:
    norm: {same: true, offset: 1}
    qkv: {concat: [q.weight, k.weight], sizes: [4, 2]}
    experts: {stack: {concat: ['e.{expert}.w1', 'e.{expert}.w3']}, over: expert}
"""
SOURCES = {
    "embed": (5, 2),
    "head": (6, 2),
    "old.0": (1,),
    **{f"layers.{i}.norm": (2,) for i in range(2)},
    **{f"layers.{i}.q.weight": (4, 2) for i in range(2)},
    **{f"layers.{i}.k.weight": (2, 2) for i in range(2)},
    **{f"layers.{i}.e.{e}.{w}": (3, 2) for i in range(2) for e in range(2) for w in ("w1", "w3")},
}
TARGETS = {
    "embed": (6, 2),
    "zero": (3,),
    **{f"layers.{i}.norm": (2,) for i in range(2)},
    **{f"layers.{i}.qkv": (6, 2) for i in range(2)},
    **{f"layers.{i}.experts": (2, 6, 2) for i in range(2)},
}


@pytest.fixture
def everything(plan_of: PlanOf) -> Plan:
    """A plan in which every state occurs."""
    return plan_of(EVERYTHING, SOURCES, TARGETS, ties={"head": "embed"}, location="here")


def test_every_source_has_a_state_in_the_order_of_the_checkpoint(everything: Plan) -> None:
    assert list(everything.sources) == list(SOURCES)
    states = {name: entry.state for name, entry in everything.sources.items()}
    assert states == {**dict.fromkeys(SOURCES, "used"), "head": "redundant", "old.0": "ignored"}
    assert everything.sources["head"].note == "embed"
    assert everything.sources["old.0"].note == "no longer needed"


def test_every_target_has_a_state_in_the_order_of_the_model(everything: Plan) -> None:
    assert list(everything.targets) == [*TARGETS, "head"]
    states = {name: entry.state for name, entry in everything.targets.items()}
    assert states == {**dict.fromkeys(TARGETS, "filled"), "head": "tied", "zero": "created"}
    assert everything.targets["head"].tied_to == "embed"


def test_every_rule_has_a_state_and_knows_its_sources(everything: Plan) -> None:
    assert [(rule.target, rule.state, rule.count, rule.sources) for rule in everything.rules] == [
        ("embed", "used", 1, ("embed",)),
        ("head", "used", 1, ()),
        ("zero", "used", 1, ()),
        ("never", "off", 0, ()),
        ("layers.{layer}.norm", "used", 2, ("layers.{layer}.norm",)),
        ("layers.{layer}.qkv", "used", 2, ("layers.{layer}.q.weight", "layers.{layer}.k.weight")),
        (
            "layers.{layer}.experts",
            "used",
            2,
            ("layers.{layer}.e.{expert}.w1", "layers.{layer}.e.{expert}.w3"),
        ),
    ]
    assert {everything.rules[copy.rule].target for copy in everything.copies} == {
        "embed",
        "layers.{layer}.norm",
        "layers.{layer}.qkv",
        "layers.{layer}.experts",
    }


def test_bytes_are_those_of_what_is_read_and_of_what_is_allocated(everything: Plan) -> None:
    assert everything.source_bytes == 2 * (10 + 2 * (2 + 8 + 4 + 4 * 6))
    assert everything.target_bytes == 2 * (12 + 3 + 2 * (2 + 12 + 24))


def test_the_plan_names_what_does_not_come_back_bit_for_bit(everything: Plan) -> None:
    assert everything.inexact() == {f"layers.{i}.norm": "scaled or offset (1.0 x + 1.0)" for i in range(2)}


def test_a_tensor_that_is_rounded_is_named_with_the_dtypes(plan_of: PlanOf) -> None:
    plan = plan_of("parameters: {a: same}", {"a": (2,)}, {"a": (2,)}, dtype="F32", target_dtype="BF16")
    assert plan.inexact() == {"a": "F32 is rounded to BF16"}


def test_a_copy_of_a_tied_tensor_can_be_rounded_too(llama: Callable[..., Any]) -> None:
    case = llama()
    case.config["tie_word_embeddings"] = True
    del case.targets["lm_head.weight"]
    case.ties = {"lm_head.weight": "model.embed_tokens.weight"}
    case.sources["lm_head.weight"] = Spec((50, 64), "F32")
    assert case.plan().inexact() == {"lm_head.weight": "F32 is rounded to BF16"}


# -- JSON --


def test_the_json_contains_everything(everything: Plan) -> None:
    found = json.loads(json.dumps(everything.to_json(), allow_nan=False))
    assert found["format"] == "tepatch-plan-1"
    assert found["mapping"] == "m.yaml"
    assert found["digest"] == everything.digest
    assert found["rules"][5] == {
        "where": "m.yaml:12:5",
        "target": "layers.{layer}.qkv",
        "state": "used",
        "count": 2,
        "sources": ["layers.{layer}.q.weight", "layers.{layer}.k.weight"],
    }
    assert found["sources"]["old.0"] == {
        "shape": [1],
        "dtype": "BF16",
        "state": "ignored",
        "note": "no longer needed",
    }
    assert found["targets"]["head"] == {
        "shape": [6, 2],
        "dtype": "BF16",
        "state": "tied",
        "rule": 1,
        "tied_to": "embed",
    }
    assert (found["source_bytes"], found["target_bytes"]) == (everything.source_bytes, everything.target_bytes)
    assert found["inexact"] == everything.inexact()
    assert found["fills"][0]["value"] == 1.0
    assert [copy["affine"] for copy in found["copies"] if "affine" in copy] == [[1.0, 1.0]] * 2


def test_the_copies_can_be_rebuilt_from_the_json(everything: Plan) -> None:
    found = everything.to_json()
    assert len(found["copies"]) == len(everything.copies)
    for each, copy in zip(found["copies"], everything.copies, strict=True):
        layout = found["layouts"][each["layout"]]
        assert (each["source"], each["target"], each["rule"]) == (copy.source, copy.target, copy.rule)
        assert tuple(layout["sizes"]) == copy.pair.sizes
        assert tuple(layout["source"]["strides"]) == copy.pair.source_strides
        assert tuple(layout["target"]["strides"]) == copy.pair.target_strides
        assert (layout["source"]["offset"], layout["target"]["offset"]) == copy.pair[3:]


def test_layouts_that_layers_share_are_listed_once(llama: Callable[..., Any]) -> None:
    few, many = (llama(layers=layers).plan().to_json() for layers in (2, 5))
    assert few["layouts"] == many["layouts"]


PROGRAM = """
import json, sys
from tepatch.errors import PlanError
from tepatch.planning import Spec, make_plan
from tepatch.mapping import parse_mapping
text, sources, targets = json.load(sys.stdin)
specs = [{name: Spec(tuple(shape), "BF16") for name, shape in each.items()} for each in (sources, targets)]
mapping = parse_mapping(text, name="m.yaml")
plan = make_plan(mapping, config={}, sources=specs[0], targets=specs[1], ties={"head": "embed"})
print(json.dumps(plan.to_json()))
print(plan)
try:
    make_plan(mapping, config={}, sources=specs[1], targets=specs[0])
except PlanError as error:
    print(error)
"""


def test_plans_and_problems_are_the_same_bytes_in_every_process() -> None:
    case = json.dumps([f"version: 1\n{EVERYTHING}", SOURCES, TARGETS])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed},
            input=case,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert "problems)" in outputs.pop()


def test_the_same_plan_twice_is_the_same_bytes(llama: Callable[..., Any]) -> None:
    first, second = (json.dumps(llama().plan().to_json()) for _ in range(2))
    assert first == second


# -- for people --


def test_a_plan_reads_like_this(everything: Plan) -> None:
    assert (
        str(everything)
        == f"""\
plan: m.yaml <- here
  mapping m.yaml (sha256 {everything.digest[:12]})
  embed x1 <- same, a constant
  head x1 <- tied to embed
  zero x1 <- a constant
  never: off (its condition does not hold)
  layers.{{layer}}.norm x2 <- same
  layers.{{layer}}.qkv x2 <- {{q,k}}.weight
  layers.{{layer}}.experts x2 <- e.{{expert}}.{{w1,w3}}
  sources: 1 ignored, 1 redundant, 15 used
  targets: 1 created, 7 filled, 1 tied
  ignored: old.0: no longer needed
  dtype: 15 x BF16
  reversible: 14 tensors bit for bit, 2 not:
    layers.{{0..1}}.norm: scaled or offset (1.0 x + 1.0)
  bytes: 172 read, 182 allocated"""
    )


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ("x.{layer}.t: {concat: [a.q_proj.w, a.k_proj.w, a.v_proj.w]}", "x.{layer}.t x1 <- a.{q,k,v}_proj.w"),
        ("x.{layer}.t: {concat: [a.w, b.w, a.v]}", "x.{layer}.t x1 <- a.w + b.w + a.v"),
        ("x.{layer}.t: {concat: [a.w, /b.w, c.w]}", "x.{layer}.t x1 <- a.w + /b.w + c.w"),
        ("x.{layer}.t: {concat: [same, u, v]}", "x.{layer}.t x1 <- t + u + v"),
        ("x.{layer}.t: {concat: [p.a.w, p.a.b.w, p.c.w]}", "x.{layer}.t x1 <- p.a.w + p.a.b.w + p.c.w"),
        ("x.{layer}.t: {concat: [a.w, {create: 0}, c.w]}", "x.{layer}.t x1 <- {a,c}.w, a constant"),
        ("x.{layer}.t: {concat: [/y.a, /y.b, /y.c]}", "x.{layer}.t x1 <- /y.{a,b,c}"),
    ],
)
def test_sources_are_shown_below_the_prefix_of_the_layer(rule: str, line: str, plan_of: PlanOf) -> None:
    scope, _, operation = rule.partition(".t: ")
    text = f"captures: {{layer: 1}}\nparameters:\n  {scope}:\n    t: {operation}"
    names = operation.replace("{create: 0}", "").strip("{}").removeprefix("concat: [").rstrip("]").split(", ")
    full = {name[1:] if name.startswith("/") else f"x.0.{'t' if name == 'same' else name}" for name in names if name}
    plan = plan_of(text, dict.fromkeys(sorted(full), (1,)), {"x.0.t": (3,)})
    assert str(plan).splitlines()[2] == f"  {line}"


def test_hundreds_of_experts_are_shown_in_one_line(plan_of: PlanOf) -> None:
    text = "captures: {expert: 300}\nparameters:\n  t: {stack: 'e.{expert}.w', over: expert}"
    plan = plan_of(text, {f"e.{i}.w": (2,) for i in range(300)}, {"t": (300, 2)})
    assert plan.rules[0].sources == ("e.{expert}.w",)
    assert "  t x1 <- e.{expert}.w" in str(plan).splitlines()


def test_a_rule_of_many_sources_is_cut_short(plan_of: PlanOf) -> None:
    names = [f"{letter}.{letter}" for letter in "abcdefgh"]
    plan = plan_of(f"parameters:\n  t: {{concat: [{', '.join(names)}]}}", dict.fromkeys(names, (1,)), {"t": (8,)})
    assert "  t x1 <- a.a + b.b + c.c + d.d + e.e + f.f + ..." in str(plan).splitlines()
