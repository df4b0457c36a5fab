"""An exact laboratory of finite MDPs: the theory that TRPO is taught from, as something that runs (docs/lab.md)."""

from sb3_trpo_ext.lab import algorithms, bounds, env, mdp, policies

__all__ = ["algorithms", "bounds", "env", "mdp", "policies"]
