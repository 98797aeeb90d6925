"""Tracing and exporting of a patched model: one error, and nothing left behind; ``torch.compile`` takes it."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tepatch
from tepatch.errors import UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
IDS = torch.arange(5, 14)[None]


class Logits(nn.Module):
    """A model around another, as whoever exports writes it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, use_cache=False).logits
        return logits


def traced(model: Any) -> Any:
    return torch.jit.trace(Logits(model), (IDS,), check_trace=False)


def exported(model: Any) -> Any:
    return torch.export.export(Logits(model), (IDS,), strict=False).module()


def exported_strictly(model: Any) -> Any:
    return torch.export.export(Logits(model), (IDS,), strict=True).module()


def written_as_onnx(model: Any) -> Any:
    return torch.onnx.export(Logits(model), (IDS,), io.BytesIO(), dynamo=False)


@pytest.fixture
def folder(tiny_llama: Callable[..., Any], save_checkpoint: Callable[..., Path]) -> Path:
    return save_checkpoint(tiny_llama())


@pytest.mark.parametrize("record", [traced, exported, exported_strictly, written_as_onnx])
def test_a_patched_model_is_not_recorded(record: Callable[[Any], Any], folder: Path) -> None:
    model = tepatch.load("llama", folder, backend="reference")
    with torch.no_grad():
        expected = model(IDS).logits
        for part in (model, Inside(model)):
            with pytest.raises(UnsupportedError, match=r"can not be traced or exported"):
                record(part)
        assert torch.equal(model(IDS).logits, expected)


class Inside(nn.Module):
    """A model without its head, which has hooks of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": self.model(ids, use_cache=use_cache).last_hidden_state})


def test_a_layer_is_not_recorded_by_itself(folder: Path) -> None:
    layer = tepatch.load("llama", folder, backend="reference").model.layers[0]
    states = torch.zeros(1, 4, 64)
    with pytest.raises(UnsupportedError, match=r"torch\.jit\.trace: a patched model"):
        torch.jit.trace(layer, (states,), check_trace=False)
    with pytest.raises(UnsupportedError, match=r"torch\.export: a patched model"):
        torch.export.export(layer, (states,), strict=True)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # of transformers' own model
@pytest.mark.parametrize("record", [traced, exported, exported_strictly])
def test_what_is_saved_can_be_recorded_as_the_error_says(
    record: Callable[[Any], Any], folder: Path, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    tepatch.save(tepatch.load("llama", folder, backend="reference"), tmp_path / "saved")
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    logging.disable(logging.WARNING)
    with torch.no_grad():
        assert record(stock)(IDS).shape == (1, 9, 128)
    logging.disable(logging.NOTSET)


def test_a_compiled_model_runs(folder: Path) -> None:
    model = tepatch.load("llama", folder, backend="reference")
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(torch.compile(model, backend="eager")(IDS).logits, expected)
