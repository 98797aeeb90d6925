"""From a YAML file to a ``Mapping``: every problem that the file has by itself, all at once, with positions."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

from tepatch.errors import MappingError, Problem
from tepatch.mapping import rules, schema
from tepatch.mapping.document import Document, Loc, parse_document, read_document
from tepatch.mapping.nodes import NodeBuilder
from tepatch.mapping.parsing import Parser
from tepatch.mapping.rules import Located, Mapping, Rule
from tepatch.mapping.validate import suggest, validate

_ARROW = "<-"
_RESERVED = ("true", "false", "none")
_REQUIREMENT = "'name: {that: condition, else: sentence}', or 'condition: sentence'"


def read_mapping(path: str | Path, *, name: str | None = None) -> Mapping:
    """Read a mapping file and all that it extends.

    Messages call the file ``name`` (default: the last part of ``path``). Raises ``MappingError`` listing every
    problem with ``file:line:column``.
    """
    path = Path(path)
    return _assemble(read_document(path, name=name), path.parent, (path.resolve(),))


def parse_mapping(text: str, *, name: str = "<mapping>", folder: Path | None = None) -> Mapping:
    """Read a mapping from text (``folder`` is where ``extends`` looks). Raises as ``read_mapping``."""
    return _assemble(parse_document(text, name=name), folder, ())


def _assemble(document: Document, folder: Path | None, seen: tuple[Path, ...]) -> Mapping:
    parsed = validate(document)
    parent: Mapping | None = None
    if parsed.extends is not None:
        where = document.where(("extends",), 0)
        path = _find(parsed.extends, folder, where)
        if path.resolve() in seen:
            raise MappingError(Problem(where=where, what=f"'{parsed.extends}' extends itself"))
        parent = _assemble(read_document(path), path.parent, (*seen, path.resolve()))
    return _Reader(document, parsed, parent).mapping()


def _find(extends: str, folder: Path | None, where: str) -> Path:
    package, colon, name = extends.rpartition(":")
    fix = "write 'file.yaml' (in the same folder) or 'package:file.yaml'"
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise MappingError(Problem(where=where, what=f"'{extends}' leaves its folder", fix=fix))
    if colon:
        try:
            path = Path(str(resources.files(package) / name))
        except (ImportError, ValueError, TypeError) as error:
            raise MappingError(
                Problem(where=where, what=f"can not find package '{package}': {error}", fix=fix)
            ) from None
    elif folder is None:
        raise MappingError(Problem(where=where, what=f"'{extends}' needs a file to be relative to", fix=fix))
    else:
        path = folder / name
    if not path.is_file():
        raise MappingError(Problem(where=where, what=f"there is no mapping '{extends}'", found=str(path), fix=fix))
    return path


class _Reader(Parser):
    """Makes a ``Mapping`` of one validated document and the mapping that it extends."""

    def __init__(self, document: Document, parsed: schema.MappingFile, parent: Mapping | None) -> None:
        super().__init__(document)
        self.file = parsed
        self.parent = parent
        self.inherited = {rule.target.text: rule for rule in parent.rules} if parent else {}
        self.own: dict[str, Rule] = {}

    def mapping(self) -> Mapping:
        """Raises ``MappingError`` with every problem of the document."""
        parent = self.parent
        if "extends" in self.file.model_fields_set and self.file.extends is None:
            self.problem(("extends",), "'extends' has no value")
        self.captures = (parent.captures if parent else {}) | self._table("captures", self.file.captures)
        sizes = (parent.sizes if parent else {}) | self._table("sizes", self.file.sizes)
        for name in sorted(self.captures.keys() & sizes.keys()):
            self.problem(("sizes", name), f"'{name}' is a capture and a size: give one another name")
        self._tree(dict(self.file.parameters), ("parameters",), "", "", ())
        requires, ignored = self._requires(), self._ignored()
        all_rules = tuple((self.inherited | self.own).values())
        base, rest = self._base(all_rules), self._rest()
        if self.problems:
            raise MappingError(self.problems)
        digest = hashlib.sha256(self.document.text.encode() + (parent.digest.encode() if parent else b""))
        return Mapping(
            name=self.document.name,
            digest=digest.hexdigest(),
            extends=self.file.extends,
            captures=self.captures,
            sizes=sizes,
            requires=requires,
            ignored=(*(parent.ignored if parent else ()), *ignored),
            base=base,
            rest=rest,
            rules=all_rules,
        )

    def _base(self, all_rules: tuple[Rule, ...]) -> str | None:
        """The path of the base model, if one is named here or in what this extends."""
        base = self.file.base
        if base is None:
            if "base" in self.file.model_fields_set:
                self.problem(("base",), "'base' has no value")
            return self.parent.base if self.parent else None
        if (name := self.name(base, ("base",), bound=(), column=0)) is None:
            return None
        if name.fields:
            self.problem(("base",), "'base' is one place: it has no captures", column=0)
        elif not any(rules.is_below(rule.target.text, base) for rule in all_rules):
            self.problem(("base",), f"no rule is about '{base}'", column=0, fix="name what the rules begin with")
        return base

    def _rest(self) -> str | None:
        """Where it stands that parameters outside the base are themselves."""
        if self.file.rest is None:
            if "rest" in self.file.model_fields_set:
                self.problem(("rest",), "'rest' has no value")
            return self.parent.rest if self.parent else None
        if self.file.base is None and (self.parent is None or self.parent.base is None):
            self.problem(("rest",), "'rest' needs a 'base' that it is outside of")
        return self.document.where(("rest",))

    def _table(self, section: str, entries: dict[str, Any]) -> dict[str, Located]:
        out = {}
        for name, value in entries.items():
            self._check_name(name, (section, name))
            if (located := self.expression(value, (section, name))) is not None:
                out[name] = located
        return out

    def _check_name(self, name: str, loc: Loc) -> None:
        if not name.isidentifier() or name in _RESERVED:
            self.problem(loc, f"'{name}' is not a name (letters, digits and '_')")

    def _requires(self) -> tuple[rules.Requirement, ...]:
        """Inherited requirements and the file's own, each under its name or, without one, under its condition."""
        out = {item.name or str(item.condition): item for item in (self.parent.requires if self.parent else ())}
        first: dict[str, str] = {}
        for index, entry in enumerate(self.file.requires):
            loc: Loc = ("requires", index)
            if len(entry) != 1:
                self.problem(loc, f"one requirement is {_REQUIREMENT}")
                continue
            ((key, value),) = entry.items()
            of_condition = (name for name, item in out.items() if str(item.condition) == key)
            known = key if key in out else next(of_condition, key)
            if isinstance(value, schema.Requirement):
                self._check_name(key, loc)
                if key in first:
                    self.problem(loc, f"a second requirement '{key}' (first at {first[key]})")
                first[key] = self.document.where(loc)
                if (condition := self.expression(value.that, (*loc, key, "that"))) is not None:
                    out[key] = rules.Requirement(condition=condition, sentence=value.otherwise, name=key)
            elif value is None:
                if out.pop(known, None) is None:
                    fix = suggest(key, list(out)) if out else ""
                    self.problem(loc, f"nothing to drop: no inherited requirement '{key}'", fix=fix)
            elif known in out and out[known].name == key:
                self.problem(loc, f"'{key}' is the name of a requirement", fix=f"write {_REQUIREMENT}")
            elif (condition := self.expression(key, loc)) is not None:
                name = out[known].name if known in out else ""
                out[known] = rules.Requirement(condition=condition, sentence=value, name=name)
        return tuple(out.values())

    def _ignored(self) -> list[rules.Ignored]:
        out = []
        for index, entry in enumerate(self.file.ignore):
            for text, reason in entry.items():
                loc: Loc = ("ignore", index, text)
                if (name := self.name(text, loc, bound=self.captures)) is not None:
                    out.append(rules.Ignored(source=name, reason=reason, where=self.document.where(loc)))
        return out

    def _tree(
        self, tree: dict[str, Any], loc: Loc, target_prefix: str, source_prefix: str, conditions: tuple[Located, ...]
    ) -> None:
        """The rules of one scope, and of the scopes in it."""
        if "when" in tree:
            if not isinstance(tree["when"], str):
                self.problem((*loc, "when"), "'when' needs a condition")
            elif (condition := self.expression(tree["when"], (*loc, "when"))) is not None:
                conditions = (*conditions, condition)
        for key, value in tree.items():
            if key == "when":
                continue
            here: Loc = (*loc, key)
            target_part, arrow, source_part = (part.strip() for part in key.partition(_ARROW))
            target = f"{target_prefix}.{target_part}".lstrip(".")
            source = f"{source_prefix}.{source_part if arrow else target_part}".strip(".")
            if isinstance(value, dict):
                self._tree(value, here, target, source, conditions)
            elif value is None:
                if self.inherited.pop(target, None) is None:
                    self.problem(here, f"nothing to remove: no inherited rule for '{target}'")
            else:
                self._rule(value, here, target, source_prefix, source, conditions)

    def _rule(
        self, value: Any, loc: Loc, text: str, source_prefix: str, same: str, conditions: tuple[Located, ...]
    ) -> None:
        if (target := self.name(text, loc, bound=self.captures)) is None:
            return
        if (first := self.own.get(text)) is not None:
            self.problem(loc, f"a second rule for '{text}' (first at {first.where})")
            return
        self.inherited.pop(text, None)
        builder = NodeBuilder(self, target, source_prefix=source_prefix, same=same)
        is_choice = isinstance(value, list)
        choices = [((*loc, i), item) for i, item in enumerate(value)] if is_choice else [(loc, value)]
        nodes = [(at, builder.rule(item, at)) for at, item in choices]
        for at, node in nodes[:-1]:
            if node is not None and node.when is None:
                self.problem(at, "only the last of several choices may go without 'when'")
        self.own[text] = Rule(
            where=self.document.where(loc),
            target=target,
            conditions=conditions,
            choices=tuple(node for _, node in nodes if node is not None),
        )
