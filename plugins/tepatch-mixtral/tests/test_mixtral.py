"""What the conformance kit does not ask: the router's loss, jitter, state dicts of experts, adapters of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms, gradient_terms
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import tepatch
from tepatch.errors import PlanError
from tepatch.testing import small_sizes

SIZES = small_sizes(intermediate_size=48, num_local_experts=5, eos_token_id=None)
Make = Callable[..., tuple[Any, Any]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A stock model with random weights, and the patched model from its checkpoint, packed or with experts apart.

    ``make(packed=False, **config)``. The checkpoint is ``tmp_path / "checkpoint"``.
    """

    def build(*, packed: bool = False, **config: Any) -> tuple[Any, Any]:
        stock = MixtralForCausalLM(MixtralConfig(**{**SIZES, **config})).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in stock.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                # The router is decided: no rounding may send a token elsewhere.
                parameter.copy_(noise * (1.0 if "gate.weight" in name else 0.15) + (parameter.dim() == 1))
        folder = tmp_path / "checkpoint"
        stock.save_pretrained(folder, save_original_format=not packed, max_shard_size="200KB")
        return stock, tepatch.load("mixtral", folder, backend="reference")

    return build


def ids(batch: int = 2, tokens: int = 24) -> Tensor:
    return torch.randint(1, 128, (batch, tokens), generator=torch.Generator().manual_seed(1))


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def files(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("packed", [False, True])
def test_save_pretrained_is_the_stock_round_trip_and_converts_nothing_twice(
    packed: bool, make: Make, tmp_path: Path
) -> None:
    _, model = make(packed=packed)
    MixtralForCausalLM.from_pretrained(tmp_path / "checkpoint").save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "ours")
    assert_same(files(tmp_path / "ours"), files(tmp_path / "stock"))


def test_a_step_of_training_is_that_of_hugging_face(make: Make) -> None:
    """The auxiliary loss included, which trains the router."""
    stock, model = make(router_aux_loss_coef=1.0)
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    for each in (stock, model):
        loss = each.train()(ids(), labels=ids(), output_router_logits=True).loss
        loss.backward()
        torch.optim.SGD(each.parameters(), lr=1.0).step()
    after = stock.state_dict()
    for name, tensor in model.state_dict().items():
        # Of the learning rate 1: a step is the gradient.
        terms = gradient_terms(stock.config, 24, 2 * 24)
        assert_close(tensor - before[name], after[name] - before[name], terms=terms, name=name)


def test_jitter_draws_the_numbers_of_the_stock_model(make: Make) -> None:
    stock, model = make(router_jitter_noise=0.3)
    out = []
    for each in (model, stock):
        torch.manual_seed(3)
        out.append(each.train()(ids()).logits)
    assert_close(*out, terms=forward_terms(stock.config, 24))
    assert error(out[0], model.eval()(ids()).logits) > 0.01  # and none in evaluation


@pytest.mark.parametrize("packed", [False, True])
def test_a_state_dict_is_that_of_the_stock_model_in_memory(packed: bool, make: Make, tmp_path: Path) -> None:
    stock, model = make(packed=packed)
    assert_same(model.state_dict(), stock.state_dict())
    # And what is loaded may be that, or what lies in the checkpoint.
    for given in (stock.state_dict(), files(tmp_path / "checkpoint")):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert str(model.load_state_dict(given)) == "<All keys matched successfully>"
        assert_same(model.state_dict(), stock.state_dict())
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())  # as Trainer does
    assert_same(files(tmp_path / "given"), files(tmp_path / "checkpoint"))


def test_a_state_dict_is_the_stock_models_also_where_the_mapping_prefers_other_names(
    make: Make, tmp_path: Path
) -> None:
    stock, _ = make()
    mapping = tmp_path / "own.tepatch.yaml"
    mapping.write_text(
        "version: 1\nextends: tepatch_mixtral:mixtral.tepatch.yaml\nparameters:\n  model.layers.{layer}:\n"
        "    mlp.gate.weight: {any_of: [block_sparse_moe.gate.weight, mlp.gate.weight]}\n"
    )
    model = tepatch.load("mixtral", tmp_path / "checkpoint", backend="reference", mapping=mapping)
    assert_same(model.state_dict(), stock.state_dict())


def test_fresh_weights_are_saved_as_the_stock_model_would_save_them(tmp_path: Path) -> None:
    model = tepatch.build("mixtral", MixtralConfig(**SIZES), backend="reference")
    model.save_pretrained(tmp_path / "fresh")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in files(tmp_path / "fresh")
    assert_same(MixtralForCausalLM.from_pretrained(tmp_path / "fresh").state_dict(), model.state_dict())
    router = model.model.layers[0].mlp.gate.weight
    assert 0.01 < router.std() < 0.04  # initializer_range is 0.02


def test_adapters_of_experts_are_those_of_the_stock_model(make: Make) -> None:
    peft = pytest.importorskip("peft")
    stock, model = make()
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    out = []
    for each in (model, stock):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts)
        adapted = peft.get_peft_model(each, config)
        lora = {name: parameter for name, parameter in adapted.named_parameters() if "lora" in name}
        for parameter in lora.values():
            torch.manual_seed(parameter.numel())
            torch.nn.init.normal_(parameter, std=0.1)
        assert sum("experts" in name for name in lora) == 3 * 4
        out.append(adapted(ids()).logits)
    assert_close(*out, terms=forward_terms(stock.config, 24))
    with adapted.disable_adapter():
        assert error(adapted(ids()).logits, out[1]) > 0.01


def fp8_model(**config: Any) -> Any:
    """A model whose sizes FP8 can take, unless ``config`` says otherwise, in bfloat16 on the GPU."""
    settings = MixtralConfig(**{**SIZES, "num_hidden_layers": 1, "initializer_range": 0.2, **config})
    return tepatch.build("mixtral", settings, backend="te", dtype=torch.bfloat16, precision="bf16")


@pytest.mark.gpu
def test_experts_compute_in_the_precision_that_is_set() -> None:
    model = fp8_model()
    experts = model.model.layers[0].mlp.experts
    outs = []
    experts.register_forward_hook(lambda _, given, out: outs.append((given[0].detach(), out.detach())))
    inputs = ids(1, 5).cuda()
    model(inputs)
    tepatch.set_precision(model, "fp8-current")
    # Attention has changed too: the experts get what they got in bfloat16.
    handle = experts.register_forward_pre_hook(lambda _, given: (outs[0][0], *given[1:]))
    routed = model.model.layers[0].mlp.gate.register_forward_pre_hook(lambda _, given: (outs[0][0],))
    model(inputs, labels=inputs).loss.backward()
    handle.remove()
    routed.remove()
    difference = error(outs[1][1].float(), outs[0][1].float())
    assert 1e-3 < difference < 0.25  # four operands, each within 2^-4
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in experts.parameters())


@pytest.mark.gpu
def test_experts_of_sizes_that_fp8_can_not_take_are_named() -> None:
    model = fp8_model(intermediate_size=40)
    with pytest.raises(PlanError, match=r"experts\.down_proj"):
        tepatch.set_precision(model, "fp8-current")
