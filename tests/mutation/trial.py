"""One mutant against its tests, in a process of its own."""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest

PRELOADED = ("jax", "optax", "flax.linen", "scipy.linalg")
SURVIVED = 0


class First:
    """A plugin of pytest that remembers the first test to fail."""

    name = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after every phase of a test."""
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Called by pytest after it has read a file."""
        if report.failed and not self.name:
            self.name = report.nodeid


def child(folder: Path, tests: list[str], answer: Path) -> None:
    """Runs tests in a folder and writes what came of it."""
    log = os.open(answer.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    first = First()
    options = ["-x", "-q", "-p", "no:xdist", "-p", "no:randomly", "--tb=line"]
    status = int(pytest.main([*options, *tests], plugins=[first]))
    answer.write_text(json.dumps({"status": status, "by": first.name}))
    os._exit(0)  # no clean-up of what a mutant may have left


def attempt(folder: Path, tests: list[str], limit: float) -> tuple[str, str, float]:
    """Runs tests in a folder until the first fails.

    Args:
        folder: A copy of the repository, with the mutant in it.
        tests: Identities of tests.
        limit: Seconds after which the mutant counts as caught: it hangs.

    Returns:
        Outcome (``killed``, ``survived``, ``timeout``, ``crashed`` or ``error``: the
        tests could not be run), the test that failed first, seconds.
    """
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=child, args=(folder, tests, answer))
    start = time.monotonic()
    process.start()
    process.join(limit)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    seconds = time.monotonic() - start
    if hangs:
        return "timeout", "", seconds
    if not answer.exists():
        return "crashed", "", seconds
    found = json.loads(answer.read_text())
    outcome = "survived" if found["status"] == SURVIVED else "error"
    if found["by"]:  # a test, or a module of tests that could not be imported
        outcome = "killed"
    return outcome, found["by"], seconds
