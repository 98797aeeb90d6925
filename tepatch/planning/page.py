"""A plan as one HTML page: for every parameter a drawing of which of its elements come from where.

Proofs say that a layout is consistent, and not that it is the one that was meant. That is seen more easily than
computed. The page is one file that needs no network and allows itself none: its policy (CSP) admits this very script
and this very style, by their digests, and nothing else. Everything that comes from a checkpoint is data.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Hashable
from functools import lru_cache
from importlib import resources
from typing import Any, Generic, TypeVar

from tepatch.planning.bind import IDENTITY
from tepatch.planning.plan import Plan
from tepatch.planning.words import describe_pair, describe_view
from tepatch.views import Pair

_Item = TypeVar("_Item", bound=Hashable)
_PLACEHOLDER = re.compile(r"\{\{(policy|style|script|data)\}\}")


def plan_page(plan: Plan) -> str:
    """The page, as ASCII text.

    Layouts, shapes and words that layers share stand in it once, and geometry is computed when it is looked at: a plan
    of 36,945 tensors makes a page of 4 MB.
    """
    style, script = _resource("page.css"), _resource("page.js")
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"policy": policy, "style": style, "script": script, "data": _embedded(page_data(plan))}
    # In one pass, so that nothing in the data is ever taken for a placeholder.
    return _PLACEHOLDER.sub(lambda match: parts[match[1]], _resource("page.html"))


def page_data(plan: Plan) -> dict[str, Any]:
    """What the page is drawn from, as JSON-ready data: tensors as rows of indices into tables of what they share."""
    shapes, texts, words, layouts = _Table[tuple[int, ...]](), _Table[str](), _Table[tuple[str, ...]](), _Table[Pair]()
    source_index = {name: index for index, name in enumerate(plan.sources)}
    target_index = {name: index for index, name in enumerate(plan.targets)}
    describe_pair_once = lru_cache(maxsize=None)(describe_pair)  # for all layers
    copies = []
    for copy in plan.copies:
        in_words = describe_pair_once(copy.pair, plan.sources[copy.source].shape, plan.targets[copy.target].shape)
        row = [source_index[copy.source], target_index[copy.target], layouts.index(copy.pair), words.index(in_words)]
        copies.append(row if copy.affine == IDENTITY else [*row, copy.affine.scale, copy.affine.offset])
    fills = []
    for fill in plan.fills:
        place = describe_view(fill.pair.target_view(), plan.targets[fill.target].shape)
        # As text: JSON has no infinity.
        row = [target_index[fill.target], layouts.index(fill.pair), texts.index(place), texts.index(str(fill.value))]
        fills.append(row)
    reasons: dict[str, list[int]] = {}
    for name, reason in plan.inexact().items():
        reasons.setdefault(reason, []).append(source_index[name])
    return {
        "patch": plan.patch,
        "mapping": plan.mapping,
        "digest": plan.digest,
        "location": plan.location,
        "saves": plan.is_reversed,
        "sourceBytes": plan.source_bytes,
        "targetBytes": plan.target_bytes,
        "notes": list(plan.notes),
        "rules": [[r.where, r.target, r.state, r.count, list(r.sources)] for r in plan.rules],
        "copies": copies,
        "fills": fills,
        "sources": [
            [name, shapes.index(e.shape), texts.index(e.dtype), texts.index(e.state), texts.index(e.note)]
            for name, e in plan.sources.items()
        ],
        "targets": [
            [name, shapes.index(e.shape), texts.index(e.dtype), texts.index(e.state), e.rule]
            + ([target_index[e.tied_to]] if e.tied_to else [])
            for name, e in plan.targets.items()
        ],
        "inexact": list(reasons.items()),
        "shapes": shapes.items,
        "texts": texts.items,
        "words": words.items,
        "layouts": layouts.items,
    }


class _Table(Generic[_Item]):
    """Each item once, in the order in which they were first asked for."""

    def __init__(self) -> None:
        self._indices: dict[_Item, int] = {}

    def index(self, item: _Item) -> int:
        return self._indices.setdefault(item, len(self._indices))

    @property
    def items(self) -> list[_Item]:
        return list(self._indices)


def _embedded(data: dict[str, Any]) -> str:
    """JSON that can stand in a page: a name may hold ``</script>``, and here it can not end anything."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _resource(name: str) -> str:
    return (resources.files("tepatch.planning") / name).read_text(encoding="ascii")
