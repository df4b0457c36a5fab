"""One environment per process: it pays where a step takes longer than sending its data to another process."""

import time

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_trpo_ext import TRPOExt


def main(total_timesteps: int = 50_000, n_envs: int = 4) -> None:
    for vec_env in (DummyVecEnv, SubprocVecEnv):
        env = make_vec_env("CartPole-v1", n_envs=n_envs, vec_env_cls=vec_env, seed=0)
        model = TRPOExt("MlpPolicy", env, n_steps=256, seed=0)
        started = time.perf_counter()
        model.learn(total_timesteps)
        print(f"{vec_env.__name__}: {model.num_timesteps / (time.perf_counter() - started):.0f} steps a second")
        env.close()


if __name__ == "__main__":  # worker processes import this file
    main()
