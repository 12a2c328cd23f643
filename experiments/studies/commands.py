"""The ``study`` commands of the command line; JAX starts only when one runs."""

import argparse
import os
from collections.abc import Sequence

import tyro
from rich.console import Console

from experiments.studies.sizes import SIZES, IntervalReport, IntervalStudy

HOST_DEVICES = "--xla_force_host_platform_device_count"
Command = IntervalStudy | IntervalReport


def parse_study(arguments: Sequence[str], prog: str) -> Command:
    """Parses what follows ``study``.

    Args:
        arguments: name of the study, then its options.
        prog: the program's name in the help.

    Returns:
        The configuration.
    """
    names = argparse.ArgumentParser(
        prog=prog, epilog=f"The options of a study: {prog} intervals --help"
    )
    names.add_argument("study", choices=("intervals", "intervals-report"))
    study = names.parse_args(arguments[:1]).study
    rest = list(arguments[1:])
    if study == "intervals-report":
        return tyro.cli(IntervalReport, prog=f"{prog} {study}", args=rest)
    sizes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    sizes.add_argument("--size", default="small")
    size = sizes.parse_known_args(rest)[0].size
    # A wrong name is left to the real parser, which knows how to tell it.
    default = SIZES.get(size, SIZES["small"])
    return tyro.cli(IntervalStudy, prog=f"{prog} {study}", default=default, args=rest)


def run_study(config: Command, console: Console) -> int:
    """Runs a study, or reports one.

    Args:
        config: from `parse_study`.
        console: where to print.

    Returns:
        The exit status.
    """
    if isinstance(config, IntervalStudy):
        set_host_devices(config.host_devices)
        from experiments.studies.intervals import run_intervals

        run_intervals(config, console)
        file, out = config.out, config.out.parent
        report = IntervalReport(file=file, out=out)
    else:
        report = config
    from experiments.studies.interval_report import save_report

    save_report(report, console)
    return 0


def set_host_devices(count: int | None) -> None:
    """Splits the CPU into devices; JAX reads this when it is first used.

    Args:
        count: how many; None leaves everything as it is.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if count is not None and HOST_DEVICES not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {HOST_DEVICES}={count}".strip()
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
