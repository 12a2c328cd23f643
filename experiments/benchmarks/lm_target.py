"""Steps to tuned AdamW's best validation loss, for a small language model.

    python -m experiments.benchmarks.lm_target --trials 8

AdamW and this package are tuned with the same number of trials by the tree-structured
Parzen estimator, for the lowest validation loss of a character that a run has anywhere;
it is measured every few steps. Learning rates fall to 0 on a cosine after a linear
warm-up. The first trial of either is given. Then: at which step does the best K-FAC run
first have the loss that the best AdamW run reaches anywhere?

Finished trials are kept in ``lm_target.jsonl``; the same command goes on after them.

References:
    Bergstra et al., 2011, "Algorithms for hyper-parameter optimization", NeurIPS.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import optuna

import kfac_jax_lite as kfac
from experiments import metrics
from experiments.benchmarks.common import (
    OUT,
    TITLES,
    CompileCounter,
    compile_seconds,
    machine,
    make_parser,
    positive_int,
    save_curves,
    settings,
    text_table,
    timed,
    write_json,
)
from experiments.benchmarks.target import compare_with
from experiments.configs import NetConfig
from experiments.configs.train import TEXTS
from experiments.datasets import TextDataset, batches, load_text
from experiments.errors import RunFolderError
from experiments.models import Task, make_task
from experiments.progress import ended

OPTIMIZERS = ("adamw", "ours")
compare = functools.partial(compare_with, "adamw")
BETAS = (0.95, 0.98, 0.99, 0.999)
STARTUP_TRIALS = 3
# The trial with which every search starts.
USUAL = {
    "adamw": {"learning_rate": 0.02, "weight_decay": 0.1, "beta2": 0.99, "warmup": 80},
    "ours": {
        "learning_rate": 0.02,
        "weight_decay": 1e-2,
        "damping": 4e-5,
        "kl_clip": 3e-3,
    },
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=TEXTS, default="tinyshakespeare")
    add("--layers", type=positive_int, default=2)
    add("--heads", type=positive_int, default=4)
    add("--features", type=positive_int, default=96)
    add("--context", type=positive_int, default=64)
    add("--batch-size", type=positive_int, default=32)
    add("--steps", type=positive_int, default=400, help="of AdamW")
    add("--our-steps", type=positive_int, default=300, help="ours")
    add("--eval-every", type=positive_int, default=20, help="steps")
    add("--eval-windows", type=positive_int, default=640, help="of the validation set")
    add("--trials", type=positive_int, default=8, help="of each optimiser")
    add("--seed", type=int, default=0)
    add("--fisher", choices=("empirical", "mc", "exact"), default="mc", help="ours")
    add("--inverse", default="cholesky", help="ours")
    add("--momentum", type=float, default=0.0, help="ours")
    add("--factor-decay", type=float, default=0.9, help="ours")
    add("--factor-interval", type=positive_int, default=5, help="ours")
    add("--inverse-interval", type=positive_int, default=5, help="ours")
    add("--our-warmup", type=int, default=50, help="steps, ours")
    add("--data-dir", type=Path, default=None, help="else KFAC_DATA_DIR")
    add("--out", type=Path, default=OUT, help="folder of the results")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Study:
    """What all trials share."""

    args: argparse.Namespace  # the command line
    data: TextDataset  # the data set
    task: Task  # the network and its loss
    # Parameters and model state to the means over validation windows.
    evaluate: Callable[..., dict[str, float]]
    counter: CompileCounter  # counts compilations
    file: metrics.MetricsFile  # where the trials' records go
    # Records of the trials of an earlier call, by optimiser and number.
    finished: dict[tuple[str, int], dict[str, Any]]

    def steps(self, name: str) -> int:
        """Steps of a trial of one optimiser."""
        return self.args.steps if name == "adamw" else self.args.our_steps


def suggest(name: str, trial: Any) -> dict[str, Any]:
    """Draws a trial's hyper-parameters."""

    def log(field, low, high):
        return trial.suggest_float(field, low, high, log=True)

    if name == "adamw":
        return {
            "learning_rate": log("learning_rate", 3e-3, 6e-2),
            "weight_decay": log("weight_decay", 1e-3, 1.0),
            "beta2": trial.suggest_categorical("beta2", BETAS),
            "warmup": trial.suggest_int("warmup", 20, 160, step=20),
        }
    return {
        "learning_rate": log("learning_rate", 5e-3, 0.1),
        "weight_decay": log("weight_decay", 1e-3, 1.0),
        "damping": log("damping", 1e-6, 1e-3),
        "kl_clip": log("kl_clip", 5e-4, 2e-2),
    }


def cosine(rate: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear growth from 0, then a cosine to 0 at the last step."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, min(warmup, steps - 1), steps)


def make_adamw(study: Study, params: Any, values: dict[str, Any]) -> tuple[Any, Any]:
    """AdamW's state and step."""
    tx = optax.adamw(
        cosine(values["learning_rate"], values["warmup"], study.steps("adamw")),
        b2=values["beta2"],
        weight_decay=values["weight_decay"],
    )

    def step(params, state, tokens, following, key):
        del key
        grads, _ = jax.grad(study.task.loss, has_aux=True)(
            params, {}, tokens, following
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init(params), jax.jit(step, donate_argnums=(0, 1))


def make_ours(study: Study, params: Any, values: dict[str, Any]) -> tuple[Any, Any]:
    """The same of this package's K-FAC; see `make_adamw` for the arguments."""
    args, size = study.args, study.args.batch_size
    example = study.data.x_train[:size], study.data.y_train[:size]
    tagged = kfac.tag(
        study.task.loss, params, {}, *example, fisher=args.fisher, has_aux=True
    )
    tx = kfac.kfac(
        tagged.layers,
        cosine(values["learning_rate"], args.our_warmup, study.steps("ours")),
        damping=values["damping"],
        momentum=args.momentum or None,
        weight_decay=values["weight_decay"],
        kl_clip=values["kl_clip"],
        factor_decay=args.factor_decay,
        interval=kfac.intervals.every(args.factor_interval),
        inverse=args.inverse,
        inverse_interval=args.inverse_interval,
    )

    def step(params, state, tokens, following, key):
        _, grads, statistics = tagged.value_and_grad(
            params, {}, tokens, following, opt_state=state, key=key
        )
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    return tx.init(params), jax.jit(step, donate_argnums=(0, 1))


MAKERS = {"adamw": make_adamw, "ours": make_ours}


def run_trial(study: Study, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Trains once."""
    args, steps = study.args, study.steps(name)
    params, _ = jax.jit(study.task.init)(jax.random.key(args.seed))
    state, step = MAKERS[name](study, params, values)
    key = jax.random.key(args.seed + 1)
    durations, compiled, curve = [], [], []
    feed = batches(study.data, args.batch_size, args.seed, 0, steps)
    for number, (tokens, following) in enumerate(feed, start=1):
        key, sub = jax.random.split(key)
        seen = study.counter.count
        seconds, (params, state) = timed(step, params, state, tokens, following, sub)
        durations.append(seconds)
        compiled.append(study.counter.count > seen)
        if number % args.eval_every == 0 or number == steps:
            loss = study.evaluate(params, {})["loss"]
            curve.append({"step": number, "seconds": sum(durations), "loss": loss})
            if not np.isfinite(loss):
                break
    losses = [r["loss"] for r in curve if np.isfinite(r["loss"])]
    return {
        "curve": curve,
        "best_loss": min(losses, default=None),
        "compile_seconds": compile_seconds(durations, compiled),
        "median_step_ms": 1e3 * float(np.median(durations)),
        "mean_step_ms": 1e3 * float(np.mean(durations[1:] or durations)),
    }


def tune(study: Study, name: str) -> dict[str, Any]:
    """Searches for one optimiser's hyper-parameters.

    The sampler starts anew, from the number of the trial, for every trial: what it
    draws depends on the results before alone, and a search that was stopped goes on as
    if it had not been.
    """
    args, trials = study.args, []
    search = optuna.create_study(direction="minimize")
    search.enqueue_trial(USUAL[name])
    for number in range(args.trials):
        search.sampler = optuna.samplers.TPESampler(
            seed=1000 * args.seed + number, n_startup_trials=STARTUP_TRIALS
        )
        trial = search.ask()
        values, start = suggest(name, trial), time.perf_counter()
        result = study.finished.get((name, number))
        if result is None or result["values"] != values:
            result = {"optimizer": name, "number": number, "values": values}
            result |= run_trial(study, name, values)
            study.file.append("trial", result["curve"][-1]["step"], **result)
        trials.append(result)
        # The sampler wants numbers; a run that diverged is worse than any other.
        score = 1e6 if result["best_loss"] is None else result["best_loss"]
        search.tell(trial, min(score, 1e6))
        print(
            f"{name}, trial {number}: best validation loss {score:.5g} with {values} "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    return trials[search.best_trial.number]


def show(best: dict[str, dict[str, Any]], found: dict[str, Any]) -> str:
    """The table at the end."""
    rows = []
    for name in OPTIMIZERS:
        trial, when = best[name], found[name] or {}
        ratios = [found[f"{field}_ratio"] for field in ("step", "seconds")]
        rows.append(
            [TITLES[name], trial["best_loss"], when.get("step"), when.get("seconds")]
            + [trial["compile_seconds"], trial["mean_step_ms"]]
            + (ratios if name == "ours" else [None, None])
        )
    header = ["run", "best loss", "steps to AdamW's best", "seconds", "compiling"]
    header += ["ms per step", "step ratio", "seconds ratio"]
    return text_table(header, rows)


def finished_trials(
    path: Path, facts: dict[str, Any]
) -> dict[tuple[str, int], dict[str, Any]]:
    """Reads the trials of an earlier call."""
    records = metrics.read_records(path)
    wanted = metrics.to_json(facts["settings"])
    if records and records[0]["settings"] | {"trials": wanted["trials"]} != wanted:
        raise RunFolderError(
            f"{path} holds trials with other settings. Choose another --out, or "
            "delete it."
        )
    found = {}
    for record in records:
        if record.pop("kind") == "trial":
            del record["step"]
            found[record["optimizer"], record["number"]] = record
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Tunes both optimisers; writes records, summary and plot."""
    args = arguments(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lines = args.out / "lm_target.jsonl"
    facts: dict[str, Any] = {"machine": machine(), "settings": settings(args)}
    finished = finished_trials(lines, facts)
    data = load_text(args.dataset, args.data_dir, args.context)
    sizes = {name: getattr(args, name) for name in ("layers", "heads", "features")}
    task = make_task("lm", NetConfig(context=args.context, **sizes), data)
    count = args.eval_windows
    evaluate = metrics.make_evaluate(task, data.x_test[:count], data.y_test[:count])
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    facts["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    metrics.keep_until(lines, max(args.steps, args.our_steps))
    file = metrics.MetricsFile(lines)
    if not lines.stat().st_size:
        file.append("config", 0, **facts)
    study = Study(args, data, task, evaluate, CompileCounter(), file, finished)
    best = {name: tune(study, name) for name in OPTIMIZERS}
    result = {"title": data.title, "best": best, "comparison": compare(best)}
    file.close()
    result |= facts
    write_json(args.out / "lm_target.json", result)
    curves = {name: trial["curve"] for name, trial in best.items()}
    title = f"Transformer, {facts['parameters']:,} parameters, {data.title}"
    save_curves(args.out / "lm_target.png", title, curves, "validation loss")
    print(show(best, result["comparison"]))
    return result


if __name__ == "__main__":
    raise SystemExit(ended(main))
