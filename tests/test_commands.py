"""The commands of the package without its extras: one line that says what to install, no traceback."""

import sys

import pytest

import sb3_trpo_ext.lab.__main__ as lab
import sb3_trpo_ext.plots as plots
import sb3_trpo_ext.zoo.__main__ as zoo
import sb3_trpo_ext.zoo.demo as demo


@pytest.mark.parametrize(
    ("main", "arguments", "missing", "extra"),
    [
        (zoo.main, ["train", "--algo", "trpo_ext"], "rl_zoo3", "zoo"),
        (demo.main, [], "rl_zoo3", "zoo"),
        (plots.main, ["."], "matplotlib.backend_bases", "plots"),
        (lab.main, ["--small"], "matplotlib.figure", "plots"),
    ],
    ids=["zoo", "demo", "plots", "lab"],
)
def test_without_its_extra_it_says_what_to_install(main, arguments, missing, extra, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    message = str(end.value)
    assert message.count("\n") == 0 and message.endswith(f"pip install 'sb3_trpo_ext[{extra}]'")


@pytest.mark.parametrize("main", [zoo.main, demo.main, plots.main, lab.main], ids=["zoo", "demo", "plots", "lab"])
def test_help_needs_no_extra(main, monkeypatch, capsys):
    for missing in ("rl_zoo3", "matplotlib.backend_bases", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
    assert "usage: " in capsys.readouterr().out
