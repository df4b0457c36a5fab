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
    r"update|batch_statistics",
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


def imports(path):
    """Those for typing alone too: they tie modules together as much as any."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def packages(path):
    return {name.split(".")[0] for name in imports(path)}


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
        if floor_of(name) < 5:
            assert not packages(path) & {"rl_zoo3", "sb3_contrib", "matplotlib"}, name


# -- where numbers decide ------------------------------------------------------------------------------

DECIDING = r"numerics\..*|critic\..*|distributions|objectives|steps|trust_region|kl_penalty|policy_problem|update"
NOT_OF_DATA = {
    "numerics/dense.py: has_hooks",
    "numerics/flat_optimizer.py: _have_one_history",
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
    return isinstance(call.func, ast.Attribute) and call.func.attr in ("item", "tolist")


def test_the_places_where_numbers_decide_are_those_of_the_table():
    found = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for module, path in modules()
        if re.fullmatch(DECIDING, module)
        for name, function in functions(ast.parse(path.read_text()))
        if any(makes_a_number_of_a_tensor(call) for call in ast.walk(function) if isinstance(call, ast.Call))
    }
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    table = page.partition("<!-- decisions -->")[2].partition("<!-- /decisions -->")[0]
    assert found - NOT_OF_DATA == set(re.findall(r"^\| `(\S+\.py: [\w.]+)` \|", table, flags=re.MULTILINE))


def test_modules_are_short():
    for name, path in modules():
        assert len(path.read_text().splitlines()) <= 300, name
