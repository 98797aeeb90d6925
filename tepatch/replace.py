"""Other layers in a model that is being built, for one block of code and no longer.

The obvious way is to assign another class to the module that holds the first one, and to assign the first
one back afterwards. It has three flaws: code that imported the class under another name does not see the
change; every other thread does see it, and builds models of the wrong layers; and while it lasts,
``isinstance`` and ``is`` are asked about a class that is not what its name says.

So the name stays, and construction is redirected. While at least one block replaces a class, its ``__init__``
is a dispatcher. For an object of exactly that class, built in a context whose blocks replace it, the
dispatcher turns the still empty object into one of the replacement and calls the ``__init__`` of that; for
all others it calls the original. Blocks are kept in a context variable, so they belong to a thread or an
asyncio task (and tasks started inside), while the dispatcher is shared by the process and counts its users.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tepatch import contract
from tepatch.errors import PluginError, Problem, ReplaceError
from tepatch.patch import resolve_class

__all__ = ["Replacement", "replace_layers"]


@contextmanager
def replace_layers(
    targets: Mapping[Any, type | str], *, require: bool = True, ignores: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Replacement]:
    """Build replacements instead of the given classes, in this block and in this thread or task only.

    `targets`: the class to replace -> the class that takes its place; either may be a ``"module:Name"``.
    `require`: whether a class of which the block built no layer at all is an error.
    `ignores`: parameters of the classes' ``__init__`` and ``forward`` that replacements need not take, and why.

        with replace_layers({LlamaDecoderLayer: MyDecoderLayer}) as replaced:
            model = LlamaForCausalLM(config)
        print(replaced)  # 2 x LlamaDecoderLayer -> MyDecoderLayer

    Only objects of exactly the class are replaced, under whatever name it was imported; its subclasses are
    not. Of nested blocks that replace one class the inner one counts. While a replacement is being built, the
    class that it replaces is the original, so that it may hold one. Threads that the block starts build
    originals, unless they run in a copy of its context.

    A replacement has to take what the class takes, by the same names; a replaced module that is called with a keyword
    that it does not know raises `UnsupportedError`, unless that is None or harmless (`tepatch.contract`).

    Raises `ReplaceError` at the start when classes cannot stand in for each other; at the end when `require`
    is not met, or when somebody else changed ``__init__`` in the meantime: their change is then left in
    place. An exception of the block goes through, such a finding being added to it as a note.
    """
    frame = _Frame(pairs=_resolve(targets, ignores), ignores=dict(ignores))
    problems: list[Problem] = []
    try:
        try:
            _enter(frame)
            yield frame.report
        finally:
            problems = _leave(frame)
    except BaseException as error:
        for problem in problems:
            error.add_note(str(problem))
        raise
    if require:
        counts = frame.report.counts
        problems += [_never_built(target, frame.pairs[target]) for target in counts if not counts[target]]
    if problems:
        raise ReplaceError(problems)


class Replacement:
    """How many layers a block has replaced so far; its `str` is one line to print."""

    def __init__(self, pairs: Mapping[type, type]) -> None:
        self.classes: Mapping[type, type] = MappingProxyType(dict(pairs))
        """The class replaced -> the class that takes its place."""
        self._counts = dict.fromkeys(pairs, 0)
        self._lock = threading.Lock()

    @property
    def counts(self) -> dict[type, int]:
        """Number of replacements built for each class; one whose ``__init__`` raised does not count."""
        with self._lock:
            return dict(self._counts)

    @property
    def total(self) -> int:
        """Number of replacements built, of all classes together."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        counts = self.counts.items()
        return ", ".join(f"{number} x {_arrow(target, self.classes[target])}" for target, number in counts)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def _add(self, target: type) -> None:
        with self._lock:
            self._counts[target] += 1


@dataclass(kw_only=True, slots=True, eq=False)
class _Frame:
    """One block. Its context may live on in a task after the block's end, hence `is_active`."""

    pairs: Mapping[type, type | None]
    """None: here, the original is wanted."""
    ignores: Mapping[str, str] = field(default_factory=dict)
    report: Replacement = field(init=False)
    is_active: bool = True

    def __post_init__(self) -> None:
        self.report = Replacement({target: other for target, other in self.pairs.items() if other is not None})


@dataclass(kw_only=True, slots=True, eq=False)
class _Dispatched:
    """A class whose ``__init__`` is a dispatcher, for as long as there are blocks that need it."""

    original: object
    """What the class itself had, `_INHERITED` if nothing."""
    dispatcher: Callable[..., None]
    users: set[_Frame] = field(default_factory=set)


_INHERITED = object()
_frames: ContextVar[tuple[_Frame, ...]] = ContextVar("tepatch_replaced_layers", default=())
_dispatched: dict[type, _Dispatched] = {}
# Reentrant: garbage collection may close a generator, and so leave a block, while this thread holds the lock.
_lock = threading.RLock()


def _enter(frame: _Frame) -> None:
    for target in frame.pairs:
        with _lock:
            entry = _dispatched.get(target)
            if entry is None:
                original = vars(target).get("__init__", _INHERITED)
                entry = _Dispatched(original=original, dispatcher=_make_dispatcher(target, original))
            # Recorded first, so that `_leave` undoes what an interrupt cuts short from here on.
            entry.users.add(frame)
            _dispatched[target] = entry
            if len(entry.users) == 1:
                _set_init(target, entry.dispatcher)
    _frames.set((*_frames.get(), frame))


def _leave(frame: _Frame) -> list[Problem]:
    """End a block, however it came to its end, and say which classes somebody else has changed."""
    frame.is_active = False
    # No `ContextVar.reset`: a generator may be closed in another context than it was started in.
    _frames.set(tuple(other for other in _frames.get() if other is not frame))
    problems: list[Problem] = []
    with _lock:
        for target in frame.pairs:
            entry = _dispatched.get(target)
            if entry is None or frame not in entry.users:
                continue
            entry.users.remove(frame)
            if entry.users:
                continue
            del _dispatched[target]
            current = vars(target).get("__init__", _INHERITED)
            if current is entry.dispatcher:
                _set_init(target, entry.original)
            elif current is not entry.original:
                problems.append(_changed_by_others(target, current))
    return problems


def _set_init(target: type, value: object) -> None:
    # `type`'s own methods: a metaclass may have further ideas about setting attributes.
    if value is _INHERITED:
        type.__delattr__(target, "__init__")
    else:
        type.__setattr__(target, "__init__", value)


def _make_dispatcher(target: Any, original: Any) -> Callable[..., None]:
    @functools.wraps(target.__init__)
    def dispatch(self: Any, /, *args: Any, **kwargs: Any) -> None:
        frame = _innermost(target) if type(self) is target else None
        replacement: Any = frame.pairs[target] if frame is not None else None
        if frame is None or replacement is None:
            if original is _INHERITED:
                super(target, self).__init__(*args, **kwargs)
            else:
                original.__get__(self, type(self))(*args, **kwargs)
            return
        # Past any `__setattr__` of the class: torch's expects the object to be initialised.
        object.__setattr__(self, "__class__", replacement)
        # An object is replaced once, also where its new class is a target too; and what a replacement builds
        # of the old class is the original, or it would contain itself without end.
        plain = _Frame(pairs={target: None, replacement: None})
        token = _frames.set((*_frames.get(), plain))
        try:
            replacement.__init__(self, *args, **kwargs)
        finally:
            _frames.reset(token)
        contract.guard(self, target, frame.ignores)
        frame.report._add(target)

    return dispatch


def _innermost(target: type) -> _Frame | None:
    for frame in reversed(_frames.get()):
        if frame.is_active and target in frame.pairs:
            return frame
    return None


def _resolve(targets: Mapping[Any, type | str], ignores: Mapping[str, str]) -> dict[type, type]:
    """Turn names into classes and refuse what cannot work, all at once."""
    pairs: dict[type, type] = {}
    problems: list[Problem] = []
    if not targets:
        problems.append(Problem(where="replace_layers", what="no class to replace"))
    for target_name, replacement_name in targets.items():
        try:
            target, replacement = (
                resolve_class(value) if isinstance(value, str) else value for value in (target_name, replacement_name)
            )
        except PluginError as error:
            problems += error.problems
            continue
        no_classes = [value for value in (target, replacement) if not isinstance(value, type)]
        if no_classes:
            expected = "a class or 'module:Name'"
            problems += [
                Problem(where="replace_layers", what="not a class", expected=expected, found=repr(value))
                for value in no_classes
            ]
            continue
        if target in pairs:
            problems.append(Problem(where=_path(target), what="is named twice, under different spellings"))
        reason = _misfit(target, replacement)
        if reason:
            what = f"{_path(replacement)} cannot take its place: {reason}"
            problems.append(Problem(where=_path(target), what=what))
        else:
            problems += contract.signature_problems(target, replacement, ignores)
        pairs[target] = replacement
    if problems:
        raise ReplaceError(problems)
    return pairs


def _misfit(target: Any, replacement: Any) -> str:
    if replacement is target:
        return "it is the same class"
    if getattr(replacement, "__abstractmethods__", None):
        return f"it is abstract ({', '.join(sorted(replacement.__abstractmethods__))})"
    if target.__init__ is object.__init__:
        return "the class to replace has no __init__ to redirect"
    if replacement.__new__ is not target.__new__:
        return "its __new__ would never be called"
    try:
        # The change that the dispatcher will make, on an object that nobody has.
        object.__setattr__(object.__new__(target), "__class__", replacement)
    except TypeError as error:
        return f"Python cannot turn one into the other ({error})"
    return ""


def _never_built(target: type, replacement: type | None) -> Problem:
    """Report a class that the block did not build, with what else goes by its name in loaded modules."""
    details = set()
    for name, module in list(sys.modules.items()):
        found = getattr(module, "__dict__", {}).get(target.__name__)
        if found is target or not isinstance(found, type):
            continue
        if name == target.__module__:
            details.add(f"somebody has made {name}.{target.__name__} another class: {_path(found)}")
        elif found is not replacement:
            details.add(f"another class of that name: {_path(found)}")
    what = "no layer was replaced: the block built no object of exactly this class"
    fix = "check that the model uses this class, not a subclass, and is built in this thread"
    return Problem(where=_path(target), what=what, details=tuple(sorted(details, reverse=True)[:5]), fix=fix)


def _changed_by_others(target: type, current: object) -> Problem:
    what = "its __init__ was changed by somebody else inside the block, and is left as they made it"
    module = getattr(current, "__module__", "?")
    found = f"{module}.{getattr(current, '__qualname__', repr(current))}"
    fix = "undo that change inside the block, or make it before the block"
    return Problem(where=_path(target), what=what, found=found, fix=fix)


def _arrow(target: type, replacement: type) -> str:
    if target.__name__ != replacement.__name__:
        return f"{target.__name__} -> {replacement.__name__}"
    return f"{target.__name__} -> {_path(replacement)}"  # a replacement often keeps the name of the original


def _path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
