"""A cell of the matrix: its environment, its tests, its row of results."""

import dataclasses
import json
import shutil
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from tests.matrix.sources import MatrixError, lower_bound, requirements, run

PINNED = ("chex", "flax", "jax", "jaxlib", "numpy", "optax", "scipy")
# What the tests of SMOKE import besides the package.
NEEDED = (
    "beartype",
    "dm-haiku",
    "equinox",
    "flax",
    "hypothesis",
    "jaxtyping",
    "orbax-checkpoint",
    "pytest",
    "rich",
    "tyro",
)
SMOKE = (
    "tests/test_public_api.py",
    "tests/optimizer/test_transform.py",
    "tests/fuzz",
    "tests/optimizer/test_checkpoint.py",
    "tests/distributed/test_parallel.py",
    "tests/experiments/test_readme.py::test_quickstart",
)
COUNTS = ("passed", "failed", "errors", "skipped")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One interpreter with one set of packages."""

    interpreter: str
    python: str
    packages: str
    suite: str
    sources: str

    @property
    def title(self) -> str:
        """Its name in tables and of its log."""
        return f"{self.python}-{self.packages}-{self.suite}"

    def is_that_of(self, row: dict[str, Any]) -> bool:
        """Whether a row of the result file says that this cell passed."""
        same = (self.python, self.packages, self.suite, self.sources)
        found = tuple(
            row.get(name) for name in ("python", "packages", "suite", "sources")
        )
        return same == found and succeeded(row)


def succeeded(row: dict[str, Any]) -> bool:
    """Whether a cell ran tests, and none of them failed."""
    return bool(row["passed"]) and not (row["failed"] or row["errors"])


def to_install(cell: Cell, wheel: Path) -> list[str]:
    """What pip installs into the environment of a cell.

    Args:
        cell: the cell.
        wheel: the built package.

    Returns:
        Arguments of ``pip install``.
    """
    known = requirements()
    if cell.suite == "full":
        arguments = [f"{wheel}[dev]"]
    else:
        arguments = [str(wheel), *(str(known[name]) for name in NEEDED)]
    if cell.packages == "oldest":
        arguments += [f"{name}=={lower_bound(known[name])}" for name in PINNED]
    elif cell.packages != "newest":
        arguments += [f"{name}=={cell.packages}.*" for name in ("jax", "jaxlib")]
    return arguments


def installed(python: Path) -> dict[str, str]:
    """The versions of the pinned packages in an environment."""
    command = [str(python), "-m", "pip", "list", "--format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {row["name"].lower(): row["version"] for row in json.loads(done.stdout)}
    return {name: found[name] for name in PINNED if name in found}


def counts(report: Path) -> dict[str, int]:
    """Reads how many tests passed, failed, could not run and were skipped.

    Args:
        report: the JUnit file of pytest.

    Returns:
        The numbers by the names of `COUNTS`.
    """
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    found = {
        name: int(suite.get(key, 0))
        for name, key in zip(COUNTS[1:], ("failures", "errors", "skipped"), strict=True)
    }
    return {"passed": int(suite.get("tests", 0)) - sum(found.values())} | found


def pytest_command(cell: Cell, python: Path, report: Path, cache: Path) -> list[str]:
    """The call of pytest in a cell."""
    selected = list(SMOKE) if cell.suite == "smoke" else ["tests"]
    options = ["-q", "-ra", f"--junitxml={report}", "-o", f"cache_dir={cache}"]
    return [str(python), "-m", "pytest", *options, *selected]


def run_cell(
    cell: Cell, folder: Path, wheel: Path, tree: Path, minutes: float
) -> dict[str, Any]:
    """Makes the environment of a cell and runs the tests in it.

    Args:
        cell: the cell.
        folder: environments and logs.
        wheel: the built package.
        tree: the folder with the tests.
        minutes: how long the tests may take.

    Returns:
        The row of the result file.

    Raises:
        MatrixError: if the environment cannot be made, or pytest does not run.
    """
    log = folder / f"{cell.title}.log"
    log.unlink(missing_ok=True)
    environment = folder / f"{cell.title}.venv"
    shutil.rmtree(environment, ignore_errors=True)
    python = environment / "bin" / "python"
    run([cell.interpreter, "-m", "venv", environment], log, tree)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Building one of these from source would hide that a bound has no wheel.
    install.append(f"--only-binary={','.join(PINNED)}")
    run([*install, *to_install(cell, wheel)], log, tree)
    report = folder / f"{cell.title}.xml"
    report.unlink(missing_ok=True)
    # Programs compiled by one jaxlib are shared between Pythons.
    cache = folder / f"cache-{cell.packages}"
    start = time.perf_counter()
    command = pytest_command(cell, python, report, cache)
    run(command, log, tree, 60 * minutes, allowed=(0, 1, 2))
    if not report.exists():
        raise MatrixError(f"pytest wrote no report; see {log}")
    row = {name: getattr(cell, name) for name in ("python", "packages", "suite")}
    row |= {"sources": cell.sources, "versions": installed(python)}
    row |= counts(report) | {"seconds": round(time.perf_counter() - start)}
    if succeeded(row):
        shutil.rmtree(environment, ignore_errors=True)
    return row
