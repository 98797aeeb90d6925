"""The plugin host: finds installed plugins, loads each on its own, and answers for patch names.

pluggy's own loader stops at the first plugin that fails to import, skips a second package of the same
entry-point name without a word, and never calls a misspelt hook. Here every entry point is loaded by itself,
in the order of its name, and ends as a `PluginRecord` that says what became of it and why: one broken plugin
never takes the others with it, and a name that cannot be answered is explained with all that is known.

A host is made on first use (`default_host`), not at import. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.metadata
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, EntryPoint
from types import MappingProxyType
from typing import Literal

import pluggy

from tepatch import hookspecs
from tepatch.errors import PluginError, Problem
from tepatch.patch import Patch

__all__ = ["DISABLE_VARIABLE", "ENTRY_POINT_GROUP", "PluginHost", "PluginRecord", "default_host"]

ENTRY_POINT_GROUP = "tepatch"
DISABLE_VARIABLE = "TEPATCH_DISABLE_PLUGINS"
"""Environment variable: entry-point names separated by commas, or ``*`` for all. Read when a host is made."""

Status = Literal["loaded", "failed", "disabled", "duplicate"]

_UNKNOWN = "unknown package"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PluginRecord:
    """What became of one plugin."""

    name: str
    """Name of the entry point."""
    distribution: str = ""
    """The package that holds it; empty for a plugin passed by hand."""
    version: str = ""
    status: Status
    reason: str = ""
    """One line. Why it is not loaded; or, if it is, which of its patches clash with another plugin's."""
    patches: tuple[str, ...] = ()
    """Names of the patches that it offers; empty unless loaded."""

    @property
    def label(self) -> str:
        """How messages name the plugin: ``llama (tepatch-llama 0.1.0)``."""
        return f"{self.name} ({self.package})" if self.package else self.name

    @property
    def package(self) -> str:
        """Name and version of the distribution; empty for a plugin passed by hand."""
        return f"{self.distribution} {self.version}".strip()


class PluginHost:
    """The plugins of one process and the patches that they offer.

    `entry_points`: what to load; by default all installed ones of the group ``tepatch``.
    `plugins`: further plugin objects (modules, usually), which the environment variable does not disable.
    """

    def __init__(self, entry_points: Iterable[EntryPoint] | None = None, *, plugins: Iterable[object] = ()) -> None:
        self._records: list[PluginRecord] = []
        self._offers: list[tuple[PluginRecord, Patch]] = []
        self._objects: list[tuple[str, object]] = []
        found = self._discover() if entry_points is None else [(*_origin(e.dist), e) for e in entry_points]
        disabled = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")} - {""}
        for distribution, version, entry in sorted(found, key=lambda item: (item[2].name, item[0])):
            record = PluginRecord(name=entry.name, distribution=distribution, version=version, status="failed")
            if disabled & {entry.name, "*"}:
                self._note(record, "disabled", f"{DISABLE_VARIABLE}={os.environ[DISABLE_VARIABLE]}")
            else:
                self._load(record, entry)
        for plugin in plugins:
            name = getattr(plugin, "__name__", None) or f"{type(plugin).__name__} at {id(plugin):#x}"
            self._load(PluginRecord(name=name, status="failed"), plugin)
        self._mark_conflicts()

    @property
    def records(self) -> tuple[PluginRecord, ...]:
        """What became of each plugin, in the order of loading."""
        return tuple(self._records)

    @property
    def patches(self) -> Mapping[str, Patch]:
        """The patches that can be used, by name. A name that two plugins offer is absent."""
        names = [patch.name for _, patch in self._offers]
        return MappingProxyType({patch.name: patch for _, patch in self._offers if names.count(patch.name) == 1})

    def package_of(self, patch: Patch) -> str:
        """Name and version of the package that offers a patch; empty for one that was passed by hand."""
        return next((record.package for record, offered in self._offers if offered == patch), "")

    def patch(self, name: str) -> Patch:
        """Return the patch of that name.

        Raises `PluginError` when no plugin, or more than one, offers it; the message tells what is available
        and what failed to load.
        """
        offers = [(record, patch) for record, patch in self._offers if patch.name == name]
        if len(offers) == 1:
            return offers[0][1]
        if offers:
            raise PluginError(_same_patch_twice(name, [record for record, _ in offers]))
        owners: dict[str, str] = {}
        for record, patch in self._offers:
            owner = record.package or record.name
            owners[patch.name] = f"{owners[patch.name]} and {owner}" if patch.name in owners else owner
        what = f"no patch named {name!r}" + _did_you_mean(name, owners)
        available = ", ".join(f"{patch} ({owners[patch]})" for patch in sorted(owners))
        raise PluginError(self._explain(name, what, f"available: {available or 'none'}"))

    def patch_for_model_type(self, model_type: str) -> Patch:
        """Return the one patch that serves configs of that ``model_type``.

        Raises `PluginError` when no patch, or more than one, serves it.
        """
        claims = [(record, patch) for record, patch in self._offers if model_type in patch.model_types]
        names = list(dict.fromkeys(patch.name for _, patch in claims))
        if len(names) == 1:
            return self.patch(names[0])
        if names:
            details = tuple(f"patch '{patch.name}' of plugin {record.label}" for record, patch in claims)
            what = f"model_type {model_type!r} is served by {len(claims)} patches"
            fix = "name the patch: " + " or ".join(f'tepatch.load("{name}", ...)' for name in names)
            raise PluginError(Problem(where="", what=what, details=details, fix=fix))
        served = {
            kind: f"patch '{patch.name}', {record.package or record.name}"
            for record, patch in self._offers
            for kind in patch.model_types
        }
        what = f"no patch for model_type {model_type!r}" + _did_you_mean(model_type, served)
        supported = ", ".join(sorted(served)) or "none"
        raise PluginError(self._explain(model_type, what, f"supported: {supported}"))

    def _discover(self) -> Iterator[tuple[str, str, EntryPoint]]:
        """Give (distribution, version, entry point) of the group; a malformed file is noted as a failure.

        Goes through distributions one by one: `importlib.metadata.entry_points()` as a whole fails when a
        single file of any package is malformed.
        """
        seen: set[str] = set()
        for dist in importlib.metadata.distributions():
            try:
                text = dist.read_text("entry_points.txt") or ""
            except (OSError, UnicodeDecodeError):
                continue  # unreadable, so nobody can say that it is a plugin of ours
            if f"[{ENTRY_POINT_GROUP}]" not in text:
                continue
            name, version = _origin(dist)
            # As for imports, the first on sys.path is the one in force: a copy behind it does not count.
            normalized = re.sub(r"[-_.]+", "-", name).lower()
            if normalized in seen:
                continue
            seen |= {normalized} if name != _UNKNOWN else set()
            try:
                yield from ((name, version, e) for e in dist.entry_points.select(group=ENTRY_POINT_GROUP))
            except Exception as error:  # the parser's choice of error differs between Python versions
                record = PluginRecord(name=name, distribution=name, version=version, status="failed")
                self._note(record, "failed", f"malformed entry_points.txt: {_one_line(error)}")

    def _load(self, record: PluginRecord, source: object) -> None:
        """Import (if an entry point) and ask one plugin. Whatever goes wrong ends in its record."""
        for other in self._records:
            if other.name == record.name and other.status != "duplicate":
                owners = f"{other.package or 'passed by hand'}; {record.package or 'passed by hand'}"
                reason = f"two plugins are named '{record.name}' ({owners}), only the first counts"
                self._note(record, "duplicate", reason)
                return
        try:
            plugin = source.load() if isinstance(source, EntryPoint) else source
            for name, other_object in self._objects:
                if other_object is plugin:
                    self._note(record, "duplicate", f"the same object as plugin '{name}'")
                    return
            self._objects.append((record.name, plugin))
            patches = _ask(plugin, record.name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin that calls sys.exit() must not end the user's program
            self._note(record, "failed", _one_line(error))
            return
        record = dataclasses.replace(record, status="loaded", patches=tuple(patch.name for patch in patches))
        self._records.append(record)
        self._offers += [(record, patch) for patch in patches]

    def _note(self, record: PluginRecord, status: Status, why: str) -> None:
        self._records.append(dataclasses.replace(record, status=status, reason=why))

    def _mark_conflicts(self) -> None:
        """Say in the records of loaded plugins which of their patches another one offers too."""
        for index, record in enumerate(self._records):
            clashes = [
                f"patch '{patch.name}' is also offered by {other.label}"
                for other, patch in self._offers
                if patch.name in record.patches and other != record
            ]
            if clashes:
                marked = dataclasses.replace(record, reason="; ".join(clashes))
                self._records[index] = marked

    def _explain(self, asked: str, what: str, known: str) -> Problem:
        """Tell all that is known about a name that nothing answers to."""
        details, names = [known], []
        for record in self._records:
            if record.status != "loaded":
                verb = "failed to load" if record.status == "failed" else record.status
                details.append(f"{verb}: {record.label}: {record.reason}")
            if record.status == "failed" and record.package:
                names.append(record.name)
        if names:
            fix = f"repair or uninstall what failed; {DISABLE_VARIABLE}={','.join(names)} silences it"
        elif any(record.status == "disabled" for record in self._records):
            fix = f"check {DISABLE_VARIABLE}, or install the plugin that offers {asked!r}"
        else:
            fix = f"install the plugin that offers {asked!r}; `tepatch plugins` lists what is installed"
        return Problem(where="", what=what, details=tuple(details), fix=fix)


@functools.cache
def default_host() -> PluginHost:
    """The host of all installed plugins, made on first use; ``default_host.cache_clear()`` forgets it."""
    return PluginHost()


def _ask(plugin: object, name: str) -> list[Patch]:
    """Call the hook of one plugin. A manager of its own keeps what it does wrong from touching the others."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name=name)
    known = [hook for hook in vars(hookspecs) if hook.startswith("tepatch_")]
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        if not caller.has_spec() and not all(impl.optionalhook for impl in caller.get_hookimpls()):
            close = _did_you_mean(caller.name, dict.fromkeys(known, ""))
            raise PluginError(f"implements a hook that does not exist, '{caller.name}'{close}")
    if not any(caller.has_spec() for caller in callers):
        unmarked = [hook for hook in known if callable(getattr(plugin, hook, None))]
        raise PluginError(
            "offers no hook" + (f": '{unmarked[0]}' is not marked with @tepatch.hookimpl" if unmarked else "")
        )
    patches: list[Patch] = []
    for result in manager.hook.tepatch_patches() or [None]:
        if not isinstance(result, Iterable):
            raise PluginError(f"tepatch_patches gave {_kind(result)}, not an iterable of Patch")
        for patch in result:
            if not isinstance(patch, Patch):
                raise PluginError(f"tepatch_patches gave {_kind(patch)} among its patches")
            if patch.name in [other.name for other in patches]:
                raise PluginError(f"tepatch_patches gave two patches named '{patch.name}'")
            patches.append(patch)
    return patches


def _origin(dist: Distribution | None) -> tuple[str, str]:
    """Name and version of a distribution, which may have no readable METADATA."""
    if dist is None:
        return "", ""
    try:
        return dist.metadata["Name"] or _UNKNOWN, dist.metadata["Version"] or ""
    except Exception:  # without METADATA, Python versions differ in what they raise; the plugin may be fine
        return _UNKNOWN, ""


def _same_patch_twice(name: str, records: list[PluginRecord]) -> Problem:
    details = tuple(f"plugin {record.label}" for record in records)
    ways = " or ".join(f"{DISABLE_VARIABLE}={record.name}" for record in records)
    what = f"patch {name!r} is offered by {len(records)} plugins, and none of them goes before the other"
    return Problem(where="", what=what, details=details, fix=f"uninstall one, or set {ways}")


def _did_you_mean(name: str, known: Mapping[str, str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if not close:
        return ""
    owner = known[close[0]]
    return f". Did you mean '{close[0]}'" + (f" ({owner})?" if owner else "?")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _one_line(error: BaseException) -> str:
    """An error as one line; `traceback` copes with errors that cannot print themselves."""
    if isinstance(error, PluginError):
        return "; ".join(line.strip() for line in str(error).splitlines())
    lines = "".join(traceback.format_exception_only(error)).splitlines()
    return "; ".join(line.strip() for line in lines if line.strip())
