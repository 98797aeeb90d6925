"""PEFT on fused layers: what a user declares for ``q_proj`` or ``all-linear`` is what it is on the stock model.

Everywhere the yardstick is the stock Llama with the same weights and the same adapters, in float32.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from rounding import assert_close, forward_terms, gradient_terms
from transformers import MistralConfig, MistralForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

import tepatch
from tepatch.errors import UnsupportedError
from tepatch.te.projections import StandIn

peft = pytest.importorskip("peft", reason="needs peft")

pytestmark = [
    # The newest transformers has another name for it; the oldest that tepatch supports has only this one.
    pytest.mark.filterwarnings("ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is deprecated:FutureWarning"),
]

Make = Callable[..., Any]
Save = Callable[..., Path]

EPSILON = 0.1
"""Of AdamW, about as large as gradients are: else those that are nothing but rounding would be whole steps."""
BIASES = {"attention_bias": True, "mlp_bias": True}
TARGETS: dict[str, dict[str, Any]] = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear, no biases": {"target_modules": "all-linear"},
    "the mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "down alone": {"target_modules": ["down_proj"]},
    "o alone": {"target_modules": ["o_proj"]},
    "k and up": {"target_modules": ["k_proj", "up_proj"]},
    "a regular expression": {"target_modules": r".*\.self_attn\.(q|o)_proj"},
    "some layers": {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
}

WITH_BIASES = {"q and v", "all-linear", "down alone"}


def ids(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 128, (rows, 11), generator=torch.Generator().manual_seed(seed))


def adapters(model: Any) -> dict[str, torch.Tensor]:
    """The parameters that belong to adapters."""
    found = {n: p for n, p in model.named_parameters() if re.search(r"lora_|ia3_|oft_|modules_to_save", n)}
    assert found
    return found


def randomize(model: Any, seed: int = 1) -> None:
    """Changes every parameter of an adapter, so that none is zero or does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@dataclass
class Both:
    """The stock model and the patched one, of one checkpoint."""

    stock: Any
    ours: Any

    def each(self, change: Callable[[Any], Any]) -> Both:
        return Both(change(self.stock), change(self.ours))

    def adapted(self, *, seed: int = 1, config: type | None = None, **options: Any) -> Both:
        """With adapters of the same values; they change the output by far more than noise."""
        plain = self.logits(self.stock).clone()
        kind = config or peft.LoraConfig
        if kind is peft.LoraConfig:
            options = {"r": 4, "lora_alpha": 8, **options}
        out = self.each(lambda model: peft.get_peft_model(model, kind(**options)))
        out.share_adapters(seed)
        assert (self.logits(out.stock) - plain).abs().max() > 0.05 * plain.abs().max()
        return out

    def share_adapters(self, seed: int = 1) -> None:
        """The same values for the adapters of both models, all of them changed by something random."""
        randomize(self.stock, seed)
        expected, found = adapters(self.stock), adapters(self.ours)
        assert found.keys() == expected.keys()
        with torch.no_grad():
            for name, parameter in found.items():
                parameter.copy_(expected[name])

    @staticmethod
    def logits(model: Any, **arguments: Any) -> torch.Tensor:
        """In float32, in which Hugging Face's norms compute also where the model is in float64."""
        with torch.no_grad():
            out: torch.Tensor = model(ids(), **arguments).logits
        return out.float()

    def assert_same_logits(self, **arguments: Any) -> torch.Tensor:
        expected = self.logits(self.stock, **arguments)
        assert_close(self.logits(self.ours, **arguments), expected, terms=self.terms, name="logits")
        return expected

    def assert_same_gradients(self) -> None:
        losses = [model(ids(), labels=ids()).loss for model in (self.stock, self.ours)]
        assert_close(losses[1], losses[0], terms=self.terms, name="loss")
        for loss in losses:
            loss.backward()
        expected, found = ({n: p.grad for n, p in adapters(m).items() if p.requires_grad} for m in self.models)
        assert expected
        for name, gradient in expected.items():
            assert gradient is not None
            assert gradient.abs().max() > 0
            assert_close(found[name], gradient, terms=self.terms_of_gradients, name=name)

    def assert_same_training(self, before: dict[str, torch.Tensor], steps: int) -> None:
        """That adapters have changed alike. A step is ``g / (g + EPSILON)`` of the learning rate."""
        expected, found = (adapters(model) for model in self.models)
        for name, start in before.items():
            change = expected[name] - start
            assert change.abs().max() > 1e-4
            assert_close(found[name] - start, change, terms=steps * self.terms_of_gradients, condition=2, name=name)

    @property
    def models(self) -> tuple[Any, Any]:
        return self.stock, self.ours

    @property
    def terms(self) -> int:
        """What is added on the way to a logit, also in adapters: for each projection along a layer (QKV, O, gate and
        up, down) as many as it has columns, for the norm of DoRA or the rotation of OFT, and those of the rank.
        """
        config = self.stock.config
        return forward_terms(config, ids().shape[1]) + config.num_hidden_layers * 4 * (config.intermediate_size + 16)

    @property
    def terms_of_gradients(self) -> int:
        """Forth and back, through adapters too."""
        config = self.stock.config
        plain = gradient_terms(config, ids().shape[1], ids().numel())
        return plain + 2 * (self.terms - forward_terms(config, ids().shape[1]))


@pytest.fixture
def both(tiny_llama: Make, save_checkpoint: Save) -> Callable[..., Both]:
    def make(**config: Any) -> Both:
        stock = tiny_llama(**{"num_hidden_layers": 2, **config})
        return Both(stock, tepatch.load("llama", save_checkpoint(stock, shards=2), backend="reference"))

    return make


@pytest.mark.parametrize("name", TARGETS)
def test_lora_is_the_stock_models_lora(name: str, both: Callable[..., Both]) -> None:
    models = both(**BIASES if name in WITH_BIASES else {}).adapted(**TARGETS[name])
    models.assert_same_logits()
    models.assert_same_gradients()
    base = {n: p for n, p in models.ours.named_parameters() if n not in adapters(models.ours)}
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.values())


def test_a_module_in_whose_places_nobody_else_stands_computes_as_before(
    both: Callable[..., Both],
) -> None:
    models = both()
    untouched = models.logits(models.ours)
    assert_close(untouched, models.logits(models.stock), terms=models.terms)  # one product in the place of three
    adapted = models.adapted(target_modules=["q_proj"])
    layer = adapted.ours.base_model.model.model.layers[0]
    assert not layer.self_attn.qkv.places.are_plain
    assert layer.mlp.places.are_plain
    assert layer.self_attn.proj.places.are_plain


def test_projections_are_no_parameters_and_in_no_state_dict(both: Callable[..., Both]) -> None:
    models = both(**BIASES)
    paths = [path for path, module in models.ours.named_modules() if isinstance(module, StandIn)]
    norms = {n: m for n, m in models.stock.named_modules() if "layernorm" in n}
    linear = {n: m for n, m in models.stock.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert sorted(paths) == sorted([*norms, *linear])
    for path, module in norms.items():
        assert torch.equal(models.ours.get_submodule(path).weight, module.weight)
    for path, module in linear.items():
        projection = models.ours.get_submodule(path)
        assert torch.equal(projection.weight, module.weight)
        assert torch.equal(projection.bias, module.bias)
        assert (projection.in_features, projection.out_features) == (module.in_features, module.out_features)
        assert not list(projection.parameters(recurse=False))
    names = [name for name, _ in models.ours.named_parameters()]
    assert not any("q_proj" in name or "gate_proj" in name for name in names)
    assert models.ours.num_parameters() == models.stock.num_parameters()
    assert models.ours.state_dict().keys() == models.stock.state_dict().keys()


def test_hugging_faces_initialiser_leaves_a_projection_alone(both: Callable[..., Both]) -> None:
    model = both(**BIASES).ours
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, StandIn):
            model._init_weights(module)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_five_steps_of_training_are_the_stock_models(both: Callable[..., Both]) -> None:
    models = both().adapted(target_modules="all-linear")
    before = {name: parameter.detach().clone() for name, parameter in adapters(models.stock).items()}
    losses = []
    for model in models.models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=EPSILON)
        steps = []
        for _ in range(5):
            loss = model(ids(), labels=ids()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.detach())
        losses.append(torch.stack(steps))
    assert losses[0][-1] < losses[0][0]
    assert_close(losses[1], losses[0], terms=5 * models.terms_of_gradients)
    models.assert_same_training(before, steps=5)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "down_proj"], "bias": "all"},
    ],
    ids=["all-linear", "with the head", "dora", "with biases"],
)
def test_an_adapter_checkpoint_is_interchangeable(
    options: dict[str, Any], both: Callable[..., Both], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    plain = both(attention_bias=True)
    others = Both(copy.deepcopy(plain.stock), copy.deepcopy(plain.ours))
    models = plain.adapted(**options)
    with torch.no_grad():
        for model in models.models:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "bias" in name:
                    parameter.fill_(0.5)
    models.stock.save_pretrained(tmp_path / "stock")
    models.ours.save_pretrained(tmp_path / "ours")
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "ours"))
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    for base, adapter in ((others.ours, "stock"), (others.stock, "ours")):
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / adapter)
        assert_close(models.logits(loaded), models.logits(models.stock), terms=models.terms, name=adapter)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("biases", [{}, BIASES], ids=["no biases", "biases"])
def test_merging_and_unmerging_reach_the_fused_parameters(
    safe: bool, biases: dict[str, bool], both: Callable[..., Both]
) -> None:
    plain = both(**biases)
    before = {n: p.clone() for n, p in plain.ours.named_parameters()}
    models = plain.adapted(target_modules="all-linear", lora_bias=bool(biases))
    expected = models.assert_same_logits()
    models.each(lambda model: model.merge_adapter(safe_merge=safe))
    fused = models.ours.base_model.model.model.layers[1].mlp.fc1_weight
    assert (fused - before["model.layers.1.mlp.fc1_weight"]).abs().max() > 0.01
    assert_close(models.assert_same_logits(), expected, terms=models.terms, name="merged")
    models.each(lambda model: model.unmerge_adapter())
    assert_close(models.assert_same_logits(), expected, terms=models.terms, name="unmerged")
    merged_weight = 4  # its adapter's part included, it is so many times as large at the most
    assert_close(fused, before["model.layers.1.mlp.fc1_weight"], terms=2, condition=merged_weight)


@pytest.mark.parametrize("safe", [False, True])
def test_a_merged_and_unloaded_model_is_an_ordinary_patched_model_again(
    safe: bool, both: Callable[..., Both], tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    models = both().adapted(target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
    expected = models.assert_same_logits()
    merged = models.each(lambda model: model.merge_and_unload(safe_merge=safe))
    assert all(module.places.are_plain for module in merged.ours.modules() if hasattr(module, "places"))
    merged.ours.save_pretrained(tmp_path / "saved")
    tepatch.save(merged.ours, tmp_path / "streamed")
    for folder in ("saved", "streamed"):
        stock, told = LlamaForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(told.values()), told
        assert_close(models.logits(stock), expected, terms=models.terms)
        for name, tensor in merged.stock.state_dict().items():
            assert_close(stock.state_dict()[name], tensor, terms=4 + 2, condition=2, name=name)  # of rank 4


def test_unloading_without_merging_gives_the_base_model_back(both: Callable[..., Both]) -> None:
    plain = both()
    expected = plain.logits(plain.ours)
    models = plain.adapted(target_modules="all-linear")
    assert not torch.equal(models.logits(models.ours), expected)
    assert torch.equal(models.logits(models.ours.unload()), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_adapters_are_not_there(merged: bool, both: Callable[..., Both]) -> None:
    plain = both()
    base = plain.logits(plain.stock).clone()
    models = plain.adapted(target_modules="all-linear")
    expected = models.assert_same_logits()
    if merged:
        models.ours.merge_adapter()  # the first call without adapters unmerges, in the middle of the forward pass
    with models.ours.disable_adapter():
        assert_close(models.logits(models.ours), base, terms=models.terms)
    assert_close(models.logits(models.ours), expected, terms=models.terms)


def test_two_adapters_take_turns_and_serve_one_batch(both: Callable[..., Both]) -> None:
    models = both().adapted(target_modules=["q_proj", "v_proj", "gate_proj"])
    first = models.assert_same_logits()
    other = {"r": 2, "lora_alpha": 8, "target_modules": ["k_proj", "v_proj", "down_proj"]}
    models.each(lambda model: model.add_adapter("other", peft.LoraConfig(**other)))
    models.share_adapters(7)
    models.each(lambda model: model.set_adapter("other"))
    second = models.assert_same_logits()
    assert (first - second).abs().max() > 0.01 * first.abs().max()
    models.each(lambda model: model.set_adapter("default"))
    models.assert_same_logits()
    models.each(lambda model: model.eval())
    models.assert_same_logits(adapter_names=["other", "default"])
    models.assert_same_logits(adapter_names=["__base__", "other"])


MIXED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention": ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["k_proj"]}),
    "o alone": ({"target_modules": ["o_proj"]}, {"target_modules": ["o_proj"]}),
    "the mlp": ({"target_modules": ["up_proj"]}, {"target_modules": ["down_proj"]}),
    "one trained whole": (
        {"target_modules": ["k_proj"], "modules_to_save": ["q_proj", "o_proj"]},
        {"target_modules": ["embed_tokens", "gate_proj"], "modules_to_save": ["q_proj", "o_proj"]},
    ),
}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("padding", [[0] * 4 + [1] * 7, [1] * 8 + [0] * 3, [1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_a_padded_batch_of_mixed_adapters_is_the_stock_models(
    name: str, padding: list[int], use_cache: bool, both: Callable[..., Both]
) -> None:
    """Each row of the batch has its adapter: what stands in a place has to be given the rows of the batch."""
    first, second = MIXED[name]
    models = both().adapted(**first)
    models.each(lambda model: model.add_adapter("other", peft.LoraConfig(r=2, **second)))
    models.share_adapters(7)
    models.each(lambda model: model.eval())
    mask = torch.tensor([padding, [1] * 11, padding])
    for names in (["other", "default", "__base__"], ["default", "__base__", "other"]):
        given = {"attention_mask": mask, "adapter_names": names, "use_cache": use_cache}
        with torch.no_grad():
            expected, found = (model(ids(3), **given).logits[mask.bool()] for model in models.models)
        assert_close(found, expected, terms=models.terms)


def prompts(kind: str) -> Any:
    options = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}
    return {
        "prefix": lambda: peft.PrefixTuningConfig(**options),
        "projected prefix": lambda: peft.PrefixTuningConfig(**options, prefix_projection=True, encoder_hidden_size=16),
        "prompt": lambda: peft.PromptTuningConfig(**options),
        "p": lambda: peft.PromptEncoderConfig(**options, encoder_hidden_size=16),
    }[kind]()


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's name, not the newest one
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("padding", [[0] * 4 + [1] * 7, [0, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0]], ids=str)
@pytest.mark.parametrize("kind", ["prefix", "projected prefix", "prompt", "p"])
def test_virtual_tokens_before_padding_are_seen_where_a_token_follows(
    kind: str, padding: list[int], window: int | None, tiny_llama: Make, save_checkpoint: Save
) -> None:
    """The first token of a row that is padded on the left is predicted from padding, which sees the virtual tokens."""
    stock = tiny_llama(num_hidden_layers=2)
    if window is not None:
        weights = stock.state_dict()
        fields = {
            k: v for k, v in stock.config.to_dict().items() if k in MistralConfig().to_dict() and k != "model_type"
        }
        stock = MistralForCausalLM(MistralConfig(**fields, sliding_window=window)).eval()
        stock.load_state_dict(weights)
    models = Both(stock, tepatch.load(stock.config.model_type, save_checkpoint(stock), backend="reference"))
    mask = torch.tensor([padding, [1] * 11])
    results = []
    for model in models.models:
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, prompts(kind)).eval()
        trained = {name: each for name, each in adapted.named_parameters() if each.requires_grad}
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in sorted(trained):
                trained[name].copy_(torch.randn(trained[name].shape, generator=generator) * 0.5)
        loss = adapted(ids(), attention_mask=mask, labels=torch.where(mask.bool(), ids(), -100)).loss
        loss.backward()
        results.append((loss, torch.cat([trained[name].grad.flatten() for name in sorted(trained)])))
    (expected, wanted), (found, gradient) = results
    assert wanted.abs().max() > 0
    assert_close(found, expected, terms=models.terms, name="loss")
    assert_close(gradient, wanted, terms=models.terms_of_gradients, name="gradient")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": "all-linear", "init_lora_weights": "pissa"},
        {"target_modules": "all-linear", "init_lora_weights": "olora"},
    ],
    ids=["dora", "rslora", "pissa", "olora"],
)
def test_variants_of_lora_are_the_stock_models(options: dict[str, Any], both: Callable[..., Both]) -> None:
    models = both().adapted(**options)
    expected = models.assert_same_logits()
    models.assert_same_gradients()
    models.each(lambda model: model.merge_adapter())
    assert_close(models.assert_same_logits(), expected, terms=models.terms)


def test_an_initialisation_that_changes_the_base_weight_changes_the_fused_one(both: Callable[..., Both]) -> None:
    plain = both()
    expected = plain.logits(plain.stock).clone()
    before = plain.ours.model.layers[0].self_attn.qkv.weight.clone()
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights="pissa")
    adapted = peft.get_peft_model(plain.ours, config)
    after = adapted.base_model.model.model.layers[0].self_attn.qkv.weight
    assert torch.equal(after[:96], before[:96])
    assert (after[96:] - before[96:]).abs().max() > 0.01
    assert_close(plain.logits(adapted), expected, terms=plain.terms)  # what the weight has lost, the adapter has


@pytest.mark.parametrize("kind", ["IA3", "OFT"])
def test_a_tuner_that_changes_its_input_is_the_stock_models(kind: str, both: Callable[..., Both]) -> None:
    if kind == "IA3":
        options = {"target_modules": ["k_proj", "v_proj", "o_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        models = both().adapted(config=peft.IA3Config, **options)
    else:
        options = {"target_modules": ["q_proj", "up_proj", "down_proj"], "oft_block_size": 16, "r": 0}
        models = both().adapted(config=peft.OFTConfig, **options)
    expected = models.assert_same_logits()
    models.assert_same_gradients()
    models.each(lambda model: model.merge_adapter(safe_merge=True))
    assert_close(models.assert_same_logits(), expected, terms=models.terms)


def test_a_projection_that_is_trained_whole_is_a_layer_of_its_own(both: Callable[..., Both]) -> None:
    models = both().adapted(target_modules=["q_proj"], modules_to_save=["v_proj", "gate_proj"])
    models.assert_same_logits()
    models.assert_same_gradients()


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"transformers asks for PEFT {MIN_PEFT_VERSION}"
)
def test_transformers_own_integration_adds_and_loads_adapters(both: Callable[..., Both], tmp_path: Path) -> None:
    models = both()
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    models.each(lambda model: model.add_adapter(peft.LoraConfig(**config)))
    models.share_adapters()
    expected = models.assert_same_logits()
    models.stock.save_pretrained(tmp_path / "stock")
    models.ours.save_pretrained(tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == sorted(
        p.name for p in (tmp_path / "stock").iterdir()
    )
    others = both(seed=0)
    others.ours.load_adapter(str(tmp_path / "stock"))
    others.stock.load_adapter(str(tmp_path / "ours"))
    assert_close(others.assert_same_logits(), expected, terms=others.terms)
    models.ours.disable_adapters()
    models.stock.disable_adapters()
    assert (models.assert_same_logits() - expected).abs().max() > 0.01


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, both: Callable[..., Both]) -> None:
    models = both().adapted(target_modules="all-linear")

    def arrange(model: Any) -> None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()

    arrange(models.ours)
    models.stock.train()
    models.assert_same_gradients()


def test_generating_with_an_adapter_gives_the_stock_models_tokens(both: Callable[..., Both]) -> None:
    models = both().adapted(target_modules="all-linear")
    base = models.ours.base_model.model.generate  # through the wrapper and below it
    arguments = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids())}
    expected = models.stock.generate(input_ids=ids(), **arguments)
    assert torch.equal(models.ours.generate(input_ids=ids(), **arguments), expected)
    assert torch.equal(base(input_ids=ids(), **arguments), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_an_adapted_model_has_a_life_of_its_own(how: str, both: Callable[..., Both], tmp_path: Path) -> None:
    models = both(**BIASES).adapted(target_modules="all-linear")
    expected = models.assert_same_logits()
    if how == "deepcopy":
        copied = copy.deepcopy(models.ours)
    else:
        torch.save(models.ours, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        for parameter in models.ours.parameters():
            parameter.zero_()
    assert_close(models.logits(copied), expected, terms=models.terms)
    copied.merge_adapter()
    assert_close(models.logits(copied), expected, terms=models.terms)
    assert not any(parameter.any() for parameter in models.ours.parameters())


def test_trainer_trains_an_adapted_model(both: Callable[..., Both], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    models = both().adapted(target_modules="all-linear", lora_dropout=0.0)
    before = {name: parameter.detach().clone() for name, parameter in adapters(models.stock).items()}
    rows = [{"input_ids": row, "labels": row} for row in ids(rows=12, seed=3)]
    for name, model in zip(("stock", "ours"), models.models, strict=True):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=3,
            save_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            adam_epsilon=EPSILON,
            seed=5,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=name == "ours",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    models.assert_same_training(before, steps=3)
    saved = (tmp_path / "ours" / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
    assert len(saved) == (tmp_path / "stock" / "checkpoint-3" / "adapter_model.safetensors").stat().st_size


def test_autocast_computes_what_it_computes_on_the_stock_model(both: Callable[..., Both]) -> None:
    models = both().adapted(target_modules="all-linear")
    exact = models.logits(models.stock)
    with torch.autocast("cpu", torch.bfloat16):
        stock, ours = (models.logits(model) for model in models.models)
    ours_error, stock_error = ((x - exact).norm() / exact.norm() for x in (ours, stock))
    assert 0 < ours_error <= 1.5 * stock_error


def test_moving_to_another_dtype_keeps_projections_at_the_current_parameters(both: Callable[..., Both]) -> None:
    models = both().adapted(target_modules=["q_proj", "up_proj"])
    models.each(lambda model: model.double())
    projection = models.ours.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert projection.weight.dtype == torch.float64
    models.assert_same_logits()
    models.each(lambda model: model.merge_adapter())
    models.assert_same_logits()


@pytest.mark.parametrize(
    "rule",
    [
        "self_attn.proj.weight: {of: self_attn.o_proj.weight, transpose: true}",
        "self_attn.proj.bias: {of: self_attn.o_proj.bias, scale: 2}",
    ],
    ids=["transposed", "with a scaled bias"],
)
def test_a_layer_that_does_not_lie_in_whole_rows_says_so_by_its_name(
    rule: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    head = "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\nparameters:\n  model.layers.{layer}:\n"
    (tmp_path / "changed.yaml").write_text(f"{head}    {rule}\n")
    folder = save_checkpoint(tiny_llama(**BIASES))
    model = tepatch.load("llama", folder, backend="reference", mapping=tmp_path / "changed.yaml")
    assert model.state_dict().keys() == tiny_llama(**BIASES).state_dict().keys()
    absent = model.model.layers[0].self_attn.o_proj
    copy.deepcopy(model)(ids())
    asked: list[Callable[[], Any]] = [
        lambda: absent.weight,
        lambda: absent(torch.zeros(1, 64)),
        lambda: list(absent.parameters()),
        lambda: absent.requires_grad_(False),
        lambda: peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"])),
        lambda: peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"])),
    ]
    for ask in asked:
        with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.self_attn\.o_proj: .* can not be shown"):
            ask()


def test_training_a_bias_by_itself_is_refused(both: Callable[..., Both]) -> None:
    models = both(**BIASES)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.self_attn\.q_proj: the bias .* by itself"):
        peft.get_peft_model(models.ours, peft.LoraConfig(target_modules=["q_proj"], bias="lora_only"))


def test_a_state_dict_of_an_adapted_model_has_the_stock_models_names(both: Callable[..., Both]) -> None:
    models = both(**BIASES).adapted(target_modules=["q_proj", "down_proj"])
    expected, found = (model.state_dict() for model in models.models)
    assert found.keys() == expected.keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias" in found
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    changed = {name: tensor + 1 for name, tensor in expected.items()}
    assert not any(models.ours.load_state_dict(changed))
    assert all(torch.equal(tensor, changed[name]) for name, tensor in models.ours.state_dict().items())


def test_a_model_with_fresh_weights_takes_adapters_too(tiny_llama: Make) -> None:
    model = tepatch.build("llama", tiny_llama().config, backend="reference")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert len([name for name in adapters(adapted) if "lora_A" in name]) == 7 * 3
    adapted(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for n, p in adapters(adapted).items() if "lora_B" in n)
