"""The layers of BERT and RoBERTa, made of Transformer Engine's modules (or of the reference ones)."""

from __future__ import annotations

from torch import nn
from transformers import BertConfig, RobertaConfig
from transformers.models.bert import modeling_bert as hf
from transformers.models.roberta import modeling_roberta as hf_roberta

from tepatch.te.encoder import EncoderLayer


class BertLayer(EncoderLayer, hf.BertLayer):  # type: ignore[no-untyped-call]
    """``y = norm(x + dropout(attention(x)))``, then ``norm(y + dropout(mlp(y)))``."""

    def __init__(self, config: BertConfig, layer_idx: int = 0) -> None:
        nn.Module.__init__(self)  # not Hugging Face's: its parameters would only be in the way
        self.compose(config, layer_idx)


class RobertaLayer(EncoderLayer, hf_roberta.RobertaLayer):  # type: ignore[no-untyped-call]
    """The same: what RoBERTa does otherwise is in its embeddings and heads."""

    def __init__(self, config: RobertaConfig, layer_idx: int = 0) -> None:
        nn.Module.__init__(self)
        self.compose(config, layer_idx)
