"""Command line: ``python -m experiments.main train --help``."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from experiments.configs import DATASETS, MODELS, TrainConfig, default_config
from experiments.configs.cost import CostConfig
from experiments.configs.train import OptimizerName
from experiments.configs.tune import TuneConfig, default_tuning
from experiments.errors import ExperimentError
from experiments.progress import ended, open_console
from experiments.studies.commands import (
    Command,
    choose,
    parse_study,
    run_study,
)
from experiments.studies.study import Study
from experiments.survey.commands import Command as SurveyCommand
from experiments.survey.commands import parse_survey, run_command

PROGRAM = "python -m experiments.main"
COMMANDS = {
    "train": "Trains every listed optimiser from the same start; table and plots.",
    "report": "Makes the table and the plots of a run folder again.",
    "cost": "Counts elements, bytes, operations and memory, from shapes alone.",
    "study": "Runs a study of damping, intervals, batch size, ..., or reports one.",
    "survey": "Curvature matrices of many networks; their table, page and queries.",
    "tune": "Searches an optimiser's hyper-parameters.",
}


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Makes the table and the plots of a run folder again."""

    workdir: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    baseline: OptimizerName = "adam"
    """The optimiser whose best training loss the others are measured by."""


def parse(
    arguments: Sequence[str],
) -> TrainConfig | ReportConfig | CostConfig | TuneConfig | Command | SurveyCommand:
    about = "Trains networks with K-FAC, SGD, Adam and AdamW side by side."
    command, rest = choose(arguments, PROGRAM, about, COMMANDS)
    prog = f"{PROGRAM} {command}"
    if command == "study":
        return parse_study(rest, prog)
    if command == "survey":
        return parse_survey(rest, prog)
    if command in ("report", "cost"):
        kind = {"report": ReportConfig, "cost": CostConfig}[command]
        return tyro.cli(kind, prog=prog, args=rest)
    make = {"tune": default_tuning, "train": default_config}[command]
    default = make(*names_in(rest))
    return tyro.cli(type(default), prog=prog, default=default, args=rest)


def names_in(arguments: Sequence[str]) -> tuple[str, str]:
    """Reads the data set and the model, which decide the other options' defaults.

    A wrong name is left to the real parser, which knows how to tell it.
    """
    names: dict[str, tuple[str, tuple[str, ...]]] = {
        "--dataset": ("mnist5k", DATASETS),
        "--model": ("mlp", MODELS),
    }
    found = []
    for option, (default, known) in names.items():
        given = [a.removeprefix(f"{option}=") for a in arguments if f"{option}=" in a]
        pairs = zip(arguments, arguments[1:], strict=False)
        given += [value for name, value in pairs if name == option]
        found.append(given[0] if given else default)
        if found[-1] not in known:
            return "mnist5k", "mlp"
    return found[0], found[1]


def report(folder: Path, baseline: str, console: Console) -> None:
    """Prints the table and writes the plots."""
    from experiments import reports  # JAX starts here, not for --help

    runs = reports.read_runs(folder)
    console.print(reports.make_table(runs, baseline))
    for path in reports.save_plots(runs, folder):
        console.print(f"Plot: {path}", soft_wrap=True, highlight=False)


def train_and_report(config: TrainConfig, console: Console) -> list[str]:
    """Trains, alone or with other processes; the first one reports."""
    from experiments import processes

    with processes.together():
        from experiments.train import train

        if not processes.is_first():
            console = Console(quiet=True)
        folder, problems = train(config, console)
        if processes.is_first():
            report(folder, config.baseline, console)
    return problems


def continuation(config: Any) -> str:
    """Says what the same command does after an interruption."""
    again = "The same command continues from the last checkpoint."
    if isinstance(config, TrainConfig):
        from experiments import checkpoints

        folder = config.folder()
        if any(map(checkpoints.complete, folder.glob("*/checkpoints"))):
            return again
        return (
            f"There is no checkpoint in {folder} yet: the same command begins anew. "
            f"The first one is written after {config.checkpoint_steps} steps "
            "(--checkpoint-every)."
        )
    lasting = isinstance(config, (Study, TuneConfig))
    return again if lasting else ""


def main(arguments: Sequence[str] | None = None) -> int:
    console = open_console()
    errors, config = Console(stderr=True), None
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        if isinstance(config, ReportConfig):
            report(config.workdir, config.baseline, console)
            return 0
        if isinstance(config, CostConfig):
            from experiments import cost

            cost.run(config, console)
            return 0
        if isinstance(config, TuneConfig):
            from experiments.tuning.worker import search

            search(config, console)
            return 0
        if isinstance(config, SurveyCommand):
            problems = run_command(config, console)
        elif isinstance(config, TrainConfig):
            problems = train_and_report(config, console)
        else:
            return run_study(config, console)
    except ExperimentError as error:
        errors.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        return 2
    except KeyboardInterrupt:
        errors.print(f"Interrupted. {continuation(config)}", soft_wrap=True)
        return 130
    for problem in problems:
        errors.print(f"error: {problem}", style="red", soft_wrap=True, markup=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(ended(main))
