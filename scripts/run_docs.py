"""Runs the pages of ``docs/``: what they show is what happens.

    python scripts/run_docs.py docs/tutorial/first-load.md ...            # rewrites the outputs in the pages
    python scripts/run_docs.py --check docs/tutorial/first-load.md ...    # compares, and ends with 1 if they differ

A page is run from top to bottom in a process and an empty folder of its own, in which ``.demo`` is the repository's.
The words after a fence's language say what is done with it:

    ```python                   run; all blocks of a page share their names
    ```text output              what the Python block before it has printed (stdout)
    ```console                  lines "$ COMMAND" are run in a shell, the others are what it prints
    ```yaml file: a/b.yaml      written to that file
    ```python not run: WHY      left alone (any language); so is Python that begins with "# not run"
    <!-- run ... -->            Python that readers need not see

Every page, and every command of tepatch's, is run by a process of its own. Of several pages these are forked when
torch, transformers and tepatch have been imported and nothing has been computed: importing takes longer than the rest.

A line "..." in an output stands for any lines. Decimal fractions (times, errors), versions and digests are not
compared. Nothing is downloaded: ``pip install -e FOLDER`` is done by hand, from the folder's own pyproject.toml.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import json
import linecache
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / ".demo"

_SHELL = re.compile(r"[|&;<>$`*(){}]")
"""What only a shell understands."""
_ELISION = re.compile(r"^[ \t]*\.\.\.[ \t]*\n", re.MULTILINE)

_BLOCK = re.compile(
    r"^(?P<fence>```+)(?P<language>\w*)[ \t]*(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=fence)[ \t]*$"
    r"|^<!-- run\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
_VARIES = (
    # Before numbers: a digest may end like one (e89eb98875e3).
    (re.compile(r"\b(sha256) [0-9a-f]+"), r"\1 (digest)"),
    (
        re.compile(r"\b(tepatch|python|torch|transformers|peft|accelerate) \d+\.\S*?(?=[,:]?(?:\s|$))", re.MULTILINE),
        r"\1 (version)",
    ),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00"), "(date)"),
    (re.compile(r"\d+\.\d+(e[-+]?\d+)?|\d+e[-+]?\d+|(?<=\s)0(?=\s)"), "(measured)"),
    # Why there is no Transformer Engine differs between machines.
    (
        re.compile(r"^( *note: |using the reference modules instead of Transformer Engine: ).*$", re.MULTILINE),
        r"\1(reason)",
    ),
    (re.compile(r"(cannot be used here\n +).*"), r"\1(reason)"),
    # Columns are as wide as their numbers.
    (re.compile(r"(?<=\S) {2,}(?=\S)"), " "),
    (re.compile(r"[ \t]+$", re.MULTILINE), ""),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One fenced block, or a hidden one (its language is then "hidden")."""

    language: str
    info: str
    body: str
    line: int
    """Of the body's first line, from 1."""
    span: tuple[int, int]
    """Where the body lies in the page's text."""

    @property
    def is_run(self) -> bool:
        is_plain = self.language == "python" and not self.info and not self.body.startswith("# not run")
        return self.language == "hidden" or is_plain

    @property
    def reason_not_to_run(self) -> str:
        return self.info.removeprefix("not run:").strip() if self.info.startswith("not run:") else ""


def blocks(text: str) -> list[Block]:
    """All blocks of a page, in order."""
    out = []
    for match in _BLOCK.finditer(text):
        group = "body" if match["hidden"] is None else "hidden"
        language = "hidden" if group == "hidden" else match["language"]
        line = text.count("\n", 0, match.start(group)) + 1
        info = (match["info"] or "").strip()
        out.append(Block(language=language, info=info, body=match[group], line=line, span=match.span(group)))
    return out


def same(shown: str, printed: str) -> bool:
    """Whether an output as a page shows it is what was printed, but for what varies."""
    for pattern, replacement in _VARIES:
        shown, printed = pattern.sub(replacement, shown), pattern.sub(replacement, printed)
    pieces = _ELISION.split(shown.strip("\n") + "\n")
    return re.fullmatch(r"(?:.*\n)?".join(map(re.escape, pieces)), printed.strip("\n") + "\n", re.DOTALL) is not None


def import_all() -> None:
    """Import what the pages use, before anything is forked."""
    for name in ("cli", "loading", "conversion", "certification", "plugins", "proof", "testing", "verify"):
        importlib.import_module(f"tepatch.{name}")
    importlib.import_module("transformers.models.llama.modeling_llama")


def forked(function: Callable[[], Any]) -> tuple[int, str]:
    """Run ``function`` in a process forked from this one; gives its exit code and what it has printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with open(os.devnull, "rb") as nothing:
                    os.dup2(nothing.fileno(), 0)
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                code = int(function() or 0)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(Exception):
                        stream.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed.seek(0)
        return code, printed.read()


class Programs:
    """Runs commands of tepatch's by a process that was forked before this one has computed anything."""

    def __init__(self) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        self._child = os.fork()
        if self._child == 0:
            self._ours.close()
            while True:
                try:
                    arguments, paths, environment, folder = theirs.recv()
                except EOFError:
                    os._exit(0)
                theirs.send(forked(partial(self._run, arguments, paths, environment, folder))[1])
        theirs.close()

    def run(self, arguments: list[str], paths: list[str], environment: dict[str, str]) -> str:
        """What ``tepatch ARGUMENTS`` prints, with ``paths`` added to Python's."""
        self._ours.send((arguments, paths, environment, os.getcwd()))
        return str(self._ours.recv())

    def close(self) -> None:
        self._ours.close()
        os.waitpid(self._child, 0)

    @staticmethod
    def _run(arguments: list[str], paths: list[str], environment: dict[str, str], folder: str) -> None:
        from tepatch.cli import main

        os.environ.update(environment)
        os.chdir(folder)
        sys.path[:0] = paths
        sys.argv = ["tepatch", *arguments]
        main()


class PageRun:
    """Runs the blocks of one page in the working directory."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.text = page.read_text(encoding="utf-8")
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""
        self.programs = Programs()
        self.paths: list[str] = []
        """What ``pip install -e`` has added to ``sys.path``."""
        self.changes: list[tuple[tuple[int, int], str]] = []
        """Outputs that are not as the page shows them: where they lie, and what was printed."""

    def run(self) -> str:
        """Runs everything and gives the text of the page as it should be."""
        for block in blocks(self.text):
            if block.is_run:
                self._python(block)
            elif block.language == "text" and block.info == "output":
                self._compare(block, self.printed)
            elif block.language == "console" and not block.info:
                self._compare(block, self._console(block.body), has_commands=True)
            elif block.info.startswith("file:"):
                file = Path(block.info.removeprefix("file:").strip())
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.body, encoding="utf-8")
            elif block.info and not block.reason_not_to_run:
                raise SystemExit(f"{self.page}:{block.line}: what is '{block.info}'?")
        text = self.text
        for (start, end), printed in reversed(self.changes):
            text = text[:start] + printed + text[end:]
        return text

    def _python(self, block: Block) -> None:
        name = f"{self.page}:{block.line}"
        linecache.cache[name] = (len(block.body), None, block.body.splitlines(keepends=True), name)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block.body, name, "exec"), self.names)
        self.printed = out.getvalue()

    def _console(self, body: str) -> str:
        """The block as it should be: each command with what it prints."""
        out = []
        for line in body.splitlines():
            if line.startswith("$ "):
                out += [line + "\n", self._command(line.removeprefix("$ "))]
        return "".join(out)

    def _command(self, command: str) -> str:
        if command.startswith("pip install -e "):
            self._install(Path(command.removeprefix("pip install -e ").strip()))
            return ""
        programs = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join([*self.paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "COLUMNS": "200",
        }
        if command.startswith("tepatch ") and not _SHELL.search(command):
            printed = self.programs.run(shlex.split(command)[1:], self.paths, {"COLUMNS": environment["COLUMNS"]})
        else:
            printed = subprocess.run(
                command,
                shell=True,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            ).stdout
        return "\n".join(line.rstrip() for line in printed.splitlines()) + "\n" if printed else ""

    def _install(self, folder: Path) -> None:
        """What an editable installation comes to: the sources are on the path, with the package's metadata."""
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        site = Path("site-packages").resolve()
        info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        groups = project.get("entry-points", {})
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in items.items()) for group, items in groups.items()]
        (info / "entry_points.txt").write_text("".join(lines), encoding="utf-8")
        self.paths += [str(site), str((folder / "src").resolve())]
        sys.path[:0] = self.paths

    def _compare(self, block: Block, printed: str, *, has_commands: bool = False) -> None:
        if same(block.body, printed):
            return
        if _ELISION.search(block.body):
            printed = f"{block.body.rstrip()}\n^ lines are left out by hand, and what was printed is:\n{printed}"
        self.changes.append((block.span, printed.strip("\n") + "\n"))


def run_page(page: Path, *, check: bool) -> bool:
    """Runs a page in a folder of its own; gives whether it shows what happens."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        if DEMO.is_dir():
            (Path(folder) / ".demo").symlink_to(DEMO)
        os.chdir(folder)
        run = PageRun(page)
        try:
            text = run.run()
        finally:
            run.programs.close()
            os.chdir(before)
    if text == run.text:
        return True
    if not check:
        page.write_text(text, encoding="utf-8")
    shown, found = run.text.splitlines(), text.splitlines()
    print("\n".join(difflib.unified_diff(shown, found, str(page), "what was printed", lineterm="")))
    return False


def page_code(page: Path, *, check: bool) -> int:
    return 0 if run_page(page, check=check) or not check else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument(
        "--serve", action="store_true", help="read pages from stdin, and print [exit code, output] as JSON for each"
    )
    parser.add_argument("--check", action="store_true", help="change nothing; end with 1 where a page is not current")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the pages show what a CPU does
    if not arguments.serve and len(arguments.pages) == 1:
        return page_code(arguments.pages[0].resolve(), check=arguments.check)
    import_all()
    asked = (line.strip() for line in iter(sys.stdin.readline, "")) if arguments.serve else map(str, arguments.pages)
    worst = 0
    for name in asked:
        code, printed = forked(partial(page_code, Path(name).resolve(), check=arguments.check))
        worst = max(worst, code)
        print(f"{json.dumps([code, printed])}\n" if arguments.serve else printed, end="", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
