"""BERT and RoBERTa for tepatch: Transformer Engine layers in Hugging Face's own ``BertModel``, under every head."""

from __future__ import annotations

from collections.abc import Iterable

import tepatch

__all__ = ["tepatch_patches"]


@tepatch.hookimpl
def tepatch_patches() -> Iterable[tepatch.Patch]:
    yield tepatch.Patch(
        name="bert",
        model_types=("bert",),
        replace={"transformers.models.bert.modeling_bert:BertLayer": "tepatch_bert.layer:BertLayer"},
        mapping="tepatch_bert:bert.tepatch.yaml",
        layouts={"legacy": "tepatch_bert:legacy.tepatch.yaml"},
        summary="BERT encoders, bare and with heads (masked LM, classification of texts and tokens, ...)",
    )
    yield tepatch.Patch(
        name="roberta",
        model_types=("roberta",),
        replace={"transformers.models.roberta.modeling_roberta:RobertaLayer": "tepatch_bert.layer:RobertaLayer"},
        mapping="tepatch_bert:roberta.tepatch.yaml",
        summary="RoBERTa encoders, bare and with heads",
    )
