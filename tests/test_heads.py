"""Other classes than the checkpoint's own: bare models, heads, and models that wrap a family."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms, gamma, gradient_terms
from safetensors.torch import load_file, save_file

import tepatch
from tepatch.errors import PlanError, PluginError, ReplaceError
from tepatch.planning.stored import plan_from_json
from tepatch.verify import verify

CLASSES = {
    "AutoModel": "LlamaModel",
    "AutoModelForCausalLM": "LlamaForCausalLM",
    "AutoModelForSequenceClassification": "LlamaForSequenceClassification",
    "AutoModelForTokenClassification": "LlamaForTokenClassification",
    "AutoModelForQuestionAnswering": "LlamaForQuestionAnswering",
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
IDS = torch.randint(6, 128, (2, 9), generator=torch.Generator().manual_seed(5))
IMAGE = 5
"""The token that an image's features take the place of."""


def stock(auto_class: str, config: Any) -> Any:
    """A stock model in which no two tensors are alike."""
    import transformers

    model = getattr(transformers, auto_class).from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.1 + (1 if parameter.dim() == 1 else 0))
    return model.eval()


def llama(*, tie_word_embeddings: bool = False, **options: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**TEXT, num_labels=3, tie_word_embeddings=tie_word_embeddings, **options)


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16)
    return LlavaConfig(vision_config=vision, text_config=llama(), image_token_index=IMAGE, tie_word_embeddings=False)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """A stock model and the folder in which its own ``save_pretrained`` has put it."""

    def make(auto_class: str, config: Any = None) -> tuple[Any, Path]:
        model = stock(auto_class, llama() if config is None else config)
        folder = tmp_path / f"stock-{type(model).__name__}"
        model.save_pretrained(folder)
        return model, folder

    return make


def same(one: Any, other: Any) -> bool:
    """Whether two dicts have the same names, and bit for bit the same tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def base_of(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of a model's base model, in the base model's own names."""
    start = f"{model.base_model_prefix}."
    return {name.removeprefix(start): tensor for name, tensor in model.state_dict().items() if name.startswith(start)}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("auto_class", CLASSES)
def test_a_class_loads_its_own_checkpoint_and_gives_it_back(
    saved: Callable[..., Any], tmp_path: Path, auto_class: str
) -> None:
    theirs, folder = saved(auto_class)
    ours = tepatch.load("llama", folder)
    assert type(ours).__name__ == CLASSES[auto_class]
    with torch.no_grad():
        assert_close(ours(input_ids=IDS)[0], theirs(input_ids=IDS)[0], terms=forward_terms(theirs.config, 9))
    assert same(ours.state_dict(), theirs.state_dict())
    tepatch.save(ours, tmp_path / "saved")
    ours.save_pretrained(tmp_path / "pretrained")
    tepatch.convert("llama", folder, tmp_path / "te")
    tepatch.convert("llama", tmp_path / "te", tmp_path / "back")
    for name in ("saved", "pretrained", "back"):
        assert same(tensors_in(tmp_path / name), tensors_in(folder)), name
    assert same(tepatch.load("llama", tmp_path / "te").state_dict(), theirs.state_dict())


@pytest.mark.parametrize("auto_class", CLASSES)
def test_state_dicts_of_a_class_are_taken_and_losses_are_the_stock_models(
    saved: Callable[..., Any], auto_class: str
) -> None:
    theirs, _ = saved(auto_class)
    ours = tepatch.build("llama", theirs.config, auto_class=auto_class)
    assert not same(ours.state_dict(), theirs.state_dict())
    ours.eval().load_state_dict(theirs.state_dict())
    assert same(ours.state_dict(), theirs.state_dict())
    for model in (ours, theirs):
        model(input_ids=IDS)[0].float().square().mean().backward()
    found, expected = (model.get_input_embeddings().weight.grad for model in (ours, theirs))
    assert_close(found, expected, terms=gradient_terms(theirs.config, 9, 2 * 9))


def test_a_bare_model_takes_the_base_of_a_causal_checkpoint(saved: Callable[..., Any], tmp_path: Path) -> None:
    theirs, folder = saved("AutoModelForCausalLM")
    ours = tepatch.load("llama", folder, auto_class="AutoModel", drop=["lm_head.weight"])
    assert type(ours).__name__ == "LlamaModel"
    assert same(ours.state_dict(), theirs.model.state_dict())
    entry = ours.tepatch.plan.sources["lm_head.weight"]
    assert (entry.state, entry.note) == ("ignored", "dropped by the caller")
    assert "lm_head.weight: dropped by the caller" in str(ours.tepatch)
    tepatch.save(ours, tmp_path / "saved")
    ours.save_pretrained(tmp_path / "pretrained")
    for name in ("saved", "pretrained"):
        assert tensors_in(tmp_path / name).keys() == theirs.model.state_dict().keys()  # as LlamaModel has them
        again, told = type(theirs.model).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not told["missing_keys"]
        assert same(again.state_dict(), theirs.model.state_dict())


def test_a_bare_model_with_tied_embeddings_needs_nothing_dropped(saved: Callable[..., Any]) -> None:
    theirs, folder = saved("AutoModelForCausalLM", llama(tie_word_embeddings=True))
    assert same(tepatch.load("llama", folder, auto_class="AutoModel").state_dict(), theirs.model.state_dict())


def test_a_causal_model_with_tied_embeddings_loads_a_bare_checkpoint(saved: Callable[..., Any]) -> None:
    theirs, folder = saved("AutoModel", llama(tie_word_embeddings=True))
    ours = tepatch.load("llama", folder, auto_class="AutoModelForCausalLM")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert same(base_of(ours), theirs.state_dict())


@pytest.mark.parametrize("auto_class", [name for name in CLASSES if name.startswith("AutoModelFor")])
def test_a_head_model_takes_a_bare_checkpoint_and_says_what_is_fresh(
    saved: Callable[..., Any], tmp_path: Path, auto_class: str
) -> None:
    theirs, folder = saved("AutoModel")
    with pytest.raises(PlanError) as error:
        tepatch.load("llama", folder, auto_class=auto_class)
    import transformers

    names = stock(auto_class, llama()).state_dict()
    head = [name for name in names if not name.startswith(("model.", "transformer."))]
    assert all(name in str(error.value) for name in head)
    assert f"fresh={head}".replace('"', "'") in str(error.value)
    ours = tepatch.load("llama", folder, auto_class=auto_class, fresh=head)
    assert same(base_of(ours), theirs.state_dict())
    assert "not read but drawn" in str(ours.tepatch)
    assert all(name in ours.tepatch.plan.notes[0] for name in head)
    # What was saved is a checkpoint of the class, for transformers too.
    tepatch.save(ours, tmp_path / "saved")
    again, told = getattr(transformers, auto_class).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert same(again.state_dict(), ours.state_dict())


def test_a_fresh_head_is_drawn_as_transformers_draws_it(saved: Callable[..., Any]) -> None:
    _, folder = saved("AutoModel")
    config = llama(initializer_range=0.5)
    ours = tepatch.load("llama", folder, config=config, auto_class="AutoModelForTokenClassification", fresh=["score"])
    assert 0.4 < float(ours.score.weight.detach().std()) < 0.6  # 192 numbers
    assert torch.equal(ours.score.bias.detach(), torch.zeros(3))
    torch.manual_seed(1)
    first = tepatch.load("llama", folder, auto_class="AutoModelForTokenClassification", fresh=["score"])
    torch.manual_seed(1)
    second = tepatch.load("llama", folder, auto_class="AutoModelForTokenClassification", fresh=["score"])
    assert torch.equal(first.score.weight, second.score.weight)
    assert not torch.equal(first.score.weight, ours.score.weight)


def test_a_head_is_replaced_by_dropping_it_and_drawing_another(saved: Callable[..., Any]) -> None:
    theirs, folder = saved("AutoModelForSequenceClassification")
    config = copy.deepcopy(theirs.config)
    config.num_labels = 7
    wrong = {"config": config, "fresh": ["score.weight"]}
    with pytest.raises(PlanError, match="the checkpoint has these tensors"):
        tepatch.load("llama", folder, **wrong)
    ours = tepatch.load("llama", folder, **wrong, drop=["score.weight"])
    assert ours.score.weight.shape == (7, 64)
    assert "the checkpoint's own of these were dropped by the caller: score.weight" in ours.tepatch.plan.notes
    assert same(base_of(ours), base_of(theirs))


def test_a_question_answering_model_takes_a_causal_checkpoint(saved: Callable[..., Any]) -> None:
    theirs, folder = saved("AutoModelForCausalLM")  # 'model.', and not 'transformer.' as this class has it
    ours = tepatch.load(
        "llama", folder, auto_class="AutoModelForQuestionAnswering", drop=["lm_head"], fresh=["qa_outputs"]
    )
    assert same(base_of(ours), theirs.model.state_dict())
    assert {name.partition(".")[0] for name in ours.state_dict()} == {"transformer", "qa_outputs"}


def test_tensors_without_a_place_are_an_error_that_says_how_to_drop_them(saved: Callable[..., Any]) -> None:
    _, folder = saved("AutoModelForCausalLM")
    with pytest.raises(PlanError) as error:
        tepatch.plan("llama", folder, auto_class="AutoModelForSequenceClassification")
    assert "drop=['lm_head.weight']" in str(error.value)
    assert "fresh=['score.weight']" in str(error.value)


@pytest.mark.parametrize("argument", ["fresh", "drop"])
def test_names_that_mean_no_tensor_are_told(saved: Callable[..., Any], argument: str) -> None:
    _, folder = saved("AutoModelForCausalLM")
    for given, message in {
        ("lm_head.wieght",): "did you mean 'lm_head.weight'",
        ("lm_hea",): "no tensor of",  # the beginning of a name is no module
        (3,): "not a list of tensors",
        "lm_head.weight": "not a list of tensors",
    }.items():
        with pytest.raises(PlanError, match=message):
            tepatch.plan("llama", folder, **{argument: given})


def test_what_a_rule_needs_can_not_be_dropped(saved: Callable[..., Any]) -> None:
    _, folder = saved("AutoModelForCausalLM")
    with pytest.raises(PlanError, match=r"missing from the checkpoint\n.*self_attn.k_proj.weight"):
        tepatch.plan("llama", folder, drop=["model.layers.1.self_attn.k_proj"])


def test_a_part_of_a_fused_parameter_can_be_fresh(saved: Callable[..., Any]) -> None:
    theirs, folder = saved("AutoModelForCausalLM")
    name = "model.layers.1.self_attn.k_proj.weight"
    ours = tepatch.load("llama", folder, drop=[name], fresh=[name]).state_dict()
    wanted = theirs.state_dict()
    assert [key for key in wanted if not torch.equal(wanted[key], ours[key])] == [name]
    assert 0.01 < float(ours[name].std()) < 0.03


def test_a_checkpoint_of_parameters_is_of_the_class_that_it_was_converted_for(
    saved: Callable[..., Any], tmp_path: Path
) -> None:
    theirs, folder = saved("AutoModelForCausalLM")
    tepatch.convert("llama", folder, tmp_path / "te", auto_class="AutoModel", drop=["lm_head"])
    assert type(tepatch.load("llama", tmp_path / "te")).__name__ == "LlamaModel"
    tepatch.convert("llama", tmp_path / "te", tmp_path / "back")
    wanted = {name: tensor for name, tensor in tensors_in(folder).items() if name != "lm_head.weight"}
    assert same(tensors_in(tmp_path / "back"), wanted)  # in the checkpoint's spelling
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["LlamaModel"]
    again, told = type(theirs.model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not told["missing_keys"]
    assert same(again.state_dict(), theirs.model.state_dict())
    config = json.loads((tmp_path / "te" / "config.json").read_text())
    (tmp_path / "te" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert type(tepatch.load("llama", tmp_path / "te")).__name__ == "LlamaModel"
    with pytest.raises(PlanError, match="layout of the layers"):
        tepatch.load("llama", tmp_path / "te", fresh=["embed_tokens"])


def test_another_layout_is_read_for_another_class(saved: Callable[..., Any], tmp_path: Path) -> None:
    theirs, _ = saved("AutoModelForCausalLM")
    folder = tmp_path / "te_llama"
    theirs.config.architectures = ["LlamaForCausalLM"]
    theirs.config.save_pretrained(folder)
    inside = {
        "input_layernorm.weight": "self_attention.layernorm_qkv.layer_norm_weight",
        "self_attn.q_proj.weight": "self_attention.layernorm_qkv.query_weight",
        "self_attn.k_proj.weight": "self_attention.layernorm_qkv.key_weight",
        "self_attn.v_proj.weight": "self_attention.layernorm_qkv.value_weight",
        "self_attn.o_proj.weight": "self_attention.proj.weight",
        "post_attention_layernorm.weight": "layernorm_mlp.layer_norm_weight",
        "mlp.down_proj.weight": "layernorm_mlp.fc2_weight",
    }
    tensors = theirs.state_dict()
    for layer in range(2):
        at = f"model.layers.{layer}."
        tensors = {
            (at + inside[k.removeprefix(at)] if k.removeprefix(at) in inside else k): v for k, v in tensors.items()
        }
        gate, up = (tensors.pop(f"{at}mlp.{name}_proj.weight") for name in ("gate", "up"))
        tensors[f"{at}layernorm_mlp.fc1_weight"] = torch.cat([gate, up])
    save_file(tensors, folder / "model.safetensors")
    ours = tepatch.load("llama", folder, auto_class="AutoModel", drop=["lm_head"])
    assert ours.tepatch.layout == "te_llama"
    assert same(ours.state_dict(), theirs.model.state_dict())


def test_classes_are_given_by_name_or_as_classes(saved: Callable[..., Any]) -> None:
    import transformers

    _, folder = saved("AutoModelForSequenceClassification")
    for auto_class in (
        "LlamaForSequenceClassification",
        transformers.AutoModelForSequenceClassification,
        transformers.LlamaForSequenceClassification,
    ):
        assert str(tepatch.plan("llama", folder, auto_class=auto_class)) == str(tepatch.plan("llama", folder))


@pytest.mark.parametrize(
    ("auto_class", "message"),
    [
        ("AutoModelForNothing", "not a class that models are made by"),
        (dict, "not a class that models are made by"),
        ("MistralForCausalLM", "not a class for this config"),
        ("AutoModelForImageClassification", "has no model for model_type 'llama'"),
    ],
)
def test_a_class_that_is_none_for_the_config_is_refused(
    saved: Callable[..., Any], auto_class: Any, message: str
) -> None:
    _, folder = saved("AutoModel")
    with pytest.raises(PlanError, match=message):
        tepatch.load("llama", folder, auto_class=auto_class)


def test_verify_compares_the_logits_of_a_class_and_refuses_one_without(saved: Callable[..., Any]) -> None:
    theirs, folder = saved("AutoModelForSequenceClassification")
    result = verify("llama", folder, token_ids=IDS, dtype="float32")
    assert result.ours.max_error_relative < gamma(forward_terms(theirs.config, 9))
    _, folder = saved("AutoModelForQuestionAnswering")
    with pytest.raises(PlanError, match="no logits to compare"):
        verify("llama", folder, token_ids=IDS)


def test_a_plan_with_all_of_this_is_stored_and_read_back(saved: Callable[..., Any]) -> None:
    _, folder = saved("AutoModelForCausalLM")
    plan = tepatch.plan(
        "llama", folder, auto_class="AutoModelForSequenceClassification", drop=["lm_head"], fresh=["score"]
    )
    assert plan_from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert "every parameter outside 'model' x1 <- same" in str(plan)


# Models that wrap a family: the text of a Llava is a Llama.

WRAPPED = {"AutoModelForImageTextToText": "LlavaForConditionalGeneration", "AutoModel": "LlavaModel"}


def pictures() -> dict[str, torch.Tensor]:
    tokens = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8, 9], [0, 0, IMAGE, IMAGE, IMAGE, IMAGE, 11, 12]])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "pixel_values": pixels}


@pytest.mark.parametrize("auto_class", WRAPPED)
def test_a_model_that_wraps_a_llama_is_found_patched_and_saved_back(
    saved: Callable[..., Any], tmp_path: Path, auto_class: str
) -> None:
    theirs, folder = saved(auto_class, llava())
    ours = tepatch.load("auto", folder)
    assert type(ours).__name__ == WRAPPED[auto_class]
    assert ours.tepatch.patch == "llama"
    assert ours.tepatch.replaced.startswith("2 x LlamaDecoderLayer")
    real = pictures()["attention_mask"].bool()
    with torch.no_grad():
        mine, wanted = (model(**pictures())[0][real] for model in (ours, theirs))
    # Through the pictures' layers, for 4 patches and a class, and through the text's.
    terms = forward_terms(theirs.config.vision_config, 5) + forward_terms(theirs.config, 8)
    assert_close(mine, wanted, terms=terms)
    assert same(ours.state_dict(), theirs.state_dict())  # in memory: model.language_model.layers
    assert any(name.startswith("language_model.model.layers.") for name in tensors_in(folder))  # and on disk
    tepatch.save(ours, tmp_path / "saved")
    ours.save_pretrained(tmp_path / "pretrained")
    tepatch.convert("llama", folder, tmp_path / "te")
    tepatch.convert("llama", tmp_path / "te", tmp_path / "back")
    assert same(tensors_in(tmp_path / "saved"), tensors_in(folder))
    assert same(tensors_in(tmp_path / "back"), tensors_in(folder))
    assert same(tepatch.load("auto", tmp_path / "te").state_dict(), theirs.state_dict())
    for name in ("saved", "pretrained", "back"):
        again, told = type(theirs).from_pretrained(tmp_path / name, output_loading_info=True)
        assert told["missing_keys"] | told["unexpected_keys"] == set(), name
        assert same(again.state_dict(), theirs.state_dict())


def test_the_stock_part_of_a_wrapping_model_computes_gradients_as_it_did(saved: Callable[..., Any]) -> None:
    theirs, folder = saved("AutoModelForImageTextToText", llava())
    ours = tepatch.load("auto", folder).train()
    for model in (ours, theirs.train()):
        model(**pictures(), labels=pictures()["input_ids"]).loss.backward()
    vision, text = theirs.config.vision_config, theirs.config
    terms = gradient_terms(vision, 5, 2 * 5) + gradient_terms(text, 8, 2 * 8)
    for (name, one), other in zip(
        ours.model.vision_tower.named_parameters(), theirs.model.vision_tower.parameters(), strict=True
    ):
        if other.grad is not None:
            assert one.grad is not None, name
            if not name.endswith("k_proj.bias"):  # zero but for rounding: softmax does not see what all keys have
                assert_close(one.grad, other.grad, terms=terms, name=name)


def test_a_wrapping_model_is_built_as_transformers_builds_it(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    config = llava()
    ours = tepatch.build("llama", config, auto_class="AutoModelForImageTextToText")
    wanted = LlavaForConditionalGeneration(config).state_dict()
    held = ours.state_dict()
    assert held.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tensor.numel() >= 1000:  # enough to tell a standard deviation by
            assert float(held[name].std()) == pytest.approx(float(tensor.std()), rel=0.15), name
    ours.save_pretrained(tmp_path / "fresh")
    again, told = LlavaForConditionalGeneration.from_pretrained(tmp_path / "fresh", output_loading_info=True)
    assert not told["missing_keys"]
    assert same(again.state_dict(), held)


def test_older_spellings_of_a_stock_part_are_those_that_transformers_knows(
    saved: Callable[..., Any], tmp_path: Path
) -> None:
    theirs, folder = saved("AutoModelForImageTextToText", llava())
    older = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in tensors_in(folder).items()
    }
    save_file(older, folder / "model.safetensors", metadata={"format": "pt"})
    ours = tepatch.load("auto", folder)
    assert same(ours.state_dict(), theirs.state_dict())
    tepatch.save(ours, tmp_path / "saved")
    assert same(tensors_in(tmp_path / "saved"), older)


def test_a_wrapping_model_takes_names_as_it_has_them_in_memory(saved: Callable[..., Any], tmp_path: Path) -> None:
    theirs, folder = saved("AutoModelForImageTextToText", llava())
    save_file(theirs.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    assert same(tepatch.load("auto", folder).state_dict(), theirs.state_dict())


def other_wrappers() -> dict[str, Callable[[], Any]]:
    """Models around a Llama, whose names transformers changes in different ways, or not at all."""
    import transformers as hf

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    clip, text = hf.CLIPVisionConfig(**vision), llama()
    around = {"vision_config": clip, "text_config": text}
    return {
        "Llava": lambda: hf.LlavaForConditionalGeneration(llava()),
        "LlavaModel": lambda: hf.LlavaModel(llava()),
        "LlavaNext": lambda: hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(**around)),
        "VipLlava": lambda: hf.VipLlavaForConditionalGeneration(
            hf.VipLlavaConfig(**around, vision_feature_layers=[-1, -2])
        ),
        "Idefics3": lambda: hf.Idefics3ForConditionalGeneration(
            hf.Idefics3Config(vision_config=vision, text_config=text)
        ),
    }


@pytest.mark.parametrize("generation", ["on disk", "in memory", "with older parts"])
@pytest.mark.parametrize("kind", ["Llava", "LlavaModel", "LlavaNext", "VipLlava", "Idefics3"])
def test_save_pretrained_writes_the_names_of_the_stock_round_trip(kind: str, generation: str, tmp_path: Path) -> None:
    theirs = other_wrappers()[kind]()
    theirs.save_pretrained(tmp_path / "checkpoint")
    tensors = tensors_in(tmp_path / "checkpoint")
    if generation == "in memory":
        tensors = dict(theirs.state_dict())
    elif generation == "with older parts":
        tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): each for name, each in tensors.items()}
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    tepatch.convert("auto", tmp_path / "checkpoint", tmp_path / "te")
    type(theirs).from_pretrained(tmp_path / "checkpoint").save_pretrained(tmp_path / "stock")
    for source in ("checkpoint", "te"):
        ours = tepatch.load("auto", tmp_path / source)
        ours.save_pretrained(tmp_path / "ours")
        assert same(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "stock")), source
    held = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    ours.load_state_dict(tensors_in(tmp_path / "ours"))  # as Trainer does, which loses them in the stock model
    assert same(ours.state_dict(), held)
    inside = {f"inner.{name}": tensor * 2 for name, tensor in tensors_in(tmp_path / "ours").items()}
    torch.nn.ModuleDict({"inner": ours}).load_state_dict(inside)
    assert same(ours.state_dict(), {name: tensor * 2 for name, tensor in held.items()})
    ours.load_state_dict(held)
    copied = pickle.loads(pickle.dumps(ours))
    copied.save_pretrained(tmp_path / "copied")
    assert same(tensors_in(tmp_path / "copied"), tensors_in(tmp_path / "stock"))


def test_the_text_of_a_wrapping_checkpoint_is_loaded_alone(saved: Callable[..., Any]) -> None:
    theirs, folder = saved("AutoModelForImageTextToText", llava())
    ours = tepatch.load(
        "llama",
        folder,
        config=theirs.config.text_config,
        auto_class="AutoModelForCausalLM",
        drop=["vision_tower", "multi_modal_projector"],
    )
    assert same(base_of(ours), theirs.model.language_model.state_dict())
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)


@pytest.mark.filterwarnings("ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is deprecated:FutureWarning")
def test_adapters_have_the_stock_models_names_in_a_wrapping_model(saved: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    theirs, folder = saved("AutoModelForImageTextToText", llava())
    mine, stock_names = (
        peft.get_peft_model_state_dict(
            peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|gate_proj)"))
        )
        for model in (tepatch.load("auto", folder), theirs)
    )
    assert mine.keys() == stock_names.keys()
    assert len(mine) == 2 * 2 * 2


def test_a_model_that_wraps_another_type_is_refused(saved: Callable[..., Any]) -> None:
    from transformers import MistralConfig

    config = llava()
    config.text_config = MistralConfig(**TEXT, head_dim=16)
    _, folder = saved("AutoModelForImageTextToText", config)
    with pytest.raises(PlanError, match="llava, which wraps mistral"):
        tepatch.load("llama", folder)


def test_requirements_are_of_the_text_inside(saved: Callable[..., Any]) -> None:
    config = llava()
    config.text_config.hidden_act = "tanh"
    _, folder = saved("AutoModelForImageTextToText", config)
    with pytest.raises(PlanError, match="hidden_act"):
        tepatch.load("auto", folder)


def test_a_type_that_nobody_serves_is_told_by_its_own_name() -> None:
    from transformers import LlavaConfig

    with pytest.raises(PluginError, match="no patch for model_type 'llava'"):
        tepatch.build("auto", LlavaConfig(text_config={"model_type": "gpt2"}))


def test_a_class_without_the_layers_is_refused(saved: Callable[..., Any]) -> None:
    _, folder = saved("AutoModelForImageTextToText", llava())
    with pytest.raises((PlanError, ReplaceError)):
        tepatch.load("llama", folder, auto_class="CLIPVisionModel")
