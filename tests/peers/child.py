"""One test file of a peer, in a process of its own.

python -m tests.peers.child SOURCE_FOLDER FILE VARIANT RESULT
"""

import json
import os
import sys
import time
import unittest
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import importlib.util  # noqa: E402

from absl import flags  # noqa: E402

from tests.peers import adapter, places  # noqa: E402


class Recorder(unittest.TestResult):
    """What became of each test, and whether it used the optimiser put in."""

    def __init__(self):
        super().__init__()
        self.records = {}
        self.before, self.begin = 0, 0.0

    def startTest(self, test):
        super().startTest(test)
        self.before, self.begin = sum(adapter.CALLS.values()), time.perf_counter()
        self.records[short(test)] = {"outcome": "passed", "why": ""}

    def stopTest(self, test):
        super().stopTest(test)
        record = self.records[short(test)]
        record["used"] = sum(adapter.CALLS.values()) > self.before
        record["seconds"] = round(time.perf_counter() - self.begin, 2)

    def note(self, test, outcome, error):
        record = self.records[short(test)]
        if record["outcome"] == "passed" or outcome == "failed":
            record.update(outcome=outcome, why=message(error))

    def addError(self, test, err):
        self.note(test, "failed", err)

    addFailure = addError

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.note(test, "failed", err)

    def addSkip(self, test, reason):
        self.note(test, "skipped", (None, reason, None))


def short(test):
    """Class and method of a test, with its parameters where it has some."""
    return ".".join(test.id().split(".")[-2:]) if "(" not in test.id() else test.id()


def message(error):
    """The first line that says something of an error."""
    kind, value, _ = error
    lines = [line.strip() for line in str(value).splitlines() if line.strip()]
    head = f"{kind.__name__}: " if kind else ""
    return (head + " ".join(lines[:4]))[:300]


def tests_of(suite):
    """All tests of a suite."""
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from tests_of(test)
        else:
            yield test


def run(folder, file, variant):
    """Runs a file's tests and returns records by test."""
    path = Path(folder) / file.path
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if file.kind == "list":
        with places.lists_replaced(variant):
            spec.loader.exec_module(module)
    else:
        spec.loader.exec_module(module)
    if file.path.endswith("sharding_test.py"):
        places.told_version(module)
    if variant != "theirs":
        places.put(module, file, variant)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    recorder = Recorder()
    for test in tests_of(suite):
        if not file.classes or type(test).__name__ in file.classes:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                test.run(recorder)
    return recorder.records


def main(folder, path, variant, result):
    """Writes the records of one file and variant."""
    file = next(f for f in places.FILES if f.path == path)
    Path(result).write_text(json.dumps(run(folder, file, variant), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
