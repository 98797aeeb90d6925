"""Tests with other versions of transformers, PEFT and accelerate than the pinned ones, in environments of their own.

    python scripts/matrix.py minors [--jobs N] [-- ARGS]     with each minor version of transformers; ARGS are pytest's
    python scripts/matrix.py next NAME==VERSION ...          with newer versions than these pins, if the index has any
    python scripts/matrix.py make FOLDER NAME==VERSION ...   an environment, and nothing else

An environment is a layer on the one that this script runs in. It holds only what is asked for, and what that needs in
other versions; all else, torch above all, is taken from below. ``pip check`` has to find the whole consistent, and
pytest ends at once if another version of transformers is imported than the wanted one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("transformers", "peft", "accelerate")
KIT = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("plugins/*/tests/test_conformance.py"))
LOADING = ["tests/test_load.py", "tests/test_build.py", "tests/test_masks.py"]
QUIET = ["--disable-pip-version-check", "--no-input"]
IMPATIENT = ["--retries", "1", "--timeout", "15"]
RECORD = "TEPATCH_PROVEN"
"""The environment variable with which the kit's tests record in a plugin that all of it passed with these versions."""
MOST_FAILURES = 20


class MatrixError(Exception):
    """What ends the script, in words."""


class NoAnswerError(MatrixError):
    """The index can not be asked."""


def bounds() -> dict[str, SpecifierSet]:
    """What ``pyproject.toml`` allows, by package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    out = dict.fromkeys(PACKAGES, SpecifierSet())
    for requirement in map(Requirement, listed):
        if requirement.name in out:
            out[requirement.name] &= requirement.specifier
    return out


def versions_in_index(name: str, allowed: SpecifierSet) -> list[Version]:
    """The versions within bounds, oldest first. Raises ``NoAnswerError``."""
    # By pip, and so from whatever index or mirror it is set up for.
    done = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", name, *QUIET, *IMPATIENT], capture_output=True, text=True
    )
    found = re.search(r"^Available versions: (.+)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gives no list"]
        raise NoAnswerError(f"the index can not be asked for {name}: {said[-1].removeprefix('ERROR: ')}")
    return sorted(allowed.filter(Version(each.strip()) for each in found[1].split(",")))


def newest_of_minors(versions: Iterable[Version]) -> list[Version]:
    """The newest patch release of each minor version, oldest first."""
    return list({(each.major, each.minor): each for each in sorted(versions)}.values())


@dataclass
class Environment:
    """A folder with a Python in it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def version(self, name: str) -> Version | None:
        """The version of a package that this environment takes, its own or the one below."""
        program = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
        done = subprocess.run([self.python, "-c", program, name], capture_output=True, text=True)
        return None if done.returncode else Version(done.stdout.strip())

    def complaint(self) -> str:
        """What ``pip check`` says, if it finds anything wrong."""
        done = subprocess.run([self.python, "-m", "pip", "check", *QUIET], capture_output=True, text=True)
        return (done.stdout + done.stderr).strip() if done.returncode else ""

    def has(self, requirements: Iterable[Requirement]) -> bool:
        if not self.python.exists():
            return False
        found = {each: self.version(each.name) for each in requirements}
        fits = all(version and each.specifier.contains(version) for each, version in found.items())
        return fits and not self.complaint()

    def make(self, requirements: Iterable[Requirement]) -> None:
        """Make it anew, as a layer on the running one. Raises ``MatrixError``."""
        below = sysconfig.get_path("purelib")
        _run([sys.executable, "-m", "venv", "--clear", "--without-pip", self.folder], f"{self.folder} can not be made")
        prefixes = {"base": str(self.folder), "platbase": str(self.folder)}
        layer = Path(sysconfig.get_path("purelib", "venv", vars=prefixes))
        # Not only a path: the .pth files there, of packages installed with pip install -e, have to be read too.
        (layer / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n", encoding="utf-8")
        for entry in importlib.metadata.distribution("tepatch").entry_points.select(group="console_scripts"):
            script = self.folder / "bin" / entry.name
            script.write_text(
                f"#!{self.python}\nimport sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
            )
            script.chmod(0o755)
        constraints = self.folder / "constraints.txt"
        constraints.write_text(f"torch=={importlib.metadata.version('torch')}\n", encoding="utf-8")
        wanted = [str(each) for each in requirements]
        install: list[str | Path] = [
            self.python,
            "-m",
            "pip",
            "install",
            "-qq",
            *QUIET,
            "--upgrade",
            "-c",
            constraints,
            *wanted,
        ]
        _run(install, f"{', '.join(wanted)} can not be installed")
        if complaint := self.complaint():
            raise MatrixError(f"{self.folder.name} with {', '.join(wanted)} is not consistent:\n{complaint}")


def _run(command: Sequence[str | Path], what: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise MatrixError(f"{what}:\n{done.stdout.strip()}")


@dataclass
class Result:
    """How tests ended: what pytest counted, and what it printed."""

    versions: str
    log: Path
    returncode: int
    seconds: float

    @property
    def _lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    @property
    def _counts(self) -> Counter[str]:
        summary = next((line for line in reversed(self._lines) if re.search(r" in [\d.]+s\b", line)), "")
        return Counter({word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", summary)})

    @property
    def passed(self) -> bool:
        return self.returncode == 0 and self._counts["passed"] > 0  # where all is skipped nothing is known

    def __str__(self) -> str:
        counts = self._counts
        broken = counts["failed"] + counts["error"]
        out = f"{self.versions}: {counts['passed']} passed, {broken} failed, {counts['skipped']} skipped"
        return f"{out}, {self.seconds:.0f} s" + ("" if self.passed else f": see {self.log}")

    @property
    def failures(self) -> list[str]:
        """The failed tests by name; or the end of what was printed, where pytest itself went wrong."""
        named = [line for line in self._lines if line.startswith(("FAILED ", "ERROR "))]
        more = [f"and {len(named) - MOST_FAILURES} more"] if len(named) > MOST_FAILURES else []
        return named[:MOST_FAILURES] + more or self._lines[-MOST_FAILURES:]


def run_tests(environment: Environment, imported: Iterable[str], arguments: list[str], *, record: bool) -> Result:
    """Run pytest, which ends at once if ``imported`` are imported from elsewhere than the environment."""
    versions = {name: environment.version(name) for name in PACKAGES}
    log = environment.folder / "matrix.log"
    # One thread each: the tensors are so small that a second one only waits for the first.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    variables.pop(RECORD, None)
    command: list[str | Path] = [environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--expect={name}=={versions[name]}" for name in imported]
    started = time.monotonic()
    with open(log, "wb") as out:
        done = subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env=variables | ({RECORD: "1"} if record else {}),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Result(shown, log, done.returncode, time.monotonic() - started)


def run_minors(jobs: int, arguments: list[str]) -> int:
    """The conformance kit and the tests of loading with each minor version of transformers, some at a time."""
    here = Environment(Path(sys.prefix))
    allowed = bounds()["transformers"]
    wanted = newest_of_minors(versions_in_index("transformers", allowed))
    if not wanted:
        raise MatrixError(f"the index has no transformers{allowed}")

    def test(version: Version) -> Result:
        requirement = Requirement(f"transformers=={version}")
        environment = here
        if here.version("transformers") != version:
            environment = Environment(ROOT / f".venv-{version.major}.{version.minor}")
            if not environment.has([requirement]):
                environment.make([requirement])
        return run_tests(environment, ["transformers"], [*KIT, *LOADING, *arguments], record=True)

    failed: list[list[str]] = []
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(test, version): version for version in wanted}
        for each in as_completed(running):
            try:
                result = each.result()
            except MatrixError as error:
                print(f"transformers {running[each]}: {error}", flush=True)
                failed.append([])
                continue
            print(result, flush=True)
            if not result.passed:
                failed.append([result.versions, *(f"  {line}" for line in result.failures)])
    for lines in filter(None, failed):
        print("", *lines, sep="\n")
    return 1 if failed else 0


def run_next(pins: list[Requirement]) -> int:
    """One case of each family with newer versions than these, if the index has any within bounds."""
    allowed = bounds()
    pinned = {each.name: Version(next(iter(each.specifier)).version) for each in pins}
    try:
        newest = {name: max([pin, *versions_in_index(name, allowed[name])]) for name, pin in pinned.items()}
    except NoAnswerError as error:
        print(f"newer versions are not tried: {error}")
        return 0
    newer = [f"{name} {newest[name]} (pinned: {pin})" for name, pin in pinned.items() if newest[name] > pin]
    if not newer:
        print("nothing newer within bounds than", ", ".join(f"{name} {pin}" for name, pin in pinned.items()))
        return 0
    print(f"newer than what is pinned: {', '.join(newer)}", flush=True)
    environment = Environment(ROOT / ".venv-next")
    # Ranges, so that the newest are taken that go together.
    environment.make([Requirement(f"{name}{allowed[name]}") for name in pinned])
    if all(environment.version(name) == pin for name, pin in pinned.items()):
        print("but pip takes none of them: they need other versions of each other, or of torch")
        return 0
    arguments = [*KIT, "--first-case", "-n", "2", "--dist", "loadfile"]
    result = run_tests(environment, pinned, arguments, record=False)
    print(result, flush=True)
    if not result.passed:
        print(*(f"  {line}" for line in result.failures), sep="\n")
    return 0 if result.passed else 1


def make(folder: Path, requirements: list[Requirement]) -> int:
    environment = Environment(folder.absolute())
    if not environment.has(requirements):
        environment.make(requirements)
    return 0


def pin(text: str) -> Requirement:
    """``NAME==VERSION``, of a package that has bounds."""
    requirement = Requirement(text)
    exact = [each.operator for each in requirement.specifier] == ["=="]
    if not exact or canonicalize_name(requirement.name) not in PACKAGES:
        raise ValueError(text)
    return requirement


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    minors = commands.add_parser("minors")
    minors.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="so many at a time")
    newer = commands.add_parser("next")
    newer.add_argument("pins", nargs="+", type=pin, metavar="NAME==VERSION")
    maker = commands.add_parser("make")
    maker.add_argument("folder", type=Path)
    maker.add_argument("requirements", nargs="+", type=Requirement, metavar="NAME==VERSION")
    options = parser.parse_args(arguments[:cut])
    try:
        if options.command == "minors":
            return run_minors(options.jobs, arguments[cut + 1 :])
        return run_next(options.pins) if options.command == "next" else make(options.folder, options.requirements)
    except MatrixError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
