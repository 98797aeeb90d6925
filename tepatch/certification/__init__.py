"""Proof that nothing was lost between two checkpoints: made by reading both, written down, and checked again later.

``proof`` compares, ``sides`` sees a checkpoint of any layout as the original's tensors, ``comparison`` knows what a
rounding may do, ``certificate`` is the record, ``page`` shows it, and ``recheck`` holds files against it.
"""

from tepatch.certification.certificate import Certificate
from tepatch.certification.proof import certify
from tepatch.certification.recheck import CheckResult, check_certificate

__all__ = ["Certificate", "CheckResult", "certify", "check_certificate"]
