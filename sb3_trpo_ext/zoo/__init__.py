"""RL Zoo with our algorithms in it: ``python -m sb3_trpo_ext.zoo train --algo trpo_ext ...``."""

from sb3_trpo_ext.zoo.registration import config_path, register

__all__ = ["config_path", "register"]
