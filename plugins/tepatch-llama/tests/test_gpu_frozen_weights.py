"""Weights that do not change are quantized once, on a GPU: with the numbers, to the bit, of quantizing at each call.

A spy on Transformer Engine's quantizers counts the tensors that are a model's weights. Whether a copy was stale is
asked of the logits: those of a copy of the model that keeps no quantized weights have to be equal.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel, MixtralConfig

import tepatch
from tepatch.testing.cases import cache_name

CACHE = str(cache_name(LlamaModel.forward))
"""What models call their cache in this version of transformers."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Recipe type changed"),
]

CUDA = torch.device("cuda")
PRECISIONS = ["fp8", "fp8-current", "fp8-block"]
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MATRICES = 3 * 4
"""qkv, proj, fc1 and fc2 of each layer."""


@pytest.fixture(autouse=True)
def clean_gpu() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def build(precision: Any, **config: Any) -> Any:
    """A model with the same weights every time, in evaluation mode."""
    torch.manual_seed(0)
    wanted = LlamaConfig(**{**SHAPE, **config})
    return tepatch.build("llama", wanted, dtype=torch.bfloat16, backend="te", precision=precision).eval()


def trained(precision: Any) -> Any:
    """One that has taken two steps, after which delayed scaling has scales of its own."""
    model = build(precision).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(batch(), labels=batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def batch(rows: int = 2, tokens: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 512, (rows, tokens), generator=torch.Generator().manual_seed(seed)).to(CUDA)


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(batch() if ids is None else ids, use_cache=False).logits
    return out


def without_copies(model: Any) -> torch.Tensor:
    """The logits of a copy of the model that quantizes at each call, as the model's own layers are asked to."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "caches_weights"):
            module.caches_weights = False
    return logits(other)


class Spy:
    """How many tensors were quantized that are weights of a model."""

    def __init__(self) -> None:
        self.count = 0
        self.storages: set[int] = set()

    def watch(self, model: Any) -> None:
        self.storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.count = 0

    def see(self, tensor: torch.Tensor) -> None:
        self.count += tensor.untyped_storage().data_ptr() in self.storages


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    from transformer_engine.pytorch.quantized_tensor import Quantizer

    spy, quantize = Spy(), Quantizer.quantize

    def seen(self: Any, tensor: torch.Tensor, **options: Any) -> Any:
        spy.see(tensor)
        return quantize(self, tensor, **options)

    monkeypatch.setattr(Quantizer, "quantize", seen)
    return spy


@pytest.mark.parametrize("gradients_off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_quantized_once_and_outputs_are_equal(precision: str, gradients_off: Any, spy: Spy) -> None:
    model, inputs = trained(precision), [batch(2, 40, 1), batch(3, 7, 2), batch(1, 1, 3), batch(2, 40, 1)]
    spy.watch(model)
    tepatch.set_precision(model, precision, cache_weights=False)
    with gradients_off():
        expected = [model(ids, use_cache=False).logits.clone() for ids in inputs]
    assert spy.count == MATRICES * len(inputs)
    tepatch.set_precision(model, precision)
    spy.count = 0
    with gradients_off():
        found = [model(ids, use_cache=False).logits.clone() for ids in inputs]
    assert spy.count == MATRICES
    assert all(map(torch.equal, found, expected))
    assert torch.equal(logits(model, inputs[1]), expected[1])  # copies of inference mode serve no_grad too
    assert spy.count == MATRICES


@pytest.mark.parametrize("precision", PRECISIONS)
def test_text_is_generated_from_one_quantization(precision: str, spy: Spy) -> None:
    model, options = trained(precision), {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    tepatch.set_precision(model, precision, cache_weights=False)
    expected = model.generate(batch(2, 5), **options)
    tepatch.set_precision(model, precision)
    spy.watch(model)
    assert torch.equal(model.generate(batch(2, 5), **options), expected)
    assert spy.count == MATRICES


def test_scales_and_histories_of_delayed_scaling_go_on_as_without_copies() -> None:
    ours = trained("fp8")
    theirs = copy.deepcopy(ours)
    tepatch.set_precision(theirs, "fp8", cache_weights=False)
    left = []
    for model in (ours, theirs):
        for seed in (4, 5):
            logits(model, batch(seed=seed))
        model.train()(batch(), labels=batch())  # with gradients: scales are updated at the end, those of all models
        states = [layer.mlp.fp8_meta["scaling_fwd"] for layer in model.model.layers]
        left.append([tensor.clone() for state in states for tensor in (state.scale, state.amax_history)])
    assert all(map(torch.equal, *left))


def in_place(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)


def in_place_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model.model.layers[1].mlp.fc1_weight.mul_(1.25)


def loaded(model: Any) -> None:
    model.load_state_dict({name: tensor * 1.25 for name, tensor in model.state_dict().items()})


def fused_step_without_training_mode(model: Any) -> None:
    """Evaluation between a backward pass and the step, whose kernel gives parameters no new version."""
    model(batch(), labels=batch()).loss.backward()
    logits(model)
    torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True).step()
    model.zero_grad()


def step_of_transformer_engines_optimizer(model: Any) -> None:
    from transformer_engine.pytorch.optimizers import FusedAdam

    model(batch(), labels=batch()).loss.backward()
    logits(model)
    FusedAdam(model.parameters(), lr=1e-2).step()
    model.zero_grad()


def written_through_projections(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data += 0.05
        layer.mlp.down_proj.weight.data.mul_(1.25)


def merged(model: Any) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    logits(model)
    adapted.merge_and_unload()


def there_and_back(model: Any) -> None:
    model.to("cpu")
    in_place(model)
    model.to(CUDA)


CHANGES = [
    in_place,
    in_place_in_inference_mode,
    loaded,
    fused_step_without_training_mode,
    step_of_transformer_engines_optimizer,
    written_through_projections,
    merged,
    there_and_back,
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_weights_are_quantized_again(change: Callable[[Any], None], precision: str) -> None:
    model = trained(precision)
    before = logits(model)
    change(model)
    expected = without_copies(model)
    assert not torch.equal(expected, before)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_in_between_makes_new_copies(precision: str) -> None:
    model = trained(precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(3):
        before = logits(model)
        model.train()(batch(), labels=batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        expected = without_copies(model)
        assert not torch.equal(expected, before)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_copy_of_a_model_quantizes_its_own_weights(precision: str, how: Callable[[Any], Any]) -> None:
    model = trained(precision)
    before = logits(model)
    other = how(model)
    assert tepatch.weight_copies(other).held == 0
    assert torch.equal(logits(other), before)
    in_place(other)
    assert torch.equal(logits(other), without_copies(other))
    assert torch.equal(logits(model), before)


def test_recipes_can_be_changed_and_changed_back() -> None:
    model = trained("fp8-current")
    for precision in ("fp8-block", "fp8", "fp8-current", "bf16", "fp8-block"):
        tepatch.set_precision(model, precision)
        expected = without_copies(model)
        assert torch.equal(logits(model), expected), precision
        assert torch.equal(logits(model), expected), precision


def test_autocasts_of_the_users_can_follow_each_other(spy: Spy) -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling

    model = build(None)
    spy.watch(model)
    for recipe in (Float8CurrentScaling(), Float8BlockScaling(), None, Float8CurrentScaling(), DelayedScaling()):
        context: Any = nullcontext() if recipe is None else te.autocast(enabled=True, recipe=recipe)
        other = copy.deepcopy(model)
        tepatch.set_precision(other, None, cache_weights=False)
        with torch.no_grad(), context:
            expected = other(batch(), use_cache=False).logits
            spy.count = 0
            found = [model(batch(), use_cache=False).logits for _ in range(3)]
        assert all(torch.equal(each, expected) for each in found), recipe
        # The end of an autocast that others have entered may update the scales of delayed scaling.
        times = {type(None): 0, DelayedScaling: 3}.get(type(recipe), 1)
        assert spy.count == times * MATRICES, recipe


def test_delayed_scaling_inside_an_autocast_with_gradients_gets_its_scales() -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    ours, theirs = build(None), build(None)
    tepatch.set_precision(theirs, None, cache_weights=False)
    recipe, outs = DelayedScaling(), {}
    for model in (ours, theirs):
        for _ in range(3):
            with te.autocast(enabled=True, recipe=recipe):  # gradients are on where it ends, and scales are updated
                outs[model] = logits(model)
    assert torch.equal(outs[ours], outs[theirs])


def test_a_teacher_in_delayed_scaling_gets_the_scales_that_training_a_student_updates() -> None:
    outs = []
    for cache_weights in (True, False):
        teacher, student = build("fp8"), build("fp8").train()
        tepatch.set_precision(teacher, "fp8", cache_weights=cache_weights)
        for _ in range(3):
            out = logits(teacher)
            student(batch(), labels=batch()).loss.backward()
        outs.append(out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adapters_on_frozen_weights(precision: str, spy: Spy) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = trained(precision)
    targets = ["q_proj", "gate_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets, init_lora_weights=False)).eval()
    expected = without_copies(model)
    spy.watch(model)
    assert all(torch.equal(logits(adapted), expected) for _ in range(3))
    assert spy.count == MATRICES
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), without_copies(adapted))
    adapted.merge_adapter()
    merged = logits(adapted)
    assert torch.equal(merged, without_copies(model))
    assert not torch.equal(merged, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_experts_are_quantized_once(precision: str, spy: Spy) -> None:
    pytest.importorskip("tepatch_mixtral", reason="needs tepatch-mixtral")
    torch.manual_seed(0)
    config = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    model = tepatch.build("mixtral", config, dtype=torch.bfloat16, backend="te", precision=precision).eval()
    tepatch.set_precision(model, precision, cache_weights=False)
    expected = [logits(model, batch(seed=seed)) for seed in (1, 2, 3)]
    tepatch.set_precision(model, precision)
    spy.watch(model)
    found = [logits(model, batch(seed=seed)) for seed in (1, 2, 3)]
    assert all(map(torch.equal, found, expected))
    assert spy.count == 3 * (2 + 2 * 4)
    cost = tepatch.weight_copies(model)
    assert cost.full <= cost.held <= 1.01 * cost.full
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.mul_(2)
    assert torch.equal(logits(model), without_copies(model))


def called_with_gradients(model: Any) -> None:
    model(batch(), use_cache=False).logits.sum()


ENDS: dict[str, Callable[[Any], Any]] = {
    "train": lambda model: model.train(),
    "with gradients": called_with_gradients,
    "in bf16": lambda model: tepatch.set_precision(model, "bf16"),
    "in another recipe": lambda model: tepatch.set_precision(model, "fp8-block"),
    "turned off": lambda model: tepatch.set_precision(model, "fp8-current", cache_weights=False),
}


def requested_bytes() -> int:
    """What tensors take, without what the allocator adds to each: up to 2 MiB."""
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


@pytest.mark.parametrize("end", ENDS)
def test_the_memory_is_what_is_told_and_is_freed(end: str) -> None:
    model = build("fp8-current", hidden_size=1024, intermediate_size=4096)
    tepatch.set_precision(model, "fp8-current", cache_weights=False)
    called_with_gradients(model)  # what is allocated once
    logits(model)
    gc.collect()
    before = requested_bytes()
    tepatch.set_precision(model, "fp8-current")
    logits(model)
    cost = tepatch.weight_copies(model)
    taken = requested_bytes() - before
    print(f"\n{cost}; allocated {taken / 2**20:.1f} MiB")
    assert cost.full <= cost.held <= 1.01 * cost.full
    assert cost.held <= taken <= 1.02 * cost.held
    ENDS[end](model)
    gc.collect()
    assert tepatch.weight_copies(model).held == 0
    assert requested_bytes() - before <= 0.02 * cost.held


def test_a_model_that_leaves_the_gpu_leaves_nothing_there() -> None:
    model = build("fp8-current")
    logits(model)
    gc.collect()
    before = torch.cuda.memory_allocated()
    cost = tepatch.weight_copies(model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    model.to("cpu")
    assert tepatch.weight_copies(model).held == 0
    assert before - torch.cuda.memory_allocated() >= weights + cost.held


def test_a_cuda_graph_follows_its_weights() -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    mlp, recipe = build(None).model.layers[0].mlp, Float8CurrentScaling()
    x = torch.randn(16, SHAPE["hidden_size"], device=CUDA, dtype=torch.bfloat16)

    def run() -> torch.Tensor:
        with torch.no_grad(), te.autocast(enabled=True, recipe=recipe):
            out: torch.Tensor = mlp(x)
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        graph.replay()
        assert torch.equal(captured, run())
        with torch.no_grad():
            mlp.fc1_weight.mul_(1.25)


@pytest.mark.filterwarnings("ignore")  # torch's, while it compiles
def test_compiled_models_quantize_once(spy: Spy) -> None:
    model = build("fp8-current")
    expected = logits(model)
    tepatch.set_precision(model, "fp8-current")
    spy.watch(model)
    compiled = torch.compile(model)
    found = [logits(compiled) for _ in range(3)]
    assert spy.count == MATRICES
    # Compiled elementwise code rounds at other places: a few ulps of bfloat16, and what FP8 makes of them.
    assert all(float((each - expected).norm() / expected.norm()) <= 2**-4 for each in found)
    in_place(model)
    changed = logits(compiled)
    assert spy.count == 2 * MATRICES
    assert float((changed - found[0]).norm() / found[0].norm()) > 2**-4
    torch.compiler.reset()


SEVEN_B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


def decoding(model: Any, rows: int, steps: int = 20) -> tuple[float, float]:
    """Milliseconds of a step on the clock, and of its kernels, after 128 tokens."""
    cache = DynamicCache(config=model.config)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    token = batch(rows, 1)

    def step() -> None:
        model(token, **{CACHE: cache}, use_cache=True)

    with torch.no_grad():
        model(batch(rows, 128), **{CACHE: cache}, use_cache=True)
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        start.record()
        for _ in range(steps):
            step()
        end.record()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            for _ in range(5):
                step()
            torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return start.elapsed_time(end) / steps, sum(event.device_time_total for event in kernels) / 5 / 1000


def test_a_decoding_step_is_faster() -> None:
    model = build("bf16", **SEVEN_B)
    print(
        f"\n8 layers of Llama-2-7B's shape, a step after 128 tokens, ms (kernels alone); {tepatch.weight_copies(model)}"
    )
    for precision in ("bf16", *PRECISIONS):
        for rows in (1, 64):
            tepatch.set_precision(model, precision, cache_weights=False)
            plain = decoding(model, rows)
            if precision == "bf16":
                print(f"bf16, batch {rows}: {plain[0]:.2f} ({plain[1]:.2f})")
                continue
            tepatch.set_precision(model, precision)
            kept = decoding(model, rows)
            print(
                f"{precision}, batch {rows}: {plain[0]:.2f} ({plain[1]:.2f}) quantizing at each step, "
                f"{kept[0]:.2f} ({kept[1]:.2f}) with copies; {tepatch.weight_copies(model)}"
            )
            assert kept[1] < plain[1]
