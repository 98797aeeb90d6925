"""``tepatch bench load``: every way is measured, and the advice follows from what was measured."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaForCausalLM

import tepatch
from tepatch.cli.benching import PAST, PEER, READ, STREAM, advice
from tepatch.transfer.raw import cached_share, forget

if TYPE_CHECKING:
    from conftest import Run

STAGES = {"build": 0.05, "plan": 0.05, "load": 0.9, "install": 0.0, "allocate": 0.1, "read": 0.2, "copy": 0.1}


@pytest.mark.parametrize(
    ("limits", "stages", "where", "expected"),
    [
        ({READ: 0.1, STREAM: 0.2}, {"load": 0.3}, "", "Python is the limit: 0.70 s of 1.00 s"),
        ({READ: 0.9, STREAM: 0.95}, {}, "cold", "the disk is the limit"),
        ({READ: 1.5, PAST: 0.9, STREAM: 1.5}, {}, "cold", "the disk is the limit"),
        ({READ: 0.2, STREAM: 0.9}, {}, "", "moving the bytes is the limit"),
        ({READ: 0.2, STREAM: 0.3}, {"place": 0.5}, "", "another dtype or order is the limit"),
        ({READ: 0.2, STREAM: 0.3}, {"place": 0.5}, "gpu", "larger pieces (--piece-mib) are fewer to send"),
        ({READ: 0.2, STREAM: 0.3}, {"copy": 0.5}, "gpu", "copies to the GPU are the limit"),
        ({READ: 0.2, STREAM: 0.3}, {"allocate": 0.5}, "", "taking memory for the parameters is the limit"),
        ({READ: 0.2, STREAM: 0.3}, dict.fromkeys(("allocate", "read", "copy"), 0.0), "", "as a library reads"),
        ({READ: 0.2, STREAM: 0.3}, {"read": 0.5}, "cold", "reading is the limit, but not at its best"),
    ],
)
def test_the_advice_names_what_a_load_waits_for(
    limits: dict[str, float], stages: dict[str, float], where: str, expected: str
) -> None:
    is_cold, is_gpu = "cold" in where, "gpu" in where
    said = advice(1.0, {**STAGES, "place": 0.0, **stages}, limits, is_cold=is_cold, is_gpu=is_gpu, threads=4)
    assert expected in said[-1]
    assert [line.split()[0] for line in said[:-1]] == [f"{1 / seconds:.2f}" for seconds in limits.values()]


def test_every_way_is_measured_in_every_round(run: Run, tiny: Path) -> None:
    result = run("bench", "load", tiny, "--rounds", 2, "--source", "safetensors", "--source", "direct", "--json",
                 "--with-transformers", "--threads", 3, "--piece-mib", 1, "--buffers", 5)  # fmt: skip
    assert result.exit_code == 0
    made = json.loads(result.stdout)
    assert list(made["runs"]) == [READ, STREAM, "tepatch, safetensors", "tepatch, direct", PEER]
    for each in made["runs"].values():
        assert len(each["seconds"]) == 2
        assert min(each["seconds"]) > 0
    assert made["bytes"] == (tiny / "model.safetensors").stat().st_size
    assert made["runs"]["tepatch, direct"]["stages"]["load"] > 0
    assert made["runs"][STREAM]["stages"] == {}
    assert made["threads"] == 3
    assert made["piece_bytes"] == 1 << 20
    assert made["buffers"] == 5
    assert "limit" in made["advice"][-1]


def test_transformers_does_the_same_work(run: Run, tiny: Path, tmp_path: Path) -> None:
    """In the dtype that is asked for, and by the class that tepatch would take."""
    for file in tiny.iterdir():
        shutil.copy(file, tmp_path / file.name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Nope"]}))
    loaded: list[Any] = []
    stock = LlamaForCausalLM.from_pretrained
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            LlamaForCausalLM, "from_pretrained", lambda *a, **k: loaded.append(stock(*a, **k)) or loaded[-1]
        )
        arguments = ("--rounds", 1, "--dtype", "float64", "--with-transformers", "--json")
        assert PEER in json.loads(run("bench", "load", tmp_path, *arguments).stdout)["runs"]
    assert {model.dtype for model in loaded} == {torch.float64}


def test_the_table_has_every_way_and_the_stages_of_a_load(run: Run, tiny: Path) -> None:
    result = run("bench", "load", tiny, "--rounds", 1, "--patch", "llama")
    assert result.exit_code == 0
    assert "to cpu: 0.00 GB, warm" in result.stdout
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[4:7]] == [READ, STREAM, "tepatch, direct"]
    assert "tepatch, direct: build 0." in result.stdout
    assert "x the time of 'stream'" in result.stdout


def test_cold_means_that_the_files_are_not_in_the_page_cache(run: Run, tiny: Path) -> None:
    file = tiny / "model.safetensors"
    forget([file])
    if cached_share([file]) != 0:
        pytest.skip("this file system does not let files be dropped from memory, or does not say so")
    made = json.loads(run("bench", "load", tiny, "--rounds", 1, "--cold", "--json").stdout)
    assert made["is_cold"]
    assert PAST in made["runs"] or any(PAST in note for note in made["notes"])
    assert not any("stayed" in note for note in made["notes"])
    with open(file, "rb") as held, mmap.mmap(held.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert sum(view[:: mmap.PAGESIZE]) >= 0  # every page is in use, and can not be dropped
        made = json.loads(run("bench", "load", tiny, "--rounds", 1, "--cold", "--json").stdout)
    assert any("stayed in the page cache" in note for note in made["notes"])


def test_a_disk_without_direct_reads_is_told_and_measured_otherwise(
    run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    made = json.loads(run("bench", "load", tiny, "--rounds", 1, "--cold", "--json").stdout)
    assert PAST not in made["runs"]
    assert any(f"left out '{PAST}'" in note and "Invalid argument" in note for note in made["notes"])


@pytest.mark.parametrize("source", ["telepathy", "instanttensor"])
def test_an_unknown_source_is_wrong_usage(source: str, run: Run, tiny: Path) -> None:
    result = run("bench", "load", tiny, "--source", source)
    assert result.exit_code == 2
    assert f"'{source}' is none of" in result.stderr


def test_pickled_files_can_not_be_measured(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    torch.save({"lm_head.weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    result = run("bench", "load", tmp_path)
    assert result.exit_code == 1
    assert "has no file whose bytes can be read as they are" in result.stderr


def test_a_converted_checkpoint_is_measured_but_not_by_transformers(run: Run, tiny: Path, tmp_path: Path) -> None:
    tepatch.convert("llama", tiny, tmp_path / "te", progress=False)
    assert run("bench", "load", tmp_path / "te", "--rounds", 1).exit_code == 0
    result = run("bench", "load", tmp_path / "te", "--with-transformers")
    assert result.exit_code == 1
    assert "fix: leave --with-transformers out" in result.stderr


def test_a_file_that_transformers_would_not_take_is_not_measured_by_it(run: Run, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    shutil.copytree(tiny, folder)
    file = folder / "other.safetensors"
    file.write_bytes((folder / "model.safetensors").read_bytes())
    assert run("bench", "load", file, "--rounds", 1).exit_code == 0
    result = run("bench", "load", file, "--with-transformers")
    assert result.exit_code == 1
    assert "takes other files of this one\n  fix: leave --with-transformers out" in result.stderr


def test_bench_alone_prints_its_help_and_is_wrong_usage(run: Run) -> None:
    result = run("bench")
    assert result.exit_code == 2
    assert "load" in result.output
