"""Runs or reports the study.

    python -m experiments.benchmarks.time_to_target --size small --core 1 --data-dir …

The same command goes on after the runs that are finished. JAX and the machine's linear
algebra read their number of threads when they are loaded, which is after ``--core``.
"""

import os
import sys
from collections.abc import Sequence

import tyro

from experiments.benchmarks.time_to_target.config import Study
from experiments.errors import ConfigError, ExperimentError
from experiments.progress import ended

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def use_core(core: int) -> None:
    """Keeps this process on one core, with one thread for an operation."""
    allowed = os.sched_getaffinity(0)
    if core not in allowed:
        raise ConfigError(f"core is {core}; this process may use {sorted(allowed)}.")
    os.sched_setaffinity(0, {core})
    flags = os.environ.get("XLA_FLAGS", "")
    if ONE_THREAD not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {ONE_THREAD}".strip()


def main(argv: Sequence[str] | None = None) -> int:
    study = tyro.cli(Study, args=argv, prog="time_to_target")
    try:
        if study.core is not None and not study.report:
            use_core(study.core)
        from experiments.benchmarks.time_to_target.report import save_report
        from experiments.benchmarks.time_to_target.study import run_study
        from experiments.progress import open_console

        console = open_console()
        if not study.report:
            run_study(study, console)
        save_report(study, console)
    except ExperimentError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
