"""CLIMB: an information bottleneck beside any self-supervised loss."""

from climb_plugin.head import GaussianHead
from climb_plugin.loss import ClimbLoss, ClimbTerms

__version__ = "0.1.0"

__all__ = ["ClimbLoss", "ClimbTerms", "GaussianHead", "__version__"]
