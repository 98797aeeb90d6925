"""What is special to BERT: old names of norms, dropout, packed rows, what is a decoder's, and names others look for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    DynamicCache,
    LlamaModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

import tepatch
from tepatch.errors import UnsupportedError
from tepatch.testing.cases import cache_name

CACHE = str(cache_name(LlamaModel.forward))
"""What models call their cache in this version of transformers."""

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TERMS = 3 * (forward_terms(BertConfig(**TINY), 12) + 4 * 64)
"""To the logits of up to 12 tokens, the norm of embeddings and what is before the head included, and back again."""
FAMILIES = {"bert": (BertConfig, BertForMaskedLM), "roberta": (RobertaConfig, RobertaForMaskedLM)}
Pair = Callable[..., tuple[Any, Any]]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Makes Hugging Face's model and ours with the same random weights: ``pair("bert", change=..., **config)``.

    ``change`` gets the checkpoint's tensors and gives those that are written in their place.
    """

    def make(family: str, *, change: Any = None, **config: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        make_config, make_model = FAMILIES[family]
        stock = make_model(make_config(**{**TINY, **config}))
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path / "checkpoint"
        stock.save_pretrained(folder)
        if change is not None:
            file = folder / "model.safetensors"
            save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return stock.eval(), tepatch.load(family, folder, backend="reference", progress=False)

    return make


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert_close(ours, theirs, terms=TERMS)


def test_gamma_and_beta_are_read_and_are_weight_and_bias_in_the_model(pair: Pair, tmp_path: Path) -> None:
    def as_first_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {}
        for name, tensor in tensors.items():
            path, _, last = name.rpartition("LayerNorm.")
            renamed[f"{path}{old[f'LayerNorm.{last}']}" if path else name] = tensor
        return {**renamed, "bert.embeddings.position_ids": torch.arange(64)[None]}

    stock, ours = pair("bert", change=as_first_published)
    assert_same(ours(tokens()).logits, stock(tokens()).logits)
    expected = stock.state_dict()
    state = ours.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    tepatch.save(ours, tmp_path / "saved")
    again = BertForMaskedLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        ("BertForMaskedLM", {"drop": ["bert.pooler", "cls.seq_relationship"]}),
        ("BertForPreTraining", {"auto_class": "AutoModelForPreTraining"}),
        ("BertModel", {"auto_class": "AutoModel", "drop": ["cls"]}),
        ("BertForTokenClassification", {"fresh": ["classifier"], "drop": ["cls", "bert.pooler"]}),
    ],
)
def test_a_checkpoint_of_the_pretraining_serves_every_head(cls: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    """Google's own name BertForMaskedLM, and hold the pooler and the other head of the pretraining too."""
    BertForPreTraining(BertConfig(**TINY)).save_pretrained(tmp_path)
    arguments = {"auto_class": cls, **arguments}
    model = tepatch.load("bert", tmp_path, backend="reference", progress=False, **arguments)
    assert type(model).__name__ == cls
    expected = type(model).from_pretrained(tmp_path).state_dict()
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items() if name != "classifier.weight")


@pytest.mark.parametrize("start", ["", "prefix", "module.", "student."])
@pytest.mark.parametrize("cls", [BertModel, RobertaModel])
def test_positions_that_old_versions_wrote_are_ignored_under_any_prefix(cls: Any, start: str, tmp_path: Path) -> None:
    stock = cls(cls.config_class(**TINY))
    stock.save_pretrained(tmp_path / "a")
    tensors = {**load_file(tmp_path / "a" / "model.safetensors"), "embeddings.position_ids": torch.arange(64)[None]}
    start = f"{cls.base_model_prefix}." if start == "prefix" else start
    renamed = {start + name: tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = tepatch.load("auto", tmp_path / "a", backend="reference", progress=False)
    expected, state = stock.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert [entry.note for entry in model.tepatch.plan.sources.values() if entry.state == "ignored"]
    tepatch.convert("auto", tmp_path / "a", tmp_path / "te")
    tepatch.convert("auto", tmp_path / "te", tmp_path / "back")
    back = cls.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


def test_a_config_alone_makes_an_encoder() -> None:
    model = tepatch.build("bert", BertConfig(**TINY), backend="reference")
    assert isinstance(model, BertForMaskedLM)
    assert float(model.bert.encoder.layer[1].fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


DROPOUTS: dict[str, dict[str, float]] = {
    "hidden states": {"hidden_dropout_prob": 0.3},
    "weights of attention": {"attention_probs_dropout_prob": 0.3},
    "both": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.4},
}


@pytest.mark.parametrize("what", DROPOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_hugging_face_drops_is_dropped(family: str, what: str, pair: Pair) -> None:
    """The same numbers are drawn, in the same places: of attention, of what is added, of embeddings."""
    models = pair(family, **DROPOUTS[what])
    logits = []
    for model in models:
        evaluated = model(tokens()).logits
        torch.manual_seed(7)
        logits.append(model.train()(tokens()).logits)
        assert not torch.allclose(logits[-1], evaluated, rtol=0.1), "dropout changes something"
    assert_same(logits[1], logits[0])


def test_attention_goes_both_ways_also_where_others_make_the_mask(pair: Pair) -> None:
    stock, ours = pair("bert")
    ours.config._attn_implementation = "sdpa"  # which makes none where there is nothing to hide
    assert_same(ours(tokens()).logits, stock(tokens()).logits)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0
    keep = mask.bool()
    ours_padded, theirs = (model(tokens(), attention_mask=mask).logits[keep] for model in (ours, stock))
    assert_same(ours_padded, theirs)


def test_packed_texts_do_not_see_each_other(pair: Pair) -> None:
    """As for flash attention: where each begins is told, and they lie in one row."""
    stock, ours = pair("bert")
    texts = [tokens(1, 5), tokens(1, 9)[:, 2:]]
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = ours(
        torch.cat(texts, dim=1),
        position_ids=torch.tensor([[*range(5), *range(7)]]),
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
    )
    assert_same(packed.logits, torch.cat([stock(text).logits for text in texts], dim=1))


def test_checkpointed_layers_have_the_same_gradients(pair: Pair) -> None:
    _, ours = pair("bert")
    gradients = []
    for is_checkpointed in (False, True):
        ours.train()
        if is_checkpointed:
            enable = getattr(ours, "activation_checkpointing_enable", None) or ours.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        ours.zero_grad()
        ours(tokens(), labels=tokens()).loss.backward()
        gradients.append(ours.bert.encoder.layer[0].fc1.weight.grad)
    assert gradients[0].abs().max() > 0
    assert_same(*gradients)


@pytest.mark.parametrize(
    ("name", "value"),
    [("encoder_hidden_states", torch.zeros(2, 12, 64)), (CACHE, DynamicCache())],
)
def test_what_only_a_decoder_has_is_refused(name: str, value: Any, pair: Pair) -> None:
    _, ours = pair("bert")
    with pytest.raises(UnsupportedError, match=rf"{name}: these layers are an encoder's"):
        ours.bert(tokens(), **{name: value})


def test_adapters_find_the_names_of_the_stock_layers(pair: Pair) -> None:
    peft = pytest.importorskip("peft")
    logits = []
    for model in pair("bert"):
        config = peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, config)
        values = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
        with torch.no_grad():
            for name in sorted(values):
                values[name].copy_(torch.randn_like(values[name]) * 0.1)
        logits.append((sorted(values), adapted(tokens()).logits))
    (their_names, theirs), (our_names, ours) = logits
    assert any("attention.self.query" in name for name in our_names)
    assert our_names == their_names
    assert_same(ours, theirs)


def test_the_rule_by_which_scripts_for_bert_spare_norms_finds_the_same_elements(pair: Pair) -> None:
    counts = []
    for model in pair("bert"):
        named = model.named_parameters()
        spared = [p.numel() for name, p in named if any(part in name for part in ("bias", "LayerNorm.weight"))]
        counts.append(sum(spared))
    assert counts[0] == counts[1]
