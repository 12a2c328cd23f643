"""The page of the batch-size study: HTML, Markdown, plots, a summary, runs as Parquet.

    python -m experiments.main study batch-size-report --folder <folder>

Everything is made from the records of the finished runs; nothing is trained.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import metrics
from experiments.studies.batch_size.answer import answer, differences, percent
from experiments.studies.batch_size.config import BatchReport, Cell
from experiments.studies.batch_size.plots import (
    plot_final,
    plot_iterations,
    plot_search,
    plot_seconds,
)
from experiments.studies.batch_size.results import (
    SGD,
    TITLES,
    Result,
    Results,
    best_other,
    leads,
    optimizers_of,
    read_results,
    sizes_of,
    summary,
)
from experiments.studies.batch_size.run import final
from experiments.studies.batch_size.statistics import estimate, slope
from experiments.studies.pages import (
    NOTHING,
    Plot,
    Section,
    Table,
    markdown_part,
    publish,
)

# Accuracy on validation images: full CIFAR-10, 32 x 32 pixels, other tuning.
PAPER = {
    "SGD": {128: 85.38, 512: 85.00, 2048: 83.43},
    "Adam": {128: 81.88, 512: 81.93, 2048: 79.52},
    "K-FAC": {128: 74.19, 512: 71.32, 2048: 64.98},
}
PLOTS: dict[str, tuple[Callable[[Results, Path], None], str]] = {
    "final": (plot_final, "Test accuracy at the end, mean over the seeds with 95 %"),
    "iterations": (plot_iterations, "Test accuracy against iterations, mean of seeds"),
    "seconds": (plot_seconds, "Test accuracy against training seconds, mean of seeds"),
    "search": (plot_search, "The searches: best validation accuracy so far"),
}
MEASURED = (
    "Test accuracy in % after the last epoch (not the best on the way), mean over the "
    "winner's seeds ± Student's interval at 95 %, beside the paper's figures for all "
    "of CIFAR-10 at 32 x 32 pixels; those of Adam are without weight decay, ours are "
    "AdamW's. Optax has neither SOAP nor Shampoo; Muon is the peer that works with "
    "matrices."
)
FITTED = (
    "Accuracy in % and loss at the end on test images and on training images as they "
    "are (not augmented); mean over the seeds."
)
BEFORE = (
    "The default ranges and the first trial's usual values were set by hand after "
    "short runs at batch 128, 512 and 2048, judged on validation images: 20 of K-FAC, "
    "8 of SGD, 3 of AdamW and 2 of Muon. K-FAC had the most of them, which may favour "
    "its first trial."
)
COST = (
    "Seconds are those of all training steps of a run; compilation and evaluation are "
    "not in them. They depend on what else the machine did."
)


def accuracy_table(results: Results) -> Table:
    """Our accuracies beside the paper's: a row per batch size."""
    names, rows = optimizers_of(results), []
    config = next(iter(results.values())).winner["config"]
    papers = PAPER if config["dataset"] == "cifar10" else {}
    for size in sizes_of(results):
        ours = [shown(results.get(Cell(name, size)), "test") for name in names]
        steps = config["epochs"] * (config["train_examples"] // size)
        paper = [
            f"{found[size]:.2f}" if size in found else NOTHING
            for found in papers.values()
        ]
        rows.append((str(size), str(steps), *ours, *paper))
    titles = [TITLES[name] for name in names]
    header = ("batch", "iterations", *titles, *(f"paper: {name}" for name in papers))
    return Table(header, tuple(rows), "Test accuracy")


def shown(result: Result | None, which: str) -> str:
    """A cell's accuracy as text."""
    if result is None:
        return NOTHING
    if which == "test":
        return percent(estimate(list(result.accuracies().values())))
    found = result.at_end(which)
    return NOTHING if found is None else percent(found)


def lead_table(results: Results) -> Table:
    """K-FAC less SGD and less the best other optimiser: a row per batch size."""
    over_sgd, rows = differences(results, SGD), []
    for size in sizes_of(results):
        name = best_other(results, size)
        best = differences(results, name).get(size) if name else None
        first = percent(over_sgd[size], True) if size in over_sgd else NOTHING
        second = percent(best, True) if best else NOTHING
        rows.append((str(size), first, TITLES[name] if name else NOTHING, second))
    header = ("batch", "K-FAC − SGD", "best other", "K-FAC − best other")
    caption = "Differences in points, paired by seed, ± Student's interval at 95 %"
    return Table(header, tuple(rows), caption)


def fit_table(results: Results) -> Table:
    """Test and training accuracy and loss: a row per cell."""
    rows = []
    for cell, result in results.items():
        losses = [result.at_end(name) for name in ("loss", "train_loss")]
        gap = [
            record["train_accuracy"][-1] - record["accuracy"][-1]
            for record in result.seeds.values()
        ]
        rows.append(
            (
                str(cell.batch_size),
                TITLES[cell.optimizer],
                shown(result, "accuracy"),
                shown(result, "train_accuracy"),
                percent(estimate(gap), True),
                *(f"{e.mean:.3f}" if e else NOTHING for e in losses),
            )
        )
    header = (
        "batch", "optimiser", "test accuracy", "training accuracy", "training − test",
        "test loss", "training loss",
    )  # fmt: skip
    return Table(header, tuple(rows), FITTED)


def search_table(results: Results) -> Table:
    """What the searches found: a row per cell."""
    columns = (
        "learning_rate", "lr_decay", "decay_epoch", "momentum", "weight_decay",
        "factor_decay", "damping",
    )  # fmt: skip
    rows = []
    for cell, result in results.items():
        values = result.winner["values"]
        values = values | {"momentum": values.get("momentum", values.get("beta1"))}
        found = [values.get(name) for name in columns]
        ended = sum(r["pruned"] for r in result.trials)
        rows.append(
            (
                str(cell.batch_size),
                TITLES[cell.optimizer],
                f"{len(result.trials)} ({ended})",
                str(result.winner["number"]),
                f"{100 * final(result.winner):.2f}",
                *(NOTHING if x is None else f"{x:.3g}" for x in found),
            )
        )
    header = ("batch", "optimiser", "trials (ended early)", "winner", "validation %")
    names = [name.replace("_", " ") for name in columns]
    names[3] += " or β1"
    caption = (
        "Winners' hyper-parameters; the decay epoch is a share of the run, and trial 0 "
        "has usual values"
    )
    return Table((*header, *names), tuple(rows), caption)


def cost_table(results: Results) -> Table:
    """Seconds of the winners' runs: a row per cell."""
    rows = []
    for cell, result in results.items():
        wall, processor = result.total("wall"), result.total("processor")
        steps = estimate([r["step"] for r in result.seeds.values()]).mean
        rows.append(
            (
                str(cell.batch_size),
                TITLES[cell.optimizer],
                f"{steps:.0f}",
                f"{wall.mean:.1f}",
                f"{processor.mean:.1f}",
                f"{1e3 * wall.mean / steps:.1f}",
            )
        )
    header = (
        "batch", "optimiser", "iterations", "seconds", "processor seconds",
        "milliseconds per iteration",
    )  # fmt: skip
    return Table(header, tuple(rows), COST)


def setting(config: dict[str, Any]) -> str:
    """One paragraph on what was trained."""
    pool = config["pool"]
    images = f" averaged over squares of {pool} x {pool} pixels" if pool > 1 else ""
    steps = "an incomplete last batch is left out"
    return (
        f"{config['model']} on {config['dataset']}{images}: {config['train_examples']} "
        f"training images, {config['validation_examples']} others for the searches, "
        f"augmentation {config['augmentation']}; {config['epochs']} epochs at every "
        f"batch size ({steps}), so that iterations fall as the batch grows. All "
        "optimisers have weight decay that no preconditioner changes (SGD's and "
        "K-FAC's passes through their momentum), the same augmentation and one drop of "
        f"the learning rate. K-FAC ({config['fisher']} Fisher, trust region "
        f"{config['kl_clip']}) refreshes and inverts its factors every "
        f"{config['refresh_examples']} examples, at most once per step."
    )


def make_sections(
    results: Results, config: dict[str, Any], out: Path
) -> tuple[Section, ...]:
    """What the page says."""
    plots = {name: Plot(out / f"{name}.png", text) for name, (_, text) in PLOTS.items()}
    compared = (lead_table(results),) if leads(results, SGD) else ()
    return (
        Section("Answer", (answer(results, config),)),
        Section("Setting", (setting(config),)),
        Section(
            "Result",
            (MEASURED, accuracy_table(results), *compared, plots["final"]),
        ),
        Section("During training", (plots["iterations"], plots["seconds"])),
        Section("Over-fitting", (fit_table(results),)),
        Section("The searches", (BEFORE, search_table(results), plots["search"])),
        Section("Cost", (cost_table(results),)),
    )


def save_report(config: BatchReport, console: Console) -> None:
    """Prints the answer and writes page, plots, summary and the runs as Parquet."""
    out = config.out or config.folder
    out.mkdir(parents=True, exist_ok=True)
    results = read_results(config.folder)
    shared = next(iter(results.values())).winner["config"]
    for name, (draw, _) in PLOTS.items():
        draw(results, out / f"{name}.png")
    growth = slope(leads(results, SGD)) if leads(results, SGD) else None
    facts = {
        "config": shared,
        "cells": summary(results),
        "lead_over_sgd": {
            str(size): found._asdict()
            for size, found in differences(results, SGD).items()
        },
        "slope_per_doubling": growth._asdict() if growth else None,
    }
    (out / "summary.json").write_text(json.dumps(metrics.to_json(facts), indent=1))
    table = markdown_part(accuracy_table(results))
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(answer(results, shared), markup=False, highlight=False)
    sections = make_sections(results, shared, out)
    publish("Batch-size study", sections, shared, config.folder, out, console)
