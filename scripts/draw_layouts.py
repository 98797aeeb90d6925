"""Draws the pictures of ``docs/reference/mapping.md``: for each operation, where every element goes.

    python scripts/draw_layouts.py

Nothing in a picture is drawn from memory: the rule above it is read by the real reader and planned by the real
planner, and the cells of a target are lettered and coloured by the views of that plan. A test compares the committed
files with what this script draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from math import prod
from pathlib import Path
from typing import Any

from tepatch.mapping import parse_mapping
from tepatch.planning import Copy, Plan, Spec, make_plan

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"

WIDTH = 640
MARGIN = 20
ROW = 24
"""Height of a cell."""
LABEL = 20
"""Height of a name above its grid."""
GAP = 14
LINE = 19
"""Height of a line of the rule."""
# Fill and line: tints of the Okabe-Ito palette, which people with any colour vision can tell apart.
COLOURS = (("#cfe5f5", "#0072b2"), ("#fbe3b8", "#b37400"), ("#c8ebdf", "#007a5a"), ("#f2d9e7", "#a6467c"))
INK, FAINT, LINES = "#1f2328", "#59636e", "#8c959f"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One checkpoint: its tensors, each with the letter that its elements get."""

    sources: dict[str, tuple[str, Shape]]
    heading: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One file: a mapping's rules, and what they are shown with."""

    name: str
    rules: str
    targets: dict[str, Shape]
    panels: tuple[Panel, ...]
    config: dict[str, Any] = field(default_factory=dict)
    captures: str = ""
    cell: int = 38
    """Width of a cell."""
    brackets: tuple[tuple[int, int, str], ...] = ()
    """Rows of the first target that belong together: first, how many, and what they are."""
    note: str = ""
    shade: Callable[[int], int] | None = None
    """The colour of an element of the only source, by its position; by default each source has one colour."""


def panel(heading: str = "", /, **sources: tuple[str, Shape]) -> Panel:
    return Panel(sources={name.replace("__", "."): value for name, value in sources.items()}, heading=heading)


PICTURES = (
    Picture(
        name="rename",
        rules="proj.weight: o_proj.weight",
        targets={"proj.weight": (3, 4)},
        panels=(panel(o_proj__weight=("o", (3, 4))),),
    ),
    Picture(
        name="concat",
        rules="fc1_weight: {concat: [gate_proj.weight, up_proj.weight]}",
        targets={"fc1_weight": (6, 4)},
        panels=(panel(gate_proj__weight=("g", (3, 4)), up_proj__weight=("u", (3, 4))),),
    ),
    Picture(
        name="concat-sizes",
        rules="qkv.weight:\n  concat: [q_proj.weight, k_proj.weight, v_proj.weight]\n  sizes: [q, kv, kv]",
        targets={"qkv.weight": (8, 4)},
        panels=(panel(q_proj__weight=("q", (4, 4)), k_proj__weight=("k", (2, 4)), v_proj__weight=("v", (2, 4))),),
        config={"q": 4, "kv": 2},
        brackets=((0, 4, "q = 4"), (4, 2, "kv = 2"), (6, 2, "kv = 2")),
    ),
    Picture(
        name="interleave-over",
        rules="qkv.weight:\n  interleave: [q_proj.weight, k_proj.weight, v_proj.weight]\n  over: 2\n  sizes: [2, 1, 1]",
        targets={"qkv.weight": (8, 4)},
        panels=(panel(q_proj__weight=("q", (4, 4)), k_proj__weight=("k", (2, 4)), v_proj__weight=("v", (2, 4))),),
        brackets=((0, 4, "group 0"), (4, 4, "group 1")),
    ),
    Picture(
        name="interleave-block",
        rules="fc1_weight: {interleave: [gate_proj.weight, up_proj.weight], block: 2}",
        targets={"fc1_weight": (8, 4)},
        panels=(panel(gate_proj__weight=("g", (4, 4)), up_proj__weight=("u", (4, 4))),),
        brackets=((0, 4, "turn 0"), (4, 4, "turn 1")),
    ),
    Picture(
        name="stack",
        rules="experts.weight: {stack: 'experts.{expert}.weight', over: expert}",
        targets={"experts.weight": (3, 2, 4)},
        captures="expert: 3",
        panels=(panel(**{f"experts__{e}__weight": (letter, (2, 4)) for e, letter in enumerate("abc")}),),
    ),
    Picture(
        name="axes",
        rules="proj.weight: {of: o_proj.weight, axes: (d h) i -> (h d) i}",
        targets={"proj.weight": (6, 4)},
        panels=(panel(o_proj__weight=("o", (6, 4))),),
        config={"h": 2},
        brackets=((0, 3, "h = 0"), (3, 3, "h = 1")),
        shade=lambda position: position // 4 % 2,
    ),
    Picture(
        name="transpose",
        rules="fc.weight: {of: c_fc.weight, transpose: true}",
        targets={"fc.weight": (4, 3)},
        panels=(panel(c_fc__weight=("c", (3, 4))),),
        shade=lambda position: position // 4,
    ),
    Picture(
        name="take",
        rules=(
            "q.weight:  {of: qkv.weight, take: {start: 0, size: 4, out_of: 8}}\n"
            "kv.weight: {of: qkv.weight, take: {start: 4, size: 4, out_of: 8}}"
        ),
        targets={"q.weight": (4, 4), "kv.weight": (4, 4)},
        panels=(panel(qkv__weight=("w", (8, 4))),),
        shade=lambda position: position // 16,
    ),
    Picture(
        name="any_of",
        rules="fc1_weight:\n  any_of:\n    - gate_up_proj.weight\n    - concat: [gate_proj.weight, up_proj.weight]",
        targets={"fc1_weight": (4, 4)},
        panels=(
            panel("a checkpoint that holds", gate_up_proj__weight=("w", (4, 4))),
            panel("a checkpoint that holds", gate_proj__weight=("g", (2, 4)), up_proj__weight=("u", (2, 4))),
        ),
    ),
    Picture(
        name="create",
        rules="qkv.bias: {concat: [q_proj.bias, {create: 0}, v_proj.bias]}",
        targets={"qkv.bias": (6,)},
        panels=(panel(q_proj__bias=("q", (2,)), v_proj__bias=("v", (2,))),),
        note="created elements are left out when saving",
    ),
    Picture(
        name="offset",
        rules="layernorm_weight: {of: norm.weight, offset: 1}",
        targets={"layernorm_weight": (4,)},
        panels=(panel(norm__weight=("n", (4,))),),
        cell=54,
        note="saving subtracts",
    ),
    Picture(
        name="scale",
        rules="layernorm_weight: {of: norm.weight, scale: 0.5}",
        targets={"layernorm_weight": (4,)},
        panels=(panel(norm__weight=("n", (4,))),),
        cell=54,
        note="saving divides",
    ),
    Picture(
        name="pad",
        rules="embed.weight: {of: embed_tokens.weight, pad: {size: 3, value: 0}}",
        targets={"embed.weight": (5, 4)},
        panels=(panel(embed_tokens__weight=("e", (3, 4))),),
        brackets=((0, 3, "size = 3"),),
        note="padding is left out when saving",
    ),
)


def main() -> None:
    """Writes every picture."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        (FOLDER / f"{picture.name}.svg").write_text(draw(picture), encoding="utf-8")


def plan_of(picture: Picture, shown: Panel) -> Plan:
    """The plan for one checkpoint of a picture."""
    indented = "".join(f"  {line}\n" for line in picture.rules.splitlines())
    captures = f"captures:\n  {picture.captures}\n" if picture.captures else ""
    sizes = "".join(f"  {name}: {value}\n" for name, value in picture.config.items())
    text = f"version: 1\n{captures}{'sizes:' if sizes else ''}\n{sizes}parameters:\n{indented}"
    return make_plan(
        parse_mapping(text),
        config=picture.config,
        sources={name: Spec(shape, "BF16") for name, (_, shape) in shown.sources.items()},
        targets={name: Spec(shape, "BF16") for name, shape in picture.targets.items()},
    )


def elements(copy: Copy) -> Iterator[tuple[int, int]]:
    """Positions in source and target, in pairs."""
    pair = copy.pair
    for index in itertools.product(*(range(size) for size in pair.sizes)):
        yield (
            pair.source_offset + sum(i * stride for i, stride in zip(index, pair.source_strides, strict=True)),
            pair.target_offset + sum(i * stride for i, stride in zip(index, pair.target_strides, strict=True)),
        )


Cells = dict[int, tuple[str, int]]
"""Position in a tensor -> text, and number of the colour (-1: a constant)."""


def target_cells(plan: Plan, shown: Panel, target: str, colour: Callable[[str, int], int]) -> Cells:
    """What stands at each position of a target."""
    cells: Cells = {}
    for copy in plan.copies:
        if copy.target == target:
            letter, (scale, offset) = shown.sources[copy.source][0], copy.affine
            before, after = "" if scale == 1 else f"{scale:g}*", f"{offset:+g}" if offset else ""
            for source, position in elements(copy):
                cells[position] = (f"{before}{letter}{source}{after}", colour(copy.source, source))
    for fill in plan.fills:
        if fill.target == target:
            # Only the target's side of a fill means anything.
            for _, position in elements(Copy("", target, fill.pair, (1.0, 0.0), fill.rule)):  # type: ignore[arg-type]
                cells[position] = (f"{fill.value:g}", -1)
    return cells


def draw(picture: Picture) -> str:
    """A picture as SVG."""
    lines = picture.rules.splitlines()
    out: list[str] = []
    top = MARGIN + len(lines) * LINE + 14
    out.append(rect(MARGIN, MARGIN, WIDTH - 2 * MARGIN, top - MARGIN, fill="#f3f5f7", line="#d1d9e0", radius=6))
    for number, line in enumerate(lines):
        out.append(words(MARGIN + 12, MARGIN + 21 + number * LINE, line, size=13))
    top += 2 * GAP
    for shown in picture.panels:
        parts, top = draw_panel(picture, shown, top)
        out += parts
        top += 2 * GAP
    if picture.note:
        out.append(words(WIDTH - MARGIN, top - 4, picture.note, colour=FAINT, anchor="end"))
        top += GAP
    title = escape(f"The operation {picture.name}: " + " ".join(picture.rules.split()))
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    font = f'font-family="{MONO}" font-size="12" fill="{INK}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {font}>\n<title>{title}</title>'
    return "\n".join([head, HATCH, rect(0, 0, WIDTH, top, fill="#ffffff", line="none"), *out, "</svg>\n"])


def draw_panel(picture: Picture, shown: Panel, top: int) -> tuple[list[str], int]:
    """Sources on the left, targets on the right, and where the panel ends."""
    plan = plan_of(picture, shown)
    names = list(shown.sources)

    def colour(source: str, position: int) -> int:
        return picture.shade(position) if picture.shade else names.index(source)

    left: list[tuple[str, Shape, Cells]] = []
    for name, (letter, shape) in shown.sources.items():
        cells = {position: (f"{letter}{position}", colour(name, position)) for position in range(prod(shape))}
        left.append((f"{name} {list(shape)}", shape, cells))
    right: list[tuple[str, Shape, Cells]] = []
    for name, shape in picture.targets.items():
        right.append((f"{name} {list(shape)}", shape, target_cells(plan, shown, name, colour)))
    heights = [sum(height(shape) + LABEL + GAP for _, shape, _ in side) - GAP for side in (left, right)]
    out: list[str] = []
    if shown.heading:
        out.append(words(MARGIN, top + 4, shown.heading, colour=FAINT))
        top += LINE
    middle = top + max(heights) // 2
    aside = 76 if picture.brackets or any(len(shape) == 3 for shape in picture.targets.values()) else 50
    x_right = WIDTH - MARGIN - aside - max(picture.cell * columns(shape) for shape in picture.targets.values())
    for x, side, size in ((MARGIN, left, heights[0]), (x_right, right, heights[1])):
        y = middle - size // 2
        for index, (name, shape, cells) in enumerate(side):
            out.append(words(x, y + 12, name))
            y += LABEL
            out += grid(x, y, shape, cells, picture.cell)
            if side is right and index == 0:
                for first, count, text in picture.brackets:
                    out += bracket(x + picture.cell * columns(shape) + 6, y + first * ROW, count * ROW, text)
            y += height(shape) + GAP
    x_left = MARGIN + max(picture.cell * columns(shape) for _, shape, _ in left)
    out += arrows((x_left + x_right) // 2, middle + LABEL // 2)
    return out, top + max(heights)


def height(shape: Shape) -> int:
    """Of a grid: slabs of a third dimension stand one below the other."""
    slabs, rows = (shape[0], shape[1]) if len(shape) == 3 else (1, shape[0] if len(shape) == 2 else 1)
    return slabs * rows * ROW + (slabs - 1) * 6


def columns(shape: Shape) -> int:
    return shape[-1]


def grid(x: int, y: int, shape: Shape, cells: Cells, width: int) -> list[str]:
    out = []
    slab = prod(shape[-2:]) if len(shape) > 1 else shape[0]
    for position in range(prod(shape)):
        text, colour = cells[position]
        fill, line = COLOURS[colour] if colour >= 0 else ("url(#hatch)", LINES)
        left = x + position % columns(shape) * width
        above = y + position // columns(shape) * ROW + position // slab * 6
        out.append(rect(left, above, width, ROW, fill=fill, line=line))
        out.append(words(left + width // 2, above + 16, text, anchor="middle"))
    if len(shape) == 3:
        for index in range(shape[0]):
            middle = y + index * (shape[1] * ROW + 6) + shape[1] * ROW // 2 + 4
            out.append(words(x + columns(shape) * width + 8, middle, f"[{index}]", colour=FAINT))
    return out


def bracket(x: int, y: int, size: int, text: str) -> list[str]:
    path = f"M{x} {y + 3} h4 v{size - 6} h-4"
    return [
        f'<path d="{path}" fill="none" stroke="{LINES}"/>',
        words(x + 9, y + size // 2 + 4, text, colour=FAINT),
    ]


def arrows(x: int, y: int) -> list[str]:
    out = []
    for word, dy, sign in (("load", -9, 1), ("save", 9, -1)):
        start, end = x - sign * 26, x + sign * 26
        head = f"M{end - sign * 6} {y + dy - 4} L{end} {y + dy} L{end - sign * 6} {y + dy + 4}"
        out.append(f'<path d="M{start} {y + dy} H{end} {head}" fill="none" stroke="{FAINT}" stroke-width="1.5"/>')
        out.append(words(x, y + dy + (-7 if sign == 1 else 17), word, colour=FAINT, anchor="middle"))
    return out


HATCH = (
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#ffffff"/><path d="M0 0 V6" stroke="#d1d9e0" stroke-width="2"/></pattern></defs>'
)


def rect(x: int, y: int, width: int, height: int, *, fill: str, line: str, radius: int = 0) -> str:
    corners = f' rx="{radius}"' if radius else ""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}"{corners} fill="{fill}" stroke="{line}"/>'


def words(x: int, y: int, text: str, *, size: int = 12, colour: str = INK, anchor: str = "") -> str:
    style = f' font-size="{size}" xml:space="preserve"' if size != 12 else ""
    style += f' fill="{colour}"' if colour != INK else ""
    style += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x}" y="{y}"{style}>{escape(text)}</text>'


if __name__ == "__main__":
    main()
