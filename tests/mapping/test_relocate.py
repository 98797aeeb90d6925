"""``base`` and ``rest``: rules that are about a part of a model, wherever that part is, and what is around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tepatch.errors import PlanError, Problem
from tepatch.mapping import parse_mapping
from tepatch.mapping.relocate import Spelling, below, find_base, move_base, spell
from tepatch.planning import Plan, Spec, make_export_plan, make_plan

TEXT = """\
version: 1
base: model
rest: same
captures: {layer: layers}
ignore:
  - model.rotary.inv_freq: computed
parameters:
  model.norm.weight: same
  model.layers.{layer}:
    qkv.weight: {concat: [q.weight, k.weight]}
    mlp.weight: {any_of: [up.weight, '/model.old.{layer}.up.weight']}
"""
RULES = parse_mapping(TEXT, name="m.yaml")


def shapes(names: str, **others: tuple[int, ...]) -> dict[str, Spec]:
    return {name: Spec((2,), "F32") for name in names.split()} | {n: Spec(s, "F32") for n, s in others.items()}


def checkpoint(at: str, head: str = "head.weight", layers: int = 2) -> dict[str, Spec]:
    """A checkpoint that has the base at ``at`` (with its dot) and a head beside it."""
    layer_names = (f"{at}layers.{n}.{leaf}.weight" for n in range(layers) for leaf in ("q", "k", "up"))
    return shapes(" ".join([f"{at}norm.weight", *layer_names, head]))


def parameters(at: str, head: str = "head.weight", layers: int = 2) -> dict[str, Spec]:
    out = shapes(" ".join([f"{at}norm.weight", *(f"{at}layers.{n}.mlp.weight" for n in range(layers)), head]))
    return out | {f"{at}layers.{n}.qkv.weight": Spec((4,), "F32") for n in range(layers)}


def planned(
    sources: Mapping[str, Spec], targets: Mapping[str, Spec], *, text: str = TEXT, layers: int = 2, **options: Any
) -> Plan:
    """A plan with the base where it is found on each side."""
    rules = parse_mapping(text, name="m.yaml")
    ties: Mapping[str, str] = options.get("ties", {})
    target = find_base(rules, [*targets, *ties], side="target", default="model", where="the model")
    source = find_base(rules, sources, side="source", default=target, where="the checkpoint")
    moved = move_base(rules, source=source, target=target)
    return make_plan(moved, config={"layers": layers}, sources=sources, targets=targets, **options)


def told(*args: Any, **kwargs: Any) -> list[Problem]:
    with pytest.raises(PlanError) as caught:
        planned(*args, **kwargs)
    return list(caught.value.problems)


@pytest.mark.parametrize("source", ["", "model.", "a.b.", "text.model."])
@pytest.mark.parametrize("target", ["model.", "outer.text."])
def test_the_base_may_be_anywhere_on_either_side(source: str, target: str) -> None:
    plan = planned(checkpoint(source), parameters(target))
    pairs = {(copy.source, copy.target) for copy in plan.copies}
    assert (f"{source}norm.weight", f"{target}norm.weight") in pairs
    assert (f"{source}layers.1.k.weight", f"{target}layers.1.qkv.weight") in pairs
    assert ("head.weight", "head.weight") in pairs
    assert all(entry.state == "used" for entry in plan.sources.values())


def test_a_model_that_is_the_base_has_nothing_outside() -> None:
    sources, targets = checkpoint("model."), parameters("")
    assert [problem.details for problem in told(sources, targets)] == [("head.weight",)] * 2  # a source, a parameter
    del sources["head.weight"], targets["head.weight"]
    plan = planned(sources, targets)
    assert not any("outside" in rule.target for rule in plan.rules)


def test_sources_of_every_kind_are_moved_with_the_base() -> None:
    older = {
        name.replace("text.layers.0.up", "text.old.0.up"): spec for name, spec in checkpoint("text.").items()
    } | shapes("text.rotary.inv_freq")
    plan = planned(older, parameters("model."))
    assert plan.sources["text.old.0.up.weight"].state == "used"
    assert plan.sources["text.rotary.inv_freq"].state == "ignored"


@pytest.mark.parametrize(
    ("found", "moved"),
    [
        ("bert.encoder", "bert.embeddings.{n}.ids"),
        ("encoder", "embeddings.{n}.ids"),
        ("x.y.bert.encoder", "x.y.bert.embeddings.{n}.ids"),
        ("text.encoder", "text.embeddings.{n}.ids"),
        ("layers", "bert.embeddings.{n}.ids"),  # nothing tells where it would be
    ],
)
@pytest.mark.parametrize("inner", ["", ".more"])
def test_what_is_ignored_outside_the_base_has_moved_with_it(found: str, moved: str, inner: str) -> None:
    text = """\
version: 1
base: bert.encoder
rest: same
captures: {n: layers}
ignore:
  - bert.embeddings.{n}.ids: computed
  - bert.encoder.{n}.ids: computed
parameters:
  bert.encoder.{n}.w: same
""".replace("encoder", f"encoder{inner}")
    rules = parse_mapping(text, name="m.yaml")
    found += inner
    ignored = [each.source.text for each in move_base(rules, source=found, target="bert.encoder").ignored]
    assert ignored == [moved, f"{found}.{{n}}.ids"]
    sources = {f"{found}.0.w": Spec((2,), "F32")} | {name.format(n=0): Spec((2,), "I64") for name in ignored}
    plan = planned(sources, {"encoder.0.w": Spec((2,), "F32")}, text=text, layers=1)
    assert [entry.state for entry in plan.sources.values()] == ["used", "ignored", "ignored"]


def test_a_tower_with_some_names_of_the_base_is_not_taken_for_it() -> None:
    tower = shapes("tower.layers.0.q.weight tower.layers.0.k.weight tower.layers.1.q.weight tower.layers.2.q.weight")
    plan = planned(checkpoint("text.") | tower, parameters("model.") | tower)
    assert all(plan.targets[name].rule == len(RULES.rules) for name in tower)


def test_two_places_for_the_base_are_an_error() -> None:
    for side, both in {
        "the checkpoint": (checkpoint("a.") | checkpoint("b."), parameters("model.")),
        "the model": (checkpoint("model."), parameters("a.") | parameters("b.")),
    }.items():
        (problem,) = told(*both)
        assert problem.where == side
        assert "may be in 2 places" in problem.what
        assert [detail.partition(":")[0] for detail in problem.details] == ["a", "b"]


def test_layers_of_a_list_of_bases_are_not_taken_for_one_base() -> None:
    sources = {f"towers.{n}.{name}": spec for n in range(2) for name, spec in checkpoint("").items()}
    (problem,) = told(sources, parameters("model."))
    assert problem.details[0].startswith("towers.0: ")


def test_what_is_outside_must_be_there_whole_and_once() -> None:
    sources, targets = checkpoint("model."), parameters("model.")
    del sources["head.weight"]
    (problem,) = told(sources, targets)
    assert problem.details == ("head.weight",)
    assert "fresh=['head.weight']" in problem.fix
    (problem,) = told(checkpoint("model.") | {"head.weight": Spec((3,), "F32")}, targets)
    assert (problem.expected, problem.found) == ("[2]", "[3]")
    (problem,) = told(checkpoint("model.") | {"head.weight": Spec((2,), "I32")}, targets)
    assert "does not convert" in problem.what
    (problem,) = told(checkpoint("model.") | shapes("head.bias"), targets)
    assert "drop=['head.bias']" in problem.fix


def test_parameters_inside_the_base_need_rules() -> None:
    (problem, other) = told(checkpoint("model.") | shapes("model.extra"), parameters("model.") | shapes("model.extra"))
    assert {problem.details, other.details} == {("model.extra",)}


def test_a_rule_is_for_a_parameter_outside_before_the_rest_is() -> None:
    text = TEXT + "  head.weight: {of: head.weight, offset: 1}\n"
    plan = planned(checkpoint("model."), parameters("model."), text=text)
    assert [copy.affine.offset for copy in plan.copies if copy.target == "head.weight"] == [1.0]


def test_a_rule_outside_the_base_is_off_in_a_class_without_the_parameter() -> None:
    text = TEXT + "  head.weight: {of: head.weight, offset: 1}\n"
    plan = planned(checkpoint("model.", head="model.norm.weight"), parameters("model.", "model.norm.weight"), text=text)
    assert [rule.state for rule in plan.rules if "head" in rule.target] == ["off"]


def test_a_rule_with_a_slip_in_its_target_is_no_rule_of_another_class() -> None:
    problems = told(
        checkpoint("model."), parameters("model."), text=TEXT + "  haed.weight: {of: head.weight, offset: 1}\n"
    )
    assert [problem.what for problem in problems] == [
        "the rule matches no parameter of the model, and head.weight would go to head.weight as it is"
    ]


def test_ties_outside_are_the_models() -> None:
    targets = parameters("model.", head="model.norm.weight")
    plan = planned(checkpoint("model."), targets, ties={"head.weight": "model.norm.weight"})
    assert plan.targets["head.weight"].tied_to == "model.norm.weight"
    assert plan.sources["head.weight"].state == "redundant"


def test_names_outside_may_be_spelt_otherwise() -> None:
    plan = planned(
        checkpoint("model.", head="cls.weight"), parameters("model."), spelling={"head.weight": "cls.weight"}
    )
    assert ("cls.weight", "head.weight") in {(copy.source, copy.target) for copy in plan.copies}


def test_what_is_dropped_is_as_good_as_absent() -> None:
    sources, targets = checkpoint("model.") | shapes("other.weight"), parameters("model.")
    plan = planned(sources, targets, dropped=["other.weight"])
    assert plan.sources["other.weight"].note == "dropped by the caller"
    assert list(plan.sources) == list(sources)
    (problem,) = told(sources, targets, dropped=["other.weight", "model.norm.weight"])
    assert problem.details == ("model.norm.weight",)


def test_a_plan_for_saving_has_the_rest_too() -> None:
    rules = move_base(RULES, source="text", target="model")
    plan = make_export_plan(
        rules, config={"layers": 2}, targets=parameters("model."), like=checkpoint("text."), keep_dtypes=True
    )
    assert list(plan.sources) == list(checkpoint("text."))


def test_a_plan_can_be_given_the_stock_models_names() -> None:
    sources = checkpoint("text.", head="cls.weight") | shapes("text.rotary.inv_freq")
    plan = planned(sources, parameters("model."), spelling={"head.weight": "cls.weight"})
    spelling = spell({"head.weight": "cls.weight"}, below(RULES, sources, "text"), target="model")
    stock = plan.renamed(spelling.stock())
    wanted = {*checkpoint("model."), "text.rotary.inv_freq"}  # what is ignored is the checkpoint's alone
    assert set(stock.sources) == wanted
    assert stock.renamed(spelling.names) == plan
    assert plan.renamed(Spelling().stock()) is plan


def test_a_mapping_whose_base_is_at_its_own_name_stays_as_it_is() -> None:
    assert move_base(RULES, source="model", target="model") is RULES
    assert find_base(RULES, ["nothing", "of.it"], side="source", default="there", where="") == "there"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("rest: same\nparameters: {a.b: same}\n", "'rest' needs a 'base'"),
        ("base: model\nparameters: {a.b: same}\n", "no rule is about 'model'"),
        ("base: 'model.{layer}'\ncaptures: {layer: 2}\nparameters: {'model.{layer}.b': same}\n", "'{layer}'"),
        ("base: a..b\nparameters: {a.b: same}\n", "an empty part between dots"),
        ("base:\nparameters: {a.b: same}\n", "'base' has no value"),
        ("base: a\nrest:\nparameters: {a.b: same}\n", "'rest' has no value"),
        ("base: a\nrest: other\nparameters: {a.b: same}\n", "'rest'"),
    ],
)
def test_a_base_that_makes_no_sense_is_refused(refused: Callable[..., list[Problem]], text: str, what: str) -> None:
    assert any(what in problem.what for problem in refused(text))


def test_base_and_rest_are_inherited(tmp_path: Any) -> None:
    (tmp_path / "first.yaml").write_text(TEXT)
    child = parse_mapping("version: 1\nextends: first.yaml\nparameters: {}\n", folder=tmp_path)
    assert (child.base, child.rest) == ("model", "first.yaml:3:1")
