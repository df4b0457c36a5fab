"""Each script of examples/ runs, on a small budget, and is listed."""

import importlib.util
import sys
from pathlib import Path

import pytest

import sb3_trpo_ext

EXAMPLES = Path(sb3_trpo_ext.__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
BUDGETS = {
    "optuna_zoo": dict(total_timesteps=256, n_trials=1),
    "several_processes": dict(total_timesteps=256, n_envs=2),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_runs(script, tmp_path, monkeypatch, capfd):
    if "onnx" in script.stem:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, script.stem, module)
    spec.loader.exec_module(module)
    module.main(**BUDGETS.get(script.stem, dict(total_timesteps=256)))
    assert capfd.readouterr().out.strip()


def test_the_pages_list_them():
    page, site = (EXAMPLES / "README.md").read_text(), (EXAMPLES.parent / "docs" / "examples.md").read_text()
    assert SCRIPTS
    for script in SCRIPTS:
        assert f"]({script.name})" in page and f"../examples/{script.name}\n" in site
