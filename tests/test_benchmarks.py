"""The scripts in benchmarks/ need machines and minutes; here tiny models go through those for training and loading."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tepatch.te import probe

pytestmark = pytest.mark.slow

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


def script(root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", root / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_gpu(pytestconfig: pytest.Config) -> ModuleType:
    return script(pytestconfig.rootpath, "train_gpu")


@pytest.fixture(scope="module")
def loading(pytestconfig: pytest.Config) -> ModuleType:
    return script(pytestconfig.rootpath, "load")


@pytest.fixture(scope="module")
def report(pytestconfig: pytest.Config) -> ModuleType:
    pytest.importorskip("matplotlib", reason="charts are drawn with matplotlib, which is not installed")
    return script(pytestconfig.rootpath, "report")


@pytest.fixture(scope="module")
def made(loading: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The loading benchmark's tiny checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    loading.make(folder, "tiny")
    return folder


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


def test_the_loading_benchmark_measures_all_that_it_is_asked_for(
    loading: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    contenders = ["read", "read-direct", "tepatch", "transformers"]
    command = [loading.__file__, "--device", "cpu", "--shape", "tiny", "--rounds", "2", "--cold-rounds", "1"]
    command += ["--fresh-rounds", "1", "--folder", str(tmp_path), "--four-times", "--output", str(output)]
    command += ["--contenders", *contenders]
    monkeypatch.setattr(sys, "argv", command)
    loading.main()
    written = json.loads(output.read_text())
    runs = written["runs"]
    assert list(runs) == contenders
    for name in ("read", "tepatch", "transformers"):
        assert len(runs[name]["warm"]) == 2
        assert len(runs[name]["cold"]) == 1
        assert runs[name]["first"]["private_bytes"] >= 0
    assert "warm" not in runs["read-direct"]
    assert [name for name in runs if "fresh" in runs[name]] == ["tepatch", "transformers"]
    for name in ("tepatch", "transformers"):
        (fresh,) = runs[name]["fresh"]
        assert fresh["seconds"] > 0
        assert "private_bytes" not in fresh  # nobody watched
    assert runs["tepatch"]["first"]["differing"] == runs["transformers"]["first"]["differing"] == []
    assert runs["tepatch"]["warm"][0]["stages"]["load"] > 0
    assert written["quarter"]["bytes"] < written["bytes"]
    assert written["machine"]["card"]
    assert {each["claim"].split(":")[0] for each in written["verdicts"]} >= {
        "cold",
        "private memory beyond the model's",
    }
    assert list(tmp_path.iterdir()) == [output]
    printed = capsys.readouterr().out
    assert "equal" in printed
    assert "page cache dropped by" in printed


def test_the_loading_benchmarks_checkpoint_is_cut_into_shards_of_neighbours(loading: ModuleType, made: Path) -> None:
    index = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(set(index.values())) == [path.name for path in loading.files_of(made)]
    assert list(index.values()) == sorted(index.values())
    parameters = 2 * 128 * 64 + 64 + 2 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64)
    assert 0 < loading.size_of(made) - 2 * parameters < 10_000  # headers


@pytest.mark.parametrize("contender", ["tepatch", "transformers"])
def test_a_tensor_that_was_loaded_wrong_is_named(loading: ModuleType, made: Path, contender: str) -> None:
    model, _ = loading.prepare(contender, made, "cpu")()
    assert loading.differing(contender, model, made) == []
    model.get_parameter("model.norm.weight").data[3] += 1
    assert loading.differing(contender, model, made) == ["model.norm.weight"]


def test_a_tensor_that_was_not_loaded_is_named(loading: ModuleType, made: Path) -> None:
    model, _ = loading.prepare("transformers", made, "cpu")()
    del model.model.norm
    assert loading.differing("transformers", model, made) == ["model.norm.weight"]


def test_a_contender_that_fails_says_why_and_the_others_do_not_wait_for_it(
    loading: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = loading.Process("tepatch", tmp_path, "cpu")
    assert process.ask()["card"]
    assert "CheckpointError" in process.ask("first")["failed"]
    assert "failed" in process.ask("again")
    process.close()
    monkeypatch.setattr(loading, "ANSWER_SECONDS", 0.01)
    process = loading.Process("tepatch", tmp_path, "cpu")
    assert process.ask() == {"failed": "no answer in 0.01 s"}
    process.close()


def test_the_exit_status_of_the_loading_benchmark_is_that_of_its_contenders(
    loading: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: Path, *_: Any, **__: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"no safetensors")

    monkeypatch.setattr(loading, "make", broken)
    command = [loading.__file__, "--device", "cpu", "--shape", "tiny", "--contenders", "tepatch"]
    monkeypatch.setattr(sys, "argv", [*command, "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        loading.main()
    assert "failed: " in capsys.readouterr().out


@pytest.mark.skipif(probe().usable, reason="Transformer Engine is here")
@pytest.mark.parametrize("contender", ["te_llama", "tepatch-fp8"])
def test_a_contender_that_needs_transformer_engine_is_skipped(loading: ModuleType, made: Path, contender: str) -> None:
    with pytest.raises(loading.Skipped, match="needs Transformer Engine"):
        loading.prepare(contender, made, "cpu")


def test_direct_reads_are_skipped_where_the_file_system_has_none(
    loading: ModuleType, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(loading.Skipped, match="not on this file system"):
        loading.prepare("read-direct", made, "cpu")


def loaded(seconds: float, cold: float | None = None, **first: Any) -> dict[str, Any]:
    return {"warm": [{"seconds": seconds}], "cold": [{"seconds": cold}] if cold else [], "first": first}


GPU_RUNS = {
    "read": loaded(0.5, 7.0),
    "read-direct": {"cold": [{"seconds": 6.0}]},
    "stream": loaded(1.0),
    "tepatch": loaded(1.2, 6.1, peak_bytes=10_100 << 20, final_bytes=10_000 << 20, private_bytes=1 << 30),
    "tepatch-fp8": loaded(
        1.5, peak_bytes=5_400 << 20, final_bytes=5_000 << 20, private_bytes=1 << 30, largest_target_bytes=100 << 20
    ),
    "transformers": loaded(5.0, 9.0),
}


@pytest.mark.parametrize(
    ("name", "key", "value", "missed"),
    [
        ("", "", 0, ""),
        ("transformers", "seconds", 4.7, "warm: time to transformers'"),
        ("stream", "seconds", 0.9, "warm: time to the same bytes streamed, with no model"),
        ("read-direct", "cold", 5.7, "cold: time to the fastest raw read of that disk"),
        ("tepatch-fp8", "seconds", 1.6, "FP8 weights, warm: time to that of bfloat16"),
        ("tepatch", "peak_bytes", 10_300 << 20, "peak GPU memory beyond the final model's"),
        ("tepatch-fp8", "peak_bytes", 5_500 << 20, "FP8 weights: peak GPU memory beyond the final model's"),
        ("tepatch", "private_bytes", 1_540 << 20, "private host memory"),
    ],
)
def test_a_target_of_loading_to_a_gpu_is_met_or_missed(
    loading: ModuleType, name: str, key: str, value: float, missed: str
) -> None:
    runs = copy.deepcopy(GPU_RUNS)
    if key == "seconds":
        runs[name]["warm"] = [{"seconds": value}]
    elif key == "cold":
        runs[name]["cold"] = [{"seconds": value}]
    elif name:
        runs[name]["first"][key] = value
    result = {"device": "cuda", "bytes": 10_000 << 20, "runs": runs}
    found = loading.verdicts(result)
    assert len(found) == 7
    assert [each["claim"] for each in found if not each["holds"]] == [missed] * bool(missed)
    result["quarter"] = {"bytes": 2_500 << 20, "private_bytes": runs["tepatch"]["first"]["private_bytes"] - (129 << 20)}
    assert not loading.verdicts(result)[-1]["holds"]
    result["quarter"]["private_bytes"] += 2 << 20
    assert loading.verdicts(result)[-1]["holds"]


def test_the_targets_of_loading_on_a_cpu_are_others_and_what_was_not_measured_has_no_verdict(
    loading: ModuleType,
) -> None:
    runs = {"clone": loaded(1.0), "tepatch": loaded(1.2, private_bytes=1_600, largest_target_bytes=500)}
    found = loading.verdicts({"device": "cpu", "bytes": 1_000, "runs": runs})
    assert [each["holds"] for each in found] == [False, True]
    assert [round(each["found"], 6) for each in found] == [1.2, 600]
    assert loading.verdicts({"device": "cuda", "bytes": 1, "runs": {"read": {"skipped": "why"}}}) == []


def test_the_table_of_loading_has_what_failed_and_what_differs(loading: ModuleType) -> None:
    runs = {
        "read": loaded(0.5, 2.0),
        "tepatch": loaded(1.0, private_bytes=5 << 20, differing=[]),
        "transformers": loaded(4.0, differing=["x"]),
        "accelerate": {"failed": "out of memory"},
        "te_llama": {"skipped": "needs Transformer Engine"},
    }
    result = {"bytes": 10**10, "device": "cpu", "machine": {"card": "a CPU"}, "runs": runs}
    result["verdicts"] = [{"claim": "it is fast", "found": 2.0, "allowed": 1.0, "unit": "x", "holds": False}]
    lines = loading.table(result)
    assert [line.split()[0] for line in lines[1:6]] == list(runs)
    assert "cold   2.000 (  5.0 GB/s)" in lines[1]
    assert lines[2].endswith("5 MiB private  equal")
    assert "4.00 x" in lines[3]
    assert "1 tensors DIFFER" in lines[3]
    assert "failed: out of memory" in lines[4]
    assert "skipped: needs Transformer Engine" in lines[5]
    assert lines[-1].split() == ["MISS", "it", "is", "fast:", "2.000", "x", "(allowed", "1.000", "x)"]


def test_the_charts_are_drawn_from_the_results_the_same_each_time(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "other"):
        monkeypatch.setattr(sys, "argv", ["report.py", "--images", str(tmp_path / folder)])
        report.main()
    names = [f"{name}.{suffix}" for name in ("families", "load", "train") for suffix in ("png", "svg")]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert (tmp_path / "one" / "load.svg").read_text().startswith("<?xml")


def test_a_chart_without_results_is_left_out_and_medians_are_what_is_drawn(report: ModuleType, tmp_path: Path) -> None:
    runs = {
        "read": loaded(0.5),
        "tepatch": {"warm": [{"seconds": s} for s in (3.0, 1.0, 2.0)]},
        "te_llama": {"skipped": "no"},
    }
    result = {"bytes": 10**10, "device": "cuda", "machine": {"card": "a card"}, "runs": runs}
    result["versions"] = {"torch": "2", "transformers": "5"}
    (tmp_path / "load_gpu.json").write_text(json.dumps(result))
    found = report.charts(tmp_path)
    assert list(found) == ["load"]
    (panel,) = found["load"]
    assert panel.title == "Loading 10.0 GB to the GPU, files in the page cache"
    assert [(bar.value, bar.label) for bar in panel.bars] == [(0.5, "0.50 s   20.0 GB/s"), (2.0, "2.00 s   5.0 GB/s")]


def test_the_chart_of_loading_has_no_other_reader_of_files(report: ModuleType, tmp_path: Path) -> None:
    names = ("stream", "tepatch", "tepatch-safetensors", "tepatch-reader-of-old")
    runs = {name: loaded(seconds, 9.0) for seconds, name in enumerate(names, start=1)}
    result = {"bytes": 10**10, "device": "cuda", "machine": {"card": "a card"}, "runs": runs}
    result["versions"] = {"torch": "2", "transformers": "5"}
    (tmp_path / "load_gpu.json").write_text(json.dumps(result))
    found = report.charts(tmp_path)
    assert [[bar.name for bar in panel.bars] for panel in found["load"]] == 2 * [[report.NAMES["stream"], "tepatch"]]


def test_every_contender_and_peer_has_a_name_on_the_charts(
    report: ModuleType, loading: ModuleType, train_gpu: ModuleType
) -> None:
    assert {*loading.CONTENDERS, *train_gpu.PEERS} <= set(report.NAMES)
