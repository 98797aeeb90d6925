"""Change lines of tepatch one at a time, and see whether its tests notice: what survives shows a test that is missing.

    make mutants                                                 # both steps, on some of the mutants; or
    pip install cosmic-ray
    python scripts/mutants.py write mutants.jsonl --most 250     # makes the mutants, needs cosmic-ray
    python scripts/mutants.py run mutants.jsonl --workers 8      # tries them, needs what the tests need

A mutant is never written into the tree: a process that has imported torch and transformers forks, imports the changed
module from memory and runs the module's tests in itself until one fails. (Tests that start programs see no change.)
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_MAPPING = [
    f"tests/mapping/test_{name}.py" for name in ["views", "operations", "plan", "accounting", "directions", "messages"]
]
_LAYERS = ["tests/te/test_sequences.py", "tests/test_masks.py", "tests/te/test_decoder.py", "tests/te/test_rope.py"]
_LLAMA = "plugins/tepatch-llama/tests/test_"
TESTS = {
    "tepatch/views.py": [*_MAPPING, "tests/mapping/test_words.py", "tests/transfer/test_shards.py"],
    "tepatch/planning/bind.py": [*_MAPPING, "tests/mapping/test_names.py", "tests/mapping/test_layout_problems.py"],
    "tepatch/te/sequences.py": [*_LAYERS, f"{_LLAMA}parity.py", f"{_LLAMA}citizen.py"],
    "tepatch/te/attention.py": [*_LAYERS, "tests/test_contract.py", f"{_LLAMA}parity.py", f"{_LLAMA}citizen.py"],
    "tepatch/hf/state.py": [
        f"tests/test_{name}.py" for name in ["state_dict", "stock_names", "heads", "trainer", "save_pretrained"]
    ],
}
"""The tests that hold each module, quick ones first."""
SECONDS = 200
"""A mutant whose tests take longer counts as noticed: it waits for ever, or takes much more work."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("write", "run"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--most", type=int, default=250, help="mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds after which no more are begun")
    parser.add_argument("--only", default="", help="modules with this in their path")
    given = parser.parse_args(arguments)
    if given.verb == "write":
        return write(given.file, given.most, given.seed, given.only)
    return run(given.file, given.workers, given.budget, given.only)


def write(file: Path, most: int, seed: int, only: str) -> int:
    """Write mutants, one in a line."""
    with file.open("w", encoding="utf-8") as stream:
        for module in TESTS:
            if only not in module:
                continue
            found = list(mutants(module, most, f"{seed} {module}"))
            for each in sorted(found, key=lambda mutant: (mutant["line"], mutant["new"])):
                stream.write(json.dumps(each) + "\n")
            print(f"{module}: {len(found)} mutants (seed {seed})", flush=True)
    return 0


def mutants(module: str, most: int, seed: str) -> Iterator[dict[str, Any]]:
    """Changes of a module that change what it does: not those of annotations and texts. Drawn from all there are."""
    from cosmic_ray.ast import Visitor, get_ast  # type: ignore[import-not-found]
    from cosmic_ray.mutating import mutate_code  # type: ignore[import-not-found]
    from cosmic_ray.plugins import get_operator, operator_names  # type: ignore[import-not-found]

    class Count(Visitor):  # type: ignore[misc]
        def __init__(self, operator: Any) -> None:
            self.operator, self.found = operator, 0

        def visit(self, node: Any) -> Any:
            self.found += sum(1 for _ in self.operator.mutation_positions(node))
            return node

    text = (ROOT / module).read_text(encoding="utf-8")
    tree = get_ast(text)
    places = []
    for name in operator_names():
        if "Variable" not in name:  # these need to be told which
            count = Count(get_operator(name)())
            count.walk(tree)
            places += [(name, occurrence) for occurrence in range(count.found)]
    random.Random(seed).shuffle(places)
    before, seen = meaning(text), {text}
    for name, occurrence in places:
        changed = mutate_code(text, get_operator(name)(), occurrence)
        if changed is None or changed in seen or meaning(changed) == before:
            continue
        seen.add(changed)
        if len(seen) > most + 1:
            return
        start = next(i for i, (a, b) in enumerate(zip(text, changed, strict=False)) if a != b)
        tails = zip(reversed(text[start:]), reversed(changed[start:]), strict=False)
        same = next((i for i, (a, b) in enumerate(tails) if a != b), min(len(text), len(changed)) - start)
        yield {
            "module": module,
            "operator": name,
            "line": text.count("\n", 0, start) + 1,
            "start": start,
            "old": text[start : len(text) - same],
            "new": changed[start : len(changed) - same],
        }


def meaning(text: str) -> str:
    """What of a module is run, without its texts: its syntax without annotations. Empty for what is no Python."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.JoinedStr):
            node.values = []
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.test, node.body = ast.Constant(False), []
    return ast.dump(tree)


def run(file: Path, workers: int, budget: float, only: str) -> int:
    """Try each mutant in a process of its own, and print those that no test has noticed."""
    os.chdir(ROOT)
    todo = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    todo = [each for each in todo if only in each["module"]]
    random.Random(0).shuffle(todo)
    for heavy in ("torch", "transformers", "transformers.models.llama.modeling_llama", "pytest"):
        importlib.import_module(heavy)
    results: dict[str, Counter[str]] = {module: Counter() for module in TESTS}
    survivors, running, started = [], dict[int, tuple[dict[str, Any], float]](), time.monotonic()
    unchanged = [{"module": module, "start": 0, "old": "", "new": "", "line": 0} for module in TESTS if only in module]
    todo += unchanged  # taken first: tests that fail anyway would notice everything
    while todo or running:
        while todo and len(running) < workers and time.monotonic() - started < budget:
            mutant = todo.pop()
            child = os.fork()
            if child == 0:
                os._exit(tried(mutant))
            running[child] = (mutant, time.monotonic())
        if not running:
            break
        time.sleep(0.02)
        for child, (mutant, since) in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and time.monotonic() - since < SECONDS:
                continue
            if not ended:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
            del running[child]
            code = os.waitstatus_to_exitcode(status) if ended else -1
            if mutant in unchanged:
                if code != 0:
                    print(f"the tests of {mutant['module']} fail as it is (exit code {code})")
                    for other in running:
                        os.kill(other, signal.SIGKILL)
                    return 1
                continue
            outcome = "survived" if code == 0 else "noticed" if ended else "too slow"
            results[mutant["module"]][outcome] += 1
            if code == 0:
                survivors.append(mutant)
                print(shown(mutant), flush=True)
    for module, counts in results.items():
        if counts:
            print(f"{module}: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    print(f"{len(survivors)} survived, {len(todo)} not tried, {time.monotonic() - started:.0f} s")
    return 0


def tried(mutant: dict[str, Any]) -> int:
    """Run the tests of a changed module in this process; gives their exit code: 0 if none has failed."""
    os.setpgid(0, 0)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.dont_write_bytecode = True
    path = ROOT / mutant["module"]
    text, start = path.read_text(encoding="utf-8"), mutant["start"]
    changed = text[:start] + mutant["new"] + text[start + len(mutant["old"]) :]
    name = ".".join(Path(mutant["module"]).with_suffix("").parts)
    sys.meta_path.insert(0, _Changed(name, path, changed))
    import pytest

    options = ["-q", "-x", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]
    options += ["-m", "not slow and not gpu"]
    try:
        return int(pytest.main([*options, *TESTS[mutant["module"]]]))
    except BaseException:
        return 1


class _Changed(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Finds one module in memory."""

    def __init__(self, name: str, path: Path, text: str) -> None:
        importlib.machinery.SourceFileLoader.__init__(self, name, str(path))
        self.text = text

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.text, str(self.path), "exec")


def shown(mutant: dict[str, Any]) -> str:
    """The changed line, before and after."""
    text = (ROOT / mutant["module"]).read_text(encoding="utf-8")
    start, end = mutant["start"], mutant["start"] + len(mutant["old"])
    first, last = text.rfind("\n", 0, start) + 1, text.find("\n", end)
    old, new = text[first:last], text[first:start] + mutant["new"] + text[end:last]
    return f"{mutant['module']}:{mutant['line']} survived\n  - {old.strip()}\n  + {new.strip()}"


if __name__ == "__main__":
    sys.exit(main())
