"""Search hyperparameters through the RL Zoo: the same as `python -m sb3_trpo_ext.zoo train ... -optimize`."""

import sys

from sb3_trpo_ext.zoo.__main__ import main as zoo


def main(total_timesteps: int = 20_000, n_trials: int = 10) -> None:
    budget = ["-n", str(total_timesteps), "--n-trials", str(n_trials), "--n-evaluations", "1", "--eval-episodes", "2"]
    search = ["-optimize", "--sampler", "random", "--pruner", "none", "--no-optim-plots"]
    sys.argv = ["zoo", "train", "--algo", "trpo_ext", "--env", "CartPole-v1", "-f", "logs", *budget, *search]
    zoo()
    print("the trials: logs/trpo_ext/report_*.csv")


if __name__ == "__main__":
    main()
