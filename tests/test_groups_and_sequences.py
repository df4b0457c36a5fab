"""A policy with memory and a group of processes, written against what the package has for both, without either in it."""

import copy
import threading

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_trpo_ext.critic import AdamSettings, CriticProblem, GaussNewtonSettings, fit_adam, fit_gauss_newton
from sb3_trpo_ext.kl_penalty import KLPenaltySettings, kl_penalty_step
from sb3_trpo_ext.numerics.averages import Units
from sb3_trpo_ext.numerics.curvature import AutogradLinearization
from sb3_trpo_ext.numerics.dense import DenseNetwork
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.numerics.running_statistics import take_batch_statistics
from sb3_trpo_ext.objectives import SinglePathSurrogate, center_q_values, normalize_advantages
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.sampling.actor import Acted
from sb3_trpo_ext.sampling.agent import Agent
from sb3_trpo_ext.sampling.single_path import collect_single_path
from sb3_trpo_ext.trust_region import TrustRegionSettings, trust_region_step

E, T, D, A = 3, 30, 4, 2


# -- memory: units that are sequences ----------------------------------------------------------------


class Recurrent(nn.Module):
    """Logits and values from a GRU cell."""

    def __init__(self):
        super().__init__()
        self.cell, self.actor, self.critic = nn.GRUCell(D, 5), nn.Linear(5, A), nn.Linear(5, 1)
        self.double()

    def step(self, observations, starts, memory):
        memory = self.cell(observations, memory * (1.0 - starts)[:, None])
        return memory, CategoricalDistribution(A).proba_distribution(self.actor(memory)), self.critic(memory)

    def over(self, observations, starts):
        """Memories of sequences (n, T, D) that begin without any, (n * T, 5)."""
        memory, found = observations.new_zeros(len(observations), 5), []
        for t in range(observations.shape[1]):
            memory, _, _ = self.step(observations[:, t], starts[:, t], memory)
            found.append(memory)
        return th.stack(found, dim=1).flatten(0, 1)


class RecurrentActor:
    path, knows_values = "recurrent", True

    def __init__(self, net, rollout):
        self.net, self.rollout, self.memory = net, rollout, th.zeros(E, 5).double()

    def prepare(self, n_steps):
        pass

    @th.no_grad()
    def act(self, observation, step, context=None):
        starts = th.as_tensor(self.rollout.episode_starts).double()
        self.memory, distribution, values = self.net.step(th.as_tensor(observation).double(), starts, self.memory)
        actions = distribution.sample()
        return Acted(actions.numpy(), values, distribution.log_prob(actions))


class Kept:
    """A rollout that nobody hears of."""

    def __init__(self, env):
        self.observations, self.episode_starts = env.reset(), np.ones(E, dtype=bool)

    def context(self, observations, idle=None):
        return None

    def begins(self):
        pass

    def stepped(self, found):
        return True

    def goes_on(self, new_obs, dones, infos):
        self.observations, self.episode_starts = new_obs, dones

    def ends(self, found):
        pass


@pytest.fixture(scope="module")
def rollout():
    """A GRU's rollout on CartPole: the network and the buffer's arrays as sequences, (E, T, ·)."""
    th.manual_seed(0)
    env, net = make_vec_env("CartPole-v1", E, seed=0), Recurrent()

    class Policy:
        device, action_space = th.device("cpu"), env.action_space

    agent = Agent(Policy, None, lambda states: th.zeros(len(states), 1), gamma=0.99)
    buffer, kept = RolloutBuffer(T, env.observation_space, env.action_space, "cpu", n_envs=E), Kept(env)
    assert collect_single_path(agent, env, kept, buffer, T, lambda: RecurrentActor(net, kept))
    names = ("observations", "episode_starts", "actions", "log_probs", "returns")
    arrays = (th.as_tensor(getattr(buffer, name).swapaxes(0, 1)).double() for name in names)
    return net, dict(zip(names, arrays, strict=True))


def problems_of(net, arrays, padding=0, **kwargs):
    """The policy's and the critic's problem, sequences being followed by states that count nothing."""

    def padded(x):
        return th.cat([x, th.full((E, padding, *x.shape[2:]), 7.0).double()], dim=1)

    observations, starts = padded(arrays["observations"]), padded(arrays["episode_starts"])
    weights = th.cat([th.ones(E, T), th.zeros(E, padding)], dim=1).flatten()
    length = T + padding
    units = Units(E, length, weights) if padding else Units(E, length)
    actions = padded(arrays["actions"]).flatten().remainder(A).long()
    advantages = th.linspace(-1.0, 1.0, E * T).double().view(E, T)
    advantages = normalize_advantages(padded(advantages).flatten(), units)

    def memories(rows):
        take = units.units_of(rows)
        return net.over(observations[take], starts[take])

    problem = PolicyProblem(
        lambda rows: CategoricalDistribution(A).proba_distribution(net.actor(memories(rows))),
        units,
        [SinglePathSurrogate(actions, advantages)],
        actions,
        net,
        **kwargs,
    )
    parameters = FlatParameters(net.critic.parameters())
    returns = padded(arrays["returns"]).flatten()
    critic = CriticProblem(lambda rows: net.critic(memories(rows)), returns, parameters, units=units)
    return problem, critic


def test_acting_and_learning_see_the_same_memory(rollout):
    net, arrays = rollout
    assert arrays["episode_starts"][:, 1:].any()
    distribution = CategoricalDistribution(A).proba_distribution(
        net.actor(net.over(*map(arrays.get, ("observations", "episode_starts"))))
    )
    log_probs = distribution.log_prob(arrays["actions"].flatten()).view(E, T)
    np.testing.assert_allclose(log_probs.detach(), arrays["log_probs"], atol=1e-6)


@pytest.mark.parametrize("fisher", ["gauss_newton", "hessian", "empirical"])
@pytest.mark.parametrize("kwargs", [{}, dict(chunk_size=T), dict(sub_sampling_factor=2)])
def test_padding_counts_nowhere_and_chunks_keep_sequences_whole(rollout, fisher, kwargs):
    net, arrays = rollout
    plain, _ = problems_of(net, arrays, fisher=fisher, **{k: v for k, v in kwargs.items() if k != "chunk_size"})
    padded, _ = problems_of(net, arrays, padding=3, fisher=fisher, **kwargs)
    v = th.linspace(-1.0, 1.0, len(plain.parameters)).double()
    assert plain.entropy == pytest.approx(padded.entropy, rel=1e-12)
    th.testing.assert_close(plain.gradient()[1], padded.gradient()[1], rtol=1e-10, atol=1e-14)
    th.testing.assert_close(plain.fisher_product()(v), padded.fisher_product()(v), rtol=1e-10, atol=1e-14)
    plain.parameters.write(plain.parameters.read() + 0.1 * v)
    assert plain.evaluate() == pytest.approx(padded.evaluate(), rel=1e-10)
    plain.parameters.write(plain.parameters.read() - 0.1 * v)


def test_the_fisher_matrix_through_the_recurrence_is_the_dense_one(rollout):
    net, arrays = rollout
    problem, _ = problems_of(net, arrays, fisher="gauss_newton")
    product, directions = problem.fisher_product(), th.randn(8, len(problem.parameters)).double()
    observations, starts = arrays["observations"], arrays["episode_starts"]
    names = [name for name, p in net.named_parameters() if p in problem.parameters]
    assert not any(name.startswith("critic") for name in names)

    def log_probs(*tensors):
        parameters = dict(zip([f"net.{name}" for name in names], tensors, strict=True))
        logits = th.func.functional_call(Over(net), parameters, (observations, starts))
        return logits.log_softmax(dim=1)

    jacobians = th.autograd.functional.jacobian(log_probs, tuple(problem.parameters.tensors), vectorize=True)
    J = th.cat([jacobian.flatten(2) for jacobian in jacobians], dim=2)
    p = log_probs(*problem.parameters.tensors).exp().detach()
    # E[∇log π ∇log πᵀ], every action weighed by its probability
    dense = th.einsum("ba,bai,baj->ij", p, J, J) / len(p)
    th.testing.assert_close(th.stack([product(v) for v in directions]), directions @ dense, rtol=1e-8, atol=1e-12)


class Over(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, observations, starts):
        return self.net.actor(self.net.over(observations, starts))


def test_a_step_and_a_fit_through_the_recurrence(rollout):
    net, arrays = rollout
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    problem, critic = problems_of(net, arrays, padding=2)
    report = trust_region_step(problem, TrustRegionSettings(0.01))
    assert report.outcome.value == "accepted" and 0.0 < report.kl <= 0.01
    before = critic.loss()
    fit, _ = fit_gauss_newton(critic, 0.1, GaussNewtonSettings())
    assert fit.loss < before
    net.load_state_dict(kept)


# -- a group: two threads that each hold half of a batch ----------------------------------------------


class Rank:
    """One of several threads that wait for each other at every sum."""

    def __init__(self, number, slots, barrier):
        self.number, self.slots, self.barrier = number, slots, barrier

    def sum(self, shares):
        self.slots[self.number] = shares
        self.barrier.wait(10)
        assert self.slots[0].dtype == self.slots[1].dtype and self.slots[0].shape == self.slots[1].shape
        total = th.stack(self.slots).sum(dim=0)
        self.barrier.wait(10)
        return total


def by_two(work):
    """What two threads return from ``work(rank, number)``."""
    slots, barrier, found = [None, None], threading.Barrier(2), [None, None]

    def run(number):
        try:
            found[number] = work(Rank(number, slots, barrier), number)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result is not None for result in found)
    return found


HALVES = slice(0, 26), slice(26, 41)


def learn(networks, observations, actions, advantages, returns, q_values, **units):
    """θ and φ after a trust-region step and a critic fit, with what became of them."""
    actor, critic = copy.deepcopy(networks)
    batch = Units(len(observations), **units)
    advantages = normalize_advantages(advantages, batch)
    problem = PolicyProblem(
        lambda rows: CategoricalDistribution(A).proba_distribution(actor(observations[rows])),
        batch,
        [SinglePathSurrogate(actions, advantages)],
        actions,
        actor,
        chunk_size=7,
    )
    report = trust_region_step(problem, TrustRegionSettings(0.01))
    mlp = DenseNetwork.read([critic]), observations
    fits = CriticProblem(
        lambda rows: critic(observations[rows]),
        returns,
        FlatParameters(critic.parameters()),
        mlp=mlp,
        chunk_size=7,
        units=batch,
    )
    fit, damping = fit_gauss_newton(fits, 0.1, GaussNewtonSettings())
    # one minibatch, so that the parts of the two are the parts of it
    optimizer = th.optim.Adam([*actor.parameters(), *critic.parameters()], lr=1e-2)
    penalty = kl_penalty_step(problem, optimizer, KLPenaltySettings(1.0, n_epochs=3, batch_size=100, max_grad_norm=0.01))
    for mlp in (fits.mlp, None):
        fits.mlp = mlp
        fit_adam(fits, optimizer, AdamSettings(3, 100, max_grad_norm=0.01))
    assert penalty.outcome.value == "accepted"
    centered = center_q_values(q_values, np.full_like(q_values, 1 / q_values.shape[1]), True, batch.group)
    return problem.parameters.read(), fits.parameters.read(), report, fit, damping, centered


def test_two_that_share_a_batch_do_what_one_does_that_holds_it_all():
    th.manual_seed(0)
    observations, actions = th.randn(41, D).double(), th.randint(A, (41,))
    advantages, returns = th.randn(41).double(), th.randn(41).double()
    q_values = np.random.default_rng(0).normal(size=(41, 3))
    data = observations, actions, advantages, returns, q_values
    networks = [nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, n)).double() for n in (A, 1)]
    alone = learn(networks, *data)
    found = by_two(lambda rank, i: learn(networks, *(part[HALVES[i]] for part in data), group=rank))
    for theta, phi, report, fit, damping, _ in found:
        th.testing.assert_close(theta, alone[0], rtol=1e-12, atol=1e-14)
        th.testing.assert_close(phi, alone[1], rtol=1e-10, atol=1e-12)
        assert report.cg_iterations == alone[2].cg_iterations and report.backtracks == alone[2].backtracks
        assert report.kl == pytest.approx(alone[2].kl, rel=1e-10)
        assert (fit.loss, damping) == pytest.approx((alone[3].loss, alone[4]), rel=1e-10)
    assert th.equal(found[0][0], found[1][0]) and th.equal(found[0][1], found[1][1])
    np.testing.assert_allclose(np.concatenate([result[5] for result in found]), alone[5], rtol=1e-12)


def test_what_one_of_two_meets_is_met_by_both():
    th.manual_seed(0)
    observations, actions = th.randn(41, D).double(), th.randint(A, (41,))
    actor = nn.Linear(D, A).double()

    def work(rank, number):
        net, started = copy.deepcopy(actor), []

        def distribution_of(rows):
            if number == 1 and started:
                raise ValueError("NaN, as torch's distributions say")
            return CategoricalDistribution(A).proba_distribution(net(observations[HALVES[number]][rows]))

        here = actions[HALVES[number]]
        surrogate = SinglePathSurrogate(here, observations[HALVES[number], 0])
        problem = PolicyProblem(distribution_of, Units(len(here), group=rank), [surrogate], here, net)
        minibatches = problem.minibatches(100)
        started.append(True)
        problem.minibatches = lambda batch_size: minibatches
        problem.gradient = lambda: (0.0, th.ones(len(problem.parameters)).double())
        optimizer = th.optim.Adam(net.parameters())
        return problem.evaluate(), kl_penalty_step(problem, optimizer, KLPenaltySettings(1.0)).outcome.value

    for evaluation, outcome in by_two(work):
        assert np.isnan(evaluation).all() and outcome == "non_finite_step"


def test_shares_that_are_not_alike_make_as_many_minibatches():
    th.manual_seed(0)
    parts = by_two(lambda rank, i: Units((20, 3)[i], 2, group=rank).partition(8))
    assert [len(part) for part in parts] == [3, 3]
    for number, count in enumerate((20, 3)):
        assert sorted(th.cat(parts[number]).tolist()) == list(range(2 * count))


def test_parameters_that_anybody_reaches_are_everybodys():
    net = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)])
    found = by_two(lambda rank, i: FlatParameters.reached_by_any([(net[i](th.ones(1, 1)),)], net, rank))
    for parameters in found:
        assert all(a is b for a, b in zip(parameters.tensors, list(net.parameters())[:4], strict=True))


@pytest.mark.parametrize("dimensions", [(), (5,)])
def test_running_statistics_are_everybodys_and_without_padding(dimensions):
    th.manual_seed(0)
    layer = nn.BatchNorm1d(3)
    x = th.randn(41, 3, *dimensions) + 2.0

    def statistics(rows, units):
        own = copy.deepcopy(layer)
        take_batch_statistics([own], lambda chunk: own.eval()(rows[chunk]), units.chunks(10), units)
        return own.running_mean, own.running_var

    alone = statistics(x, Units(41))
    padded = th.cat([x, th.full((9, 3, *dimensions), 100.0)])
    th.testing.assert_close(statistics(padded, Units(50, weights=(th.arange(50) < 41).float())), alone)
    for found in by_two(lambda rank, i: statistics(x[HALVES[i]], Units(len(x[HALVES[i]]), group=rank))):
        th.testing.assert_close(found, alone)
    assert not th.allclose(statistics(x[:26], Units(26))[0], alone[0])


def test_a_fit_of_the_critic_is_without_padding():
    th.manual_seed(0)
    critic = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    observations, parameters = th.randn(50, D).double(), FlatParameters(critic.parameters())
    weights = th.rand(50).double() * (th.arange(50) < 41)

    def seen(n, weights):
        mlp, units = (DenseNetwork.read([critic]), observations[:n]), Units(n, weights=weights)
        returns = th.linspace(-1.0, 1.0, 50).double()[:n]
        problem = CriticProblem(None, returns, parameters, mlp=mlp, units=units, chunk_size=11)
        descent, curvature, scales = problem.linearize()
        return problem.loss(), *problem.sizes(), descent, curvature(th.ones(len(parameters)).double()), scales

    th.testing.assert_close(seen(50, weights), seen(41, weights[:41]))
    weighted = AutogradLinearization([critic(observations)], parameters).block_squares(weights)
    scaled = AutogradLinearization([critic(observations) * weights.sqrt()[:, None]], parameters).block_squares()
    th.testing.assert_close(weighted, scaled)
