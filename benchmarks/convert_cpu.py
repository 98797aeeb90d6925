"""Converting on a CPU: tepatch beside a plain copy of the same files, in one run.

    python benchmarks/convert_cpu.py [--layers 16] [--rounds 5] [--output benchmarks/results/convert_cpu.json]

Makes a checkpoint of Llama-3.2-1B's shape (2.5 GB in bfloat16, four shards, random weights) on a real disk, brings
it into the page cache, and then takes turns, ``rounds`` times: ``cp`` of its weight files, and conversions to the
layers' layout and back with one worker and with two, each in a process of its own. All of them end with ``sync``,
which counts, and begin with a disk that is at rest, which does not. ``seconds`` is the time of ``convert`` itself;
``process_seconds`` also has the start of Python and all imports.

Private memory is measured in runs of its own, because to look costs time: what a process has for itself and must
write back (dirty or anonymous; mapped files do not count), at its highest, sampled every 5 ms, minus what it had
before.

The bounds: no more than 1.3 times as long as the copy, two workers no slower than one, and no more memory than three
times the largest tensor and 150 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from load_cpu import SHAPE, make

TIME_BOUND = 1.3
MEMORY_ALLOWANCE = 150_000_000
CONTENDERS = ("to te, 1 worker", "to te, 2 workers", "to hf, 1 worker", "to hf, 2 workers")


def private_bytes() -> int:
    """What this process has for itself: its dirty pages, or its anonymous ones if those are more."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    fields = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return max(fields["Private_Dirty"], fields["Anonymous"])


def run_one(source: Path, destination: Path, *, workers: int, watch: bool) -> dict[str, float]:
    """Converts once in this process."""
    from transformers import LlamaForCausalLM  # noqa: F401

    import tepatch
    import tepatch.conversion
    import tepatch_llama.layer  # noqa: F401  (imports are not what is timed)

    before, peak, stop = private_bytes(), [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], private_bytes())

    watcher = threading.Thread(target=sample)
    if watch:
        watcher.start()
    started = time.perf_counter()
    made = tepatch.convert("llama", source, destination, workers=workers, progress=False)
    converted = time.perf_counter()
    os.sync()
    out: dict[str, float] = {"seconds": time.perf_counter() - started, "seconds_before_sync": converted - started}
    out |= {f"seconds_{stage}": seconds for stage, seconds in made.seconds.items()}
    if watch:
        stop.set()
        watcher.join()
        out["private_bytes"] = max(peak[0], private_bytes()) - before
    return out


def in_process(contender: str, sources: dict[str, Path], destination: Path, *, watch: bool = False) -> dict[str, float]:
    """Runs ``run_one`` in a process of its own, on a disk at rest, and removes what was written."""
    layout, workers = contender.split()[1].rstrip(","), contender.split()[2]
    command = [sys.executable, __file__, "--one", str(sources[layout]), str(destination), "--workers", workers]
    rest(destination)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [*command, *(["--watch"] if watch else [])], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    seconds = time.perf_counter() - started
    out: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return out | {"process_seconds": seconds}


def copy(files: list[Path], destination: Path) -> dict[str, float]:
    """The floor: the weight files, copied by the system's own program, and brought to the disk."""
    rest(destination)
    destination.mkdir()
    started = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(destination)], check=True)
    os.sync()
    return {"seconds": time.perf_counter() - started}


def rest(destination: Path) -> None:
    """Removes the last run's files, and waits for the disk."""
    shutil.rmtree(destination, ignore_errors=True)
    os.sync()


def file_system(folder: Path) -> str:
    """The type of the file system that a folder is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(at, kind) for at, kind in mounts if folder.resolve().is_relative_to(at)]
    return max(above, key=lambda entry: len(entry[0]))[1]


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="a folder on a real disk (default: the system's temporary one)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(*arguments.one, workers=arguments.workers, watch=arguments.watch)))
        return

    import torch
    import transformers

    import tepatch

    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        disk = file_system(Path(scratch))
        if disk in ("tmpfs", "ramfs"):
            parser.error(f"{scratch} is in memory ({disk}): give a --scratch on a disk")
        hf, te, destination = (Path(scratch) / name for name in ("hf", "te", "out"))
        hf.mkdir()
        make(hf, arguments.layers)
        tepatch.convert("llama", hf, te, progress=False)
        sources = {"te": hf, "hf": te}  # by the layout that is written
        files = sorted(hf.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        for path in (*files, *te.glob("*.safetensors")):
            path.read_bytes()  # into the page cache
        runs: dict[str, list[dict[str, float]]] = {"cp": [], **{name: [] for name in CONTENDERS}}
        for _ in range(arguments.rounds):
            runs["cp"].append(copy(files, destination))
            for name in CONTENDERS:
                runs[name].append(in_process(name, sources, destination))
        memory = {n: in_process(n, sources, destination, watch=True)["private_bytes"] for n in CONTENDERS}

    largest = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2  # type: ignore[operator]
    floor = statistics.median(run["seconds"] for run in runs["cp"])
    print(f"{size / 1e9:.2f} GB on {disk}, {arguments.rounds} rounds, largest tensor {largest / 1e6:.0f} MB")
    print(f"  {'cp, sync':17} {floor:6.2f} s  ({min(r['seconds'] for r in runs['cp']):.2f} at best)")
    medians: dict[str, Any] = {"cp": {"seconds": floor}}
    for name in CONTENDERS:
        times = {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
        ratios = [run["seconds"] / base["seconds"] for run, base in zip(runs[name], runs["cp"], strict=True)]
        ratio = statistics.median(ratios)
        medians[name] = {**times, "ratio": ratio, "private_bytes": memory[name]}
        print(
            f"  {name:17} {times['seconds']:6.2f} s  {ratio:5.2f} x the copy  "
            f"{times['process_seconds']:6.2f} s with imports  {memory[name] / 1e6:5.0f} MB private"
        )
    speed_up = {
        layout: medians[f"to {layout}, 1 worker"]["seconds"] / medians[f"to {layout}, 2 workers"]["seconds"]
        for layout in sources
    }
    allowed = 3 * largest + MEMORY_ALLOWANCE
    kept = {
        f"at most {TIME_BOUND} x the copy": all(medians[name]["ratio"] <= TIME_BOUND for name in CONTENDERS),
        "two workers no slower than one": all(ratio >= 1 for ratio in speed_up.values()),
        f"at most {allowed / 1e6:.0f} MB private": all(used <= allowed for used in memory.values()),
    }
    for bound, is_kept in kept.items():
        print(f"  {'kept' if is_kept else 'MISSED'}: {bound}")
    if arguments.output:
        result = {
            "benchmark": "convert_cpu",
            "bytes": size,
            "largest_tensor_bytes": largest,
            "bounds": {"ratio": TIME_BOUND, "private_bytes": allowed},
            "kept": kept,
            "speed_up_of_two_workers": speed_up,
            "medians": medians,
            "runs": runs,
            "machine": {
                "cpus": os.cpu_count(),
                "processor": processor(),
                "file_system": disk,
                "python": platform.python_version(),
            },
            "versions": {
                "tepatch": tepatch.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
