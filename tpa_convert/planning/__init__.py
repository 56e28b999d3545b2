"""From a cache budget to the ranks and widths of every layer."""

from tpa_convert.planning.plan import Budget, Plan, plan_uniform

__all__ = ["Budget", "Plan", "plan_uniform"]
