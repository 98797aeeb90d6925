"""Mappings changed and written again: the tree of every rule, as a file that reads back as the same rules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tepatch.mapping.axes import Axes
from tepatch.mapping.rules import (
    Alternatives,
    Constant,
    Leaf,
    Located,
    Mapping,
    Node,
    Parts,
    Rule,
    StackNode,
    Taking,
    Transpose,
    Wrap,
    children,
)


def rewrite(node: Node, change: Callable[[Node], Node]) -> Node:
    """The tree with ``change`` applied to every node, from the leaves up."""
    match node:
        case Wrap(inner=inner) | StackNode(inner=inner):
            node = replace(node, inner=rewrite(inner, change))
        case Parts(parts=parts):
            node = replace(node, parts=tuple(rewrite(part, change) for part in parts))
        case Alternatives(nodes=nodes):
            node = replace(node, nodes=tuple(rewrite(each, change) for each in nodes))
    return change(node)


def nodes_of(rule: Rule) -> Iterator[Node]:
    """Every node in a rule, outer ones first."""
    todo = list(reversed(rule.choices))
    while todo:
        node = todo.pop()
        yield node
        todo += reversed(children(node))


def text_of(mapping: Mapping) -> str:
    """The mapping as one file, without the parents that it had."""
    # JSON is YAML, and quotes what YAML would read as something else.
    return json.dumps(
        {
            "version": 1,
            "captures": {name: str(located) for name, located in mapping.captures.items()},
            "sizes": {name: str(located) for name, located in mapping.sizes.items()},
            "requires": [{str(each.condition): each.sentence} for each in mapping.requires],
            "ignore": [{each.source.text: each.reason} for each in mapping.ignored],
            **({} if mapping.base is None else {"base": mapping.base}),
            **({} if mapping.rest is None else {"rest": "same"}),
            "parameters": {rule.target.text: _choices(rule) for rule in mapping.rules},
        },
        indent=1,
    )


def _choices(rule: Rule) -> list[dict[str, Any]]:
    out = []
    for node in rule.choices:
        entry = _data(node)
        if conditions := [*rule.conditions, *([node.when] if node.when else [])]:
            entry["when"] = " and ".join(f"({condition})" for condition in conditions)
        out.append(entry)
    return out


def _data(node: Node) -> dict[str, Any]:
    """A node as a mapping file says it, but for ``when``."""
    out: dict[str, Any] = {}
    match node:
        case Leaf(source=source, take=take):
            out = {"of": f"/{source.text}", **({"take": _take(take)} if take else {})}
        case Wrap(inner=inner):
            out = {"of": _data(inner)}
        case Parts(parts=parts, groups=groups, block=block, sizes=sizes, dim=dim):
            key = "concat" if groups is None and block is None else "interleave"
            out = {key: [_data(part) for part in parts], "dim": dim}
            out |= {name: str(each) for name, each in (("over", groups), ("block", block)) if each is not None}
            out |= {"sizes": [str(size) for size in sizes]} if sizes is not None else {}
        case StackNode(inner=inner, over=over, dim=dim):
            out = {"stack": _data(inner), "over": over, "dim": dim}
        case Alternatives(nodes=nodes):
            out = {"any_of": [_data(each) for each in nodes]}
        case Constant(value=value):
            out = {"create": value}
    match node.axes:
        case Axes(text=text):
            out["axes"] = text
        case Transpose():
            out["transpose"] = True
    out |= {name: str(each) for name, each in (("scale", node.scale), ("offset", node.offset)) if each is not None}
    if node.pad is not None:
        out["pad"] = {"dim": node.pad.dim, "size": str(node.pad.size), "value": node.pad.value}
    return out


def _take(take: Taking) -> dict[str, Any]:
    fields: dict[str, Located | None] = {"out_of": take.out_of, "index": take.index}
    fields |= {"start": take.start, "size": take.size}
    return {"dim": take.dim, **{name: str(each) for name, each in fields.items() if each is not None}}
