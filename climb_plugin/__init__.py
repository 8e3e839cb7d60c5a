"""Adds CLIMB, an information bottleneck, to any self-supervised loss."""

import torch

from climb_plugin.gaussian import Posterior
from climb_plugin.head import GaussianHead
from climb_plugin.loss import ClimbLoss
from climb_plugin.monitor import Measurements
from climb_plugin.schedule import Constant, Ramp, TargetRate
from climb_plugin.terms import ClimbTerms
from climb_plugin.wrap import unwrap, wrap

__version__ = "0.1.0"

__all__ = ["ClimbLoss", "ClimbTerms", "GaussianHead", "TargetRate", "__version__", "unwrap", "wrap"]

# Plain values: named here, they can be in a checkpoint that loads with weights_only=True.
torch.serialization.add_safe_globals(
    [ClimbTerms, Constant, Measurements, Posterior, Ramp, TargetRate]
)
