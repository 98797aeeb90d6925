"""What a class that takes another's place has to take: looked at before a model is built, and again at each call.

Hugging Face's models call their layers by keyword, and layers have ``**kwargs`` for what concerns others. So a keyword
that gets another name in a release is swallowed without a word: with ``past_key_values`` called ``cache``, a layer
that takes the first forgets its cache, and the model writes another text. Two things make that impossible. A
replacement has to take each parameter of the class that it replaces, or to say why it need not. And a keyword that is
given with a value, that the replacement does not take, and that is not known to be harmless, is an error.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from tepatch.errors import Problem, UnsupportedError

__all__ = ["HARMLESS", "guard", "passes_on", "refuse_unknown", "signature_problems"]

F = TypeVar("F", bound=Callable[..., Any])

HARMLESS: Mapping[str, str] = MappingProxyType(
    {
        "num_items_in_batch": "the loss is divided by it, after all layers",
        "output_attentions": "a patched model refuses it before its layers are called",
        "output_hidden_states": "the model records them between its layers",
        "output_router_logits": "the model records them at the routers",
        "return_dict": "the form of the model's output",
        "seq_idx": "read by state-space layers; attention is told the same by position_ids or cu_seq_lens_q",
        "use_cache": "whether the model makes a cache; a layer is given the cache itself",
    }
)
"""Keywords that Hugging Face's models hand on to every layer and that do not change what a layer computes, and why."""

_MARK = "__tepatch_passes_on__"


def passes_on(function: F) -> F:
    """A decorator for a replacement's ``forward(..., *args, **kwargs)`` that gives all it gets to the stock one.

    What the stock class takes is then not held against the parameters of this function. It must not keep an argument
    for itself.
    """
    setattr(function, _MARK, True)
    return function


def signature_problems(target: type, replacement: type, ignores: Mapping[str, str]) -> Iterator[Problem]:
    """What ``target`` takes and ``replacement`` does not, in ``__init__`` and ``forward``; nothing if all is well.

    ``ignores`` are parameters that the replacement need not take, and why. Signatures are read through decorators that
    keep them (``functools.wraps``).
    """
    for name in ("__init__", "forward"):
        theirs, ours = getattr(target, name, None), getattr(replacement, name, None)
        if theirs is not None and ours is not None and not _is_same(theirs, ours) and not hasattr(ours, _MARK):
            yield from _compare(target, replacement, name, _parameters(theirs), _parameters(ours), ignores)


def guard(layer: Any, target: type, ignores: Mapping[str, str]) -> None:
    """Make a module that was built instead of a ``target`` refuse keywords that it does not know.

    Anything but a ``torch.nn.Module`` is left alone, and so is a module whose ``forward`` is the target's own or gives
    all that it gets to it.
    """
    ours, theirs = getattr(type(layer), "forward", None), getattr(target, "forward", None)
    register = getattr(layer, "register_forward_pre_hook", None)
    if ours is None or register is None or hasattr(ours, _MARK) or (theirs is not None and _is_same(theirs, ours)):
        return
    named = {name for name, each in _parameters(ours).items() if each.kind in _BY_NAME}
    known = frozenset({*named, *HARMLESS, *ignores})
    register(functools.partial(refuse_unknown, known, _library(target)), with_kwargs=True)


def refuse_unknown(
    known: frozenset[str], library: str, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise ``UnsupportedError`` for a keyword that has a value and is not ``known``."""
    for name, value in kwargs.items():
        if value is not None and name not in known:
            raise unknown_keyword(name, type(layer).__name__, library)


def unknown_keyword(name: str, called: str, library: str) -> UnsupportedError:
    """The error for a keyword that ``called`` does not know; ``library`` is whose models call it, and its version."""
    return UnsupportedError(
        Problem(
            where=name,
            what=f"{called} was called with a keyword that it does not know, and may not drop",
            found=f"given by the caller, or by {library}",
            fix=f"leave out {name} if you pass it; or use a version of {library.split()[0]} that the patch was proven "
            "with (tepatch doctor lists them)",
        )
    )


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _is_same(theirs: Any, ours: Any) -> bool:
    """Whether both are one function, which may have been wrapped once more for a subclass."""
    return bool(inspect.unwrap(theirs) is inspect.unwrap(ours))


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a method by name, without ``self``; ``*args, **kwargs`` of one that tells nothing."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some that are written in C
        parameters = [inspect.Parameter("args", _REST[0]), inspect.Parameter("kwargs", _REST[1])]
    if parameters and parameters[0].kind in _BY_PLACE:
        del parameters[0]
    return {each.name: each for each in parameters}


def _compare(
    target: type,
    replacement: type,
    function: str,
    theirs: Mapping[str, inspect.Parameter],
    ours: Mapping[str, inspect.Parameter],
    ignores: Mapping[str, str],
) -> Iterator[Problem]:
    if function == "__init__" and {each.kind for each in ours.values()}.issuperset(_REST):
        return  # a constructor that hands all on to another one
    where = f"{target.__module__}:{target.__qualname__}"
    library, called = _library(target), f"{replacement.__module__}:{replacement.__qualname__}.{function}"
    missing = [
        name for name, each in theirs.items() if each.kind not in _REST and name not in ours and name not in ignores
    ]
    if missing:
        yield Problem(
            where=where,
            what=f"{function} of its replacement does not take {', '.join(repr(name) for name in missing)}, which "
            f"{library} gives it",
            expected=f"({', '.join(theirs)})",
            found=f"{called}({', '.join(ours)})",
            fix="install a version of the plugin that knows this one; its author takes the parameter, or says why a "
            "layer need not: in Patch.ignores, or with replace_layers(..., ignores={name: reason})",
        )
    order = [name for name, each in theirs.items() if each.kind in _BY_PLACE]
    own = [name for name, each in ours.items() if each.kind in _BY_PLACE]
    if moved := [(one, other) for one, other in zip(own, order, strict=False) if one != other]:
        yield Problem(
            where=where,
            what=f"{function} of its replacement has other parameters by position than {library} has",
            expected=f"{moved[0][1]!r} where it has {moved[0][0]!r}",
            found=f"{called}({', '.join(ours)})",
            fix="the plugin's author makes parameters keyword-only that are not in the same place",
        )
    needed = [
        name
        for name, each in ours.items()
        if each.kind not in _REST and each.default is each.empty and name not in theirs
    ]
    if needed and not moved and not {each.kind for each in theirs.values()}.issuperset(_REST):
        yield Problem(
            where=where,
            what=f"{function} of its replacement needs {', '.join(repr(name) for name in needed)}, which {library} "
            "does not give it",
            expected=f"({', '.join(theirs)})",
            found=f"{called}({', '.join(ours)})",
            fix="install a version of the plugin that knows this one",
        )


def _library(target: type) -> str:
    """The package that a class is of, and its version, as text."""
    package = target.__module__.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", "")
    return f"{package} {version}".strip()
