"""The launcher without JAX: environments, output, and who is stopped when."""

import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import launch, processes
from experiments.errors import ConfigError, ExperimentError
from experiments.launch import LaunchConfig, environments, main, run


@pytest.fixture(autouse=True)
def own_signals():
    """Puts back the handler that the launcher replaces."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def script(code):
    """A command that runs Python code, with the number of its process at hand."""
    number = f"import os, sys, time; number = int(os.environ[{processes.NUMBER!r}]);"
    return [sys.executable, "-c", number + code]


def numbered(count):
    """Environments with nothing but the number."""
    return {n: {processes.NUMBER: str(n)} for n in range(count)}


def test_environments(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x {launch.DEVICE_FLAG}=8")
    found = environments(
        LaunchConfig(
            processes=6,
            hosts=2,
            process_id=3,
            devices_per_process=2,
            coordinator="node0:1234",
            heartbeat_seconds=7,
        )
    )
    assert list(found) == [3, 4, 5]
    assert found[4] == {
        "JAX_COORDINATOR_ADDRESS": "node0:1234",
        "JAX_NUM_PROCESSES": "6",
        "JAX_PROCESS_ID": "4",
        "JAX_LOCAL_DEVICE_IDS": "2,3",
        "KFAC_HEARTBEAT_SECONDS": "7",
        "XLA_FLAGS": f"--xla_dump_to=x {launch.DEVICE_FLAG}=2",
        "PYTHONUNBUFFERED": "1",
    }


def test_one_host_listens_to_itself_only():
    found = environments(LaunchConfig(processes=2))
    assert found[0][processes.ADDRESS] == found[1][processes.ADDRESS]
    assert found[0][processes.ADDRESS].startswith("127.0.0.1:")
    assert found[0][launch.BIND_ADDRESS] == found[0][processes.ADDRESS]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"processes": 0}, "processes is 0; wanted an integer >= 1"),
        ({"devices_per_process": 0}, "devices-per-process is 0"),
        ({"processes": 3, "hosts": 2}, "processes is 3; wanted a multiple of the 2"),
        (
            {"processes": 4, "hosts": 2, "process_id": 1, "coordinator": "a:1"},
            r"process-id is 1; .* one of \[0, 2\]",
        ),
        ({"processes": 4, "hosts": 2}, "coordinator is missing"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ConfigError, match=message):
        LaunchConfig(**values)


def test_command_line_errors(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--processes", "3", "--hosts", "2", "--", "train"])
    assert caught.value.code == 2
    assert "multiple of the 2" in capsys.readouterr().err
    assert main(["--processes", "2"]) == 2
    assert "there is no command" in capsys.readouterr().err


def test_output_has_the_number_of_its_process(capfd):
    code = "print('one'); print('two', file=sys.stderr)"
    assert run(script(code), numbered(2)) == 0
    lines = capfd.readouterr().out.splitlines()
    wanted = [f"[{n}] {word}" for n in range(2) for word in ("one", "two")]
    assert sorted(line for line in lines if "launch" not in line) == sorted(wanted)


@pytest.mark.parametrize(
    ("end", "status", "cause"),
    [
        ("sys.exit(7)", 7, "process 1 ended with status 7"),
        ("os.kill(os.getpid(), 9)", 137, "process 1 was ended by signal 9 (SIGKILL)"),
    ],
)
def test_the_others_are_stopped(capfd, end, status, cause):
    code = f"print(os.getpid(), flush=True)\nif number == 1: time.sleep(.3); {end}\n"
    assert run(script(code + "time.sleep(1000)"), numbered(3)) == status
    lines = capfd.readouterr().out.splitlines()
    assert any(cause in line for line in lines)
    for line in lines:
        if line[1].isdecimal():
            assert not is_running(line.split()[-1])


def test_a_process_that_does_not_end_is_killed(capfd, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.5)
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True)\n"
        "if number: time.sleep(1); sys.exit(1)\n"
        "time.sleep(1000)"
    )
    assert run(script(code), numbered(2)) == 1
    lines = capfd.readouterr().out.splitlines()
    pids = [line.split()[-1] for line in lines if line[1].isdecimal()]
    assert len(pids) == 2 and not any(map(is_running, pids))


def test_the_launcher_takes_its_processes_along(tmp_path):
    """Asked to end, as by a batch system, it leaves none behind."""
    code = "print(os.getpid(), flush=True); time.sleep(1000)"
    call = f"from experiments.launch import run; run({script(code)}, {numbered(2)})"
    launcher = subprocess.Popen(
        [sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert launcher.stdout is not None
    with launcher.stdout as lines:
        pids = {next(lines).split()[-1] for _ in range(4)}
        launcher.terminate()
        assert launcher.wait(60) == 128 + signal.SIGTERM
    assert len(pids) == 2 and not any(map(is_running, pids))


def is_running(pid):
    """Whether a process exists, a moment after it should have ended."""
    for _ in range(20):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"JAX_NUM_PROCESSES": "two", "JAX_COORDINATOR_ADDRESS": "localhost:1"},
            "JAX_NUM_PROCESSES is 'two'; wanted a whole number >= 1",
        ),
        ({"JAX_NUM_PROCESSES": "2"}, "wanted JAX_COORDINATOR_ADDRESS too"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "localhost:1"},
            "JAX_PROCESS_ID is None; wanted a whole number >= 0",
        ),
        ({"KFAC_HEARTBEAT_SECONDS": "0"}, "KFAC_HEARTBEAT_SECONDS is '0'"),
    ],
)
def test_incomplete_variables(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        processes.join()


def test_one_process_asks_itself():
    assert processes.told_by_first(lambda: 3) == 3
    processes.check_same("data", 1)
    with pytest.raises(ExperimentError, match="no"):
        processes.told_by_first(refuse)


def refuse():
    """Raises."""
    raise ExperimentError("no")
