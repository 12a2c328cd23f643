"""Steps and seconds to the best loss of tuned first-order runs, on three classic tasks.

    python -m experiments.benchmarks.reach_loss --tasks autoencoder --data-dir …
    python -m experiments.benchmarks.reach_loss --render experiments/benchmarks/results

The study is `time_to_target`'s with the size ``reach`` and no slack: the autoencoder of
Hinton & Salakhutdinov, a perceptron on MNIST, a small transformer over characters; SGD
and AdamW set the target, and both K-FACs also run with steps and damping of their own.
``--render`` makes tables and plots of runs that ended before, of ``autoencoder.jsonl``,
``mlp_target.jsonl`` and ``lm_target.jsonl``.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import metrics
from experiments.benchmarks.common import (
    OUT,
    TITLES,
    first_reach,
    parse,
    save_curves,
    text_table,
)
from experiments.benchmarks.time_to_target import __main__ as time_to_target
from experiments.benchmarks.time_to_target.config import AUTOMATIC, OPTIMISERS, TaskName
from experiments.benchmarks.time_to_target.problem import best_loss
from experiments.errors import MetricsError
from experiments.progress import ended

TASKS: tuple[TaskName, ...] = ("autoencoder", "mlp", "transformer")
# The files of earlier runs and the optimiser whose best loss was the target.
EARLIER = {"autoencoder": "adam", "mlp_target": "adam", "lm_target": "adamw"}
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Steps and seconds to the best loss of tuned first-order runs."""

    tasks: tuple[TaskName, ...] = TASKS
    """What is trained."""
    core: int | None = None
    """Run on this core alone, one thread at a time; None for all."""
    data_dir: Path | None = None
    """Folder with the data; KFAC_DATA_DIR if not given."""
    out: Path = OUT / "reach_loss"
    """Folder of the results."""
    report: bool = False
    """Only make summary and plots again from the records."""
    render: Path | None = None
    """Folder of earlier runs whose tables and plots are made again in ``out``."""


def read_best(path: Path) -> dict[str, dict[str, Record]]:
    """The best trial by data set and optimiser, of a line a trial or an evaluation."""
    found: dict[str, dict[str, Record]] = {}
    for record in metrics.read_records(path):
        best = found.setdefault(record.get("dataset", ""), {})
        name = record.get("optimizer", "")
        if record["kind"] == "eval":
            run = best.setdefault(name, {"curve": []})
            run["curve"].append(record)
            run["best_loss"] = best_loss(run["curve"])
        elif record["kind"] == "trial" and record["best_loss"] is not None:
            if name not in best or record["best_loss"] < best[name]["best_loss"]:
                best[name] = record
    return {dataset: best for dataset, best in found.items() if best}


def compare(best: dict[str, Record], baseline: str) -> Record:
    """When each best run first has the loss that the baseline's has anywhere."""
    target = best[baseline]["best_loss"]
    found: Record = {name: first_reach(r["curve"], target) for name, r in best.items()}
    theirs, ours = found[baseline], found.get("ours")
    for field in ("step", "seconds"):
        both = ours[field] / theirs[field] if ours and theirs else None
        found[f"{field}_ratio"] = both
    return found | {"target": target}


def render(folder: Path, out: Path) -> list[Path]:
    """Prints the tables of earlier runs and draws their curves."""
    paths: list[Path] = []
    for name, baseline in EARLIER.items():
        for dataset, best in read_best(folder / f"{name}.jsonl").items():
            found, rows = compare(best, baseline), []
            for optimiser, run in best.items():
                when = found[optimiser] or {}
                cells = TITLES[optimiser], run["best_loss"], when.get("step")
                rows.append((*cells, when.get("seconds")))
            paths.append(out / f"{'_'.join(filter(None, (name, dataset)))}.png")
            curves = {optimiser: run["curve"] for optimiser, run in best.items()}
            save_curves(paths[-1], f"{name} {dataset}", curves, "loss")
            ratios = [found[f"{field}_ratio"] for field in ("step", "seconds")]
            title = f"steps to {TITLES[baseline]}'s best"
            print(f"{name} {dataset}: ratios of steps and seconds {ratios}")
            print(text_table(("run", "best loss", title, "seconds"), rows))
    if not paths:
        raise MetricsError(f"{folder} holds none of {', '.join(EARLIER)}.")
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(Config, argv, "reach_loss")
    if config.render is not None:
        render(config.render, config.out)
        return 0
    given = ["--size", "reach", "--slack", "0", "--out", str(config.out)]
    given += ["--tasks", *config.tasks, "--optimisers", *OPTIMISERS, *AUTOMATIC]
    given += ["--report"] if config.report else []
    for name in ("core", "data_dir"):
        value = getattr(config, name)
        given += (
            [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
        )
    return time_to_target.main(given)


if __name__ == "__main__":
    raise SystemExit(ended(main))
