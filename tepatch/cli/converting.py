"""``tepatch convert``: from the original layout to that of the layers, or back, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tepatch.cli.options import AutoClassName, Drop, Dtype, MappingFile, PatchName, chosen_patch
from tepatch.cli.output import AsJson, print_json, reporting, say


def convert(
    patch: PatchName,
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A folder, a checkpoint file, or a hub id in the local cache.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make. It must not exist.")],
    to: Annotated[
        Literal["te", "hf"] | None,
        typer.Option("--to", help="'te': the layers' own layout; 'hf': the original. By default what SRC is not."),
    ] = None,
    dtype: Dtype = "auto",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file: '5GB', '500MB'.")] = "5GB",
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and write.")] = 2,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST, as a whole, if it is a checkpoint.")
    ] = False,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="The 'fp16' of 'model.fp16.safetensors'.")] = None,
    subfolder: Annotated[str, typer.Option(metavar="FOLDER", help="A folder below SRC.")] = "",
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="A branch, tag or commit of a hub id.")] = None,
    mapping: MappingFile = None,
    auto_class: AutoClassName = None,
    drop: Drop = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint to the layout of the patch's layers, or back, without a GPU and with no model in memory.

    DST appears when it is complete. A conversion that was killed goes on where it was when it is started again.
    Converted back, every tensor is the original's, bit for bit, unless --dtype rounds it; 'tepatch certify' proves it.
    """
    chosen = chosen_patch(patch, as_json=as_json)
    with reporting(as_json):
        import tepatch.conversion

        made = tepatch.conversion.convert(
            chosen,
            source,
            destination,
            to=to,
            dtype=dtype,
            max_shard_size=max_shard_size,
            workers=workers,
            overwrite=overwrite,
            variant=variant,
            subfolder=subfolder,
            revision=revision,
            mapping=mapping,
            auto_class=auto_class,
            drop=drop or (),
            progress=False if quiet or as_json else None,
        )
    if as_json:
        print_json(made.to_json())
    else:
        say(str(made))
