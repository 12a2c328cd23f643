"""Ctrl-C while the survey's workers run: they end, and the survey goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.experiments.processes import PATIENCE, ROOT

RUNS = 2 * 2 * 6  # cells, optimisers and seeds


def runs_of(folder):
    """What every whole line of the files says was run; a torn line is an error."""
    files = sorted(folder.glob("*.jsonl"))
    assert all(file.read_bytes().endswith(b"\n") for file in files)
    found = [line for file in files for line in file.read_text().splitlines()]
    return [json.loads(line)["run"] for line in found]


def alive(group):
    """Processes of a group that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, owner = stat.rpartition(")")[2].split()[:3]
        if int(owner) == group and state not in "ZX":
            found.append(folder.name)
    return found


def wait_until(condition, patience, process=None):
    """Waits until it holds; not beyond the end of a process."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


@contextlib.contextmanager
def started(command, environment):
    """A group of processes of its own, as a terminal makes; killed at the end."""
    # A shell's background jobs ignore the signal, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            yield process
        finally:
            if alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="wants Linux's /proc")
def test_interrupted_workers_end_and_the_survey_goes_on(tmp_path):
    command = [sys.executable, "-m", "experiments.main", "survey", "--size", "tiny"]
    command += ["--models", "linear", "--seeds", "6", "--workers", "2"]
    command += ["--out", str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def recorded():
        return any(b"\n" in file.read_bytes() for file in tmp_path.glob("*.jsonl"))

    with started(command, environment) as process:
        wait_until(recorded, PATIENCE, process)
        assert len(alive(process.pid)) >= 3
        start = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        told, _ = process.communicate(timeout=PATIENCE)
        assert time.monotonic() - start < 20
        wait_until(lambda: not alive(process.pid), 10)
    assert process.returncode == 130
    assert "Interrupted. The same command continues" in told
    assert "Traceback" not in told
    before = {file: file.read_bytes() for file in tmp_path.glob("*.jsonl")}
    assert 1 <= len(runs_of(tmp_path)) < RUNS

    again = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, timeout=PATIENCE
    )
    assert again.returncode == 0, again.stderr
    found = runs_of(tmp_path)
    assert len(found) == len(set(found)) == RUNS
    for file, content in before.items():
        assert file.read_bytes().startswith(content)
