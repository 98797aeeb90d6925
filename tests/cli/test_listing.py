"""``tepatch plugins`` and ``tepatch schema``."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tepatch.mapping.schema import json_schema
from tepatch.plugins import default_host

if TYPE_CHECKING:
    from conftest import Run, Site

REASON = "no [red]brackets[/red] here, " + "and a reason that is much longer than a terminal is wide " * 3
BROKEN = f"raise RuntimeError({REASON!r})"
OFFERS_LLAMA = """
import tepatch

print("hello from a plugin")

@tepatch.hookimpl
def tepatch_patches():
    yield tepatch.Patch(name="llama", model_types=("llama",), replace={"a:B": "a:C"}, mapping="a:b.yaml")
    yield tepatch.Patch(
        name="other", model_types=("one", "two"), replace={"a:B": "a:C"}, mapping="a:b.yaml", summary="Other [models]"
    )
"""


def test_a_plugin_is_listed_with_its_package_and_patches(run: Run) -> None:
    result = run("plugins")
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if line.startswith("llama"))
    version = importlib.metadata.version("tepatch-llama")
    assert line.split()[:6] == ["llama", "tepatch-llama", version, "loaded", "llama", "llama"]
    assert line.rstrip().endswith(default_host().patch("llama").summary)


def test_json_lists_plugins_with_their_patches(run: Run) -> None:
    plugins = json.loads(run("plugins", "--json").stdout)["plugins"]
    llama = next(plugin for plugin in plugins if plugin["name"] == "llama")
    assert (llama["package"], llama["status"], llama["reason"]) == ("tepatch-llama", "loaded", "")
    patch = default_host().patch("llama")
    assert llama["patches"] == [
        {"name": "llama", "usable": True, "model_types": list(patch.model_types), "summary": patch.summary}
    ]


def test_a_failed_plugin_is_listed_with_its_whole_reason_and_is_no_error(site: Site) -> None:
    site.install("broken", BROKEN)
    result = site.run("plugins", COLUMNS="60")
    assert result.returncode == 0
    assert f"broken: failed: RuntimeError: {REASON.strip()}" in result.stdout.splitlines()
    assert any(line.split() == ["broken", "tepatch-broken", "1.0", "failed"] for line in result.stdout.splitlines())
    assert any(line.startswith("llama") and "loaded" in line for line in result.stdout.splitlines())


def test_a_failed_plugin_is_red_where_there_are_colours(site: Site) -> None:
    site.install("broken", BROKEN)
    result = site.run("plugins", FORCE_COLOR="1", TERM="xterm", NO_COLOR="")
    red = [line for line in result.stdout.splitlines() if "\x1b[31m" in line]
    assert len(red) == 2  # its row and its reason
    assert all("broken" in line for line in red)


def test_json_stands_alone_on_stdout_though_a_plugin_prints(site: Site) -> None:
    site.install("noisy", OFFERS_LLAMA)
    result = site.run("plugins", "--json")
    assert "hello from a plugin" in result.stderr
    plugins = {plugin["name"]: plugin for plugin in json.loads(result.stdout)["plugins"]}
    clash, other = plugins["noisy"]["patches"]
    assert (clash["name"], clash["usable"]) == ("llama", False)
    assert other == {"name": "other", "usable": True, "model_types": ["one", "two"], "summary": "Other [models]"}
    assert "also offered by" in plugins["llama"]["reason"]


def test_each_patch_of_a_plugin_has_a_row(site: Site) -> None:
    site.install("noisy", OFFERS_LLAMA)
    result = site.run("plugins", COLUMNS="40")
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(row.endswith("one, two Other [models]") for row in rows)  # in a pipe, nothing is cut to a width


def test_a_patch_that_two_plugins_offer_is_no_wrong_usage(site: Site) -> None:
    site.install("noisy", OFFERS_LLAMA)
    result = site.run("check", "llama")
    assert result.returncode == 1
    assert "is offered by 2 plugins" in result.stderr


def test_a_disabled_plugin_is_listed_as_such(site: Site) -> None:
    result = site.run("plugins", TEPATCH_DISABLE_PLUGINS="llama")
    assert "llama: disabled: TEPATCH_DISABLE_PLUGINS=llama" in result.stdout.splitlines()


def test_where_no_plugin_is_installed_that_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [])
    default_host.cache_clear()
    try:
        result = run("plugins")
    finally:
        default_host.cache_clear()
    assert result.exit_code == 0
    assert result.stdout == "no plugins are installed; Llama is in the package tepatch-llama\n"


def test_the_schema_in_the_package_is_current(run: Run) -> None:
    import tepatch

    path = Path(tepatch.__file__).parent / "schemas" / "mapping-1.json"
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == json_schema(), f"run tepatch schema --output {path}"
    assert json.loads(run("schema").stdout) == json_schema()


def test_the_schema_is_written_to_a_file(run: Run, tmp_path: Path) -> None:
    result = run("schema", "--output", tmp_path / "schema.json")
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "schema.json").read_text(encoding="utf-8") == run("schema").stdout


def test_a_schema_that_can_not_be_written_is_wrong_usage(run: Run, tmp_path: Path) -> None:
    result = run("schema", "--output", tmp_path / "absent" / "schema.json")
    assert result.exit_code == 2
    assert "can not write" in result.stderr
