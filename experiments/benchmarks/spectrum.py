"""The largest eigenvalues of a curvature matrix over a whole training set.

    python -m experiments.benchmarks.spectrum --data-dir … --matrix ggn

A network is trained for a short while with Adam, then ``op.eigsh`` finds the largest
eigenvalues of the matrix over all training examples, streamed in batches. The residuals
``‖M v − λ v‖`` are measured afresh: some eigenvalue lies within each. A run adds a line
to ``spectrum.jsonl``.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

import kfac_jax_lite as kfac
from experiments.benchmarks.common import OUT, machine, text_table, timed
from experiments.configs import NetConfig
from experiments.datasets import Dataset, batches, load
from experiments.metrics import to_json
from experiments.models import Task, make_task
from experiments.progress import ended, open_console
from kfac_jax_lite import curvature
from kfac_jax_lite.curvature.operator import Operator
from kfac_jax_lite.curvature.spectra import Eigenpairs

PROGRAM = "python -m experiments.benchmarks.spectrum"
FILE = "spectrum.jsonl"


@dataclasses.dataclass(frozen=True)
class Config:
    """Finds the largest eigenvalues of a curvature matrix over a training set."""

    matrix: Literal["ggn", "hessian", "empirical_fisher", "gradient_covariance"] = "ggn"
    """Which matrix."""
    model: Literal["lenet5", "mlp"] = "lenet5"
    """The network."""
    dataset: Literal["mnist", "mnist5k", "fashion_mnist", "digits"] = "mnist"
    """The images."""
    examples: int | None = None
    """How many of them; the whole training set by default."""
    hidden: tuple[int, ...] = (512, 512)
    """Widths of the MLP's hidden layers."""
    k: int = 10
    """How many eigenvalues."""
    batch_size: int = 400
    """Examples that are multiplied at once."""
    epochs: float = 1.0
    """Of training."""
    train_batch_size: int = 128
    """Examples per step of training."""
    learning_rate: float = 1e-3
    """Of Adam."""
    tol: float | None = None
    """Residual at which an eigenvalue has converged, relative to the largest."""
    max_products: int | None = None
    """The most products."""
    seed: int = 0
    """Of the weights, the order of the examples and the first vector."""
    data_dir: Path | None = None
    """Folder with the images."""
    out: Path = OUT
    """Folder of the result."""


def make_bar(console: Console) -> Progress:
    """A bar that is drawn on terminals only."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    first = "{task.description}"
    return Progress(first, *columns, console=console, disable=not console.is_terminal)


def train(task: Task, data: Dataset, config: Config, bar: Progress) -> tuple[Any, int]:
    """Trains with Adam.

    Args:
        task: the network.
        data: the images.
        config: the command line.
        bar: where progress is shown.

    Returns:
        The parameters and the number of steps.
    """
    optimiser = optax.adam(config.learning_rate)

    @jax.jit
    def step(params, state, images, labels):
        grads = jax.grad(lambda p: task.loss(p, {}, images, labels)[0])(params)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state

    params, _ = task.init(jax.random.key(config.seed))
    state = optimiser.init(params)
    size = config.train_batch_size
    steps = int(config.epochs * (len(data.x_train) // size))
    shown = bar.add_task("training", total=steps)
    for images, labels in batches(data, size, config.seed, 0, steps):
        params, state = step(params, state, images, labels)
        bar.advance(shown)
    return params, steps


def make_operator(task: Task, data: Dataset, params: Any, config: Config) -> Operator:
    x, y, size = data.x_train, data.y_train, config.batch_size
    parts = [
        (jnp.asarray(x[i : i + size]), jnp.asarray(y[i : i + size]))
        for i in range(0, len(x), size)
    ]

    def loss(params, images, labels):
        return task.loss(params, {}, images, labels)[0]

    tagged = kfac.tag(loss, params, *parts[0])
    return getattr(curvature, config.matrix)(tagged, params, parts)


def eigenpairs(
    operator: Operator, config: Config, bar: Progress
) -> tuple[Eigenpairs, int]:
    """The eigenpairs, and how many products they took."""
    shown, last = bar.add_task("products"), 0

    def progress(done: int, total: int) -> None:
        nonlocal last
        last = done
        bar.update(shown, completed=done, total=total)

    key = jax.random.key(config.seed + 1)
    limits = {"tol": config.tol, "max_products": config.max_products}
    found = operator.eigsh(config.k, key, progress=progress, **limits)
    return found, last


def measure(config: Config, console: Console) -> dict[str, Any]:
    """Trains the network and finds the eigenvalues."""
    data = load(config.dataset, config.data_dir).first(config.examples)
    task = make_task(config.model, NetConfig(hidden=config.hidden), data)
    with make_bar(console) as bar:
        training, (params, steps) = timed(train, task, data, config, bar)
        operator = make_operator(task, data, params, config)
        like = jax.tree.map(jnp.ones_like, params)
        first, _ = timed(operator.mv, like)
        one, _ = timed(operator.mv, like)
        seconds, (found, count) = timed(eigenpairs, operator, config, bar)
    losses = [task.evaluate(params, {}, *part) for part in operator.stream.batches]
    sums = jax.tree.map(lambda *x: float(sum(x)), *losses)
    values = dataclasses.asdict(config)
    del values["out"], values["data_dir"]
    return {
        "machine": machine(),
        "settings": values,
        "images": data.title,
        "examples": len(data.x_train),
        "parameters": operator.shape[0],
        "training_steps": steps,
        "training_seconds": training,
        "training_loss": sums["loss"] / len(data.x_train),
        "training_accuracy": sums["accuracy"] / len(data.x_train),
        "first_product_seconds": first,
        "product_seconds": one,
        "products": count,
        "seconds": seconds,
        "eigenvalues": np.asarray(found.values),
        "residuals": np.asarray(found.residuals),
    }


def show(result: dict[str, Any]) -> str:
    """The eigenvalues with their residuals, and what they took."""
    pairs = zip(result["eigenvalues"], result["residuals"], strict=True)
    rows = [
        (str(i), float(value), float(rest), float(rest / result["eigenvalues"][0]))
        for i, (value, rest) in enumerate(pairs, 1)
    ]
    table = text_table(("", "eigenvalue", "residual", "relative"), rows)
    return (
        f"{result['settings']['matrix']} of {result['settings']['model']}, "
        f"{result['parameters']:,} parameters, {result['images']}, "
        f"{result['examples']:,} examples; training loss "
        f"{result['training_loss']:.4f}, accuracy {result['training_accuracy']:.2%}\n"
        f"{table}\n"
        f"{result['products']} products in {result['seconds']:.1f} s, "
        f"{result['product_seconds']:.2f} s for one alone; training "
        f"{result['training_seconds']:.1f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    config = tyro.cli(Config, prog=PROGRAM, args=arguments)
    console = open_console()
    result = measure(config, console)
    console.print(show(result), highlight=False, soft_wrap=True)
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / FILE).open("a") as file:
        file.write(json.dumps(to_json(result), allow_nan=False) + "\n")
    console.print(f"Result: a line in {FILE}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
