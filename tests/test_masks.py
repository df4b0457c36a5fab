"""The maths of masked policies in double precision, against sums over all actions that know nothing of it."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_trpo_ext.masks import MaskReader, NoActionAllowed, call_masked, masked
from sb3_trpo_ext.objectives import EntropyBonus, SinglePathSurrogate
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.standard_policies import fixed_features, mlp_actor
from tests.cases import CASES, dense, enumerate_actions, observations
from tests.envs import is_allowed, random_masks

MASKED = [case for case in CASES if case.space != "box"]
B = 7


def masks_of(policy, seed=0):
    return random_masks(policy.action_space, B, np.random.default_rng(seed))


def masked_log_probs(policy, masks, obs=None):
    """By state: actions that are allowed, all else (with probability 0 by hand), log π given that an action is allowed."""
    for state, mask in zip((observations(B) if obs is None else obs).split(1), masks, strict=True):
        distribution = policy.get_distribution(state)
        actions = [action for action, _ in enumerate_actions(policy, distribution)]
        allowed = [a for a in actions if is_allowed(policy.action_space, mask, a[0])]
        log_probs = th.cat([distribution.log_prob(a) for a in allowed])
        yield allowed, [a for a in actions if not any(th.equal(a, b) for b in allowed)], log_probs - log_probs.logsumexp(0)


def problem_of(policy, masks, layerwise=False, ent_coef=0.0, **kwargs):
    obs, allowed = observations(B), th.as_tensor(masks)
    actions = th.cat([actions[-1] for actions, _, _ in masked_log_probs(policy, masks)])
    mlp = None
    if layerwise:
        mlp = mlp_actor(policy), fixed_features(policy, obs, policy.pi_features_extractor, 3)
        kwargs |= dict(masks=allowed)
    advantages = th.linspace(-1.0, 2.0, B).double()
    objectives = [SinglePathSurrogate(actions, advantages), EntropyBonus(actions, ent_coef)]

    def distribution_of(rows):
        return masked(policy.get_distribution(obs[rows]), allowed[rows])

    return PolicyProblem(distribution_of, B, objectives, actions, policy, mlp=mlp, **kwargs), actions, advantages


@pytest.mark.parametrize("how", ["gauss_newton", "layerwise", "hessian"])
@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_fisher_products_agree_with_the_matrix_of_scores(case, how):
    policy = case.policy()
    if how == "layerwise" and case.learned_extractor:
        pytest.skip("its features are learned")
    masks = masks_of(policy)
    fisher = "gauss_newton" if how == "layerwise" else how
    problem, _, _ = problem_of(policy, masks, layerwise=how == "layerwise", fisher=fisher, chunk_size=4)
    expected = th.zeros(len(problem.parameters), len(problem.parameters)).double()
    for _, _, log_probs in masked_log_probs(policy, masks):
        for log_prob in log_probs:
            score = problem.parameters.flatten(
                th.autograd.grad(log_prob, problem.parameters.tensors, retain_graph=True, allow_unused=True)
            )
            expected += log_prob.detach().exp() * th.outer(score, score) / B
    product = dense(problem.fisher_product(), len(problem.parameters))
    assert (product - expected).norm() <= 1e-6 * expected.norm()
    assert expected.norm() > 0


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_log_probabilities_kl_entropy_and_gradient_are_those_among_the_allowed_actions(case):
    policy = case.policy()
    masks = masks_of(policy)
    ent_coef = 3.0
    problem, _, advantages = problem_of(policy, masks, ent_coef=ent_coef)
    distribution = masked(policy.get_distribution(observations(B)), th.as_tensor(masks))
    before, objective = [], 0.0
    for i, (allowed, others, log_probs) in enumerate(masked_log_probs(policy, masks)):
        for actions, expected in ((allowed, log_probs), (others, None)):
            for k, action in enumerate(actions):
                rows = action.expand(B, *action.shape[1:])
                found = distribution.log_prob(rows)[i]
                if expected is None:
                    assert found.exp() == 0.0
                else:
                    th.testing.assert_close(found, expected[k], rtol=1e-9, atol=1e-12)
        entropy = -(log_probs.exp() * log_probs).sum()
        th.testing.assert_close(distribution.entropy()[i], entropy, rtol=1e-9, atol=1e-12)
        ratio = (log_probs[-1] - log_probs[-1].detach()).exp()
        objective = objective + (ratio * advantages[i] + ent_coef * entropy) / B
        before.append(log_probs.detach())
    value, gradient = problem.gradient()
    assert value == pytest.approx(float(objective.detach()), rel=1e-9)
    th.testing.assert_close(gradient, problem.parameters.gradient(objective), rtol=1e-8, atol=1e-12)
    problem.parameters.write(problem.parameters.read() + 0.3 * th.randn(len(problem.parameters)).double())
    after = [log_probs.detach() for _, _, log_probs in masked_log_probs(policy, masks)]
    kl = np.mean([float((old.exp() * (old - new)).sum()) for old, new in zip(before, after, strict=True)])
    assert problem.evaluate().kl == pytest.approx(kl, rel=1e-8)


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_what_is_not_allowed_gets_no_gradient(case):
    policy = case.policy()
    masks = masks_of(policy, seed=3)
    raw = policy.get_distribution(observations(B))
    wrapped = raw.distribution
    logits = [part.logits for part in (wrapped if isinstance(wrapped, list) else [wrapped])]
    kept = masked(raw, th.as_tensor(masks))
    rows = [actions[0] for actions, _, _ in masked_log_probs(policy, masks)]
    total = (kept.log_prob(th.cat(rows)) + 100.0 * kept.entropy()).sum()
    gradient = th.cat(th.autograd.grad(total, logits), dim=1)
    free = th.as_tensor(masks)
    if isinstance(policy.action_space, spaces.MultiBinary):
        free = free[:, 0::2] & free[:, 1::2]
    assert not gradient[~free].any() and gradient.isfinite().all() and gradient[free].any()
    assert (~free).any()


@pytest.mark.parametrize("space", [case.space for case in MASKED[:3]])
def test_policies_of_sb3_contrib_become_what_ours_are(space):
    """Theirs have -1e8 for what is not allowed, and several categoricals under a name of their own."""
    action_space = next(case for case in MASKED if case.space == space).policy().action_space
    policy = MaskableActorCriticPolicy(spaces.Box(-2.0, 2.0, (3,)), action_space, lambda _: 1e-3)
    obs, masks = observations(B), masks_of(policy)
    theirs = policy.get_distribution(obs, action_masks=masks)
    actions = theirs.get_actions()
    expected, entropy = theirs.log_prob(actions), theirs.entropy()
    ours = masked(policy.get_distribution(obs), th.as_tensor(masks))
    th.testing.assert_close(ours.log_prob(actions), expected)
    th.testing.assert_close(ours.entropy(), entropy)
    assert all(is_allowed(action_space, mask, a) for mask, a in zip(masks, ours.get_actions().numpy(), strict=True))
    _, log_probs, _ = call_masked(policy, "evaluate_actions", th.as_tensor(masks), obs, actions)
    th.testing.assert_close(log_probs, expected)


# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space, mask, words",
    [
        (spaces.Discrete(3), [0, 0, 0], "environment 1 allows none of the 3 choices of Discrete"),
        (spaces.MultiDiscrete([2, 3]), [1, 0, 0, 0, 0], "environment 1 allows none of the 3 choices in dimension 1 of"),
        (spaces.MultiBinary(2), [1, 1, 0, 0], "environment 1 allows none of the 2 choices in dimension 1 of"),
    ],
)
def test_a_mask_that_forbids_everything_is_told_by_environment_and_dimension(space, mask, words):
    good = np.ones(len(mask))
    with pytest.raises(NoActionAllowed, match=words):
        MaskReader(space, "environment")([good, mask])
    with pytest.raises(ValueError, match=r"mask of environment 1 must have \d entries for .*, got 1"):
        MaskReader(space, "environment")([good, [True]])
    read = MaskReader(space, "environment")([good, mask], np.array([False, True]))
    assert read.all() and read.dtype == bool


def test_distributions_that_cannot_be_masked_say_so():
    distribution = DiagGaussianDistribution(2).proba_distribution(th.zeros(1, 2), th.zeros(2))
    with pytest.raises(ValueError, match="DiagGaussianDistribution cannot be masked"):
        masked(distribution, th.ones(1, 2))


def test_a_method_that_makes_its_distribution_elsewhere_cannot_be_masked_from_outside():
    class Aside(ActorCriticPolicy):
        def forward(self, obs, deterministic=False):
            logits = self.action_net(self.mlp_extractor(self.extract_features(obs))[0])
            return logits.argmax(dim=1), self.predict_values(obs), logits[:, 0]

    policy = Aside(spaces.Box(-1.0, 1.0, (3,)), spaces.Discrete(3), lambda _: 1e-3)
    obs, masks = th.zeros(2, 3), th.tensor([[True, False, False], [False, False, True]])
    with pytest.raises(ValueError, match=r"Aside.forward\(\) cannot be masked"):
        call_masked(policy, "forward", masks, obs)
    # the hook is gone, whatever happened
    assert "_get_action_dist_from_latent" not in vars(policy)
    actions, _ = call_masked(policy, "predict", masks, obs.numpy(), deterministic=True)
    assert actions.tolist() == [0, 2]
    assert isinstance(policy.action_net, nn.Linear)
