"""The functions that people call, each from the module that is about it."""

from tepatch.certification import certify, check_certificate
from tepatch.conversion import convert
from tepatch.export import save
from tepatch.loading import build, load, plan
from tepatch.te.layer import set_precision, weight_copies

__all__ = ["build", "certify", "check_certificate", "convert", "load", "plan", "save", "set_precision", "weight_copies"]
