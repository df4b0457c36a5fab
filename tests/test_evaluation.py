import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor

from sb3_trpo_ext import TRPOExt
from sb3_trpo_ext.evaluation import evaluate_policy
from tests.envs import Picky, Walk, limited


def test_the_environment_is_asked_for_masks_if_it_has_any():
    picky, plain = (Monitor(limited(cls(spaces.Discrete(5)))) for cls in (Picky, Walk))
    model = TRPOExt("MlpPolicy", picky, n_steps=64, device="cpu")
    evaluate_policy(model, picky, 5)
    with pytest.raises(AssertionError):
        evaluate_policy(model, picky, 20, use_masking=False, deterministic=False)
    rewards, lengths = evaluate_policy(model, plain, 3, return_episode_rewards=True)
    assert len(rewards) == len(lengths) == 3
    with pytest.raises(ValueError, match="use_masking=True needs an environment with action_masks"):
        evaluate_policy(model, plain, use_masking=True)
