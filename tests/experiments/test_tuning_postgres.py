"""Two workers on a PostgreSQL server of their own; one is killed in mid-trial."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import optuna
import pytest
from optuna.trial import TrialState

import kfac_jax_lite
from experiments.main import main, parse
from experiments.tuning.store import open_storage, retried
from tests.experiments.tuning import OPTIONS, records

ROOT = pathlib.Path(kfac_jax_lite.__file__).parents[1]
BINARIES = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))
PATIENCE = 120
TRIALS, BATCH = 12, 3
# Trials of several seconds, in which a worker can be killed.
LONG = ["--epochs", "3000", "--evaluations", "30", "--prune-from", "0"]
LONG += ["--optimizer", "sgd", "--heartbeat", "1", "--grace", "3"]

pytestmark = pytest.mark.slow


def binary(name):
    """A program of PostgreSQL, or a skipped test."""
    places = os.pathsep.join([os.environ["PATH"], *map(str, BINARIES)])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"PostgreSQL's {name} is not installed")
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def url():
    """The URL of a fresh database; its server is no longer there afterwards."""
    pytest.importorskip("psycopg")
    initdb, postgres = binary("initdb"), binary("postgres")
    user = {}
    if os.geteuid() == 0:  # its programs do not run as root
        import pwd

        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        if "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
            pytest.skip("root needs a user postgres to run PostgreSQL as")
    # Folders of tests are closed to other users.
    with tempfile.TemporaryDirectory(prefix="tuning-") as folder:
        if user:
            shutil.chown(folder, user["user"], user["group"])
        port, data = free_port(), f"{folder}/data"
        make = [initdb, "-D", data, "-U", "tuner", "--auth=trust", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **user)
        serve = [postgres, "-D", data, "-p", str(port), "-k", folder, "-F"]
        serve += ["-c", "listen_addresses=127.0.0.1"]
        server = subprocess.Popen(
            serve,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **user,
        )
        try:
            wait_for_server(port, server)
            yield f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # connections are cut
            server.wait(PATIENCE)


def wait_for_server(port, server):
    import psycopg

    for _ in range(10 * PATIENCE):
        assert server.poll() is None, "the server ended by itself"
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(
                host="127.0.0.1", port=port, user="tuner", dbname="postgres"
            ).close()
            return
        time.sleep(0.1)
    raise AssertionError("the server does not answer")


def command_of(url, folder, number):
    """The arguments of a worker."""
    return [
        *("tune", *OPTIONS, *LONG, "--storage", url, "--workdir", str(folder)),
        *("--worker", str(number), "--trials", str(TRIALS), "--batch", str(BATCH)),
    ]


@contextlib.contextmanager
def started(command, output):
    """A worker in a process of its own, killed at the end."""
    arguments = [sys.executable, "-m", "experiments.main", *command]
    with open(output, "w") as file:
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def opened(config):
    """The database, to look into."""
    storage = open_storage(config)
    yield storage
    storage.remove_session()
    storage.engine.dispose()


def in_training(config, storage, number):
    """Trials that a worker has reported a first loss of, but not the last."""
    with contextlib.suppress(KeyError):  # no study yet
        study = optuna.load_study(study_name=config.name(), storage=storage)
        running = study.get_trials(states=[TrialState.RUNNING])
        return [
            t
            for t in running
            if t.user_attrs.get("worker") == number
            and 0 < len(t.intermediate_values) < 20
        ]
    return []


def test_no_trial_is_lost(url, tmp_path):
    folder, logs = tmp_path / "run", [tmp_path / f"{i}.log" for i in (0, 1)]
    commands = [command_of(url, folder, i) for i in (0, 1)]
    config = parse(commands[0])
    with (
        opened(config) as storage,
        started(commands[0], logs[0]) as first,
        started(commands[1], logs[1]) as second,
    ):
        lost, end = [], time.monotonic() + PATIENCE
        while len(lost) < BATCH and time.monotonic() < end:
            assert second.poll() is None, logs[1].read_text()
            lost = in_training(config, storage, 1)
            time.sleep(0.1)
        second.send_signal(signal.SIGKILL)
        second.wait()
        assert len(lost) == BATCH, logs[1].read_text()
        assert first.wait(PATIENCE) == 0, logs[0].read_text()
    with opened(config) as storage:
        study = optuna.load_study(study_name=config.name(), storage=storage)
        trials = study.get_trials()
    states = [trial.state for trial in trials]
    assert states.count(TrialState.COMPLETE) == TRIALS
    assert TrialState.RUNNING not in states and TrialState.WAITING not in states
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    for trial in lost:
        assert trials[trial.number].state == TrialState.FAIL
        (again,) = [t for t in complete if trial.number in retried(t)]
        assert again.params == trial.params
        assert again.user_attrs["worker"] == 0
    found = records(folder)
    assert len(found) == TRIALS
    # A worker that comes late finds nothing to do, and reports the same.
    assert main(commands[1]) == 0
    assert records(folder) == found
