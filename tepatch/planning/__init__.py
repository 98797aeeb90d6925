"""Plans: what becomes of every tensor of a checkpoint and every parameter of a model. Knows no model, no torch."""

from tepatch.planning.accounting import make_export_plan, make_plan
from tepatch.planning.difference import diff_plans
from tepatch.planning.plan import Copy, Fill, Plan, Spec, TensorSpec
from tepatch.planning.stored import read_plan

__all__ = [
    "Copy",
    "Fill",
    "Plan",
    "Spec",
    "TensorSpec",
    "diff_plans",
    "make_export_plan",
    "make_plan",
    "read_plan",
]
