"""The pictures of the mapping reference: current, and true to what loading does."""

from __future__ import annotations

import re
import runpy
from math import prod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "draw_layouts.py"))
PICTURES = {picture.name: picture for picture in SCRIPT["PICTURES"]}


@pytest.mark.parametrize("name", PICTURES)
def test_a_committed_picture_is_current(name: str) -> None:
    committed = (IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == SCRIPT["draw"](PICTURES[name]), "run: python scripts/draw_layouts.py"


def test_every_picture_is_drawn_and_shown() -> None:
    page = (ROOT / "docs" / "reference" / "mapping.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\(\.\./images/([\w-]+)\.svg\)", page))
    assert {path.stem for path in IMAGES.glob("*.svg")} == set(PICTURES) == shown


@pytest.mark.parametrize("name", PICTURES)
def test_every_element_of_every_source_is_drawn_in_a_target(name: str) -> None:
    picture = PICTURES[name]
    for shown in picture.panels:
        plan = SCRIPT["plan_of"](picture, shown)
        drawn: list[str] = []
        for target, shape in picture.targets.items():
            cells = SCRIPT["target_cells"](plan, shown, target, lambda source, position: 0)
            assert sorted(cells) == list(range(prod(shape)))
            drawn += [text for text, colour in cells.values() if colour >= 0]
        elements = [f"{letter}{i}" for letter, shape in shown.sources.values() for i in range(prod(shape))]
        plain = [re.sub(r"^[\d.]+\*|\+\d+$", "", text) for text in drawn]
        assert sorted(plain) == sorted(elements)


def test_drawn_layouts_are_what_torch_says() -> None:
    import torch

    def drawn(name: str) -> list[str]:
        picture = PICTURES[name]
        plan = SCRIPT["plan_of"](picture, picture.panels[0])
        (target,) = picture.targets
        cells = SCRIPT["target_cells"](plan, picture.panels[0], target, lambda source, position: 0)
        return [cells[position][0] for position in range(len(cells))]

    def lettered(letter: str, order: torch.Tensor) -> list[str]:
        return [f"{letter}{number}" for number in order.flatten().tolist()]

    assert drawn("transpose") == lettered("c", torch.arange(12).view(3, 4).t())
    assert drawn("axes") == lettered("o", torch.arange(24).view(3, 2, 4).transpose(0, 1))


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_well_formed_and_its_text_stays_inside(name: str) -> None:
    root = ElementTree.fromstring((IMAGES / f"{name}.svg").read_text(encoding="utf-8"))
    width, height = int(root.attrib["width"]), int(root.attrib["height"])
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        size = 0.61 * int(text.attrib.get("font-size", 12)) * len(text.text or "")  # of a monospaced font
        left = int(text.attrib["x"]) - {"end": size, "middle": size / 2}.get(text.attrib.get("text-anchor", ""), 0)
        assert left >= 0
        assert left + size <= width
        assert 0 <= int(text.attrib["y"]) <= height
