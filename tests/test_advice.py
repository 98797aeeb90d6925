"""What an error advises works: arguments are read out of its text, given, and then there is no error."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tepatch
import tepatch.hf.state
from tepatch.errors import PlanError, Problem, TepatchError, UnsupportedError
from tepatch.te import probe

Call = Callable[..., Any]
Given = dict[str, Any]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
}


def arguments_in(text: str) -> list[Given]:
    """The arguments that a text names with a value of Python, each by itself; ``...`` is a value of the reader's."""
    out = []
    for match in re.finditer(r"\b([a-z_]+)=", text):
        rest = text[match.end() :]
        for end in range(len(rest), 0, -1):
            if rest[:end].rstrip().endswith(","):  # of the sentence; Python would make a tuple of it
                continue
            try:
                out.append({match[1]: ast.literal_eval(rest[:end])})
            except (SyntaxError, ValueError):
                continue
            break
    return out


def ways(problem: Problem, given: Given) -> Iterator[Given]:
    """What a problem's advice changes of the arguments that were given, one for each thing that it says; None: gone."""
    yield from arguments_in(problem.fix)
    for name in re.findall(r"leave (?!them)(\w+) out", problem.fix):
        gone = re.findall(r"(?:^|, )(\w+)", problem.where) if name == "it" else [name]
        assert set(gone) <= given.keys(), "the advice is about what was given"
        yield dict.fromkeys(gone)


def taken(call: Call, given: Given, own: Given | None = None, skip: tuple[str, ...] = ()) -> list[Any]:
    """What ``call`` gives with each piece of advice of its error taken; ``own`` are values for ``...``.

    The advice of several problems is taken together. Advice for arguments to ``skip`` can not be taken here.
    """
    with pytest.raises(TepatchError) as error:
        call(**given)
    each = [[way for way in ways(problem, given) if not way.keys() & set(skip)] for problem in error.value.problems]
    results = []
    for chosen in itertools.product(*each):
        arguments = dict(given)
        for way in chosen:
            arguments |= {name: (own or {})[name] if value is ... else value for name, value in way.items()}
        results.append(call(**{name: value for name, value in arguments.items() if value is not None}))
    assert results, f"nothing to take in: {error.value}"
    return results


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def add(folder: Path, more: dict[str, torch.Tensor]) -> None:
    save_file({**load_file(folder / "model.safetensors"), **more}, folder / "model.safetensors")


def edit(folder: Path, **fields: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps({name: v for name, v in config.items() if v is not None}))


def loading(folder: Path) -> Call:
    return lambda **arguments: tepatch.load("auto", folder, **arguments)


# -- drop and fresh --

UNKNOWN = {
    "one": ["value_head.weight"],
    "few beside weights that are needed": [f"model.layers.{n}.self_attn.q_proj.bias" for n in range(3)],
    "many beside weights that are needed": [
        f"model.layers.{n}.{path}_proj.bias"
        for n in range(3)
        for path in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ],
    "of some layers only": [f"model.layers.{n}.{leaf}" for n in (0, 2) for leaf in ("a.w", "b", "c.w", "d", "e.f.g")],
    "a whole model": [f"vision.blocks.{n}.{part}.{leaf}" for n in range(12) for part in "abc" for leaf in ("w", "b")],
    "experts in layers": [
        f"model.layers.{n}.mlp.experts.{e}.{part}.weight" for n in range(3) for e in range(11) for part in ("w1", "w2")
    ],
    "names of all sorts": [
        "a-b/c",
        "x.00.w",
        "x.01.w",
        "model.extra",
        "o'ne",
        "q{0..1}",
        *(f"p.{n}" for n in range(7)),
    ],
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_drop_of_tensors_that_have_no_place(kind: str, folder: Path, tmp_path: Path) -> None:
    expected = tepatch.load("auto", folder).state_dict()
    add(folder, {name: torch.zeros(2) for name in UNKNOWN[kind]})
    for model in taken(loading(folder), {}):
        assert {n for n, e in model.tepatch.plan.sources.items() if e.state == "ignored"} == set(UNKNOWN[kind])
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    taken(lambda **given: tepatch.plan("auto", folder, **given), {})
    taken(lambda **given: tepatch.convert("auto", folder, tmp_path / "te", **given), {})
    taken(lambda **given: tepatch.certify("auto", folder, tmp_path / "te", write=False, **given), {})


@pytest.mark.parametrize(
    "auto_class",
    ["AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"],
)
def test_fresh_and_drop_for_another_head(auto_class: str, folder: Path) -> None:
    (model,) = taken(loading(folder), {"auto_class": auto_class})
    assert any("not read but drawn" in note for note in model.tepatch.plan.notes)


def test_fresh_for_many_tensors(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**TEXT, max_position_embeddings=64), add_pooling_layer=False).save_pretrained(tmp_path)
    (model,) = taken(loading(tmp_path), {"auto_class": "BertForMaskedLM"})
    assert type(model).__name__ == "BertForMaskedLM"


def test_fresh_for_a_head_of_a_checkpoint_that_is_spelt_otherwise(folder: Path) -> None:
    tensors = {f"language_model.{n}": t for n, t in load_file(folder / "model.safetensors").items() if "head" not in n}
    save_file(tensors, folder / "model.safetensors")
    (model,) = taken(loading(folder), {})
    assert any("not read but drawn" in note and "lm_head.weight" in note for note in model.tepatch.plan.notes)


def test_drop_of_what_is_to_be_drawn(folder: Path) -> None:
    (model,) = taken(loading(folder), {"fresh": ["lm_head"]})
    assert not torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])


def test_the_name_that_was_meant(folder: Path) -> None:
    for argument, name in (("drop", "model.layers.0.self_attn.q_pro.weight"), ("fresh", "lm_haed.weight")):
        with pytest.raises(PlanError) as error:
            tepatch.load("auto", folder, **{argument: [name]})
        meant = re.findall(r"did you mean '(.+)'\?", str(error.value))
        with pytest.raises(PlanError) as second:
            tepatch.load("auto", folder, **{argument: meant})
        assert "no tensor of" not in str(second.value)


# -- other arguments of load --

no_gpu = pytest.mark.skipif(probe().usable, reason="Transformer Engine can be used here")
ARGUMENTS: dict[str, Given] = {
    "max_memory": {"max_memory": {"cpu": 10**9}},
    "offload_folder": {"offload_folder": "offloaded"},
    "keep_initial": {"keep_initial": True},
    "cuda": {"device": "cuda:99"},
}


@no_gpu
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_that_do_not_go_together(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    skip = ("weights",) if kind == "keep_initial" else ()  # quantized weights need a GPU
    assert taken(loading(folder), ARGUMENTS[kind], skip=skip)


@no_gpu
@pytest.mark.parametrize("given", [{"backend": "te"}, {"precision": "fp8"}], ids=str)
def test_the_reference_where_there_is_no_gpu(given: Given, folder: Path) -> None:
    call = loading(folder)
    with pytest.raises(TepatchError) as error:
        call(**given)
    here = [way for way in arguments_in(error.value.problems[0].fix) if way != {"backend": "te"}]
    assert here
    for way in here:
        call(**{**given, **way})


def test_a_config_that_is_passed(folder: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    (folder / "config.json").unlink()
    assert taken(loading(folder), {}, own={"config": config})


def test_a_dtype_that_holds_the_values(folder: Path) -> None:
    add(folder, {"lm_head.weight": torch.full((128, 64), 1e38)})
    with pytest.raises(TepatchError) as error:
        tepatch.load("auto", folder, dtype="float16")
    advised = re.findall(r"bfloat16|float32", error.value.problems[0].fix)
    assert advised == ["bfloat16", "float32"]
    for dtype in advised:
        tepatch.load("auto", folder, dtype=dtype)


def test_a_variant_and_another_kind(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    (one,) = taken(loading(folder), {})
    with pytest.raises(TepatchError, match="leave that option away"):
        tepatch.load("auto", folder, variant="fp16", use_safetensors=False)
    assert torch.equal(one.lm_head.weight, tensors["lm_head.weight"])


def test_no_proof(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tepatch.proof

    monkeypatch.setenv("TEPATCH_PROVE", "1")
    monkeypatch.setattr(tepatch.proof, "try_patch", None)  # what proves is not to be called
    tepatch.load("auto", folder, prove=False)
    monkeypatch.setenv("TEPATCH_PROVE", "0")
    tepatch.load("auto", folder)


# -- fields of the config --


def test_both_of_a_tie(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)
    with pytest.raises(TepatchError, match="differs from") as error:
        tepatch.load("auto", folder)
    (change,) = arguments_in(error.value.problems[0].fix)
    edit(folder, **change)
    tepatch.load("auto", folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "compressed-tensors"])
def test_a_quantization_config_that_was_left_behind(method: str, dtype: str, folder: Path) -> None:
    save_file(
        {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
    )
    edit(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(PlanError, match=r"take quantization_config out of config\.json") as error:
        tepatch.load("auto", folder)
    assert "those stored are not" in str(error.value)
    assert "transformers" not in str(error.value)
    edit(folder, quantization_config=None)
    tepatch.load("auto", folder)


def test_a_quantized_checkpoint_has_to_be_dequantized(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    add(folder, {"lm_head.weight": torch.zeros(64, 1, dtype=torch.uint8)})
    with pytest.raises(PlanError, match="dequantize it with what has quantized it") as error:
        tepatch.load("auto", folder)
    assert "take quantization_config out" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "loads"),
    [
        ({"hidden_act": "gelu"}, True),
        ({"is_causal": False}, True),
        ({"rope_parameters": {"rope_type": "bogus", "rope_theta": 1e4}}, False),
        ({"hidden_act": "bogus"}, False),
    ],
    ids=str,
)
def test_transformers_is_advised_where_it_makes_the_model(fields: dict[str, Any], loads: bool, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**TEXT, **fields})
    with pytest.raises(PlanError) as error:
        tepatch.load("auto", folder, config=config)
    assert ("load it with transformers" in str(error.value)) == loads
    assert ("transformers can not make a model of this config either" in str(error.value)) != loads
    if loads:
        LlamaForCausalLM(config)
    else:
        with pytest.raises(Exception, match=r"bogus"):
            LlamaForCausalLM(config)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_attention_weights_that_a_file_asks_for(file: str, folder: Path) -> None:
    from transformers import LlamaForCausalLM

    usual = (folder / file).read_text()
    (folder / file).write_text(json.dumps({**json.loads(usual), "output_attentions": True}))
    calls = [tepatch.load, tepatch.plan] if file == "config.json" else [tepatch.load]
    for call in calls:
        with pytest.raises(UnsupportedError, match="output_attentions: true asks every call") as error:
            call("auto", folder)
        assert error.value.problems[0].where == file
        assert "take output_attentions out of it" in str(error.value)
    tepatch.convert("auto", folder, folder.parent / "te")  # which calls nothing
    stock = LlamaForCausalLM.from_pretrained(folder, **arguments_in(error.value.problems[0].fix)[0])
    assert stock(torch.tensor([[1, 2, 3]]), output_attentions=True).attentions[0].shape == (1, 4, 3, 3)
    (folder / file).write_text(usual)
    model = tepatch.load("auto", folder)
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)


def test_a_config_that_asks_for_attention_weights(folder: Path) -> None:
    from transformers import LlamaConfig

    with pytest.raises(UnsupportedError, match="pass a config without it"):
        tepatch.build("auto", LlamaConfig(**TEXT, output_attentions=True))
    tepatch.build("auto", LlamaConfig(**TEXT))


# -- files --


def test_a_folder_that_is_there(folder: Path, tmp_path: Path) -> None:
    model, there = tepatch.load("auto", folder), tmp_path / "there"
    tepatch.save(model, there)
    calls: list[Call] = [
        lambda **given: tepatch.convert("auto", folder, there, **given),
        lambda **given: tepatch.save(model, there, **given),
    ]
    for call in calls:
        (there / "old.txt").write_text("")
        assert taken(call, {})
        assert not (there / "old.txt").exists()


def test_a_folder_that_holds_a_converted_checkpoint(folder: Path, tmp_path: Path) -> None:
    tepatch.convert("auto", folder, tmp_path / "te")
    model = tepatch.load("auto", folder)
    with pytest.raises(TepatchError) as error:
        model.save_pretrained(tmp_path / "te")
    (code,) = re.findall(r"tepatch\.save\(.*\)", error.value.problems[0].fix)
    eval(code, {"tepatch": tepatch, "model": model, "folder": tmp_path / "te"})
    tepatch.load("auto", tmp_path / "te")


def test_a_rounding_that_was_meant(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tepatch.convert("auto", folder, tmp_path / "te")
    tepatch.convert("auto", tmp_path / "te", tmp_path / "back")
    rounded = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    save_file(rounded, tmp_path / "back" / "model.safetensors")
    problems = tepatch.certify("auto", folder, tmp_path / "back", write=False).problems
    (dtype,) = {match[1] for each in problems if (match := re.search(r"dtype=(\w+)", each.fix))}
    assert tepatch.certify("auto", folder, tmp_path / "back", write=False, dtype=dtype).passed


def test_parameters_under_their_own_names(folder: Path, tmp_path: Path) -> None:
    model = tepatch.load("auto", folder)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(TepatchError) as error:
        tepatch.save(model, tmp_path / "saved")
    (code,) = re.findall(r"with (tepatch\.hf\.state\.patched_names\(\)): (.*)$", error.value.problems[0].fix)
    exec(f"with {code[0]}: {code[1]}", {"tepatch": tepatch, "torch": torch, "model": model, "path": tmp_path / "p"})
    assert torch.load(tmp_path / "p").keys() >= {"extra.weight"}
