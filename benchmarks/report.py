"""Draws the charts of the documentation from the results of the benchmarks.

    python benchmarks/report.py [--results benchmarks/results] [--images docs/images/charts]

``load`` (from load_gpu.json and load_cpu.json), ``train`` (train_gpu.json) and ``families`` (families_gpu.json), each
as SVG and PNG; a chart whose results are not there is left out. The same results give the same files, byte for byte,
with the same version of matplotlib, which only this script needs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
OURS, PEER, LIMIT, INK, FAINT = "#2f7d4f", "#8a97a6", "#d5dbe1", "#24303c", "#5b6875"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "tepatch",
}
BAR_INCHES = 0.34

NAMES = {
    "read": "limit: the bytes read, thrown away",
    "read-direct": "limit: read past the page cache",
    "stream": "limit: the bytes, with no model",
    "copy": "limit: copied from pinned memory",
    "clone": "safetensors, no model",
    "tepatch": "tepatch",
    "tepatch-bypass": "tepatch, past the page cache",
    "tepatch-fp8": "tepatch, weights to FP8",
    "tepatch-safetensors": "tepatch, safetensors reads",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "te_llama": "te_llama's loader",
    "te_llama-bf16": "te_llama's layer, bf16",
    "te_llama-fp8": "te_llama's layer, FP8",
    "hf-sdpa": "transformers",
    "hf-liger": "transformers + Liger",
    "tepatch-bf16": "tepatch, bf16",
    "tepatch-fp8-current": "tepatch, FP8 (current)",
}
TRAINED = {**NAMES, "tepatch-fp8": "tepatch, FP8"}
GRAY = ("read", "read-direct", "stream", "copy")


class Bar(NamedTuple):
    name: str
    value: float
    color: str
    label: str
    ends: tuple[float, float] | None = None
    """The least and the most that was measured."""


class Panel(NamedTuple):
    title: str
    machine: str
    bars: list[Bar]
    mark: float | None = None
    """A line to compare with."""


def load_panels(results: Sequence[dict[str, Any]]) -> list[Panel]:
    """Seconds until a model is loaded: for each machine with a warm page cache, and with a cold one.

    Bars are medians, the lines on them go from the least to the most. Reading past the page cache is about cold files:
    what the cache holds is read from it by either.
    """
    panels = []
    for result in results:
        size = f"{result['bytes'] / 1e9:.1f} GB to {'the GPU' if result['device'] == 'cuda' else 'CPU memory'}"
        for kind, text in (("warm", "files in the page cache"), ("cold", "from the disk")):
            left_out = {"tepatch-safetensors", *(["tepatch-bypass"] if kind == "warm" else [])}
            # Old results have contenders that there are no more.
            names = [name for name in result["runs"] if name in NAMES and name not in left_out]
            if bars := _load_bars(result, kind, names):
                panels.append(Panel(f"Loading {size}, {text}", _machine(result), bars))
    return panels


def _load_bars(result: dict[str, Any], kind: str, names: Iterable[str]) -> list[Bar]:
    bars = []
    for name in names:
        run = result["runs"].get(name, {})
        if seconds := [each["seconds"] for each in run.get(kind, ()) if "seconds" in each]:
            value = statistics.median(seconds)
            label = f"{value:.2f} s   {result['bytes'] / 1e9 / value:.1f} GB/s"
            bars.append(Bar(NAMES[name], value, _color(name), label, (min(seconds), max(seconds))))
    return sorted(bars, key=lambda bar: bar.value)


def train_panels(result: dict[str, Any]) -> list[Panel]:
    """Milliseconds of a training step, for each shape of batch."""
    measured: dict[str, dict[str, Any]] = {}
    for run in result["runs"]:
        if "batches" in run:
            measured.setdefault(run["peer"], run["batches"])  # the first, where a peer ran again
    panels = []
    for batch in next(iter(measured.values())):
        bars = []
        for name, batches in measured.items():
            value = statistics.median(batches[batch]["step_ms"])
            bars.append(Bar(TRAINED[name], value, _color(name), f"{value:.0f} ms"))
        bars.sort(key=lambda bar: bar.value)
        rows, length = batch.split("x")
        title = f"A training step, {rows} x {int(length):,} tokens, Llama-2-7B's shape"
        panels.append(Panel(title, _machine(result), bars))
    return panels


def family_panels(result: dict[str, Any]) -> list[Panel]:
    """The error of bfloat16 logits beside that of transformers', for each family, unpadded."""
    bars = [
        Bar(row["model"], row["ratio"], OURS, f"{row['ratio']:.2f}")
        for row in result["rows"]
        if row["batch"] == "one row"
    ]
    bars.sort(key=lambda bar: bar.value)
    machine = _machine({**result, "machine": {"card": result["card"]}})
    return [Panel("Error of bfloat16 logits beside that of transformers' own (1, the line)", machine, bars, mark=1.0)]


def _machine(result: dict[str, Any]) -> str:
    versions = result["versions"]
    return f"{result['machine']['card']}, torch {versions['torch']}, transformers {versions['transformers']}"


def _color(name: str) -> str:
    if name.startswith("tepatch"):
        return OURS
    return LIMIT if name in GRAY else PEER


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Writes ``path`` with the suffixes .svg and .png: bars to the right, each with its name and its value."""
    with matplotlib.rc_context(STYLE):
        heights = [len(panel.bars) + 2 for panel in panels]
        figure = Figure(figsize=(9.2, BAR_INCHES * sum(heights)), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
        for panel, on in zip(panels, axes[:, 0], strict=True):
            _draw(panel, on)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})


def _draw(panel: Panel, on: Axes) -> None:
    tips = [bar.ends[1] if bar.ends else bar.value for bar in panel.bars]
    top = max(tips)
    places = range(len(panel.bars))
    on.barh(places, [bar.value for bar in panel.bars], color=[bar.color for bar in panel.bars], height=0.72)
    for place, bar, tip in zip(places, panel.bars, tips, strict=True):
        if bar.ends:
            on.plot(bar.ends, (place, place), color=INK, linewidth=1)
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line to compare with
        on.text(tip + top * 0.01, place, bar.label, va="center", fontsize=10, bbox=ground)
    on.set_yticks(places, [bar.name for bar in panel.bars])
    for label, bar in zip(on.get_yticklabels(), panel.bars, strict=True):
        label.set_fontweight("bold" if bar.color == OURS else "normal")
        label.set_color(FAINT if bar.color == LIMIT else INK)
    on.set_xlim(0, top * 1.28)
    if panel.mark is not None:
        on.axvline(panel.mark, color=INK, linewidth=1)
    on.set_title(panel.title, loc="left", fontsize=11.5, fontweight="bold", pad=20)
    on.annotate(panel.machine, (0, 1), (0, 6), "axes fraction", "offset points", fontsize=9, color=FAINT)
    on.set_ylim(len(panel.bars) - 0.5, -0.5)
    on.xaxis.set_visible(False)
    on.tick_params(length=0)
    on.spines[:].set_visible(False)


def charts(results: Path) -> dict[str, list[Panel]]:
    """The charts that there are results for, by their name."""

    def read(name: str) -> dict[str, Any] | None:
        path = results / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    out = {}
    if loads := [found for name in ("load_gpu.json", "load_cpu.json") if (found := read(name))]:
        out["load"] = load_panels(loads)
    makers: dict[str, tuple[str, Callable[[dict[str, Any]], list[Panel]]]] = {
        "train": ("train_gpu.json", train_panels),
        "families": ("families_gpu.json", family_panels),
    }
    for name, (file, panels) in makers.items():
        if (found := read(file)) and (drawn := panels(found)):
            out[name] = drawn
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images" / "charts")
    arguments = parser.parse_args()
    for name, panels in charts(arguments.results).items():
        draw(panels, arguments.images / name)
        print(arguments.images / f"{name}.svg")


if __name__ == "__main__":
    main()
