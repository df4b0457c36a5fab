"""An exact laboratory of finite MDPs: the theory that TRPO is taught from, as something that runs (docs/lab.md)."""

from sb3_trpo_ext.lab import algorithms, bounds, env, mdp, policies
from sb3_trpo_ext.lab.env import FiniteMDPEnv
from sb3_trpo_ext.lab.mdp import FiniteMDP, evaluate, random_mdp

__all__ = ["FiniteMDP", "FiniteMDPEnv", "algorithms", "bounds", "env", "evaluate", "mdp", "policies", "random_mdp"]
