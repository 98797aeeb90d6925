"""The shape of a mapping file, version 1: what validates it is also what its JSON Schema is made from.

Only the form is settled here. Names, axes and expressions are parsed by ``read``; whether rules fit a model is
decided by ``accounting``.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter
from typing_extensions import TypeAliasType

SCHEMA_VERSION = 1

Expr = Annotated[int | float | str, Field(description="A number, or arithmetic over config fields and sizes.")]
Name = Annotated[str, Field(description="A tensor name; {captures} in braces. 'same' is the target's own name.")]
Constant = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Take(_Strict):
    """Only a part of the source: ``index`` along ``dim``, or ``size`` positions from ``start``.

    ``out_of`` is the source's whole size along ``dim``, so that a rule alone says which shape it expects.
    """

    dim: int = Field(default=0, description="Dimension of the source.")
    out_of: Expr = Field(description="The source's whole size along dim.")
    index: Expr | None = Field(default=None, description="One position; the dimension disappears.")
    start: Expr | None = Field(default=None, description="First position.")
    size: Expr | None = Field(default=None, description="Number of positions.")


class Pad(_Strict):
    """The target is larger than the source along ``dim``: ``size`` positions are real, the rest is ``value``."""

    dim: int = 0
    size: Expr = Field(description="Positions that come from the source.")
    value: Constant = Field(default=0.0, description="What the other positions hold.")


class Operation(_Strict):
    """What every operation may carry besides its own fields."""

    KEY: ClassVar[str] = ""
    when: Expr | None = Field(default=None, description="Use this only if the condition on the config holds.")
    axes: str | None = Field(default=None, description="Layout in named axes, 'source -> target'.")
    transpose: bool = Field(default=False, description="Swap the last two dimensions.")
    scale: Expr | None = Field(default=None, description="target = source * scale (+ offset).")
    offset: Expr | None = Field(default=None, description="target = source (* scale) + offset.")
    pad: Pad | None = None


class Of(Operation):
    """One source tensor (or a nested operation) with modifiers."""

    KEY: ClassVar[str] = "of"
    of: Operand
    take: Take | None = None


class Same(Operation):
    """The source of the same name."""

    KEY: ClassVar[str] = "same"
    same: Literal[True]


class Concat(Operation):
    """Parts one after the other along ``dim``. Unequal parts need ``sizes``."""

    KEY: ClassVar[str] = "concat"
    concat: list[Operand] = Field(min_length=2)
    sizes: list[Expr] | None = Field(default=None, description="Each part's size along dim; equal if left out.")
    dim: int = 0


class Interleave(Operation):
    """Parts dealt out in turn along ``dim``: ``over`` groups, or blocks of ``block`` positions."""

    KEY: ClassVar[str] = "interleave"
    interleave: list[Operand] = Field(min_length=2)
    over: Expr | None = Field(default=None, description="Number of groups.")
    block: Expr | None = Field(default=None, description="Positions of each part in one turn.")
    sizes: list[Expr] | None = Field(default=None, description="Each part's positions in one group; equal if left out.")
    dim: int = 0


class Stack(Operation):
    """One part for each value of the capture ``over``, along a new dimension ``dim`` of the target."""

    KEY: ClassVar[str] = "stack"
    stack: Operand
    over: str = Field(description="A capture.")
    dim: int = 0


class AnyOf(Operation):
    """The first alternative whose sources are all in the checkpoint."""

    KEY: ClassVar[str] = "any_of"
    any_of: list[Operand] = Field(min_length=2)


class Create(Operation):
    """No source: the target is filled with a constant, and left out when saving."""

    KEY: ClassVar[str] = "create"
    create: Constant


OPERATIONS: dict[str, type[Operation]] = {
    operation.KEY: operation for operation in (Of, Same, Concat, Interleave, Stack, AnyOf, Create)
}

REMOVED = {
    "tie": "write 'same: true' in its place: which parameters are tied is the model's to say",
    "rope_permute": "write 'axes: (h r 2) i -> (h 2 r) i' in its place ('(h r 2) -> (h 2 r)' for a bias), with an axis "
    "of that many heads among the sizes, such as 'h: {value}'",
    "cast": "leave it out: a parameter has the dtype that the model gives it",
}
"""Keys of an operation that the language had, and what to write in their place."""

_FIELDS = frozenset(field for operation in OPERATIONS.values() for field in operation.model_fields)
_MODIFIERS = _FIELDS - OPERATIONS.keys() - {"when"}


def misspelt(key: str) -> str:
    """The operation that ``key`` was probably meant to be; empty if it is like none."""
    return next(iter(difflib.get_close_matches(key, list(OPERATIONS), n=1, cutoff=0.76)), "")


def _kind(value: Any) -> str:
    """Which of the forms a value in the tree has."""
    if isinstance(value, dict):
        kind = next((f"<{key}>" for key in OPERATIONS if key in value), "<scope>")
        return "<misspelt>" if kind == "<scope>" and ("tie" in value or _is_misspelt(value)) else kind
    if value is None:
        return "<remove>"
    return "<choice>" if isinstance(value, list) else "<name>"


def _is_misspelt(scope: dict[str, Any]) -> bool:
    """Whether a scope is no scope but an operation with a slip: it holds what only operations hold."""
    return any(
        (isinstance(value, int | float) or _is_list_of_names(value) or (scope.keys() & _MODIFIERS) - {key})
        and misspelt(key)
        for key, value in scope.items()
    )


def _is_list_of_names(value: Any) -> bool:
    # As choices, all but the last would need a condition.
    return isinstance(value, list) and any(isinstance(item, str) for item in value[:-1])


Operand = Annotated[
    Annotated[Name, Tag("<name>")]
    | Annotated[Of, Tag("<of>")]
    | Annotated[Same, Tag("<same>")]
    | Annotated[Concat, Tag("<concat>")]
    | Annotated[Interleave, Tag("<interleave>")]
    | Annotated[Stack, Tag("<stack>")]
    | Annotated[AnyOf, Tag("<any_of>")]
    | Annotated[Create, Tag("<create>")],
    Discriminator(_kind),
]

Tree = TypeAliasType(
    "Tree",
    Annotated[
        Annotated[Operand, Tag("<rule>")]
        | Annotated[list[Operand], Field(min_length=1), Tag("<choice>")]
        | Annotated[None, Tag("<remove>")]
        | Annotated["dict[str, Tree]", Tag("<scope>")],
        Discriminator(lambda value: kind if (kind := _kind(value)) in _STRUCTURE else "<rule>"),
    ],
)
"""A rule, a list of rules (the first whose `when` holds is used), null (removes an inherited rule), or a scope."""


_STRUCTURE = ("<choice>", "<remove>", "<scope>")


class Requirement(_Strict):
    """A condition on the config with a name, by which a mapping that extends this one replaces or drops it."""

    that: str = Field(description="The condition.")
    otherwise: str = Field(alias="else", description="What the user reads if it does not hold.")


def _kind_of_requirement(value: Any) -> str:
    if value is None:
        return "<drop>"
    return "<requirement>" if isinstance(value, dict) else "<sentence>"


Required = Annotated[
    Annotated[str, Tag("<sentence>")] | Annotated[Requirement, Tag("<requirement>")] | Annotated[None, Tag("<drop>")],
    Discriminator(_kind_of_requirement),
]

TAGS = frozenset(
    {"<name>", "<rule>", "<sentence>", "<requirement>", "<drop>", *_STRUCTURE, *(f"<{key}>" for key in OPERATIONS)}
)
"""What the unions above add to the place of an error."""


class MappingFile(_Strict):
    """A tepatch mapping: how a checkpoint's tensors lie in a patched model's parameters."""

    version: Literal[1]
    extends: str | None = Field(default=None, description="Another mapping: 'file.yaml' or 'package:file.yaml'.")
    captures: dict[str, Expr] = Field(default={}, description="{name}: a count, or a list of numbers.")
    sizes: dict[str, Expr] = Field(default={}, description="Names for sizes, used by axes and expressions.")
    requires: list[dict[str, Required]] = Field(
        default=[],
        description="'name: {that: condition, else: what the user reads if it does not hold}', or "
        "'condition: sentence' for one without a name (null drops an inherited one).",
    )
    ignore: list[dict[str, str]] = Field(default=[], description="'source name: why it is not needed'.")
    base: str | None = Field(
        default=None, description="The part of the model that the rules are about; other classes have it elsewhere."
    )
    rest: Literal["same"] | None = Field(
        default=None, description="'same': every parameter outside base that no rule is for is the source of its name."
    )
    parameters: dict[str, Tree] = Field(description="The target's parameters, each with where it comes from.")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a mapping file, for editors."""
    schema = TypeAdapter(MappingFile).json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "tepatch mapping"}
    # An operation has the form of a scope as well: of a scope's keys, none is an operation's.
    for form in schema["$defs"]["Tree"]["oneOf"]:
        if form.get("type") == "object":
            form["propertyNames"] = {"not": {"enum": [*OPERATIONS, "tie"]}}
    return schema
