"""What a plugin hands over: a `Patch`, data that says which classes to replace and where the mapping is.

Classes are named by ``"module:Name"`` strings and are imported only when a model is built. So plugins can be
listed, and their mappings checked, on a machine that has neither torch nor a GPU.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.resources
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from tepatch.errors import PluginError, Problem

__all__ = ["Patch", "resolve_class"]

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*", re.ASCII)
_CLASS = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)", re.ASCII)
_RESOURCE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([^\\/:][^\\:]*)", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """One way to build a model with other layers: the classes, and the mapping of their weights.

    Raises `PluginError` when a field has a wrong form. Nothing is imported here.
    """

    name: str
    """What users pass to ``tepatch.load``: lower-case letters, digits, ``-`` and ``_``."""
    model_types: tuple[str, ...]
    """Values of ``config.model_type`` that ``tepatch.load("auto", ...)`` sends here."""
    replace: Mapping[str, str] = field(hash=False)
    """The class to replace -> the class that takes its place, both as ``"module:Name"``."""
    mapping: str
    """The mapping file: ``"package:file.yaml"`` inside an importable package, or an absolute path."""
    summary: str = ""
    """One line for ``tepatch plugins``."""
    layouts: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Other layouts in which checkpoints of these models exist, and the mapping file for each: such checkpoints
    are read, and saved in the layout of ``mapping``."""
    ignores: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Parameters of the replaced classes' ``__init__`` and ``forward`` that the layers need not take, and why: such a
    keyword is dropped. What a layer neither takes nor ignores is an error (`tepatch.contract`)."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise PluginError(problems)
        object.__setattr__(self, "model_types", tuple(self.model_types))
        object.__setattr__(self, "replace", MappingProxyType(dict(self.replace)))
        object.__setattr__(self, "layouts", MappingProxyType(dict(self.layouts)))
        object.__setattr__(self, "ignores", MappingProxyType(dict(self.ignores)))

    def __reduce__(self) -> tuple[Callable[[], Patch], tuple[()]]:
        # A read-only mapping can be neither pickled nor deep-copied, and a model may remember its patch.
        fields: dict[str, Any] = {
            "name": self.name,
            "model_types": self.model_types,
            "replace": dict(self.replace),
            "mapping": self.mapping,
            "summary": self.summary,
            "layouts": dict(self.layouts),
            "ignores": dict(self.ignores),
        }
        return functools.partial(type(self), **fields), ()

    def replacements(self) -> dict[type, type]:
        """Import the classes: the one to replace -> the one that takes its place.

        Raises `PluginError` with every class that cannot be found.
        """
        classes: dict[type, type] = {}
        problems: list[Problem] = []
        for target_name, replacement_name in self.replace.items():
            try:
                target, replacement = _resolve_all(target_name, replacement_name)
            except PluginError as error:
                problems += error.problems
                continue
            if target in classes:
                what = f"'{target_name}' is a class that another entry of 'replace' names already"
                problems.append(Problem(where=f"patch '{self.name}'", what=what, fix="keep one of the two"))
            classes[target] = replacement
        if problems:
            raise PluginError(problems, heading=f"patch '{self.name}': its classes cannot be imported")
        return classes

    def mapping_path(self, layout: str = "") -> Path:
        """Find the mapping file on disk: that of the patch, or of one of its other ``layouts``.

        Raises `PluginError` when the package or the file is absent, or the package is not unpacked.
        """
        where = f"patch '{self.name}'"
        mapping = self.layouts[layout] if layout else self.mapping
        if Path(mapping).is_absolute():
            path = Path(mapping)
            if not path.is_file():
                raise PluginError(Problem(where=where, what=f"no mapping file '{path}'"))
            return path
        package, _, file = mapping.partition(":")
        module = _import(package, where=where)
        if not hasattr(module, "__path__"):
            fix = "give 'mapping' as 'package:file.yaml'"
            raise PluginError(Problem(where=where, what=f"'{package}' is a module, not a package", fix=fix))
        folder = importlib.resources.files(package)
        resource = folder.joinpath(*file.split("/"))
        if not resource.is_file():
            there = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith((".yaml", ".yml")))
            found = "no YAML file in the package" if not there else ", ".join(there)
            what = f"package '{package}' has no file '{file}'"
            fix = "check the name, and that the package's build configuration includes YAML files"
            raise PluginError(Problem(where=where, what=what, found=found, fix=fix))
        if not isinstance(resource, Path):
            what = f"package '{package}' is not unpacked on disk, so its mapping cannot be read"
            raise PluginError(Problem(where=where, what=what, fix="install the package with pip"))
        return resource


def resolve_class(name: str) -> type:
    """Import the class that a ``"module:Name"`` string names.

    Raises `PluginError` when the form is wrong, the module cannot be imported, it has no such name, or that
    is not a class.
    """
    match = _CLASS.fullmatch(name)
    if match is None:
        expected = "'module:Name', e.g. 'collections:OrderedDict'"
        raise PluginError(Problem(where=repr(name), what="does not name a class", expected=expected))
    module_name, class_name = match.groups()
    module = _import(module_name, where=name)
    try:
        found = getattr(module, class_name)
    except AttributeError as error:
        what = f"module '{module_name}' has no '{class_name}'"
        close = difflib.get_close_matches(class_name, dir(module), n=3)
        fix = f"did you mean {' or '.join(repr(other) for other in close)}?" if close else ""
        raise PluginError(Problem(where=name, what=what, fix=fix)) from error
    if not isinstance(found, type):
        what = f"'{class_name}' in '{module_name}' is not a class"
        raise PluginError(Problem(where=name, what=what, found=type(found).__name__))
    return found


def _import(module_name: str, *, where: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # importing runs the module, which may raise anything
        what = f"module '{module_name}' cannot be imported: {type(error).__name__}: {error}"
        raise PluginError(Problem(where=where, what=what, fix=_import_hint(module_name, error))) from error


def _resolve_all(*names: str) -> list[type]:
    classes: list[type] = []
    problems: list[Problem] = []
    for name in names:
        try:
            classes.append(resolve_class(name))
        except PluginError as error:
            problems += error.problems
    if problems:
        raise PluginError(problems)
    return classes


def _import_hint(module_name: str, error: Exception) -> str:
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    if (module_name + ".").startswith(error.name + "."):
        return f"check the spelling, and that the package of '{error.name}' is installed"
    return f"install '{error.name}', which '{module_name}' imports"


def _problems(patch: Patch) -> Iterator[Problem]:
    """Check the form of each field. Plugins are rarely type-checked, so types are checked too."""
    where = f"patch {patch.name!r}"
    if not isinstance(patch.name, str) or _NAME.fullmatch(patch.name) is None:
        expected = "lower-case letters, digits, '-' and '_', starting with a letter or digit"
        yield Problem(where=where, what="not a name for a patch", expected=expected, found=repr(patch.name))
    elif patch.name == "auto":
        what = "the name 'auto' is taken: it means the patch for the config's model_type"
        yield Problem(where=where, what=what, fix="choose another name")
    is_list = isinstance(patch.model_types, (tuple, list))
    if not is_list or not all(isinstance(value, str) and value for value in patch.model_types):
        expected = "a tuple of strings, e.g. ('llama',)"
        yield Problem(where=where, what="bad 'model_types'", expected=expected, found=repr(patch.model_types))
    if not isinstance(patch.replace, Mapping) or not patch.replace:
        expected = "a mapping with at least one 'module:Name': 'module:Name'"
        yield Problem(where=where, what="bad 'replace'", expected=expected, found=repr(patch.replace))
    else:
        for name in (name for pair in patch.replace.items() for name in pair):
            if not isinstance(name, str) or _CLASS.fullmatch(name) is None:
                what = "bad class name in 'replace'"
                yield Problem(where=where, what=what, expected="'module:Name'", found=repr(name))
    is_table = isinstance(patch.layouts, Mapping)
    if not is_table or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in patch.layouts):
        expected = "names of layouts, spelt as a patch's name is, and a mapping file for each"
        yield Problem(where=where, what="bad 'layouts'", expected=expected, found=repr(patch.layouts))
    reasons = patch.ignores.items() if isinstance(patch.ignores, Mapping) else [("", "")]
    if not all(isinstance(text, str) and text.strip() for pair in reasons for text in pair):
        expected = "names of parameters, and for each the reason why it may be dropped"
        yield Problem(where=where, what="bad 'ignores'", expected=expected, found=repr(patch.ignores))
    files = {"mapping": patch.mapping, **({f"layouts[{n!r}]": v for n, v in patch.layouts.items()} if is_table else {})}
    for name, file in files.items():
        if not isinstance(file, str) or not (Path(file).is_absolute() or _RESOURCE.fullmatch(file)):
            expected = "'package:file.yaml' or an absolute path"
            yield Problem(where=where, what=f"bad '{name}'", expected=expected, found=repr(file))
