"""``tepatch.save``: what comes back is the checkpoint that was loaded, or an error and no trace of it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tepatch
from tepatch.errors import PlanError, SaveError

Make = Callable[..., Any]
Save = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj.weight"


def load(folder: Path, **arguments: Any) -> Any:
    return tepatch.load("llama", folder, backend="reference", **arguments)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the weight files of a folder hold, whatever their kind."""
    out: dict[str, torch.Tensor] = {}
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        part = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        assert not part.keys() & out.keys()
        out |= part
    return out


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_plain(folder: Path, stock: Any) -> None:
    """Plain transformers loads the folder without a remark, into what ``stock`` is."""
    loaded, told = type(stock).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(told.values()), told
    assert_equal(loaded.state_dict(), stock.state_dict())


def assert_trip(folder: Path, stock: Any, **arguments: Any) -> Any:
    """Load ``folder``, save it, and find all of it again. Returns what ``save`` did."""
    made = tepatch.save(load(folder), folder.parent / "saved", **arguments)
    assert_equal(tensors_in(folder.parent / "saved"), tensors_in(folder))
    assert_plain(folder.parent / "saved", stock)
    return made


SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one key head": {"num_key_value_heads": 1},
    "as many key heads": {"num_key_value_heads": 4},
    "attention biases": {"attention_bias": True},
    "mlp biases": {"mlp_bias": True},
    "all biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "narrow heads": {"head_dim": 8},
    "tied": {"tie_word_embeddings": True},
    "tied, one key head, biases": {"tie_word_embeddings": True, "num_key_value_heads": 1, "attention_bias": True},
}


# -- what comes back --


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_of_any_shape_comes_back(shape: str, tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(**SHAPES[shape])
    assert_trip(save_checkpoint(stock, shards=7), stock)  # q, k and v, gate and up, each in files of their own


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_of_any_kind_and_dtype_comes_back(
    kind: str, shards: int, dtype: torch.dtype, tiny_llama: Make, save_checkpoint: Save
) -> None:
    stock = tiny_llama(dtype=dtype)
    folder = save_checkpoint(stock, kind=kind, shards=shards)
    made = assert_trip(folder, stock)
    assert not made.plan.inexact()
    assert made.files == {path.name: path.stat().st_size for path in (folder.parent / "saved").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} == made.files.keys()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_copy_of_a_tied_tensor_comes_back_too(shards: int, tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(tie_word_embeddings=True)
    head = stock.lm_head.weight.detach().clone()
    folder = save_checkpoint(stock, shards=shards, extra={"lm_head.weight": head})
    assert_trip(folder, stock)
    assert "lm_head.weight" in tensors_in(folder.parent / "saved")


def test_what_the_mapping_ignores_does_not_come_back(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    stock = tiny_llama()
    ignored = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(3)}
    tepatch.save(load(save_checkpoint(stock, extra=ignored)), tmp_path / "saved")
    assert_equal(tensors_in(tmp_path / "saved"), stock.state_dict())


MAPPINGS = {
    "interleaved, transposed, dealt out": """
    self_attn.qkv.weight:
      interleave: [self_attn.q_proj.weight, self_attn.k_proj.weight, self_attn.v_proj.weight]
      over: num_key_value_heads
      sizes: [num_attention_heads // num_key_value_heads * d, d, d]
    self_attn.proj.weight: {of: self_attn.o_proj.weight, transpose: true}
    mlp.fc1_weight: {interleave: [mlp.gate_proj.weight, mlp.up_proj.weight], block: 1}
""",
    "one of two spellings": """
    mlp.fc1_weight:
      any_of: [mlp.gate_up.weight, {concat: [mlp.gate_proj.weight, mlp.up_proj.weight]}]
""",
}


@pytest.mark.parametrize("rules", MAPPINGS)
def test_a_mapping_of_ones_own_is_the_way_back_too(
    rules: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama()
    mapping = tmp_path / "mine.yaml"
    mapping.write_text(
        "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\nparameters:\n  model.layers.{layer}:" + MAPPINGS[rules]
    )
    folder = save_checkpoint(stock, shards=2)
    if "spellings" in rules:  # of one layer; a save has to give each layer the form that it had
        mlp = stock.model.layers[1].mlp
        fused = {"model.layers.1.mlp.gate_up.weight": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()}
        folder = save_checkpoint(stock, name="fused", drop=(UP, UP.replace("up", "gate")), extra=fused)
    tepatch.save(load(folder, mapping=mapping), tmp_path / "saved")
    assert_equal(tensors_in(tmp_path / "saved"), tensors_in(folder))


def test_small_shards_have_an_index(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    stock = tiny_llama()
    made = assert_trip(save_checkpoint(stock), stock, max_shard_size="100KB")
    shards = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert all(made.files[name] < 102_000 for name in shards)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stock.state_dict().keys()
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stock.state_dict().values())
    assert not (tmp_path / "saved" / "model.safetensors").exists()


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, "float16"])
def test_another_dtype_is_written_when_it_is_asked_for(
    before: torch.dtype, after: Any, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama(dtype=before)
    model = load(save_checkpoint(stock))
    tepatch.save(model, tmp_path / "saved", dtype=after)
    dtype = getattr(torch, after) if isinstance(after, str) else after
    expected = {name: tensor.to(dtype) for name, tensor in stock.state_dict().items()}
    assert_equal(tensors_in(tmp_path / "saved"), expected)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert model.config.dtype == before, "the model's own settings are left alone"


def test_without_a_dtype_parameters_are_written_in_their_own(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    """Also where the checkpoint was in another: what has been trained in float32 is not rounded unasked."""
    stock = tiny_llama(dtype=torch.bfloat16)
    model = load(save_checkpoint(stock), dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.add_(2**-12)
    tepatch.save(model, tmp_path / "saved")
    expected = {name: tensor.float() for name, tensor in stock.state_dict().items()}
    expected["model.norm.weight"] += 2**-12
    assert_equal(tensors_in(tmp_path / "saved"), expected)


def test_a_value_that_float16_can_not_hold_is_an_error(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    model = load(save_checkpoint(tiny_llama()))
    with torch.no_grad():
        model.model.layers[1].mlp.fc1_weight[100, 3] = 1e6  # rows from 96 on are up's
    with pytest.raises(SaveError, match=r"layers\.1\.mlp\.fc1_weight: values that float16 can not hold"):
        tepatch.save(model, tmp_path / "saved", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


def test_an_infinity_that_was_there_hides_no_value_that_becomes_one(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    model = load(save_checkpoint(tiny_llama()))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    tepatch.save(model, tmp_path / "saved", dtype="float16")  # an infinity is one in float16 too
    with torch.no_grad():
        model.model.norm.weight[1] = 70_000
    with pytest.raises(SaveError, match=r"model\.norm\.weight: values that float16 can not hold(.*\n)*.*70000"):
        tepatch.save(model, tmp_path / "again", dtype="float16")


def test_values_are_undone_on_the_way_and_not_in_the_model(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    """In float64, in which the arithmetic is done, and so could be done in place."""
    mapping = tmp_path / "offset.yaml"
    mapping.write_text(
        "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\n"
        "parameters: {model.norm.weight: {same: true, offset: 1, scale: 2}}\n"
    )
    stock = tiny_llama(dtype=torch.float64)
    folder = save_checkpoint(stock)
    model = load(folder, mapping=mapping)
    assert torch.equal(model.model.norm.weight, stock.model.norm.weight * 2 + 1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name in ("one", "two"):
        tepatch.save(model, tmp_path / name)
        assert_equal(dict(model.named_parameters()), before)
        found = tensors_in(tmp_path / name)["model.norm.weight"]
        assert torch.allclose(found, stock.model.norm.weight, rtol=2**-50, atol=0)


def test_config_and_generation_settings_are_written_as_they_are_now(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama(bos_token_id=5, eos_token_id=7)
    folder = save_checkpoint(stock)
    model = load(folder)
    model.generation_config.max_new_tokens = 17
    tepatch.save(model, tmp_path / "saved")
    configs = [json.loads((each / "config.json").read_text()) for each in (tmp_path / "saved", folder)]
    assert configs[0] == configs[1]
    assert configs[0]["architectures"] == ["LlamaForCausalLM"]
    settings = [json.loads((each / "generation_config.json").read_text()) for each in (tmp_path / "saved", folder)]
    assert settings[0] == settings[1] | {"max_new_tokens": 17}


def test_the_tokenizer_comes_along_byte_for_byte_and_nothing_else_does(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama())
    tokenizer = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt", "vocab.json"]
    tokenizer += ["tokenizer.model", "chat_template.jinja", "preprocessor_config.json"]
    others = ["README.md", "LICENSE", "optimizer.pt", "trainer_state.json", "training_args.bin", "modeling.py"]
    for index, name in enumerate((*tokenizer, *others)):
        (folder / name).write_bytes(bytes([index, 0, 255]))
    model = load(folder)
    made = tepatch.save(model, tmp_path / "saved")
    found = set(os.listdir(tmp_path / "saved"))
    assert found == {*tokenizer, "config.json", "generation_config.json", "model.safetensors"}
    for name in tokenizer:
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    assert any("copied from" in note and "tokenizer.json" in note for note in made.notes)
    shutil.rmtree(folder)
    made = tepatch.save(model, tmp_path / "again")
    assert any(f"{folder} is gone" in note for note in made.notes)
    assert set(os.listdir(tmp_path / "again")) == found - set(tokenizer)
    assert f"note: no tokenizer was copied: {folder} is gone" in str(made)


def test_a_fresh_model_is_saved_as_stock(tiny_llama: Make, tmp_path: Path) -> None:
    config = tiny_llama(tie_word_embeddings=True).config
    model = tepatch.build("llama", config, backend="reference", dtype=torch.bfloat16)
    tepatch.save(model, tmp_path / "saved")
    from transformers import LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert_equal(loaded.state_dict(), model.state_dict())


def test_extra_state_is_never_written(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    class WithState(nn.Module):
        def get_extra_state(self) -> torch.Tensor:
            return torch.zeros(3, dtype=torch.uint8)

    stock = tiny_llama()
    model = load(save_checkpoint(stock))
    for layer in model.model.layers:
        layer.mlp.add_module("recipe", WithState())
    assert "mlp.recipe._extra_state" in model.model.layers[0].state_dict()
    tepatch.save(model, tmp_path / "saved")
    assert_equal(tensors_in(tmp_path / "saved"), stock.state_dict())


def test_saving_leaves_the_model_as_it_was(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    stock = tiny_llama()
    model = load(save_checkpoint(stock)).train()
    model.model.norm.weight.requires_grad_(False)

    def state() -> Any:
        tensors = {n: (id(p), p.data_ptr(), p._version, p.dtype, p.requires_grad) for n, p in model.named_parameters()}
        settings = (model.config.to_dict(), model.generation_config.to_dict(), model.training, id(model.tepatch))
        return tensors, settings

    before = state()
    tepatch.save(model, tmp_path / "saved", dtype="bfloat16", max_shard_size="100KB")
    assert state() == before
    assert_equal(model.state_dict(), stock.state_dict())


def test_two_saves_write_the_same_bytes(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    model = load(save_checkpoint(tiny_llama(dtype=torch.bfloat16), shards=3))
    for name in ("one", "two"):
        tepatch.save(model, tmp_path / name, max_shard_size="50KB")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert first == second


# -- a model that has changed --


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [150, 100])
def test_a_resized_vocabulary_is_saved(
    tied: bool, size: int, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama(tie_word_embeddings=tied)
    model = load(save_checkpoint(stock))
    for each in (model, stock):
        torch.manual_seed(3)
        each.resize_token_embeddings(size)
    tepatch.save(model, tmp_path / "saved")
    assert_plain(tmp_path / "saved", stock)
    assert tensors_in(tmp_path / "saved")["model.embed_tokens.weight"].shape == (size, 64)
    assert_equal(load(tmp_path / "saved").state_dict(), stock.state_dict())


@pytest.mark.parametrize("layer", [0, 2])
def test_a_pruned_model_is_saved_when_its_config_says_so(
    layer: int, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama(attention_bias=True)
    model = load(save_checkpoint(stock, shards=2))
    for each in (model, stock):
        del each.model.layers[layer]
        each.config.num_hidden_layers = 2
    tepatch.save(model, tmp_path / "saved")
    assert_plain(tmp_path / "saved", stock)


def test_a_narrower_mlp_is_saved_when_the_config_says_so(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama()
    model = load(save_checkpoint(stock))
    for layer, theirs in zip(model.model.layers, stock.model.layers, strict=True):
        gate, up = layer.mlp.fc1_weight.detach().split(96)
        layer.mlp.fc1_weight = nn.Parameter(torch.cat([gate[:80], up[:80]]))
        layer.mlp.fc2_weight = nn.Parameter(layer.mlp.fc2_weight[:, :80].detach())  # has strides
        for part in (theirs.mlp.gate_proj, theirs.mlp.up_proj):
            part.weight = nn.Parameter(part.weight[:80].detach())
        theirs.mlp.down_proj.weight = nn.Parameter(theirs.mlp.down_proj.weight[:, :80].detach())
    with pytest.raises(PlanError, match=r"mlp\.gate_proj\.weight: has another shape.*\n.*\[96, 64\]\n.*\[80, 64\]"):
        tepatch.save(model, tmp_path / "saved")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]
    model.config.intermediate_size = 80
    tepatch.save(model, tmp_path / "saved")
    assert_plain(tmp_path / "saved", stock)


def remove_layer(model: Any) -> None:
    del model.model.layers[2]


def promise_a_layer(model: Any) -> None:
    model.config.num_hidden_layers = 4


def replace_mlp(model: Any) -> None:
    model.model.layers[1].mlp = nn.Identity()


def add_parameters(model: Any) -> None:
    model.value_head = nn.Linear(64, 1)


def widen_embedding(model: Any) -> None:
    model.model.embed_tokens.weight = nn.Parameter(torch.zeros(130, 64))


def tie_unasked(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def untie(model: Any) -> None:
    model.config.tie_word_embeddings = True


CHANGES: dict[Callable[[Any], None], str] = {
    remove_layer: r"model\.layers\.2\.self_attn\.proj\.weight",
    promise_a_layer: r"model\.layers\.3\.self_attn\.proj\.weight",
    replace_mlp: r"model\.layers\.1\.mlp\.fc1_weight",
    add_parameters: r"value_head\.weight",
    widen_embedding: r"model\.embed_tokens\.weight: has another shape(.*\n)*.*\[128, 64\]\n.*\[130, 64\]",
    tie_unasked: r"lm_head\.weight",
    untie: r"lm_head\.weight",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_that_the_config_does_not_know_is_named(
    change: Callable[[Any], None], tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    model = load(save_checkpoint(tiny_llama()))
    change(model)
    with pytest.raises(PlanError, match=CHANGES[change]) as caught:
        tepatch.save(model, tmp_path / "saved")
    assert str(caught.value).startswith("the model has changed since it was loaded")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


@pytest.fixture
def padded(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> tuple[Path, Any]:
    """A checkpoint, and a model of it with constants: 8 more rows of the vocabulary, and biases."""
    stock = tiny_llama()
    folder = save_checkpoint(stock)
    config = copy.deepcopy(stock.config)
    config.vocab_size, config.mlp_bias = 136, True
    mapping = tmp_path / "padded.yaml"
    mapping.write_text(
        "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\nparameters:\n"
        "  model.embed_tokens.weight: {of: model.embed_tokens.weight, pad: {size: vocab_size - 8}}\n"
        "  lm_head.weight: {of: lm_head.weight, pad: {size: vocab_size - 8, value: 3}}\n"
        "  model.layers.{layer}:\n    mlp.fc1_bias: {create: 0}\n    mlp.fc2_bias: {create: 0}\n"
    )
    return folder, load(folder, mapping=mapping, config=config)


def test_constants_are_left_out_and_a_changed_one_is_named(padded: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = padded
    tepatch.save(model, tmp_path / "saved")
    assert_equal(tensors_in(tmp_path / "saved"), tensors_in(folder))
    with torch.no_grad():
        model.lm_head.weight[127] += 1  # the last row that the checkpoint has
        model.model.layers[1].mlp.fc2_bias[5] = 0.5
        model.lm_head.weight[135, 63] = 2
    with pytest.raises(SaveError) as caught:
        tepatch.save(model, tmp_path / "again")
    (problem,) = caught.value.problems
    assert len(problem.details) == 2
    assert "model.layers.1.mlp.fc2_bias: 0.0 expected, values from 0.0 to 0.5" in problem.details
    assert "lm_head.weight: 3.0 expected, values from 2.0 to 3.0" in problem.details
    assert not [name for name in os.listdir(tmp_path) if "again" in name]


# -- what is no patched model --


class Wrapper(nn.Module):
    """Holds a model as DistributedDataParallel does."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


def adapters(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=2))


WRAPPERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a wrapper": (Wrapper, "module"),
    "torch.compile": (torch.compile, "_orig_mod"),
    "a wrapper of a compiled model": (lambda model: Wrapper(torch.compile(model)), "module._orig_mod"),
    "adapters": (adapters, "base_model.model"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # of torch.compile
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_is_refused_and_its_inside_named(
    kind: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama()
    wrap, inside = WRAPPERS[kind]
    wrapped = wrap(load(save_checkpoint(stock)))
    with pytest.raises(PlanError, match=rf"inside this wrapper \(\.{inside}\)"):
        tepatch.save(wrapped, tmp_path / "saved")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]
    if kind == "adapters":
        with pytest.raises(PlanError, match=r"lm_head\.(base_layer|lora_A)"):
            tepatch.save(wrapped.base_model.model, tmp_path / "saved")
        tepatch.save(wrapped.merge_and_unload(), tmp_path / "saved")
    else:
        tepatch.save(eval(f"wrapped.{inside}"), tmp_path / "saved")
    assert_plain(tmp_path / "saved", stock)


def test_what_tepatch_did_not_make_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    stock = tiny_llama()
    for other in (stock, stock.model, nn.Linear(1, 1), {}, None):
        with pytest.raises(PlanError, match="only a model that tepatch has loaded or built") as caught:
            tepatch.save(other, tmp_path / "saved")
        assert "wrapper" not in str(caught.value)
    assert not os.listdir(tmp_path)


def test_the_model_inside_the_patched_one_is_refused(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="LlamaModel: only a model that tepatch has loaded or built"):
        tepatch.save(load(save_checkpoint(tiny_llama())).model, tmp_path / "saved")


def test_parameters_without_values_are_named(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    model = load(save_checkpoint(tiny_llama()))
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(SaveError, match=r"on the meta device \(3\)(.*\n)*  model\.layers\.1\.mlp\.fc1_weight"):
        tepatch.save(model, tmp_path / "saved")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


def contradict_generation_settings(model: Any) -> None:
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.3


def put_an_object_into_the_config(model: Any) -> None:
    model.config.trainer = object()


@pytest.mark.parametrize("spoil", [contradict_generation_settings, put_an_object_into_the_config])
def test_settings_that_transformers_can_not_save_are_an_error(
    spoil: Callable[[Any], None], tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    model = load(save_checkpoint(tiny_llama()))
    spoil(model)
    with pytest.raises(SaveError, match=r"transformers can not save these settings\n  \w+Error: "):
        tepatch.save(model, tmp_path / "saved")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a dtype of whole numbers": ({"dtype": "int8"}, "bfloat16"),
    "no dtype": ({"dtype": 16}, "bfloat16"),
    "no size": ({"max_shard_size": "five"}, "max_shard_size"),
    "a size of zero": ({"max_shard_size": 0}, "max_shard_size"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_arguments_that_make_no_sense_are_refused(
    kind: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    arguments, message = WRONG[kind]
    with pytest.raises(PlanError, match=message):
        tepatch.save(load(save_checkpoint(tiny_llama())), tmp_path / "saved", **arguments)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


# -- the destination --


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["the source", "in the source", "a link to the source", "around it", "a file"])
def test_no_place_that_holds_something_else_is_written_to(
    place: str, overwrite: bool, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama(), name="outer/checkpoint")
    model = load(folder)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").write_text("mine")
    places = {
        "the source": folder,
        "in the source": folder / "saved",
        "a link to the source": tmp_path / "link",
        "around it": folder.parent,
        "a file": tmp_path / "file",
    }
    before = bytes_in(tmp_path)
    with pytest.raises(SaveError, match="choose another destination"):
        tepatch.save(model, places[place], overwrite=overwrite)
    assert bytes_in(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "outer"]


def test_overwrite_replaces_the_folder_as_a_whole(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    stock = tiny_llama()
    model = load(save_checkpoint(stock))
    tepatch.save(model, tmp_path / "saved", max_shard_size="100KB")
    before = bytes_in(tmp_path)
    with pytest.raises(SaveError, match=r"exists(.*\n)*.*overwrite=True"):
        tepatch.save(model, tmp_path / "saved")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(SaveError, match="meta device"):  # what stood there stays until the end
        tepatch.save(model, tmp_path / "saved", overwrite=True)
    assert bytes_in(tmp_path) == before
    tepatch.save(load(tmp_path / "checkpoint"), tmp_path / "saved", overwrite=True)
    assert set(os.listdir(tmp_path / "saved")) == {"config.json", "generation_config.json", "model.safetensors"}
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "saved"]
    assert_plain(tmp_path / "saved", stock)


def test_a_model_may_be_saved_over_the_checkpoint_of_another(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    ours, others = tiny_llama(seed=1), tiny_llama(seed=2)
    other = save_checkpoint(others, name="other", shards=3)
    tepatch.save(load(save_checkpoint(ours)), other, overwrite=True)
    assert_plain(other, ours)


# -- memory --

MEMORY = """
import pathlib, sys, threading, torch, tepatch
from transformers import LlamaConfig

def private():
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return max(int(fields[name].split()[0]) * 1024 for name in ("Private_Dirty", "Anonymous"))

config = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=8,
    vocab_size=8192, tie_word_embeddings=True, dtype=torch.float32,
)
model = tepatch.build("llama", config, backend="reference")
sizes = [parameter.nbytes for parameter in model.parameters()]
tepatch.save(tepatch.build("llama", LlamaConfig(**SMALL), backend="reference"), sys.argv[1] + "-first")  # imports
before, peak, over = private(), [0], threading.Event()

def watch():
    while not over.wait(0.002):
        peak[0] = max(peak[0], private())

watcher = threading.Thread(target=watch)
watcher.start()
tepatch.save(model, sys.argv[1], progress=False)
over.set()
watcher.join()
print(sum(sizes), max(sizes), max(peak[0], private()) - before)
""".replace(
    "**SMALL", "hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64"
)


def test_saving_takes_the_memory_of_a_tensor_and_not_of_the_model(tmp_path: Path) -> None:
    """Private memory, in a process of its own: at most three times the largest tensor and 60 MB."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    total, largest, grown = map(int, done.stdout.split())
    print(f"{total / 1e6:.0f} MB, largest {largest / 1e6:.0f} MB: {grown / 1e6:+.0f} MB")
    assert total > 280_000_000 > 3 * largest + 60_000_000, "a second copy of the model would show"
    assert grown < 3 * largest + 60_000_000
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size > total
