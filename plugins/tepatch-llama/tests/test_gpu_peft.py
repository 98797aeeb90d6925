"""Adapters on Transformer Engine's fused modules, and batches of any number of tokens in FP8, on a GPU."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tepatch
from tepatch.errors import UnsupportedError
from tepatch.te import use_backend
from tepatch.te.reference import ACTIVATIONS
from tepatch.te.reference.mlp import activate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is deprecated:FutureWarning"),
]

Make = Callable[..., Any]
Save = Callable[..., Path]
CUDA = torch.device("cuda")
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 512}
NOISE = 1.05
"""How many times the error of Hugging Face's own bfloat16 ours may be."""
TARGETS: dict[str, Any] = {
    "q and v": ["q_proj", "v_proj"],
    "all-linear": "all-linear",
    "the mlp": ["gate_proj", "up_proj", "down_proj"],
}


@pytest.fixture(autouse=True)
def clean_gpu() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def ids(rows: int = 4, tokens: int = 64) -> torch.Tensor:
    return torch.randint(1, 512, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(CUDA)


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def with_adapters(models: list[Any], **options: Any) -> list[Any]:
    """Each with LoRA of the same random values."""
    peft = pytest.importorskip("peft", reason="needs peft")
    out = [peft.get_peft_model(m, peft.LoraConfig(r=8, lora_alpha=16, **options)) for m in models]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapters(out[0]).items():
            value = torch.randn(parameter.shape, generator=generator).to(CUDA) * 0.1
            for model in out:
                adapters(model)[name].copy_(value)
    assert all(adapters(model).keys() == adapters(out[0]).keys() for model in out)
    return out


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    difference = sum((a.detach().double() - b.double()).square().sum() for a, b in zip(found, expected, strict=True))
    return float((difference / sum(b.detach().double().square().sum() for b in expected)).sqrt())


def results(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the gradients of all adapter parameters."""
    model.zero_grad()
    out = model(tokens, labels=tokens)
    out.loss.backward()
    gradients = [parameter.grad for _, parameter in sorted(adapters(model).items())]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    return out.logits.detach(), [gradient.clone() for gradient in gradients if gradient is not None]


@pytest.fixture
def trio(tiny_llama: Make, save_checkpoint: Save) -> list[Any]:
    """Hugging Face in float32 with bfloat16's values, Hugging Face in bfloat16, ours in bfloat16."""
    stock = tiny_llama(dtype=torch.bfloat16, **SIZES)
    ours = tepatch.load("llama", save_checkpoint(stock), backend="te")
    exact = copy.deepcopy(stock).float()
    return [exact.to(CUDA), stock.to(CUDA), ours]


@pytest.mark.parametrize("name", TARGETS)
def test_lora_is_as_accurate_as_hugging_faces_in_bfloat16(name: str, trio: list[Any]) -> None:
    exact, theirs, ours = (results(model, ids()) for model in with_adapters(trio, target_modules=TARGETS[name]))
    for what, select in (("logits", lambda each: [each[0]]), ("gradients", lambda each: each[1])):
        yardstick, error = (relative_error(select(each), select(exact)) for each in (theirs, ours))
        print(f"\n{name}, {what}: transformers bf16 {yardstick:.3e}, tepatch te bf16 {error:.3e}")
        assert error <= NOISE * yardstick, what


def test_merging_on_the_gpu_is_the_stock_models_merge(trio: list[Any], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    _, theirs, ours = with_adapters(trio, target_modules="all-linear")
    with torch.no_grad():
        before = ours(ids()).logits
    merged, expected = ours.merge_and_unload(safe_merge=True), theirs.merge_and_unload(safe_merge=True)
    assert merged.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    with torch.no_grad():
        assert relative_error([merged(ids()).logits], [before]) < 0.05  # the sum is rounded to bfloat16
    merged.save_pretrained(tmp_path / "merged")
    loaded, told = LlamaForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(told.values()), told
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, expected.model.layers[0].mlp.up_proj.weight.cpu())


def test_disabled_adapters_unmerge_in_the_middle_of_a_call(trio: list[Any]) -> None:
    with torch.no_grad():
        base = trio[2](ids()).logits.clone()
    _, _, ours = with_adapters(trio, target_modules="all-linear")
    ours.merge_adapter()
    with torch.no_grad(), ours.disable_adapter():
        assert relative_error([ours(ids()).logits], [base]) < 0.05  # merged and unmerged in bfloat16


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_computes_with_its_own_parameters(how: str, trio: list[Any], tmp_path: Path) -> None:
    _, _, ours = with_adapters(trio, target_modules="all-linear")
    expected = results(ours, ids())[0]
    if how == "deepcopy":
        copied = copy.deepcopy(ours)
    else:
        torch.save(ours, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
        assert torch.equal(copied(ids()).logits, expected)


def recipe(name: str) -> Any:
    from transformer_engine.common import recipe

    return getattr(recipe, name)()


@pytest.mark.parametrize("name", ["DelayedScaling", "Float8CurrentScaling"])
def test_lora_trains_in_fp8_with_any_number_of_tokens(name: str, trio: list[Any]) -> None:
    import transformer_engine.pytorch as te

    exact, _, ours = with_adapters(trio, target_modules="all-linear")
    tokens = ids(3, 7)
    expected_logits, expected_gradients = results(exact, tokens)
    bf16_logits, _ = results(ours, tokens)
    ours.zero_grad()
    with te.autocast(enabled=True, recipe=recipe(name)):
        out = ours(tokens, labels=tokens)
    out.loss.backward()
    gradients = [parameter.grad for _, parameter in sorted(adapters(ours).items())]
    errors = relative_error([out.logits], [expected_logits]), relative_error(gradients, expected_gradients)
    print(f"\n{name}, 21 tokens: logits {errors[0]:.3e}, gradients {errors[1]:.3e}")
    assert errors[0] > 2 * relative_error([bf16_logits], [expected_logits])  # it was FP8
    assert errors[0] < 0.7  # random weights exaggerate it
    assert errors[1] < 1
    layer = ours.base_model.model.model.layers[0]
    assert layer.self_attn.qkv.fp8
    assert layer.self_attn.proj.fp8
    assert sorted(layer.mlp._steps) == ["fc2_weight", "norm"]
    assert all(step.fp8 for step in layer.mlp._steps.values())


@pytest.mark.parametrize("name", ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"])
@pytest.mark.parametrize("kind", ["Linear", "LayerNormLinear", "LayerNormMLP"])
def test_a_batch_that_is_padded_inside_is_the_batch_padded_outside(kind: str, name: str) -> None:
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    with use_backend("te") as modules:
        options = {"normalization": "RMSNorm"} if kind != "Linear" else {}
        if kind == "LayerNormMLP":
            options["activation"] = "swiglu"
        module = getattr(modules, kind)(128, 256, params_dtype=torch.bfloat16, **options)
    value = torch.randn(3, 7, 128, dtype=torch.bfloat16, device=CUDA)
    outputs, gradients = [], []
    for rows in (value, F.pad(value.reshape(21, 128), (0, 0, 0, 11))):
        each = copy.deepcopy(module)
        leaf = rows.clone().requires_grad_()
        with te.autocast(enabled=True, recipe=recipe(name)):
            out = each(leaf)
        out.reshape(-1, out.shape[-1])[:21].float().square().sum().backward()
        outputs.append(out.detach().reshape(-1, out.shape[-1])[:21])
        weights = [parameter.grad for parameter in each.parameters()]
        gradients.append([leaf.grad.reshape(-1, 128)[:21], *weights])
    assert out.shape[0] == 32
    assert torch.equal(outputs[0], outputs[1])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_sizes_that_fp8_can_not_take_are_named() -> None:
    import transformer_engine.pytorch as te

    with use_backend("te") as modules:
        module = modules.Linear(64, 72, params_dtype=torch.bfloat16)
    value = torch.randn(16, 64, dtype=torch.bfloat16, device=CUDA)
    assert module(value).shape == (16, 72)
    with (
        te.autocast(enabled=True, recipe=recipe("DelayedScaling")),
        pytest.raises(UnsupportedError, match=r"(?s)Linear\.weight.*multiples of 16.*out_features 72"),
    ):
        module(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_an_activation_by_itself_is_the_reference(activation: str, dtype: torch.dtype) -> None:
    from tepatch.te.nvidia.engine import activated

    torch.manual_seed(0)
    first = torch.randn(3, 5, 64, device=CUDA).to(dtype)
    values = []
    for function in (activated, activate):
        leaf = first.clone().requires_grad_()
        out = function(leaf, activation)
        out.float().square().sum().backward()
        values.append((out.detach(), leaf.grad))
    for found, expected in zip(*values, strict=True):
        assert found.shape == expected.shape
        # Both compute in float32, the kernels with fast exponentials; bfloat16 has a precision of 4e-3.
        assert relative_error([found], [expected]) < (1e-4 if dtype == torch.float32 else 1e-2)
