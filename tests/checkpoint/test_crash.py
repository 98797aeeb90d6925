"""Processes that are killed while they write: the destination is whole or absent, and the next run goes on.

Everything here is a real process, a real kill and a real disk. One test kills before every single change that is
made to the disk, so no moment is left to chance; the others kill from outside, at any moment, also within a write.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tepatch.checkpoint import Staging

PARTIAL = ".out.tepatch-partial"
FILES = {f"model-{number}.safetensors": bytes([number]) * (10_000 + number) for number in range(3)}
FILES["config.json"] = b"{}"
OLD = {"config.json": b"old", "model.safetensors": b"old"}


def copy(
    source: Path, destination: Path, *, overwrite: bool, job: str | None, step: Callable[[], object] = lambda: None
) -> None:
    """The job that is killed: each file of ``source`` to ``destination``; ``step`` is called on the way."""
    need = {path.name: path.stat().st_size for path in sorted(source.iterdir())}
    with Staging(destination, overwrite=overwrite, source=source, need=need, job=job) as staging:
        for file in need:
            if not staging.is_done(file):
                with staging.create(file) as stream:
                    data = memoryview((source / file).read_bytes())
                    for start in range(0, len(data), 100_000):
                        stream.write(data[start : start + 100_000])
                        step()
        step()
        staging.commit()


COPY = f"""
from __future__ import annotations
import os, signal, sys
from pathlib import Path
from tepatch.checkpoint import Staging

{inspect.getsource(copy)}
"""

KILL_AT_EACH_CHANGE = (
    COPY
    + """
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "open"}

def run_until(point, *arguments, **options):
    seen = 0
    def before(event, details):
        nonlocal seen
        if event in CHANGES:
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(before)
    copy(*arguments, **options)

root, overwrite, job = Path(sys.argv[1]), sys.argv[2] == "overwrite", sys.argv[3] or None
point = 0
while True:
    point += 1
    folder = root / str(point)
    folder.mkdir()
    if overwrite:
        (folder / "out").mkdir()
        (folder / "out" / "config.json").write_bytes(b"old")
        (folder / "out" / "model.safetensors").write_bytes(b"old")
    child = os.fork()
    if child == 0:
        try:
            run_until(point, root / "source", folder / "out", overwrite=overwrite, job=job)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
"""
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for file, data in FILES.items():
        (folder / file).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def journaled(folder: Path) -> dict[str, tuple[int, int]]:
    """The files that the journal vouches for, each with what would change if it were written again."""
    try:
        lines = (folder / PARTIAL / "journal").read_text().splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines[1:]:
        path = folder / PARTIAL / "new" / json.loads(line)["file"]
        if path.exists():
            found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def finish(source: Path, folder: Path, *, overwrite: bool, job: str | None) -> None:
    """Run the job once more, undisturbed; the destination must be whole then, and alone."""
    kept = journaled(folder)
    copy(source, folder / "out", overwrite=overwrite, job=job)
    assert contents(folder / "out") == contents(source)
    assert os.listdir(folder) == ["out"]
    if job is not None:
        for file, stamp in kept.items():
            status = (folder / "out" / file).stat()
            assert (status.st_ino, status.st_mtime_ns) == stamp, f"{file} was complete, and was written again"


@pytest.mark.parametrize("job", ["job", None])
@pytest.mark.parametrize("mode", ["new", "overwrite"])
def test_a_kill_before_any_change_to_the_disk_loses_nothing(
    mode: str, job: str | None, tmp_path: Path, source: Path
) -> None:
    command = [sys.executable, "-c", KILL_AT_EACH_CHANGE, str(tmp_path), mode, job or ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folders = sorted((path for path in tmp_path.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    last = folders.pop()  # this one was not killed
    assert contents(last / "out") == FILES
    seen = {"absent": 0, "old": 0, "moved away": 0, "complete": 0, "resumable": 0}
    for folder in folders:
        out = folder / "out"
        if not out.exists():
            state = "absent"
            if mode == "overwrite":
                assert contents(folder / PARTIAL / "old") == OLD
                state = "moved away"
        elif mode == "overwrite" and contents(out) == OLD:
            state = "old"
        else:
            assert contents(out) == FILES
            state = "complete"
        seen[state] += 1
        seen["resumable"] += bool(journaled(folder))
        if mode == "overwrite" or state == "absent":
            finish(source, folder, overwrite=mode == "overwrite", job=job)
    print(f"{mode}, job {job}: {len(folders)} kills, {seen}")
    # Each moment that matters was hit; otherwise the loop above has proven nothing about it.
    assert seen["complete"] > 2
    assert seen["old" if mode == "overwrite" else "absent"] > 15
    assert seen["moved away"] >= (mode == "overwrite")
    assert (seen["resumable"] > 5) == (job is not None)


LARGE = {f"model-{number}.safetensors": bytes([number]) * 2_000_000 for number in range(5)}


@pytest.mark.parametrize("name", ["SIGKILL"] * 8 + ["SIGTERM"] * 3 + ["SIGINT"] * 3)
def test_a_process_that_is_killed_from_outside_leaves_whole_or_nothing(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, folder = tmp_path / "source", tmp_path / "work"
    source.mkdir()
    folder.mkdir()
    for file, data in LARGE.items():
        (source / file).write_bytes(data)
    chance = random.Random(request.node.name)  # the test's own: repeated names have numbers
    steps = chance.randrange(1, 20 * len(LARGE) + 2)
    call = "copy(Path(sys.argv[1]), Path(sys.argv[2]), overwrite=False, job='job', step=lambda: print(flush=True))"
    command = [sys.executable, "-c", COPY + call, str(source), str(folder / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(steps):
            process.stdout.readline()
        time.sleep(chance.random() * 0.003)
        process.send_signal(getattr(signal, name))
        process.stdout.read()
        errors = process.stderr.read().decode()
    assert process.returncode in (0, -getattr(signal, name)), errors
    if (folder / "out").exists():
        assert contents(folder / "out") == LARGE
    else:
        assert process.returncode != 0
        finish(source, folder, overwrite=False, job="job")
