"""The mapping language: from a YAML file to a proven plan. Knows names, shapes and strides, no model, no torch."""

from tepatch.mapping.accounting import make_export_plan, make_plan
from tepatch.mapping.plan import Copy, Fill, Plan, Spec, TensorSpec
from tepatch.mapping.read import parse_mapping, read_mapping
from tepatch.mapping.rules import Mapping

__all__ = [
    "Copy",
    "Fill",
    "Mapping",
    "Plan",
    "Spec",
    "TensorSpec",
    "make_export_plan",
    "make_plan",
    "parse_mapping",
    "read_mapping",
]
