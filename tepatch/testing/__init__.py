"""The conformance kit: whether a patch gives Hugging Face's model, told by one line for each config.

    from tepatch.testing import Case, conformance_tests

    test_conformance = conformance_tests("llama", [Case("tiny", LlamaConfig(hidden_size=64, ...))])

For authors of plugins, and for ``tepatch.proof``, whose proof at a first load is made of the same checks. It needs
pytest for ``conformance_tests`` only.
"""

from tepatch.testing.cases import Case
from tepatch.testing.report import CaseReport, Conformance, Outcome
from tepatch.testing.sizes import refusals, small_sizes, wide_sizes
from tepatch.testing.suite import check_patch, conformance_tests

__all__ = [
    "Case",
    "CaseReport",
    "Conformance",
    "Outcome",
    "check_patch",
    "conformance_tests",
    "refusals",
    "small_sizes",
    "wide_sizes",
]
