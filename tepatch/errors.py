"""Every error tepatch raises, in one tree.

    TepatchError
    |-- MappingError      a mapping file is wrong on its own (syntax, schema, expressions)
    |-- PlanError         mapping, config, checkpoint and model do not fit together
    |-- CheckpointError   files on disk are missing, damaged, hostile or contradict each other
    |-- LoadError         a load that was planned failed half-way (I/O, memory); nothing is left behind
    |-- SaveError         a save or a conversion failed or was refused (I/O, space, the destination)
    |-- BackendError      Transformer Engine was asked for and cannot be used here
    |-- UnsupportedError  the layer was called in a way it cannot compute
    |-- ProofError        a patch computes something else than transformers' model with the libraries installed here
    |-- ReplaceError      a layer class could not be replaced, or nothing was replaced
    `-- PluginError       a plugin or a patch name is unknown, broken or ambiguous

An error is made of ``Problem`` values: *where* (``file:line:column``, a file, a tensor), *what* is wrong,
what was *expected* and *found*, and what to *do*. All problems that can be found at once are reported at
once, so that a user fixes a file in one round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_LINE = 2000
"""Characters of a line of a message: what is longer is a file's, and is cut."""


def visible(text: str) -> str:
    """``text`` as a terminal may be given it, whoever wrote it: what can not be printed is escaped, but for line ends.

    >>> print(visible("\\x1b[2J"))
    \\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong, with what a reader needs to put it right.

    >>> print(Problem(where="llama.tepatch.yaml:14:5", what="no such tensor", fix="check the name"))
    llama.tepatch.yaml:14:5: no such tensor
      fix: check the name
    """

    where: str
    """``file:line:column`` when a file is to blame, else a file, tensor or config field; may be empty."""
    what: str
    """One sentence, without a full stop."""
    details: tuple[str, ...] = ()
    """Further lines: names, shapes, sizes."""
    expected: str = ""
    found: str = ""
    fix: str = ""
    """What to do next, in the imperative."""

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        lines += [f"  {line}" for line in self.details]
        lines += [f"  expected: {self.expected}"] if self.expected else []
        lines += [f"  found:    {self.found}"] if self.found else []
        lines += [f"  fix: {self.fix}"] if self.fix else []
        return visible("\n".join(line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..." for line in lines))


def first_line(error: BaseException) -> str:
    """What an error says, in a line: the name of its type if it says nothing, as Python does out of memory."""
    return (str(error) or type(error).__name__).splitlines()[0]


class TepatchError(Exception):
    """Base of all errors raised on purpose. Holds one or more ``problems``."""

    problems: tuple[Problem, ...]

    def __init__(self, problems: str | Problem | Iterable[Problem], *, heading: str = "") -> None:
        if isinstance(problems, str):
            problems = Problem(where="", what=problems)
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.heading = heading
        super().__init__(problems, heading)

    def __str__(self) -> str:
        body = "\n".join(str(problem) for problem in self.problems)
        if self.heading:
            return f"{visible(self.heading)}\n{body}"
        if len(self.problems) > 1:
            return f"{len(self.problems)} problems\n{body}"
        return body


class MappingError(TepatchError):
    """A mapping file is wrong by itself: YAML syntax, unknown keys, bad expressions or layouts."""


class PlanError(TepatchError):
    """The mapping, the config, the checkpoint and the model do not fit together."""


class CheckpointError(TepatchError):
    """A checkpoint's files are missing, damaged, hostile or contradict each other."""


class LoadError(TepatchError):
    """Executing a plan failed (I/O, memory). No class stays patched and no half-filled model is returned."""


class SaveError(TepatchError):
    """Executing a save or a conversion failed (I/O, space), or its destination was refused.

    The source is untouched, and nothing incomplete stands under a final name.
    """


class BackendError(TepatchError):
    """Transformer Engine was asked for and is absent, broken, or the GPU is too old."""


class UnsupportedError(TepatchError):
    """A patched layer was asked for something that it cannot compute exactly."""


class ProofError(TepatchError):
    """With the libraries installed here a patch does not compute what transformers' model does, or can not be tried."""


class ReplaceError(TepatchError):
    """A layer class could not be replaced or restored, or no layer was replaced at all."""


class PluginError(TepatchError):
    """A plugin is broken or ambiguous, or no plugin offers the patch that was named."""
