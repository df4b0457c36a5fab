"""A script for sb3_contrib.TRPO, with one import changed: it learns as before, faster."""

from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext.compat import TRPO  # was: from sb3_contrib import TRPO


def main(total_timesteps: int = 50_000) -> None:
    model = TRPO("MlpPolicy", "Pendulum-v1", n_steps=1024, gamma=0.9, target_kl=0.02, cg_damping=0.1, seed=0)
    model.learn(total_timesteps)
    mean, spread = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
    print(f"return of 10 episodes: {mean:.0f} ± {spread:.0f}")


if __name__ == "__main__":
    main()
