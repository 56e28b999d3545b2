"""From a cache budget to the ranks and widths of every layer, and what they cost."""

from tpa_convert.plans.coded import plan_coded
from tpa_convert.plans.plan import Budget, CodedBudget, Plan, plan_uniform, plan_widths
from tpa_convert.plans.plan_file import load_plan, plan_to_yaml

__all__ = [
    "Budget",
    "CodedBudget",
    "Plan",
    "load_plan",
    "plan_coded",
    "plan_to_yaml",
    "plan_uniform",
    "plan_widths",
]
