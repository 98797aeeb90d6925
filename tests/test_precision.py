"""Layers in a precision: which autocast each of them is in, and when one ends.

No GPU here: a small stand-in has Transformer Engine's rules for autocasts (state of the process, a depth, scales
updated when the outermost one ends), and reference modules say that they were its own. Nothing is really quantized.
"""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms, gradient_terms
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

import tepatch
from tepatch.errors import BackendError, PlanError, UnsupportedError
from tepatch.te.layer import AcceleratedLayer, apply_precision
from tepatch.te.nvidia.precision import read_precision, recipe_in_force

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
}
IDS = torch.arange(1, 21).reshape(2, 10)


class Recipe:
    fp8_mha = False


@dataclass
class DelayedScaling(Recipe):
    margin: int = 0
    fp8_mha: bool = False


@dataclass
class Float8CurrentScaling(Recipe):
    pass


@dataclass
class Float8BlockScaling(Recipe):
    pass


@dataclass
class MXFP8BlockScaling(Recipe):
    pass


@dataclass
class NVFP4BlockScaling(Recipe):
    pass


@dataclass
class Engine:
    """The state that Transformer Engine keeps for the process, and what has happened."""

    enabled: bool = False
    recipe: Any = None
    is_first: bool = False
    depth: int = 0
    updates: int = 0
    """How often the scales of all modules were updated after a forward pass."""
    firsts: list[str] = field(default_factory=list)
    """The modules that took it on them to update the scales of gradients."""
    seen: dict[str, Any] = field(default_factory=dict)
    """The recipe that each layer was last computed by; None where it was not quantized."""
    entered: int = 0
    checkpoints: list[dict[str, Any]] = field(default_factory=list)

    def is_fp8_enabled(self) -> bool:
        return self.enabled

    def get_fp8_recipe(self) -> Any:
        return self.recipe

    def get_buffer_info(self) -> str:
        return "registered"

    def compute(self, name: str) -> None:
        """What a module of Transformer Engine does with the state when it is called."""
        self.seen[name] = recipe_in_force()
        if self.enabled and self.is_first:
            self.firsts.append(name)
            self.is_first = False


engine = Engine()


class Autocast:
    def __init__(self, *, enabled: bool, recipe: Any) -> None:
        self.wanted = (enabled, recipe)

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("DelayedScaling is not supported under torch.compile.")
        self.before = (engine.enabled, engine.recipe, engine.is_first)
        engine.enabled, engine.recipe = self.wanted
        if engine.depth == 0:
            engine.is_first = True
        engine.depth += 1
        engine.entered += 1

    def __exit__(self, *error: object) -> None:
        engine.enabled, engine.recipe, engine.is_first = self.before
        engine.depth -= 1
        if self.wanted[0] and engine.depth == 0 and torch.is_grad_enabled():
            engine.updates += 1


def checkpoint(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Computes again in the backward pass, in the autocast that was in force, as Transformer Engine's does."""
    engine.checkpoints.append(options)
    enabled, recipe = engine.enabled, engine.recipe
    calls = []
    _, recompute = options["context_fn"]() if "context_fn" in options else (None, None)

    def run(*inner: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            return function(*inner)
        with recompute, Autocast(enabled=enabled, recipe=recipe):
            return function(*inner)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)


def says(available: bool) -> Callable[..., tuple[bool, str]]:
    return lambda return_reason: (available, "" if available else "compute capability 10.0 or higher required")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    global engine
    engine = Engine()
    common, pytorch, quantization = ModuleType("recipe"), ModuleType("pytorch"), ModuleType("quantization")
    for cls in (Recipe, DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling):
        setattr(common, cls.__name__, cls)
    quantization.FP8GlobalStateManager = engine  # type: ignore[attr-defined]
    pytorch.autocast, pytorch.checkpoint = Autocast, checkpoint  # type: ignore[attr-defined]
    for name, available in {"fp8": True, "fp8_block_scaling": True, "mxfp8": False, "nvfp4": False}.items():
        setattr(pytorch, f"is_{name}_available", says(available))
    for path, module in {
        "transformer_engine": ModuleType("transformer_engine"),
        "transformer_engine.common": ModuleType("common"),
        "transformer_engine.common.recipe": common,
        "transformer_engine.pytorch": pytorch,
        "transformer_engine.pytorch.quantization": quantization,
    }.items():
        monkeypatch.setitem(sys.modules, path, module)
    yield
    assert (engine.depth, engine.enabled) == (0, False), "an autocast was left in force"


def note(name: str, module: torch.nn.Module, args: Any) -> None:
    engine.compute(name)


def claim(model: Any, only: str = "") -> Any:
    """Makes reference modules say that they are Transformer Engine's, and tell the engine when they are called."""
    kinds = [only] if only else ["LayerNormLinear", "Linear", "LayerNormMLP"]
    for name, module in model.named_modules():
        if "layers." in name and type(module).__name__ in kinds:
            module.fp8_meta = {"registered": [0, "key"], "recipe": None}
            layer = name.partition("layers.")[2].split(".")[0]
            module.register_forward_pre_hook(functools.partial(note, layer))
    return model


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return claim(tepatch.build("llama", LlamaConfig(**SHAPE), backend="reference"))


def recipes() -> list[str]:
    """The recipes by which the layers were last computed."""
    return [type(recipe).__name__ if recipe is not None else "" for _, recipe in sorted(engine.seen.items())]


FIRST_AND_LAST = {"default": "fp8", 0: "bf16", -1: "bf16"}


def test_layers_follow_what_is_around_them_by_default(model: Any) -> None:
    model(IDS)
    assert recipes() == ["", "", ""]
    with Autocast(enabled=True, recipe=Float8CurrentScaling()):
        model(IDS)
    assert recipes() == ["Float8CurrentScaling"] * 3
    assert engine.entered == 1
    assert model.tepatch.precision == ""


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("fp8", "DelayedScaling"), ("fp8-current", "Float8CurrentScaling"), ("fp8-block", "Float8BlockScaling")],
)
def test_every_layer_is_in_the_recipe_with_one_autocast_for_a_pass(model: Any, name: str, recipe: str) -> None:
    tepatch.set_precision(model, name)
    model(IDS)
    assert recipes() == [recipe] * 3
    assert (engine.entered, engine.updates, engine.firsts) == (1, 1, ["0"])
    assert model.tepatch.precision == f"{name} ({recipe})"
    assert f"precision: {name} ({recipe})" in str(model.tepatch)


def test_a_recipe_of_the_users_own_is_taken_as_it_is(model: Any) -> None:
    recipe = DelayedScaling(margin=3)
    tepatch.set_precision(model, recipe)
    model(IDS)
    assert all(seen is recipe for seen in engine.seen.values())
    assert model.tepatch.precision == "DelayedScaling"


def test_first_and_last_layers_stay_out_of_it(model: Any) -> None:
    tepatch.set_precision(model, FIRST_AND_LAST)
    model(IDS)
    assert recipes() == ["", "DelayedScaling", ""]
    assert (engine.updates, engine.firsts) == (1, ["1"])
    assert model.tepatch.precision in (
        "bf16; fp8 (DelayedScaling) in layer 1",
        "fp8 (DelayedScaling); bf16 in layers 0, 2",
    )


def test_recipes_can_differ_and_scales_are_still_updated_once(model: Any) -> None:
    tepatch.set_precision(model, {"default": "bf16", 1: "fp8", 2: "fp8-block"})
    model(IDS)
    assert recipes() == ["", "DelayedScaling", "Float8BlockScaling"]
    assert (engine.updates, engine.firsts) == (1, ["1"])


def test_an_autocast_of_the_users_own_is_overruled_inside_the_layers_only(model: Any) -> None:
    around = Float8CurrentScaling()
    tepatch.set_precision(model, FIRST_AND_LAST)
    with Autocast(enabled=True, recipe=around):
        model(IDS)
        assert recipe_in_force() is around
    assert recipes() == ["", "DelayedScaling", ""]
    assert engine.updates == 1


def test_an_equal_recipe_around_is_not_entered_again(model: Any) -> None:
    tepatch.set_precision(model, "fp8")
    with Autocast(enabled=True, recipe=DelayedScaling()):
        model(IDS)
    assert engine.entered == 1


def test_bf16_keeps_out_of_an_autocast_around(model: Any) -> None:
    tepatch.set_precision(model, "bf16")
    model(IDS)
    assert engine.entered == 0
    with Autocast(enabled=True, recipe=DelayedScaling()):
        model(IDS)
    assert recipes() == [""] * 3


def test_a_layer_called_alone_is_in_its_precision(model: Any) -> None:
    tepatch.set_precision(model, "fp8")
    layer = model.model.layers[1]
    states = torch.randn(1, 4, 64)
    layer(states, position_embeddings=model.model.rotary_emb(states, torch.arange(4)[None]))
    assert recipes() == ["DelayedScaling"]


def test_it_can_be_changed_and_taken_back(model: Any) -> None:
    before = type(model.model)
    for precision in ("fp8", {"default": "fp8-block", 0: "bf16"}, "bf16", "fp8"):
        tepatch.set_precision(model, precision)
    tepatch.set_precision(model, None)
    model(IDS)
    assert recipes() == [""] * 3
    assert engine.entered == 0
    assert type(model.model) is before is LlamaModel
    assert model.tepatch.precision == ""


def test_the_module_that_runs_the_layers_keeps_its_name_and_is_still_hugging_faces(model: Any) -> None:
    tepatch.set_precision(model, "fp8")
    assert isinstance(model.model, LlamaModel)
    assert str(type(model.model)) == str(LlamaModel)
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 4


def test_a_precision_is_left_also_by_a_module_whose_class_was_made_of_ours(model: Any) -> None:
    """``fully_shard`` makes a class of the one that it finds: it stays, and must not enter what was set before."""
    tepatch.set_precision(model, "fp8")
    runner = model.model
    runner.__class__ = type("FSDPLlamaModel", (type(runner),), {})
    model(IDS)
    assert (recipes(), engine.updates) == (["DelayedScaling"] * 3, 1)
    for precision in ("bf16", None):
        tepatch.set_precision(model, precision)
        model(IDS)
        assert (recipes(), engine.updates) == ([""] * 3, 1)
    tepatch.set_precision(model, "fp8-current")
    model(IDS)
    assert (recipes(), engine.updates) == (["Float8CurrentScaling"] * 3, 2)
    assert type(runner).__name__ == "FSDPLlamaModel"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_autocast_is_left_in_force_after_an_error(model: Any, error: type[BaseException]) -> None:
    tepatch.set_precision(model, {"default": "fp8", 1: "fp8-block"})

    def fail(*args: Any) -> None:
        raise error

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(error):
        model(IDS)
    assert (engine.depth, recipe_in_force()) == (0, None)
    handle.remove()
    model(IDS)
    assert recipes() == ["DelayedScaling", "Float8BlockScaling", "DelayedScaling"]


def test_generation_without_gradients_updates_no_scales(model: Any) -> None:
    tepatch.set_precision(model, "fp8")
    model.eval()
    model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert recipes() == ["DelayedScaling"] * 3
    assert (engine.entered, engine.updates) == (3, 0)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_their_precision_and_register_their_scales_anew(model: Any, how: str) -> None:
    tepatch.set_precision(model, FIRST_AND_LAST)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert type(other.model) is type(model.model)
    assert other.model is not model.model
    for name, module in other.named_modules():
        if "fp8_meta" in module.__dict__:
            assert "registered" not in module.fp8_meta, name
    assert "registered" in model.model.layers[0].mlp.fp8_meta
    tepatch.set_precision(model, None)
    other(IDS)
    assert recipes() == ["", "DelayedScaling", ""]
    assert engine.updates == 1
    assert other.tepatch.precision != model.tepatch.precision == ""


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it while it traces
def test_compiled_models_are_in_their_precision() -> None:
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": 2})
    model = claim(tepatch.build("llama", config, backend="reference"), only="LayerNormMLP")
    expected = model(IDS).logits
    tepatch.set_precision(model, {"default": "fp8", 0: "bf16"})
    compiled = torch.compile(model, backend="eager")
    for step in range(2):
        engine.seen.clear()
        assert_close(compiled(IDS).logits, expected, terms=forward_terms(config, 10))
        assert recipes() == ["", "DelayedScaling"]
        assert engine.updates == step + 1
    torch.compiler.reset()


def enable_checkpointing(model: Any, **options: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(options or None)


def test_layers_that_are_not_quantized_checkpoint_as_hugging_face_says(model: Any) -> None:
    for precision in (None, "bf16"):
        tepatch.set_precision(model, precision)
        enable_checkpointing(model, use_reentrant=False, preserve_rng_state=False)
        function = model.model.layers[0]._gradient_checkpointing_func
        assert function.func is torch.utils.checkpoint.checkpoint
        assert function.keywords == {"use_reentrant": False, "preserve_rng_state": False}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whose", ["own", "around"])
def test_quantized_layers_are_checkpointed_by_transformer_engine(model: Any, whose: str, reentrant: bool) -> None:
    if whose == "own":
        tepatch.set_precision(model, "fp8")
    enable_checkpointing(model, use_reentrant=reentrant, preserve_rng_state=True)
    model.train()
    with Autocast(enabled=True, recipe=DelayedScaling()) if whose == "around" else nullcontext():
        model(IDS, labels=IDS)
    assert engine.updates == 1
    assert [options["use_reentrant"] for options in engine.checkpoints] == [reentrant] * 3
    assert {name for options in engine.checkpoints for name in options} <= {"use_reentrant", "context_fn"}


def test_what_is_computed_again_is_in_the_precision_and_updates_nothing(model: Any) -> None:
    model.train()
    model(IDS, labels=IDS).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    tepatch.set_precision(model, FIRST_AND_LAST)
    enable_checkpointing(model, use_reentrant=False)
    loss = model(IDS, labels=IDS).loss
    assert len(engine.checkpoints) == 1, "of the layer that is quantized"
    engine.seen.clear()
    loss.backward()
    assert recipes() == ["", "DelayedScaling", ""]
    assert engine.updates == 1, "once a step, not once more for each layer"
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], terms=gradient_terms(model.config, 10, 20), name=name)


def test_a_checkpoint_function_of_the_users_own_is_refused_under_fp8_and_left_alone_otherwise(model: Any) -> None:
    def own(function: Callable[..., Any], *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    enable_checkpointing(model)
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = own
    model.train()
    model(IDS)
    tepatch.set_precision(model, "fp8")
    with pytest.raises(UnsupportedError, match="Transformer Engine's own function only") as caught:
        model(IDS)
    assert "own" in caught.value.problems[0].found


@pytest.mark.parametrize("precision", [None, "fp8"])
def test_a_checkpoint_function_can_be_exchanged_for_a_while_and_taken_away(model: Any, precision: str | None) -> None:
    tepatch.set_precision(model, precision)
    enable_checkpointing(model)
    layer, other = model.model.layers[0], model.model.layers[1]
    before = vars(layer)["_gradient_checkpointing_func"]  # where tools find it in the stock layer
    with unittest.mock.patch.object(layer, "_gradient_checkpointing_func") as function:
        assert vars(layer)["_gradient_checkpointing_func"] is function
    assert vars(layer)["_gradient_checkpointing_func"] is before
    del layer._gradient_checkpointing_func
    assert not hasattr(layer, "_gradient_checkpointing_func")
    with pytest.raises(AttributeError):
        del layer._gradient_checkpointing_func
    assert hasattr(other, "_gradient_checkpointing_func")


def test_a_mode_can_be_set_for_a_while_on_a_projection(model: Any) -> None:
    projection = model.model.layers[0].self_attn.q_proj
    with unittest.mock.patch.object(projection, "training", False):
        assert projection.training == model.model.layers[0].training
    assert projection.training == model.model.layers[0].training


def test_a_layer_without_a_checkpoint_function_has_none(model: Any) -> None:
    with pytest.raises(AttributeError):
        _ = model.model.layers[0]._gradient_checkpointing_func


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_what_the_gpu_can_not_do_is_refused_with_the_reason_and_changes_nothing(model: Any, name: str) -> None:
    tepatch.set_precision(model, "fp8")
    with pytest.raises(BackendError) as caught:
        tepatch.set_precision(model, {"default": "bf16", 1: name})
    (problem,) = caught.value.problems
    assert problem.details == ("compute capability 10.0 or higher required",)
    model(IDS)
    assert recipes() == ["DelayedScaling"] * 3
    assert model.tepatch.precision == "fp8 (DelayedScaling)"


def test_a_recipe_with_fp8_between_modules_is_refused(model: Any) -> None:
    with pytest.raises(UnsupportedError, match="fp8_mha"):
        tepatch.set_precision(model, DelayedScaling(fp8_mha=True))


def test_sizes_that_fp8_can_not_take_are_refused_unless_the_layer_stays_out() -> None:
    model = claim(tepatch.build("llama", LlamaConfig(**{**SHAPE, "intermediate_size": 100}), backend="reference"))
    with pytest.raises(PlanError) as caught:
        tepatch.set_precision(model, {"default": "bf16", 1: "fp8"})
    (problem,) = caught.value.problems
    assert problem.found == "config.intermediate_size = 100"
    assert problem.details[0] == "model.layers.1.mlp.fc1_weight [200, 64]"
    assert all(layer.precision is None for layer in model.model.layers)
    tepatch.set_precision(model, "bf16")


def test_a_model_without_our_layers_is_refused(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(PlanError, match="no layers that take a precision"):
        apply_precision(tiny_llama(), read_precision("bf16"))
    with pytest.raises(PlanError, match="not a model that tepatch has made"):
        tepatch.set_precision(tiny_llama(), "bf16")


def test_on_the_reference_bf16_changes_nothing_and_fp8_is_refused(
    tiny_llama: Callable[..., Any], save_checkpoint: Callable[..., Path]
) -> None:
    folder = save_checkpoint(tiny_llama())
    plain = tepatch.load("llama", folder, backend="reference")
    same = tepatch.load("llama", folder, backend="reference", precision="bf16")
    assert torch.equal(plain(IDS).logits, same(IDS).logits)
    assert same.tepatch.precision == "bf16"
    assert all(layer.precision.name == "bf16" for layer in same.model.layers)
    for precision in ("fp8", {"default": "bf16", -1: "mxfp8"}):
        with pytest.raises(BackendError, match="quantize nothing"):
            tepatch.load("llama", folder, backend="reference", precision=precision)
    with pytest.raises(PlanError, match="no layer 3"):
        tepatch.load("llama", folder, backend="reference", precision={"default": "bf16", 3: "bf16"})


def test_a_name_that_is_none_is_refused_before_anything_is_looked_for() -> None:
    with pytest.raises(PlanError, match="no precision of this name"):
        tepatch.load("llama", "nowhere", precision="int8")
    with pytest.raises(PlanError, match="no precision of this name"):
        tepatch.build("llama", LlamaConfig(**SHAPE), precision="int8")


def test_layers_say_what_they_compute_in(model: Any) -> None:
    tepatch.set_precision(model, FIRST_AND_LAST)
    layers = [module for module in model.modules() if isinstance(module, AcceleratedLayer)]
    assert [layer.extra_repr() for layer in layers] == [
        "precision=bf16",
        "precision=fp8 (DelayedScaling)",
        "precision=bf16",
    ]


def test_wrapped_models_are_told_through_their_wrapper(model: Any) -> None:
    wrapper = torch.nn.Sequential(model)
    tepatch.set_precision(wrapper, "fp8")
    model(IDS)
    assert engine.entered == 1
    assert model.tepatch.precision == "fp8 (DelayedScaling)"


def test_parts_of_a_model_and_what_is_none_are_refused(model: Any) -> None:
    both = torch.nn.Sequential(model, copy.deepcopy(model))
    for wrong in (None, "model", [model], model.model, model.model.layers[0], both, torch.nn.Linear(2, 2)):
        with pytest.raises(PlanError, match="not a model that tepatch has made"):
            tepatch.set_precision(wrong, "bf16")
    assert all(layer.precision is None for layer in model.model.layers)


def test_a_recipe_has_to_be_made(model: Any) -> None:
    with pytest.raises(PlanError, match=r"make one: DelayedScaling\(\)"):
        tepatch.set_precision(model, DelayedScaling)
