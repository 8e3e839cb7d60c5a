"""Gives beta, the weight of the bottleneck, at each optimiser step."""

from climb_plugin.schedule.base import Constant, Schedule, as_schedule
from climb_plugin.schedule.ramp import SHAPES, Cosine, Exponential, Linear, Ramp
from climb_plugin.schedule.target_rate import TargetRate

__all__ = [
    "SHAPES",
    "Constant",
    "Cosine",
    "Exponential",
    "Linear",
    "Ramp",
    "Schedule",
    "TargetRate",
    "as_schedule",
]
