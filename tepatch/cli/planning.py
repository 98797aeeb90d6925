"""``tepatch plan``: what a load would do, proven from headers alone."""

from __future__ import annotations

from typing import Annotated

import typer

from tepatch.cli.options import Backend, Dtype, MappingFile, PatchName, chosen_patch
from tepatch.cli.output import AsJson, print_json, reporting


def plan(
    patch: PatchName,
    location: Annotated[
        str,
        typer.Argument(metavar="LOCATION", help="A folder, a checkpoint file, or a hub id in the local cache."),
    ],
    dtype: Dtype = "auto",
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="The 'fp16' of 'model.fp16.safetensors'.")] = None,
    subfolder: Annotated[str, typer.Option(metavar="FOLDER", help="A folder below the location.")] = "",
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="A branch, tag or commit of a hub id.")] = None,
    mapping: MappingFile = None,
    backend: Backend = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what a load would do, without reading a weight.

    Every tensor of the checkpoint and every parameter of the model is accounted for; what does not fit is
    reported all at once.
    """
    chosen = chosen_patch(patch, as_json=as_json)
    with reporting(as_json):
        import tepatch.api

        made = tepatch.api.plan(
            chosen,
            location,
            dtype=dtype,
            backend=backend,
            mapping=mapping,
            variant=variant,
            subfolder=subfolder,
            revision=revision,
        )
    if as_json:
        print_json(made.to_json())
    else:
        typer.echo(str(made))
