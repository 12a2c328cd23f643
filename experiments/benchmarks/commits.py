"""Which commit of the code a measurement was made with."""

import contextlib
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
# Where this folder lies in the repository; a copy elsewhere, such as one installed into
# an environment inside another repository, has no commit.
PLACE = "experiments/benchmarks/"


def commit(folder: Path = HERE, place: str = PLACE) -> str | None:
    """The commit of a checkout, as git says it.

    Files that git does not track and those in folders called ``results``, which the
    measurements themselves write, do not count as modified.
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if git(folder, "rev-parse", "--show-prefix") != place:
            return None
        found = git(folder, "rev-parse", "--short", "HEAD")
        kept = (":(top)", ":(top,exclude,glob)**/results/**")
        changed = git(folder, "status", "--porcelain", "-uno", "--", *kept)
        return f"{found}, modified" if changed else found
    return None


def git(folder: Path, *arguments: str) -> str:
    """What git prints, without spaces around it."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()
