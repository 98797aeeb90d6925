"""Compiling, copying, pickling and casting a patched model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms, gradient_terms
from safetensors.torch import load_file

import tepatch
from tepatch.hf.model_plan import plan_of
from tepatch.verify import compare_logits

Make = Callable[..., Any]
Save = Callable[..., Path]
IDS = torch.randint(1, 128, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def load(tiny_llama: Make, save_checkpoint: Save) -> Callable[..., tuple[Any, Any]]:
    """A stock model, and the patched one with the same weights."""

    def make(**config: Any) -> tuple[Any, Any]:
        stock = tiny_llama(**config)
        return stock, tepatch.load("llama", save_checkpoint(stock), backend="reference")

    return make


Load = Callable[..., tuple[Any, Any]]


def by_torch(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients by the parameters' names."""
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    inner = getattr(model, "_orig_mod", model)
    return out.logits.detach(), {name: parameter.grad.clone() for name, parameter in inner.named_parameters()}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at tensors
def test_a_compiled_model_computes_what_the_eager_one_does(load: Load) -> None:
    """The graphs that torch captures are run as they are: what a compiler makes of them is not the layer's matter."""
    _, model = load(num_hidden_layers=1)
    model.train()
    compiled = torch.compile(model, backend="aot_eager")
    for ids in (IDS, IDS[:, :9]):  # another length: compiled again, for any
        logits, found = gradients(compiled, ids)
        expected_logits, expected = gradients(model, ids)
        length = ids.shape[1]
        assert_close(logits, expected_logits, terms=forward_terms(model.config, length))
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(found[name], gradient, terms=gradient_terms(model.config, length, ids.numel()), name=name)
    assert compiled.state_dict().keys() == {f"_orig_mod.{name}" for name in model.state_dict()}


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch])
def test_a_copy_is_equal_and_has_a_life_of_its_own(copied: Callable[[Any], Any], load: Load, tmp_path: Path) -> None:
    stock, model = load(tie_word_embeddings=True)
    other = copied(model)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert other.tepatch.plan == model.tepatch.plan
    with torch.no_grad():
        other.model.layers[1].self_attn.qkv.weight.fill_(2)
    for each, name in ((model, "model"), (other, "other")):
        each.save_pretrained(tmp_path / name)
    assert (load_file(tmp_path / "other/model.safetensors")["model.layers.1.self_attn.k_proj.weight"] == 2).all()
    saved = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in stock.state_dict().items() if name in saved)
    other.load_state_dict(stock.state_dict())
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)


def generated(model: Any) -> None:
    model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)


def trained(model: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :4] = mask[1, 3:5] = 0
    model.train()
    model(IDS, labels=IDS).loss.backward()
    model(IDS, attention_mask=mask, labels=IDS, output_hidden_states=True).loss.backward()


def checkpointed(model: Any) -> None:
    model.gradient_checkpointing_enable()
    trained(model)


def refused(model: Any) -> None:
    with pytest.raises(tepatch.TepatchError):
        model(IDS, attention_mask=torch.randn(2, 1, 17, 17))


def saved(model: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tepatch.save(model, Path(folder, "again"))
    model.load_state_dict(model.state_dict())


def moved(model: Any) -> None:
    model.double().to("meta").to_empty(device="cpu").float()
    model.resize_token_embeddings(140)


def walked(model: Any) -> None:
    for module in model.modules():
        list(module.children())
        assert module.named_children is not None
        if isinstance(module, torch.nn.Linear):
            assert module.weight is not None
    assert str(plan_of(model).other_layouts) == str(plan_of(model).other_layouts)


def adapted(model: Any) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    wrapped(IDS, labels=IDS).loss.backward()
    wrapped.merge_and_unload()


def itself(model: Any) -> Any:
    return model


def by_build(model: Any) -> Any:
    return tepatch.build("llama", model.config, backend="reference")


USES = [trained, checkpointed, generated, refused, saved, moved, walked, adapted]


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", [itself, copy.deepcopy, by_pickle, by_torch, by_build])
def test_a_deleted_model_is_freed_at_once(
    how: Callable[[Any], Any], use: Callable[[Any], None], save_checkpoint: Save, tiny_llama: Make
) -> None:
    """Without the garbage collector, as the stock model is: no module of it refers to itself."""
    original = tepatch.load("llama", save_checkpoint(tiny_llama(num_hidden_layers=1, attention_bias=True)))
    held = [weakref.ref(each) for each in (*original.parameters(), *original.buffers())]
    model = how(original)
    del original
    assert how is itself or not any(ref() is not None for ref in held), "the copy keeps the original"
    use(model)
    model.zero_grad()
    seen = [weakref.ref(each) for each in (*model.modules(), *model.parameters(), *model.buffers())]
    del model
    assert {type(ref()).__name__ for ref in seen} == {"NoneType"}


@pytest.mark.usefixtures("uncollected")
def test_what_is_taken_out_of_a_model_works_without_it(load: Load, tmp_path: Path) -> None:
    """As in the stock model: a temporary model is gone before its method is called, or its layer."""
    stock, model = load()
    seen = weakref.ref(model.lm_head.weight)
    layer = copy.deepcopy(model).model.layers[0]
    gate, query = layer.mlp.gate_proj, copy.deepcopy(model).model.layers[0].self_attn.q_proj
    expected = stock.model.layers[0]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for found, wanted in ((gate, expected.mlp.gate_proj), (query, expected.self_attn.q_proj)):
        assert torch.equal(found.weight, wanted.weight)
        assert_close(found(x), wanted(x), terms=64)
    save = model.save_pretrained
    del model
    assert seen() is not None
    save(tmp_path / "saved")
    del save
    assert seen() is None
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in stock.state_dict().items())


LONG = {"max_position_embeddings": 8192, "head_dim": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["method", "to", "loaded"])
def test_a_cast_model_keeps_its_angles_in_float32(dtype: torch.dtype, how: str, load: Load) -> None:
    """Tokens that are thousands of positions apart, with weights by which the distance matters.

    The yardstick is Hugging Face's own error in this dtype with its frequencies in float32. With frequencies that a
    cast has rounded it is many times that.
    """
    stock, model = load(**LONG)
    for layer in stock.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 4
    model.load_state_dict(stock.state_dict())
    positions = torch.cat([torch.arange(9), torch.arange(8000, 8008)])[None].expand(2, -1)
    arguments = {"position_ids": positions, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    with torch.no_grad():
        reference = stock(IDS, **arguments).logits
        exact = copy.deepcopy(stock)
        for parameter in exact.parameters():
            parameter.data = parameter.data.to(dtype)
        theirs = compare_logits(exact(IDS, **arguments).logits, reference).relative_error
        ruined = compare_logits(copy.deepcopy(stock).to(dtype)(IDS, **arguments).logits, reference).relative_error
        if how == "method":
            model = model.bfloat16() if dtype == torch.bfloat16 else model.half()
        elif how == "to":
            model = model.to(dtype)
        else:
            model = _reloaded(model, dtype)
        ours = compare_logits(model(IDS, **arguments).logits, reference).relative_error
    print(f"\n{dtype}: HF {theirs:.1e}, HF with rounded frequencies {ruined:.1e}, ours {ours:.1e}")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert ruined > 5 * theirs, "the test would notice"
    assert ours <= 1.5 * theirs


def _reloaded(model: Any, dtype: torch.dtype) -> Any:
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    out = tepatch.build("llama", config, backend="reference")
    out.load_state_dict(model.state_dict())
    return out.eval()


def test_a_model_on_the_meta_device_keeps_names_and_shapes(load: Load) -> None:
    stock, model = load()
    model.to("meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in stock.state_dict().items()}


def test_layers_in_checkpoint_wrappers_keep_their_names(load: Load, tmp_path: Path) -> None:
    """What accelerate's FSDP plugin does with ``activation_checkpointing``."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    stock, model = load()
    layer = type(model.model.layers[0])
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: isinstance(module, layer)
    )
    assert "_checkpoint_wrapped_module" in str([name for name, _ in model.named_modules()])
    found, expected = model.state_dict(), stock.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    changed = {name: tensor + 1 for name, tensor in expected.items()}
    assert model.load_state_dict(changed) == ([], [])
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == changed.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in changed.items())


def test_a_projection_is_in_training_when_its_layer_is(load: Load) -> None:
    _, model = load()
    for mode in (True, False):
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}
