"""Normalise observations and rewards, save the statistics with the model, go on from both, evaluate."""

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo_ext import TRPOExt

ENV_ID, GAMMA = "Pendulum-v1", 0.9


def main(total_timesteps: int = 50_000) -> None:
    env = VecNormalize(make_vec_env(ENV_ID, n_envs=2, seed=0), gamma=GAMMA)
    model = TRPOExt("MlpPolicy", env, n_steps=512, gamma=GAMMA, seed=0)
    model.learn(total_timesteps // 2)
    model.save("pendulum")
    env.save("pendulum_statistics.pkl")

    # another day
    env = VecNormalize.load("pendulum_statistics.pkl", make_vec_env(ENV_ID, n_envs=2, seed=1))
    model = TRPOExt.load("pendulum", env=env)
    model.learn(total_timesteps // 2, reset_num_timesteps=False)

    env.training, env.norm_reward = False, False  # leave the statistics alone, report the environment's own returns
    mean, spread = evaluate_policy(model, env, n_eval_episodes=10)
    print(f"{model.num_timesteps} steps, return of 10 episodes: {mean:.0f} ± {spread:.0f}")


if __name__ == "__main__":
    main()
