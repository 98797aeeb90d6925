"""References that keep nothing alive, and what their copies refer to."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

from tepatch.te.weak import Method, Weak


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def features(module: nn.Linear, times: int = 1) -> int:
    return module.in_features * times


def made() -> Any:
    module = nn.Linear(3, 2)
    module.features = Method(features, module)  # type: ignore[assignment]
    module.child = nn.Identity()
    module.child.above = Weak(module)  # type: ignore[assignment]
    return module


def test_a_method_is_of_the_module_as_it_is_now() -> None:
    module = made()
    assert module.features(times=2) == 6
    module.in_features = 5
    assert module.features() == 5
    assert module.child.above() is module


def test_neither_keeps_the_module() -> None:
    module = made()
    child, weight = module.child, weakref.ref(module.weight)
    del module
    assert weight() is None
    assert child.above() is None


def test_a_method_outlives_a_module_that_it_was_just_taken_from() -> None:
    assert made().features(3) == 9
    module = made()
    module.in_features, method, weight = 7, module.features, weakref.ref(module.weight)
    del module
    assert method() == 7
    assert weight() is not None
    del method
    assert weight() is None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_those_of_a_copy_refer_to_the_copy(how: Callable[[Any], Any]) -> None:
    module = made()
    copied, original = how(module), weakref.ref(module)
    module.in_features = 9
    assert copied.child.above() is copied
    assert copied.features() == 3
    del module
    assert original() is None
    copied.in_features = 4
    assert copied.features() == 4
    gone = weakref.ref(copied)
    child = copied.child
    del copied
    assert gone() is None
    assert how(child).above() is None
