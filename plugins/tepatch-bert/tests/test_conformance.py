"""BERT and RoBERTa through the conformance kit: bare, and under the heads that published checkpoints have."""

from __future__ import annotations

from typing import Any

from transformers import BertConfig, RobertaConfig

from tepatch.testing import Case, conformance_tests

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
GPU = {
    **TINY,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
}
REFUSE = [
    {"num_hidden_layers": 0},
    {"num_attention_heads": 3},
    {"is_decoder": True},
    {"is_decoder": True, "add_cross_attention": True},
    {"position_embedding_type": "relative_key"},
    {"chunk_size_feed_forward": 16},
    {"quantization_config": {"quant_method": "fp8"}},
]


test_bert = conformance_tests(
    "bert",
    [
        Case("masked-lm", BertConfig(**TINY), auto_class="AutoModelForMaskedLM", refuse=REFUSE, gpu=BertConfig(**GPU)),
        Case("texts", BertConfig(**TINY), auto_class="AutoModelForSequenceClassification"),
        Case("tokens", BertConfig(**TINY, hidden_act="relu"), auto_class="AutoModelForTokenClassification"),
        Case("bare", BertConfig(**TINY), auto_class="AutoModel"),
    ],
)
test_roberta = conformance_tests(
    "roberta",
    [
        Case(
            "masked-lm",
            RobertaConfig(**TINY),
            auto_class="AutoModelForMaskedLM",
            refuse=REFUSE,
            gpu=RobertaConfig(**GPU),
        ),
        Case("texts", RobertaConfig(**TINY), auto_class="AutoModelForSequenceClassification"),
    ],
)
