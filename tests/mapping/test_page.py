"""The page of a plan, in a real browser: what it draws and says is what the plan says, and nothing in it can break out.

The browser is driven over a pipe, by its own debugging protocol: no package and no port is needed.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import pytest

from tepatch.planning import Copy, Plan
from tepatch.planning.bind import IDENTITY
from tepatch.planning.page import plan_page
from tepatch.planning.plan import RuleEntry, SourceEntry, TargetEntry
from tepatch.views import Pair

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# The protocol wants its pipe as the descriptors 3 and 4, which subprocess can not promise.
LAUNCH = """import fcntl, os, sys
there, back = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])
os.dup2(there, 3); os.dup2(back, 4)
os.execv(sys.argv[3], sys.argv[3:])"""


class Browser:
    """A headless Chromium with one tab."""

    def __init__(self, program: str, folder: Path, log: BinaryIO) -> None:
        to_read, self._to = os.pipe()
        self._back, to_write = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        options += [f"--user-data-dir={folder}", "--no-first-run", "--disable-extensions", "--force-color-profile=srgb"]
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(to_read), str(to_write), program, *options, "about:blank"],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        os.close(to_read)
        os.close(to_write)
        self._count, self._buffer, self._session = 0, b"", ""
        self.complaints: list[str] = []
        """Exceptions and console errors of the page, policy violations among them."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(1280, 800)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._to)
        os.close(self._back)

    def call(self, method: str, **params: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self._note(answer)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._back, 1 << 20)
            if not data:
                raise AssertionError(f"the browser is gone: {Path(self._log.name).read_text()[-2000:]}")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))
        elif event.get("method") == "Network.requestWillBeSent" and not params["request"]["url"].startswith("file:"):
            self.complaints.append(f"asks for {params['request']['url']}")

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, page: Path, name: str = "") -> None:
        """Opens a page at ``#name`` and waits until it is there."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.as_uri() + (f"#{name}" if name else ""))
        # What is evaluated waits for the parser, and the script of a page runs in it.
        deadline = time.monotonic() + 20
        while not self.run("document.readyState === 'complete' && location.protocol === 'file:'"):
            assert time.monotonic() < deadline, "the page does not open"

    def run(self, script: str) -> Any:
        """The value of an expression in the page, as JSON."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(str(answer["exceptionDetails"].get("exception", answer["exceptionDetails"])))
        return answer["result"].get("value")

    def go(self, name: str) -> None:
        """Follows a link to ``#name``."""
        self.run(
            "new Promise((done) => { addEventListener('hashchange', () => done(1), { once: true }); "
            f"location.hash = {json.dumps(name)}; }})"
        )

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@pytest.fixture(scope="module")
def program() -> str:
    named = os.environ.get("TEPATCH_CHROMIUM")
    found = named or next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs Chromium: none of " + ", ".join(CHROMIUM) + " is there, and TEPATCH_CHROMIUM is not set")
    return found


@pytest.fixture(scope="module")
def chromium(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    with open(folder / "log", "wb") as log:
        browser = Browser(program, folder / "profile", log)
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser, which must have had nothing to complain of when the test is over."""
    chromium.complaints.clear()
    chromium.size(1280, 800)
    yield chromium
    chromium.run("1")  # events come before the answer
    assert chromium.complaints == []


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Plan], Path]:
    """Writes the page of a plan and returns its path."""

    def write(plan: Plan) -> Path:
        path = tmp_path / "page.html"
        path.write_text(plan_page(plan), encoding="ascii")
        return path

    return write


PlanOf = Callable[..., Plan]
Write = Callable[[Plan], Path]

RULES = """sizes: {g: 2, d: 2, h: 2}
captures: {e: 3}
ignore:
  - old: no longer needed
parameters:
  concat: {concat: [c1, c2, c3]}
  unequal: {concat: [u1, u2], sizes: [5, 2], dim: 1}
  grouped: {interleave: [q, k, v], over: g, sizes: [6, 2, 2]}
  stacked: {stack: {concat: ['w.{e}', 'u.{e}']}, over: e}
  last: {stack: 'x.{e}', over: e, dim: 1}
  transposed: {of: t, transpose: true}
  turned: {stack: {of: 'y.{e}', transpose: true}, over: e}
  glu: {interleave: [gate, up], block: 2}
  rope: {of: r, axes: (h r 2) i -> (h 2 r) i}
  low: {of: half, take: {out_of: 9, start: 0, size: 5}}
  high: {of: half, take: {out_of: 9, start: 5, size: 4}}
  padded: {of: p, pad: {size: 5, value: 7}}
  norm: {of: n, offset: 1, scale: 2}
  constant: {create: 3}
  head: same
  never: {when: false == true, of: nothing}
"""
SOURCES = {
    **{f"c{i}": (2, 5) for i in (1, 2, 3)},
    **{"u1": (4, 5), "u2": (4, 2), "q": (12, 3), "k": (4, 3), "v": (4, 3), "t": (4, 6), "gate": (8, 3), "up": (8, 3)},
    **{f"{name}.{i}": shape for i in range(3) for name, shape in (("w", (2, 4)), ("u", (2, 4)), ("x", (4, 5)))},
    **{f"y.{i}": (4, 2) for i in range(3)},
    **{"r": (8, 3), "half": (9, 4), "p": (5, 4), "n": (6,), "old": (3,)},
}
TARGETS = {
    "concat": (6, 5),
    "unequal": (4, 7),
    "grouped": (20, 3),
    "stacked": (3, 4, 4),
    "last": (4, 3, 5),
    "transposed": (6, 4),
    "turned": (3, 2, 4),
    "glu": (16, 3),
    "rope": (8, 3),
    "low": (5, 4),
    "high": (4, 4),
    "padded": (8, 4),
    "norm": (6,),
    "constant": (2, 3),
}


@pytest.fixture
def everything(plan_of: PlanOf) -> Plan:
    """A plan with every operation."""
    return plan_of(RULES, SOURCES, TARGETS, ties={"head": "concat"}, location="here")


def positions(offset: int, sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The flat indices that a view touches, in its order."""
    grid = itertools.product(*map(range, sizes))
    return [offset + sum(i * stride for i, stride in zip(index, strides, strict=True)) for index in grid]


def elements(plan: Plan, name: str) -> list[Any]:
    """What is at each element of a parameter, computed from the plan one by one."""
    out: list[Any] = [None] * prod(plan.targets[name].shape)
    for copy in plan.copies:
        if copy.target == name:
            sizes, source, target, source_offset, target_offset = copy.pair
            pairs = zip(positions(target_offset, sizes, target), positions(source_offset, sizes, source), strict=True)
            for here, there in pairs:
                out[here] = {"name": copy.source, "flat": there}
    for fill in plan.fills:
        if fill.target == name:
            for here in positions(fill.pair.target_offset, fill.pair.sizes, fill.pair.target_strides):
                out[here] = {"constant": str(fill.value)}
    return out


def looked_up(browser: Browser, side: str, name: str, numel: int) -> list[Any]:
    look = f"tepatchPage.locate({json.dumps(side)}, {json.dumps(name)}, i)"
    return list(browser.run(f"Array.from({{length: {numel}}}, (_, i) => {look})"))


def legend(browser: Browser) -> list[list[str]]:
    """The rows below the drawing, as text."""
    rows = "[...document.querySelectorAll('#legend tbody tr')]"
    return list(browser.run(f"{rows}.map((row) => [...row.children].map((cell) => cell.textContent))"))


# -- what is drawn --


def test_each_element_of_every_operation_comes_from_where_the_plan_says(
    browser: Browser, write: Write, everything: Plan
) -> None:
    browser.open(write(everything))
    for name, shape in TARGETS.items():
        expected = elements(everything, name)
        assert None not in expected
        assert looked_up(browser, "target", name, prod(shape)) == expected, name


def test_each_element_of_a_source_goes_where_the_plan_says(browser: Browser, write: Write, everything: Plan) -> None:
    browser.open(write(everything))
    expected: dict[str, dict[int, Any]] = {name: {} for name in SOURCES}
    for name in TARGETS:
        for flat, found in enumerate(elements(everything, name)):
            if "name" in found:
                expected[found["name"]][found["flat"]] = {"name": name, "flat": flat}
    assert expected.pop("old") == {}
    for name, goes in expected.items():
        found = looked_up(browser, "source", name, prod(SOURCES[name]))
        assert found == [goes[flat] for flat in range(prod(SOURCES[name]))], name


def test_large_random_layouts_are_looked_up_right(browser: Browser, write: Write, plan_of: PlanOf) -> None:
    chance = random.Random(0)
    text, sources, targets = "parameters:\n", {}, {}
    for index in range(8):
        groups, sizes, cols = chance.randint(1, 30), [chance.randint(1, 30) for _ in range(3)], chance.randint(1, 100)
        names = [f"s{index}.{part}" for part in "abc"]
        inner = [f"{{of: {name}, {chance.choice(['scale: 1', 'transpose: true'])}}}" for name in names]
        for name, size, node in zip(names, sizes, inner, strict=True):
            shape = (groups * size, cols)
            sources[name] = shape[::-1] if "transpose" in node else shape
        targets[f"t{index}"] = (groups * sum(sizes), cols)
        text += f"  t{index}: {{interleave: [{', '.join(inner)}], over: {groups}, sizes: {sizes}}}\n"
    plan = plan_of(text, sources, targets)
    browser.open(write(plan))
    for name, shape in targets.items():
        expected = elements(plan, name)
        some = sorted(chance.sample(range(prod(shape)), min(200, prod(shape))))
        found = browser.run(f"{some}.map((i) => tepatchPage.locate('target', {json.dumps(name)}, i))")
        assert found == [expected[flat] for flat in some], name


COLOURS = """(() => {
  const { drawing } = tepatchPage.state.detail;
  const { canvas } = drawing;
  const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const cell = [drawing.plot.width / drawing.look.cols, drawing.plot.height / drawing.look.rows];
  const out = [];
  for (let row = 0; row < drawing.look.rows; row++) for (let col = 0; col < drawing.look.cols; col++) {
    const { x, y } = drawing.placeOf(row, col);
    // Beside the text that stands in the middle.
    const at = 4 * (Math.round(y - 0.3 * cell[1]) * width + Math.round(x - 0.4 * cell[0]));
    out.push(data.slice(at, at + 3).join(","));
  }
  return out;
})()"""
SWATCHES = """Object.fromEntries([...document.querySelectorAll("#legend tbody tr")].map((row) => [
  row.children[1].textContent, getComputedStyle(row.querySelector(".swatch")).backgroundColor]))"""


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in ("padded", "constant")])
def test_each_element_has_the_colour_that_its_source_has_in_the_legend(
    name: str, browser: Browser, write: Write, everything: Plan
) -> None:
    browser.open(write(everything), name)
    browser.run("document.getElementById('shade').click()")
    *lead, rows, cols = (1, *TARGETS[name]) if len(TARGETS[name]) == 1 else TARGETS[name]
    expected = elements(everything, name)
    for slab in range(prod(lead)):
        if slab:
            browser.run(
                f"slab.value = {slab}; slab.dispatchEvent(new Event('input'))"  # as a user moves it
            )
        swatches = {key: value.removeprefix("rgb(").removesuffix(")") for key, value in browser.run(SWATCHES).items()}
        parts = expected[slab * rows * cols : (slab + 1) * rows * cols]
        assert len(set(swatches.values())) == len({each["name"] for each in parts})
        found = browser.run(COLOURS)
        assert found == [swatches[each["name"]].replace(" ", "") for each in parts]


def test_what_is_on_the_screen_is_what_the_canvas_holds(browser: Browser, write: Write, everything: Plan) -> None:
    browser.open(write(everything), "concat")
    browser.run("document.getElementById('shade').click()")
    places = browser.run(
        """(() => { const { drawing } = tepatchPage.state.detail, box = drawing.canvas.getBoundingClientRect();
        return [0, 1, 2, 3, 4, 5].map((row) => { const at = drawing.placeOf(row, 0);
          return [Math.round(box.x + at.x - 50), Math.round(box.y + at.y - 15)]; }); })()"""
    )
    pixels = decode_png(browser.screenshot())
    first, second, third = (pixels[y][x] for x, y in places[::2])
    assert len({first, second, third}) == 3
    assert [pixels[y][x] for x, y in places] == [first, first, second, second, third, third]


def test_constants_are_hatched_and_named(browser: Browser, write: Write, everything: Plan) -> None:
    browser.open(write(everything), "padded")
    assert legend(browser)[1] == ["", "a constant", "", "", "rows 5..8", "", "7.0"]
    colours = browser.run(
        """(() => { const { drawing } = tepatchPage.state.detail, colours = new Set();
        for (let x = 0; x < 20; x++) colours.add(drawing.colourAt(drawing.look.flat(0, 6, 1), x, 0).join());
        return [...colours]; })()"""
    )
    assert len(colours) == 2


def test_the_shade_shows_the_order_of_the_elements(browser: Browser, write: Write, everything: Plan) -> None:
    browser.open(write(everything), "transposed")
    shades = [int(each.split(",")[0]) for each in browser.run(COLOURS)]
    expected = [each["flat"] for each in elements(everything, "transposed")]
    by_source = [shade for _, shade in sorted(zip(expected, shades, strict=True))]
    assert by_source == sorted(by_source, reverse=True)
    assert by_source[0] > by_source[-1]


def test_stripes_thinner_than_a_pixel_are_told_mixed_and_enlarged(
    browser: Browser, write: Write, plan_of: PlanOf
) -> None:
    text = "parameters: {fc1: {interleave: [gate, up], block: 1}, qkv: {concat: [gate2, up2]}}"
    sources = dict.fromkeys(("gate", "up", "gate2", "up2"), (2048, 64))
    plan = plan_of(text, sources, {"fc1": (4096, 64), "qkv": (4096, 64)})
    browser.open(write(plan), "fc1")
    browser.run("document.getElementById('shade').click()")
    assert browser.run("document.querySelector('.notice').hidden") is False
    assert "only 1 row high" in browser.run("document.querySelector('.notice').textContent")
    assert browser.run("document.querySelector('figcaption').textContent").startswith("Enlarged: rows 0..2 and all")

    def colour(drawing: str, row: int) -> list[int]:
        script = f"""(() => {{ const drawing = tepatchPage.state.detail.{drawing};
            const {{ x, y }} = drawing.placeOf({row}, 5);
            return [...drawing.canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3); }})()"""
        return list(browser.run(script))

    blue, orange = colour("period", 0), colour("period", 1)
    assert [f"rgb({', '.join(map(str, each))})" for each in (blue, orange)] == list(browser.run(SWATCHES).values())
    # Three pixels are mixed at a time: of an odd number of rows, one more is of one colour than of the other.
    rows = int(3 * 4096 / browser.run("tepatchPage.state.detail.drawing.plot.height"))
    for row in (100, 2000, 4001):
        for mixed, first, second in zip(colour("drawing", row), blue, orange, strict=True):
            assert abs(mixed - (first + second) / 2) <= abs(first - second) / (2 * rows) + 1
    browser.go("qkv")
    assert browser.run("document.querySelector('.notice').hidden") is True
    assert browser.run("document.getElementById('enlarged').closest('figure').hidden") is True


def test_the_period_that_is_enlarged_holds_all_that_comes_again(
    browser: Browser, write: Write, plan_of: PlanOf
) -> None:
    text = "parameters: {t: {interleave: [{interleave: [a, b], block: 1}, {interleave: [c, d], block: 1}], over: 256}}"
    plan = plan_of(text, dict.fromkeys("abcd", (1536, 64)), {"t": (6144, 64)})
    browser.open(write(plan), "t")
    caption = browser.run("document.querySelector('figcaption').textContent")
    assert caption.startswith("Enlarged: rows 0..24 and all columns, the first period")


def test_rows_in_another_order_are_enlarged(browser: Browser, write: Write, plan_of: PlanOf) -> None:
    text, shapes = "sizes: {h: 32}\nparameters: {q: {of: q, axes: (h r 2) i -> (h 2 r) i}}", {"q": (2048, 64)}
    plan = plan_of(text, shapes, shapes)
    browser.open(write(plan), "q")
    assert legend(browser)[0][5] == "rows in another order"
    assert browser.run("document.querySelector('figcaption').textContent").startswith(
        "Enlarged: rows 0..64 and all columns, the first period"
    )


# -- what is said --


def test_the_legend_names_sources_places_and_what_is_done_to_them(
    browser: Browser, write: Write, plan_of: PlanOf
) -> None:
    text = """sizes: {n: 4}
parameters:
  qkv: {concat: [q, {of: k, transpose: true}, v], sizes: [8, 2, 2]}
  low: {of: all, take: {out_of: 9, start: 0, size: 5}, scale: 2}
  high: {of: all, take: {out_of: 9, start: 5, size: 4}, offset: -1}
"""
    sources = {"q": (8, 6), "k": (6, 2), "v": (2, 6), "all": (9, 6)}
    plan = plan_of(text, sources, {"qkv": (12, 6), "low": (5, 6), "high": (4, 6)}, dtype="F32", target_dtype="BF16")
    browser.open(write(plan), "qkv")
    assert legend(browser) == [
        ["", "q", "[8, 6] F32 -> BF16", "all", "rows 0..8", "kept", ""],
        ["", "k", "[6, 2] F32 -> BF16", "all", "rows 8..10", "transposed", ""],
        ["", "v", "[2, 6] F32 -> BF16", "all", "rows 10..12", "kept", ""],
    ]
    browser.go("high")
    assert legend(browser) == [["", "all", "[9, 6] F32 -> BF16", "rows 5..9", "all", "kept", "source - 1"]]
    browser.go("source:all")
    assert legend(browser) == [
        ["", "low", "[5, 6] F32 -> BF16", "all", "rows 0..5", "kept", "source x 2"],
        ["", "high", "[4, 6] F32 -> BF16", "all", "rows 5..9", "kept", "source - 1"],
    ]


def test_pointing_at_an_element_says_where_it_comes_from(browser: Browser, write: Write, everything: Plan) -> None:
    browser.open(write(everything), "transposed")
    place = browser.run(
        """(() => { const { drawing } = tepatchPage.state.detail, box = drawing.canvas.getBoundingClientRect();
        const at = drawing.placeOf(4, 1); return [box.x + at.x, box.y + at.y]; })()"""
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    assert browser.run("document.getElementById('pointed').textContent") == "[4, 1] <- t [1, 4]"
    browser.go("source:n")
    browser.run("document.getElementById('drawing').focus()")
    press(browser, "ArrowRight")
    press(browser, "ArrowRight")
    assert browser.run("document.getElementById('pointed').textContent") == "[1] -> norm [1], as x 2 + 1"


def test_the_keyboard_moves_zooms_and_shows_all_again(browser: Browser, write: Write, plan_of: PlanOf) -> None:
    plan = plan_of("parameters: {a: {concat: [b, c]}}", {"b": (500, 300), "c": (500, 300)}, {"a": (1000, 300)})
    browser.open(write(plan), "a")
    browser.run("document.getElementById('drawing').focus()")
    for _ in range(8):
        press(browser, "+")
    box = browser.run("tepatchPage.state.detail.drawing.box")
    assert (box["r1"] - box["r0"], box["c1"] - box["c0"]) == (4, 4)
    for _ in range(3):
        press(browser, "ArrowDown")
    assert browser.run("document.getElementById('pointed').textContent") == "[500, 148] <- c [0, 148]"
    before = browser.run("tepatchPage.state.detail.drawing.box")
    for _ in range(4):
        press(browser, "ArrowDown")
    after = browser.run("tepatchPage.state.detail.drawing.box")
    assert before["r1"] < 505 == after["r1"]  # row 504 is seen
    press(browser, "0")
    assert browser.run("tepatchPage.state.detail.drawing.box") == {"r0": 0, "r1": 1000, "c0": 0, "c1": 300}


def press(browser: Browser, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key)


def test_the_list_folds_layers_and_finds_names(browser: Browser, write: Write, llama: Callable[..., Any]) -> None:
    browser.open(write(llama(layers=12).plan()))
    names = "[...document.querySelectorAll('#list a > span:first-child')].map((each) => each.textContent)"
    assert browser.run(names)[:3] == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert "model.layers.{0..11}.self_attn.qkv.weight" in browser.run(names)
    browser.run("search.value = '7 QKV'; search.dispatchEvent(new Event('input'))")
    assert browser.run(names) == [
        "model.layers.7.self_attn.qkv.layernorm_weight",
        "model.layers.7.self_attn.qkv.weight",
    ]
    browser.run("document.getElementById('tab-sources').click()")
    assert browser.run("document.getElementById('found').textContent") == "0 of 111"


def test_another_layer_is_one_click_away(browser: Browser, write: Write, llama: Callable[..., Any]) -> None:
    browser.open(write(llama().plan()), "model.layers.0.mlp.fc1_weight")
    browser.run(
        "new Promise((done) => { addEventListener('hashchange', () => done(1), { once: true }); "
        "document.querySelector('[aria-label=\"next of layers\"]').click(); })"
    )
    assert [row[1] for row in legend(browser)] == [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")]


def test_the_overview_has_the_rules_and_all_that_is_out_of_the_ordinary(
    browser: Browser, write: Write, everything: Plan
) -> None:
    browser.open(write(replace(everything, notes=("one more file is there",))))
    text = browser.run("document.getElementById('main').innerText")
    for wanted in (everything.digest, "m.yaml:7:3", "off (its condition does not hold)", "ignored: no longer needed"):
        assert wanted in text
    assert "scaled or offset (2.0 x + 1.0)" in text
    assert "one more file is there" in text
    browser.go("head")
    assert "It is the same parameter as concat." in browser.run("document.getElementById('main').innerText")


def test_a_name_that_is_not_in_the_plan_is_said(browser: Browser, write: Write, everything: Plan) -> None:
    browser.open(write(everything), "<img src=x>")
    assert browser.run("document.querySelector('.notice').textContent") == "There is no '<img src=x>' in this plan."


# -- what can not happen --

HOSTILE = (
    "</script ><script>document.title='broken'</script><img src='https://example.com/' onerror='x'><!--{{data}}&amp;"
)


def test_names_can_not_break_out_of_the_page(browser: Browser, write: Write) -> None:
    flat = Pair((2,), (1,), (1,), 0, 0)
    plan = Plan(
        patch=HOSTILE,
        mapping=HOSTILE,
        digest="0" * 64,
        location=HOSTILE + "\ud800",
        copies=(Copy(HOSTILE, HOSTILE, flat, IDENTITY, 0),),
        fills=(),
        sources={HOSTILE: SourceEntry((2,), "F32", "used")},
        targets={HOSTILE: TargetEntry((2,), "F32", "filled", 0)},
        rules=(RuleEntry(HOSTILE, HOSTILE, "used", 1, (HOSTILE,)),),
        notes=(HOSTILE,),
    )
    browser.open(write(plan))
    assert browser.run("document.title") == "tepatch plan"
    assert browser.run("document.querySelectorAll('img').length") == 0
    browser.open(write(plan), quote(HOSTILE))
    assert legend(browser)[0][1] == HOSTILE


def test_a_script_that_is_not_the_page_s_own_does_not_run(chromium: Browser, write: Write, everything: Plan) -> None:
    path = write(everything)
    path.write_text(path.read_text().replace("<noscript>", "<script>window.broken = 1;</script><noscript>"))
    chromium.open(path)
    assert chromium.run("window.broken === undefined && document.querySelectorAll('#list a').length > 0")
    assert "Content Security Policy" in " ".join(chromium.complaints)


def test_the_page_is_ascii_names_no_address_and_is_the_same_every_time(everything: Plan) -> None:
    page = plan_page(everything)
    assert page.isascii()
    assert "://" not in page
    assert page == plan_page(everything)


def test_a_tensor_without_elements_or_dimensions_can_be_shown(browser: Browser, write: Write, plan_of: PlanOf) -> None:
    shapes = {"none": (0, 4), "one": ()}
    browser.open(write(plan_of("parameters: {none: same, one: same}", shapes, shapes)), "none")
    browser.go("one")
    assert looked_up(browser, "target", "one", 1) == [{"name": "one", "flat": 0}]


MAX_MEGABYTES = 8
MAX_SECONDS = 3


def test_a_model_of_36_000_tensors_makes_a_page_that_opens_at_once(
    browser: Browser, write: Write, plan_of: PlanOf
) -> None:
    layers, experts, hidden, inner = 94, 128, 4096, 1536
    text = f"""captures: {{layer: {layers}, expert: {experts}}}
parameters:
  model.layers.{{layer}}.mlp:
    gate_up:
      stack: {{concat: ['experts.{{expert}}.gate_proj.weight', 'experts.{{expert}}.up_proj.weight']}}
      over: expert
    down: {{stack: 'experts.{{expert}}.down_proj.weight', over: expert}}
"""
    sources, targets = {}, {}
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp."
        targets |= {f"{at}gate_up": (experts, 2 * inner, hidden), f"{at}down": (experts, hidden, inner)}
        for expert in range(experts):
            one = f"{at}experts.{expert}."
            sources |= {f"{one}{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
            sources[f"{one}down_proj.weight"] = (hidden, inner)
    path = write(plan_of(text, sources, targets))
    assert path.stat().st_size < MAX_MEGABYTES * 1e6
    started = time.perf_counter()
    browser.open(path, "model.layers.93.mlp.gate_up")
    assert [row[1] for row in legend(browser)] == [
        f"model.layers.93.mlp.experts.0.{part}_proj.weight" for part in ("gate", "up")
    ]
    assert time.perf_counter() - started < MAX_SECONDS


def decode_png(data: bytes) -> list[list[tuple[int, int, int]]]:
    """The pixels of a PNG as Chromium writes it: 8 bits, red, green, blue (and alpha), not interlaced."""
    at, packed, width, channels = 8, b"", 0, 0
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, depth, colour = struct.unpack(">I4xBB", body[:10])
            channels = {2: 3, 6: 4}[colour]
            assert depth == 8
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    raw = zlib.decompress(packed)
    stride, rows, before = width * channels, [], bytes(width * channels)
    for start in range(0, len(raw), stride + 1):
        method, line = raw[start], bytearray(raw[start + 1 : start + 1 + stride])
        for i in range(stride):
            left = line[i - channels] if i >= channels else 0
            corner = before[i - channels] if i >= channels else 0
            above = before[i]
            if method == 1:
                line[i] = (line[i] + left) & 255
            elif method == 2:
                line[i] = (line[i] + above) & 255
            elif method == 3:
                line[i] = (line[i] + (left + above) // 2) & 255
            elif method == 4:
                guess = left + above - corner
                near = min((left, above, corner), key=lambda each: abs(guess - each))
                line[i] = (line[i] + near) & 255
        before = bytes(line)
        rows.append([(line[i], line[i + 1], line[i + 2]) for i in range(0, stride, channels)])
    return rows
