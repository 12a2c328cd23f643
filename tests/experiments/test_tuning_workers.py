"""Workers of a search: kills, resumption, pruning, storages that cannot be used."""

import contextlib
import json
import math
import pathlib
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

import kfac_jax_lite
from experiments.errors import RunFolderError
from experiments.main import parse
from experiments.runfolder import locked
from experiments.tuning import worker
from experiments.tuning.store import (
    Claims,
    StorageError,
    open_storage,
    workers_folder,
    working,
)
from experiments.tuning.trials import Program, make_problem
from tests.experiments.tuning import OPTIONS, records, results, tiny
from tests.helpers import cases

ROOT = pathlib.Path(kfac_jax_lite.__file__).parents[1]


class KilledError(Exception):
    """Stands for the end of a process."""


def claims_of(config):
    return Claims(config, make_problem(config).identity())


@pytest.fixture(autouse=True)
def quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.mark.parametrize(
    ("told", "at", "lost"),
    # Of batches of three: trials that came out of the queue or were claimed, but not
    # told. The first one waits in the queue from the beginning.
    cases(
        [(False, 0, 1), (False, 2, 2), (False, 4, 1), (True, 0, 3), (True, 4, 2)],
        [(False, 2, 2), (True, 4, 2)],
    ),
)
def test_resumed_equals_uninterrupted(tmp_path, console, monkeypatch, told, at, lost):
    """Killed while it asks for a batch, or when it has told a part of it."""
    whole = tiny(tmp_path / "whole", trials=9)
    worker.search(whole, console)

    cut = tiny(tmp_path / "cut", trials=9)
    with monkeypatch.context() as patch:
        # A trial is signed between its drawing and its claim.
        owner, name = (worker.Lane, "tell") if told else (Claims, "sign")
        original, calls = getattr(owner, name), []

        def limited(*args):
            if len(calls) == at:
                raise KilledError
            calls.append(1)
            return original(*args)

        patch.setattr(owner, name, limited)
        with pytest.raises(KilledError):
            worker.search(cut, console)
    worker.search(cut, console)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert len(results(tmp_path / "cut")) == 9
    again = [r["number"] for r in records(tmp_path / "cut") if r["retry_of"]]
    assert len(again) == lost


def test_searches_of_other_seeds_differ(tmp_path, console):
    for seed in (0, 1):
        config = tiny(tmp_path / str(seed), trials=3, seed=seed)
        worker.search(config, console)
    first, second = (results(tmp_path / str(seed)) for seed in (0, 1))
    assert first[0]["values"] == second[0]["values"]  # the usual ones
    assert first[1]["values"] != second[1]["values"]


def test_starts_of_their_own_survive_a_kill(tmp_path, console, monkeypatch):
    """A trial that is trained again starts from the parameters it had."""
    config = tiny(tmp_path / "whole", trials=4, common_start=False)
    worker.search(config, console)
    cut = tiny(tmp_path / "cut", trials=4, common_start=False)
    with monkeypatch.context() as patch:

        def killed(*args):
            raise KilledError

        patch.setattr(Program, "evaluate", killed)
        with pytest.raises(KilledError):
            worker.search(cut, console)
    worker.search(cut, console)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert [r["retry_of"] for r in records(tmp_path / "cut")[:3]] == [[0], [1], [2]]


def test_a_trial_that_kills_its_worker_is_given_up(tmp_path):
    config = tiny(tmp_path, trials=1, batch=1, retries=2)
    claims = claims_of(config)
    for again in (1, 1, 0):
        (trial,) = claims.ask()
        assert trial.params == config.sgd.usual()
        assert claims.recover() == again
    (trial,) = claims.ask()
    assert trial.params != config.sgd.usual()


def test_trials_of_living_workers_are_left_alone(tmp_path):
    first, second = (claims_of(tiny(tmp_path, worker=i)) for i in (0, 1))
    with working(first.config):
        trials = first.ask()
        assert second.recover() == 0
    assert second.recover() == len(trials) == 3
    again = second.ask()
    assert [t.params for t in again] == [t.params for t in trials]
    # The first worker wakes up late; its reports have no effect.
    lane = worker.Lane(trials[0])
    lane.report(4, {"loss": 0.0})
    lane.tell(first.study, {"device": "none"})
    assert lane.lost
    state = first.study.get_trials()[trials[0].number].state
    assert state == TrialState.FAIL


def test_workers_do_not_overshoot(tmp_path):
    """Both see room for two; the one that asks later gives its trials back."""
    first, second = (claims_of(tiny(tmp_path, trials=2, worker=i)) for i in (0, 1))
    ask = second.claim

    def late():
        second.claim = ask
        assert len(first.ask()) == 2
        return ask()

    second.claim = late
    assert second.ask() == []
    assert len(first.trials(TrialState.RUNNING)) == 2


def test_two_workers_of_one_number(tmp_path, console):
    config = tiny(tmp_path)
    with working(config), pytest.raises(RunFolderError, match="in use by another"):
        worker.search(config, console)


class Fake(Program):
    """Trains nothing; the loss of a trial is what a test says."""

    losses = None

    def start(self, values, seeds):
        return values

    def advance(self, carry, values, number):
        return carry, jnp.zeros((self.problem.every, self.count))

    def evaluate(self, carry):
        return {"loss": np.array(self.losses, float)}


def test_pruned_trials_are_told(tmp_path):
    config = tiny(tmp_path, trials=12, batch=3, prune_from=2)
    problem, claims = make_problem(config), claims_of(config)
    program = Fake(problem, 3)
    for losses in ([1.0, 2.0, 3.0], [1.5, 2.0, 2.5]):
        program.losses = losses
        worker.train(claims, program, claims.ask(), lambda: None)
    # The median is 2: from the second evaluation on, those above it end.
    evaluations = []
    program.losses = [5.0, math.nan, 1.0]
    lanes = worker.train(claims, program, claims.ask(), lambda: evaluations.append(1))
    assert [lane.pruned for lane in lanes] == [True, True, False]
    assert len(evaluations) == 4
    bad, wild, good = claims.trials()[6:]
    assert bad.state == wild.state == TrialState.PRUNED
    assert list(bad.intermediate_values) == [4, 8] and bad.value == 5.0
    assert wild.value == math.inf
    assert good.state == TrialState.COMPLETE and good.value == 1.0
    # All of a batch: it ends early.
    program.losses, evaluations[:] = [7.0, 8.0, 9.0], []
    worker.train(claims, program, claims.ask(), lambda: evaluations.append(1))
    assert len(evaluations) == 2
    assert len(claims.trials(TrialState.PRUNED)) == 5
    assert claims.ask() == []


def test_trials_that_are_not_finite_are_worst(tmp_path, console):
    config = tiny(tmp_path, trials=3, prune_from=0)
    problem, claims = make_problem(config), claims_of(config)
    program = Fake(problem, 3)
    program.losses = [math.nan, 2.0, math.inf]
    worker.train(claims, program, claims.ask(), lambda: None)
    values = [trial.value for trial in claims.trials(TrialState.COMPLETE)]
    assert values == [math.inf, 2.0, math.inf]
    worker.save_report(claims.study, config, problem.identity(), console)
    assert [r["objective"] for r in records(tmp_path)] == [None, 2.0, None]
    assert json.loads((tmp_path / "best.json").read_text())["number"] == 1


def test_no_finite_trial(tmp_path, console):
    config = tiny(tmp_path, trials=3)
    problem, claims = make_problem(config), claims_of(config)
    program = Fake(problem, 3)
    program.losses = [math.nan] * 3
    worker.train(claims, program, claims.ask(), lambda: None)
    worker.save_report(claims.study, config, problem.identity(), console)
    assert "No trial was complete with a finite loss" in console.file.getvalue()


def test_studies_of_other_configurations_are_refused(tmp_path):
    claims_of(tiny(tmp_path, study="one"))
    claims_of(tiny(tmp_path, study="one", trials=50, batch=2))
    other = tiny(tmp_path, study="one", seed=4)
    with pytest.raises(StorageError, match="one is one with seed = 0; wanted 4"):
        claims_of(other)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("trials.db", "storage is not a URL; wanted one like postgresql"),
        ("nothing://host/name", "storage is nothing://…: no such kind of database"),
        (
            "postgresql+psycopg://me:secret@127.0.0.1:1/name",
            r"me:\*\*\*@127.0.0.1:1/name cannot be reached: .*refused",
        ),
    ],
)
def test_storages_that_cannot_be_used(tmp_path, url, message):
    if "psycopg" in url:
        pytest.importorskip("psycopg")
    with pytest.raises(StorageError, match=message) as caught:
        open_storage(tiny(tmp_path, storage=url))
    assert "secret" not in str(caught.value)


def test_missing_driver(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    url = "postgresql+psycopg://me:secret@localhost/name"
    with pytest.raises(StorageError, match=r"kfac_jax_lite\[postgres\]") as caught:
        open_storage(tiny(tmp_path, storage=url))
    assert "secret" not in str(caught.value)


def test_a_storage_that_goes_away(tmp_path, console, monkeypatch):
    def lost(claims):
        raise optuna.exceptions.StorageInternalError from OSError("no route to host")

    monkeypatch.setattr(Claims, "ask", lost)
    with pytest.raises(StorageError, match=r"was lost \(no route to host\)"):
        worker.search(tiny(tmp_path), console)


def test_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used"):
        open_storage(tiny(tmp_path / "file"))


def test_a_killed_process(tmp_path, console):
    """SIGKILL in the middle of a batch; the next call trains those trials again."""
    options = [*OPTIONS, "--optimizer", "sgd", "--workdir", str(tmp_path)]
    options += ["--epochs", "4000", "--evaluations", "100", "--prune-from", "0"]
    command = ["tune", *options, "--trials", "2", "--batch", "2"]
    program = [sys.executable, "-m", "experiments.main", *command]
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL)
    config = parse(command)
    try:
        wait_for_report(config, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    lost = [t.params for t in claims_of(config).trials(TrialState.RUNNING)]
    assert len(lost) == 2
    worker.search(config, console)
    found = records(tmp_path)
    assert [r["values"] for r in found] == lost
    assert [r["retry_of"] for r in found] == [[0], [1]]
    assert "2 trials of workers that ended are queued again" in console.file.getvalue()


def wait_for_report(config, process):
    """Waits until a process has reported an evaluation of a trial."""
    while process.poll() is None:
        time.sleep(0.2)
        if not (config.folder() / "journal.log").exists():
            continue
        with contextlib.suppress(KeyError):
            storage = open_storage(config)
            study = optuna.load_study(study_name=config.name(), storage=storage)
            if any(trial.intermediate_values for trial in study.get_trials()):
                return
    raise AssertionError("the process ended by itself")


def test_workers_folder_is_below_the_run_folder(tmp_path):
    config = tiny(tmp_path)
    with locked(workers_folder(config) / "7"):
        assert claims_of(config).others_alive() == {7}
    assert claims_of(config).others_alive() == set()
