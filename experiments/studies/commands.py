"""The ``study`` commands of the command line; JAX starts only when one runs."""

import argparse
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from experiments.studies.batch_size.config import SIZES as BATCH_SIZES
from experiments.studies.batch_size.config import BatchReport, BatchStudy
from experiments.studies.bayes.config import SIZES as BAYES_SIZES
from experiments.studies.bayes.config import BayesReport, BayesStudy
from experiments.studies.damping.config import SIZES as DAMPING_SIZES
from experiments.studies.damping.config import DampingReport, DampingStudy
from experiments.studies.intervals.config import (
    SIZES,
    IntervalReport,
    IntervalStudy,
)
from experiments.studies.pinn.config import SIZES as PINN_SIZES
from experiments.studies.pinn.config import PinnReport, PinnStudy

HOST_DEVICES = "--xla_force_host_platform_device_count"
Study = IntervalStudy | DampingStudy | BatchStudy | PinnStudy | BayesStudy
Report = IntervalReport | DampingReport | BatchReport | PinnReport | BayesReport
Command = Study | Report
REPORTS = {
    "intervals-report": IntervalReport,
    "damping-report": DampingReport,
    "batch-size-report": BatchReport,
    "pinn-report": PinnReport,
    "bayes-report": BayesReport,
}
# Name to configurations by size.
STUDIES = {
    "intervals": SIZES,
    "damping": DAMPING_SIZES,
    "batch-size": BATCH_SIZES,
    "pinn": PINN_SIZES,
    "bayes": BAYES_SIZES,
}


# What runs a study and returns its folder, and the report of such a folder.
RUNS: dict[type, tuple[str, Callable[[Path], Report]]] = {
    DampingStudy: ("damping.run.run_damping", DampingReport),
    BatchStudy: ("batch_size.run.run_batch_size", BatchReport),
    PinnStudy: ("pinn.run.run_pinn", PinnReport),
    BayesStudy: ("bayes.run.run_bayes", BayesReport),
}
SAVERS: dict[type, str] = {
    IntervalReport: "interval_report.save_report",
    DampingReport: "damping.report.save_report",
    BatchReport: "batch_size.report.save_report",
    PinnReport: "pinn.report.save_report",
    BayesReport: "bayes.report.save_report",
}


def parse_study(arguments: Sequence[str], prog: str) -> Command:
    """Parses what follows ``study``."""
    names = argparse.ArgumentParser(
        prog=prog,
        description="Runs a study, or makes the table and the plots of one again.",
        epilog=described(
            {name: summary(kinds["small"]) for name, kinds in STUDIES.items()}
            | {name: summary(kind) for name, kind in REPORTS.items()},
            f"The options of a study: {prog} intervals --help",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names.add_argument(
        "study", choices=(*STUDIES, *REPORTS), help="One of those below."
    )
    study = names.parse_args(arguments[:1]).study
    rest = list(arguments[1:])
    if study in REPORTS:
        return tyro.cli(REPORTS[study], prog=f"{prog} {study}", args=rest)
    default = of_size(rest, STUDIES[study])
    return tyro.cli(type(default), prog=f"{prog} {study}", default=default, args=rest)


def described(commands: Mapping[str, str], last: str) -> str:
    """A line for each command, for the help."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {text}" for name, text in commands.items()]
    return "\n".join([*lines, "", last])


def summary(config: Any) -> str:
    """The first line of a configuration's docstring."""
    return (config.__doc__ or "").strip().split("\n")[0]


def of_size(arguments: Sequence[str], known: Mapping[str, Any]) -> Any:
    """The configuration that ``--size`` chooses: the defaults of the rest."""
    sizes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    sizes.add_argument("--size", default="small")
    return known.get(sizes.parse_known_args(arguments)[0].size, known["small"])


def function(path: str) -> Callable[..., Any]:
    """A function by its path under ``experiments.studies``."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(f"experiments.studies.{module}"), name)


def run_study(config: Command, console: Console) -> int:
    if isinstance(config, IntervalStudy):
        set_host_devices(config.host_devices)
        function("intervals.run_intervals")(config, console)
        config = IntervalReport(file=config.out, out=config.out.parent)
    for study, (path, report) in RUNS.items():
        if isinstance(config, study):
            config = report(function(path)(config, console))
    function(SAVERS[type(config)])(config, console)
    return 0


def set_host_devices(count: int | None) -> None:
    """Splits the CPU into devices; JAX reads this when it is first used."""
    flags = os.environ.get("XLA_FLAGS", "")
    if count is not None and HOST_DEVICES not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {HOST_DEVICES}={count}".strip()
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
