"""``tepatch certify``: the proof that nothing was lost, and the later check that nothing has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tepatch.cli.options import AutoClassName, Drop, MappingFile, chosen_patch
from tepatch.cli.options import DtypeName as _DtypeName
from tepatch.cli.output import FAILED, AsJson, print_json, reporting, say
from tepatch.cli.tables import print_red


def certify(
    patch: Annotated[
        str | None, typer.Argument(metavar="PATCH", help="A patch's name, or 'auto': the one for the model's type.")
    ] = None,
    source: Annotated[
        str | None, typer.Argument(metavar="SRC", help="What was converted: a folder, a file, or a cached hub id.")
    ] = None,
    destination: Annotated[
        str | None, typer.Argument(metavar="DST", help="What it was converted to, in any layout.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where the certificate goes; by default into DST.")
    ] = None,
    mapping: MappingFile = None,
    auto_class: AutoClassName = None,
    drop: Drop = None,
    dtype: Annotated[
        _DtypeName,
        typer.Option("--dtype", help="The dtype that values went through, where neither SRC nor DST says so."),
    ] = "auto",
    verify: Annotated[
        bool, typer.Option("--verify", help="Also compare logits with those of transformers, as 'tepatch verify'.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Text for --verify instead of our own."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", metavar="PATH", exists=True, help="Check what was certified: its folder, or the certificate."
        ),
    ] = None,
    checked_source: Annotated[
        str | None, typer.Option("--source", metavar="SRC", help="With --check: check the source's tensors too.")
    ] = None,
    checked_destination: Annotated[
        Path | None,
        typer.Option(
            "--destination", metavar="DST", help="With --check: the checkpoint, if the certificate is elsewhere."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and compare.")] = 2,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="The 'fp16' of 'model.fp16.safetensors'.")] = None,
    subfolder: Annotated[str, typer.Option(metavar="FOLDER", help="A folder below SRC.")] = "",
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="A branch, tag or commit of a hub id.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prove that every tensor of SRC came back in DST, and write a certificate of it.

    \b
      tepatch certify PATCH SRC DST       compare both, to the bit
      tepatch certify --check DST         later, and without SRC: is every byte still what it was?

    Both are read; each may be in the original layout or in that of the patch's layers. Where values were rounded on
    purpose, DST must hold exactly the rounded ones, and the largest deviation is stated with its bound. What was
    converted with --auto-class and --drop is certified with them: DST need not give back what SRC is to drop. The
    certificate (tepatch-certificate.json, and .html for people) has the sha256 of every tensor and file. It shows
    damage and edits; it is not a signature.

    Exit code 0 if all is well, 1 if not, with every file and tensor that is to blame.
    """
    if check is not None:
        given = {
            **{"PATCH": patch, "--out": out, "--mapping": mapping, "--verify": verify, "--text": text},
            **{"--auto-class": auto_class, "--drop": drop},
            **{"--variant": variant, "--subfolder": subfolder, "--revision": revision},
            "--dtype": dtype if dtype != "auto" else None,
        }
        extra = [name for name, value in given.items() if value]
        if extra:
            raise typer.BadParameter(f"takes no {', '.join(extra)}: it reads the certificate", param_hint="--check")
        _check(check, checked_source, checked_destination, workers, as_json=as_json)
        return
    if patch is None or source is None or destination is None:
        missing = next(n for n, v in (("PATCH", patch), ("SRC", source), ("DST", destination)) if v is None)
        raise typer.BadParameter("PATCH, SRC and DST are wanted, or --check PATH", param_hint=missing)
    if checked_source is not None or checked_destination is not None:
        raise typer.BadParameter("belongs to --check", param_hint="--source, --destination")
    if text is not None and not verify:
        raise typer.BadParameter("is the text for --verify", param_hint="--text")
    chosen = chosen_patch(patch, as_json=as_json)
    with reporting(as_json):
        from transformers.utils import logging

        from tepatch.certification import certify as make

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        opened = {"location": source, "variant": variant, "subfolder": subfolder, "revision": revision}
        made = make(
            chosen,
            source,
            destination,
            mapping=mapping,
            auto_class=auto_class,
            drop=drop or (),
            dtype=dtype,
            out=out,
            token_ids=_tokens(destination, text, source=opened) if verify else None,
            workers=workers,
            variant=variant,
            subfolder=subfolder,
            revision=revision,
            progress=False if quiet or as_json else None,
        )
    _print(made, as_json=as_json)


def _check(path: Path, source: str | None, destination: Path | None, workers: int, *, as_json: bool) -> None:
    with reporting(as_json):
        from tepatch.certification import check_certificate

        result = check_certificate(path, source=source, destination=destination, workers=workers)
    _print(result, as_json=as_json)


def _print(result: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(result.to_json())
    elif result.passed:
        say(str(result))
    else:
        first, *rest = str(result).splitlines()
        print_red(first)
        for line in rest:
            say(line)
    if not result.passed:
        for problem in result.problems:
            say(str(problem), err=True)
        raise typer.Exit(FAILED)


def _tokens(destination: str, text: Path | None, *, source: dict[str, Any]) -> list[list[int]]:
    from tepatch.checkpoint import open_checkpoint
    from tepatch.cli.tokens import choose_tokens
    from tepatch.errors import CheckpointError

    try:
        folder = open_checkpoint(destination).config_folder
        return choose_tokens(folder, tokens=None, text=text, max_tokens=1024)
    except CheckpointError:
        folder = open_checkpoint(**source).config_folder
        return choose_tokens(folder, tokens=None, text=text, max_tokens=1024)
