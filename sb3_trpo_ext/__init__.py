"""Trust-region policy optimisation for Stable-Baselines3."""

from sb3_trpo_ext.algorithms.trpo import TRPOExt

__version__ = "0.1.0"

__all__ = ["TRPOExt", "__version__"]
