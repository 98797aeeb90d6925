"""What does not fit is told: one problem for each cause, where it is, with names and shapes, and all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tepatch.errors import Problem
from tepatch.mapping import parse_mapping
from tepatch.planning import Plan, Spec, make_plan
from tepatch.planning.requirements import requirement_problems

Problems = Callable[..., list[Problem]]


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, "\n".join(map(str, problems))
    return problems[0]


# -- the checkpoint --


def test_a_missing_tensor_is_told_with_what_it_is_for(llama: Callable[..., Any]) -> None:
    case = llama()
    del case.sources["model.layers.1.self_attn.o_proj.weight"]
    problem = case.problem()
    assert problem.where == "llama.yaml:22:5"
    assert problem.what == "1 tensor missing from the checkpoint"
    assert problem.details == ("model.layers.1.self_attn.o_proj.weight",)
    assert problem.expected == "for model.layers.1.self_attn.proj.weight"


def test_half_of_a_concat_that_is_missing_is_told_as_a_part(llama: Callable[..., Any]) -> None:
    case = llama()
    for layer in (0, 2):
        del case.sources[f"model.layers.{layer}.mlp.up_proj.weight"]
    problem = case.problem()
    assert problem.details == ("model.layers.{0,2}.mlp.up_proj.weight",)
    assert problem.expected == "for model.layers.{0,2}.mlp.fc1_weight (one of 2 parts)"


def test_a_tensor_of_another_name_is_offered(llama: Callable[..., Any]) -> None:
    case = llama()
    for layer in range(3):
        at = f"model.layers.{layer}.self_attn"
        case.sources[f"{at}.out_proj.weight"] = case.sources.pop(f"{at}.o_proj.weight")
    unexpected, missing = case.problems()
    assert unexpected.details == ("model.layers.{0..2}.self_attn.out_proj.weight",)
    assert missing.fix == "did you mean model.layers.0.self_attn.out_proj.weight?"


def test_a_whole_layer_that_is_missing_is_one_problem(llama: Callable[..., Any]) -> None:
    case = llama()
    case.sources = {name: spec for name, spec in case.sources.items() if ".2." not in name}
    problem = case.problem()
    assert problem.where == "llama.yaml:2:19"
    assert problem.what == "the checkpoint has nothing for layer 2"
    assert problem.expected == "'layer' is num_hidden_layers in the config"
    assert problem.fix.startswith("check that config.json belongs to this checkpoint")


def test_if_no_layer_at_all_is_found_the_names_are_told(llama: Callable[..., Any]) -> None:
    case = llama(layers=2)
    case.sources = {name.replace("model.layers", "transformer.h"): spec for name, spec in case.sources.items()}
    problems = case.problems()
    assert len([problem for problem in problems if problem.what == "2 tensors missing from the checkpoint"]) == 4
    assert any(problem.what == "18 tensors of the checkpoint that no rule uses" for problem in problems)


def test_an_unexpected_tensor_is_told(llama: Callable[..., Any]) -> None:
    case = llama()
    case.sources["model.extra.weight"] = Spec((1,), "F32")
    problem = case.problem()
    assert (problem.where, problem.what) == ("llama.yaml", "1 tensor of the checkpoint that no rule uses")
    assert problem.details == ("model.extra.weight",)
    assert problem.fix == "add a rule, or list it under 'ignore' with the reason"


def test_a_layer_too_many_is_told_with_the_count_of_the_config(llama: Callable[..., Any]) -> None:
    case = llama(layers=4)
    case.config["num_hidden_layers"] = 3
    case.targets = {name: spec for name, spec in case.targets.items() if ".3." not in name}
    problem = case.problem()
    assert problem.what == "9 tensors of the checkpoint that no rule uses"
    assert problem.found == "'layer' is 0..2 (num_hidden_layers in the config), the checkpoint has more"
    assert problem.fix == "check that config.json belongs to this checkpoint"


def test_an_ignored_tensor_is_no_problem(llama: Callable[..., Any]) -> None:
    case = llama()
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    case.sources[name] = Spec((4,), "F32")
    entry = case.plan().sources[name]
    assert (entry.state, entry.note) == ("ignored", "computed from the config")


def test_a_wrong_shape_is_told_with_both(llama: Callable[..., Any]) -> None:
    case = llama()
    for layer in range(3):
        case.sources[f"model.layers.{layer}.self_attn.k_proj.weight"] = Spec((32, 64), "BF16")
    problem = case.problem()
    assert problem.where == "llama.yaml:19:5"
    assert problem.what == "wrong shape: 3 tensors"
    assert problem.details == ("model.layers.{0..2}.self_attn.k_proj.weight",)
    assert (problem.expected, problem.found) == ("[16, 64]", "[32, 64]")


@pytest.mark.parametrize(
    ("rule", "fix"),
    [
        ("t: x", "put 'transpose: true' to it in the rule"),
        ("t: {of: x, transpose: true}", "take 'transpose: true' out of the rule"),
        ("t: {of: {of: x, transpose: true}, transpose: true}", "put 'transpose: true' to it in the rule"),
        ("t: {concat: [{of: y, transpose: true}, x]}", "put 'transpose: true' to it in the rule"),
        ("t: {of: {concat: [x, y], dim: 1}, transpose: true}", "take 'transpose: true' out of the rule"),
    ],
)
def test_a_tensor_that_is_turned_over_is_told_to_be(rule: str, fix: str, plan_problems: Problems) -> None:
    target = (8, 3) if "y" in rule else (4, 3)
    shape = (4, 3) if fix.startswith("take") else (3, 4)
    sources = {"x": shape, **({"y": (3, 4)} if "y" in rule else {})}
    problem = only(plan_problems(f"parameters: {{'t': {rule.partition(': ')[2]}}}", sources, {"t": target}))
    assert problem.fix.startswith(f"if the checkpoint stores it turned over, {fix}; else check that config.json")
    assert (problem.details, problem.found) == (("x",), str(list(shape)))


@pytest.mark.parametrize(
    ("expected", "found", "is_told"),
    [((2, 4, 3), (2, 3, 4), True), ((2, 4, 3), (3, 4, 2), False), ((4, 3), (3, 5), False), ((4,), (4, 1), False)],
)
def test_only_what_transpose_swaps_is_turned_over(
    expected: tuple[int, ...], found: tuple[int, ...], is_told: bool, plan_problems: Problems
) -> None:
    problem = only(plan_problems("parameters: {t: x}", {"x": found}, {"t": expected}))
    assert ("transpose" in problem.fix) is is_told


def test_what_is_outside_the_base_and_turned_over_needs_a_rule(plan_problems: Problems) -> None:
    text = "base: model\nrest: same\nparameters: {model.norm: same}"
    sources, targets = {"model.norm": (3,), "head": (3, 4)}, {"model.norm": (3,), "head": (4, 3)}
    assert "add a rule for it with 'transpose: true'" in only(plan_problems(text, sources, targets)).fix


def test_a_copy_of_a_tied_tensor_is_not_told_to_be_turned_over(plan_problems: Problems) -> None:
    text = "parameters: {t: x, u: same}"
    problem = only(plan_problems(text, {"x": (4, 3), "u": (3, 4)}, {"t": (4, 3)}, ties={"u": "t"}))
    assert "transpose" not in problem.fix


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8", "I64", "BOOL"])
def test_a_dtype_that_would_change_the_meaning_is_refused(dtype: str, llama: Callable[..., Any]) -> None:
    case = llama()
    for layer in range(3):
        case.sources[f"model.layers.{layer}.mlp.down_proj.weight"] = Spec((64, 96), dtype)
    problem = case.problem()
    assert problem.where == "llama.yaml:26:5"
    assert problem.what == "3 tensors of a dtype that does not convert to the parameter's"
    assert problem.details == ("model.layers.{0..2}.mlp.down_proj.weight",)
    assert (problem.expected, problem.found) == ("BF16", dtype)


def test_a_copy_of_a_tied_tensor_must_have_a_dtype_that_converts(llama: Callable[..., Any]) -> None:
    case = llama()
    case.config["tie_word_embeddings"] = True
    del case.targets["lm_head.weight"]
    case.ties = {"lm_head.weight": "model.embed_tokens.weight"}
    case.sources["lm_head.weight"] = Spec((50, 64), "I8")
    assert case.problem().what == "1 tensor of a dtype that does not convert to the parameter's"


def test_the_same_number_of_elements_in_another_shape_is_refused(plan_problems: Problems) -> None:
    problem = only(plan_problems("parameters: {a: same}", {"a": (2, 6)}, {"a": (3, 4)}))
    assert (problem.expected, problem.found) == ("[3, 4]", "[2, 6]")


def test_a_source_that_two_targets_want_is_refused(plan_problems: Problems) -> None:
    problem = only(plan_problems("parameters:\n  a: same\n  b: a", {"a": (4,)}, {"a": (4,), "b": (4,)}))
    assert problem.where == "m.yaml:4:3"
    assert problem.what == "1 tensor of the checkpoint not consumed exactly once: used twice"
    assert problem.details == ("a", "used for a, b")
    assert problem.found == "used by the rules at m.yaml:3:3, m.yaml:4:3"


def test_a_source_that_one_rule_uses_twice_is_refused(plan_problems: Problems) -> None:
    problem = only(plan_problems("parameters:\n  t: {concat: [a, a]}", {"a": (4,)}, {"t": (8,)}))
    assert problem.what == "1 tensor of the checkpoint not consumed exactly once: used twice"
    assert problem.details == ("a", "used for t")


def test_a_source_that_is_used_only_in_part_is_refused(plan_problems: Problems) -> None:
    text = "parameters:\n  t: {of: a, take: {out_of: 6, start: 0, size: 4}}"
    problem = only(plan_problems(text, {"a": (6, 2)}, {"t": (4, 2)}))
    assert problem.what.endswith("not consumed exactly once: only 8 of 12 elements are covered")


def test_parts_of_a_source_that_overlap_are_refused_though_their_sizes_add_up(plan_problems: Problems) -> None:
    text = """parameters:
  t: {of: a, take: {out_of: 6, start: 0, size: 3}}
  u: {of: a, take: {out_of: 6, start: 2, size: 3}}"""
    problem = only(plan_problems(text, {"a": (6,)}, {"t": (3,), "u": (3,)}))
    assert problem.what.endswith("not consumed exactly once: some elements are covered twice")


def test_rules_that_expect_different_shapes_of_a_source_are_told(plan_problems: Problems) -> None:
    text = """parameters:
  t: {of: a, take: {out_of: 6, start: 0, size: 3}}
  u: {of: a, take: {out_of: 7, start: 3, size: 3}}"""
    problem = plan_problems(text, {"a": (6,)}, {"t": (3,), "u": (3,)})[0]
    assert (problem.where, problem.what) == ("m.yaml:4:3", "rules expect different shapes of a")
    assert problem.details == ("[6] by the rule at m.yaml:3:3",)
    assert problem.found == "[7] here"


def test_of_alternatives_the_one_that_lacks_the_fewest_is_told(plan_problems: Problems) -> None:
    text = "parameters:\n  t: {any_of: [{concat: [a, b]}, {concat: [c, d]}, e]}"
    problem = plan_problems(text, {"d": (2,)}, {"t": (4,)})[0]
    assert problem.details == ("c",)


def test_if_two_alternatives_are_in_the_checkpoint_the_second_is_not_silently_dropped(plan_problems: Problems) -> None:
    problem = only(plan_problems("parameters:\n  t: {any_of: [a, b]}", {"a": (2,), "b": (2,)}, {"t": (2,)}))
    assert problem.details == ("b",)


# -- the model --


def test_a_parameter_that_no_rule_fills_is_told(llama: Callable[..., Any]) -> None:
    case = llama()
    case.targets |= {f"model.layers.{layer}.extra": Spec((1,), "BF16") for layer in range(3)}
    problem = case.problem()
    assert problem.what == "no rule fills 3 parameters of the model"
    assert problem.details == ("model.layers.{0..2}.extra",)
    assert problem.fix.startswith("add a rule (or 'create'")


def test_a_rule_that_matches_nothing_is_told(llama: Callable[..., Any]) -> None:
    case = llama()
    case.targets = {name: spec for name, spec in case.targets.items() if "fc2_weight" not in name}
    problem = case.problem()
    assert problem.where == "llama.yaml:26:5"
    assert problem.what == "the rule matches no parameter of the model (3 names)"
    assert problem.details == ("model.layers.{0..2}.mlp.fc2_weight",)


def test_a_misspelt_target_is_told_with_the_one_that_was_meant(plan_problems: Problems) -> None:
    problems = plan_problems("parameters:\n  a.wieght: b", {"b": (2,)}, {"a.weight": (2,)})
    assert [problem.what for problem in problems] == [
        "no rule fills 1 parameter of the model",
        "the rule matches no parameter of the model (1 name)",
    ]
    assert problems[1].fix == "did you mean a.weight?"


def test_two_rules_on_one_target_are_told_with_both_places(plan_problems: Problems) -> None:
    text = "captures: {x: 1, y: 1}\nparameters:\n  t.{x}: a\n  t.{y}: b"
    problem = plan_problems(text, {"a": (2,), "b": (2,)}, {"t.0": (2,)})[0]
    assert (problem.where, problem.what, problem.found) == (
        "m.yaml:5:3",
        "a second rule fills t.0",
        "first at m.yaml:4:3",
    )


def test_two_rules_for_one_tied_target_are_refused_too(plan_problems: Problems) -> None:
    text = "captures: {x: 1, y: 1}\nparameters:\n  e: same\n  t.{x}: same\n  t.{y}: same"
    problem = only(plan_problems(text, {"e": (2,)}, {"e": (2,)}, ties={"t.0": "e"}))
    assert problem.what == "a second rule fills t.0"


# -- ties --


def tied(case: Any) -> Any:
    del case.targets["lm_head.weight"]
    case.ties = {"lm_head.weight": "model.embed_tokens.weight"}
    return case


def without_head(text: str) -> str:
    rule = "  lm_head.weight:\n    - {when: tie_word_embeddings, same: true}\n    - same\n"
    assert rule in text
    return text.replace(rule, "")


def test_ties_are_the_models_with_and_without_a_rule(llama: Callable[..., Any]) -> None:
    for is_said in (True, False):
        case = tied(llama())
        case.text = case.text if is_said else without_head(case.text)
        plan = case.plan()
        assert plan.targets["lm_head.weight"].state == "tied"
        assert plan.targets["lm_head.weight"].tied_to == "model.embed_tokens.weight"
        assert plan.sources["lm_head.weight"].state == "redundant"
        assert sum(rule.count for rule in plan.rules) == len(plan.targets)
        assert str(plan).count("tied to model.embed_tokens.weight") == 1


def test_a_parameter_that_the_model_does_not_tie_needs_its_rule_and_its_tensor(llama: Callable[..., Any]) -> None:
    case = llama()
    assert case.plan().targets["lm_head.weight"].state == "filled"
    del case.sources["lm_head.weight"]
    assert case.problem().what == "1 tensor missing from the checkpoint"
    case = llama()
    case.text = without_head(case.text)
    assert {problem.details for problem in case.problems()} == {("lm_head.weight",)}


def test_the_rule_of_a_tied_parameter_names_the_copy(plan_of: Callable[..., Plan]) -> None:
    sources = {"e": (2,), "old.h": (2,)}
    plan = plan_of("parameters: {e: same, h: old.h}", sources, {"e": (2,)}, ties={"h": "e"})
    assert (plan.sources["old.h"].state, plan.sources["old.h"].note) == ("redundant", "e")
    plan = plan_of("parameters: {e: same, h: old.h}", {"old.h": (2,)}, {"e": (2,)}, ties={"h": "e"})
    assert plan.steps["e"][0].read == "old.h"


@pytest.mark.parametrize(
    "rule",
    [
        "{of: h, offset: 1}",
        "{of: h, scale: 2}",
        "{of: h, transpose: true}",
        "{of: h, axes: i j -> j i}",
        "{of: h, pad: {size: 3}}",
        "{of: h, take: {start: 0, size: 2, out_of: 4}}",
        "{of: {concat: [h, g]}}",
        "{concat: [h, g]}",
        "{create: 0}",
    ],
)
def test_the_rule_of_a_tied_parameter_makes_nothing_of_it(
    rule: str, plan_problems: Problems, plan_of: Callable[..., Plan]
) -> None:
    text = "parameters:\n  e: same\n  h: %s"
    shapes = {"e": (2, 2), "h": (2, 2)}, {"e": (2, 2)}
    problem = only(plan_problems(text % rule, *shapes, ties={"h": "e"}))
    assert problem.where == "m.yaml:4:3"
    assert problem.what == "the model ties h to e, so its rule can only name the copy that a checkpoint may hold"
    assert problem.fix == "write '{when: CONDITION, same: true}' as the first choice, for configs that tie them"
    plan = plan_of(text % f"[{{when: is_tied, same: true}}, {rule}]", *shapes, ties={"h": "e"}, is_tied=True)
    assert plan.sources["h"].state == "redundant"


def test_a_copy_of_a_tied_tensor_must_have_its_shape(llama: Callable[..., Any]) -> None:
    case = tied(llama())
    assert case.plan().sources["lm_head.weight"].state == "redundant"
    case.sources["lm_head.weight"] = Spec((49, 64), "BF16")
    problem = case.problem()
    assert (problem.what, problem.expected, problem.found) == ("wrong shape: 1 tensor", "[50, 64]", "[49, 64]")


# -- the config --


def test_a_field_that_the_config_lacks_is_told_once(llama: Callable[..., Any]) -> None:
    case = llama()
    del case.config["num_key_value_heads"]
    problem = case.problem()
    assert problem.where == "llama.yaml:6:7"
    assert problem.what == "there is no config field or size named 'num_key_value_heads'"
    assert problem.found == "'num_key_value_heads * d'"
    assert problem.fix == "check the spelling, or write optional(...) if a config may lack it"


def test_a_condition_on_a_field_that_the_config_lacks_is_told_once(llama: Callable[..., Any]) -> None:
    case = llama()
    del case.config["attention_bias"]
    assert case.problem().what == "there is no config field or size named 'attention_bias'"


def test_a_count_that_the_config_lacks_is_told_once(llama: Callable[..., Any]) -> None:
    case = llama()
    del case.config["num_hidden_layers"]
    problem = case.problem()
    assert (problem.where, problem.found) == ("llama.yaml:2:19", "'num_hidden_layers'")


def test_a_requirement_that_does_not_hold_is_told_in_the_words_of_the_mapping(llama: Callable[..., Any]) -> None:
    case = llama()
    case.config["hidden_act"] = "gelu"
    problem = case.problem()
    assert (problem.where, problem.what) == ("llama.yaml:8:5", "this layer computes SwiGLU")
    assert problem.expected == "hidden_act == 'silu'"
    assert problem.found == "config.hidden_act = 'gelu'"


def test_requirements_can_be_checked_without_a_checkpoint() -> None:
    text = "version: 1\nrequires:\n  - a > 1: too few\n  - b > a: too small\n  - c: unknown\nparameters: {}\n"
    problems = requirement_problems(parse_mapping(text, name="m.yaml"), {"a": 1, "b": 1})
    assert [problem.what for problem in problems] == [
        "too few",
        "too small",
        "there is no config field or size named 'c'",
    ]
    assert problems[1].found == "config.a = 1, config.b = 1"


@pytest.mark.parametrize("value", ["'x'", "1.5", "-1", "true", "[1, 'x']", "[1, -1]", "none", "10000000"])
def test_a_capture_must_be_a_count_or_numbers(value: str, plan_problems: Problems) -> None:
    problem = only(plan_problems(f'captures: {{layer: "{value}"}}\nparameters:\n  a.{{layer}}: same', {}, {}))
    assert problem.what == "capture 'layer' needs a count or a list of numbers"
    assert problem.where == "m.yaml:2:20"


def test_a_size_defined_by_itself_is_refused(plan_problems: Problems) -> None:
    text = "sizes: {a: b + 1, b: a + 1}\nparameters:\n  t: {concat: [x, y], sizes: [a, b]}"
    problem = only(plan_problems(text, {"x": (1,), "y": (1,)}, {"t": (2,)}))
    assert problem.what == "size 'a' is defined by itself"


def test_arithmetic_in_a_name_that_has_no_value_is_told(plan_problems: Problems) -> None:
    text = "captures: {layer: 1}\nparameters:\n  a.{layer}: 'b.{1 // layer}'"
    problem = only(plan_problems(text, {"b.0": (2,)}, {"a.0": (2,)}))
    assert problem.where == "m.yaml:4:3"
    assert problem.what.startswith("'1 // layer' has no value here")
    text = "captures: {layer: 1}\nparameters:\n  a.{1 // layer}: b"
    assert only(plan_problems(text, {"b": (2,)}, {})).found == "'a.{1 // layer}'"


# -- all of it --


def test_all_problems_are_told_at_once(llama: Callable[..., Any]) -> None:
    case = llama()
    case.config["hidden_act"] = "gelu"
    del case.sources["model.layers.2.mlp.up_proj.weight"]
    case.sources["model.layers.1.self_attn.k_proj.weight"] = Spec((17, 64), "BF16")
    case.sources["model.layers.3.mlp.up_proj.weight"] = Spec((1,), "F32")
    case.sources["foo"] = Spec((1,), "F32")
    case.targets["bar"] = Spec((1,), "BF16")
    assert sorted(problem.what for problem in case.problems()) == [
        "1 tensor missing from the checkpoint",
        "1 tensor of the checkpoint that no rule uses",
        "1 tensor of the checkpoint that no rule uses",
        "no rule fills 1 parameter of the model",
        "this layer computes SwiGLU",
        "wrong shape: 1 tensor",
    ]


def test_a_plan_of_nothing_is_empty() -> None:
    plan = make_plan(parse_mapping("version: 1\nparameters: {}\n"), config={}, sources={}, targets={})
    assert isinstance(plan, Plan)
    assert (plan.copies, plan.fills, plan.sources, plan.targets) == ((), (), {}, {})
