"""The further parts of the Bayesian study's page: active learning, regression."""

from pathlib import Path

import numpy as np

from experiments.studies.bayes.answer import p_text
from experiments.studies.bayes.config import ACTIVE, REGRESSION
from experiments.studies.bayes.plots import (
    ACTIVE_TITLES,
    REGRESSION_TITLES,
    plot_active,
    plot_regression,
)
from experiments.studies.bayes.regression import truth
from experiments.studies.bayes.results import Record, compare, standard_error
from experiments.studies.pages import NOTHING, Plot, Section, Table

LEARNED = (
    "The network is trained anew on all labelled images after every round; the first "
    "ones of a seed are the same for all. Hyper-parameters were set by hand, not "
    "searched. Area: mean test accuracy over all rounds. Differences are to noisy "
    "K-FAC with a random order, with Welch's two-sided test."
)
SYNTHETIC = (
    "Synthetic data of a fixed seed: noisy values of a cubic with a gap. The "
    "observations' noise is known. Mean standard deviations of the function, the noise "
    "taken off, where there are data, in the gap and outside. A single run each."
)


def active_section(records: list[Record], out: Path) -> Section | None:
    """Active learning; None if it has not been run."""
    found = {
        name: [r for r in records if r["kind"] == "active" and r["method"] == name]
        for name in ACTIVE
    }
    found = {name: runs for name, runs in found.items() if runs}
    if not found:
        return None
    path = out / "active.png"
    plot_active(found, path)
    base = found.get("active_random")
    rows = []
    for name, runs in found.items():
        areas, last = areas_of(runs), np.array([r["accuracy"][-1] for r in runs])
        against = None if base is None or runs is base else areas_of(base)
        seen = None if against is None else compare(areas, against)
        rows.append(
            (
                ACTIVE_TITLES[name],
                str(len(runs)),
                percent(last),
                percent(areas),
                NOTHING if seen is None else f"{100 * seen.difference:+.2f}",
                NOTHING if seen is None else p_text(seen.p),
            )
        )
    header = ("method", "runs", "accuracy at the end, %", "area, %", "Δ area", "")
    picture = Plot(path, "Test images against labelled images, with standard errors")
    return Section("Active learning", (LEARNED, Table(header, tuple(rows)), picture))


def areas_of(runs: list[Record]) -> np.ndarray:
    """Mean accuracy over the rounds, by run."""
    return np.array([np.mean(run["accuracy"]) for run in runs])


def percent(values: np.ndarray) -> str:
    """Mean and standard error in points of a hundred."""
    error = standard_error(values)
    mean = f"{100 * values.mean():.2f}"
    return mean if error is None else f"{mean} ± {100 * error:.2f}"


def regression_section(records: list[Record], out: Path) -> Section | None:
    """The regression example; None if it has not been run."""
    found = {r["method"]: r for r in records if r["kind"] == "regression"}
    found = {name: found[name] for name in REGRESSION if name in found}
    if not found:
        return None
    path = out / "regression.png"
    plot_regression(found, truth, path)
    rows = tuple(
        (
            REGRESSION_TITLES[name],
            f"{record['precision']:.3g}",
            *(f"{record['where'][key]:.3f}" for key in ("data", "gap", "outside")),
        )
        for name, record in found.items()
    )
    header = ("method", "prior precision", "at data", "in the gap", "outside")
    picture = Plot(path, "Predicted mean and two standard deviations")
    return Section("Regression", (SYNTHETIC, Table(header, rows), picture))
