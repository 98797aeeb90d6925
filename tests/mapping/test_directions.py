"""A plan read backwards, a plan for a model without a checkpoint, and the digest that says where elements go."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tepatch.errors import PlanError, SaveError
from tepatch.mapping import parse_mapping
from tepatch.planning import Plan, Spec, make_export_plan
from tepatch.planning.identity import make_identity_plan
from tepatch.transfer.steps import assemble, check_constants

PlanOf = Callable[..., Plan]

TEXT = """captures: {layer: 2, expert: 2}
ignore:
  - old.{layer}: no longer needed
parameters:
  embed: {of: embed, pad: {size: 5, value: 1}}
  head: same
  zero: {create: 0}
  layers.{layer}:
    norm: {same: true, scale: 3, offset: 1}
    qkv: {interleave: [q.weight, k.weight], over: 2, sizes: [2, 1]}
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
def plan(plan_of: PlanOf) -> Plan:
    return plan_of(TEXT, SOURCES, TARGETS, ties={"head": "embed"}, dtype="F32", location="here")


def values(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_reversed_twice_it_is_the_same_plan(plan: Plan) -> None:
    assert plan.reverse() != plan
    assert plan.reverse().reverse() == plan
    assert plan.reverse().to_json()["direction"] == "save"
    assert "->" in str(plan.reverse()).splitlines()[0]


def test_what_is_read_and_written_changes_sides(plan: Plan) -> None:
    original = {name: shape for name, shape in SOURCES.items() if name != "old.0"}
    assert {name: spec.shape for name, spec in plan.writes.items()} == TARGETS
    assert {name: spec.shape for name, spec in plan.reads.items()} == original
    back = plan.reverse()
    assert back.reads == plan.writes
    assert back.writes == plan.reads
    assert back.write_bytes == 4 * sum(torch.Size(shape).numel() for shape in original.values())


def test_there_and_back_every_tensor_is_what_it_was(plan: Plan) -> None:
    originals = values(SOURCES)
    for name in ("norm",):
        for layer in range(2):  # thirds are not exact in float32: whole numbers are
            originals[f"layers.{layer}.{name}"] = torch.tensor([2.0, -5.0])
    parameters = {name: assemble(plan, name, originals.__getitem__) for name in plan.writes}
    assert torch.equal(parameters["zero"], torch.zeros(3))
    assert torch.equal(parameters["embed"][5:], torch.ones(1, 2))
    assert torch.equal(parameters["layers.0.norm"], torch.tensor([7.0, -14.0]))
    q, k = originals["layers.1.q.weight"], originals["layers.1.k.weight"]
    assert torch.equal(parameters["layers.1.qkv"], torch.cat([q[:2], k[:1], q[2:], k[1:]]))
    back = plan.reverse()
    restored = {name: assemble(back, name, parameters.__getitem__) for name in back.writes}
    assert torch.equal(restored.pop("head"), parameters["embed"]), "a tied copy is the parameter it is tied to"
    assert all(torch.equal(restored[name], originals[name]) for name in restored)
    assert restored.keys() == originals.keys() - {"head", "old.0"}


@pytest.mark.parametrize(("name", "index"), [("zero", 1), ("embed", (5, 0))])
def test_a_constant_that_is_none_any_more_stops_a_save(name: str, index: Any, plan: Plan) -> None:
    originals = values(SOURCES)
    parameters = {each: assemble(plan, each, originals.__getitem__) for each in plan.writes}
    check_constants(plan.reverse(), parameters.__getitem__)
    parameters[name][index] += 0.5
    with pytest.raises(SaveError, match=name):
        check_constants(plan.reverse(), parameters.__getitem__)
    check_constants(plan, parameters.__getitem__)  # loading writes constants, and finds none


def test_float16_that_overflows_is_named_in_either_direction(plan_of: PlanOf) -> None:
    plan = plan_of("parameters: {w: same}", {"w": (2,)}, {"w": (2,)}, dtype="F16", target_dtype="F32")
    with pytest.raises(SaveError, match="float16"):
        assemble(plan.reverse(), "w", {"w": torch.tensor([1.0, 1e6])}.__getitem__)
    with pytest.raises(SaveError, match="float16"):
        assemble(plan.reverse(), "w", {"w": torch.tensor([1.0, -1e6])}.__getitem__)
    assert assemble(plan.reverse(), "w", {"w": torch.tensor([1.0, float("inf")])}.__getitem__).isinf().any()


def test_what_rounds_depends_on_the_direction(plan_of: PlanOf) -> None:
    plan = plan_of("parameters: {w: v}", {"v": (2,)}, {"w": (2,)}, dtype="BF16", target_dtype="F32")
    assert plan.inexact() == {}
    assert plan.reverse().inexact() == {"w": "F32 is rounded to BF16"}


def test_copies_of_a_plan_are_the_plan(plan: Plan) -> None:
    assert plan.steps
    assert copy.deepcopy(plan) is plan
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_the_layout_has_a_digest_that_wording_does_not_change(plan_of: PlanOf) -> None:
    def digest(text: str) -> str:
        return plan_of(text, {"a": (2, 2), "b": (2, 2)}, {"w": (4, 2)}).layout_digest

    plain = digest("parameters: {w: {concat: [a, b]}}")
    assert digest("# a comment\nparameters:\n  w:\n    concat: [a, b]\n    sizes: [2, 2]") == plain
    assert digest("parameters: {w: {concat: [b, a]}}") != plain
    assert digest("parameters: {w: {interleave: [a, b], over: 2}}") != plain
    assert digest("parameters: {w: {concat: [a, {of: b, scale: 2}]}}") != plain


def test_a_constant_and_a_tie_are_part_of_the_layout(plan: Plan) -> None:
    fills = tuple(dataclasses.replace(fill, value=fill.value + 1) for fill in plan.fills)
    assert dataclasses.replace(plan, fills=fills).layout_digest != plan.layout_digest
    targets = {name: entry for name, entry in plan.targets.items() if entry.state != "tied"}
    assert dataclasses.replace(plan, targets=targets).layout_digest != plan.layout_digest


# A plan for a model without a checkpoint.


def test_a_model_says_which_tensors_it_is_made_of(llama: Callable[..., Any]) -> None:
    made = llama()
    expected = made.plan()
    mapping = parse_mapping(f"version: 1\n{made.text}", name="llama.yaml")
    exported = make_export_plan(
        mapping, config=made.config, targets=made.targets, patch="llama", location="checkpoint", like=made.sources
    )
    assert exported == expected
    fresh = make_export_plan(mapping, config=made.config, targets=made.targets)
    assert dict(fresh.sources) == dict(expected.sources)
    assert fresh.layout_digest == expected.layout_digest


def test_dtypes_are_those_of_the_parameters_or_what_was_asked_for(llama: Callable[..., Any]) -> None:
    made = llama()
    mapping = parse_mapping(f"version: 1\n{made.text}", name="llama.yaml")
    targets = {name: Spec(spec.shape, "F32") for name, spec in made.targets.items()}

    def dtypes(**options: Any) -> set[str]:
        plan = make_export_plan(mapping, config=made.config, targets=targets, **options)
        return {entry.dtype for entry in plan.sources.values()}

    assert dtypes() == {"F32"}
    assert dtypes(like=made.sources) == {"F32"}
    assert dtypes(like=made.sources, keep_dtypes=True) == {"BF16"}
    assert dtypes(like=made.sources, keep_dtypes=True, dtype="F16") == {"F16"}


def test_of_several_spellings_that_of_the_checkpoint_is_kept() -> None:
    mapping = parse_mapping("version: 1\nparameters: {w: {any_of: [new, old]}}", name="m.yaml")
    targets = {"w": Spec((2,), "F32")}

    def source(like: dict[str, Spec]) -> list[str]:
        return list(make_export_plan(mapping, config={}, targets=targets, like=like).sources)

    assert source({}) == ["new"]
    assert source({"old": Spec((2,), "F32")}) == ["old"]


def test_a_tied_copy_comes_back_only_if_it_was_there(llama: Callable[..., Any]) -> None:
    made = llama()
    made.config["tie_word_embeddings"] = True
    targets = {name: spec for name, spec in made.targets.items() if name != "lm_head.weight"}
    ties = {"lm_head.weight": "model.embed_tokens.weight"}
    mapping = parse_mapping(f"version: 1\n{made.text}", name="llama.yaml")
    without = make_export_plan(mapping, config=made.config, targets=targets, ties=ties)
    assert "lm_head.weight" not in without.sources
    there = make_export_plan(mapping, config=made.config, targets=targets, ties=ties, like=made.sources)
    assert there.sources["lm_head.weight"].state == "redundant"


def test_a_parameter_that_no_rule_knows_is_an_error(llama: Callable[..., Any]) -> None:
    made = llama()
    mapping = parse_mapping(f"version: 1\n{made.text}", name="llama.yaml")
    made.targets["model.layers.1.adapter.weight"] = Spec((2, 2), "BF16")
    with pytest.raises(PlanError, match=r"model\.layers\.1\.adapter\.weight"):
        make_export_plan(mapping, config=made.config, targets=made.targets)


def test_a_parameter_that_is_gone_is_an_error(llama: Callable[..., Any]) -> None:
    made = llama()
    mapping = parse_mapping(f"version: 1\n{made.text}", name="llama.yaml")
    gone = "model.layers.2.mlp.fc2_weight"
    del made.targets[gone]
    with pytest.raises(PlanError, match=r"mlp\.fc2_weight"):
        make_export_plan(mapping, config=made.config, targets=made.targets)


# A checkpoint of parameters.


def test_every_parameter_is_read_from_its_own_name(plan: Plan) -> None:
    native = make_identity_plan(plan, plan.writes, location="here", where="tepatch.json")
    held = values(TARGETS)
    assert all(torch.equal(assemble(native, name, held.__getitem__), held[name]) for name in native.writes)
    assert native.targets["head"].tied_to == "embed"
    assert native.writes == plan.writes


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("zero", None, r"without a tensor \(1\)"),
        ("more", Spec((2,), "F32"), r"belong to no parameter \(1\)"),
        ("zero", Spec((4,), "F32"), r"here: zero: does not fit"),
        ("zero", Spec((3,), "I32"), r"here: zero: does not fit"),
    ],
)
def test_tensors_that_are_not_the_parameters_are_named(name: str, spec: Spec | None, message: str, plan: Plan) -> None:
    tensors = {**plan.writes, name: spec}
    held = {key: value for key, value in tensors.items() if value is not None}
    with pytest.raises(PlanError, match=message) as caught:
        make_identity_plan(plan, held, location="here", where="tepatch.json")
    assert name in str(caught.value)
