"""``tepatch verify``: is the patched model the model it claims to be? A table of errors, and a verdict."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tepatch.cli.options import AutoClassName, Backend, Drop, Dtype, MappingFile, PatchName, chosen_patch
from tepatch.cli.output import FAILED, AsJson, print_json, reporting, say
from tepatch.cli.tables import print_table

if TYPE_CHECKING:
    from tepatch.verify import Agreement, Verdict, Verification


def verify(
    patch: PatchName,
    location: Annotated[str, typer.Argument(metavar="LOCATION", help="A folder, or a hub id in the local cache.")],
    tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Token ids: a JSON list (of lists), or numbers and spaces.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Text, for the checkpoint's own tokenizer."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Use at most this many tokens of each sequence.")] = 1024,
    dtype: Dtype = "auto",
    device: Annotated[
        str | None, typer.Option(help="Such as 'cpu' or 'cuda:1'; by default what the backend computes on.")
    ] = None,
    backend: Backend = "auto",
    mapping: MappingFile = None,
    auto_class: AutoClassName = None,
    drop: Drop = None,
    as_json: AsJson = False,
) -> None:
    """Compare a patched model's logits with those of transformers.

    The reference is transformers in float32 with the same weights, so what is measured is arithmetic. Beside it
    stands the error that transformers itself makes in bfloat16. Without --tokens and --text, a paragraph of plain
    English is used.

    Exit code 1 if the patched model is worse than its bound. In bfloat16 and float16: 1.5 times the relative
    error of transformers in bfloat16 (over a few hundred tokens either scatters by a third; a broken model is
    off by ten times and more). In float32: a largest error of 1e-4 of the largest logit, or 5e-3 with
    Transformer Engine, which multiplies float32 in TF32.
    """
    if tokens is not None and text is not None:
        raise typer.BadParameter("give one of --tokens and --text", param_hint="--text")
    if Path(location).is_file():
        raise typer.BadParameter("transformers loads a folder, not one file", param_hint="LOCATION")
    chosen = chosen_patch(patch, as_json=as_json)
    with reporting(as_json):
        from transformers.utils import logging

        import tepatch.verify
        from tepatch.checkpoint import open_checkpoint
        from tepatch.cli.tokens import choose_tokens

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        # A hub id is replaced by its folder in the cache: transformers would ask the network about it.
        folder = open_checkpoint(location).config_folder
        ids = choose_tokens(folder, tokens=tokens, text=text, max_tokens=max_tokens)
        made = tepatch.verify.verify(
            chosen,
            folder,
            token_ids=ids,
            dtype=dtype,
            device=device,
            backend=backend,
            mapping=mapping,
            auto_class=auto_class,
            drop=drop or (),
        )
        made = dataclasses.replace(made, location=location)
        verdict = tepatch.verify.judge(made)
    if as_json:
        print_json({**made.to_json(), "verdict": dataclasses.asdict(verdict)})
    else:
        _print(made, verdict)
    if not verdict.passed:
        raise typer.Exit(FAILED)


def _print(made: Verification, verdict: Verdict) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    say(f"{made.patch} <- {made.location}: {made.tokens} tokens on {made.device}")
    say(f"{versions}\n")
    headings = ("against transformers float32", "max error", "/ largest logit", "mean", "relative", "KL", "top-1")
    rows = [
        (f"tepatch ({made.dtype}, {made.backend})", *_cells(made.ours)),
        ("transformers bfloat16", *_cells(made.hf_bfloat16)),
    ]
    print_table(headings, rows, numbers_from=1, red=() if verdict.passed else (0,))
    say(f"\n{verdict}")


def _cells(agreement: Agreement) -> tuple[str, ...]:
    fields: dict[str, Any] = dataclasses.asdict(agreement)
    top1 = fields.pop("top1_agreement")
    return (*(f"{value:.3g}" for value in fields.values()), f"{top1:.2%}")
