"""Starting real training processes, watching them, and killing them."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import kfac_jax_lite
from experiments import metrics
from experiments.checkpoints import complete
from experiments.launch import LaunchConfig, environments
from experiments.main import parse

ROOT = Path(kfac_jax_lite.__file__).parents[1]
PATIENCE = 240.0
SMALL = [
    *("train", "--dataset", "digits", "--optimizers", "kfac", "--net.hidden", "8"),
    *("--batch-size", "16", "--train-examples", "160", "--eval-examples", "64"),
    *("--evals-per-epoch", "1", "--log-every", "5", "--checkpoint-every", "5"),
    *("--kfac.interval", "adaptive", "--kfac.threshold", "0.7"),
]


def configuration(arguments):
    """The configuration of a command line."""
    return parse(arguments)


def launch(*options, command=(), timeout=PATIENCE):
    """Run the launcher to its end; returns the finished process with its output."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.launch", *options, "--", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@contextlib.contextmanager
def started(count, command, folder, extra=(), **options):
    """Processes without the launcher, each with its output in a file; killed after.

    All but the first get the arguments in ``extra`` too.
    """
    config = LaunchConfig(processes=count, **options)
    found = {}
    with contextlib.ExitStack() as stack:
        for number, variables in environments(config).items():
            found[number] = subprocess.Popen(
                [sys.executable, "-m", "experiments.main", *command]
                + (list(extra) if number else []),
                cwd=ROOT,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=stack.enter_context(open(output_of(folder, number), "w")),
                stderr=subprocess.STDOUT,
            )
        try:
            yield found
        finally:
            for child in found.values():
                child.kill()
                child.wait()


def output_of(folder, number):
    """The file with a process's output."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"output_{number}.txt"


def wait_for_step(config, step, children):
    """Wait until there is a checkpoint of this step or a later one."""
    wait_until(
        lambda: (
            max(complete(config.folder() / "kfac" / "checkpoints"), default=0) >= step
        ),
        children,
    )


def wait_until(happened, children, patience=PATIENCE):
    """Wait for something that processes do; fail if one of them ends before."""
    deadline = time.monotonic() + patience
    while not happened():
        ended = {n: child.poll() for n, child in children.items()}
        assert set(ended.values()) == {None}, f"ended too early: {ended}"
        assert time.monotonic() < deadline, f"nothing for {patience} s"
        time.sleep(0.01)


def last_step(config):
    """The last step of which there is a record."""
    records = metrics.read_records(config.folder() / "kfac" / metrics.FILE_NAME)
    return records[-1]["step"]
