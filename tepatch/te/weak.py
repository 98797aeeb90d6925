"""References from a module to one that holds it, which do not keep that one alive.

A module that refers to itself, through whatever it holds, is freed by the garbage collector only: until that runs, a
deleted model keeps its memory. What is here is copied and pickled with the modules, and then refers to the copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

T = TypeVar("T")


class Weak(Generic[T]):
    """``weak()`` is the object, or None once nothing else holds it."""

    __slots__ = ("_reference",)

    def __init__(self, to: T | None) -> None:
        self._reference = None if to is None else weakref.ref(to)

    def __call__(self) -> T | None:
        return None if self._reference is None else self._reference()

    def __reduce__(self) -> tuple[Any, ...]:
        return Weak, (self(),)


class Method:
    """``function(module, ...)`` as an attribute of this one module; it outlives a module that it was just taken from.

    As a bound method it would refer to the module that holds it. So it refers weakly, and to another object with the
    same ``__dict__``, which takes the module's place when that is gone: ``load(...).save_pretrained(folder)``. That
    dict then no longer holds the method.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self._function = function
        self._heir = object.__new__(type(module))  # a class that fully_shard has made would call __init__
        self._heir.__dict__ = module.__dict__
        itself = weakref.ref(self)

        def release(_: Any) -> None:
            if (method := itself()) is not None:
                held = method._heir.__dict__
                for name in [name for name, value in held.items() if value is method]:
                    del held[name]

        self._module = weakref.ref(module, release)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._of(), *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Method, (self._function, self._of())

    def _of(self) -> nn.Module:
        module = self._module()
        return self._heir if module is None else module
