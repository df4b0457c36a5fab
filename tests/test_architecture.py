"""Imports point downward, from one layer to those below it (docs/architecture.md)."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch.overrides import TorchFunctionMode

import sb3_trpo_ext
from sb3_trpo_ext import KLPPOExt, NPGExt, TRPOExt

PACKAGE = Path(sb3_trpo_ext.__file__).parent

LAYERS = [
    r"numerics\..*",
    r"checks|distributions|masks|observations|objectives|originals|recurrence|standard_policies|steps",
    r"trust_region|kl_penalty|policy_problem|old_policy|critic|critic\..*|sampling\..*",
    r"update|batch_statistics|sequence_problems",
    r"checkpoints|checkpoints\..*",
    r"algorithms\..*",
    r"compat|zoo\..*|plots|logs|evaluation|testing|zoo|lab\..*|lab",
]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name and name != "__init__" and path.read_text().strip():
            yield name, path


def layer_of(module):
    for height, pattern in enumerate(LAYERS):
        if re.fullmatch(pattern, module) or re.fullmatch(pattern, module + "."):
            return height
    raise AssertionError(f"{module} is in no layer: give it one here and in docs/architecture.md")


def is_module(name):
    place = PACKAGE.parent / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


def imports(path):
    """Those for typing alone too: they tie modules together as much as any."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module and node.level == 0, f"{path}: imports by full names can be read"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {name if is_module(name) else node.module for name in names}
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def packages(path):
    return {name.split(".")[0] for name in imports(path)}


def test_imports_point_downward():
    for name, path in modules():
        for imported in imports(path):
            if imported == "sb3_trpo_ext":
                assert layer_of(name) == len(LAYERS) - 1, f"{name} imports the whole package"
            elif imported.startswith("sb3_trpo_ext."):
                target = imported.removeprefix("sb3_trpo_ext.")
                assert layer_of(target) <= layer_of(name), f"{name} imports {target}, which is above it"


def test_imports_go_round_nowhere():
    """On one floor neither; a package stands for the modules that its ``__init__`` imports."""
    known = dict(modules())
    graph = {name: {other.removeprefix("sb3_trpo_ext.") for other in imports(path)} & known.keys() for name, path in modules()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys() - {name}]:
        for name in leaves:
            del graph[name]
    assert not graph, f"in or behind a circle: {sorted(graph)}"


def test_the_ground_floor_knows_torch_alone():
    for name, path in modules():
        if name.startswith("numerics."):
            assert not packages(path) & {"stable_baselines3", "gymnasium", "sb3_contrib", "rl_zoo3"}, name


def test_training_needs_neither_the_zoo_nor_sb3_contrib():
    for name, path in modules():
        if layer_of(name) < 6:
            assert not packages(path) & {"rl_zoo3", "sb3_contrib", "matplotlib"}, name


# -- where numbers decide ------------------------------------------------------------------------------

DECIDING = (
    r"numerics\..*|critic\..*|distributions|objectives|steps|trust_region|kl_penalty|policy_problem|old_policy|"
    r"update|batch_statistics|sequence_problems"
)
NOT_OF_DATA = {
    "numerics/dense.py: has_hooks",
    "numerics/flat_optimizer.py: _have_one_history",
    "numerics/lstm.py: Segments.blocks",
    "numerics/lstm.py: Segments.sizes",
    "numerics/running_statistics.py: _move",
}
"""Numbers that come from no batch."""


def functions(node, outer=()):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield ".".join([*outer, child.name]), child
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, (*outer, child.name))


def makes_a_number_of_a_tensor(call):
    if isinstance(call.func, ast.Name):
        return call.func.id in ("float", "bool") and not isinstance(call.args[0], ast.Constant)
    return isinstance(call.func, ast.Attribute) and call.func.attr in ("item", "tolist", "equal", "allclose")


def places_of_the_table():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    table = page.partition("<!-- decisions -->")[2].partition("<!-- /decisions -->")[0]
    return set(re.findall(r"^\| `(\S+\.py: [\w.]+)` \|", table, flags=re.MULTILINE))


def test_the_places_where_numbers_decide_are_those_of_the_table():
    found = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for module, path in modules()
        if re.fullmatch(DECIDING, module)
        for name, function in functions(ast.parse(path.read_text()))
        if any(makes_a_number_of_a_tensor(call) for call in ast.walk(function) if isinstance(call, ast.Call))
    }
    # a comparison that a branch is taken by can only be seen when it happens: below
    assert found - NOT_OF_DATA == places_of_the_table() - DECIDING_BY_COMPARISON


DECIDING_BY_COMPARISON = {"update.py: warn_of_randomness"}


class NumbersMade(TorchFunctionMode):
    """Takes down the package's lines that make numbers of tensors, ``if x > 0`` included."""

    ways = frozenset(("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy", "equal", "allclose"))

    def __init__(self):
        super().__init__()
        self.lines = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", None) in self.ways:
            caller = sys._getframe(1)
            self.lines.add((caller.f_code.co_filename, caller.f_lineno))
        return func(*args, **(kwargs or {}))

    def places(self):
        for module, path in modules():
            lines = {line for name, line in self.lines if name == str(path) and re.fullmatch(DECIDING, module)}
            for name, function in functions(ast.parse(path.read_text())) if lines else ():
                if any(function.lineno <= line <= function.end_lineno for line in lines):
                    yield f"{path.relative_to(PACKAGE)}: {name}"


class Normed(FlattenExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations):
        return self.norm(super().forward(observations))


@pytest.mark.parametrize(
    "algorithm, arguments",
    [
        (TRPOExt, {}),
        (TRPOExt, dict(critic="adam", policy_kwargs=dict(features_extractor_class=Normed), chunk_size=50)),
        (NPGExt, dict(critic="gauss_newton", policy_kwargs=dict(features_extractor_class=Normed), fisher="hessian")),
        (KLPPOExt, dict(n_epochs=2, critic="adam")),
    ],
)
def test_an_update_decides_by_numbers_of_the_table(algorithm, arguments):
    model = algorithm("MlpPolicy", "CartPole-v1", n_steps=128, seed=0, device="cpu", **arguments)
    with NumbersMade() as numbers:
        model.learn(256)
    found = set(numbers.places())
    assert len(found) > 3 and found <= places_of_the_table() | NOT_OF_DATA


def test_modules_are_short():
    for name, path in modules():
        assert len(path.read_text().splitlines()) <= 300, name
