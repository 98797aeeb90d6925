"""``tepatch plugins`` and ``tepatch schema``: what is there, without looking at any model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tepatch.cli.output import AsJson, print_json, reporting, say
from tepatch.cli.tables import print_red, print_table

if TYPE_CHECKING:
    from tepatch.plugins import PluginHost, PluginRecord


def plugins(as_json: AsJson = False) -> None:
    """List the installed plugins and the patches that they offer.

    A plugin that failed to load is listed with its reason, and is no error of this command.
    """
    with reporting(as_json):
        from tepatch.plugins import default_host

        host = default_host()
    if as_json:
        print_json({"plugins": [_record_json(host, record) for record in host.records]})
    elif host.records:
        _print_plugins(host)
    else:
        say("no plugins are installed; Llama is in the package tepatch-llama")


def schema(
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Write to this file instead of stdout."),
    ] = None,
) -> None:
    """Print the JSON Schema of mapping files.

    Editors complete and check a mapping by it.
    """
    import json

    from tepatch.mapping.schema import json_schema

    text = json.dumps(json_schema(), indent=2)
    if output is None:
        say(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"can not write '{output}': {error.strerror}", param_hint="--output") from None


def _print_plugins(host: PluginHost) -> None:
    rows: list[tuple[str, ...]] = []
    red: list[int] = []
    for record in host.records:
        plugin = (record.name, record.distribution or "-", record.version or "-", record.status)
        offers = [_patch_json(host, name) for name in record.patches]
        if record.status == "failed":
            red.append(len(rows))
        cells = [(offer["name"], ", ".join(offer["model_types"]), offer["summary"]) for offer in offers]
        for index, cell in enumerate(cells or [("", "", "")]):
            rows.append((*(plugin if index == 0 else ("", "", "", "")), *cell))
    print_table(("plugin", "package", "version", "status", "patch", "model types", "summary"), rows, red=red)
    for record in host.records:
        if record.reason:
            line = f"{record.name}: {record.status}: {record.reason}"
            (print_red if record.status == "failed" else say)(line)


def _record_json(host: PluginHost, record: PluginRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "package": record.distribution,
        "version": record.version,
        "status": record.status,
        "reason": record.reason,
        "patches": [_patch_json(host, name) for name in record.patches],
    }


def _patch_json(host: PluginHost, name: str) -> dict[str, Any]:
    patch = host.patches.get(name)
    return {
        "name": name,
        # False: another plugin offers the name too, and neither patch can be had by it.
        "usable": patch is not None,
        "model_types": list(patch.model_types) if patch else [],
        "summary": patch.summary if patch else "",
    }
