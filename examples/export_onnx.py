"""A trained policy as an ONNX file, checked against the model. Needs: pip install onnx onnxruntime."""

import warnings

import numpy as np
import onnxruntime
import torch as th

from sb3_trpo_ext import TRPOExt


class Actor(th.nn.Module):
    """From a batch of observations to deterministic actions."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, observation):
        return self.policy._predict(observation, deterministic=True)


def export(model: TRPOExt, path: str) -> None:
    example = th.as_tensor(model.observation_space.sample()[None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces its new exporter, which SB3's distributions make fail
        th.onnx.export(
            Actor(model.policy).eval(),
            (example,),
            path,
            dynamo=False,
            input_names=["observation"],
            output_names=["action"],
            dynamic_axes={"observation": {0: "batch"}, "action": {0: "batch"}},
        )


def main(total_timesteps: int = 20_000) -> None:
    model = TRPOExt("MlpPolicy", "CartPole-v1", n_steps=512, seed=0, device="cpu").learn(total_timesteps)
    export(model, "actor.onnx")
    observations = np.stack([model.observation_space.sample() for _ in range(100)]).clip(-5, 5)
    (actions,) = onnxruntime.InferenceSession("actor.onnx").run(None, {"observation": observations})
    expected, _ = model.predict(observations, deterministic=True)
    assert np.array_equal(actions, expected)
    print(f"actor.onnx gives the model's {len(actions)} actions")


if __name__ == "__main__":
    main()
