"""Under another default device everything is done as without: nothing is made where the caller's tensors go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tepatch
from tepatch.certification import certify, check_certificate
from tepatch.errors import PlanError
from tepatch.verify import judge, verify

IDS = torch.arange(5, 14)[None]


@contextmanager
def block() -> Iterator[None]:
    with torch.device("meta"):
        yield


@contextmanager
def setting() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(params=[block, setting])
def elsewhere(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """A block in which tensors are made on the meta device."""
    made: Callable[[], Any] = request.param
    return made


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_models_are_made_as_without(
    elsewhere: Callable[[], Any], tiny_llama: Callable[..., Any], save_checkpoint: Callable[..., Path]
) -> None:
    stock = tiny_llama()
    folder = save_checkpoint(stock, drop=("lm_head.weight",))
    arguments: Any = {"backend": "reference", "fresh": ["lm_head"]}

    def models() -> list[Any]:
        torch.manual_seed(3)
        return [
            tepatch.load("llama", folder, **arguments),
            tepatch.build("llama", stock.config, backend="reference"),
        ]

    expected = models()
    with elsewhere():
        tepatch.plan("llama", folder, **arguments)
        found = models()
        after = torch.empty(1).device.type
    assert after == "meta", "the caller's own device is in force again"
    for model, wanted in zip(found, expected, strict=True):
        assert same(model.state_dict(), wanted.state_dict())
        assert same(dict(model.named_buffers()), dict(wanted.named_buffers()))
        assert torch.equal(model(IDS).logits, wanted(IDS).logits)


def test_checkpoints_are_written_and_compared_as_without(
    elsewhere: Callable[[], Any], tiny_llama: Callable[..., Any], save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    stock = tiny_llama(tie_word_embeddings=True)
    folder = save_checkpoint(stock, extra={"lm_head.weight": stock.lm_head.weight.detach().clone()})
    model = tepatch.load("llama", folder, backend="reference")
    with elsewhere():
        tepatch.convert("llama", folder, tmp_path / "te")
        tepatch.convert("llama", tmp_path / "te", tmp_path / "back")
        tepatch.save(model, tmp_path / "saved")
        model.save_pretrained(tmp_path / "pretrained")
        assert certify("llama", folder, tmp_path / "te", workers=1, token_ids=IDS.tolist()).passed
        assert check_certificate(tmp_path / "te").passed
        assert judge(verify("llama", folder, token_ids=IDS.tolist(), backend="reference")).passed
    for name in ("back", "saved"):
        assert same(load_file(tmp_path / name / "model.safetensors"), load_file(folder / "model.safetensors"))
    assert same(
        load_file(tmp_path / "pretrained" / "model.safetensors"),
        {k: v for k, v in stock.state_dict().items() if k != "lm_head.weight"},
    )


def test_a_block_that_takes_ties_apart_is_refused(
    tiny_llama: Callable[..., Any], save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from accelerate import init_empty_weights

    folder = save_checkpoint(tiny_llama(tie_word_embeddings=True))
    with init_empty_weights():
        for call in (tepatch.plan, tepatch.load):
            with pytest.raises(PlanError, match=r"call it outside of the block .*init_empty_weights"):
                call("llama", folder, backend="reference")
    tepatch.load("llama", folder, backend="reference")
