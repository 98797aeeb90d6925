"""``tepatch plan``: what a load would do, proven from headers alone, compared with another plan, or drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tepatch.cli.options import AutoClassName, Backend, Drop, Dtype, Fresh, MappingFile, PatchName, chosen_patch
from tepatch.cli.output import FAILED, AsJson, print_json, reporting, say

if TYPE_CHECKING:
    from tepatch.planning import Plan

MAPPING_SUFFIXES = (".yaml", ".yml")


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
    auto_class: AutoClassName = None,
    fresh: Fresh = None,
    drop: Drop = None,
    diff: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER",
            exists=True,
            dir_okay=False,
            help="Show what changed since OTHER: a plan that was saved with --json, or (.yaml) another mapping file.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page to this new file: a drawing of every parameter."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a load would do, without reading a weight.

    Every tensor of the checkpoint and every parameter of the model is accounted for; what does not fit is
    reported all at once.

    With --diff, the exit code is 1 if the plans differ. With --html, the plan is written and not printed.
    """
    if html is not None:
        _refuse_what_is_there(html)
    chosen = chosen_patch(patch, as_json=as_json)

    def planned(file: Path | None) -> Plan:
        import tepatch.loading

        return tepatch.loading.plan(
            chosen,
            location,
            dtype=dtype,
            backend=backend,
            mapping=file,
            auto_class=auto_class,
            fresh=fresh or (),
            drop=drop or (),
            variant=variant,
            subfolder=subfolder,
            revision=revision,
        )

    with reporting(as_json):
        from tepatch.planning.difference import diff_plans
        from tepatch.planning.stored import read_plan

        made = planned(mapping)
        difference = None
        if diff is not None:
            is_mapping = diff.suffix.lower() in MAPPING_SUFFIXES
            difference = diff_plans(planned(diff) if is_mapping else read_plan(diff), made)
    if html is not None:
        _write_page(html, made)
        # Whatever else is asked for has stdout to itself.
        say(str(html), err=as_json or difference is not None)
    if as_json:
        print_json(made.to_json() if difference is None else difference.to_json())
    elif difference is not None:
        say(str(difference))
    elif html is None:
        say(str(made))
    if difference is not None and not difference.is_same:
        raise typer.Exit(FAILED)


def _refuse_what_is_there(file: Path) -> None:
    """Wrong usage, told before anything is planned: a page never takes the place of something else."""
    if file.exists() or file.is_symlink():
        kind = "a folder" if file.is_dir() else "there already"
        raise typer.BadParameter(f"'{file}' is {kind}", param_hint="--html")
    if not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder '{file.parent}'", param_hint="--html")


def _write_page(file: Path, made: Plan) -> None:
    from tepatch.planning.page import plan_page

    page = plan_page(made)
    try:
        with open(file, "x", encoding="ascii") as out:
            out.write(page)
    except OSError as error:
        raise typer.BadParameter(f"can not write '{file}': {error.strerror}", param_hint="--html") from None
