"""What is imported when: the tools must start at once, and on machines without a GPU, or even without torch."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tepatch import planning

LIGHT = ["tepatch", "tepatch.plugins", "tepatch.mapping", "tepatch.checkpoint", "tepatch.te", "tepatch.replace"]


@pytest.mark.parametrize("module", [*LIGHT, "tepatch_llama"])
def test_light_modules_import_no_torch(module: str) -> None:
    heavy = {"torch", "transformers", "transformer_engine"}
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_importing_tepatch_takes_a_moment() -> None:
    # The time of a processor: other tests may keep the machine busy.
    program = "import time; start = time.process_time(); import tepatch; print(time.process_time() - start)"
    times = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
        times.append(float(done.stdout))
    assert min(times) <= 0.3


ORDER = [
    *("errors", "contract", "progress", "dtypes", "views", "mapping", "planning", "report", "te"),
    *("patch", "hookspecs", "plugins", "replace", "checkpoint", "transfer", "hf"),
    *("proven", "testing", "proof", "loading", "saving", "conversion", "verify", "certification", "cli"),
]
"""Imports go one way: a room may import those before it."""
ENTRANCES = {"__init__", "__main__"}
"""What people start from: these may import every room, and no room imports them, but for the version."""


def test_every_room_has_its_place_in_the_order(pytestconfig: pytest.Config) -> None:
    root = pytestconfig.rootpath / "tepatch"
    rooms = {_room(path, root) for path in root.rglob("*.py")}
    assert rooms == {*ORDER, *ENTRANCES}
    assert len(ORDER) == len(set(ORDER))


def test_imports_between_rooms_go_one_way(pytestconfig: pytest.Config) -> None:
    root = pytestconfig.rootpath / "tepatch"
    for path in root.rglob("*.py"):
        room = _room(path, root)
        if room in ENTRANCES:
            continue
        for name in _imported(path):
            if name.startswith("tepatch.") and name != "tepatch.__version__":
                other = name.split(".")[1]
                assert other in ORDER, f"{path.name} of {room} imports {name}, by the way of an entrance"
                assert ORDER.index(other) <= ORDER.index(room), f"{path.name} of {room} imports {name}"


def test_the_map_of_rooms_is_the_tree(pytestconfig: pytest.Config) -> None:
    text = (pytestconfig.rootpath / "docs/explanation/design.md").read_text(encoding="utf-8")
    lines = text.partition("    tepatch/\n")[2].partition("    plugins/\n")[0].splitlines()
    inside = [match[1] for line in lines if (match := re.match(r" {8}([a-z_]+)/  ", line))]
    rooms = [match[1] for line in lines if (match := re.match(r" {6}([a-z_]+(?:/?, [a-z_]+)*)/?  ", line))]
    named = [name.rstrip("/") for room in rooms for name in room.split(", ")]
    root = pytestconfig.rootpath / "tepatch"
    assert sorted(named) == sorted({_room(path, root) for path in root.rglob("*.py")} - ENTRANCES)
    assert sorted(inside) == sorted(path.parent.name for path in (root / "te").glob("*/__init__.py"))


def test_the_core_names_no_architecture(pytestconfig: pytest.Config) -> None:
    for path in (pytestconfig.rootpath / "tepatch").rglob("*.py"):
        for name in _imported(path):
            is_table = name.startswith("transformers.models.auto")  # of every architecture
            assert is_table or not name.startswith(("tepatch_", "transformers.models")), f"{path} imports {name}"


def test_plugins_import_nothing_private_of_tepatch(pytestconfig: pytest.Config) -> None:
    for path in (pytestconfig.rootpath / "plugins").rglob("src/**/*.py"):
        for name in _imported(path):
            assert not any(part.startswith("_") for part in name.split(".")[1:]), f"{path} imports {name}"


def _room(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def _imported(path: Path) -> list[str]:
    out = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "tepatch"
            out += [f"tepatch.{alias.name}" for alias in node.names] if whole else [node.module]
    return out


@pytest.mark.parametrize(
    ("module", "name"), [("tepatch.mapping.diff", "diff_plans"), ("tepatch.mapping.stored", "read_plan")]
)
def test_what_has_moved_is_found_with_a_warning(module: str, name: str) -> None:
    old = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match="tepatch.planning"):
        found = getattr(old, name)
    assert found is getattr(planning, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        old.no_such_name  # noqa: B018
