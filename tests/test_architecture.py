"""The direction of the arrows: a room imports only from floors below it (docs/architecture.md)."""

import ast
import re
from pathlib import Path

import sb3_trpo_ext

PACKAGE = Path(sb3_trpo_ext.__file__).parent

FLOORS = [
    r"numerics\..*",
    r"checks|distributions|observations|objectives|originals|standard_policies|steps",
    r"trust_region|kl_penalty|policy_problem|old_policy|critic|critic\..*|sampling\..*",
    r"algorithms\..*",
    r"zoo\..*|plots|logs|testing|zoo|lab\..*|lab",
]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name and name != "__init__" and path.read_text().strip():
            yield name, path


def floor_of(module):
    for height, pattern in enumerate(FLOORS):
        if re.fullmatch(pattern, module) or re.fullmatch(pattern, module + "."):
            return height
    raise AssertionError(f"{module} is on no floor: give it one here and in docs/architecture.md")


def imports(path, at_run_time=True):
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if at_run_time and id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def packages(path):
    return {name.split(".")[0] for name in imports(path, at_run_time=False)}


def test_imports_point_downward():
    for name, path in modules():
        for imported in imports(path):
            if imported.startswith("sb3_trpo_ext."):
                target = imported.removeprefix("sb3_trpo_ext.")
                assert floor_of(target) <= floor_of(name), f"{name} imports {target}, which is above it"


def test_the_ground_floor_knows_torch_alone():
    for name, path in modules():
        if name.startswith("numerics."):
            assert not packages(path) & {"stable_baselines3", "gymnasium", "sb3_contrib", "rl_zoo3"}, name


def test_training_needs_neither_the_zoo_nor_sb3_contrib():
    for name, path in modules():
        if floor_of(name) < 4:
            assert not packages(path) & {"rl_zoo3", "sb3_contrib", "matplotlib"}, name
