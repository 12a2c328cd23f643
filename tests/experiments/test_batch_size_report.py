"""The batch-size study's statistics, the answer in words, and its page."""

import json
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from experiments.main import main
from experiments.studies.batch_size import report
from experiments.studies.batch_size.config import TINY, BatchReport
from experiments.studies.batch_size.report import estimate, paired, slope
from tests.experiments.batch_runs import write_two_cells

# --------------------------------------------------------------------- the statistics


def test_student_interval():
    values = [0.51, 0.53, 0.50, 0.56, 0.52]
    found = estimate(values)
    low, high = stats.t.interval(
        0.95, len(values) - 1, np.mean(values), stats.sem(values)
    )
    assert found.mean - found.half == pytest.approx(low)
    assert found.mean + found.half == pytest.approx(high)
    assert found.seeds == 5
    assert estimate([0.5]) == (0.5, None, 1)
    with pytest.raises(ValueError, match="empty"):
        estimate([])


def test_the_interval_agrees_with_the_paired_test():
    """The sign is told where Student's paired test has p < 0.05."""
    rng, told = np.random.default_rng(0), set()
    for shift in (0.0, 0.5, 1.0, 2.0, -2.0):
        ours = dict(enumerate(rng.normal(shift, 1, 5)))
        theirs = dict(enumerate(rng.normal(0, 1, 5)))
        found = estimate(list(paired(ours, theirs).values()))
        test = stats.ttest_rel(list(ours.values()), list(theirs.values()))
        assert (found.sign != 0) == (test.pvalue < 0.05)
        told.add(found.sign)
    assert told >= {0, 1}


def test_only_common_seeds_are_paired():
    assert paired({1: 0.5, 2: 0.75}, {2: 0.5, 3: 0.1}) == {2: 0.25}


def test_slope_is_that_of_least_squares():
    rng, sizes, seeds = np.random.default_rng(1), (128, 512, 2048), (1, 2, 3, 4)
    table = rng.normal(size=(len(sizes), len(seeds)))
    leads = {b: dict(zip(seeds, row, strict=True)) for b, row in zip(sizes, table,
             strict=True)}  # fmt: skip
    lines_of = [np.polyfit(np.log2(sizes), column, 1)[0] for column in table.T]
    found = slope(leads)
    assert found is not None
    assert found.mean == pytest.approx(np.mean(lines_of))
    half = stats.t.ppf(0.975, 3) * stats.sem(lines_of)
    assert found.half == pytest.approx(half)
    # The mean of the seeds' slopes is the slope of the means.
    of_means = np.polyfit(np.log2(sizes), table.mean(1), 1)[0]
    assert found.mean == pytest.approx(of_means)
    assert slope({128: {1: 0.5}}) is None
    assert slope({128: {1: 0.5}, 256: {2: 0.5}}) is None


# ------------------------------------------------------------------- answer and page


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (0.1, "beats SGD at batch 64"),
        (-0.1, "loses to SGD at batch 64"),
        (0.0, "cannot be told apart from SGD at batch 64"),
    ],
)
def test_the_answer_is_what_the_numbers_say(shift, words, tmp_path):
    theirs = {1: 0.5, 2: 0.52, 3: 0.51}
    noise = {1: 0.004, 2: -0.004, 3: 0.0}
    ours = {s: a + shift + noise[s] for s, a in theirs.items()}
    write_two_cells(tmp_path, ours, theirs)
    report.save_report(BatchReport(tmp_path), Console(quiet=True))
    page = (tmp_path / "page.md").read_text()
    assert f"K-FAC {words}" in page
    facts = json.loads((tmp_path / "summary.json").read_text())
    assert facts["lead_over_sgd"]["64"]["mean"] == pytest.approx(shift)
    assert facts["slope_per_doubling"] is None


@pytest.mark.parametrize(
    ("grows", "words"),
    [(0.05, "grows with the batch"), (-0.05, "falls with the batch")],
)
def test_the_growth_is_what_the_numbers_say(grows, words, tmp_path):
    theirs = {1: 0.5, 2: 0.52, 3: 0.51}
    for doublings, size in enumerate((64, 128, 256)):
        ours = {s: a + grows * doublings + 1e-3 * s for s, a in theirs.items()}
        write_two_cells(tmp_path, ours, theirs, size)
    found = report.read_results(tmp_path)
    text = report.answer(found, TINY.shared())
    assert words in text
    seen = slope(report.leads(found, "sgd"))
    assert seen is not None
    assert math.isclose(seen.mean, grows, rel_tol=1e-6)


def test_a_single_seed_has_no_interval(tmp_path):
    write_two_cells(tmp_path, {1: 0.6}, {1: 0.5})
    report.save_report(BatchReport(tmp_path), Console(quiet=True))
    page = (tmp_path / "page.md").read_text()
    assert "K-FAC cannot be told apart from SGD" in page
    assert "±" not in next(r for r in page.splitlines() if r.startswith("| 64 |"))


def test_an_empty_folder_has_no_report(tmp_path, capsys):
    assert main(["study", "batch-size-report", "--folder", str(tmp_path)]) == 2
    assert "holds no results" in " ".join(capsys.readouterr().err.split())


def test_the_papers_table_is_beside_ours(tmp_path):
    write_two_cells(tmp_path, {1: 0.6}, {1: 0.5}, 512)
    for path in tmp_path.glob("*.jsonl"):
        text = path.read_text().replace('"dataset": "digits"', '"dataset": "cifar10"')
        path.write_text(text)
    table = report.accuracy_table(report.read_results(tmp_path))
    assert table.header[-3:] == ("paper: SGD", "paper: Adam", "paper: K-FAC")
    assert table.rows[0] == ("512", "2", "50.00", "60.00", "85.00", "81.93", "71.32")
