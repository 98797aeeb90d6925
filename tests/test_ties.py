"""A tied tensor has two names, and a checkpoint may have it under either: that one is read, and comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

import tepatch
from tepatch.certification import certify
from tepatch.errors import CheckpointError, PlanError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.arange(5, 14)[None]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True))


def gemma() -> Any:
    """A head is tied by default, and nothing in the mapping's family file says so."""
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**TEXT, head_dim=16))


def bert() -> Any:
    """Two ties: of the weight with one below the base, and of the bias with one beside it."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**TEXT, max_position_embeddings=64))


def llava() -> Any:
    """A language model inside another, whose old checkpoints have other prefixes."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16)
    text = LlamaConfig(**TEXT, tie_word_embeddings=True)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=120, tie_word_embeddings=True)
    return LlavaForConditionalGeneration(config)


MODELS = {
    "llama": (llama, {EMBED: HEAD}),
    "gemma": (gemma, {EMBED: HEAD}),
    "bert": (
        bert,
        {
            "bert.embeddings.word_embeddings.weight": "cls.predictions.decoder.weight",
            "cls.predictions.bias": "cls.predictions.decoder.bias",
        },
    ),
    "llava": (llava, {"language_model.model.embed_tokens.weight": "language_model.lm_head.weight"}),
}
"""Models with tied tensors, and their two names in a checkpoint: as transformers writes them, and the other."""


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Any, other: Any) -> bool:
    """Whether two dicts have the same names, and bit for bit the same tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def load(folder: Path, **arguments: Any) -> Any:
    return tepatch.load("auto", folder, backend="reference", **arguments)


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, Path]:
    """A stock model, the folder that transformers writes of it, and one with each tied tensor under its other name."""
    make, names = MODELS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    usual, other = tmp_path / "usual", tmp_path / "other"
    for folder in (usual, other):
        model.save_pretrained(folder)
    stored = tensors_in(usual)
    assert names.keys() <= stored.keys()
    save_file({names.get(name, name): tensor for name, tensor in stored.items()}, other / "model.safetensors")
    return model, usual, other


def test_a_tied_tensor_is_read_under_either_name(case: tuple[Any, Path, Path]) -> None:
    stock, usual, other = case
    model, expected = load(other), load(usual)
    assert same(model.state_dict(), expected.state_dict())
    assert same(model.state_dict(), stock.state_dict())
    assert same(dict(model.named_parameters()), dict(expected.named_parameters()))  # and are one where they are one
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    notes = [note for note in tepatch.plan("auto", other).notes if "under its other name" in note]
    assert len(notes) == len(tensors_in(other).keys() - tensors_in(usual).keys())
    assert all(note in model.tepatch.plan.notes for note in notes)
    assert not any("other name" in note for note in expected.tepatch.plan.notes)


def test_it_comes_back_under_the_name_that_it_had(case: tuple[Any, Path, Path], tmp_path: Path) -> None:
    stock, usual, other = case
    tepatch.convert("auto", other, tmp_path / "te")
    tepatch.convert("auto", tmp_path / "te", tmp_path / "back")
    tepatch.save(load(other), tmp_path / "saved")
    for folder in (usual, other):
        load(folder).save_pretrained(tmp_path / f"pretrained-{folder.name}")
    for name in ("back", "saved"):
        assert same(tensors_in(tmp_path / name), tensors_in(other)), name
        loaded, info = type(stock).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert same(loaded.state_dict(), stock.state_dict()), name
    assert same(
        tensors_in(tmp_path / "pretrained-other"), tensors_in(tmp_path / "pretrained-usual")
    )  # transformers' own
    assert same(load(tmp_path / "te").state_dict(), stock.state_dict())


def test_it_is_one_tensor_in_a_certificate(case: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, usual, other = case
    folders = [usual, other]
    for folder in (usual, other):
        folders.append(tmp_path / f"{folder.name}-te")
        tepatch.convert("auto", folder, folders[-1])
    for source in folders:
        for destination in folders:
            if source is not destination:
                certificate = certify("auto", source, destination, write=False)
                assert certificate.passed, (source, destination, certificate.problems)
                assert {row.status for row in certificate.tensors} == {"equal"}
    tensors = tensors_in(other)
    name = next(name for name in tensors if name not in tensors_in(usual))
    tensors[name].view(-1)[3] += 1
    save_file(tensors, other / "model.safetensors")
    for pair in ((usual, other), (other, usual), (folders[2], other), (other, folders[3])):
        certificate = certify("auto", *pair, write=False)
        assert [row.status for row in certificate.tensors if row.status != "equal"] == ["differs"]


@pytest.fixture
def tied(tmp_path: Path) -> tuple[Any, Path]:
    """A Llama, and what ``safetensors.torch.save_model`` keeps of it."""
    torch.manual_seed(0)
    model = llama().eval()
    model.save_pretrained(tmp_path / "other")
    save_model(model, str(tmp_path / "other" / "model.safetensors"), metadata={"format": "pt"})
    assert HEAD in tensors_in(tmp_path / "other")
    assert EMBED not in tensors_in(tmp_path / "other")
    return model, tmp_path / "other"


def test_under_both_names_it_is_one_and_a_copy(tied: tuple[Any, Path]) -> None:
    stock, folder = tied
    tensors = tensors_in(folder)
    save_file({**tensors, EMBED: tensors[HEAD].clone()}, folder / "model.safetensors")
    assert load(folder).tepatch.plan.sources[HEAD].state == "redundant"
    # Without the first, the copy is read.
    assert same(load(folder, drop=[EMBED]).state_dict(), stock.state_dict())
    save_file({**tensors, EMBED: tensors[HEAD] + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        load(folder)


def test_what_is_there_under_its_other_name_is_not_drawn(tied: tuple[Any, Path]) -> None:
    stock, folder = tied
    with pytest.raises(PlanError, match="the checkpoint has these tensors") as error:
        load(folder, fresh=[EMBED])
    assert f"drop=['{HEAD}']" in str(error.value)
    model = load(folder, fresh=[EMBED], drop=[HEAD])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, stock.lm_head.weight)


@pytest.mark.parametrize("shape", [(127, 64), (64, 128)])
def test_its_shape_is_checked_under_its_other_name(tied: tuple[Any, Path], shape: tuple[int, int]) -> None:
    _, folder = tied
    save_file({**tensors_in(folder), HEAD: torch.zeros(shape)}, folder / "model.safetensors")
    with pytest.raises(PlanError) as error:
        tepatch.plan("auto", folder)
    assert len(error.value.problems) == 1
    assert "wrong shape" in str(error.value)
    assert HEAD in str(error.value)


def test_of_an_untied_model_both_are_needed(tied: tuple[Any, Path]) -> None:
    _, folder = tied
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(PlanError, match="1 tensor missing") as error:
        tepatch.plan("auto", folder)
    assert EMBED in str(error.value)


def test_what_is_tied_no_longer_is_saved_under_both_names(tied: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = tied
    model = load(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    tepatch.save(model, tmp_path / "saved")
    tensors = tensors_in(tmp_path / "saved")
    assert torch.equal(tensors[HEAD], model.lm_head.weight)
    assert torch.equal(tensors[EMBED], model.model.embed_tokens.weight)
    assert same(load(tmp_path / "saved").state_dict(), model.state_dict())
