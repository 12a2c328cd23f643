"""The ``study`` commands of the command line; JAX starts only when one runs."""

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from experiments.studies.batch_size import config as batch_size
from experiments.studies.bayes import config as bayes
from experiments.studies.damping import config as damping
from experiments.studies.intervals import config as intervals
from experiments.studies.pinn import config as pinn
from experiments.studies.study import Report, Study

HOST_DEVICES = "--xla_force_host_platform_device_count"
# Name to configurations by size, and to the report. A study's folder has its name.
STUDIES: dict[str, Mapping[str, Study]] = {
    "intervals": intervals.SIZES,
    "damping": damping.SIZES,
    "batch-size": batch_size.SIZES,
    "pinn": pinn.SIZES,
    "bayes": bayes.SIZES,
}
REPORTS: dict[str, type[Any]] = {
    "intervals-report": intervals.IntervalReport,
    "damping-report": damping.DampingReport,
    "batch-size-report": batch_size.BatchReport,
    "pinn-report": pinn.PinnReport,
    "bayes-report": bayes.BayesReport,
}
Command = Study | Report | intervals.IntervalReport


def choose(
    arguments: Sequence[str], prog: str, about: str, commands: Mapping[str, str]
) -> tuple[str, list[str]]:
    """The first argument, one of some commands, and the others.

    Args:
        arguments: of the command line.
        prog: the program in the help.
        about: what it does.
        commands: what each does, by name.
    """
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {text}" for name, text in commands.items()]
    first = next(iter(commands))
    lines += ["", f"The options of one: {prog} {first} --help"]
    names: Any = Literal[tuple(commands)]  # pyright: ignore[reportInvalidTypeForm]
    kind: Any = Annotated[names, tyro.conf.Positional]
    found = tyro.cli(
        kind,
        prog=prog,
        description="\n".join([about, "", *lines]),
        args=list(arguments[:1]),
    )
    return found, list(arguments[1:])


def summary(config: Any) -> str:
    """The first line of a configuration's docstring."""
    return (config.__doc__ or "").strip().split("\n")[0]


def parse_study(arguments: Sequence[str], prog: str) -> Command:
    """Parses what follows ``study``."""
    commands = {name: summary(kinds["small"]) for name, kinds in STUDIES.items()}
    commands |= {name: summary(kind) for name, kind in REPORTS.items()}
    about = "Runs a study, or makes the table and the plots of one again."
    name, rest = choose(arguments, prog, about, commands)
    if name in REPORTS:
        return tyro.cli(REPORTS[name], prog=f"{prog} {name}", args=rest)
    return of_size(rest, STUDIES[name], f"{prog} {name}")


def of_size(
    arguments: Sequence[str], known: Mapping[str, Any], prog: str, about: str = ""
) -> Any:
    """Parses a study's options; the defaults are those of its ``--size``."""
    given = list(arguments)
    found = [b for a, b in zip(given, given[1:], strict=False) if a == "--size"]
    found += [a.split("=", 1)[1] for a in given if a.startswith("--size=")]
    default = known.get(found[0] if found else "small", known["small"])
    more: Any = {"description": about} if about else {}
    return tyro.cli(type(default), prog=prog, default=default, args=given, **more)


def run_study(config: Any, console: Console) -> int:
    """Runs a study and reports it, or reports one."""
    for name, sizes in STUDIES.items():
        folder, report = name.replace("-", "_"), REPORTS[f"{name}-report"]
        package = f"experiments.studies.{folder}"
        if isinstance(config, type(sizes["small"])):
            set_host_devices(getattr(config, "host_devices", None))
            run = getattr(importlib.import_module(f"{package}.run"), f"run_{folder}")
            out: Path = run(config, console)
            config = report(out)
        if isinstance(config, report):
            importlib.import_module(f"{package}.report").save_report(config, console)
    return 0


def set_host_devices(count: int | None) -> None:
    """Splits the CPU into devices; JAX reads this when it is first used."""
    flags = os.environ.get("XLA_FLAGS", "")
    if count is not None and HOST_DEVICES not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {HOST_DEVICES}={count}".strip()
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
