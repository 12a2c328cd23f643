"""The page of the survey: HTML, Markdown, plots, and its table as Parquet.

    python -m experiments.main survey report --folder <folder>

Everything is made from the records of the finished runs; nothing is measured.
"""

from rich.console import Console

from experiments.errors import MetricsError
from experiments.studies.pages import Page, Section, Table, markdown_part, save_page
from experiments.studies.records import ask, commits, machines
from experiments.survey import agreement, gap, sections
from experiments.survey.config import SurveyReport
from experiments.survey.prediction import Records
from experiments.survey.queries import PARQUET, open_survey, save_survey, source_of

CONFIG = "SELECT config FROM survey LIMIT 1"


def save_report(config: SurveyReport, console: Console) -> None:
    """Prints the answer and writes page and plots, and the table if it was not one."""
    out = config.out or config.folder
    source = source_of(config.folder)
    with open_survey(config.folder) as base:
        shared = ask(base, CONFIG)
        if not shared:
            raise MetricsError(f"{source} holds no finished run.")
        out.mkdir(parents=True, exist_ok=True)
        records = Records(base)
        parts = (
            sections.what_was_run(base),
            sections.eigenvalues(base, out),
            agreement.agreement(base, out),
            agreement.errors(base, out),
            gap.at_the_end(records, out),
            gap.stand_ins(records),
            gap.early(records),
            sections.columns(),
        )
    paths = []
    if source == config.folder:
        paths.append(out / PARQUET)
        save_survey(config.folder, out / PARQUET)
    made_with = machines(source), commits(source)
    page = Page("Survey", parts, shared[0]["config"], *made_with)
    for section in parts[:-1]:
        tell(section, console)
    for path in (*save_page(page, out), *paths):
        console.print(f"Written: {path}", soft_wrap=True, highlight=False)


def tell(section: Section, console: Console) -> None:
    """Prints what a section says first; of the answer on the gap its table, too."""
    console.print(section.title, style="bold", markup=False, highlight=False)
    console.print(section.parts[0], markup=False, highlight=False)
    if section.title == gap.TITLE:
        for part in section.parts:
            if isinstance(part, Table):
                text = markdown_part(part)
                console.print(text, markup=False, highlight=False, soft_wrap=True)
