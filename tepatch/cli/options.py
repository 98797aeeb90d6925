"""Options that several commands take, so that they are called and explained alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tepatch.cli.output import find_patch
from tepatch.te import BackendName

if TYPE_CHECKING:
    from tepatch.patch import Patch

DtypeName = Literal["auto", "float64", "float32", "float16", "bfloat16"]
"""What tepatch.load takes as a dtype, spelt out because reading arguments must not import torch."""

PatchName = Annotated[
    str, typer.Argument(metavar="PATCH", help="A patch's name, or 'auto': the one for the model's type.")
]
Dtype = Annotated[DtypeName, typer.Option("--dtype", help="Dtype of the parameters; 'auto' is the config's.")]
Backend = Annotated[
    BackendName, typer.Option("--backend", help="'auto' is Transformer Engine where it can be used, else 'reference'.")
]
MappingFile = Annotated[
    Path | None, typer.Option("--mapping", metavar="FILE", help="Use this mapping file instead of the patch's own.")
]
AutoClassName = Annotated[
    str | None,
    typer.Option(
        "--auto-class",
        metavar="CLASS",
        help="The model's class: an auto class or a model class of transformers. By default the config's own.",
    ),
]
Drop = Annotated[
    list[str] | None,
    typer.Option(
        "--drop", metavar="NAME", help="Leave out this tensor of the checkpoint, or all of a module. Can be repeated."
    ),
]
Fresh = Annotated[
    list[str] | None,
    typer.Option(
        "--fresh",
        metavar="NAME",
        help="Draw this tensor, or all of a module, as in a new model: the checkpoint has none. Can be repeated.",
    ),
]


def chosen_patch(name: str, *, as_json: bool) -> Patch | str:
    """The patch of that name; ``"auto"`` stays as it is, for the config decides."""
    return name if name == "auto" else find_patch(name, as_json=as_json)
