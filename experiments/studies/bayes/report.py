"""The page of the Bayesian study: HTML, Markdown, plots, a summary, runs as Parquet.

    python -m experiments.main study bayes-report --folder <folder>

Everything is made from the records of the finished runs; nothing is trained.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments import metrics
from experiments.studies.bayes.answer import NAMES, answer, p_text
from experiments.studies.bayes.config import ADAM, BayesReport
from experiments.studies.bayes.plots import plot_reliability, plot_shift
from experiments.studies.bayes.report_further import active_section, regression_section
from experiments.studies.bayes.results import (
    TITLES,
    Record,
    Result,
    Results,
    comparisons,
    read_all,
    read_results,
    standard_error,
)
from experiments.studies.pages import (
    NOTHING,
    Plot,
    Section,
    Table,
    markdown_part,
    publish,
)

SCORES = ("accuracy", "nll", "brier", "ece", "adaptive_ece")
HEADER = ("data", "network", "method", "runs")
MEASURED = (
    "Test images; mean over the winner's runs ± standard error. Accuracy in %; NLL in "
    "nats; ECE with bins of equal width, adaptive ECE with bins of equal counts. "
    "Methods with draws predict by the mean probability of all draws; Laplace's by the "
    "linearised network with the probit approximation; the ensemble by the mean of all "
    "of Adam's runs, so that it is a single one. Milliseconds are those of a training "
    "step, the median over epochs; they depend on what else the machine did."
)
COMPARED = (
    "Each method less the tuned Adam, with p-values of Welch's two-sided test over the "
    "runs; not corrected for the number of comparisons."
)
MEANS = (
    "The same runs' mean weights without draws: what the draws add to a prediction, "
    "apart from what training with noise does to the mean."
)
STRANGE = (
    "Images that belong to no class against test images: area under the receiver "
    "operating characteristic (AUROC; 1 is perfect, 0.5 knows nothing) and false "
    "positives at 95 % true positives (FPR95), by the largest probability; AUROC by "
    "the entropy beside it. Shifted: test images under the strongest noise."
)
BEFORE = (
    "The small size's grids were set by hand after short runs, mostly of LeNet on "
    "CIFAR-10, judged on validation images: 22 of noisy K-FAC, 13 of Adam, 7 of IVON, "
    "6 of VOGN, 3 of K-FAC, none of SGD. Noisy K-FAC had the most of them, which may "
    "favour its grid. The damping and the trust region were not searched."
)
SEARCHED = (
    "Every combination of a grid, seed 0, judged by the NLL of the method's own "
    "predictions on validation images."
)


def shown(values: np.ndarray, factor: float = 1, digits: int = 4) -> str:
    """Mean and standard error as text."""
    if not np.isfinite(values).all():
        return "not finite"
    error = standard_error(values)
    mean = f"{factor * values.mean():.{digits}f}"
    return mean if error is None else f"{mean} ± {factor * error:.{digits}f}"


def names_of(result: Result) -> tuple[str, ...]:
    """The first cells of a row."""
    cell = result.cell
    runs = str(len(result.runs))
    return cell.dataset, cell.network, TITLES[cell.method], runs


def score(name: str, values: np.ndarray) -> str:
    """A score of a table."""
    return shown(values, 100, 2) if name == "accuracy" else shown(values)


def score_table(results: Results) -> Table:
    """All scores: a row per cell."""
    rows = []
    adam_seconds = {}
    for cell, result in results.items():
        seconds = result.seconds()
        adam_seconds |= {cell: seconds} if cell.method == ADAM else {}
        adam = adam_seconds.get(cell.of(ADAM))
        known = seconds is not None
        cost = f"{1e3 * seconds:.1f}" if known else NOTHING
        ratio = f"{seconds / adam:.1f}" if known and adam else NOTHING
        found = [score(name, result.figures(name)) for name in SCORES]
        rows.append((*names_of(result), *found, cost, ratio))
    header = (*HEADER, "accuracy", "NLL", "Brier", "ECE", "adaptive ECE")
    return Table((*header, "ms per step", "of Adam's"), tuple(rows), MEASURED)


def comparison_table(results: Results) -> Table:
    """Every method less Adam."""
    rows = []
    for cell, result in results.items():
        found = comparisons(results, cell, NAMES)
        if found is None:
            continue
        texts = []
        for name in NAMES:
            percent = name == "accuracy"
            value = found[name].difference * (100 if percent else 1)
            texts.append(f"{value:+.{2 if percent else 4}f}")
            texts.append(p_text(found[name].p))
        rows.append((*names_of(result), *texts))
    header = (*HEADER, "Δ accuracy", "", "Δ NLL", "", "Δ ECE", "")
    return Table(header, tuple(rows), COMPARED)


def mean_table(results: Results) -> Table:
    """The scores of mean weights, of methods that draw."""
    rows = []
    for result in results.values():
        if all("mean_weights" in run for run in result.runs):
            plain = result._replace(
                runs=[{"test": run["mean_weights"]} for run in result.runs]
            )
            found = [score(name, plain.figures(name)) for name in SCORES]
            rows.append((*names_of(result), *found))
    header = (*HEADER, "accuracy", "NLL", "Brier", "ECE", "adaptive ECE")
    return Table(header, tuple(rows), MEANS)


def strange_table(results: Results) -> Table:
    """Strange images: a row per cell and set."""
    rows = []
    for result in results.values():
        for name in result.runs[0]["strange"]:
            seen = [run["strange"][name] for run in result.runs]
            values = [
                shown(np.array([s[key] for s in seen]), digits=3)
                for key in ("auroc", "fpr95", "auroc_entropy")
            ]
            rows.append((*names_of(result), name, *values))
        last = np.array([run["shifted"]["auroc"][-1] for run in result.runs])
        end = (shown(last, digits=3), NOTHING, NOTHING)
        rows.append((*names_of(result), "shifted", *end))
    header = (*HEADER, "images", "AUROC", "FPR95", "AUROC, entropy")
    return Table(header, tuple(rows), STRANGE)


def search_table(results: Results) -> Table:
    """What the searches found."""
    rows = []
    for result in results.values():
        if result.trials:
            values = result.runs[0]["values"]
            text = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in values.items())
            losses = [r["nll"] for r in result.trials if r.get("nll") is not None]
            best = f"{min(losses):.4f}" if losses else NOTHING
            count = str(len(result.trials))
            first = names_of(result)[:3]
            rows.append((*first, count, text, best))
    header = (*HEADER[:3], "trials", "winner", "validation NLL")
    return Table(header, tuple(rows), SEARCHED)


def setting(config: Record) -> str:
    """One paragraph on what was trained."""
    pool = config["pool"]
    images = f", averaged over squares of {pool} x {pool} pixels" if pool > 1 else ""
    return (
        f"{config['train_examples']} training images{images}, not augmented, "
        f"{config['validation_examples']} others for the searches; "
        f"{config['epochs']} epochs at batch {config['batch_size']} and a learning "
        "rate that falls to 0 as a cosine, for all methods. CIFAR-10 is a JPEG copy, "
        "so that its figures are not those of the original. Adam has decoupled "
        "weight decay. Posteriors draw one set of weights per step and "
        f"{config['samples']} for predictions."
    )


def make_sections(results: Results, records: list[Record], out: Path) -> list[Section]:
    """What the page says."""
    config = next(iter(results.values())).runs[0]["config"]
    reliability, shift = out / "reliability.png", out / "shift.png"
    plot_reliability(results, reliability)
    plot_shift(results, shift)
    gap = "Accuracy less confidence: below 0 a method is over-confident"
    noise = "Test images under normal noise; its strength in units of the brightest"
    sections = [
        Section("Answer", (answer(results),)),
        Section("Setting", (setting(config),)),
        Section("Result", (score_table(results), comparison_table(results))),
        Section("Calibration", (Plot(reliability, gap), mean_table(results))),
        Section("Shifted images", (Plot(shift, noise),)),
        Section("Strange images", (strange_table(results),)),
        Section("The searches", (BEFORE, search_table(results))),
    ]
    further = active_section(records, out), regression_section(records, out)
    return sections + [section for section in further if section is not None]


def summary(results: Results) -> list[dict[str, Any]]:
    """Numbers of every cell as JSON values."""
    rows = []
    for cell, result in results.items():
        found = comparisons(results, cell, NAMES)
        row: dict[str, Any] = {
            "dataset": cell.dataset,
            "network": cell.network,
            "method": cell.method,
            "runs": len(result.runs),
            "values": result.runs[0].get("values"),
            "seconds_per_step": result.seconds(),
        }
        for name in SCORES:
            values = result.figures(name)
            row[name] = float(values.mean())
            row[f"{name}_error"] = standard_error(values)
        row["less_adam"] = found and {k: v._asdict() for k, v in found.items()}
        rows.append(row)
    return rows


def save_report(config: BayesReport, console: Console) -> None:
    """Prints table and answer, writes page, plots, summary and the runs as Parquet."""
    out = config.out or config.folder
    out.mkdir(parents=True, exist_ok=True)
    results, records = read_results(config.folder), read_all(config.folder)
    shared = next(iter(results.values())).runs[0]["config"]
    sections = make_sections(results, records, out)
    facts = {"config": shared, "cells": summary(results), "answer": answer(results)}
    (out / "summary.json").write_text(json.dumps(metrics.to_json(facts), indent=1))
    table = markdown_part(score_table(results))
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(answer(results), markup=False, highlight=False)
    publish("Bayesian study", sections, shared, config.folder, out, console)
