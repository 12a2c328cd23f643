"""Several processes train as one does, also when one of them dies or is slow."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from experiments.launch import DEVICE_FLAG
from experiments.train import train
from tests.experiments.curves import close_curves, curve, interrupted, records_of
from tests.experiments.processes import (
    PATIENCE,
    ROOT,
    SMALL,
    configuration,
    launch,
    output_of,
    started,
    wait_for_step,
)


@pytest.fixture(autouse=True)
def programs_are_kept(monkeypatch):
    """The processes share the compiled programs that this process keeps."""
    folder = jax.config.jax_compilation_cache_dir
    if folder:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture
def command(tmp_path):
    """Returns a function to a command line and its configuration."""

    def make(name, *options):
        arguments = [*SMALL, *options, "--workdir", str(tmp_path / name)]
        return arguments, configuration(arguments)

    return make


def assert_as_alone(command, config, console, options):
    """The run's curve is that of one process on one device."""
    _, alone = command("alone", *options)
    train(alone, console)
    close_curves(curve(config, "kfac"), curve(alone, "kfac"))


def assert_only_the_first_wrote(config):
    """No record is there twice."""
    steps = [record["step"] for record in records_of(config, "kfac", "train")]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_two_processes(command, console):
    arguments, config = command("two", "--epochs", "2")
    done = launch("--processes", "2", command=arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_as_alone(command, config, console, ["--epochs", "2"])
    assert_only_the_first_wrote(config)
    (first,) = records_of(config, "kfac", "config")
    assert (first["devices"], first["processes"]) == (2, 2)
    assert curve(config, "kfac")[-1]["mean_interval"] > 1
    # Only the first process reports, with its number before each line.
    lines = done.stdout.splitlines()
    assert any(line.startswith("[0] K-FAC: step 20/20") for line in lines)
    assert not [line for line in lines if line.startswith("[1] K-FAC")]
    assert (config.folder() / "loss_vs_steps.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(4, 1), (2, 2)])
def test_four_devices_of_several_processes(command, console, processes, devices):
    arguments, config = command("four", "--epochs", "2")
    done = launch(
        *("--processes", str(processes), "--devices-per-process", str(devices)),
        command=arguments,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_as_alone(command, config, console, ["--epochs", "2"])
    (first,) = records_of(config, "kfac", "config")
    assert (first["devices"], first["processes"]) == (4, processes)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_process(command, console, tmp_path, killed):
    """The others end with an error, and the run continues to the same numbers."""
    options = ["--epochs", "20"]
    arguments, config = command("killed", *options)
    with started(2, arguments, tmp_path) as children:
        wait_for_step(config, 10, children)
        os.kill(children[killed].pid, signal.SIGKILL)
        # Far below the heartbeat's 60 s: the closed connection tells.
        assert children[1 - killed].wait(30) not in (0, None)
    assert records_of(config, "kfac", "end") == []
    if killed:  # without process 0, JAX itself ends the others
        assert "error: process 0 of 2" in output_of(tmp_path, 0).read_text()

    train(config, console)  # on one device now
    (note,) = records_of(config, "kfac", "note")
    assert note["step"] >= 10 and note["devices"] == 1
    assert_as_alone(command, config, console, options)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_launcher_stops_the_others(command, console, tmp_path, killed):
    """And the same command continues, whichever process was killed."""
    options = ["--epochs", "20"]
    arguments, config = command("killed", *options)
    call = [sys.executable, "-m", "experiments.launch", "--processes", "2", "--"]
    with open(tmp_path / "output.txt", "w+") as output:
        launcher = subprocess.Popen([*call, *arguments], cwd=ROOT, stdout=output)
        wait_for_step(config, 10, {0: launcher})
        lines = (tmp_path / "output.txt").read_text().splitlines()
        start = f"[launch] process {killed} has the id "
        (number,) = [line.removeprefix(start) for line in lines if start in line]
        os.kill(int(number), signal.SIGKILL)
        assert launcher.wait(60) == 128 + signal.SIGKILL
    text = (tmp_path / "output.txt").read_text()
    assert f"process {killed} was ended by signal 9 (SIGKILL)" in text
    done = launch("--processes", "2", command=arguments)
    assert done.returncode == 0, done.stdout
    (note,) = records_of(config, "kfac", "note")
    assert note["step"] >= 10
    assert_as_alone(command, config, console, options)
    assert_only_the_first_wrote(config)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_process_that_freezes(command, tmp_path, frozen):
    """It keeps its connections and says nothing: the heartbeat tells."""
    arguments, config = command("frozen", "--epochs", "200")
    with started(2, arguments, tmp_path, heartbeat_seconds=5) as children:
        wait_for_step(config, 10, children)
        os.kill(children[frozen].pid, signal.SIGSTOP)
        assert children[1 - frozen].wait(90) not in (0, None)
    assert records_of(config, "kfac", "end") == []


def test_processes_that_disagree(command, tmp_path):
    """Another seed in one of them is an error in both, not a wrong result."""
    arguments, config = command("seeds")
    with started(2, arguments, tmp_path, extra=["--seed", "1"]) as children:
        assert all(child.wait(PATIENCE) for child in children.values())
    for number in range(2):
        assert "Process 1 has another" in output_of(tmp_path, number).read_text()
    assert not (config.folder() / "kfac").exists()


@pytest.mark.slow
def test_process_that_sees_another_folder(command, console, tmp_path, monkeypatch):
    """It would start anew where the first continues."""
    arguments, config = command("shared", "--epochs", "2")
    interrupted(config, console, monkeypatch, after=15)
    other = ["--workdir", str(tmp_path / "other")]
    with started(2, arguments, tmp_path, extra=other) as children:
        assert all(child.wait(PATIENCE) for child in children.values())
    wanted = "Process 0 continues from step 10; process 1 sees no such checkpoint"
    assert wanted in output_of(tmp_path, 1).read_text()


@pytest.mark.slow
def test_straggler_only_slows(command, console, tmp_path):
    """A process that is stopped again and again: the same numbers."""
    options = ["--epochs", "10"]
    arguments, config = command("straggler", *options)
    with started(2, arguments, tmp_path) as children:
        wait_for_step(config, 5, children)
        for _ in range(4):
            os.kill(children[1].pid, signal.SIGSTOP)
            time.sleep(1.5)
            os.kill(children[1].pid, signal.SIGCONT)
            time.sleep(0.1)
        for child in children.values():
            assert child.wait(PATIENCE) == 0
    assert_as_alone(command, config, console, options)
    seconds = [r["seconds"] for r in records_of(config, "kfac", "train")]
    assert seconds[-1] > 4 * 1.5 / 2  # it was stopped during the training


@pytest.mark.slow
def test_hosts(command, console):
    """Two launchers that know of one another only by the coordinator's address."""
    arguments, config = command("hosts", "--epochs", "2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    call = [sys.executable, "-m", "experiments.launch", "--processes", "2"]
    call += ["--hosts", "2", "--coordinator", address, "--process-id"]
    hosts = {
        number: subprocess.Popen([*call, str(number), "--", *arguments], cwd=ROOT)
        for number in range(2)
    }
    for host in hosts.values():
        assert host.wait(PATIENCE) == 0
    assert_as_alone(command, config, console, ["--epochs", "2"])


@pytest.mark.slow
def test_slurm_step(command, console, tmp_path):
    """The variables that srun sets for two tasks on one node are all it takes."""
    arguments, config = command("slurm", "--epochs", "2")
    job = free_job_number()
    shared = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "XLA_FLAGS": f"{DEVICE_FLAG}=1",
    }
    tasks = {
        number: subprocess.Popen(
            [sys.executable, "-m", "experiments.main", *arguments],
            cwd=ROOT,
            env={**os.environ, **shared}
            | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
        )
        for number in range(2)
    }
    for task in tasks.values():
        assert task.wait(PATIENCE) == 0
    (first,) = records_of(config, "kfac", "config")
    assert (first["devices"], first["processes"]) == (2, 2)
    assert_as_alone(command, config, console, ["--epochs", "2"])


def free_job_number():
    """A SLURM job whose coordinator's port, which JAX derives from it, is free."""
    for job in range(os.getpid(), os.getpid() + 4096):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", job % 2**12 + 65536 - 2**12))
            except OSError:
                continue
        return job
    raise AssertionError("no free port")
