import pytest
import torch as th
from stable_baselines3.common.distributions import DiagGaussianDistribution, kl_divergence
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.distributions import Laplace, StudentT

from sb3_trpo_ext import KLPPOExt, NPGExt, TRPOExt, distributions
from sb3_trpo_ext.distributions import GaussianFamily, GenericFamily, ParametricFamily, family_of, register_distribution_family
from sb3_trpo_ext.policy_problem import PolicyProblem
from tests.cases import CASES, STANDARD, enumerate_actions, observations
from tests.envs import Walk


def two_policies(case, obs):
    old, new = case.policy(seed=0), case.policy(seed=5)
    with th.no_grad():
        return old, old.get_distribution(obs), new.get_distribution(obs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kl_agrees_with_torch_and_sums_over_dimensions(case):
    _, old, new = two_policies(case, observations(7))
    family = family_of(old)
    expected = kl_divergence(old, new)
    expected = expected.sum(dim=1) if expected.ndim > 1 else expected
    assert expected.shape == (7,) and (expected > 1e-3).all()
    th.testing.assert_close(family.kl(family.freeze(old), new), expected)
    th.testing.assert_close(GenericFamily().kl(GenericFamily().freeze(old), new), expected)


@pytest.mark.parametrize("case", [c for c in CASES if "gaussian" not in c.name and "gsde" not in c.name], ids=lambda c: c.name)
def test_kl_is_the_expected_log_ratio_under_the_old_policy(case):
    obs = observations(1)
    policy, old, new = two_policies(case, obs)
    family = family_of(old)
    expected = sum(p * (old.log_prob(a) - new.log_prob(a)) for a, p in enumerate_actions(policy, old))
    th.testing.assert_close(family.kl(family.freeze(old), new), expected)


@pytest.mark.parametrize("dtype", [th.float64, th.float32])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kl_with_itself_is_exactly_zero(case, dtype):
    policy = case.policy(dtype=dtype)
    with th.no_grad():
        old, new = (policy.get_distribution(observations(50)) for _ in range(2))
        family = family_of(old)
        assert not family.kl(family.freeze(old), new).any()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_metric_is_the_hessian_of_the_kl_in_distribution_parameters(case):
    with th.no_grad():
        distribution = case.policy().get_distribution(observations(1))
    family = family_of(distribution)
    assert isinstance(family, ParametricFamily)
    at = family.freeze(distribution)
    sizes = [part.shape[1] for part in at]

    def kl(flat):
        return family.kl_of(at, tuple(part[None] for part in flat.split(sizes))).sum()

    hessian = th.autograd.functional.hessian(kl, th.cat(at, dim=1)[0])
    tangent = th.randn(sum(sizes), dtype=th.float64)
    product = family.metric(at, tuple(part[None] for part in tangent.split(sizes)))
    th.testing.assert_close(th.cat(product, dim=1)[0], hessian @ tangent)


@pytest.mark.parametrize(
    "name, dimensions", [("gaussian", 2), ("gsde", 2), ("bernoulli", 3), ("categorical", 1), ("multi_categorical", 1)]
)
def test_mean_reduction_divides_where_sb3_contrib_averages(name, dimensions):
    case = next(case for case in CASES if case.name == name)
    with th.no_grad():
        old = case.policy().get_distribution(observations(2))
    family = family_of(old)
    assert family.averaged_dimensions(family.freeze(old)) == dimensions


def test_masked_choices_have_no_part_in_the_kl():
    family = distributions.CategoricalFamily([3])
    old, new = th.tensor([[0.5, -th.inf, 1.0]]), th.tensor([[0.1, -th.inf, 1.0]])
    expected = family.__class__([2]).kl_of((old[:, [0, 2]],), (new[:, [0, 2]],))
    th.testing.assert_close(family.kl_of((old,), (new,)), expected)


class LaplaceDistribution(DiagGaussianDistribution):
    """A family that the package has no entry for."""

    def proba_distribution(self, mean_actions, log_std):
        self.distribution = Laplace(mean_actions, th.ones_like(mean_actions) * log_std.exp())
        return self


def laplace_policy():
    policy = next(case for case in CASES if case.name == "gaussian").policy()
    policy.action_dist = LaplaceDistribution(2)
    return policy


class MeanOfActions:
    """An objective for problems that only their curvature is asked of."""

    states = None

    def set_old(self, old, rows):
        pass

    def terms(self, distribution, rows):
        mode = distribution.mode().double()
        return mode.reshape(len(mode), -1).sum(dim=1)


def problem_of(policy, obs, fisher):
    actions = th.zeros(len(obs), 2, dtype=th.float64)
    distribution_of = lambda rows: policy.get_distribution(obs[rows])  # noqa: E731
    return PolicyProblem(distribution_of, len(obs), [MeanOfActions()], actions, policy, fisher=fisher)


def test_a_family_without_an_entry_works_through_the_hessian():
    policy, obs = laplace_policy(), observations(5)
    problem = problem_of(policy, obs, "auto")
    assert problem.fisher == "hessian"
    assert {id(p) for p in problem.parameters.tensors} == {
        id(p) for name, p in policy.named_parameters() if "value" not in name
    }
    v = th.randn(len(problem.parameters), dtype=th.float64)
    assert problem.fisher_product()(v).any()
    with pytest.raises(ValueError, match="register_distribution_family"):
        problem_of(policy, obs, "gauss_newton")


def test_mean_reduction_of_a_family_without_an_entry():
    with th.no_grad():
        old = laplace_policy().get_distribution(observations(3))
    assert GenericFamily().averaged_dimensions(GenericFamily().freeze(old)) == 2


def test_a_distribution_without_an_entropy_trains_all_the_same():
    class WithoutEntropy(LaplaceDistribution):
        def entropy(self):
            raise NotImplementedError

    policy = laplace_policy()
    policy.action_dist = WithoutEntropy(2)
    assert problem_of(policy, observations(3), "auto").entropy > 0


def test_an_entry_can_be_added(monkeypatch):
    monkeypatch.setattr(distributions, "_FAMILIES", dict(distributions._FAMILIES))

    class Registered(GaussianFamily):
        def parameters(self, distribution):
            return distribution.distribution.loc, distribution.distribution.scale.log()

    register_distribution_family(LaplaceDistribution, lambda _: Registered())
    assert problem_of(laplace_policy(), observations(3), "auto").fisher == "gauss_newton"


def test_old_distributions_survive_the_policy_reusing_its_object():
    policy = next(case for case in CASES if case.name == "gaussian").policy()
    with th.no_grad():
        old = policy.get_distribution(observations(3))
        kept = GenericFamily().freeze(old)
        new = policy.get_distribution(observations(3, seed=9))
    assert old is new
    assert GenericFamily().kl(kept, new).min() > 0


class Free(nn.Module):
    """Outputs that do not depend on the state: views of their parameter."""

    def __init__(self, size):
        super().__init__()
        self.theta = nn.Parameter(th.zeros(size, dtype=th.float64))

    def forward(self, latent):
        return self.theta.expand(len(latent), -1)


class Located:
    """What a family of a user's own may freeze."""

    def __init__(self, loc):
        self.loc = loc


class FamilyOfUser(GaussianFamily):
    """Freezes an object of its own, or what NumPy sees of θ."""

    def __init__(self, frozen):
        self.frozen = frozen

    def parameters(self, distribution):
        return distribution.distribution.loc, distribution.distribution.scale.log()

    def freeze(self, distribution):
        loc = distribution.distribution.loc
        return {"object": Located(loc), "array": loc.numpy(), "dict": {"loc": [loc]}, "itself": distribution}[self.frozen]

    def kl(self, old, new):
        loc = {
            "object": lambda: old.loc,
            "array": lambda: th.as_tensor(old),
            "dict": lambda: old["loc"][0],
            "itself": lambda: old.distribution.loc,
        }[self.frozen]()
        return (new.distribution.loc - loc).square().sum(dim=1)


@pytest.mark.parametrize("kind", [case.name for case in STANDARD] + ["laplace", "object", "array", "dict", "itself"])
def test_what_is_kept_of_the_old_policy_does_not_move_with_outputs_that_are_views_of_parameters(kind, monkeypatch):
    monkeypatch.setattr(distributions, "_FAMILIES", dict(distributions._FAMILIES))
    standard = next((case for case in STANDARD if case.name == kind), None)
    policy = laplace_policy() if standard is None else standard.policy()
    if standard is None and kind != "laplace":
        register_distribution_family(LaplaceDistribution, lambda _: FamilyOfUser(kind))
    policy.action_net = Free(policy.action_net.out_features)
    obs = observations(3)
    actions = policy.get_distribution(obs).mode().detach()
    problem = PolicyProblem(
        lambda rows: policy.get_distribution(obs[rows]), 3, [MeanOfActions()], actions, policy, fisher="hessian", chunk_size=2
    )
    assert problem.evaluate().kl == 0.0
    policy.action_net.theta.data += th.linspace(0.1, 0.4, len(policy.action_net.theta))
    moved = problem.evaluate().kl
    assert moved > 1e-4
    if standard is not None:
        fresh = standard.policy()
        fresh.action_net = Free(fresh.action_net.out_features)
        with th.no_grad():
            old, new = fresh.get_distribution(obs), policy.get_distribution(obs)
            assert moved == pytest.approx(float(family_of(old).kl(family_of(old).freeze(old), new).mean()))


def test_what_cannot_be_kept_apart_from_the_parameters_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(distributions, "_FAMILIES", dict(distributions._FAMILIES))

    class Stubborn(FamilyOfUser):
        def freeze(self, distribution):
            return (loc for loc in distribution.distribution.loc)

    register_distribution_family(LaplaceDistribution, lambda _: Stubborn("object"))
    with pytest.raises(ValueError, match=r"Stubborn\.freeze\(\) must give tensors.*generator"):
        problem_of(laplace_policy(), observations(3), "hessian")


class StudentDistribution(DiagGaussianDistribution):
    """Nobody knows its KL."""

    def proba_distribution(self, mean_actions, log_std):
        self.distribution = StudentT(3.0, mean_actions, th.ones_like(mean_actions) * log_std.exp())
        return self


class StudentPolicy(ActorCriticPolicy):
    def _build(self, lr_schedule):
        self.action_dist = StudentDistribution(2)
        super()._build(lr_schedule)


@pytest.mark.parametrize("algorithm", [TRPOExt, NPGExt, KLPPOExt])
def test_a_distribution_whose_kl_nobody_knows_is_refused_at_construction(algorithm, monkeypatch):
    monkeypatch.setattr(distributions, "_FAMILIES", dict(distributions._FAMILIES))
    with pytest.raises(ValueError, match=r"StudentDistribution of StudentT.*register_distribution_family"):
        algorithm(StudentPolicy, Walk(), n_steps=64, device="cpu")
    register_distribution_family(StudentDistribution, lambda _: FamilyOfUser("dict"))
    algorithm(StudentPolicy, Walk(), n_steps=64, device="cpu")


def test_a_policy_that_cannot_be_asked_at_construction_says_so_at_its_first_update():
    class Later(StudentPolicy):
        def get_distribution(self, obs):
            if not hasattr(self, "ready"):
                raise AttributeError("context")
            return super().get_distribution(obs)

    model = TRPOExt(Later, Walk(), n_steps=8, device="cpu")
    model.policy.ready = True
    with pytest.raises(ValueError, match="register_distribution_family"):
        model.learn(8)


def test_asking_for_the_distribution_at_construction_leaves_no_trace():
    class LaplacePolicy(ActorCriticPolicy):
        def _build(self, lr_schedule):
            self.action_dist = LaplaceDistribution(2)
            super()._build(lr_schedule)

    numbers = []
    for policy in (ActorCriticPolicy, LaplacePolicy):
        TRPOExt(policy, Walk(), n_steps=8, seed=3, device="cpu")
        numbers.append(th.rand(()))
    assert numbers[0] == numbers[1]
