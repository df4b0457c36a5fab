"""The page is drawn from what real runs logged, whichever way they logged it."""

import copy
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3.common.logger import configure

from sb3_trpo_ext import TRPOExt
from sb3_trpo_ext.logs import Series, read_runs, read_tensorboard
from sb3_trpo_ext.plots import PANELS, TrainingPage, draw_page, draw_training, main
from sb3_trpo_ext.steps import StepOutcome
from tests.envs import Walk, limited

PNG = b"\x89PNG"


def train(folder, formats, seed=0, callback=None):
    model = TRPOExt("MlpPolicy", limited(Walk()), n_steps=64, device="cpu", target_kl=0.03, seed=seed)
    model.set_logger(configure(str(folder), formats))
    model.learn(256, callback=callback)
    model.logger.close()
    return model


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    for seed in range(3):
        train(folder / str(seed), ["csv"], seed)
    return folder


def axes_by_title(figure):
    return {ax.get_title(): ax for ax in figure.axes}


def labels(ax):
    return ax.get_legend_handles_labels()[1]


def test_a_picture_of_a_tensorboard_run(tmp_path):
    train(tmp_path, ["tensorboard"])
    log = read_tensorboard(tmp_path)
    assert (log["train/kl_divergence_loss"].values <= 0.03 + 1e-6).all()
    np.testing.assert_allclose(log["trust_region/target_kl"].values, 0.03, rtol=1e-6)
    draw_training(tmp_path, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(PNG)


def test_the_page_of_advice_has_every_outcome():
    table = (Path(__file__).parents[1] / "docs" / "diagnostics.md").read_text().partition("## Outcomes")[2]
    words = re.split(r"[|,;\n]", table)
    named = {word.strip() for word in words} | {f"non finite {word.strip()}" for word in words}
    assert {outcome.replace("_", " ") for outcome in StepOutcome} <= named


def test_training_that_went_on_is_one_run(tmp_path):
    model = TRPOExt("MlpPolicy", limited(Walk()), n_steps=64, device="cpu", tensorboard_log=str(tmp_path))
    for _ in range(2):
        model.learn(128, reset_num_timesteps=False)
        model.logger.close()
    (folder,) = tmp_path.iterdir()
    assert len([*folder.iterdir()]) == 2
    train(folder / "newer", ["tensorboard"])
    went_on, newer = read_runs(tmp_path)
    assert went_on["time/fps"].steps.tolist() == newer["time/fps"].steps.tolist() == [64, 128, 192, 256]
    assert not np.array_equal(went_on["train/entropy"].values, newer["train/entropy"].values)


def test_every_panel_shows_what_was_logged(seeds):
    runs = read_runs(seeds)
    axes = axes_by_title(draw_page({"seeds": runs[:1]}))
    assert list(axes) == [panel.title for panel in PANELS]
    assert labels(axes["KL(old ‖ new) against its bound"]) == ["step taken", "bound δ"]
    assert labels(axes["Improvement of the surrogate"]) == ["expected", "actual"]
    assert "accepted" in labels(axes["Outcomes of the updates"])
    assert labels(axes["Where the time went"]) == ["rollout", "policy", "critic"]
    # what is drawn is what was logged
    drawn = axes["Explained variance of the critic"].lines[0].get_xydata()
    np.testing.assert_array_equal(drawn.T, np.array(runs[0]["train/explained_variance"]))


def test_seeds_are_a_median_with_a_band(seeds):
    ax = axes_by_title(draw_page({"seeds": read_runs(seeds)}))["Return"]
    values = np.array([run["rollout/ep_rew_mean"].values for run in read_runs(seeds)])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.median(values, axis=0))
    (band,) = ax.collections
    edges = band.get_paths()[0].vertices[:, 1]
    assert edges.min() == pytest.approx(values.min()) and edges.max() == pytest.approx(values.max())


def series(steps, values):
    return Series(np.array(steps, dtype=float), np.array(values, dtype=float))


def test_an_outcome_is_counted_from_0_in_every_run():
    runs = [{"outcome/accepted": series([1, 2, 3], [1, 2, 3])} for _ in range(2)]
    runs.append({"outcome/accepted": series([1, 2, 3], [1, 1, 2]), "outcome/no_improvement": series([2, 3], [1, 1])})
    ax = axes_by_title(draw_page({"seeds": runs}))["Outcomes of the updates"]
    drawn = {line.get_label(): line.get_xydata().T.tolist() for line in ax.lines}
    assert drawn == {"accepted": [[1, 2, 3], [1, 2, 3]], "no improvement": [[1, 2, 3], [0, 0, 0]]}
    assert [band.get_paths()[0].vertices[:, 1].max() for band in ax.collections] == [3.0, 1.0]


def test_a_single_point_is_seen():
    run = {key: series([64], [1]) for key in ("rollout/ep_rew_mean", "trust_region/target_kl", "train/kl_divergence_loss")}
    drawn = [line for ax in draw_page({"one": [run]}).axes for line in ax.lines]
    assert len(drawn) == 3 and all(line.get_marker() == "." for line in drawn)


def test_a_file_name_that_is_no_picture_is_refused_before_training(tmp_path, seeds, monkeypatch, capsys):
    for name in ("page", "page.xyz"):
        with pytest.raises(ValueError, match=f"picture must be a file name that ends in one of .*png.*{name}"):
            TrainingPage(tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["plots", str(seeds), "--out", str(tmp_path / "page")])
    with pytest.raises(SystemExit):
        main()
    assert "ends in one of" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_two_settings_stand_side_by_side_on_one_scale(seeds):
    runs = read_runs(seeds)
    figure = draw_page({"a": runs[:1], "b": [{"rollout/ep_rew_mean": series([64, 4096], [-1.0, 0.0])}]})
    axes = axes_by_title(figure)
    assert len(axes) == 2 * len(PANELS)
    assert axes["a: Return"].get_ylim() == axes["b: Return"].get_ylim()
    assert axes["a: Return"].get_xlim() == axes["b: Return"].get_xlim()
    # a run of another library logs less, which is said
    assert [text.get_text() for text in axes["b: Where the time went"].texts] == ["not logged"]


def test_the_page_while_training(tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr(TrainingPage, "write", lambda self: pages.append(self.num_timesteps))
    model = train(tmp_path, ["csv"], callback=TrainingPage(tmp_path / "page.png", every=2))
    assert pages == [128, 256, 256]
    assert len(model.logger.output_formats) == 1


def pickled(page):
    return pickle.loads(pickle.dumps(page))


@pytest.mark.parametrize("again", [pickled, copy.deepcopy], ids=["pickle", "copy"])
def test_a_page_that_was_pickled_is_used_as_any_other(tmp_path, monkeypatch, again):
    drawn = []
    monkeypatch.setattr("sb3_trpo_ext.plots.save_page", lambda groups, picture: drawn.append((groups, picture)))
    page = again(TrainingPage(tmp_path / "page.png", every=2))
    train(tmp_path, ["csv"], callback=page)
    assert [(*groups, picture) for groups, picture in drawn] == [
        (f"TRPOExt, {steps} steps", tmp_path / "page.png") for steps in (128, 256, 256)
    ]
    # and after a training: it has what was logged, can write it, and goes on from there
    other = again(page)
    other.write()
    (title, (log,)), = drawn[-1][0].items()  # fmt: skip
    assert title == "TRPOExt, 256 steps" and log["time/iterations"].values.tolist() == [1, 2, 3, 4]
    train(tmp_path, [], callback=other)
    ((log,),) = drawn[-1][0].values()
    assert log["time/iterations"].values.tolist() == [1, 2, 3, 4] * 2
    page.write()
    assert len(next(iter(drawn[-1][0].values()))[0]["time/iterations"].values) == 4


def test_a_page_can_be_pickled_in_the_middle_of_a_training(tmp_path, monkeypatch):
    others = []
    monkeypatch.setattr(TrainingPage, "write", lambda self: others.append(pickled(self)))
    page = TrainingPage(tmp_path / "page.png", every=4)
    model = train(tmp_path, ["csv"], callback=page)
    assert page.model is model and page.locals
    assert not hasattr(others[0], "model") and others[0].locals == {} and others[0].num_timesteps == 256


def test_training_goes_on_after_an_interrupt(tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr(TrainingPage, "write", lambda self: pages.append(self.num_timesteps))
    page = TrainingPage(tmp_path / "page.png", every=1)
    model = TRPOExt("MlpPolicy", limited(Walk()), n_steps=64, device="cpu")
    model.set_logger(configure(str(tmp_path), []))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(model, "train", interrupt)
        model.learn(128, callback=page)
    model.learn(128, callback=page)
    assert pages == [64, 64, 128, 128]


def test_a_second_training_is_drawn_behind_the_first(tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr("sb3_trpo_ext.plots.save_page", lambda groups, picture: pages.append(groups))
    model = TRPOExt("MlpPolicy", limited(Walk()), n_steps=64, device="cpu")
    model.set_logger(configure(str(tmp_path), ["csv", "tensorboard"]))
    page = TrainingPage(tmp_path / "page.png")
    for n_steps in (192, 128):
        model.learn(n_steps, callback=page)
    model.logger.close()
    ((while_training,),) = pages[-1].values()
    (table,) = read_runs(tmp_path)
    for log in (while_training, table, read_tensorboard(tmp_path)):
        assert log["rollout/ep_rew_mean"].steps.tolist() == [64, 128, 192, 256, 320]
        np.testing.assert_allclose(log["rollout/ep_rew_mean"].values, table["rollout/ep_rew_mean"].values)


def test_a_page_that_cannot_be_written_does_not_end_the_training(tmp_path, monkeypatch):
    model = TRPOExt("MlpPolicy", limited(Walk()), n_steps=64, device="cpu")
    model.set_logger(configure(str(tmp_path), []))
    page = TrainingPage(tmp_path / "page.png", every=1)
    attempts = []

    def write(self):
        attempts.append(self)
        raise OSError("no space left")

    monkeypatch.setattr(TrainingPage, "write", write)
    with pytest.warns(UserWarning, match="the page of training was not written: no space left"):
        assert model.learn(128, callback=page) is model
    assert model.num_timesteps == 128 and len(attempts) == 3  # two on the way, one at the end


def interrupt():
    raise KeyboardInterrupt


def test_the_page_at_the_end(tmp_path):
    page = TrainingPage(tmp_path / "new" / "page.png")
    train(tmp_path, [], callback=page)
    page.on_training_end()  # as rl_zoo3 does once more
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.png"]
    assert (tmp_path / "new" / "page.png").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="every"):
        TrainingPage("page.png", every=0)


def test_the_command(seeds, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.png"
    monkeypatch.setattr(sys, "argv", ["plots", str(seeds / "0"), str(seeds), "--out", str(page)])
    main()
    assert page.read_bytes().startswith(PNG) and str(page) in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["plots", "nowhere"])
    with pytest.raises(SystemExit):
        main()
    assert "no progress.csv and no TensorBoard event file below nowhere" in capsys.readouterr().err


def test_a_run_that_has_logged_nothing_yet_does_not_cost_the_page(seeds, tmp_path):
    shutil.copytree(seeds, tmp_path / "seeds")
    (tmp_path / "seeds" / "new").mkdir()
    (tmp_path / "seeds" / "new" / "progress.csv").touch()
    with pytest.warns(UserWarning, match=r"new.progress.csv is empty: this run is skipped"):
        assert len(read_runs(tmp_path / "seeds")) == 3
    # alone, it is an error that says so
    with pytest.raises(ValueError, match="got 0 rows"):
        read_runs(tmp_path / "seeds" / "new")


def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(seeds, tmp_path, monkeypatch):
    train(tmp_path, ["tensorboard"])
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(ImportError, match=r"TensorBoard files need .*'sb3_trpo_ext\[extra\]'"):
        read_runs(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    monkeypatch.setattr(sys, "argv", ["plots", str(seeds)])
    with pytest.raises(SystemExit, match=r"pip install 'sb3_trpo_ext\[plots\]'"):
        main()
