"""Mappings that are changed on purpose: written rules read back the same, and every kind of mistake is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from tepatch.mapping import parse_mapping, read_mapping
from tepatch.planning import Spec, make_plan
from tepatch.plugins import default_host
from tepatch.testing.cases import Bench, Case, changed, rope_tables, window_of
from tepatch.testing.checkpoints import apart
from tepatch.testing.mutations import mutants
from tepatch.testing.rewriting import text_of

EVERYTHING = """
version: 1
captures: {layer: num_layers, expert: '[0, 1]'}
sizes: {d: 2, q: 2 * d}
requires: [{num_layers > 0: "needs layers: some"}]
ignore: [{'old.{layer}.x': why not}]
parameters:
  embed.weight: same
  head.weight <- old_head.weight: same
  none.weight: {create: 0.5}
  layers.{layer} <- blocks.{layer}:
    when: layer < 9
    qkv.weight: {concat: [q.weight, {of: k.weight, axes: '(rows 2) i -> (2 rows) i'}, v.weight], sizes: [q, d, d]}
    mixed.weight: {interleave: [a.weight, b.weight], block: 1, dim: 1}
    grouped.weight: {interleave: [e.weight, f.weight], over: 2, sizes: [1, 2]}
    flat.weight: {of: {of: o.weight, axes: '(x y) i -> (y x) i'}, transpose: true}
    norm.weight:
      - {when: layer == 1, of: norm.weight, offset: 1, scale: 0.5}
      - same
    experts.weight: {stack: 'experts.{expert}.weight', over: expert}
    part.weight: {of: whole.weight, take: {start: 0, size: d, out_of: 2 * d}}
    rest.weight: {of: whole.weight, take: {start: d, size: d, out_of: 2 * d}}
    one.weight: {of: rows.weight, take: {index: 0, out_of: 1}}
    any.weight: {any_of: [new.weight, old.weight]}
    padded.weight: {of: small.weight, pad: {size: 3, value: 0.25}}
"""


def layer(index: int, name: str) -> str:
    return f"layers.{index}.{name}"


def test_a_mapping_that_is_written_reads_back_as_the_same_rules() -> None:
    rules = parse_mapping(EVERYTHING.replace("x y", "xx yy").replace("y x", "yy xx").replace("d: 2,", "d: 2, xx: 2,"))
    again = parse_mapping(text_of(rules))
    names = [
        *("qkv", "mixed", "grouped", "flat", "norm", "experts", "part", "rest", "one", "any", "padded"),
    ]
    shapes = {
        "qkv": (8, 3), "mixed": (2, 4), "grouped": (6, 3), "flat": (3, 4), "norm": (4,), "experts": (2, 3),
        "part": (2, 3), "rest": (2, 3), "one": (3,), "any": (2,), "padded": (5,),
    }  # fmt: skip
    targets = {"embed.weight": Spec((7, 3), "F32"), "none.weight": Spec((2,), "F32")}
    targets |= {layer(i, f"{name}.weight"): Spec(shapes[name], "F32") for i in range(2) for name in names}
    sources = {"embed.weight": Spec((7, 3), "F32")}
    for index in range(2):
        parts = {
            "q": (4, 3), "k": (2, 3), "v": (2, 3), "a": (2, 2), "b": (2, 2), "e": (2, 3), "f": (4, 3), "o": (4, 3),
            "norm": (4,), "experts.0": (3,), "experts.1": (3,), "whole": (4, 3), "rows": (1, 3), "old": (2,),
            "small": (3,),
        }  # fmt: skip
        sources |= {f"blocks.{index}.{name}.weight": Spec(shape, "F32") for name, shape in parts.items()}
    plans = [
        make_plan(
            each, config={"num_layers": 2}, sources=sources, targets=targets, ties={"head.weight": "embed.weight"}
        )
        for each in (rules, again)
    ]
    assert plans[0].layout_digest == plans[1].layout_digest
    assert [(str(r.condition), r.sentence) for r in again.requires] == [("num_layers > 0", "needs layers: some")]
    assert [(i.source.text, i.reason) for i in again.ignored] == [("old.{layer}.x", "why not")]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
        tie_word_embeddings=False,
        attention_bias=True,
        max_position_embeddings=256,
    )
    return Bench(default_host().patch("llama"), Case("square", config), tmp_path)


def test_every_kind_of_mistake_is_made(bench: Bench) -> None:
    rules = read_mapping(bench.patch.mapping_path())
    names = [mutant.name for mutant in mutants(rules, bench)]
    qkv = "model.layers.{layer}.self_attn.qkv.weight"
    proj = "model.layers.{layer}.self_attn."
    assert {
        f"drop {qkv}",
        f"{qkv} scaled and offset",
        f"{qkv} interleaved",
        f"{qkv} from the next layer, self_attn.q_proj.weight",
        f"{qkv} transposed, {proj}q_proj.weight",
        f"swap {proj}q_proj.weight and {proj}k_proj.weight",
        "swap model.layers.{layer}.mlp.gate_proj.weight and model.layers.{layer}.mlp.up_proj.weight",
        "swap model.layers.{layer}.input_layernorm.weight and model.layers.{layer}.post_attention_layernorm.weight",
        "three times rope_parameters.rope_theta",
        "drop the rest",
        "lm_head.weight scaled and offset",
        "lm_head.weight transposed, lm_head.weight",
        "swap model.embed_tokens.weight and lm_head.weight",
    } <= set(names)
    assert "drop lm_head.weight" not in names  # it would only be one of the rest again
    assert len(names) == len(set(names))
    assert len(names) < 7 * len(rules.rules)


def test_a_rule_is_made_for_no_tensor_that_would_be_taken_for_one_of_the_base(tmp_path: Path) -> None:
    """The vision tower of Llava is at ``model.vision_tower``, and rules below ``model`` are about its text part."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16),
        text_config=LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=False),
        tie_word_embeddings=False,
    )
    bench = Bench(
        default_host().patch("llama"), Case("llava", config, auto_class="AutoModelForImageTextToText"), tmp_path
    )
    assert any("vision_tower" in name for name in bench.plan.targets)
    names = [mutant.name for mutant in mutants(read_mapping(bench.patch.mapping_path()), bench)]
    assert not [name for name in names if "vision_tower" in name]
    assert "lm_head.weight scaled and offset" in names


def test_parts_of_a_parameter_are_never_in_one_file(bench: Bench) -> None:
    place = apart(bench.plan)
    assert place.keys() == bench.plan.sources.keys()
    for index in range(3):
        attention = f"model.layers.{index}.self_attn"
        assert len({place[f"{attention}.{which}_proj.weight"] for which in "qkv"}) == 3
        assert len({place[f"model.layers.{index}.mlp.{which}_proj.weight"] for which in ("gate", "up")}) == 2
    assert set(place.values()) == set(range(max(place.values()) + 1))


def test_windows_and_rope_tables_are_found_where_a_config_keeps_them() -> None:
    from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

    assert window_of(MistralConfig(sliding_window=8)) == 8
    assert window_of(MistralConfig(sliding_window=None)) is None
    assert window_of(Qwen2Config(sliding_window=8)) is None  # use_sliding_window is off
    assert window_of(LlamaConfig()) is None
    assert list(rope_tables(LlamaConfig())) == ["rope_parameters"]
    tables = rope_tables(Gemma3TextConfig())
    assert set(tables) == {"rope_parameters.full_attention", "rope_parameters.sliding_attention"}
    config = Gemma3TextConfig()
    other = changed(config, {"rope_parameters.full_attention.rope_theta": 5.0, "head_dim": 8})
    assert rope_tables(other)["rope_parameters.full_attention"]["rope_theta"] == 5.0
    assert rope_tables(config)["rope_parameters.full_attention"]["rope_theta"] != 5.0
    assert (other.head_dim, config.head_dim != 8) == (8, True)
