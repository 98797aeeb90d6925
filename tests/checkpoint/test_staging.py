"""What a destination may be, what stays and what goes when a job ends early, and what the disk is told in which order.

Kills are in test_crash.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tepatch.checkpoint import Staging
from tepatch.checkpoint.locking import FolderLock
from tepatch.errors import SaveError

NEED = {"a.safetensors": 3, "b.safetensors": 5}


def stage(destination: Path, *, overwrite: bool = False, **options: Any) -> Staging:
    return Staging(destination, overwrite=overwrite, **{"need": NEED, "job": "job", **options})


def fill(staging: Staging, *files: str) -> None:
    for file in files or NEED:
        if not staging.is_done(file):
            staging.write(file, file[0] * NEED[file])


def write_all(destination: Path, **options: Any) -> Staging:
    with stage(destination, **options) as staging:
        fill(staging)
        staging.write("config.json", "{}")
        staging.commit()
    return staging


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


WHOLE = {"a.safetensors": b"aaa", "b.safetensors": b"bbbbb", "config.json": b"{}"}


def run(destination: Path, write: Callable[[Staging], object], **options: Any) -> Staging:
    with stage(destination, **options) as staging:
        write(staging)
    return staging


def stop_after(destination: Path, *files: str, **options: Any) -> None:
    """A run that ends by an error when ``files`` are written."""

    def write(staging: Staging) -> None:
        fill(staging, *files)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(destination, write, **options)


def problems_of(destination: Path, **options: Any) -> list[str]:
    with pytest.raises(SaveError) as caught, stage(destination, **options):
        pass
    return [str(problem) for problem in caught.value.problems]


def checkpoint(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("old")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# --- complete, or not at all ---


@pytest.mark.parametrize("job", ["job", None])
def test_the_destination_is_complete_and_nothing_else_is_left(job: str | None, tmp_path: Path) -> None:
    staging = write_all(tmp_path / "deep" / "er" / "out", job=job)
    assert contents(tmp_path / "deep" / "er" / "out") == WHOLE
    assert os.listdir(tmp_path / "deep" / "er") == ["out"]
    assert staging.notes == []


def test_until_the_commit_there_is_no_destination(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staging:
        fill(staging)
        assert not (tmp_path / "out").exists()
        staging.commit()
        assert (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, None])
def test_without_a_job_nothing_stays_of_a_run_that_ends_early(
    error: type[BaseException] | None, tmp_path: Path
) -> None:
    def stop(staging: Staging) -> None:
        fill(staging, "a.safetensors")
        if error is not None:
            raise error

    with pytest.raises(error) if error is not None else contextlib.nullcontext():
        run(tmp_path / "out", stop, job=None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_the_same_job_goes_on_with_the_files_that_are_complete(error: type[BaseException], tmp_path: Path) -> None:
    def stop(staging: Staging) -> None:
        fill(staging, "a.safetensors")
        with staging.create("b.safetensors") as stream:
            stream.write(b"bb")
            raise error

    with pytest.raises(error):
        run(tmp_path / "out", stop)
    new = tmp_path / ".out.tepatch-partial" / "new"
    assert contents(new) == {"a.safetensors": b"aaa"}
    before = (new / "a.safetensors").stat()
    with stage(tmp_path / "out") as staging:
        assert staging.is_done("a.safetensors")
        assert not staging.is_done("b.safetensors")
        assert staging.notes == ["going on; complete already: a.safetensors"]
        fill(staging)
        staging.write("config.json", "{}")
        staging.commit()
    assert contents(tmp_path / "out") == WHOLE
    after = (tmp_path / "out" / "a.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert os.listdir(tmp_path) == ["out"]


def test_a_job_that_wrote_no_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), stage(tmp_path / "out"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("job", ["other", None])
def test_the_files_of_another_job_are_removed_and_that_is_said(job: str | None, tmp_path: Path) -> None:
    stop_after(tmp_path / "out", "a.safetensors")
    with stage(tmp_path / "out", job=job) as staging:
        assert not staging.is_done("a.safetensors")
        (note,) = staging.notes
        assert "removed the unfinished files" in note
        assert os.listdir(staging.destination.parent / ".out.tepatch-partial" / "new") == []


def test_a_file_of_another_size_than_planned_or_noted_is_written_again(tmp_path: Path) -> None:
    stop_after(tmp_path / "out", "a.safetensors", "b.safetensors")
    new = tmp_path / ".out.tepatch-partial" / "new"
    with stage(tmp_path / "out", need={**NEED, "b.safetensors": 6}) as staging:
        assert staging.is_done("a.safetensors")
        assert not staging.is_done("b.safetensors")
    (new / "a.safetensors").write_bytes(b"aa")
    for need in ({"a.safetensors": 2}, {}):  # what the journal says counts too
        with stage(tmp_path / "out", need=need) as staging:
            staging.write("c.json", "{}")
            assert not staging.is_done("a.safetensors")


def test_a_file_that_the_journal_does_not_name_is_not_kept(tmp_path: Path) -> None:
    stop_after(tmp_path / "out", "a.safetensors")
    new = tmp_path / ".out.tepatch-partial" / "new"
    (new / "b.safetensors").write_bytes(b"xxxxx")
    (new / ".c.partial").write_bytes(b"x")
    (new / "folder").mkdir()
    with stage(tmp_path / "out") as staging:
        assert not staging.is_done("b.safetensors")
        assert os.listdir(new) == ["a.safetensors"]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_of_the_journal_that_was_cut_short_is_not_believed(cut: int, tmp_path: Path) -> None:
    stop_after(tmp_path / "out", "a.safetensors", "b.safetensors")
    journal = tmp_path / ".out.tepatch-partial" / "journal"
    journal.write_bytes(journal.read_bytes()[:-cut])
    with stage(tmp_path / "out") as staging:
        assert staging.notes == ["going on; complete already: a.safetensors"]
        fill(staging)
    with stage(tmp_path / "out") as staging:
        assert staging.is_done("a.safetensors")
        assert staging.is_done("b.safetensors")


@pytest.mark.parametrize("text", [b"", b"\n", b"[]\n", b"\xff\n", b'{"journal": 2, "job": "job"}\n', b"\0" * 64])
def test_a_journal_that_is_none_keeps_nothing(text: bytes, tmp_path: Path) -> None:
    stop_after(tmp_path / "out", "a.safetensors")
    (tmp_path / ".out.tepatch-partial" / "journal").write_bytes(text)
    with stage(tmp_path / "out") as staging:
        assert not staging.is_done("a.safetensors")
        assert len(staging.notes) == 1


def test_a_journal_leads_to_no_file_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    stop_after(tmp_path / "out", "a.safetensors")
    with (tmp_path / ".out.tepatch-partial" / "journal").open("a") as stream:
        stream.write('{"file": "../../mine", "bytes": 4}\n')
    staging = write_all(tmp_path / "out")
    assert staging.notes == ["going on; complete already: a.safetensors"]
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_a_file_that_only_an_earlier_run_wrote_does_not_get_into_the_destination(tmp_path: Path) -> None:
    def stop(staging: Staging) -> None:
        staging.write("extra.json", "{}")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out", stop)
    staging = write_all(tmp_path / "out")
    assert contents(tmp_path / "out") == WHOLE
    assert "left out extra.json" in staging.notes[-1]


def test_a_commit_without_all_files_is_refused(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staging:
        fill(staging, "a.safetensors")
        with pytest.raises(SaveError, match=r"b\.safetensors: was not written") as caught:
            staging.commit()
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "out").exists()


def test_a_commit_while_a_file_is_written_is_refused(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staging, staging.create("c.json"):
        fill(staging)
        with pytest.raises(SaveError, match=r"c\.json: is still being written"):
            staging.commit()
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_wrong_size_does_not_get_its_name(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staging:
        with pytest.raises(SaveError, match="not written as it was planned") as caught:
            staging.write("a.safetensors", "aaaa")
        assert caught.value.problems[0].expected == "3 bytes"
        assert os.listdir(tmp_path / ".out.tepatch-partial" / "new") == []


@pytest.mark.parametrize("name", ["", "../a", "/a", "a/b", ".a.partial", "a\n"])
def test_a_file_is_a_plain_name(name: str, tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staging, pytest.raises(ValueError, match="cannot be a file"):
        staging.write(name, "")
    with pytest.raises(ValueError, match="cannot be a file"):
        stage(tmp_path / "out", need={name: 1})


def test_one_file_is_not_written_twice_at_once(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staging, staging.create("a.safetensors") as stream:
        stream.write(b"aaa")
        with pytest.raises(ValueError, match="being written already"):
            staging.write("a.safetensors", "aaa")


def test_nothing_is_written_outside_the_block(tmp_path: Path) -> None:
    stop_after(tmp_path / "out", "a.safetensors", "b.safetensors")
    with stage(tmp_path / "out") as staging:
        fill(staging)
    for call in (staging.commit, lambda: staging.write("a.safetensors", "aaa")):
        with pytest.raises(ValueError, match="inside its with block"):
            call()
    assert not (tmp_path / "out").exists()


def test_threads_write_different_files_at_once(tmp_path: Path) -> None:
    need = {f"{number}.safetensors": 200_000 for number in range(24)}

    def write(file: str) -> None:
        with staging.create(file) as stream:
            for _ in range(100):
                stream.write(file.encode()[:1] * 2000)

    with stage(tmp_path / "out", need=need) as staging, ThreadPoolExecutor(6) as pool:
        list(pool.map(write, need))
        journal = (tmp_path / ".out.tepatch-partial" / "journal").read_text().splitlines()
        staging.commit()
    assert len(journal) == 25
    assert contents(tmp_path / "out") == {file: file.encode()[:1] * size for file, size in need.items()}


def test_bytes_may_go_past_the_stream(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"xxbbbbb")
    with stage(tmp_path / "out") as staging:
        fill(staging, "a.safetensors")
        with staging.create("b.safetensors") as stream, (tmp_path / "source").open("rb") as source:
            stream.write(b"b")
            stream.flush()
            assert os.copy_file_range(source.fileno(), stream.fileno(), 4, offset_src=2) == 4
        staging.commit()
    assert (tmp_path / "out" / "b.safetensors").read_bytes() == b"bbbbb"


def test_the_disk_has_each_thing_before_a_name_promises_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def relative(path: str | os.PathLike[str]) -> str:
        return str(Path(path).relative_to(tmp_path)).replace(".out.tepatch-partial", "partial")

    def traced_fsync(fd: int) -> None:
        fsync(fd)
        events.append(f"sync {relative(os.readlink(f'/proc/self/fd/{fd}'))}")

    def traced(move: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any) -> None:
            events.append(f"{relative(source)} -> {relative(target)}")
            move(source, target)

        return call

    with stage(tmp_path / "out") as staging:
        fill(staging, "a.safetensors")
        monkeypatch.setattr(os, "fsync", traced_fsync)
        monkeypatch.setattr(os, "replace", traced(replace))
        monkeypatch.setattr(os, "rename", traced(rename))
        fill(staging, "b.safetensors")
        staging.commit()
    assert events == [
        "sync partial/new/.b.safetensors.partial",
        "partial/new/.b.safetensors.partial -> partial/new/b.safetensors",
        "sync partial/new",
        "sync partial/journal",
        "sync partial/new",
        "partial/new -> out",
        "sync partial",
        "sync .",
    ]


# --- overwriting ---


def test_overwriting_replaces_the_folder_and_merges_nothing(tmp_path: Path) -> None:
    checkpoint(tmp_path / "out", **{"old.safetensors": b"x"})
    write_all(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == WHOLE
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_when_the_last_rename_fails_the_old_folder_is_moved_back(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "out")
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if Path(source).name == "new":
            assert not (tmp_path / "out").exists()
            raise error
        rename(source, target)

    def write(staging: Staging) -> None:
        fill(staging)
        monkeypatch.setattr(os, "rename", failing)
        staging.commit()

    with pytest.raises(SaveError if isinstance(error, OSError) else KeyboardInterrupt):
        run(tmp_path / "out", write, overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path / "out") == {"config.json": b"old"}
    with stage(tmp_path / "out", overwrite=True) as staging:
        assert all(map(staging.is_done, NEED))
        staging.commit()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("job", ["job", None])
def test_nothing_is_removed_when_somebody_else_writes_the_destination_between_the_renames(
    job: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "out")
    rename = os.rename

    def late(source: Any, target: Any) -> None:
        if Path(source).name == "new":
            checkpoint(tmp_path / "out", mine=b"mine")
        rename(source, target)

    with stage(tmp_path / "out", overwrite=True, job=job) as staging:
        fill(staging)
        monkeypatch.setattr(os, "rename", late)
        with pytest.raises(SaveError, match="not empty"):
            staging.commit()
    assert contents(tmp_path / "out") == {"config.json": b"old", "mine": b"mine"}
    partial = tmp_path / ".out.tepatch-partial"
    assert contents(partial / "old") == {"config.json": b"old"}
    assert contents(partial / "new").keys() == NEED.keys()


def interrupted(tmp_path: Path) -> Path:
    """The disk after a kill between the two renames: the old folder is away, the new one not there yet."""
    checkpoint(tmp_path / "out")
    stop_after(tmp_path / "out", "a.safetensors", "b.safetensors", overwrite=True)
    partial = tmp_path / ".out.tepatch-partial"
    os.rename(tmp_path / "out", partial / "old")
    return partial


def test_an_old_folder_that_a_crash_left_away_is_moved_back(tmp_path: Path) -> None:
    interrupted(tmp_path)
    staging = write_all(tmp_path / "out", overwrite=True)
    assert "moved" in staging.notes[0]
    assert "going on" in staging.notes[1]
    assert contents(tmp_path / "out") == WHOLE
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_folder_that_is_moved_back_is_not_overwritten_unasked(tmp_path: Path) -> None:
    partial = interrupted(tmp_path)
    (problem,) = problems_of(tmp_path / "out")
    assert "exists" in problem
    assert contents(tmp_path / "out") == {"config.json": b"old"}
    assert sorted(os.listdir(partial)) == ["journal", "new"]


def test_an_old_folder_is_kept_when_something_else_has_taken_its_place(tmp_path: Path) -> None:
    partial = interrupted(tmp_path)
    checkpoint(tmp_path / "out", **{"mine.safetensors": b"mine"})
    (problem,) = problems_of(tmp_path / "out", overwrite=True)
    assert str(partial / "old") in problem
    assert contents(tmp_path / "out") == {"config.json": b"old", "mine.safetensors": b"mine"}
    assert contents(partial / "old") == {"config.json": b"old"}
    assert contents(partial / "new").keys() == NEED.keys()


def test_an_old_folder_whose_overwrite_was_complete_is_removed(tmp_path: Path) -> None:
    partial = interrupted(tmp_path)
    os.rename(partial / "new", tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("new")
    with stage(tmp_path / "out", overwrite=True) as staging:
        assert "its overwrite was complete" in staging.notes[0]
        assert not (partial / "old").exists()
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_kill_after_the_last_rename_has_left_is_tidied_when_the_destination_is_refused(tmp_path: Path) -> None:
    for has_old in (True, False):
        partial = interrupted(tmp_path)
        (partial / "new" / "config.json").write_text("new")
        os.rename(partial / "new", tmp_path / "out")
        if not has_old:
            shutil.rmtree(partial / "old")
        (problem,) = problems_of(tmp_path / "out")
        assert "exists" in problem
        assert f"removed {partial}: " in problem
        assert os.listdir(tmp_path) == ["out"]
        assert contents(tmp_path / "out") == {**WHOLE, "config.json": b"new"}
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("case", ["new", "new and old", "no checkpoint", "empty", "link", "source"])
def test_remains_that_somebody_may_need_are_named_and_stay(case: str, tmp_path: Path) -> None:
    partial, source = interrupted(tmp_path), None
    if case == "new":
        os.rename(partial / "old", tmp_path / "out")
    elif case == "new and old":
        checkpoint(tmp_path / "out")
    else:
        os.rename(partial / "new", tmp_path / "elsewhere")
        if case == "link":
            (tmp_path / "elsewhere" / "config.json").write_text("new")
            (tmp_path / "out").symlink_to("elsewhere")
        else:
            (tmp_path / "out").mkdir()
        if case == "no checkpoint":
            (tmp_path / "out" / "thesis.tex").write_text("x")
        if case == "source":
            (tmp_path / "out" / "config.json").write_text("new")
            source = partial / "old"
    before = sorted(tmp_path.rglob("*"))
    (problem,) = problems_of(tmp_path / "out", source=source)
    assert f"an earlier run are in {partial}: " in problem
    assert sorted(tmp_path.rglob("*")) == before


def test_remains_are_left_to_whoever_is_at_work_there(tmp_path: Path) -> None:
    partial = interrupted(tmp_path)
    os.rename(partial / "new", tmp_path / "out")
    lock = FolderLock(partial, where="")
    before = sorted(tmp_path.rglob("*"))
    (problem,) = problems_of(tmp_path / "out")
    assert "earlier run" not in problem
    assert "removed" not in problem
    assert sorted(tmp_path.rglob("*")) == before
    lock.release()


def test_a_destination_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staging:
        fill(staging)
        checkpoint(tmp_path / "out")
        with pytest.raises(SaveError, match="exists"):
            staging.commit()
    assert contents(tmp_path / "out") == {"config.json": b"old"}


# --- rules of the destination ---


def test_a_destination_that_exists_is_refused_with_the_way_to_replace_it(tmp_path: Path) -> None:
    checkpoint(tmp_path / "out")
    (problem,) = problems_of(tmp_path / "out")
    assert "exists" in problem
    assert "overwrite=True" in problem
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "overwrite=True" in problems_of(tmp_path / "out")[0]
    write_all(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == WHOLE


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda out: out.write_text("x"), "not a folder"),
        (lambda out: out.symlink_to("elsewhere"), "symbolic link"),
        (lambda out: (checkpoint(out.with_name("real")), out.symlink_to("real")), "symbolic link"),
        (lambda out: (out.mkdir(), (out / "thesis.tex").write_text("x")), "not a checkpoint"),
        (lambda out: (checkpoint(out), (out / "sub").mkdir()), "holds a folder, sub"),
    ],
    ids=["file", "dangling link", "link", "no checkpoint", "sub-folder"],
)
def test_what_is_never_overwritten(
    make: Callable[[Path], object], reason: str, overwrite: bool, tmp_path: Path
) -> None:
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    (problem,) = problems_of(tmp_path / "out", overwrite=overwrite)
    assert reason in problem
    assert "overwrite=True" not in problem
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "sign",
    [
        *("config.json", "tepatch.json", "x.safetensors.index.json", "model-00001-of-00002.safetensors"),
        *("pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin", "tepatch.safetensors"),
    ],
)
def test_what_makes_a_folder_a_checkpoint(sign: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / sign).write_text("x")
    write_all(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    ("destination", "source", "what"),
    [
        ("in", "in", "this is the checkpoint that is read"),
        ("link", "in", "this is the checkpoint that is read"),
        ("in", "link", "this is the checkpoint that is read"),
        ("link/../in", "in", "this is the checkpoint that is read"),
        ("in/out", "in", "inside the checkpoint that is read"),
        ("link/deep/out", "in", "inside the checkpoint that is read"),
        ("in/out", "link", "inside the checkpoint that is read"),
        (".", "in", "is inside this folder"),
        (".", "link", "is inside this folder"),
        ("in", "in/model.safetensors", "is inside this folder"),
        ("out", ".out.tepatch-partial/new", "is inside this folder"),
        ("linked", "links", "has its model.safetensors here, by a link"),
    ],
)
def test_source_and_destination_are_apart(
    destination: str, source: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "in", **{"model.safetensors": b"x"})
    checkpoint(tmp_path / "linked", **{"model.safetensors": b"x"})
    checkpoint(tmp_path / "links")
    checkpoint(tmp_path / ".out.tepatch-partial" / "new")
    (tmp_path / "links" / "model.safetensors").symlink_to("../linked/model.safetensors")
    (tmp_path / "link").symlink_to("in")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    for root in (Path(), tmp_path):
        (problem,) = problems_of(root / destination, source=root / source, overwrite=True)
        assert what in problem
    assert sorted(tmp_path.rglob("*")) == before


def test_a_neighbour_of_the_source_with_a_similar_name_is_a_destination(tmp_path: Path) -> None:
    checkpoint(tmp_path / "in")
    write_all(tmp_path / "in-te", source=tmp_path / "in")
    write_all(tmp_path / "in-te", source=tmp_path / "in" / "config.json", overwrite=True)


def test_problems_of_destination_and_parent_come_together(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    problems = problems_of(tmp_path / "file" / "out", source=tmp_path)
    assert len(problems) == 2
    assert "inside the checkpoint that is read" in problems[0]
    assert f"{tmp_path / 'file'}: is not a folder" in problems[1]


@pytest.mark.parametrize("name", ["data.bin", "notes.safetensors", "optimizer.bin", "index.json", "MODEL.BIN"])
def test_what_does_not_make_a_folder_a_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    (problem,) = problems_of(tmp_path / "out", overwrite=True)
    assert "it is not a checkpoint" in problem
    assert contents(tmp_path / "out") == {name: b"mine"}


@pytest.mark.parametrize(
    ("destination", "what"),
    [
        ("a\0b", "there is a NUL"),
        (Path("a\0b"), "there is a NUL"),
        ("", "is empty"),
        (3, "no path of a folder"),
        (None, "no path of a folder"),
        (b"out", "no path of a folder"),
        ("\ud800", "no path on this system"),
    ],
)
def test_what_is_no_path_is_refused_by_name(destination: Any, what: str) -> None:
    with pytest.raises(SaveError, match=what) as caught:
        stage(destination)
    (problem,) = caught.value.problems
    assert problem.where == ascii(destination)


def test_a_destination_named_by_dots_is_the_folder_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "out")
    (tmp_path / "away" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out")
    assert stage(Path()).destination == tmp_path / "out"
    assert stage(Path("..")).destination == tmp_path
    (tmp_path / "link").symlink_to("away/sub")
    assert stage(Path("../link/../out")).destination == tmp_path / "away" / "out"


def test_an_error_of_the_operating_system_is_told_as_ours(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path / ("x" * 250))
    assert "could not be written" in problem
    assert "File name too long" in problem


def test_a_staging_folder_that_is_none_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "journal").write_text("mine")
    (tmp_path / ".out.tepatch-partial").symlink_to("mine")
    (problem,) = problems_of(tmp_path / "out")
    assert "is not a folder" in problem
    assert contents(tmp_path / "mine") == {"journal": b"mine"}


# --- space, and file systems that say no ---


def test_space_is_checked_before_a_byte_is_written(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path / "out", need={"a.safetensors": 2**60})
    assert "not enough space" in problem
    assert f"{2**60:,} bytes" in problem
    assert "bytes are free" in problem
    assert os.listdir(tmp_path) == []


def run_mounted(tmp_path: Path, program: str) -> str:
    """Run a program with a file system of its own of 2 MiB at ``disk``, and return what it prints.

    Mounted in a name space of the process, so that root is not needed and nothing can be left mounted.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"', str(disk)]
    try:
        subprocess.run([*mount, "true"], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a mount of its own: {getattr(error, 'stderr', '') or error}")
    heading = """
        import os, subprocess, sys
        from pathlib import Path
        from tepatch.checkpoint import Staging
        from tepatch.errors import SaveError
        disk = Path(sys.argv[1])
        tree = lambda: sorted(str(path.relative_to(disk)) for path in disk.rglob("*"))
    """
    program = textwrap.dedent(heading) + textwrap.dedent(program)
    done = subprocess.run(
        [*mount, sys.executable, "-c", program, str(disk)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("piece", [1_000, 1_000_000], ids=["small writes", "large writes"])
def test_a_disk_that_fills_up_is_told_and_the_job_goes_on_later(piece: int, tmp_path: Path) -> None:
    printed = run_mounted(
        tmp_path,
        f"""
        need = {{"a.safetensors": 500_000, "b.safetensors": 1_000_000}}
        def run():
            with Staging(disk / "out", overwrite=False, need=need, job="job") as staging:
                if not staging.is_done("a.safetensors"):
                    staging.write("a.safetensors", b"a" * 500_000)
                if not run.failed:
                    (disk / "others").write_bytes(b"x" * 900_000)  # other people write to this disk too
                with staging.create("b.safetensors") as stream:
                    for _ in range(1_000_000 // {piece}):
                        stream.write(b"b" * {piece})
                staging.commit()
            return staging
        run.failed = False
        try:
            run()
        except SaveError as error:
            print(error)
        print(tree())
        run.failed = True
        os.unlink(disk / "others")
        print(run().notes, tree())
        print((disk / "out/b.safetensors").read_bytes() == b"b" * 1_000_000)
        """,
    )
    error, _, rest = printed.partition("\n[")
    assert "out/b.safetensors: could not be written" in error
    assert "No space left on device" in error
    assert "bytes are free on this file system" in error
    assert "fix: free some space, then run the same again: files that are complete are kept" in error
    partial = ".out.tepatch-partial"
    left = [partial, f"{partial}/journal", f"{partial}/new", f"{partial}/new/a.safetensors", "others"]
    assert f"[{rest}".splitlines() == [
        str(left),
        "['going on; complete already: a.safetensors'] ['out', 'out/a.safetensors', 'out/b.safetensors']",
        "True",
    ]


def test_a_disk_that_fills_up_keeps_nothing_without_a_job(tmp_path: Path) -> None:
    printed = run_mounted(
        tmp_path,
        """
        try:
            with Staging(disk / "out", overwrite=False, need={}, job=None) as staging:
                staging.write("a.safetensors", b"a" * 500_000)
                staging.write("b.safetensors", b"b" * 5_000_000)
        except SaveError as error:
            print(error.problems[0].fix)
        print(tree())
        """,
    )
    assert printed.splitlines() == ["free some space, then run it again", "[]"]


def test_an_interrupt_on_a_full_disk_stays_an_interrupt(tmp_path: Path) -> None:
    printed = run_mounted(
        tmp_path,
        """
        try:
            with Staging(disk / "out", overwrite=False, need={}, job=None) as staging:
                with staging.create("a.safetensors") as stream:
                    stream.write(b"a" * 1000)  # is in the buffer, and will not get to the disk
                    try:
                        (disk / "others").write_bytes(b"x" * 5_000_000)
                    except OSError:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            print(tree())
        """,
    )
    assert printed.splitlines() == ["['others']"]


def test_what_is_complete_already_needs_no_space(tmp_path: Path) -> None:
    printed = run_mounted(
        tmp_path,
        """
        need = {"a.safetensors": 1_200_000, "b.safetensors": 600_000}
        for is_last in (False, True):
            with Staging(disk / "out", overwrite=False, need=need, job="job") as staging:
                if not staging.is_done("a.safetensors"):
                    staging.write("a.safetensors", b"a" * 1_200_000)
                if is_last:
                    staging.write("b.safetensors", b"b" * 600_000)
                    staging.commit()
        print(tree())
        """,
    )
    assert printed.splitlines() == ["['out', 'out/a.safetensors', 'out/b.safetensors']"]


def test_with_overwrite_the_bytes_of_the_old_folder_are_not_counted_as_free(tmp_path: Path) -> None:
    printed = run_mounted(
        tmp_path,
        """
        (disk / "out").mkdir()
        (disk / "out/model.safetensors").write_bytes(b"x" * 1_500_000)
        try:
            with Staging(disk / "out", overwrite=True, need={"model.safetensors": 1_000_000}, job=None):
                pass
        except SaveError as error:
            print(error)
        print(tree())
        """,
    )
    assert "not enough space" in printed
    assert "stays until the end" in printed
    assert printed.endswith("['out', 'out/model.safetensors']\n")


def test_a_read_only_disk_and_the_root_of_one_are_refused(tmp_path: Path) -> None:
    printed = run_mounted(
        tmp_path,
        """
        def attempt(path):
            try:
                with Staging(path, overwrite=True, need={}, job=None):
                    print("entered")
            except SaveError as error:
                print(error.problems[0].what, "|", error.problems[0].found)
        attempt(disk / "out")
        attempt(disk)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        attempt(disk / "out")
        attempt(disk / "deep/er/out")
        """,
    )
    refused = "nothing can be written to this folder | a read-only file system"
    root = "exists, and is never overwritten: it is the root of a file system, and cannot be replaced by a rename | "
    assert printed.splitlines() == ["entered", root, refused, refused]


# --- one writer at a time ---


def test_a_second_writer_is_refused_at_once_and_changes_nothing(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staging:
        fill(staging, "a.safetensors")
        for job in ("job", "other", None):
            (problem,) = problems_of(tmp_path / "out", job=job)
            assert "another process is writing this checkpoint" in problem
            assert f"process {os.getpid()} on " in problem
        fill(staging, "b.safetensors")
        staging.write("config.json", "{}")
        staging.commit()
    assert contents(tmp_path / "out") == WHOLE


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from tepatch.checkpoint import Staging
with Staging(Path(sys.argv[1]), overwrite=False, need={}, job="job") as staging:
    staging.write("a.safetensors", "aaa")
    print("ready", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        (problem,) = problems_of(tmp_path / "out")
        assert f"process {holder.pid} on " in problem
        holder.kill()
    staging = write_all(tmp_path / "out")
    assert staging.notes == ["going on; complete already: a.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_lock_on_a_file_that_has_lost_its_name_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock
    num_open = len(os.listdir("/proc/self/fd"))
    first = FolderLock(tmp_path / "folder", where="here")
    others = []

    def late(fd: int, operation: int) -> None:
        # Between the opening of the file and this, its holder goes, and somebody else comes.
        monkeypatch.setattr(fcntl, "flock", flock)
        first.release()
        others.append(FolderLock(tmp_path / "folder", where="here"))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(SaveError, match="another process"):
        FolderLock(tmp_path / "folder", where="here")
    others.pop().release()
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    write_all(tmp_path / "out")
    stop_after(tmp_path / "out", "a.safetensors", overwrite=True)
    problems_of(tmp_path / "other", need={"a.safetensors": 2**60})
    with stage(tmp_path / "out", overwrite=True):
        problems_of(tmp_path / "out", overwrite=True)
    assert os.listdir("/proc/self/fd") == before


def test_a_lock_file_that_goes_while_another_waits_for_it_locks_nobody_in_twice(tmp_path: Path) -> None:
    inside = 0
    most = 0
    entered = 0
    stop = threading.Event()

    def contend() -> None:
        nonlocal inside, most, entered
        while not stop.is_set():
            try:
                lock = FolderLock(tmp_path / "folder", where="here")
            except SaveError:
                continue
            inside += 1
            most = max(most, inside)
            entered += 1
            if entered >= 2000:
                stop.set()
            inside -= 1
            lock.release()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=contend) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
    assert entered >= 2000
    assert most == 1
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_used_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    staging = write_all(tmp_path / "out")
    assert "has no locks" in staging.notes[0]
    assert contents(tmp_path / "out") == WHOLE
