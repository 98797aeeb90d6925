"""Checks that compare nothing but bits and names: the plan, the way there and back, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import tepatch
from tepatch.errors import PlanError, TepatchError
from tepatch.hf.config import ConfigFields
from tepatch.mapping.read import read_mapping
from tepatch.planning.requirements import requirement_problems
from tepatch.testing.cases import Bench, changed
from tepatch.testing.checkpoints import differences, forms, read_all, write
from tepatch.testing.results import Broken, Finding, NotApplicable

SHOWN = 6
"""Differences that a message lists."""


def plan(bench: Bench) -> Finding:
    """The mapping is proven for a checkpoint as transformers saves it: every tensor used, every parameter filled."""
    made = bench.plan  # a plan exists if everything is accounted for, and else an error says what is not
    states = Counter(entry.state for entry in made.sources.values())
    detail = (
        f"{', '.join(f'{count} {state}' for state, count in sorted(states.items()))}; {len(made.targets)} parameters"
    )
    return Finding(detail=detail, is_proof=True)


def round_trip(bench: Bench) -> Finding:
    """What is loaded from any form of the checkpoint comes back bit for bit, by both ways of saving."""
    original = read_all(bench.checkpoint)
    folder = bench.folder / "forms"
    count = 0
    for form, written in forms(original, bench.plan, bench.checkpoint, folder):
        model = bench.load(written)
        tepatch.save(model, folder / f"saved-{count}", progress=False)
        model.save_pretrained(folder / f"saved-by-transformers-{count}")
        for how, back in (("tepatch.save", "saved"), ("save_pretrained", "saved-by-transformers")):
            found = read_all(folder / f"{back}-{count}")
            _compare(f"{form}, {how}", found, original, bench.plan.inexact())
        count += 1
    return Finding(detail=_exactly(len(original), count, bench.plan.inexact()), is_proof=True)


def round_trip_unconverted(bench: Bench) -> Finding:
    """The same for a checkpoint in the names that transformers has in memory, where it saves others."""
    original = read_all(bench.checkpoint)
    tied = bench.stock.all_tied_weights_keys
    tensors = {name: tensor for name, tensor in bench.stock.state_dict().items() if name not in tied}
    if not set(tensors) - set(original):
        raise NotApplicable("transformers saves the names that it has in memory")
    folder = write(tensors, bench.checkpoint, bench.folder / "unconverted", place={}, kind="safetensors")
    model = bench.load(folder)
    tepatch.save(model, bench.folder / "unconverted-saved", progress=False)
    made: Any = model.tepatch.plan
    _compare("tepatch.save", read_all(bench.folder / "unconverted-saved"), read_all(folder), made.inexact())
    return Finding(detail=_exactly(len(tensors), 1, made.inexact()), is_proof=True)


def _compare(what: str, found: Any, original: Any, inexact: Any) -> None:
    if wrong := differences(found, original, but=inexact):
        more = [f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise Broken("\n  ".join([f"{what}: not what was loaded", *wrong[:SHOWN], *more]))


def _exactly(count: int, forms: int, inexact: Any) -> str:
    but = f", the values of {len(inexact)} only nearly, as the plan says" if inexact else ""
    return f"{count} tensors in {forms} form{'s' * (forms > 1)} of checkpoint{but}"


def refusals(bench: Bench) -> Finding:
    """What the mapping's ``requires`` excludes is refused before a weight is read, and the field is named."""
    if not (changes := bench.case.refusals()):
        raise NotApplicable("the case names nothing to refuse")
    rules = read_mapping(bench.patch.mapping_path())
    refuted: dict[str, list[str]] = {}
    for change in changes:
        text = ", ".join(f"{name} = {value!r}" for name, value in change.items())
        config = changed(bench.config, change)
        places = {problem.where for problem in requirement_problems(rules, ConfigFields(config))}
        fired = [str(each.condition) for each in rules.requires if each.condition.where in places]
        try:
            tepatch.plan(bench.patch, bench.checkpoint, config=config, backend="reference")
        except TepatchError as error:
            if not isinstance(error, PlanError) or not fired:
                raise Broken(f"{text} is refused, but not by a 'requires' of the mapping:\n{error}") from error
            if not any(name.removeprefix("text_config.").split(".")[0] in str(error) for name in change):
                raise Broken(f"{text} is refused by a message that does not name the field:\n{error}") from error
        else:
            raise Broken(f"{text} is not refused")
        refuted[text] = fired
    return Finding(
        detail=f"{len(refuted)} config{'s' * (len(refuted) > 1)} refused", is_proof=True, notes={"refused": refuted}
    )
