"""Which tests run which line: pytest-cov's contexts and pytest's durations."""

import functools
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from coverage import CoverageData

from tests.mutation.mutants import ROOT

BUILD = ROOT / "build" / "mutation"
DATA, TIMES = BUILD / "coverage", BUILD / "times.xml"
CONFIG = """[run]
branch = True
source = kfac_jax_lite
parallel = True
"""


def measure() -> int:
    """Runs the fast suite once, noting lines and branches by test, and durations.

    Returns:
        pytest's exit status.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    config = BUILD / "coveragerc"
    config.write_text(f"{CONFIG}data_file = {DATA}\n")
    options = ["--cov", f"--cov-config={config}", "--cov-context=test", "--cov-report="]
    command = [sys.executable, "-m", "pytest", "-n", "2", "-q", *options]
    return subprocess.call([*command, f"--junitxml={TIMES}"], cwd=ROOT)


def durations(path: Path) -> dict[str, float]:
    """Seconds of every test by its identity, from a JUnit file.

    Args:
        path: The file.

    Returns:
        Seconds of those that passed.
    """
    found = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if not list(case):
            module = case.get("classname", "").replace(".", "/")
            found[f"{module}.py::{case.get('name')}"] = float(case.get("time", 0))
    return found


class Covering:
    """The tests that run a line, in the order in which they are tried.

    Args:
        data: coverage's file.
        times: The JUnit file of the same run.

    Raises:
        FileNotFoundError: There was no such run.
    """

    def __init__(self, data: Path = DATA, times: Path = TIMES):
        for path in (data, times):
            if not path.exists():
                raise FileNotFoundError(
                    f"{path.name} is missing: run `python -m tests.mutation measure`."
                )
        self.data = CoverageData(basename=str(data))
        self.data.read()
        self.times = durations(times)
        measured = map(Path, self.data.measured_files())
        self.paths = {shortened(path): str(path) for path in measured}

    def tests(self, module: str, lines: Iterable[int]) -> list[str]:
        """Tests that run any of the lines, or any of the module if none does.

        Args:
            module: Path below the repository.
            lines: Numbers from 1.

        Returns:
            Identities: first those of the module's own file, then of files that compare
            with an oracle, then the others; files in turn, quick tests first.
        """
        contexts = self.data.contexts_by_lineno(self.paths[module])
        found = {name for line in lines for name in contexts.get(line, ())}
        names = timed(found, self.times) or timed(
            {name for several in contexts.values() for name in several}, self.times
        )
        groups = defaultdict(list)
        for name in names:
            groups[rank(name.split("::")[0], module)].append(name)
        return [
            name for key in sorted(groups) for name in in_turn(groups[key], self.times)
        ]


def shortened(path: Path) -> str:
    """A measured path from the package's folder on."""
    parts = path.parts
    start = len(parts) - 1 - parts[::-1].index("kfac_jax_lite")
    return str(Path(*parts[start:]))


def timed(contexts: Iterable[str], times: dict[str, float]) -> set[str]:
    """The tests of some contexts that passed when they were measured."""
    return {name.rsplit("|", 1)[0] for name in contexts} & times.keys()


def rank(path: str, module: str) -> int:
    """How likely a file of tests is to be about a module: 0 is likeliest."""
    if Path(path).stem == f"test_{Path(module).stem}":
        return 0
    if "experiments" in path:
        return 3
    return 1 if knows_an_oracle(path) else 2


@functools.cache
def knows_an_oracle(path: str) -> bool:
    """Whether a file of tests mentions one."""
    return "oracle" in (ROOT / path).read_text()


def in_turn(names: Iterable[str], times: dict[str, float]) -> Iterator[str]:
    """One test of every file after the other, the quick ones first."""
    files = defaultdict(list)
    for name in sorted(names, key=lambda name: (times[name], name)):
        files[name.split("::")[0]].append(name)
    queues = [iter(names) for names in files.values()]
    while queues:
        for queue in list(queues):
            name = next(queue, None)
            if name is None:
                queues.remove(queue)
            else:
                yield name


def within(names: Iterable[str], times: dict[str, float], budget: float) -> list[str]:
    """The first tests whose durations add up to no more than a budget, at least one."""
    kept: list[str] = []
    for name in names:
        if kept and times[name] > budget:
            continue
        kept.append(name)
        budget -= times[name]
        if budget <= 0:
            break
    return kept
