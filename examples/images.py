"""Learning from images: actor and critic have features of their own, so that the critic can learn its."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPOExt


class Light(gym.Env):
    """One quarter of the image is lit: say which. An episode has ten images."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.image(), {}

    def step(self, action):
        reward = float(action == self.lit)
        self.steps += 1
        return self.image(), reward, self.steps == 10, False, {}

    def image(self):
        self.lit = int(self.np_random.integers(4))
        row, column = divmod(self.lit, 2)
        image = np.zeros((36, 36, 1), np.uint8)
        image[18 * row : 18 * (row + 1), 18 * column : 18 * (column + 1)] = 255
        return image


def main(total_timesteps: int = 5_000) -> None:
    model = TRPOExt(
        "CnnPolicy",
        make_vec_env(Light, n_envs=4),
        n_steps=64,
        batch_size=64,
        target_kl=0.05,
        policy_kwargs=dict(share_features_extractor=False),
        seed=0,
    )
    model.learn(total_timesteps)
    mean, _ = evaluate_policy(model, make_vec_env(Light, seed=1), n_eval_episodes=10)
    print(f"right answers: {mean:.1f} of 10")


if __name__ == "__main__":
    main()
