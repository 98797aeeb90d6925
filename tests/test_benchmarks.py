"""The scripts in benchmarks/ need machines and minutes; here a tiny model goes through the one for training."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tepatch.te import probe

SMALL = {
    "batches": ["2x16", "1x32"],
    "layers": 2,
    "tiny": True,
    "device": "cpu",
    "warm_up": 1,
    "steps": 3,
    "host_steps": 2,
    "profile_steps": 0,
}


@pytest.fixture(scope="module")
def train_gpu(pytestconfig: pytest.Config) -> ModuleType:
    path = pytestconfig.rootpath / "benchmarks" / "train_gpu.py"
    spec = importlib.util.spec_from_file_location("train_gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("peer", ["hf-sdpa", "tepatch-bf16"])
def test_every_batch_shape_of_the_training_benchmark_is_measured(train_gpu: ModuleType, peer: str) -> None:
    result = train_gpu.run_one(peer, **SMALL)
    assert list(result["batches"]) == SMALL["batches"]
    for measured in result["batches"].values():
        assert len(measured["step_ms"]) == SMALL["steps"]
        assert len(measured["host_ms"]) == SMALL["host_steps"]
        assert min(measured["step_ms"]) > 0
        # Fresh weights know nothing: the loss is about that of a guess among 128 tokens.
        assert measured["loss"] == pytest.approx([4.85, 4.85], abs=0.3)


def test_the_peers_of_the_training_benchmark_have_equally_many_parameters(train_gpu: ModuleType) -> None:
    counts = {train_gpu.run_one(peer, **SMALL)["parameters"] for peer in ("hf-sdpa", "tepatch-bf16")}
    assert len(counts) == 1


def test_the_transformers_model_around_te_llamas_layers_runs_them_all(train_gpu: ModuleType) -> None:
    import torch

    config = train_gpu.make_config(0, tiny=True)
    model, loss_of = train_gpu.hugging_face(config, "cpu")
    seen: list[Any] = []

    class Layer(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **_: Any) -> torch.Tensor:
            seen.append(attention_mask)
            return hidden_states

    train_gpu.fill(model, [Layer(), Layer(), Layer()])
    loss_of(torch.zeros(2, 16, dtype=torch.long)).backward()
    assert seen == [None, None, None]  # Transformer Engine's causal attention needs no mask


@pytest.mark.skipif(probe().usable, reason="Transformer Engine is here")
@pytest.mark.parametrize("peer", ["te_llama-bf16", "te_llama-fp8", "tepatch-fp8"])
def test_a_peer_that_needs_transformer_engine_says_that_it_was_skipped(train_gpu: ModuleType, peer: str) -> None:
    with pytest.raises(train_gpu.Skipped, match="needs Transformer Engine"):
        train_gpu.run_one(peer, **SMALL)


def test_without_the_packing_check_transformers_does_not_look_at_positions(
    train_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import masking_utils

    looked: list[int] = []
    find = masking_utils.find_packed_sequence_indices

    def look(position_ids: Any) -> Any:
        looked.append(1)
        return find(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)  # and restored, whatever the run sets
    train_gpu.run_one("hf-sdpa", **SMALL)
    assert looked
    looked.clear()
    train_gpu.run_one("hf-sdpa", **SMALL, packing_check=False)
    assert not looked


def test_a_loss_that_is_not_a_number_fails_the_peer(train_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make = train_gpu.make

    def broken(*arguments: Any) -> Any:
        model, loss_of = make(*arguments)
        return model, lambda ids: loss_of(ids) * float("nan")

    monkeypatch.setattr(train_gpu, "make", broken)
    with pytest.raises(SystemExit, match="2x16: the loss is nan"):
        train_gpu.run_one("hf-sdpa", **SMALL)


def test_the_table_has_ratios_to_te_llama_and_names_what_did_not_run(train_gpu: ModuleType) -> None:
    def run(milliseconds: float) -> dict[str, Any]:
        return {"batches": {"8x256": {"step_ms": [milliseconds] * 3, "host_ms": [1.0]}}}

    runs = [
        ("te_llama-bf16", run(200.0)),
        ("tepatch-bf16", run(150.0)),
        ("tepatch-fp8", {"failed": "out of memory"}),
        ("hf-liger", {"skipped": "not installed"}),
        ("te_llama-bf16", run(210.0)),
    ]
    lines = train_gpu.table(runs, ["8x256"])[1:]
    assert [line.split()[0] for line in lines] == [peer for peer, _ in runs]
    assert "0.75" in lines[1]
    assert "failed: out of memory" in lines[2]
    assert "skipped: not installed" in lines[3]
    assert "again" in lines[4]
    assert "1.05" in lines[4]


def test_the_whole_script_runs_and_a_peer_that_failed_is_its_exit_status(
    train_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    command = [train_gpu.__file__, "--tiny", "--device", "cpu", "--layers", "1", "--peers", "hf-sdpa"]
    command += ["--warm-up", "1", "--steps", "2", "--host-steps", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output), "--batches", "1x16"])
    train_gpu.main()
    written = json.loads(output.read_text())
    assert [run["peer"] for run in written["runs"]] == ["hf-sdpa"]
    assert written["versions"]["torch"]
    monkeypatch.setattr(sys, "argv", [*command, "--batches", "nonsense"])
    with pytest.raises(SystemExit, match="1"):
        train_gpu.main()
    assert "failed: ValueError" in capsys.readouterr().out
