"""An environment of your own, with Dict observations and several action dimensions."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPOExt


class Reach(gym.Env):
    """Move a point to a target in the unit square; the reward is minus the distance."""

    observation_space = spaces.Dict({"point": spaces.Box(0.0, 1.0, (2,)), "target": spaces.Box(0.0, 1.0, (2,))})
    action_space = spaces.Box(-1.0, 1.0, (2,))
    limit = 50

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point, self.target = self.np_random.random((2, 2)).astype(np.float32)
        self.steps = 0
        return self.observation(), {}

    def step(self, action):
        self.point = np.clip(self.point + 0.1 * action, 0.0, 1.0).astype(np.float32)
        self.steps += 1
        distance = float(np.linalg.norm(self.point - self.target))
        # truncated, not terminated: the value of the last state still counts
        return self.observation(), -distance, distance < 0.05, self.steps >= self.limit, {}

    def observation(self):
        return {"point": self.point, "target": self.target}


def main(total_timesteps: int = 50_000) -> None:
    check_env(Reach())
    model = TRPOExt("MultiInputPolicy", make_vec_env(Reach, n_envs=4), n_steps=256, seed=0)
    model.learn(total_timesteps)
    mean, spread = evaluate_policy(model, make_vec_env(Reach, seed=1), n_eval_episodes=20)
    print(f"return of 20 episodes: {mean:.2f} ± {spread:.2f}")


if __name__ == "__main__":
    main()
