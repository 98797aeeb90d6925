"""Several processes that load one model: each reads its own slices, and together every byte once.

All scenarios of ``loading_ranks.py`` run once with 2 processes and once with 4; tests look at what they wrote.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, gradient_terms
from streaming_sample import write_sample

import tepatch
from tepatch.checkpoint import open_checkpoint
from tepatch.transfer.steps import same_bits

SCRIPT = Path(__file__).with_name("loading_ranks.py")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 97,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 129,
    "max_position_embeddings": 64,
}
"""Neither 2 nor 4 processes can divide an MLP's or an embedding's rows evenly."""


@dataclass
class Run:
    """What all processes found."""

    folder: Path
    ranks: int

    def __getitem__(self, scenario: str) -> list[dict[str, Any]]:
        return [torch.load(self.folder / f"{scenario}-{rank}.pt", weights_only=True) for rank in range(self.ranks)]

    def nbytes(self, name: str) -> int:
        return sum(info.nbytes for info in open_checkpoint(self.folder / name).tensors.values())


@pytest.fixture(scope="module", params=[2, 4])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    torch.manual_seed(0)
    for name, tied in (("checkpoint", False), ("tied", True)):
        config = LlamaConfig(**SHAPE, tie_word_embeddings=tied)
        LlamaForCausalLM(config).save_pretrained(folder / name, max_shard_size="100KB")
    write_sample(folder / "rules")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(request.param), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(request.param)
    ]
    try:
        texts = [rank.communicate(timeout=240)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * request.param, "\n".join(texts)
    return Run(folder, request.param)


@pytest.mark.parametrize("scenario", ["llama", "tied"])
def test_each_process_has_its_slices_of_the_whole(scenario: str, run: Run) -> None:
    for found in run[scenario]:
        assert found["local"].keys() == found["expected"].keys()
        for name, expected in found["expected"].items():
            assert same_bits(found["local"][name], expected), name
    heights = {found["local"]["model.embed_tokens.weight"].shape[0] for found in run[scenario]}
    assert len(heights) == 2  # not all are equal


@pytest.mark.parametrize(("scenario", "folder"), [("llama", "checkpoint"), ("tied", "tied")])
def test_together_they_read_every_byte_once(scenario: str, folder: str, run: Run) -> None:
    counts = [found["bytes"] for found in run[scenario]]
    assert sum(counts) == run.nbytes(folder)
    assert max(counts) < 1.1 * sum(counts) / run.ranks


@pytest.mark.parametrize("scenario", ["llama", "tied"])
def test_a_step_of_training_is_that_of_a_model_that_was_sharded_afterwards(scenario: str, run: Run) -> None:
    config = tepatch.load("llama", run.folder / "checkpoint", backend="reference").config
    terms = gradient_terms(config, 16, 16 * run.ranks)  # of a row for each process
    for found in run[scenario]:
        for name, expected in found["expected trained"].items():
            assert_close(found["trained"][name], expected, terms=terms, name=name)


def test_names_are_those_of_the_checkpoint_where_shards_can_be_seen(run: Run) -> None:
    whole = tepatch.load("llama", run.folder / "checkpoint", backend="reference")
    for found in run["llama"]:
        assert "model.embed_tokens.weight" in found["names"]
        assert len(found["names"]) == len(dict(whole.named_parameters()))


def test_shards_of_shards_are_the_whole(run: Run) -> None:
    whole = tepatch.load("llama", run.folder / "checkpoint", backend="reference")
    for found in run["two axes"]:
        for name, parameter in whole.named_parameters():
            assert same_bits(found["full"][name], parameter.detach()), name


def test_every_rule_is_cut_by_rows(run: Run) -> None:
    expected = write_sample(run.folder / "again").expected
    found = run["every rule"]
    for name, whole in expected.items():
        assert same_bits(torch.cat([each["local"][name] for each in found]), whole), name


def test_parts_within_each_other_are_read_once_too(run: Run) -> None:
    """All but what a transposition deals out to everyone, and a packed tensor whose parts are cut across its rows."""
    total = run.nbytes("rules")
    square = 48 * 30 * 2
    assert total <= sum(found["bytes"] for found in run["every rule"]) <= total + (run.ranks - 1) * square


def test_what_does_not_only_shard_is_refused(run: Run) -> None:
    for found in run["refusals"]:
        assert "ValueError: no such mesh" in found["fails"]
        assert "gave values to parameters" in found["fills"]
        assert "another way than by sharding" in found["grows"]
        assert "lm_head.weight" in found["grows"]
        for name in ("halves", "adds"):
            assert "another way than by sharding" in found[name]
        assert "model.embed_tokens.weight" in found["halves"]
        assert "extra" in found["adds"]
        assert "is asynchronous" in found["waits"]
        assert "another kind of device than its weights go to" in found["elsewhere"]
        assert "together with parallelize" in found["device map"]
