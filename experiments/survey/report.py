"""The page of the survey: HTML, Markdown, plots, and its table as Parquet.

    python -m experiments.main survey report --folder <folder>

Everything is made from the records of the finished runs; nothing is measured.
"""

from rich.console import Console

from experiments.errors import MetricsError
from experiments.studies.pages import Page, markdown_part, save_page
from experiments.studies.records import ask, commits, machines
from experiments.survey import agreement, gap, sections
from experiments.survey.config import SurveyReport
from experiments.survey.prediction import Records
from experiments.survey.queries import PARQUET, open_survey, save_survey, source_of

CONFIG = "SELECT config FROM survey LIMIT 1"


def save_report(config: SurveyReport, console: Console) -> None:
    """Prints the answer and writes page and plots, and the table if it was not one.

    Args:
        config: what to report.
        console: where to print.

    Raises:
        MetricsError: if there are no runs.
    """
    out = config.out or config.folder
    source = source_of(config.folder)
    with open_survey(config.folder) as base:
        shared = ask(base, CONFIG)
        if not shared:
            raise MetricsError(f"{source} holds no finished run.")
        out.mkdir(parents=True, exist_ok=True)
        ran = sections.what_was_run(base)
        answers, table = gap.gap_sections(Records(base), out)
        parts = (
            ran,
            sections.eigenvalues(base, out),
            agreement.agreement(base, out),
            agreement.errors(base, out),
            *answers,
            sections.columns(),
        )
    if source == config.folder:
        save_survey(config.folder, out / PARQUET)
        console.print(f"Table: {out / PARQUET}", soft_wrap=True, highlight=False)
    made_with = machines(source), commits(source)
    page = Page("Survey", parts, shared[0]["config"], *made_with)
    for section in (ran, answers[0]):
        console.print(section.parts[0], markup=False, highlight=False)
    text = markdown_part(table)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    for path in save_page(page, out):
        console.print(f"Page: {path}", soft_wrap=True, highlight=False)
