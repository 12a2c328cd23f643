"""What is tested: the checkout's requirements and files, and the wheel."""

import configparser
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


class MatrixError(Exception):
    """A cell that could not be tested: what went wrong, and where its log is."""


def requirements() -> dict[str, Requirement]:
    """The requirements in ``setup.cfg``, of the package and its extras, by name."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = parser["options.extras_require"].values()
    lines = "\n".join([parser["options"]["install_requires"], *extras]).split("\n")
    found = [Requirement(line) for line in lines if line.strip()]
    return {r.name: r for r in found if r.name != "kfac_jax_lite"}


def lower_bound(requirement: Requirement) -> str:
    """The oldest version that a requirement allows, such as ``0.2.7``."""
    bounds = [s.version for s in requirement.specifier if s.operator == ">="]
    if len(bounds) != 1:
        raise MatrixError(f"setup.cfg gives {requirement} no single lower bound.")
    return bounds[0]


def tracked() -> list[Path]:
    """Files of the checkout, without ignored ones, relative to it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = sorted(set(done.stdout.split("\0")) - {""})
    return [Path(name) for name in names if (ROOT / name).is_file()]


def digest(files: Iterable[Path]) -> str:
    """Identifies the package and its requirements: 12 digits of a SHA-256."""
    total = hashlib.sha256()
    for path in files:
        if path.parts[0] == "kfac_jax_lite" or path == Path("setup.cfg"):
            content = hashlib.sha256((ROOT / path).read_bytes()).hexdigest()
            total.update(f"{path.as_posix()} {content}\n".encode())
    return total.hexdigest()[:12]


def copy(files: Iterable[Path], folder: Path) -> None:
    """Copies files of the checkout into a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in files:
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, place)


def build(files: list[Path], folder: Path) -> Path:
    """Builds the wheel from a copy of the checkout.

    Args:
        files: the files of the checkout.
        folder: where copy and wheel go.

    Returns:
        The wheel.
    """
    source, dist = folder / "source", folder / "dist"
    copy(files, source)
    shutil.rmtree(dist, ignore_errors=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run([*command, "--outdir", dist], folder / "build.log", source)
    shutil.rmtree(source)
    (wheel,) = dist.glob("*.whl")
    return wheel


def run(
    command: Sequence[Any],
    log: Path,
    folder: Path,
    seconds: float | None = None,
    allowed: tuple[int, ...] = (0,),
) -> None:
    """Runs a command, its output appended to a log.

    Args:
        command: the command.
        log: the file.
        folder: where it runs.
        seconds: how long it may take.
        allowed: exit codes that are no errors.

    Raises:
        MatrixError: if it ends with another code, or not in time.
    """
    words = [str(word) for word in command]
    unset = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    with log.open("a") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        try:
            code = subprocess.run(
                words,
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise MatrixError(f"not done in {seconds:.0f} s; see {log}") from error
    if code not in allowed:
        raise MatrixError(f"{words[0]} ended with code {code}; see {log}")
