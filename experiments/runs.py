"""One run: how it starts, what is saved of it, when the loop has something to do."""

import dataclasses
import importlib.metadata
import json
import platform
import zlib
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

from experiments import checkpoints, metrics
from experiments.configs import TrainConfig
from experiments.datasets import Augmentation, Examples, make_augmentation
from experiments.errors import CheckpointError
from experiments.models import Task
from experiments.optimizers import TITLES, Optimizer, make_optimizer
from experiments.parallel import Placement
from experiments.processes import told_by_first

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
        """Steps of the whole run."""
        return self.steps_per_epoch * self.config.epochs

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints are."""
        return self.folder / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        """The file of the metrics."""
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
