"""Layers compute on their own GPU, on a stand-in for torch's current one: a number for each thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from tepatch.hf import current_gpu

MINE = threading.local()


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    MINE.device = 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: MINE.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(MINE, "device", device))
    monkeypatch.setattr(current_gpu, "_gpu_of", lambda layer: layer.gpu)


class Layer(nn.Module):
    def __init__(self, gpu: int | None, inside: Any = None) -> None:
        super().__init__()
        self.gpu, self.inside, self.seen = gpu, inside, list[int]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(torch.cuda.current_device())
        return x if self.inside is None else self.inside(x)


def model_of(*layers: Layer) -> Any:
    model = nn.Sequential(*layers)
    model._no_split_modules = ["Layer"]  # type: ignore[assignment]
    current_gpu.follow_weights(model)  # type: ignore[arg-type]
    return model


def test_each_layer_computes_on_its_gpu_and_leaves_the_current_one_as_it_was() -> None:
    first, second, none = Layer(1), Layer(0), Layer(None)
    model_of(first, second, none)(torch.zeros(1))
    assert (first.seen, second.seen, none.seen) == ([1], [0], [0])
    assert torch.cuda.current_device() == 0


def test_a_layer_that_fails_leaves_the_current_gpu_as_it_was() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        model_of(Layer(1, fail))(torch.zeros(1))
    assert torch.cuda.current_device() == 0


def test_threads_that_share_a_layer_get_back_each_its_own_gpu() -> None:
    """DataParallel's copies share their hooks; here two threads are inside at once."""
    entered, left = threading.Barrier(2, timeout=10), threading.Event()
    after: dict[int, int] = {}

    def wait(x: torch.Tensor) -> torch.Tensor:
        entered.wait()
        if int(x) == 1:
            assert left.wait(10)
        return x

    layer = model_of(Layer(1, wait))

    def call(own: int) -> None:
        MINE.device = own
        layer(torch.tensor(own))
        after[own] = torch.cuda.current_device()
        left.set()

    threads = [threading.Thread(target=call, args=(own,)) for own in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert after == {0: 0, 1: 1}
