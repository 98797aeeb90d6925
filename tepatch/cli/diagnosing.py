"""``tepatch doctor``: what is installed, and what each patch is proven with."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tepatch.cli.output import FAILED, AsJson, find_patch, print_json, reporting, say
from tepatch.cli.tables import print_table

if TYPE_CHECKING:
    from tepatch.patch import Patch


def doctor(
    patches: Annotated[
        list[str] | None, typer.Argument(metavar="[PATCH]...", help="Patches by name; all, if none is named.")
    ] = None,
    location: Annotated[
        str | None,
        typer.Option("--config", metavar="LOCATION", help="Prove with the config of this checkpoint, for one patch."),
    ] = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Prove each patch here and now, with a small model of its default config.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show versions, the GPU, and with which versions each patch was proven.

    A patch that its plugin has not proven with what is installed is proven by its first load. With --prove, it is
    proven now; the exit code is 1 if one of them computes something else than transformers' model.
    """
    names = patches or []
    if location is not None and len(names) != 1:
        raise typer.BadParameter("the config of a checkpoint is for one patch: name it", param_hint="--config")
    chosen = [find_patch(name, as_json=as_json) for name in names]
    with reporting(as_json):
        from tepatch.plugins import default_host

        chosen = chosen or list(default_host().patches.values())
        machine = _machine()
        rows = [_row(patch, location, prove=prove or location is not None) for patch in chosen]
    if as_json:
        print_json({**machine, "patches": rows})
    else:
        _print(machine, rows)
    if any(row["error"] for row in rows):
        raise typer.Exit(FAILED)


def _machine() -> dict[str, Any]:
    import importlib

    for name in ("torch", "transformers"):
        importlib.import_module(name)
    import torch

    from tepatch.proven import LIBRARIES, packaged, version_of
    from tepatch.te import probe

    status = probe()
    gpu = ""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    versions = {"tepatch": packaged("tepatch"), "python": platform.python_version()}
    return {
        "versions": {**versions, **{name: version for name in LIBRARIES if (version := version_of(name))}},
        "gpu": gpu,
        "transformer_engine": {"usable": status.usable, "reason": status.reason},
    }


def _row(patch: Patch, location: str | None, *, prove: bool) -> dict[str, Any]:
    """What is known of a patch, as JSON-ready data; ``here`` says how it is proven with what is installed."""
    from tepatch.errors import ProofError, TepatchError
    from tepatch.proof import prove_now, remembered
    from tepatch.proven import combinations, installed, is_proven, without_source

    row: dict[str, Any] = {"patch": patch.name, "here": "not proven", "proven_with": [], "error": ""}
    try:
        row["proven_with"] = [without_source(each) for each in combinations(patch)]
        versions = installed(patch)
        if prove:
            checks, seconds = prove_now(patch, location)
            row["here"] = f"proven now in {seconds:.1f} s: {', '.join(checks)}"
        elif is_proven(patch, versions):
            row["here"] = "proven by the plugin"
        elif models := [
            each["model"] for each in remembered() if (each["patch"], each["versions"]) == (patch.name, versions)
        ]:
            row["here"] = f"proven on this machine ({', '.join(sorted(set(models)))})"
    except ProofError as error:
        row.update(here="differs", error=str(error))
    except TepatchError as error:
        row.update(here="can not be proven", error=str(error))
    return row


def _print(machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    say(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    status = machine["transformer_engine"]
    say(f"GPU: {machine['gpu'] or 'none'}")
    say("Transformer Engine: " + ("usable" if status["usable"] else f"not used: {status['reason']}"))
    say()
    red = [index for index, row in enumerate(rows) if row["error"]]
    print_table(("patch", "here", "transformers that its plugin was proven with"), map(_cells, rows), red=red)
    for row in rows:
        if row["error"]:
            say(f"\n{row['patch']}: {row['error']}")


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    known = list(dict.fromkeys(each.get("transformers", "") for each in row["proven_with"]))
    return row["patch"], row["here"], ", ".join(known)
