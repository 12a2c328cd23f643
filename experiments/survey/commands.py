"""The ``survey`` commands of the command line; JAX starts only when one runs."""

from collections.abc import Sequence

import tyro
from rich.console import Console

from experiments.studies.commands import of_size
from experiments.survey.config import SIZES, SurveyConfig, SurveyQuery, SurveyReport

Command = SurveyConfig | SurveyReport | SurveyQuery
OTHERS = {"report": SurveyReport, "query": SurveyQuery}


def parse_survey(arguments: Sequence[str], prog: str) -> Command:
    """Parses what follows ``survey``."""
    rest = list(arguments)
    if rest and rest[0] in OTHERS:
        name = rest[0]
        return tyro.cli(OTHERS[name], prog=f"{prog} {name}", args=rest[1:])
    others = f"{prog} report --help, {prog} query --help"
    about = f"{SurveyConfig.__doc__}\n\nIts results: {others}"
    return of_size(rest, SIZES, prog, about)


def run_command(config: Command, console: Console) -> list[str]:
    """Runs the survey, or looks at its results."""
    if isinstance(config, SurveyReport):
        from experiments.survey.report import save_report

        save_report(config, console)
        return []
    if isinstance(config, SurveyQuery):
        from experiments.survey.queries import run_query

        run_query(config, console)
        return []
    from experiments.survey.run import run_survey

    return run_survey(config, console)
