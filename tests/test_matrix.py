"""The script that tests with other versions than the pinned ones, on small packages in an index of the test's own."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

import tepatch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "matrix.py"
PINS = {"transformers": "5.90.0", "peft": "0.90.0", "accelerate": "1.90.0"}
"""Later than what is installed, which pip would keep."""
KIT = """
import transformers

def test_version():
    assert transformers.__version__ in ("5.18.1", "5.90.1")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with the script in it, and a test in the place of each file that the script runs."""
    root = tmp_path / "project"
    for file in ("scripts/matrix.py", "pyproject.toml", "conftest.py"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    for file in ("plugins/one/tests/test_conformance.py", "tests/test_load.py", "tests/test_build.py"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("def test_nothing(): ...\n")
    (root / "tests" / "test_masks.py").write_text(KIT)
    shutil.copy(root / "tests" / "test_masks.py", root / "plugins" / "one" / "tests" / "test_conformance.py")
    return root


def wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    """A package that knows its version."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    files = {
        f"{name}/__init__.py": f'__version__ = "{version}"\n',
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``index(name="1.0 1.1", requires="")``: from then on pip's one index has these versions of these packages."""

    def fill(*, requires: str = "", **packages: str) -> None:
        for name, versions in packages.items():
            for version in versions.split():
                wheel(tmp_path / "index" / name, name, version, requires)
            files = sorted(path.name for path in (tmp_path / "index" / name).glob("*.whl"))
            page = "".join(f'<a href="{file}">{file}</a>\n' for file in files)
            (tmp_path / "index" / name / "index.html").write_text(f"<!DOCTYPE html><html><body>{page}</body></html>")

    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    return fill


def run(project: Path, *arguments: str) -> tuple[int, list[str]]:
    command = [sys.executable, project / "scripts" / "matrix.py", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=250)
    return done.returncode, done.stdout.splitlines()


def run_next(project: Path) -> tuple[int, list[str]]:
    return run(project, "next", *(f"{name}=={version}" for name, version in PINS.items()))


def test_each_minor_is_tested_in_its_newest_patch_release(project: Path, index: Callable[..., None]) -> None:
    index(transformers="5.16.9 5.18.0 5.18.1 5.19.0rc1 5.19.0 6.0.0")
    code, lines = run(project, "minors")
    tests = {line.split(",")[0]: line for line in lines if " passed, " in line}
    assert code == 1, lines
    assert sorted(tests) == ["transformers 5.18.1", "transformers 5.19.0"], lines
    assert ": 4 passed, 0 failed, 0 skipped, " in tests["transformers 5.18.1"]
    assert ": 2 passed, 2 failed, 0 skipped, " in tests["transformers 5.19.0"]
    assert sum("FAILED" in line for line in lines) == 2
    assert not list((project / ".venv-5.18").glob("**/torch")), "what is the same is not installed again"
    code, lines = run(project, "minors", "--", "-k", "absent")
    assert code == 1, "where nothing is run nothing is known"
    assert all(": 0 passed, 0 failed, 0 skipped, " in line for line in lines[:2]), lines


def test_newer_versions_are_tried(project: Path, index: Callable[..., None]) -> None:
    index(transformers="5.90.0 5.90.1", peft="0.90.0", accelerate="1.90.0 1.91.0 2.0.0")
    code, lines = run_next(project)
    assert code == 0, lines
    assert (
        lines[0]
        == "newer than what is pinned: transformers 5.90.1 (pinned: 5.90.0), accelerate 1.91.0 (pinned: 1.90.0)"
    )
    assert lines[1].startswith("transformers 5.90.1, peft 0.90.0, accelerate 1.91.0: 1 passed, 0 failed, 0 skipped, ")
    index(transformers="5.91.0")
    code, lines = run_next(project)
    assert code == 1, lines
    assert lines[1].startswith("transformers 5.91.0, peft 0.90.0, accelerate 1.91.0: 0 passed, 1 failed, 0 skipped, ")
    assert "test_version" in lines[2]


def test_nothing_newer_is_one_line(project: Path, index: Callable[..., None]) -> None:
    index(transformers="5.19.0 5.90.0 6.0.0", peft="0.20.0", accelerate="1.90.0 1.91.0rc1")
    code, lines = run_next(project)
    assert code == 0
    assert lines == ["nothing newer within bounds than transformers 5.90.0, peft 0.90.0, accelerate 1.90.0"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/simple", ""])
def test_an_index_that_does_not_answer_is_one_line(
    url: str, project: Path, index: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    index(transformers="5.90.0")  # and neither of the others
    if url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
    code, lines = run_next(project)
    assert code == 0
    assert len(lines) == 1
    assert lines[0].startswith("newer versions are not tried: the index can not be asked for ")


def test_an_environment_that_is_not_consistent_is_refused(
    tmp_path: Path, project: Path, index: Callable[..., None]
) -> None:
    index(accelerate="0.1.0")  # PEFT needs a later one
    code, lines = run(project, "make", str(tmp_path / "made"), "accelerate==0.1.0")
    assert code == 1
    assert lines[0] == "made with accelerate==0.1.0 is not consistent:"
    assert any("accelerate" in line for line in lines[1:])


def test_a_layer_finds_what_is_below_and_its_own_programs(
    tmp_path: Path, project: Path, index: Callable[..., None]
) -> None:
    index(transformers="5.18.1")
    made = tmp_path / "made"
    assert run(project, "make", str(made), "transformers==5.18.1") == (0, [])
    program = (
        "import tepatch, torch, transformers, sys; print(transformers.__version__, tepatch.__file__, torch.__file__)"
    )
    out = subprocess.run([made / "bin" / "python", "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["5.18.1", tepatch.__file__, torch.__file__]
    assert "tepatch" in subprocess.run([made / "bin" / "tepatch", "--version"], capture_output=True, text=True).stdout


def test_pins_are_within_the_bounds_and_the_oldest_are_the_bounds() -> None:
    made = re.findall(
        r"^(OLDEST_)?(TRANSFORMERS|PEFT|ACCELERATE) \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    bounds: dict[str, Any] = runpy.run_path(str(SCRIPT))["bounds"]()
    assert len(made) == 2 * len(bounds)
    for oldest, name, version in made:
        bound = bounds[name.lower()]
        assert bound.contains(version), name
        lower = [Version(each.version) for each in bound if each.operator == ">="]
        assert not oldest or lower == [Version(version)], name


def collected(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    return done.stdout.splitlines() + done.stderr.splitlines()


def test_first_case_leaves_one_case_of_each_family() -> None:
    lines = collected("--first-case", "plugins/tepatch-bert/tests/test_conformance.py", "tests/test_config.py")
    cases = {
        match.groups() for line in lines if (match := re.search(r"test_conformance\.py::(\w+)\[([\w-]+?)-plan\]", line))
    }
    assert cases == {("test_bert", "masked-lm"), ("test_roberta", "masked-lm")}
    assert any("tests/test_config.py" in line for line in lines), "other tests stay"


def test_a_version_that_is_not_the_expected_one_ends_everything() -> None:
    lines = collected("--expect=typer==0.1.0", "tests/test_config.py")
    assert any(re.match(r"ERROR: expected typer==0\.1\.0, and .*typer/__init__\.py is [\d.]+$", line) for line in lines)
