"""The survey's page and queries, on records whose structure is known."""

import copy
import io
import itertools
import json
import re
from pathlib import Path

import duckdb
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from experiments.errors import ExperimentError, MetricsError
from experiments.studies.pages import PNG
from experiments.survey import gap
from experiments.survey import report as pages
from experiments.survey.config import MATRICES, SurveyQuery, SurveyReport
from experiments.survey.gap import Predictor, Records
from experiments.survey.queries import open_survey, run_query, save_survey
from experiments.survey.report import FIRST, LAST, save_report, squares
from tests.experiments.survey_records import (
    COSINES,
    SETTINGS,
    STEPS,
    make_run,
    make_runs,
    write_runs,
)


@pytest.fixture(autouse=True, scope="module")
def few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gap, "RESAMPLES", 200)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Plots are made and not drawn: layout is what takes long."""
    monkeypatch.setattr(pages, "write", lambda figure, path: path.write_bytes(PNG))


@pytest.fixture(scope="module")
def runs():
    return make_runs()


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("survey"), runs)


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    return out, report(folder, out)


@pytest.fixture(scope="module")
def records(folder):
    with open_survey(folder) as base:
        return Records(base)


def report(folder, out=None):
    """What is printed."""
    console = Console(file=io.StringIO(), width=110)
    save_report(SurveyReport(folder, out), console)
    return console.file.getvalue()


def ask(folder, sql):
    console = Console(file=io.StringIO(), width=110)
    run_query(SurveyQuery(sql, folder), console)
    return console.file.getvalue()


def table_of(text, caption):
    """The rows of a table of a Markdown page, dicts by the titles of the columns."""
    lines = text[text.index(caption) :].split("\n")[2:]
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    cells = [[c.strip() for c in line[1:-1].split(" | ")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def by_cell(runs):
    """The runs of every cell."""
    found = {}
    for run in runs:
        found.setdefault((run["dataset"], run["model"]), []).append(run)
    return list(found.values())


def last_of(run, matrix, step=STEPS[-1]):
    (row,) = (
        row
        for row in run["rows"]
        if (row["step"], row["matrix"], row["approximation"]) == (step, matrix, "full")
    )
    return row | {"lambda_max": row["eigenvalues"][0]}


def gap_of(run):
    row = last_of(run, "hessian")
    return row["test_loss"] - row["train_loss"]


def tau(x, y):
    return scipy.stats.kendalltau(x, y).statistic


@pytest.mark.parametrize("measure", [*gap.MEASURES, *gap.OTHERS])
@pytest.mark.parametrize("early", [False, True], ids=["last", "early"])
def test_tau_is_the_mean_over_cells(measure, early, runs, records):
    """Within cells, against scipy on the records themselves."""
    step = STEPS[1] if early else STEPS[-1]
    matrices = [None] if measure in gap.OTHERS else MATRICES
    for matrix in matrices:
        values = [
            tau(
                [last_of(run, matrix or "fisher", step)[measure] for run in cell],
                [gap_of(run) for run in cell],
            )
            for cell in by_cell(runs)
        ]
        wanted = Predictor(measure, matrix, early=early)
        found = records.correlate(wanted, gap.plain)
        assert (found.cells, found.runs) == (6, 48)
        assert found.found.value == pytest.approx(np.mean(values), abs=1e-6)


def test_planted_measures(runs, records):
    """One orders the gap inside cells, and against it between them; one is blind."""
    flat = [(last_of(run, "hessian")["trace"], gap_of(run)) for run in runs]
    assert tau(*zip(*flat, strict=True)) < -0.5  # what the cells must not add
    for matrix in MATRICES:
        for rule in (gap.plain, gap.one_at_a_time, gap.given_loss):
            trace = records.correlate(Predictor("trace", matrix), rule)
            assert trace.found == pytest.approx((1, 1, 1)) and trace.decided
        norm = records.correlate(Predictor("frobenius", matrix), gap.plain)
        assert norm.found == pytest.approx((-1, -1, -1)) and norm.decided
        blind = records.correlate(Predictor("stable_rank", matrix), gap.plain)
        assert blind.found.low < 0 < blind.found.high and not blind.decided


def test_interval_is_a_bootstrap_over_cells(runs, records):
    values = [
        tau(
            [last_of(run, "fisher")["log_det"] for run in cell],
            [gap_of(run) for run in cell],
        )
        for cell in by_cell(runs)
    ]
    wanted = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=5000, rng=0
    ).confidence_interval
    found = records.correlate(Predictor("log_det", "fisher"), gap.plain)
    assert found.found[1:] == pytest.approx((wanted.low, wanted.high), abs=0.06)


def test_other_coefficients(runs, records):
    """One hyper-parameter at a time, and given the training loss, from definitions."""
    single, given = [], []
    for cell in by_cell(runs):
        x = [last_of(run, "fisher")["log_det"] for run in cell]
        y = [gap_of(run) for run in cell]
        z = [last_of(run, "fisher")["train_loss"] for run in cell]
        psi = {name: [] for name in SETTINGS[0]}
        for a, b in itertools.combinations(range(len(cell)), 2):
            differ = [n for n in psi if cell[a][n] != cell[b][n]]
            if len(differ) == 1:
                psi[differ[0]].append(np.sign((x[a] - x[b]) * (y[a] - y[b])))
        single.append(np.mean([np.mean(signs) for signs in psi.values()]))
        xy, xz, yz = tau(x, y), tau(x, z), tau(y, z)
        given.append((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))
    wanted = Predictor("log_det", "fisher")
    found = records.correlate(wanted, gap.one_at_a_time)
    assert found.found.value == pytest.approx(np.mean(single))
    found = records.correlate(wanted, gap.given_loss)
    assert found.found.value == pytest.approx(np.mean(given))


def test_agreement(folder):
    with open_survey(folder) as base:
        for when in (FIRST, LAST):
            found = squares(base, "cosines", when, "dataset")
            assert set(found) == {"digits", "wine", "mnist"}
            for square in found.values():
                np.testing.assert_allclose(square, COSINES, atol=1e-6)
            (square,) = squares(base, "subspace_overlaps", when, "'all'").values()
            np.testing.assert_allclose(square, COSINES**2, atol=1e-6)


def test_page(page):
    out, printed = page
    text = (out / "page.md").read_text()
    assert "48 runs of 6 cells (3 data sets, 2 models)" in printed
    assert "48 runs of 6 cells (3 data sets, 2 models)" in text
    assert (out / "page.html").stat().st_size < 500_000
    assert {path.name for path in out.glob("*.png")} == {
        "agreement.png", "agreement_datasets.png", "errors.png", "taus.png",
        "eigenvalues_digits.png", "eigenvalues_mnist.png", "eigenvalues_wine.png",
    }  # fmt: skip
    assert "Hessian in 48 of 48 runs" in text
    assert "Fisher – MC Fisher are most alike (0.95)" in text
    assert "Hessian – gradient covariance least (0.09)" in text
    assert "Kronecker 0.40 to 0.40" in text and "0 of 12 medians are 1" in text
    assert "farthest from 0 is the trace of the Hessian, +1.00" in text
    assert "diagonal differs by" in text and "Hessian, +1.00" in text
    pairs = table_of(text, "Means over runs")
    assert pairs[2]["matrices"] == "Hessian – gradient covariance"
    assert pairs[2]["cosine, last checkpoint"] == "0.30" and pairs[2]["runs"] == "48"
    last = table_of(text, "At the last checkpoint, median")
    assert len(last) == 12 and last[2]["approximation"] == "diagonal"
    assert last[2]["error, Frobenius"] == "0.8 (0.8 to 0.8)"
    first = table_of(text, "At the first checkpoint, median")
    assert first[2]["error, Frobenius"] == "0.4 (0.4 to 0.4)"
    assert first[2]["runs"] == "48" and first[2]["cosine"] == "0.8 (0.8 to 0.8)"
    taus = table_of(text, "Coefficients with the gap")
    assert len(taus) == 35 and taus[0]["measure"] == "trace"
    assert taus[0]["tau"] == r"+1.00 \[+1.00, +1.00\]" and taus[0]["cells"] == "6"
    (loss,) = (row for row in taus if row["measure"] == "training loss")
    assert loss["given the training loss"] == "–"
    (stood,) = (
        row
        for row in table_of(text, "Tau with the gap at the last")
        if (row["measure"], row["matrix"]) == ("trace", "Fisher")
    )
    assert stood["diagonal"] == stood["full"] == taus[0]["tau"]
    early = table_of(text, "Tau with the gap at the end")
    assert early[0]["second checkpoint"] == early[0]["last"] == taus[0]["tau"]


def test_page_of_the_table(runs, tmp_path, undrawn):
    """From Parquet it is the page of the JSON lines, word for word."""
    lines = write_runs(tmp_path / "lines", runs[:4] + runs[8:12])
    out, table = tmp_path / "page", tmp_path / "table"
    printed = report(lines, out)
    assert f"Written: {out / 'survey.parquet'}" in printed
    assert not list(lines.glob("*.p*"))
    table.mkdir()
    (table / "survey.parquet").write_bytes((out / "survey.parquet").read_bytes())
    again = report(table)
    assert (table / "page.md").read_text() == (out / "page.md").read_text()
    assert "+1.00" in again and "survey.parquet" not in again


def test_parquet(folder, tmp_path):
    """For any reader: types, order, one row for each matrix of the records."""
    save_survey(folder, tmp_path / "it's" / "survey.parquet")
    with duckdb.connect() as base:
        table = base.read_parquet(str(tmp_path / "it's" / "survey.parquet"))
        kinds = dict(zip(table.columns, map(str, table.types), strict=True))
        rows = table.fetchall()
    assert len(rows) == 48 * len(STEPS) * 16
    assert kinds["trace"] == "FLOAT" and kinds["eigenvalues"] == "FLOAT[]"
    assert kinds["learning_rate"] == "DOUBLE" and kinds["step"] == "INTEGER"
    assert kinds["machine"].startswith("STRUCT") and "overlaps" not in kinds
    names = list(kinds)
    keys = ("dataset", "model", "run", "step", "matrix", "approximation")
    order = [tuple(row[names.index(name)] for name in keys) for row in rows]
    assert order == sorted(order)
    assert not list(tmp_path.rglob("*.tmp"))


def test_nulls(runs, tmp_path):
    """A run that diverged, and measures that have no value."""
    some = copy.deepcopy(runs[:8])
    for row in some[0]["rows"]:
        if row["step"] == STEPS[-1]:
            row |= {name: None for name, x in row.items() if isinstance(x, float)}
            row["eigenvalues"] = row["cosines"] = row["overlaps"] = None
    for row in some[1]["rows"]:
        row["tic"] = row["sharpness"] = None
        row["eigenvalues"] = [None] * 10
        row["cosines"] = [None, *row["cosines"][1:]]
    for run in some:
        for row in run["rows"]:
            row["log_det"] = None
    report(write_runs(tmp_path, some))
    text = (tmp_path / "page.md").read_text()
    assert "1 of them ended with a loss that is not finite" in text
    taus = table_of(text, "Coefficients with the gap")
    found = {(row["measure"], row["matrix"]): row for row in taus}
    assert found["trace", "Hessian"]["tau"] == "+1.00"  # one cell: no interval
    assert found["trace", "Hessian"]["runs"] == "7"
    assert found["TIC", "Hessian"]["runs"] == "6"
    assert found["largest eigenvalue", "Fisher"]["runs"] == "6"
    assert found["sharpness", "–"]["runs"] == "6"
    assert found["log determinant", "Fisher"]["tau"] == "–"
    assert found["log determinant", "Fisher"]["cells"] == "0"
    pairs = table_of(text, "Means over runs")
    assert pairs[0]["cosine, last checkpoint"] == "0.90"


def only(run, **wanted):
    """The run with some of its rows."""
    rows = [r for r in run["rows"] if all(r[k] in v for k, v in wanted.items())]
    return run | {"rows": rows}


def number(count, steps=STEPS):
    """Runs of one cell."""
    return [make_run("wine", "mlp", i, SETTINGS[i], steps) for i in range(count)]


@pytest.mark.parametrize(
    ("some", "sentences"),
    [
        (number(1), ["1 run of 1 cell", "No cell has 3 runs"]),
        (number(3), ["3 runs of 1 cell", "there are no intervals, for which 5 cells"]),
        (
            number(3, (0,)),
            ["No run has two checkpoints", "No run has a checkpoint between"],
        ),
        (number(3, (0, 10)), ["No run has a checkpoint between its first and its"]),
        (
            [only(run, approximation=("full",)) for run in number(3)],
            ["No approximation was measured", "no approximation was measured beside"],
        ),
        (
            [only(run, approximation=("diagonal",)) for run in number(3)],
            ["No run has a full matrix", "Tau beside that of the full matrix: no"],
        ),
        (
            [only(run, matrix=("fisher", "hessian")) for run in number(3)],
            ["Hessian – Fisher", "the trace of the Hessian, +1.00"],
        ),
    ],
    ids=["one run", "one cell", "one checkpoint", "two checkpoints", "full alone",
         "diagonal alone", "two matrices"],
)  # fmt: skip
def test_little(some, sentences, tmp_path, undrawn):
    """Clear words, and no crash, where there is little."""
    report(write_runs(tmp_path, some))
    text = (tmp_path / "page.md").read_text()
    for sentence in sentences:
        assert sentence in text
    assert not re.search(r"\bnan\b|\binf\b", text)


def test_query(folder, runs):
    text = ask(folder, "SELECT count(*) AS number, '[red]' AS mark FROM survey")
    assert "number" in text and str(48 * 4 * 16) in text and "[red]" in text
    sql = "SELECT eigenvalues[:2] AS two, gap FROM checkpoints WHERE run = {} AND last"
    text = ask(folder, sql.format(f"'{runs[0]['run']}'") + " AND matrix = 'fisher'")
    row = last_of(runs[0], "fisher")
    assert f"[{row['eigenvalues'][0]}, {row['eigenvalues'][1]}]" in text
    assert "Only the first 200 rows" in ask(folder, "FROM survey SELECT step")


def test_queries_of_the_readme(folder):
    readme = Path(__file__).parents[2] / "experiments" / "README.md"
    section = readme.read_text("utf-8").split("## Survey of curvature")[1]
    queries = section.split("```sql\n")[1].split("```")[0].split(";\n")
    found = [ask(folder, query) for query in queries if query.strip()]
    assert len(found) == 3 and all(found)


def test_query_writes_a_file(folder, tmp_path):
    path = tmp_path / "steps.csv"
    ask(folder, f"COPY (SELECT DISTINCT step FROM survey ORDER BY step) TO '{path}'")
    assert path.read_text().split() == ["step", *map(str, STEPS)]


@pytest.mark.parametrize("sql", ["SELECT nothing FROM survey", "SELEC", "FROM other"])
def test_a_wrong_query_is_told_in_one_line(sql, folder):
    with pytest.raises(ExperimentError, match=r"^The query failed: [^\n]+$"):
        ask(folder, sql)


def test_what_is_no_survey(tmp_path):
    with pytest.raises(MetricsError, match="holds no survey: neither JSON lines"):
        report(tmp_path)
    (tmp_path / "survey.parquet").write_bytes(b"none")
    with pytest.raises(MetricsError, match="cannot be read as Parquet"):
        report(tmp_path)
    line = {"kind": "run", "step": 1, "run": "a", "rows": [{"step": 1}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(MetricsError, match=r"is no survey: Binder Error[^\n]+$"):
        report(tmp_path)
