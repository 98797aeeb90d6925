from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from tepatch.errors import PluginError
from tepatch.hookspecs import hookimpl
from tepatch.patch import Patch
from tepatch.plugins import PluginHost, PluginRecord, default_host

GOOD = """
from tepatch.hookspecs import hookimpl
from tepatch.patch import Patch

def patch(name, *model_types):
    return Patch(name=name, model_types=model_types or (name,), replace={"a:B": "a:C"}, mapping="a:b.yaml")

@hookimpl
def tepatch_patches():
    yield from PATCHES
"""


class Site:
    """A folder on sys.path, into which tests install distributions as pip would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, code: str, *, version: str = "1.0", distribution: str = "", module: str = "") -> None:
        """Install `code` as a module, with an entry point `name` in a distribution of its own."""
        distribution = distribution or f"tepatch-{name}"
        module = module or f"plugin_of_{distribution.replace('-', '_').replace('.', '_')}"
        (self.folder / f"{module}.py").write_text(textwrap.dedent(code))
        self.describe(distribution, f"[tepatch]\n{name} = {module}\n", version=version)

    def offer(self, name: str, *patches: str, distribution: str = "") -> None:
        """Install a plugin that offers patches, each "name" or "name: type, type"."""
        calls = []
        for text in patches:
            patch, _, kinds = text.partition(":")
            calls.append(f"patch({', '.join(repr(part.strip()) for part in [patch, *kinds.split(',')] if part)})")
        self.install(name, f"{GOOD}\nPATCHES = [{', '.join(calls)}]\n", distribution=distribution)

    def describe(self, distribution: str, entry_points: str, *, version: str = "1.0") -> Path:
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entry_points)
        return info


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An otherwise empty site: plugins that happen to be installed here are not on this path."""
    monkeypatch.delenv("TEPATCH_DISABLE_PLUGINS", raising=False)
    rest = [path for path in sys.path if not {"site-packages", "dist-packages"} & set(Path(path).parts)]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *rest])
    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if name.startswith("plugin_of_"):
            del sys.modules[name]


def records(host: PluginHost) -> dict[str, PluginRecord]:
    return {record.name: record for record in host.records}


def test_an_installed_plugin_is_found_and_attributed(site: Site) -> None:
    site.offer("lama", "lama")
    host = PluginHost()
    assert host.records == (
        PluginRecord(name="lama", distribution="tepatch-lama", version="1.0", status="loaded", patches=("lama",)),
    )
    assert host.patch("lama").model_types == ("lama",)
    assert list(host.patches) == ["lama"]


def test_plugins_are_loaded_in_the_order_of_their_names(site: Site) -> None:
    for name in ("zeta", "alpha", "mid"):
        site.offer(name, name)
    assert [record.name for record in PluginHost().records] == ["alpha", "mid", "zeta"]


def test_entry_points_of_other_groups_are_left_alone(site: Site) -> None:
    site.describe("unrelated", "[console_scripts]\ntepatch = no_such_module\n")
    assert PluginHost().records == ()


BROKEN = {
    "a missing import": ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dep"),
    "a syntax error": ("def (:", "SyntaxError"),
    "an exit on import": ("raise SystemExit(3)", "SystemExit: 3"),
    "another base exception on import": ("raise GeneratorExit", "GeneratorExit"),
    "an error that cannot print itself": (
        "class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute",
        "Mute: <exception str() failed>",
    ),
    "a hook that raises": (f"{GOOD}\nPATCHES = (1 / 0 for _ in 'x')", "ZeroDivisionError: division by zero"),
    "a hook that exits": (
        "from tepatch.hookspecs import hookimpl\n@hookimpl\ndef tepatch_patches(): raise SystemExit('bye')",
        "SystemExit: bye",
    ),
    "a hook that gives something else": (f"{GOOD}\nPATCHES = ['text']", "gave a str among its patches"),
    "a hook that gives one patch bare": (
        "from tepatch.hookspecs import hookimpl\nfrom tepatch.patch import Patch\n@hookimpl\n"
        "def tepatch_patches():\n"
        "    return Patch(name='x', model_types=(), replace={'a:B': 'a:C'}, mapping='a:b.yaml')",
        "gave a Patch, not an iterable of Patch",
    ),
    "a hook that gives nothing": (
        "from tepatch.hookspecs import hookimpl\n@hookimpl\ndef tepatch_patches(): pass",
        "gave nothing, not an iterable of Patch",
    ),
    "a patch twice": (f"{GOOD}\nPATCHES = [patch('x'), patch('x', 'y')]", "gave two patches named 'x'"),
    "a patch with a bad field": (
        f"{GOOD}\nPATCHES = [patch('Bad Name')]",
        "not a name for a patch; expected:",
    ),
    "a misspelt hook": (
        "from tepatch.hookspecs import hookimpl\n@hookimpl\ndef tepatch_patchs(): return []",
        "a hook that does not exist, 'tepatch_patchs'. Did you mean 'tepatch_patches'?",
    ),
    "a misspelt hook beside a good one": (
        f"{GOOD}\nPATCHES = [patch('x')]\n@hookimpl\ndef tepatch_ops(): return []",
        "a hook that does not exist, 'tepatch_ops'",
    ),
    "a hook with unknown arguments": (
        "from tepatch.hookspecs import hookimpl\n@hookimpl\ndef tepatch_patches(config): return []",
        "PluginValidationError",
    ),
    "no hook at all": ("x = 1", "offers no hook"),
    "a hook that is not marked": (
        "def tepatch_patches(): return []",
        "offers no hook: 'tepatch_patches' is not marked with @tepatch.hookimpl",
    ),
}


@pytest.mark.parametrize(("code", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_plugin_is_reported_and_the_others_work(site: Site, code: str, reason: str) -> None:
    site.offer("alpha", "alpha")
    site.install("broken", code, version="2.5")
    site.offer("zeta", "zeta")
    host = PluginHost()
    record = records(host)["broken"]
    assert (record.status, record.distribution, record.version) == ("failed", "tepatch-broken", "2.5")
    assert reason in record.reason
    assert "\n" not in record.reason
    assert record.patches == ()
    assert list(host.patches) == ["alpha", "zeta"]


def test_a_missing_module_or_attribute_of_an_entry_point_is_a_failure(site: Site) -> None:
    site.describe("a-dist", "[tepatch]\nabsent = no_such_plugin_module\nnoname = json:no_such_name\n")
    site.describe("b-dist", "[tepatch]\nnonsense = ???\n")
    found = records(PluginHost())
    assert {record.status for record in found.values()} == {"failed"}
    assert "ModuleNotFoundError" in found["absent"].reason
    assert "no_such_name" in found["noname"].reason


def test_an_entry_point_to_none_offers_no_hook(site: Site) -> None:
    site.install("void", "plugin = None")
    info = site.folder / "tepatch_void-1.0.dist-info" / "entry_points.txt"
    info.write_text("[tepatch]\nvoid = plugin_of_tepatch_void:plugin\n")
    assert records(PluginHost())["void"].reason == "offers no hook"


def test_an_interrupt_while_a_plugin_loads_is_not_swallowed(site: Site) -> None:
    site.install("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        PluginHost()


def test_a_hook_of_a_newer_host_may_be_marked_optional(site: Site) -> None:
    site.install("new", f"{GOOD}\nPATCHES = [patch('x')]\n@hookimpl(optionalhook=True)\ndef tepatch_ops(): ...")
    assert list(PluginHost().patches) == ["x"]


def test_a_plugin_may_offer_no_patch_here(site: Site) -> None:
    site.install("none", f"{GOOD}\nPATCHES = []")
    assert records(PluginHost())["none"].status == "loaded"


def test_a_distribution_without_metadata_can_still_be_a_plugin(site: Site) -> None:
    for name in ("bare", "naked"):
        site.offer(name, name)
        (site.folder / f"tepatch_{name}-1.0.dist-info" / "METADATA").unlink()
    host = PluginHost()
    assert list(host.patches) == ["bare", "naked"]
    assert host.records[0].distribution == "unknown package"


def test_a_malformed_file_of_one_package_does_not_hide_the_others(site: Site) -> None:
    site.offer("fine", "fine")
    site.describe("a-torn", "[tepatch]\nno equals sign\n")
    site.describe("b-foreign", "[other]\nno equals sign\n")
    (site.describe("c-binary", "") / "entry_points.txt").write_bytes(b"[tepatch]\n\xff\xfe = x\n")
    with pytest.raises((TypeError, ValueError, UnicodeDecodeError)):
        importlib.metadata.entry_points(group="tepatch")
    host = PluginHost()
    assert list(host.patches) == ["fine"]
    assert [record.name for record in host.records] == ["a-torn", "fine"]
    assert "malformed entry_points.txt" in host.records[0].reason


def test_of_two_copies_of_a_package_the_first_on_the_path_counts(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.offer("fine", "fine")
    behind = tmp_path / "behind"
    behind.mkdir()
    Site(behind).describe("Tepatch.Fine", "[tepatch]\nfine = no_such_module\n", version="0.9")
    monkeypatch.setattr(sys, "path", [*sys.path, str(behind)])
    assert [(record.status, record.version) for record in PluginHost().records] == [("loaded", "1.0")]


def test_two_packages_with_one_plugin_name_are_both_named(site: Site) -> None:
    site.offer("same", "one", distribution="aaa")
    site.offer("same", "two", distribution="bbb")
    host = PluginHost()
    assert [record.status for record in host.records] == ["loaded", "duplicate"]
    assert host.records[1].reason == "two plugins are named 'same' (aaa 1.0; bbb 1.0), only the first counts"
    with pytest.raises(PluginError, match=r"duplicate: same \(bbb 1\.0\): two plugins"):
        host.patch("two")


def test_two_entry_points_to_one_object_count_once(site: Site) -> None:
    site.offer("first", "first")
    site.describe("again", "[tepatch]\nsecond = plugin_of_tepatch_first\n")
    host = PluginHost()
    assert records(host)["second"].status == "duplicate"
    assert records(host)["second"].reason == "the same object as plugin 'first'"
    assert list(host.patches) == ["first"]


def test_a_patch_that_two_plugins_offer_is_refused_and_both_are_named(site: Site) -> None:
    site.offer("aaa", "same", "other-a")
    site.offer("bbb", "same: else", "other-b")
    host = PluginHost()
    with pytest.raises(PluginError) as caught:
        host.patch("same")
    message = str(caught.value)
    assert "patch 'same' is offered by 2 plugins" in message
    assert "aaa (tepatch-aaa 1.0)" in message
    assert "bbb (tepatch-bbb 1.0)" in message
    assert "TEPATCH_DISABLE_PLUGINS=aaa or TEPATCH_DISABLE_PLUGINS=bbb" in message
    assert list(host.patches) == ["other-a", "other-b"]
    assert host.patch("other-b").name == "other-b"
    assert records(host)["aaa"].reason == "patch 'same' is also offered by bbb (tepatch-bbb 1.0)"
    with pytest.raises(PluginError, match="patch 'same' is offered by 2 plugins"):
        host.patch_for_model_type("else")


def test_a_clash_ends_when_one_plugin_is_disabled(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.offer("aaa", "same: kind-a")
    site.offer("bbb", "same: kind-b")
    monkeypatch.setenv("TEPATCH_DISABLE_PLUGINS", "aaa")
    assert PluginHost().patch("same").model_types == ("kind-b",)


def test_a_model_type_is_sent_to_the_patch_that_serves_it(site: Site) -> None:
    site.offer("both", "llama: llama, smollm", "mistral")
    host = PluginHost()
    assert host.patch_for_model_type("smollm").name == "llama"
    assert host.patch_for_model_type("mistral").name == "mistral"


def test_a_model_type_that_two_patches_serve_is_refused_with_a_choice(site: Site) -> None:
    site.offer("aaa", "fast: llama")
    site.offer("bbb", "exact: llama, other")
    host = PluginHost()
    with pytest.raises(PluginError) as caught:
        host.patch_for_model_type("llama")
    message = str(caught.value)
    assert "patch 'fast' of plugin aaa (tepatch-aaa 1.0)" in message
    assert "patch 'exact' of plugin bbb (tepatch-bbb 1.0)" in message
    assert 'tepatch.load("fast", ...) or tepatch.load("exact", ...)' in message
    assert host.patch_for_model_type("other").name == "exact"


def test_an_unknown_patch_is_explained_with_all_that_is_known(site: Site) -> None:
    site.offer("llama", "llama")
    site.install("mixtral", "import no_such_dependency", version="0.2")
    with pytest.raises(PluginError) as caught:
        PluginHost().patch("lama")
    assert str(caught.value).splitlines() == [
        "no patch named 'lama'. Did you mean 'llama' (tepatch-llama 1.0)?",
        "  available: llama (tepatch-llama 1.0)",
        "  failed to load: mixtral (tepatch-mixtral 0.2): ModuleNotFoundError: No module named 'no_such_dependency'",
        "  fix: repair or uninstall what failed; TEPATCH_DISABLE_PLUGINS=mixtral silences it",
    ]


def test_an_unknown_patch_without_any_plugin_says_that_there_is_none(site: Site) -> None:
    with pytest.raises(PluginError, match="no patch named 'x'\n  available: none\n  fix: install the plugin"):
        PluginHost().patch("x")


def test_an_unknown_model_type_is_explained_with_those_supported(site: Site) -> None:
    site.offer("pair", "llama: llama, smollm3", "mistral")
    with pytest.raises(PluginError) as caught:
        PluginHost().patch_for_model_type("smollm")
    message = str(caught.value)
    assert "no patch for model_type 'smollm'. Did you mean 'smollm3' (patch 'llama', tepatch-pair 1.0)?" in message
    assert "supported: llama, mistral, smollm3" in message


def test_a_disabled_plugin_is_not_imported_but_listed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.offer("keep", "keep")
    site.install("noisy", "raise SystemExit")
    site.offer("other", "other")
    monkeypatch.setenv("TEPATCH_DISABLE_PLUGINS", " noisy , other,, unknown")
    host = PluginHost()
    assert [record.status for record in host.records] == ["loaded", "disabled", "disabled"]
    assert "plugin_of_tepatch_noisy" not in sys.modules
    with pytest.raises(PluginError, match=r"disabled: other \(tepatch-other 1\.0\): TEPATCH_DISABLE"):
        host.patch("other")


def test_a_star_disables_all_installed_plugins(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.offer("a", "a")
    site.offer("b", "b")
    monkeypatch.setenv("TEPATCH_DISABLE_PLUGINS", "*")
    host = PluginHost()
    assert [record.status for record in host.records] == ["disabled", "disabled"]
    with pytest.raises(PluginError, match="fix: check TEPATCH_DISABLE_PLUGINS, or install"):
        host.patch("a")


def test_the_variable_is_read_when_a_host_is_made(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.offer("a", "a")
    host = PluginHost()
    monkeypatch.setenv("TEPATCH_DISABLE_PLUGINS", "a")
    assert list(host.patches) == ["a"]
    assert list(PluginHost().patches) == []


class HandMade:
    """A plugin that is an object and was never installed."""

    @hookimpl
    def tepatch_patches(self) -> list[Patch]:
        return [Patch(name="hand", model_types=("hand",), replace={"a:B": "a:C"}, mapping="a:b.yaml")]


def test_a_plugin_may_be_passed_by_hand(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.offer("installed", "installed")
    monkeypatch.setenv("TEPATCH_DISABLE_PLUGINS", "*")
    host = PluginHost((), plugins=[HandMade()])
    assert [(record.status, record.distribution) for record in host.records] == [("loaded", "")]
    assert host.patch("hand").name == "hand"
    with pytest.raises(PluginError, match=r"Did you mean 'hand' \(HandMade at 0x"):
        host.patch("hands")


def test_two_plugins_passed_by_hand_do_not_clash_by_the_name_of_their_class() -> None:
    host = PluginHost((), plugins=[HandMade(), types.SimpleNamespace(), types.SimpleNamespace()])
    assert [record.status for record in host.records] == ["loaded", "failed", "failed"]
    with pytest.raises(PluginError) as caught:
        host.patch("other")
    assert "failed to load: SimpleNamespace at 0x" in str(caught.value)
    assert "TEPATCH_DISABLE_PLUGINS" not in str(caught.value)  # it has no say in these


def test_entry_points_may_be_given(site: Site) -> None:
    site.offer("a", "a")
    site.offer("b", "b")
    host = PluginHost(importlib.metadata.entry_points(group="tepatch", name="b"))
    assert [record.label for record in host.records] == ["b (tepatch-b 1.0)"]
    bare = importlib.metadata.EntryPoint(name="c", value="plugin_of_tepatch_a", group="tepatch")
    assert [record.label for record in PluginHost([bare]).records] == ["c"]


def test_the_default_host_is_made_on_first_use_and_can_be_forgotten(site: Site) -> None:
    default_host.cache_clear()
    try:
        site.offer("a", "a")
        host = default_host()
        assert default_host() is host
        site.offer("b", "b")
        assert list(host.patches) == ["a"]
        default_host.cache_clear()
        assert list(default_host().patches) == ["a", "b"]
    finally:
        default_host.cache_clear()


def test_listing_plugins_needs_neither_torch_nor_transformers(site: Site) -> None:
    site.offer("a", "a")
    code = (
        f"import sys; sys.path.insert(0, {str(site.folder)!r})\n"
        "import tepatch.plugins\n"
        "print([p.name for p in tepatch.plugins.default_host().patches.values() if p.name == 'a'])\n"
        "print([name for name in ('torch', 'transformers', 'transformer_engine') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["['a']", "[]"]
