"""Evaluate and save the best model on the way, draw a page of pictures, stop when it is solved."""

from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from sb3_trpo_ext import TRPOExt
from sb3_trpo_ext.plots import TrainingPage


def main(total_timesteps: int = 100_000) -> None:
    model = TRPOExt("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_steps=512, seed=0)
    model.set_logger(configure("runs/cartpole", ["csv"]))
    solved = StopTrainingOnRewardThreshold(reward_threshold=490)
    evaluation = EvalCallback(
        make_vec_env("CartPole-v1", seed=1),
        callback_on_new_best=solved,
        eval_freq=2_000,
        n_eval_episodes=10,
        best_model_save_path="runs/best",
        verbose=0,
    )
    model.learn(total_timesteps, callback=[evaluation, TrainingPage("runs/page.png")])
    model.logger.close()
    print(f"{model.num_timesteps} steps, outcomes {model.outcome_counts}; picture: runs/page.png")


if __name__ == "__main__":
    main()
