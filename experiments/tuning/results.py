"""What is written of a study: records, the best values, a table and two plots.

All of it is made of the study alone, so that it may be written again at any time and by
any worker.
"""

import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization.matplotlib import plot_optimization_history, plot_slice
from rich.console import Console
from rich.table import Table

from experiments.configs.tune import TuneConfig
from experiments.errors import MetricsError
from experiments.metrics import to_json
from experiments.tuning.store import experimental, retried

TRIALS, BEST = "trials.jsonl", "best.json"
SHOWN = 5


def record_of(trial: FrozenTrial) -> dict[str, Any]:
    """A finished trial as JSON values."""
    points = sorted(trial.intermediate_values.items())
    curve = [{"step": step, "loss": loss} for step, loss in points]
    facts = trial.user_attrs
    names = ("worker", "device", "together", "seconds_together", "measured")
    return to_json(
        {
            "kind": "trial",
            "step": points[-1][0] if points else 0,
            "number": trial.number,
            "state": trial.state.name.lower(),
            "values": trial.params,
            "objective": trial.value,
            "curve": curve,
            "retry_of": retried(trial),
            **{name: facts.get(name) for name in names},
        }
    )


def write_trials(
    study: optuna.Study, config: TuneConfig, identity: dict[str, Any]
) -> list[dict[str, Any]]:
    """Writes all finished trials, one to a line, below a line of the configuration."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    records = [record_of(t) for t in study.get_trials(deepcopy=False, states=states)]
    first = {"kind": "config", "step": 0, "study": config.name(), "config": identity}
    lines = [json.dumps(record, allow_nan=False) for record in (first, *records)]
    replace(config, TRIALS, "".join(line + "\n" for line in lines))
    return records


def replace(config: TuneConfig, name: str, text: str) -> Path:
    """Writes a file of the run folder in one piece."""
    path = config.folder() / name
    temporary = path.with_suffix(f".{config.worker}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise MetricsError(f"{path} cannot be written: {error}.") from error
    return path


def save_report(
    study: optuna.Study, config: TuneConfig, identity: dict[str, Any], console: Console
) -> None:
    """Writes the records, the best trial and the plots; prints the best trials."""
    records = write_trials(study, config, identity)
    ranked = sorted(records, key=rank)
    if not ranked or rank(ranked[0]) >= (False, math.inf):
        console.print("No trial was complete with a finite loss.", style="red")
        return
    best = {"study": config.name(), "config": identity, **ranked[0]}
    paths = [replace(config, BEST, json.dumps(best, indent=2) + "\n")]
    console.print(best_table(config, ranked[:SHOWN]))
    draws = {"objective": plot_optimization_history, "slices": plot_slice}
    for name, draw in draws.items():
        paths.append(config.folder() / f"{name}.png")
        # Optuna calls its plots experimental, and changes matplotlib's style for them.
        with experimental(), plt.rc_context(), warnings.catch_warnings():
            # A single finite trial has no extent along an axis.
            warnings.filterwarnings("ignore", "Attempting to set identical")
            axes = np.ravel(np.asarray(draw(study)))
            axes[0].set_yscale("log")
            try:
                axes[0].figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
            except OSError as error:
                text = f"{paths[-1]} cannot be written: {error}."
                raise MetricsError(text) from error
            plt.close(axes[0].figure)
    paths.append(config.folder() / TRIALS)
    for path in paths:
        console.print(f"Written: {path}", soft_wrap=True, highlight=False)


def rank(record: dict[str, Any]) -> tuple[bool, float]:
    """What records are sorted by: complete ones first, the lowest objective first."""
    value = record["objective"]
    return record["state"] != "complete", math.inf if value is None else value


def best_table(config: TuneConfig, ranked: Sequence[dict[str, Any]]) -> Table:
    """The best trials with their values."""
    title = f"{config.optimizer} on {config.dataset}, {config.model}: best trials"
    table = Table(title=title, title_justify="left")
    others = [name for name in ranked[0]["measured"] or {} if name != "loss"]
    columns = ["trial", "held-out loss", *others, *config.space.ranges()]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for record in ranked:
        measured = record["measured"] or {}
        numbers = [record["objective"], *(measured.get(name) for name in others)]
        numbers += [record["values"].get(name) for name in config.space.ranges()]
        texts = ["–" if value is None else f"{value:.3g}" for value in numbers]
        table.add_row(str(record["number"]), *texts)
    return table
