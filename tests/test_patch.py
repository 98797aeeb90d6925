from __future__ import annotations

import collections
import copy
import dataclasses
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tepatch.errors import PluginError
from tepatch.patch import Patch, resolve_class


def make(**changes: Any) -> Patch:
    fields: dict[str, Any] = {
        "name": "tiny",
        "model_types": ("tiny",),
        "replace": {"collections:OrderedDict": "collections:Counter"},
        "mapping": "tiny_package:tiny.tepatch.yaml",
    }
    return Patch(**{**fields, **changes})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "patch_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "tiny.tepatch.yaml").write_text("version: 1\n")
    (folder / "broken.py").write_text("import a_module_that_is_not_there\n")
    (folder / "angry.py").write_text("raise RuntimeError('no driver')\n")
    (folder / "values.py").write_text("class Layer: ...\nnumber = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "patch_package"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["llama", "llama-3", "qwen2_moe", "3d"])
def test_a_name_may_have_digits_dashes_and_underscores(name: str) -> None:
    assert make(name=name).name == name


@pytest.mark.parametrize("name", ["", "Llama", "-llama", "_llama", "a b", "a/b", "llama\n", "l\u00e4ma", None, 3])
def test_a_name_of_another_form_is_refused(name: object) -> None:
    with pytest.raises(PluginError, match="not a name for a patch"):
        make(name=name)


def test_the_name_auto_is_reserved() -> None:
    with pytest.raises(PluginError, match="'auto' is taken"):
        make(name="auto")


@pytest.mark.parametrize("model_types", ["llama", None, (3,), ("",)])
def test_model_types_must_be_a_list_of_strings(model_types: object) -> None:
    with pytest.raises(PluginError, match="bad 'model_types'"):
        make(model_types=model_types)


@pytest.mark.parametrize("replace", [{}, None, [("a:B", "a:C")]])
def test_replace_must_be_a_mapping_that_names_something(replace: object) -> None:
    with pytest.raises(PluginError, match="bad 'replace'"):
        make(replace=replace)


@pytest.mark.parametrize("name", ["module", "module.Name", "module:", ":Name", "a:B:C", "a..b:C", "a:B.c", dict])
def test_class_names_in_replace_must_have_a_module_and_a_name(name: object) -> None:
    with pytest.raises(PluginError, match="bad class name in 'replace'"):
        make(replace={"collections:OrderedDict": name})
    with pytest.raises(PluginError, match="bad class name in 'replace'"):
        make(replace={name: "collections:OrderedDict"})


@pytest.mark.parametrize("mapping", ["tiny.yaml", "relative/tiny.yaml", "package:", "package:/a.yaml", "", None])
def test_a_mapping_must_be_in_a_package_or_absolute(mapping: object) -> None:
    with pytest.raises(PluginError, match="bad 'mapping'"):
        make(mapping=mapping)


def test_all_wrong_fields_are_reported_at_once() -> None:
    with pytest.raises(PluginError) as caught:
        make(name="No", model_types="no", replace={"no": "no"}, mapping="no")
    assert len(caught.value.problems) == 5


def test_a_patch_is_frozen_and_does_not_share_what_it_was_made_of() -> None:
    replace = {"collections:OrderedDict": "collections:Counter"}
    patch = make(replace=replace, model_types=["a", "b"])
    replace["collections:deque"] = "collections:Counter"
    assert dict(patch.replace) == {"collections:OrderedDict": "collections:Counter"}
    assert patch.model_types == ("a", "b")
    with pytest.raises(TypeError):
        patch.replace["x"] = "y"  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        patch.name = "other"  # type: ignore[misc]


def test_a_patch_can_be_hashed_copied_and_pickled() -> None:
    patch = make(summary="for tests")
    assert copy.deepcopy(patch) == patch
    assert pickle.loads(pickle.dumps(patch)) == patch
    assert {patch: 1}[make(summary="for tests")] == 1


def test_a_class_is_found_by_module_and_name() -> None:
    assert resolve_class("collections:OrderedDict") is collections.OrderedDict


@pytest.mark.parametrize("name", ["collections.OrderedDict", "collections", "", "a:b:c", "a b:C"])
def test_a_class_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(PluginError, match="does not name a class") as caught:
        resolve_class(name)
    assert "collections:OrderedDict" in caught.value.problems[0].expected


def test_a_missing_module_is_told_from_a_missing_dependency(package: Path) -> None:
    with pytest.raises(PluginError, match="check the spelling, and that the package of 'no_such_mod'"):
        resolve_class("no_such_mod:Layer")
    with pytest.raises(PluginError, match=r"check the spelling.*'patch_package\.layer'"):
        resolve_class("patch_package.layer:Layer")
    with pytest.raises(PluginError, match=r"install 'a_module_that_is_not_there', which 'patch_package\.broken"):
        resolve_class("patch_package.broken:Layer")


def test_whatever_a_module_raises_on_import_is_told(package: Path) -> None:
    with pytest.raises(PluginError, match="RuntimeError: no driver") as caught:
        resolve_class("patch_package.angry:Layer")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_misspelt_class_gets_close_matches() -> None:
    with pytest.raises(PluginError, match=r"has no 'OrderedDic'\n.*did you mean 'OrderedDict'"):
        resolve_class("collections:OrderedDic")


def test_something_that_is_no_class_is_refused(package: Path) -> None:
    with pytest.raises(PluginError, match=r"'number' in 'patch_package\.values' is not a class") as caught:
        resolve_class("patch_package.values:number")
    assert caught.value.problems[0].found == "int"


def test_replacements_are_imported_classes() -> None:
    assert make().replacements() == {collections.OrderedDict: collections.Counter}


def test_all_classes_that_cannot_be_imported_are_reported_at_once() -> None:
    patch = make(replace={"no_such_a:A": "no_such_b:B", "collections:Nope": "collections:Counter"})
    with pytest.raises(PluginError, match="patch 'tiny': its classes cannot be imported") as caught:
        patch.replacements()
    assert [problem.where for problem in caught.value.problems] == [
        "no_such_a:A",
        "no_such_b:B",
        "collections:Nope",
    ]


def test_a_class_named_twice_is_refused() -> None:
    replace = {
        "collections:OrderedDict": "collections:Counter",
        "json.decoder:JSONDecoder": "collections:Counter",
        "json:JSONDecoder": "collections:ChainMap",
    }
    with pytest.raises(PluginError, match="'json:JSONDecoder' is a class that another entry"):
        make(replace=replace).replacements()


def test_the_mapping_is_found_inside_its_package(package: Path) -> None:
    path = make(mapping="patch_package:tiny.tepatch.yaml").mapping_path()
    assert path == package / "tiny.tepatch.yaml"


def test_the_mapping_may_be_in_a_subfolder_of_the_package(package: Path) -> None:
    (package / "maps").mkdir()
    (package / "maps" / "a.yaml").write_text("")
    assert make(mapping="patch_package:maps/a.yaml").mapping_path() == package / "maps" / "a.yaml"


def test_the_mapping_may_be_an_absolute_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("")
    assert make(mapping=str(file)).mapping_path() == file


def test_an_absolute_mapping_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"no mapping file .*mine\.yaml"):
        make(mapping=str(tmp_path / "mine.yaml")).mapping_path()


def test_a_mapping_that_its_package_lacks_is_refused_and_those_there_are_named(package: Path) -> None:
    with pytest.raises(PluginError, match=r"has no file 'other\.yaml'\n  found:    tiny\.tepatch\.yaml"):
        make(mapping="patch_package:other.yaml").mapping_path()


def test_a_mapping_in_a_package_that_is_absent_is_refused() -> None:
    with pytest.raises(PluginError, match="'no_such_package' cannot be imported"):
        make(mapping="no_such_package:a.yaml").mapping_path()


def test_a_mapping_in_a_plain_module_is_refused(package: Path) -> None:
    with pytest.raises(PluginError, match=r"'patch_package\.values' is a module, not a package"):
        make(mapping="patch_package.values:tiny.tepatch.yaml").mapping_path()


def test_a_mapping_in_a_zipped_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "zipped.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("zipped_patch_package/__init__.py", "")
        file.writestr("zipped_patch_package/a.yaml", "")
    monkeypatch.syspath_prepend(str(archive))
    with pytest.raises(PluginError, match="not unpacked on disk"):
        make(mapping="zipped_patch_package:a.yaml").mapping_path()


def test_importing_patches_and_plugins_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, tepatch.patch, tepatch.plugins, tepatch.replace, tepatch.hookspecs\n"
        "tepatch.plugins.PluginHost(())\n"
        "print([name for name in ('torch', 'transformers', 'transformer_engine') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("layouts", [None, ["other"], {"Other": "a:b.yaml"}, {3: "a:b.yaml"}])
def test_other_layouts_must_be_named_as_patches_are(layouts: object) -> None:
    with pytest.raises(PluginError, match="bad 'layouts'"):
        make(layouts=layouts)


@pytest.mark.parametrize("file", ["b.yaml", "", None, "a/b.yaml"])
def test_the_mapping_of_another_layout_must_be_in_a_package_or_absolute(file: object) -> None:
    with pytest.raises(PluginError, match="layouts"):
        make(layouts={"other": file})


def test_the_mapping_of_another_layout_is_found_and_stays_as_it_was(package: Path) -> None:
    layouts = {"other": "patch_package:tiny.tepatch.yaml"}
    patch = make(layouts=layouts)
    layouts.clear()
    assert patch.mapping_path("other") == package / "tiny.tepatch.yaml"
    assert pickle.loads(pickle.dumps(patch)) == patch
    with pytest.raises(TypeError):
        patch.layouts["more"] = "a:b.yaml"  # type: ignore[index]
