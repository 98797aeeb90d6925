"""The interface of NVIDIA's te_llama example, over tepatch's engine: changing the import is the whole migration.

What differs is what was wrong: rope base and scaling follow the config, masks and caches count, single-file
checkpoints load, and a tensor that is missing or left over is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama as hf

import tepatch
from tepatch.replace import Replacement
from tepatch_llama.layer import LlamaDecoderLayer, LlamaRotaryEmbedding, standalone

PATCH = "llama"


@contextmanager
def replace_decoder(
    te_decoder_cls: type[nn.Module] = LlamaDecoderLayer, *, ignores: Mapping[str, str] | None = None
) -> Iterator[Replacement]:
    """Build Llama models with ``te_decoder_cls`` for a decoder layer, inside the block and in this thread only.

    With tepatch's own layer the rotary module is replaced too, so that angles stay in float32. Yields the report
    of ``tepatch.replace_layers``; raises ``ReplaceError`` if nothing was built, and ``UnsupportedError`` for
    ``from_pretrained`` inside the block: it knows nothing of the patched names. Weights are fresh.

    ``ignores`` says which parameters of transformers' layer another ``te_decoder_cls`` need not take, and why: the
    layer of NVIDIA's example drops the cache and the positions in ``*args, **kwargs``, and is refused without.
    """
    with tepatch.replace_layers({hf.LlamaDecoderLayer: te_decoder_cls}, ignores=ignores or {}) as report:
        if te_decoder_cls is LlamaDecoderLayer:
            token = standalone.set(True)
            try:
                with tepatch.replace_layers({hf.LlamaRotaryEmbedding: LlamaRotaryEmbedding}, require=False):
                    yield report
            finally:
                standalone.reset(token)
        else:
            yield report


class TELlamaForCausalLM:
    """Makes real ``LlamaForCausalLM`` models with Transformer Engine layers; never has instances of its own."""

    def __new__(cls, config: LlamaConfig) -> LlamaForCausalLM:  # type: ignore[misc]
        """A model with fresh weights, initialised as Hugging Face would: ``tepatch.build("llama", config)``."""
        return cast(LlamaForCausalLM, tepatch.build(PATCH, config))

    @classmethod
    def from_pretrained_local(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        config: LlamaConfig | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> LlamaForCausalLM:
        """Load a checkpoint: ``tepatch.load("llama", path, config=config, dtype=torch_dtype)``.

        ``torch_dtype`` and ``dtype`` mean the same (default: the config's). Other arguments are those of
        ``tepatch.load``, and so are the errors.
        """
        wanted = torch_dtype if torch_dtype is not None else dtype
        dtype = "auto" if wanted is None else wanted
        model = tepatch.load(PATCH, pretrained_model_name_or_path, config=config, dtype=dtype, **kwargs)
        return cast(LlamaForCausalLM, model)
