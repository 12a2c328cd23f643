"""Trains every listed optimiser from the same start on the same data.

A run lives in ``<run folder>/<optimiser>/``: its metrics, and checkpoints from which it
continues after it was killed. Parameters, order of the data, sampled labels and
augmentation depend on the seed and the number of the step alone, or are in the
checkpoint, so the continued curve is the same.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from rich.console import Console

import kfac_jax_lite as kfac
from experiments import checkpoints, datasets, metrics
from experiments.configs import TrainConfig
from experiments.configs.train import TEXTS
from experiments.datasets import Augmentation, Examples, make_augmentation
from experiments.errors import CheckpointError, ConfigError, MetricsError
from experiments.models import Task, make_task
from experiments.optimizers import TITLES, Optimizer, make_optimizer
from experiments.parallel import Placement, place_on
from experiments.processes import check_same, is_first, told_by_first
from experiments.progress import RunProgress
from experiments.runfolder import check_same_run, locked

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class State(train_state.TrainState):
    """Flax's training state, with model state and with statistics for K-FAC."""

    # What the network keeps besides parameters, such as batch statistics.
    model_state: Any = None
    augmented: Any = ()  # what the augmentation remembers from batch to batch

    def apply_gradients(
        self, *, grads: Any, statistics: Any = None, **kwargs: Any
    ) -> Self:
        """Returns the state after one update."""
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(
            grads, self.opt_state, self.params, statistics=statistics
        )
        params = optax.apply_updates(self.params, updates)
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **kwargs
        )


@dataclasses.dataclass
class Run:
    """One optimiser's run."""

    config: TrainConfig  # the configuration of the comparison
    name: str  # name of the optimiser
    task: Task  # the network and its loss
    data: Examples  # the data set
    augmentation: Augmentation  # what is done to a batch before a step
    optimizer: Optimizer  # the transformation
    placement: Placement  # the devices
    folder: Path  # where the run is kept
    state: State  # the training state
    # Training time so far, without evaluations, checkpoints, compilation.
    seconds: float = 0.0
    # Time of compiling the step, summed over continued runs.
    compile_seconds: float = 0.0
    # What went wrong without stopping the run.
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training set."""
        return len(self.data.x_train) // self.config.batch_size

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.epochs

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        return self.folder / metrics.FILE_NAME

    def placement_record(self) -> dict[str, int]:
        """Returns what the records say of the devices."""
        return {"devices": self.placement.count, "processes": jax.process_count()}

    def saved(self) -> dict[str, Any]:
        """Returns what a checkpoint holds."""
        return {
            "state": self.state,
            "seconds": np.float64(self.seconds),
            "compile_seconds": np.float64(self.compile_seconds),
        }


def make_run(
    config: TrainConfig, name: str, task: Task, data: Examples, placement: Placement
) -> Run:
    """Builds the first state of a run."""
    params, model_state = jax.jit(task.init)(jax.random.key(config.seed))
    images, labels = (
        jax.ShapeDtypeStruct((config.batch_size, *array.shape[1:]), array.dtype)
        for array in (data.x_train, data.y_train)
    )
    augmentation = make_augmentation(config.augment, config.mixup_alpha, data)
    augmented = augmentation.init((images, labels))
    _, batch = jax.eval_shape(
        augmentation.apply, augmented, (images, labels), jax.random.key(0)
    )
    total_steps = len(data.x_train) // config.batch_size * config.epochs
    example = (params, model_state, *batch)
    optimizer = make_optimizer(name, config, task, example, total_steps)
    state = State(
        step=jnp.zeros((), jnp.int32),
        apply_fn=task.loss,
        params=params,
        tx=optimizer.tx,
        opt_state=optimizer.tx.init(params),
        model_state=model_state,
        augmented=augmented,
    )
    state = placement.everywhere(state)
    folder = config.folder() / name
    parts = (task, data, augmentation, optimizer, placement)
    return Run(config, name, *parts, folder, state)


def resume(run: Run) -> int:
    """Restores the newest checkpoint, if there is one, in every process."""
    folder = run.checkpoint_folder
    step = told_by_first(lambda: max(checkpoints.complete(folder), default=0))
    if not step:
        return 0
    if step not in checkpoints.complete(folder):
        raise CheckpointError(
            f"Process 0 continues from step {step}; process {jax.process_index()} sees "
            f"no such checkpoint in {folder.absolute()}. All processes need the same "
            "run folder."
        )
    saved = checkpoints.restore(folder, step, run.saved())
    run.state = saved["state"]
    run.seconds = float(saved["seconds"])
    run.compile_seconds = float(saved["compile_seconds"])
    return step


def evaluation_points(run: Run) -> set[int]:
    """Returns the steps after which the loss is evaluated; the last is one of them."""
    count = min(run.config.evals_per_epoch, run.steps_per_epoch) * run.config.epochs
    return {round(run.total_steps * k / count) for k in range(1, count + 1)}


def stopping_points(run: Run) -> list[int]:
    """Returns the steps at which the loop has something to do besides training."""
    every = (run.config.log_every, run.config.checkpoint_steps)
    regular = {s for n in every for s in range(n, run.total_steps + 1, n)}
    return sorted(regular | evaluation_points(run))


def identity(config: TrainConfig, name: str, data: Examples) -> dict[str, Any]:
    """Returns what decides the curve of one optimiser's run."""
    return {
        "config": config.run_dict(name),
        "data": {
            "title": data.title,
            "train_examples": len(data.x_train),
            "test_examples": len(data.x_test),
        },
    }


def checksum(config: TrainConfig, data: Examples) -> int:
    """Returns a checksum of what all processes have to agree on."""
    values = [config.run_dict(name) for name in config.optimizers]
    total = zlib.crc32(json.dumps([values, config.fresh], sort_keys=True).encode())
    for array in (data.x_train, data.y_train, data.x_test, data.y_test):
        total = zlib.crc32(np.ascontiguousarray(array).data, total)
    return total


def description(run: Run) -> dict[str, Any]:
    """Returns the values of a run's first record."""
    return {
        "optimizer": run.name,
        "title": TITLES[run.name],
        **identity(run.config, run.name, run.data),
        "source": run.data.source,
        "total_steps": run.total_steps,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.state.params)),
        "device": jax.devices()[0].device_kind,
        **run.placement_record(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def train(config: TrainConfig, console: Console) -> tuple[Path, list[str]]:
    """Trains every listed optimiser; finished ones are skipped.

    Args:
        config: what to run.
        console: where to report.

    Returns:
        The run folder, and what went wrong without stopping a run.

    Raises:
        ConfigError: if the batch is larger than the training set.
    """
    if config.dataset in TEXTS:
        data = datasets.load_text(config.dataset, config.data_dir, config.net.context)
    else:
        data = datasets.load(config.dataset, config.data_dir)
    data = data.first(config.train_examples)
    console.print(
        f"Data: {data.title}, {len(data.x_train)} + {len(data.x_test)} {data.noun}, "
        f"{data.source}",
        soft_wrap=True,
        highlight=False,
    )
    if config.batch_size > len(data.x_train):
        raise ConfigError(
            f"batch-size is {config.batch_size}; {data.title} has only "
            f"{len(data.x_train)} training examples."
        )
    placement = place_on(config.devices)
    placement.check_batch(config.batch_size)
    check_same("configuration or data", checksum(config, data))
    task = make_task(config.model, config.net, data)
    folder, problems = config.folder(), []
    with contextlib.ExitStack() as stack:
        told_by_first(lambda: stack.enter_context(locked(folder)) or 0)
        for name in config.optimizers:
            if config.fresh and is_first():
                shutil.rmtree(folder / name, ignore_errors=True)
            problems += run_optimizer(config, name, task, data, placement, console)
    return folder, problems


def is_finished(config: TrainConfig, name: str, data: Examples) -> bool:
    """Whether one optimiser's run has ended; an error if it is another run's folder."""
    folder = config.folder() / name
    records = metrics.read_records(folder / metrics.FILE_NAME)
    check_same_run(folder, records, identity(config, name, data))
    return bool(records) and records[-1]["kind"] == "end"


def run_optimizer(
    config: TrainConfig,
    name: str,
    task: Task,
    data: Examples,
    placement: Placement,
    console: Console,
) -> list[str]:
    """Starts, continues or skips one optimiser's run."""
    if told_by_first(lambda: is_finished(config, name, data)):
        folder = config.folder() / name
        console.print(f"{TITLES[name]}: already finished in {folder}", soft_wrap=True)
        return []
    run = make_run(config, name, task, data, placement)
    if run.optimizer.tagged is not None:
        console.print(str(run.optimizer.tagged), markup=False, highlight=False)
    start = resume(run)
    if start:
        console.print(f"{TITLES[name]}: continues from step {start}")
    file = open_metrics(run, start)
    try:
        if start:
            text = "continued from a checkpoint"
            file.append("note", start, text=text, **run.placement_record())
        else:
            file.append("config", 0, **description(run))
        with RunProgress(console, TITLES[name], run.total_steps, start) as progress:
            loop(run, start, file, progress)
    finally:
        try:
            file.close()
        except MetricsError as error:
            run.problems.append(str(error))
    for problem in run.problems:
        console.print(f"[red]warning:[/] {problem}", soft_wrap=True, highlight=False)
    return run.problems


def open_metrics(run: Run, start: int) -> metrics.MetricsFile:
    """Opens the metrics; only what the first process writes is kept."""
    if not is_first():
        return metrics.MetricsFile(Path(os.devnull))
    # Without a step in it, the file starts anew with the configuration.
    metrics.keep_until(run.metrics_path, start if start else -1)
    return metrics.MetricsFile(run.metrics_path)


def make_step(run: Run) -> Callable[[State, Any, Any], tuple[State, jax.Array]]:
    """Compiles the training step and records how long that took."""
    key, chance = (jax.random.key(run.config.seed + n) for n in (1, 2))
    optimizer, augment = run.optimizer, run.augmentation.apply

    def step(state: State, images: Any, labels: Any) -> tuple[State, jax.Array]:
        turn = jax.random.fold_in(chance, state.step)
        augmented, batch = augment(state.augmented, (images, labels), turn)
        args = (state.params, state.model_state, *batch)
        statistics = None
        if optimizer.tagged is None:
            value_and_grad = jax.value_and_grad(run.task.loss, has_aux=True)
            (loss, model_state), grads = value_and_grad(*args)
        else:
            sample = jax.random.fold_in(key, state.step)
            (loss, model_state), grads, statistics = optimizer.tagged.value_and_grad(
                *args,
                opt_state=state.opt_state,
                key=sample if optimizer.needs_key else None,
            )
        state = state.apply_gradients(
            grads=grads,
            statistics=statistics,
            model_state=model_state,
            augmented=augmented,
        )
        return state, loss

    size, placement = run.config.batch_size, run.placement
    batch = placement.rows(run.data.x_train[:size], run.data.y_train[:size])
    began = time.perf_counter()
    # Left to itself, XLA may split the new state over the devices.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=placement.replicated)
    compiled = jitted.lower(run.state, *batch).compile()
    run.compile_seconds += time.perf_counter() - began
    return compiled


def loop(
    run: Run, start: int, file: metrics.MetricsFile, progress: RunProgress
) -> None:
    """Trains to the end of the run, or until the loss is no longer finite."""
    evaluate = make_evaluations(run)
    step_fn = make_step(run)
    stops = stopping_points(run)
    if start == 0:
        record_evaluation(run, 0, evaluate, file, progress)
    window: list[float] = []
    at, status = start, "finished"
    while at < run.total_steps and status == "finished":
        until = min(stop for stop in stops if stop > at)
        losses, elapsed = advance(run, step_fn, at, until)
        window += losses
        if until % run.config.log_every == 0 or until == run.total_steps:
            loss = float(np.mean(window))
            file.append("train", until, seconds=run.seconds, loss=loss)
            window = []
        progress.step(until, losses[-1], (until - at) / elapsed)
        at = until
        if at in evaluation_points(run):
            values = record_evaluation(run, at, evaluate, file, progress)
            if not np.isfinite(values["train_loss"]):
                status = "diverged"
        if at % run.config.checkpoint_steps == 0 or at == run.total_steps:
            save_checkpoint(run, at, file)
    finish(run, at, status, file)


def advance(
    run: Run, step_fn: Callable, at: int, until: int
) -> tuple[list[float], float]:
    """Takes the steps from `at` to `until`; only this counts as training time."""
    config, losses = run.config, []
    began = time.perf_counter()
    batches = datasets.batches(run.data, config.batch_size, config.seed, at, until)
    for batch in batches:
        run.state, loss = step_fn(run.state, *run.placement.rows(*batch))
        losses.append(loss)
    losses = [float(loss) for loss in jax.device_get(losses)]
    jax.block_until_ready(run.state)
    elapsed = time.perf_counter() - began
    run.seconds += elapsed
    return losses, elapsed


def make_evaluations(run: Run) -> Callable[[], dict[str, float]]:
    """Returns the evaluation of the run's present state on both splits."""
    count, data = run.config.eval_examples, run.data
    on_train = metrics.make_evaluate(
        run.task, data.x_train[:count], data.y_train[:count], run.placement
    )
    on_test = metrics.make_evaluate(
        run.task, data.x_test[:count], data.y_test[:count], run.placement
    )

    def evaluate() -> dict[str, float]:
        values = {}
        for split, on_split in (("train", on_train), ("test", on_test)):
            means = on_split(run.state.params, run.state.model_state)
            values |= {f"{split}_{name}": value for name, value in means.items()}
        return values

    return evaluate


def record_evaluation(
    run: Run,
    step: int,
    evaluate: Callable[[], dict[str, float]],
    file: metrics.MetricsFile,
    progress: RunProgress,
) -> dict[str, Any]:
    """Evaluates, records and shows the result."""
    values: dict[str, Any] = {"seconds": run.seconds} | evaluate()
    if run.optimizer.tagged is not None:
        layers = kfac.report(run.state.opt_state)
        values |= {
            "mean_interval": float(np.mean([layer["interval"] for layer in layers])),
            "bytes_reduced": sum(float(layer["bytes_reduced"]) for layer in layers),
            "bytes_if_every_step": sum(
                float(layer["bytes_if_every_step"]) for layer in layers
            ),
        }
    file.append("eval", step, epoch=step / run.steps_per_epoch, **values)
    progress.evaluated(step, values)
    return values


def save_checkpoint(run: Run, step: int, file: metrics.MetricsFile) -> None:
    """Writes a checkpoint; a failure is told and does not stop the run."""
    if not is_first():
        return
    try:
        checkpoints.save(run.checkpoint_folder, step, run.saved())
    except CheckpointError as error:
        run.problems.append(str(error))
        file.append("note", step, text=str(error))


def finish(run: Run, step: int, status: str, file: metrics.MetricsFile) -> None:
    """Writes the last records of a run."""
    if run.optimizer.tagged is not None:
        file.append("layers", step, layers=kfac.report(run.state.opt_state))
    leaves = jax.tree.leaves(run.state.opt_state)
    file.append(
        "end",
        step,
        status=status,
        seconds=run.seconds,
        compile_seconds=run.compile_seconds,
        state_bytes=sum(leaf.nbytes for leaf in leaves),
    )
