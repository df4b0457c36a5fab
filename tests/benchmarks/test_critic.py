"""Critics side by side: returns by brute force, and each way learns from the same rollouts with a V of its own."""

from itertools import pairwise

import numpy as np
import pytest
import torch as th
from critic import LEAST_STATES, PARTS, WAYS, Beside, explained_variance, model_of, print_means, returns_to_the_end


def test_returns_run_to_the_end_of_the_episode_or_of_the_rollout():
    rng = np.random.default_rng(0)
    rewards, starts = rng.normal(size=40), rng.uniform(size=40) < 0.15
    returns, steps = returns_to_the_end(rewards, starts, 0.9)
    for t in range(40):
        ends = [i for i in range(t + 1, 40) if starts[i]]
        tail = rewards[t : ends[0] if ends else 40]
        assert steps[t] == len(tail)
        assert returns[t] == pytest.approx(sum(0.9**i * reward for i, reward in enumerate(tail)))


def test_each_way_has_a_critic_of_its_own_and_leaves_the_rollout_as_it_was(monkeypatch):
    monkeypatch.setattr("critic.LEAST_STEPS", 100)
    ways = {name: model_of("Pendulum-v1", 3, critic=name) for name in ("gauss_newton", "adam")}
    model = model_of("Pendulum-v1", 3)
    seen = []

    class Kept(Beside):
        def _on_rollout_end(self):
            before = {name: array.copy() for name, array in vars(self.model.rollout_buffer).items() if hasattr(array, "copy")}
            values = [way.predict_values(th.zeros(1, 3)).item() for way in ways.values()]
            super()._on_rollout_end()
            seen.append((values, [way.predict_values(th.zeros(1, 3)).item() for way in ways.values()]))
            for name, array in before.items():
                np.testing.assert_array_equal(getattr(self.model.rollout_buffer, name), array)

    beside = Kept(ways)
    model.learn(3 * 2048, callback=beside)
    assert [len(figures) for figures in beside.explained.values()] == [3, 3]
    first, second = beside.explained.values()
    # both start from one V; Adam is slow on returns of hundreds
    assert first[0] == second[0] and abs(first[0]) < 0.05 < first[2] and second[2] != second[0]
    assert seen[0][0][0] == seen[0][0][1] != seen[0][1][0] != seen[0][1][1]
    assert all(after == before for (_, after), (before, _) in pairwise(seen))


def test_what_is_explained_is_that_of_the_values_before_the_fit(monkeypatch):
    monkeypatch.setattr("critic.LEAST_STEPS", 100)
    way, model, asked = model_of("Pendulum-v1", 3, critic="gauss_newton"), model_of("Pendulum-v1", 3), []

    class Kept(Beside):
        def _on_rollout_end(self):
            buffer = self.model.rollout_buffer
            values = way.policy.predict_values(th.as_tensor(buffer.observations[:, 0])).detach().numpy().ravel()
            rows = []  # the rewards of each whole episode of 200 steps in the rollout of 2,048
            for t in range(2048):
                ends = [i for i in range(t + 1, 2048) if buffer.episode_starts[i, 0]]
                end = ends[0] if ends else 2048
                if end - t > 100:
                    rows.append((sum(0.99**i * r for i, r in enumerate(buffer.rewards[t:end, 0])), values[t]))
            returns, foretold = np.array(rows).T
            asked.append(1.0 - (returns - foretold).var() / returns.var())
            super()._on_rollout_end()

    beside = Kept({"way": way})
    model.learn(3 * 2048, callback=beside)
    assert len(asked) == 3
    np.testing.assert_allclose(beside.explained["way"], asked, atol=1e-5)


def test_a_run_is_parted_and_one_without_long_episodes_is_refused(monkeypatch, capsys):
    with pytest.raises(ValueError, match=f"{LEAST_STATES} states whose episode goes on for 300 steps, got 0"):
        explained_variance("Pendulum-v1", 3, 2048)
    monkeypatch.setattr("critic.LEAST_STEPS", 100)
    monkeypatch.setattr("critic.WAYS", {name: {**WAYS[name]} for name in ("adam", "gauss_newton")})
    found = explained_variance("Pendulum-v1", 3, PARTS * 2048)
    assert {name: len(figures) for name, figures in found.items()} == {"adam": PARTS, "gauss_newton": PARTS}
    print_means({"Pendulum-v1": {"3": found, "4": {name: [0.0] * PARTS for name in found}}})
    assert f"{sum(found['gauss_newton']) / (2 * PARTS):.3f}" in capsys.readouterr().out
