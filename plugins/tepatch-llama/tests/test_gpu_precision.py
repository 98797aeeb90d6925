"""FP8 on a GPU: that it really is computed in, where it was asked for and nowhere else, and that training goes on.

What shows it is the state that Transformer Engine leaves in a module that has quantized (a recipe's state, amax
histories and scales), and the kernels that ran. A flag that is set proves nothing.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tepatch
from tepatch.errors import BackendError, PlanError

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
STATES = {
    "fp8": "DelayedScalingRecipeState",
    "fp8-current": "Float8CurrentScalingRecipeState",
    "fp8-block": "Float8BlockScalingRecipeState",
}
FIRST_AND_LAST = {"default": "fp8", 0: "bf16", -1: "bf16"}


@pytest.fixture(autouse=True)
def clean_gpu() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def build(precision: Any = None, **config: Any) -> Any:
    """A model with the same weights every time, in training mode."""
    torch.manual_seed(0)
    wanted = LlamaConfig(**{**SHAPE, **config})
    return tepatch.build("llama", wanted, dtype=torch.bfloat16, backend="te", precision=precision)


def batch(rows: int = 2, tokens: int = 40) -> torch.Tensor:
    return torch.randint(1, 512, (rows, tokens), generator=torch.Generator().manual_seed(1)).to(CUDA)


def train(model: Any, ids: torch.Tensor, steps: int, lr: float = 1e-3) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fused(layer: Any) -> dict[str, Any]:
    """The modules of a layer that multiply matrices."""
    return {"qkv": layer.self_attn.qkv, "proj": layer.self_attn.proj, "mlp": layer.mlp}


def state_of(module: Any, key: str = "scaling_fwd") -> str:
    """The kind of recipe that has left its state in a module; empty where none has."""
    state = module.fp8_meta.get(key)
    return "" if state is None else type(state).__name__


def states(model: Any) -> list[set[str]]:
    return [{state_of(module) for module in fused(layer).values()} for layer in model.model.layers]


def rows_of(module: Any, key: str) -> list[int]:
    """The rows of a module's amax history that are written, from the end: [1, 2, 3] after three updates."""
    history = module.fp8_meta[key].amax_history[:, 0]
    return sorted(len(history) - int(row) for row in history.nonzero())


@pytest.mark.parametrize("shape", [(2, 40), (3, 7)])
@pytest.mark.parametrize("precision", STATES)
def test_training_in_each_recipe_quantizes_every_product_and_the_loss_falls(
    precision: str, shape: tuple[int, int]
) -> None:
    model = build(precision)
    losses = train(model, batch(*shape), steps=8)
    print(f"\n{precision} {shape}: {losses[0]:.4f} -> {losses[-1]:.4f}")
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert losses[-1] < losses[0]
    assert states(model) == [{STATES[precision]}] * 4
    for layer in model.model.layers:
        for name, module in fused(layer).items():
            assert state_of(module, "scaling_bwd") == STATES[precision], name
            if precision == "fp8":
                for key in ("scaling_fwd", "scaling_bwd"):
                    assert float(module.fp8_meta[key].amax_history.max()) > 0, (name, key)
                    assert bool((module.fp8_meta[key].scale != 1).any()), (name, key)


def test_histories_of_delayed_scaling_are_rolled_on_once_a_step() -> None:
    model = build("fp8")
    train(model, batch(), steps=3)
    for layer in model.model.layers:
        for name, module in fused(layer).items():
            assert rows_of(module, "scaling_fwd") == [1, 2, 3], name
            assert rows_of(module, "scaling_bwd") == [1, 2, 3], name


def kernels(model: Any, ids: torch.Tensor) -> set[str]:
    """The names of the kernels of a forward and a backward pass."""
    model(ids, labels=ids).loss.backward()  # what is only run the first time
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        model(ids, labels=ids).loss.backward()
        torch.cuda.synchronize()
    return {event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA}


@pytest.mark.parametrize("precision", STATES)
def test_other_kernels_run_than_in_bf16(precision: str) -> None:
    ids = batch(4, 64)
    plain = kernels(build("bf16"), ids)
    new = kernels(build(precision), ids) - plain
    print(f"\n{precision}, kernels that bf16 does not run:", *sorted(new), sep="\n  ")
    for words in (("quantize", "cast", "fp8", "e4m3", "float8"), ("gemm", "nvjet", "cutlass", "xmma", "sm90")):
        assert any(word in name.lower() for name in new for word in words), words


def test_layers_that_stay_out_are_computed_as_in_bf16() -> None:
    model = build(FIRST_AND_LAST)
    train(model, batch(), steps=2)
    assert states(model) == [{""}, {STATES["fp8"]}, {STATES["fp8"]}, {""}]
    assert rows_of(model.model.layers[1].mlp, "scaling_bwd") == [1, 2]
    assert "bf16 in layers 0, 3" in model.tepatch.precision or "in layers 1 to 2" in model.tepatch.precision


def test_recipes_can_differ_between_layers() -> None:
    model = build({"default": "fp8-current", 1: "fp8", 2: "bf16"})
    losses = train(model, batch(), steps=4)
    assert losses[-1] < losses[0]
    assert states(model) == [{STATES["fp8-current"]}, {STATES["fp8"]}, {""}, {STATES["fp8-current"]}]
    assert rows_of(model.model.layers[1].mlp, "scaling_fwd") == [1, 2, 3, 4]


def test_bf16_keeps_out_of_an_autocast_and_none_follows_it() -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    ids = batch()
    model = build("bf16").eval()
    with torch.no_grad():
        expected = model(ids).logits
        with te.autocast(enabled=True, recipe=Float8CurrentScaling()):
            found = model(ids).logits
        assert torch.equal(found, expected)
        assert states(model) == [{""}] * 4
        tepatch.set_precision(model, None)
        assert torch.equal(model(ids).logits, expected)
        with te.autocast(enabled=True, recipe=Float8CurrentScaling()):
            model(ids)
    assert states(model) == [{STATES["fp8-current"]}] * 4


def test_it_can_be_changed_later() -> None:
    ids = batch()
    model = build("bf16")
    train(model, ids, steps=1)
    assert states(model) == [{""}] * 4
    tepatch.set_precision(model, "fp8-current")
    train(model, ids, steps=1)
    assert states(model) == [{STATES["fp8-current"]}] * 4
    assert model.tepatch.precision == "fp8-current (Float8CurrentScaling)"


@pytest.mark.parametrize("precision", ["mxfp8", "nvfp4"])
def test_what_this_gpu_does_not_have_is_refused_with_the_reason(precision: str) -> None:
    import transformer_engine.pytorch as te

    available, reason = getattr(te, f"is_{precision}_available")(return_reason=True)
    if available:
        pytest.skip(f"this GPU has {precision}")
    before = torch.cuda.memory_allocated()
    with pytest.raises(BackendError) as caught:
        build({"default": "fp8", 1: precision})
    assert caught.value.problems[0].details == (reason,)
    assert torch.cuda.memory_allocated() == before


def test_sizes_that_fp8_can_not_take_are_refused_before_anything_is_allocated() -> None:
    before = torch.cuda.memory_allocated()
    with pytest.raises(PlanError, match="intermediate_size = 104"):
        build("fp8", intermediate_size=104)
    assert torch.cuda.memory_allocated() == before


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])


def losses_and_gradients(model: Any, ids: torch.Tensor) -> tuple[list[float], torch.Tensor]:
    """Three steps of plain descent, and the gradients of one more pass."""
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return losses, gradients(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("precision", [*STATES, "first and last in bf16"])
def test_gradient_checkpointing_changes_neither_losses_nor_gradients(precision: str, reentrant: bool) -> None:
    wanted = FIRST_AND_LAST if precision.startswith("first") else precision
    ids = batch()
    expected, plain = losses_and_gradients(build(wanted), ids)
    model = build(wanted)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.config.use_cache = False
    found, checkpointed = losses_and_gradients(model, ids)
    # The order of sums in attention's backward may vary: an ulp of bfloat16 (2**-8) in gradients, and in weights
    # after a step. A layer computed again without FP8 is off by E4M3's rounding, 2**-4 for an element.
    error = float((checkpointed - plain).norm() / plain.norm())
    print(f"\n{precision}, reentrant {reentrant}: losses {expected} and {found}, gradients off by {error:.1e}")
    assert found == pytest.approx(expected, rel=2**-8)
    assert error <= 2**-6
    if precision == "fp8" and not reentrant:
        for layer in model.model.layers:
            for name, module in fused(layer).items():
                assert rows_of(module, "scaling_fwd") == [1, 2, 3, 4], name
                assert rows_of(module, "scaling_bwd") == [1, 2, 3, 4], name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # accelerate's, for Transformer Engine's older names
def test_fp8_of_accelerate_is_respected_by_our_layers() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import TERecipeKwargs

    model = build({0: "bf16"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        handler = TERecipeKwargs(fp8_format="HYBRID", amax_history_len=16, amax_compute_algo="max")
        accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[handler])
        model, optimizer = accelerator.prepare(model, optimizer)
        ids, losses = batch(), []
        for _ in range(4):
            loss = model(ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[-1] < losses[0]
    assert states(model) == [{""}, *[{STATES["fp8"]}] * 3]
    for name, module in fused(model.model.layers[1]).items():
        assert len(module.fp8_meta["scaling_fwd"].amax_history) == 16, name
        assert rows_of(module, "scaling_fwd") == [1, 2, 3, 4], name


@pytest.mark.parametrize("precision", STATES)
def test_text_is_generated_in_fp8(precision: str) -> None:
    model = build(precision).eval()
    out = model.generate(batch(2, 5), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert out.shape == (2, 11)
    assert states(model) == [{STATES[precision]}] * 4


def test_a_checkpoint_after_training_in_fp8_is_hugging_faces(tmp_path: Path) -> None:
    model = build("fp8")
    train(model, batch(), steps=2)
    model.save_pretrained(tmp_path)
    again, info = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.cpu()), name


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_goes_on_in_its_precision_with_scales_of_its_own(how: Any) -> None:
    ids = batch()
    model = build(FIRST_AND_LAST)
    train(model, ids, steps=2)
    other = how(model)
    train(other, ids, steps=1)
    for number in (1, 2):
        for name, module in fused(other.model.layers[number]).items():
            assert rows_of(module, "scaling_fwd") == [1, 2, 3], name
            assert rows_of(module, "scaling_bwd") == [1, 2, 3], name
    assert state_of(other.model.layers[0].mlp) == ""
    assert type(other.model).__name__ == "LlamaModel"


def test_an_error_leaves_no_autocast_in_force() -> None:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    model = build("fp8")

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(batch())
    handle.remove()
    assert not FP8GlobalStateManager.is_fp8_enabled()
    train(model, batch(), steps=1)
    assert rows_of(model.model.layers[0].mlp, "scaling_bwd") == [1]


def test_a_recipe_of_the_users_own_is_followed() -> None:
    from transformer_engine.common.recipe import DelayedScaling

    model = build(DelayedScaling(amax_history_len=8, margin=1))
    train(model, batch(), steps=2)
    assert all(
        len(module.fp8_meta["scaling_fwd"].amax_history) == 8
        for layer in model.model.layers
        for module in fused(layer).values()
    )


@pytest.mark.filterwarnings("ignore")  # torch's, while it compiles
def test_compiled_models_are_in_their_precision() -> None:
    """Transformer Engine's own modules break the graph; what is around them is compiled."""
    model = build("fp8-current").eval()
    ids = batch()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = torch.compile(model)(ids, use_cache=False).logits
    assert states(model) == [{STATES["fp8-current"]}] * 4
    # Compiled elementwise code rounds at other places: a few ulps of bfloat16, and what FP8 makes of them.
    assert float((found - expected).norm() / expected.norm()) <= 2**-4
    torch.compiler.reset()
