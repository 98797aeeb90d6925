"""Every name of the stock model inside a patched layer is there: it works as in the stock model, or raises by name."""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from rounding import assert_close, forward_terms
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import BertConfig, BertModel, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import tepatch
from tepatch.errors import PlanError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, of any norm

Make = Callable[..., Any]
Save = Callable[..., Path]
LAYER = "model.layers.1"
MATRICES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
WHOLE = ["input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"]


def ids() -> torch.Tensor:
    return torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(ids()).logits
    return out


def terms(model: Any) -> int:
    return forward_terms(model.config, ids().shape[1])


@pytest.fixture
def stock(tiny_llama: Make) -> Any:
    return tiny_llama(num_hidden_layers=2)


@pytest.fixture
def folder(stock: Any, save_checkpoint: Save) -> Path:
    return save_checkpoint(stock)


@pytest.fixture
def ours(folder: Path) -> Any:
    return tepatch.load("llama", folder, backend="reference")


def adapted(model: Any, config: Any) -> Any:
    """With an adapter whose numbers depend on their names alone, and are far from those of the model."""
    out = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            if parameter.requires_grad:
                seed = sum(map(ord, name.rpartition("model.layers")[2]))
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.copy_(noise * 0.3 + (parameter.dim() == 1))
    return out.eval()


ADAPTERS = {
    "norms": peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "norms saved whole": peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["input_layernorm", "post_attention_layernorm", "norm"]
    ),
    "one of the two norms": peft.LNTuningConfig(target_modules=["post_attention_layernorm"]),
    "a norm and all behind it": peft.LoraConfig(target_modules="all-linear", modules_to_save=["input_layernorm"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_norms_is_the_stock_models(kind: str, stock: Any, ours: Any, tmp_path: Path) -> None:
    base = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    plain = logits(stock)
    config = ADAPTERS[kind]
    theirs = adapted(copy.deepcopy(stock), copy.deepcopy(config))
    expected = logits(theirs)
    assert (expected - plain).abs().max() > 0.05 * plain.abs().max()
    made = adapted(ours, copy.deepcopy(config))
    assert_close(logits(made), expected, terms=terms(stock))
    count = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (theirs, made)]
    assert count[0] == count[1] > 0
    theirs.save_pretrained(tmp_path / "adapter")
    made.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    loss = made(ids(), labels=ids()).loss
    loss.backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
    with made.disable_adapter():
        assert_close(logits(made), plain, terms=terms(stock))
    tensors = made.get_base_model().state_dict()
    for name, tensor in base.items():
        now = [tensors[each] for each in tensors if _is_base(each, name)]
        assert any(torch.equal(tensor, each) for each in now), name


def _is_base(key: str, name: str) -> bool:
    """Whether ``key`` is what a wrapper calls the tensor ``name`` of the model inside it."""
    return re.sub(r"\.(base_layer|original_module)", "", key) == name


def test_an_adapter_of_norms_is_loaded_from_the_stock_models(stock: Any, ours: Any, tmp_path: Path) -> None:
    theirs = adapted(stock, peft.LNTuningConfig(task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(ours, tmp_path / "adapter")
    assert_close(logits(loaded), logits(theirs), terms=terms(stock))


def test_a_merged_norm_computes_and_is_not_saved_half(stock: Any, ours: Any, tmp_path: Path) -> None:
    made = adapted(ours, peft.LNTuningConfig(task_type="CAUSAL_LM"))
    expected = logits(made)
    merged = made.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    for save in (merged.state_dict, lambda: tepatch.save(merged, tmp_path / "saved")):
        with pytest.raises(PlanError, match=r"input_layernorm\.weight"):
            save()


@pytest.fixture
def permuted(stock: Any, folder: Path, tmp_path: Path) -> Any:
    """Of a checkpoint whose queries and keys have the other order of rows for rotary positions."""
    config = stock.config
    changed = tmp_path / "permuted"
    shutil.copytree(folder, changed)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensors[name] = tensors[name][order(heads, tensors[name].shape[0])].contiguous()
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "permuted.yaml").write_text(
        "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\n"
        "sizes: {h: num_attention_heads, g: num_key_value_heads}\n"
        "parameters:\n  model.layers.{layer}:\n    self_attn.qkv.weight:\n      sizes: [q, kv, kv]\n      concat:\n"
        "        - {of: self_attn.q_proj.weight, axes: (h r 2) i -> (h 2 r) i}\n"
        "        - {of: self_attn.k_proj.weight, axes: (g r 2) i -> (g 2 r) i}\n"
        "        - self_attn.v_proj.weight\n"
    )
    model = tepatch.load("llama", changed, backend="reference", mapping=tmp_path / "permuted.yaml")
    assert_close(logits(model), logits(stock), terms=terms(stock))
    model.original = tensors
    return model


def order(heads: int, rows: int) -> torch.Tensor:
    """Which row of transformers' order each row of neighbouring pairs is."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()


def test_lora_on_rows_in_another_order_is_the_stock_models(permuted: Any, stock: Any) -> None:
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])
    ours, theirs = adapted(permuted, copy.deepcopy(options)), adapted(stock, copy.deepcopy(options))
    count = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert count[0] == count[1] > 0
    config = stock.config
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
                name.split(".")[-4]
            )
            if heads and "lora_B" in name:
                parameter.copy_(dict(ours.named_parameters())[name][order(heads, parameter.shape[0]).argsort()])
    expected = logits(theirs)
    with theirs.disable_adapter():
        assert (expected - logits(theirs)).abs().max() > 0.1
    assert_close(logits(ours), expected, terms=terms(stock))
    losses = [model(ids(), labels=ids()).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    assert_close(*losses, terms=terms(stock))
    merged, merged_stock = ours.merge_and_unload(), theirs.merge_and_unload()
    assert_close(logits(merged), logits(merged_stock), terms=terms(stock))
    q = merged_stock.model.layers[1].self_attn.q_proj.weight
    saved = merged.state_dict()["model.layers.1.self_attn.q_proj.weight"]
    assert_close(saved, q[order(config.num_attention_heads, q.shape[0])], terms=4 + 1)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "data is set": lambda q: setattr(q.weight, "data", q.weight.detach().clone() * 2),
    "data is changed in place": lambda q: q.weight.data.mul_(2),
    "in place": lambda q: torch.no_grad()(lambda: q.weight.mul_(2))(),
    "copied": lambda q: torch.no_grad()(lambda: q.weight.copy_(q.weight.detach().clone() * 2))(),
    "augmented": lambda q: q.weight.data.__imul__(2),
    "by items": lambda q: q.weight.data.__setitem__(slice(None), q.weight.detach().clone() * 2),
    "out": lambda q: torch.no_grad()(lambda: torch.mul(q.weight.detach().clone(), 2, out=q.weight.data))(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_rows_in_another_order_is_in_the_model(change: str, permuted: Any) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    module = permuted.get_submodule(name.removesuffix(".weight"))
    assert torch.equal(module.weight.detach(), permuted.original[name])
    CHANGES[change](module)
    after = permuted.state_dict()
    assert torch.equal(after.pop(name), permuted.original[name] * 2)
    assert all(torch.equal(tensor, permuted.original[each]) for each, tensor in after.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w[0].mul_(2),
        lambda w: w.T.zero_(),
        lambda w: w.detach().add_(1),
        lambda w: w.view(-1).fill_(0),
        lambda w: torch.transpose(input=w, dim0=0, dim1=1).zero_(),
    ],
)
def test_a_part_of_rows_in_another_order_is_not_changed_without_a_word(change: Any, permuted: Any) -> None:
    projection = permuted.model.layers[1].self_attn.q_proj
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn\.q_proj: a part of the weight"):
        change(projection.weight)
    changed = projection.weight.detach().clone() + 1  # the advice
    projection.weight.data = changed
    assert torch.equal(projection.weight.detach(), changed)


def test_parameters_of_a_name_are_frozen_or_refuse(ours: Any, stock: Any) -> None:
    for name in WHOLE:
        module, theirs = ours.get_submodule(f"{LAYER}.{name}"), stock.get_submodule(f"{LAYER}.{name}")
        assert [tuple(p.shape) for p in module.parameters()] == [tuple(p.shape) for p in theirs.parameters()]
        before = sum(p.requires_grad for p in ours.parameters())
        for parameter in module.parameters():
            parameter.requires_grad = False
        assert sum(p.requires_grad for p in ours.parameters()) == before - 1
        module.requires_grad_(True)
        module.weight.requires_grad = False
        assert sum(p.requires_grad for p in ours.parameters()) == before - 1
        torch.optim.SGD(module.parameters(), lr=0.1)
    for name in MATRICES:
        module = ours.get_submodule(f"{LAYER}.{name}")
        for freeze in (
            lambda module=module: [setattr(p, "requires_grad", False) for p in module.parameters()],
            lambda module=module: module.requires_grad_(False),
            lambda module=module: torch.optim.SGD(module.parameters(), lr=0.1),
        ):
            with pytest.raises(UnsupportedError, match=rf"{re.escape(name)}: .*(?s:.)*select_parameters"):
                freeze()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in stock.parameters())


def test_parts_of_a_model_take_and_give_the_stock_names(ours: Any, stock: Any) -> None:
    changed = {name: tensor * 1.5 for name, tensor in stock.state_dict().items()}
    paths = ("model.layers.0", "model.layers.1.mlp", "model.layers.1.self_attn", "model.layers.1.input_layernorm")
    for path in paths:
        part = {name.removeprefix(f"{path}."): t for name, t in changed.items() if name.startswith(f"{path}.")}
        found = ours.get_submodule(path).load_state_dict(part)
        assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert ours.model.layers[1].mlp.gate_proj.load_state_dict({"weight": changed[f"{LAYER}.mlp.gate_proj.weight"]})
    after, expected = ours.state_dict(), stock.state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, changed[name] if name.startswith(paths) else expected[name]), name
    given = ours.model.layers[1].self_attn.k_proj.state_dict()
    assert {name: torch.equal(t, changed[f"{LAYER}.self_attn.k_proj.{name}"]) for name, t in given.items()} == {
        "weight": True
    }


def test_a_part_that_lacks_something_is_an_error_by_the_stock_name(ours: Any, stock: Any) -> None:
    part = {name.removeprefix("model.layers.0."): t for name, t in stock.state_dict().items() if "layers.0." in name}
    del part["self_attn.k_proj.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "self_attn\.k_proj\.weight"\.'):
        ours.model.layers[0].load_state_dict(part)
    part["self_attn.k_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for self_attn\.k_proj\.weight"):
        ours.model.layers[0].load_state_dict(part)


def test_a_parameter_that_is_shown_in_part_stays_missing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "scaled.yaml").write_text(
        "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\n"
        "parameters:\n  model.layers.{layer}:\n    self_attn.qkv.weight:\n      sizes: [q, kv, kv]\n      concat:\n"
        "        [self_attn.q_proj.weight, self_attn.k_proj.weight, {of: self_attn.v_proj.weight, scale: 2}]\n"
    )
    model = tepatch.load("llama", folder, backend="reference", mapping=tmp_path / "scaled.yaml")
    names = ("q_proj", "k_proj", "o_proj")
    part = {f"{name}.weight": getattr(model.model.layers[0].self_attn, name).weight.detach() for name in names}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: .*"qkv\.weight"'):
        model.model.layers[0].self_attn.load_state_dict(part)


def test_functional_call_takes_own_tensors_and_refuses_others(ours: Any) -> None:
    expected = logits(ours)
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(ours, ours.state_dict(), (ids(),)).logits, expected)
        others = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        with pytest.raises(UnsupportedError, match="functional_call") as caught:
            torch.func.functional_call(ours, others, (ids(),))
        assert "dict(model.named_parameters())" in str(caught.value)
        assert torch.equal(logits(ours), expected)
        doubled = {name: parameter * 2 for name, parameter in dict(ours.named_parameters()).items()}  # the advice
        assert not torch.equal(torch.func.functional_call(ours, doubled, (ids(),)).logits, expected)
    tracked = {name: tensor.detach().requires_grad_() for name, tensor in ours.state_dict().items()}
    with pytest.raises(UnsupportedError, match="can not be assigned"):
        torch.func.functional_call(ours, tracked, (ids(),))  # no gradient would ever reach these


@pytest.mark.filterwarnings("ignore:Some weights of the model checkpoint")
def test_accelerate_fills_a_model_or_changes_nothing(ours: Any, stock: Any, folder: Path, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    changed = {name: tensor * 1.5 for name, tensor in stock.state_dict().items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    for fill in (accelerate.load_checkpoint_in_model, accelerate.load_checkpoint_and_dispatch):
        with pytest.raises(UnsupportedError, match="device_map"):
            fill(ours, str(other), device_map={"": "cpu"})
        assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    accelerate.load_checkpoint_in_model(ours, str(other))
    assert all(torch.equal(tensor, changed[name]) for name, tensor in ours.state_dict().items())


def test_distributed_checkpoint_takes_the_stock_names(ours: Any, stock: Any) -> None:
    changed = {name: tensor * 1.5 for name, tensor in stock.state_dict().items()}
    set_model_state_dict(ours, dict(changed), options=StateDictOptions(full_state_dict=True))
    assert all(torch.equal(tensor, changed[name]) for name, tensor in ours.state_dict().items())


def test_quantization_that_would_pass_layers_by_is_refused(ours: Any) -> None:
    expected = logits(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedError, match=r"q_proj: torch\.ao's quantization"):
            torch.ao.quantization.quantize_dynamic(ours, {nn.Linear}, dtype=torch.qint8)
    assert torch.equal(logits(ours), expected)


def test_norms_of_other_families_are_at_the_stock_names(save_checkpoint: Save) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    pytest.importorskip("tepatch_bert")
    pytest.importorskip("tepatch_mixtral")
    mixtral = MixtralConfig(**sizes, vocab_size=128, num_local_experts=4, num_key_value_heads=2)
    bert = BertConfig(**sizes, vocab_size=128)
    for patch, cls, config in (("bert", BertModel, bert), ("mixtral", MixtralForCausalLM, mixtral)):
        theirs = cls(config)
        model = tepatch.load(patch, save_checkpoint(theirs, name=patch), backend="reference")
        weighted = {
            name for name, module in theirs.named_modules() if any(True for _ in module.parameters(recurse=False))
        }
        assert weighted <= set(dict(model.named_modules()))
        for name in weighted:
            own = model.get_submodule(name)
            assert hasattr(own, "weight") == hasattr(theirs.get_submodule(name), "weight")


def test_parameters_are_selected_by_the_stock_names(ours: Any, stock: Any) -> None:
    parameters = dict(ours.named_parameters())
    norms = tepatch.select_parameters(ours, "*norm.weight")
    assert sum(p.numel() for p in norms.values()) == sum(p.numel() for n, p in stock.named_parameters() if "norm" in n)
    chosen = tepatch.select_parameters(ours, "down_proj", "lm_head", "layers.0.self_attn")
    assert list(chosen) == [
        "model.layers.0.self_attn.qkv.weight",
        "model.layers.0.self_attn.proj.weight",
        "model.layers.0.mlp.fc2_weight",
        "model.layers.1.mlp.fc2_weight",
        "lm_head.weight",
    ]
    assert all(parameters[name] is parameter for name, parameter in chosen.items())
    assert list(tepatch.select_parameters(stock, "q_proj")) == [
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
    ]


def test_a_selection_of_a_part_or_of_nothing_is_an_error_with_advice(ours: Any) -> None:
    with pytest.raises(PlanError, match=r"'q_porj': no parameter of the model has this name"):
        tepatch.select_parameters(ours, "q_porj")
    with pytest.raises(PlanError, match=r"(?s)'q_proj'.*layers\.\{0\.\.1\}\.self_attn\.k_proj\.weight") as caught:
        tepatch.select_parameters(ours, "q_proj")
    advice = re.search(r"select_parameters\(model, (.*?)\)", str(caught.value))
    assert advice is not None
    names = [name.strip(" '") for name in advice[1].split(",")]
    assert list(tepatch.select_parameters(ours, *names)) == [f"model.layers.{n}.self_attn.qkv.weight" for n in (0, 1)]


def test_parameters_of_a_tied_and_of_an_adapted_model_are_selected(tiny_llama: Make, save_checkpoint: Save) -> None:
    model = tepatch.load("llama", save_checkpoint(tiny_llama(tie_word_embeddings=True)), backend="reference")
    tied = tepatch.select_parameters(model, "lm_head")
    assert next(iter(tied.values())) is model.model.embed_tokens.weight
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert len(tepatch.select_parameters(made, "lora_A")) == 3
    assert len(tepatch.select_parameters(made, "input_layernorm")) == 3
    assert isinstance(model, LlamaForCausalLM)
