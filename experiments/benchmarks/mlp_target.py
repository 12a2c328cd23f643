"""Steps to tuned Adam's best training loss, on MNIST and Fashion-MNIST.

    python -m experiments.benchmarks.mlp_target --datasets mnist --trials 8

Adam and this package are tuned with the same number of trials by the tree-structured
Parzen estimator, for the lowest training loss (mean over the whole training set). Adam
trains for all epochs, K-FAC for half of them; its learning rate and damping fall to 0
and to 1 % of their first value on cosines. The first trial of either is given. Then: at
which step does the best K-FAC run first have the loss that the best Adam run reaches
anywhere?

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
    comma_list,
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
from experiments.configs.train import IMAGES
from experiments.datasets import Dataset, batches, load
from experiments.models import Task, make_task
from experiments.progress import ended

OPTIMIZERS = ("adam", "ours")
compare = functools.partial(compare_with, "adam")
SCHEDULES = ("constant", "cosine")
# The trial with which every search starts.
USUAL = {
    "adam": {"learning_rate": 1e-3, "schedule": "cosine"},
    "ours": {"learning_rate": 0.02, "damping": 1e-2, "kl_clip": 1e-2},
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--datasets", type=comma_list(IMAGES), default="mnist,fashion_mnist")
    add("--hidden", type=positive_int, nargs="+", default=[256, 256])
    add("--batch-size", type=positive_int, default=500)
    add("--epochs", type=positive_int, default=10, help="of Adam")
    add("--our-epochs", type=positive_int, default=5, help="ours")
    add("--train-examples", type=positive_int, default=None, help="else all")
    add("--trials", type=positive_int, default=12, help="of each optimiser")
    add("--seed", type=int, default=0)
    add("--fisher", choices=("empirical", "mc", "exact"), default="mc", help="ours")
    add("--factor-decay", type=float, default=0.98, help="ours")
    add("--factor-interval", type=positive_int, default=1, help="ours")
    add("--inverse-interval", type=positive_int, default=5, help="ours")
    add("--data-dir", type=Path, default=None, help="else KFAC_DATA_DIR")
    add("--out", type=Path, default=OUT, help="folder of the results")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Study:
    """What all trials on one data set share."""

    args: argparse.Namespace  # the command line
    data: Dataset  # the data set
    task: Task  # the network and its loss
    # Parameters and model state to the means over the training set.
    evaluate: Callable[..., dict[str, float]]
    counter: CompileCounter  # counts compilations
    file: metrics.MetricsFile  # where the trials' records go

    @property
    def per_epoch(self) -> int:
        """Steps per epoch."""
        return len(self.data.x_train) // self.args.batch_size

    def epochs(self, name: str) -> int:
        """Epochs of a trial of one optimiser."""
        return self.args.epochs if name == "adam" else self.args.our_epochs

    def steps(self, name: str) -> int:
        """Steps of a trial of one optimiser."""
        return self.per_epoch * self.epochs(name)


def suggest(name: str, trial: optuna.Trial) -> dict[str, Any]:
    """Draws a trial's hyper-parameters."""
    if name == "adam":
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-2, log=True),
            "schedule": trial.suggest_categorical("schedule", SCHEDULES),
        }
    return {
        "learning_rate": trial.suggest_float("learning_rate", 5e-3, 0.2, log=True),
        "damping": trial.suggest_float("damping", 1e-3, 0.3, log=True),
        "kl_clip": trial.suggest_float("kl_clip", 1e-3, 0.1, log=True),
    }


def make_adam(study: Study, params: Any, values: dict[str, Any]) -> tuple[Any, Any]:
    """Adam's state and step."""
    rate = values["learning_rate"]
    if values["schedule"] == "cosine":
        rate = optax.cosine_decay_schedule(rate, study.steps("adam"))
    tx = optax.adam(rate)

    def step(params, state, images, labels, key):
        del key
        grads, _ = jax.grad(study.task.loss, has_aux=True)(params, {}, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init(params), jax.jit(step, donate_argnums=(0, 1))


def make_ours(study: Study, params: Any, values: dict[str, Any]) -> tuple[Any, Any]:
    """The same of this package's K-FAC; see `make_adam` for the arguments."""
    args, size = study.args, study.args.batch_size
    example = study.data.x_train[:size], study.data.y_train[:size]
    tagged = kfac.tag(
        study.task.loss, params, {}, *example, fisher=args.fisher, has_aux=True
    )
    steps = study.steps("ours")
    tx = kfac.kfac(
        tagged.layers,
        optax.cosine_decay_schedule(values["learning_rate"], steps),
        damping=optax.cosine_decay_schedule(values["damping"], steps, alpha=0.01),
        kl_clip=values["kl_clip"],
        factor_decay=args.factor_decay,
        interval=kfac.intervals.every(args.factor_interval),
        inverse_interval=args.inverse_interval,
    )

    def step(params, state, images, labels, key):
        _, grads, statistics = tagged.value_and_grad(
            params, {}, images, labels, opt_state=state, key=key
        )
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    return tx.init(params), jax.jit(step, donate_argnums=(0, 1))


MAKERS = {"adam": make_adam, "ours": make_ours}


def evaluation_steps(per_epoch: int, epochs: int, halves: bool) -> set[int]:
    """Steps after which the training loss is measured."""
    ends = {per_epoch * (k + 1) for k in range(epochs)}
    middles = {per_epoch * k + per_epoch // 2 for k in range(epochs)} if halves else {0}
    return (ends | middles) - {0}


def run_trial(study: Study, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Trains once."""
    args = study.args
    params, _ = study.task.init(jax.random.key(args.seed))
    state, step = MAKERS[name](study, params, values)
    key = jax.random.key(args.seed + 1)
    # Ours is looked at twice per epoch: "half the steps" may fall inside one.
    epochs = study.epochs(name)
    wanted = evaluation_steps(study.per_epoch, epochs, name == "ours")
    durations, compiled, curve = [], [], []
    feed = batches(study.data, args.batch_size, args.seed, 0, study.steps(name))
    for number, (images, labels) in enumerate(feed, start=1):
        key, sub = jax.random.split(key)
        seen = study.counter.count
        seconds, (params, state) = timed(step, params, state, images, labels, sub)
        durations.append(seconds)
        compiled.append(study.counter.count > seen)
        if number in wanted:
            loss = study.evaluate(params, {})["loss"]
            curve.append({"step": number, "seconds": sum(durations), "loss": loss})
            if not np.isfinite(loss):
                break
    losses = [r["loss"] for r in curve if np.isfinite(r["loss"])]
    return {
        "curve": curve,
        "best_loss": min(losses, default=float("inf")),
        "compile_seconds": compile_seconds(durations, compiled),
    }


def tune(study: Study, name: str) -> dict[str, Any]:
    """Searches for one optimiser's hyper-parameters."""
    args, trials = study.args, []
    sampler = optuna.samplers.TPESampler(seed=args.seed, n_startup_trials=3)
    search = optuna.create_study(direction="minimize", sampler=sampler)
    search.enqueue_trial(USUAL[name])

    def objective(trial):
        values, start = suggest(name, trial), time.perf_counter()
        result = {"number": trial.number, "values": values}
        result |= run_trial(study, name, values)
        trials.append(result)
        facts = {"dataset": study.data.name, "optimizer": name}
        study.file.append("trial", result["curve"][-1]["step"], **facts, **result)
        print(
            f"{study.data.title}, {name}, trial {trial.number}: best training loss "
            f"{result['best_loss']:.5g} with {values} "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
        # The sampler wants numbers; a run that diverged is worse than any other.
        return min(result["best_loss"], 1e6)

    search.optimize(objective, n_trials=args.trials)
    return trials[search.best_trial.number]


def show(results: dict[str, dict[str, Any]]) -> str:
    """The table at the end."""
    rows = []
    for result in results.values():
        found = result["comparison"]
        for name in OPTIMIZERS:
            best, when = result["best"][name], found[name] or {}
            ours = name == "ours"
            rows.append(
                (
                    f"{result['title']}, {TITLES[name]}",
                    best["best_loss"],
                    when.get("step"),
                    when.get("seconds"),
                    best["compile_seconds"],
                    found["step_ratio"] if ours else None,
                    found["seconds_ratio"] if ours else None,
                )
            )
    header = (
        "run",
        "best loss",
        "steps to Adam's best",
        "seconds",
        "of them compiling",
        "step ratio",
        "seconds ratio",
    )
    return text_table(header, rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Tunes both optimisers on every data set; writes records, summary and plots."""
    args = arguments(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lines = args.out / "mlp_target.jsonl"
    lines.unlink(missing_ok=True)
    file, counter = metrics.MetricsFile(lines), CompileCounter()
    facts = {"machine": machine(), "settings": settings(args)}
    file.append("config", 0, **facts)
    results: dict[str, dict[str, Any]] = {}
    for name in args.datasets:
        data = load(name, args.data_dir).first(args.train_examples)
        task = make_task("mlp", NetConfig(hidden=tuple(args.hidden)), data)
        evaluate = metrics.make_evaluate(task, data.x_train, data.y_train)
        study = Study(args, data, task, evaluate, counter, file)
        best = {optimizer: tune(study, optimizer) for optimizer in OPTIMIZERS}
        results[name] = {
            "title": data.title,
            "train": len(data.x_train),
            "best": best,
            "comparison": compare(best),
        }
        write_json(args.out / "mlp_target.json", {**facts, "datasets": results})
        curves = {k: v["curve"] for k, v in best.items()}
        save_curves(args.out / f"mlp_target_{name}.png", f"MLP, {data.title}", curves)
    file.append("end", 0)
    file.close()
    print(show(results))
    return {**facts, "datasets": results}


if __name__ == "__main__":
    raise SystemExit(ended(main))
