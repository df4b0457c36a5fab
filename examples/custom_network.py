"""Layers, activations and features of your own; `actor_path` says how fast the policy acts."""

import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_trpo_ext import TRPOExt


class Products(BaseFeaturesExtractor):
    """Observations and the products of neighbouring entries, through one layer."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=32)
        self.layer = nn.Linear(2 * observation_space.shape[0], 32)

    def forward(self, observations):
        products = observations * observations.roll(1, dims=1)
        return th.tanh(self.layer(th.cat([observations, products], dim=1)))


def main(total_timesteps: int = 20_000) -> None:
    plain = dict(net_arch=dict(pi=[64, 64], vf=[128, 128]), activation_fn=nn.ReLU)
    own = dict(features_extractor_class=Products, share_features_extractor=False)
    for policy_kwargs in (plain, own):
        model = TRPOExt("MlpPolicy", "Pendulum-v1", n_steps=1024, gamma=0.9, policy_kwargs=policy_kwargs, seed=0)
        model.learn(total_timesteps)
        print(f"acts through {model.actor_path}; {model.report.outcome.value}, KL {model.report.kl:.4f}")


if __name__ == "__main__":
    main()
