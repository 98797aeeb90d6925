"""Running the checks: all of them at once, or one by one as tests of pytest."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tepatch.errors import PluginError, Problem
from tepatch.mapping.read import read_mapping
from tepatch.patch import Patch
from tepatch.plugins import PluginHost, default_host
from tepatch.proven import installed, installed_versions, read_record, record_path, write_record
from tepatch.testing import parity, proofs
from tepatch.testing.cases import Bench, Case, named, traits
from tepatch.testing.mutations import mutations
from tepatch.testing.report import CaseReport, Conformance, Outcome
from tepatch.testing.results import Broken, Check, NotApplicable
from tepatch.testing.ropes import rope_types

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

REPORT_FOLDER = "TEPATCH_CONFORMANCE"
"""The environment variable that names a folder for the reports of tests."""
RECORD = "TEPATCH_PROVEN"
"""The environment variable that is "1" where tests add what they have proven to ``proven.json`` of the plugin."""

_CHECKS = (
    *(proofs.plan, proofs.round_trip, proofs.round_trip_unconverted, proofs.refusals),
    *(parity.no_mask, parity.left_padding, parity.right_padding, parity.lengths, parity.positions, parity.packing),
    *(parity.decoding, parity.chunks, parity.chunks_left_padded, parity.static_caches, parity.generation),
    *(parity.hidden_states, parity.router_logits, parity.gradients, rope_types),
    *(mutations, parity.gpu),
)
CHECKS: dict[str, Check] = {check.__name__.replace("_", "-"): check for check in _CHECKS}
"""All checks by name, in the order in which they are run."""
GPU = "gpu"
"""The check that needs a GPU."""


def check_patch(
    patch: str | Patch,
    configs: Mapping[str, PreTrainedConfig] | Sequence[Case],
    *,
    checks: Iterable[str] | None = None,
    plugins: PluginHost | None = None,
) -> Conformance:
    """Try a patch on each case: proofs, round trips, parity with Hugging Face's model, refusals, mistakes on purpose.

    ``patch`` is a name or a ``Patch``, ``configs`` are cases or plain configs by name, ``checks`` the names of those
    that are run (default: all). Takes seconds for a case, and memory for three tiny models. Nothing is raised for a
    check that fails (see ``Conformance.passed`` and ``raise_for_failures``); ``PluginError`` is, for cases that are
    not well-formed and a patch that does not exist.
    """
    suite = Suite(patch, configs, plugins=plugins)
    names = list(CHECKS) if checks is None else list(checks)
    _check_names(names, "checks")
    for case in suite.cases:
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                suite.run(case, name, partial(Path, folder))
    return suite.conformance()


def conformance_tests(
    patch: str | Patch,
    configs: Mapping[str, PreTrainedConfig] | Sequence[Case],
    *,
    plugins: PluginHost | None = None,
) -> Callable[..., None]:
    """A test of pytest for each check of each case: assign it to a name that begins with ``test_``.

        test_conformance = conformance_tests("llama", [Case("tiny", LlamaConfig(...))])

    The tests of the check ``gpu`` are marked ``gpu``. With a folder in the environment variable
    ``TEPATCH_CONFORMANCE``, what the tests find out is written to ``<patch>.json`` there. With ``TEPATCH_PROVEN=1`` the
    versions that are installed are added to the plugin's ``proven.json`` when all checks have passed; loads with these
    versions then need no proof of their own. A check that was proven once, as that file says, and is skipped now,
    fails. Raises as ``check_patch``.
    """
    import pytest

    suite = Suite(patch, configs, plugins=plugins)
    items = [
        pytest.param(case, name, id=f"{case.name}-{name}", marks=[pytest.mark.gpu] if name == "gpu" else [])
        for case in suite.cases
        for name in CHECKS
    ]

    @pytest.mark.parametrize(("case", "name"), items)
    def test_conformance(case: Case, name: str, tmp_path_factory: Any) -> None:
        outcome = suite.run(case, name, lambda: tmp_path_factory.mktemp(f"{suite.name}-{case.name}".replace("/", "-")))
        if folder := os.environ.get(REPORT_FOLDER):
            suite.conformance().write(folder)
        if os.environ.get(RECORD) == "1":
            suite.record()
        if outcome.status == "skipped":
            if suite.was_proven(case, name):
                raise AssertionError(
                    f"{suite.name}, {case.name}, {name}: was proven and is skipped now: {outcome.detail}; if that is "
                    f"right, take the patch out of {record_path(suite.patch)} and prove it again"
                )
            pytest.skip(outcome.detail)
        if outcome.error is not None:
            raise AssertionError(f"{suite.name}, {case.name}, {name}: {outcome.detail}") from outcome.error

    tests: Callable[..., None] = test_conformance
    return tests


class Suite:
    """The checks of one patch, and what they have found so far. Only one case's models are kept at a time."""

    def __init__(
        self,
        patch: str | Patch,
        configs: Mapping[str, PreTrainedConfig] | Sequence[Case],
        *,
        plugins: PluginHost | None = None,
    ) -> None:
        self.cases = named(configs)
        for case in self.cases:
            _check_names(case.skip, f"case '{case.name}', skip")
        self._given = patch
        self._plugins = plugins
        self._outcomes: dict[str, dict[str, Outcome]] = {case.name: {} for case in self.cases}
        self._models: dict[str, str] = {}
        self._bench: Bench | None = None

    @property
    def name(self) -> str:
        return self._given.name if isinstance(self._given, Patch) else self._given

    @property
    def patch(self) -> Patch:
        """Raises ``PluginError`` if no plugin offers it."""
        if isinstance(self._given, Patch):
            return self._given
        return (self._plugins if self._plugins is not None else default_host()).patch(self._given)

    def run(self, case: Case, name: str, make_folder: Callable[[], Path]) -> Outcome:
        """Run one check, and remember its outcome. ``make_folder`` gives an empty folder for a new case."""
        if (reason := case.skip.get(name)) is not None:
            outcome = Outcome(status="skipped", detail=reason)
        else:
            if self._bench is None or self._bench.case is not case:
                self._bench = None  # its models go before others come
                self._bench = Bench(self.patch, case, make_folder())
            outcome = _outcome(self._bench, name)
        self._outcomes[case.name][name] = outcome
        return outcome

    def was_proven(self, case: Case, name: str) -> bool:
        """Whether the plugin's ``proven.json`` says that this check of this case was passed once."""
        cases = read_record(record_path(self.patch)).get(self.name, {"skipped": {}})["skipped"]
        return case.name in cases and name not in (*cases[case.name], GPU)

    def record(self) -> None:
        """Add the versions that are installed to ``proven.json``, if every check has been run and none has failed."""
        found = self._outcomes
        if any(outcomes.keys() | {GPU} != CHECKS.keys() for outcomes in found.values()):
            return
        if any(outcome.status == "failed" for outcomes in found.values() for outcome in outcomes.values()):
            return
        if any(self.was_proven(case, name) for case in self.cases for name in _skipped(found[case.name])):
            return
        skipped = {case: _skipped(outcomes) for case, outcomes in found.items()}
        for reasons in skipped.values():
            reasons.pop(GPU, None)  # whether there is one says nothing of the case
        versions = installed(self.patch)
        if not any(outcomes[GPU].status == "passed" for outcomes in found.values() if GPU in outcomes):
            versions.pop("transformer-engine", None)
        write_record(self.patch, versions, skipped)

    def conformance(self) -> Conformance:
        """What has been found out so far."""
        reports = {}
        for case in self.cases:
            found = self._outcomes[case.name]
            config = Bench(self.patch, case, Path()).config
            reports[case.name] = CaseReport(
                model=config.architectures[0],
                model_type=config.model_type,
                traits=tuple(traits(config)),
                outcomes={name: found.get(name, Outcome(status="not run")) for name in CHECKS},
            )
        return Conformance(
            patch=self.name,
            summary=self.patch.summary,
            model_types=tuple(self.patch.model_types),
            cases=reports,
            requires=tuple(str(each.condition) for each in read_mapping(self.patch.mapping_path()).requires),
            versions=installed_versions(),
        )


def _skipped(outcomes: Mapping[str, Outcome]) -> dict[str, str]:
    return {name: outcome.detail for name, outcome in outcomes.items() if outcome.status == "skipped"}


def _outcome(bench: Bench, name: str) -> Outcome:
    started = time.perf_counter()
    try:
        with quietly():
            finding = CHECKS[name](bench)
    except PluginError:
        raise  # the patch or the case itself is wrong: no check can say anything
    except NotApplicable as reason:
        return Outcome(status="skipped", detail=str(reason))
    except Broken as error:
        return Outcome(status="failed", detail=str(error), seconds=time.perf_counter() - started, error=error)
    except Exception as error:  # a layer may raise anything, and the other checks still say something
        detail = f"{type(error).__name__}: {error}"
        return Outcome(status="failed", detail=detail, seconds=time.perf_counter() - started, error=error)
    return Outcome(
        status="proven" if finding.is_proof else "passed",
        detail=finding.detail,
        figures=finding.figures,
        seconds=time.perf_counter() - started,
        notes=finding.notes,
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """One thread, since the tensors are so small that a second only waits for the first; and no progress bars."""
    from transformers.utils import logging

    threads, shows_bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if shows_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_names(names: Iterable[str], where: str) -> None:
    if unknown := [name for name in names if name not in CHECKS]:
        what = f"there is no check '{unknown[0]}'"
        raise PluginError(Problem(where=where, what=what, expected=", ".join(CHECKS), fix="check the spelling"))
