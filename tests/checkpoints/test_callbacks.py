"""Other callbacks go on where they stood, wherever Checkpoints stands among them; logs hold each step once."""

import csv
import json

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_trpo_ext import Checkpoints, SnapshotWrapper
from sb3_trpo_ext.checkpoints.callbacks import callbacks_in
from sb3_trpo_ext.checkpoints.logs import continue_tensorboards, tensorboards
from sb3_trpo_ext.plots import TrainingPage
from tests.checkpoints.runs import N_STEPS, assert_equal_models, cartpole, learn, make_model, scramble, train

STEPS = 8 * 2 * N_STEPS
KILLS = (3 * 2 * N_STEPS - 5, 6 * 2 * N_STEPS - 5)


class Counting(BaseCallback):
    """A user's, with plain attributes."""

    def __init__(self, threshold=10):
        super().__init__()
        self.threshold = threshold
        self.dones, self.seen = 0, []

    def _on_training_start(self):
        self.dones, self.seen = 0, []

    def _on_step(self):
        self.dones += int(self.locals["dones"].sum())
        if self.dones > self.threshold:
            self.seen.append((self.num_timesteps, self.threshold))
            self.threshold *= 2
        return True


class WithMethods(BaseCallback):
    """A user's, with something that is no plain data."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)
        self.drawn = []

    def get_state(self):
        return {"generator": self.generator.bit_generator.state, "drawn": self.drawn}

    def set_state(self, state):
        self.generator.bit_generator.state = state["generator"]
        self.drawn = state["drawn"]

    def _on_step(self):
        self.drawn.append(self.generator.random())
        return True


def state(callback):
    of_sb3 = "n_calls num_timesteps best_mean_reward last_mean_reward n_episodes no_improvement_evals last_time_trigger"
    more_of_sb3 = "last_best_mean_reward evaluations_results evaluations_timesteps evaluations_length"
    names = f"{of_sb3} {more_of_sb3} dones seen threshold drawn".split()
    return {name: getattr(callback, name) for name in names if hasattr(callback, name)}


def all_of_them(out, first):
    evaluate = EvalCallback(
        make_vec_env("CartPole-v1", 1, seed=7),
        callback_on_new_best=Counting(),
        callback_after_eval=StopTrainingOnNoModelImprovement(100, min_evals=1),
        eval_freq=50,
        n_eval_episodes=2,
        log_path=str(out),
        best_model_save_path=str(out / "best"),
        verbose=0,
    )
    evaluate.callback_on_new_best = None
    ours = Checkpoints(out / "checkpoints", every=1, exact=True)
    inner = CallbackList([Counting(), WithMethods(), EveryNTimesteps(70, Counting(3))])
    rest = [evaluate, inner, StopTrainingOnMaxEpisodes(10**6), CheckpointCallback(60, str(out / "models"))]
    return [ours, *rest] if first else [*rest, CallbackList([ours])]


@pytest.mark.parametrize("first", [True, False])
def test_callbacks_go_on(tmp_path, first):
    def script(out, kill_at=None):
        scramble()
        model, callbacks = make_model(), all_of_them(out, first)
        learn(model, STEPS, callbacks, kill_at)
        root = CallbackList(callbacks)
        return model, [(type(each).__name__, state(each)) for each in callbacks_in(root) if not isinstance(each, CallbackList)]

    whole, expected = script(tmp_path / "whole")
    for at in KILLS:
        script(tmp_path / "killed", at)
    resumed, found = script(tmp_path / "killed")
    assert_equal_models(whole, resumed)
    assert [item for item in found if item[0] != "Interrupt"] == expected
    one, other = (np.load(tmp_path / name / "evaluations.npz") for name in ("whole", "killed"))
    assert sorted(one) == sorted(other) and all(np.array_equal(one[name], other[name]) for name in one)
    models = [sorted(path.name for path in (tmp_path / name / "models").iterdir()) for name in ("whole", "killed")]
    assert models[0] == models[1] != []


def test_evaluations_of_what_did_not_happen_are_gone(tmp_path):
    def script(kill_at=None):
        model = make_model()
        evaluate = EvalCallback(cartpole(1), eval_freq=40, n_eval_episodes=1, log_path=str(tmp_path), verbose=0)
        learn(model, STEPS, [evaluate, Checkpoints(tmp_path / "checkpoints", every=3)], kill_at)

    script(3 * 2 * N_STEPS + 2 * N_STEPS + 40)
    late = list(np.load(tmp_path / "evaluations.npz")["timesteps"])
    script(3 * 2 * N_STEPS + 2)
    assert list(np.load(tmp_path / "evaluations.npz")["timesteps"]) == [at for at in late if at <= 3 * 2 * N_STEPS] != late


def test_the_scripts_arguments_of_callbacks_hold_unless_they_have_changed(tmp_path):
    first, second = Counting(threshold=10**6), Counting(threshold=5)
    learn(make_model(), STEPS, [first, Checkpoints(tmp_path, every=1)], KILLS[0])
    assert first.dones > 0 and first.threshold == 10**6
    learn(make_model(), STEPS, [second, Checkpoints(tmp_path, every=1)], KILLS[0] + 1)
    assert second.threshold < 10**6


def test_a_callback_whose_state_is_no_plain_data(tmp_path):
    class Odd(BaseCallback):
        def __init__(self):
            super().__init__()
            self.file = open("/dev/null")  # noqa: SIM115

        def _on_step(self):
            return True

    odd = Odd()
    with pytest.raises(ValueError, match=r"Odd\.file is not plain data \(give Odd get_state"):
        make_model().learn(10, [odd, Checkpoints(tmp_path / "exact", exact=True)])
    learn(make_model(), STEPS, [odd, Checkpoints(tmp_path / "run")], KILLS[0])
    with pytest.warns(UserWarning, match=r"not bit for bit.*Odd\.file is not plain data"):
        learn(make_model(), 10, [odd, Checkpoints(tmp_path / "run")])
    odd.file.close()


def test_a_run_that_a_callback_ends_ends_where_it_did(tmp_path):
    def script(folder, kill_at=None):
        return train(folder, 10**6, callbacks=[lambda: StopTrainingOnMaxEpisodes(5)], kill_at=kill_at)[0]

    whole = script(tmp_path / "whole")
    script(tmp_path / "killed", whole.num_timesteps - 20)
    assert_equal_models(whole, script(tmp_path / "killed"))
    assert_equal_models(whole, script(tmp_path / "killed"))


def test_one_is_enough(tmp_path):
    with pytest.raises(ValueError, match="one Checkpoints"):
        make_model().learn(10, [Checkpoints(tmp_path / "a"), Checkpoints(tmp_path / "b")])


def test_progress_bars_and_pages_go_on(tmp_path):
    def script(kill_at=None):
        bar, page = ProgressBarCallback(), TrainingPage(tmp_path / "page.png", every=1000)
        learn(make_model(), STEPS, [bar, page, Checkpoints(tmp_path / "run", every=1)], kill_at)
        return bar.pbar, page

    bar, _ = script(KILLS[0])
    bar.close()
    bar, page = script()
    assert bar.n == STEPS
    assert len(page._recorder.entries) == STEPS // (2 * N_STEPS)


# -- logs --------------------------------------------------------------------------------------------------


def rows_of(path, without=("time/fps", "time/time_elapsed")):
    """Of progress.csv; the order of columns is that of a set."""
    with path.open() as file:
        return [
            {key: value for key, value in row.items() if value and key not in without and not key.endswith("_seconds")}
            for row in csv.DictReader(file)
        ]


def json_rows(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/") or "steps" in k} for row in rows]


def monitor_rows(path):
    head, *rows = path.read_text().splitlines()
    assert "t_start" in json.loads(head[1:])
    times = [float(row.rsplit(",", 1)[1]) for row in rows[1:]]
    assert times == sorted(times)
    return [row.rsplit(",", 1)[0] for row in rows]


def scalars(folder):
    events, found = EventAccumulator(str(folder)).Reload(), {}
    for name in events.Tags()["scalars"]:
        if not name.startswith("time/"):
            found[name] = [(event.step, event.value) for event in events.Scalars(name)]
    return found


def test_event_files_are_read_in_the_order_in_which_they_were_written(tmp_path):
    logger = configure(str(tmp_path), ["tensorboard"])
    states, names = tensorboards(logger), []
    for _ in range(2):
        continue_tensorboards(logger, states)
        states = tensorboards(logger)
        names.append(max(states[0]["files"]))
    logger.close()
    seconds = [int(name.split(".")[3]) for name in names]
    assert seconds[0] < seconds[1]


class NewColumn(BaseCallback):
    """Makes the table grow a column late, so that the file is written anew."""

    def _on_step(self):
        if self.num_timesteps > STEPS // 2:
            self.logger.record("late/column", self.num_timesteps)
        return True


ENVIRONMENTS = {
    "Monitor": lambda out: cartpole(monitor_dir=str(out)),
    "Monitor in workers": lambda out: cartpole(
        monitor_dir=str(out), vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}
    ),
    "VecMonitor": lambda out: VecMonitor(
        DummyVecEnv([lambda: SnapshotWrapper(gym.make("CartPole-v1"))] * 2), str(out / "0.monitor.csv")
    ),
    "Monitor, not restorable": lambda out: cartpole(monitor_dir=str(out), wrapped=False),
}


@pytest.mark.parametrize("make_env", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
@pytest.mark.filterwarnings("ignore:from here on")
def test_logs_hold_each_step_once(tmp_path, make_env, request):
    def script(out, kill_at=None):
        scramble()
        env = make_env(out)
        model = make_model(env)
        model.set_logger(configure(str(out / "log"), ["csv", "json", "log", "tensorboard"]))
        learn(model, STEPS, [NewColumn(), Checkpoints(out / "checkpoints", every=2)], kill_at)
        env.close()
        model.logger.close()

    script(tmp_path / "whole")
    for at in KILLS:
        script(tmp_path / "killed", at)
    script(tmp_path / "killed")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for path in sorted(whole.glob("*.monitor.csv")):
        assert len(monitor_rows(path)) > 3
    steps = [row["time/total_timesteps"] for row in rows_of(killed / "log/progress.csv")]
    assert steps == [str(2 * N_STEPS * i) for i in range(1, 9)]
    assert (killed / "log/log.txt").read_text().count("total_timesteps") == 8
    if "not restorable" in request.node.name:
        return
    for name in sorted(path.name for path in whole.glob("*.monitor.csv")):
        assert monitor_rows(whole / name) == monitor_rows(killed / name)
    assert rows_of(whole / "log/progress.csv") == rows_of(killed / "log/progress.csv")
    assert json_rows(whole / "log/progress.json") == json_rows(killed / "log/progress.json")
    assert scalars(whole / "log") == scalars(killed / "log")


def test_tensorboard_goes_on_in_the_folder_of_the_run(tmp_path):
    def script(out, kill_at=None):
        model = make_model(tensorboard_log=str(out / "tensorboard"))
        learn(model, STEPS, [Checkpoints(out / "checkpoints", every=2)], kill_at)
        return model

    script(tmp_path / "whole")
    for at in KILLS:
        script(tmp_path / "killed", at)
    (tmp_path / "killed/tensorboard/TRPOExt_2").mkdir()  # another run's, of the same folder
    model = script(tmp_path / "killed")
    folders = sorted(path.name for path in (tmp_path / "killed/tensorboard").iterdir())
    assert folders == ["TRPOExt_1", "TRPOExt_2"] and not any((tmp_path / "killed/tensorboard/TRPOExt_2").iterdir())
    assert model.logger.dir == str(tmp_path / "killed/tensorboard/TRPOExt_1")
    assert scalars(tmp_path / "whole/tensorboard/TRPOExt_1") == scalars(tmp_path / "killed/tensorboard/TRPOExt_1")
