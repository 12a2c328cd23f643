"""What low-rank inverses keep of real factors, and what they do to gradients.

    python -m experiments.benchmarks.low_rank_error --models mlp lenet5

Trains on MNIST with low-rank inverses of several ranks and compares the last ones, that
followed the factors from basis to basis, with exact inverses (``kfac.inverse_error``).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import kfac_jax_lite as kfac
from experiments.benchmarks.common import OUT, machine, text_table, write_json
from experiments.benchmarks.networks import SPECS, Problem, Spec, make_problem
from experiments.datasets.lookup import load
from experiments.progress import ended

HEAD = ("rank_a", "rank_g", "retained_trace_a", "retained_trace_g")
HEAD += ("error", "error_white")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained."""

    models: tuple[str, ...] = ("mlp", "autoencoder", "lenet5")  # names of networks
    # Shares of each factor's eigenpairs that are kept.
    ranks: tuple[float, ...] = (0.0625, 0.125, 0.25)
    steps: int = 201  # steps of training; the last of them inverts
    damping: float = 1e-3  # damping
    learning_rate: float = 0.05  # learning rate
    every: int = 5  # steps between refreshes and inversions
    dataset: str = "mnist"  # the images
    data_dir: Path | None = None  # where the images are, else KFAC_DATA_DIR
    out: Path = OUT  # folder of the result


def batch_of(images: Any, labels: Any, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """A batch in the shape that a network wants.

    Args:
        images: ``[n, height, width, channels]``, from 0 to 1.
        labels: ``[n]``.
        spec: the network's.
    """
    x = jnp.asarray(images, jnp.float32)
    if len(spec.shape) == 2:
        x = x.reshape(len(x), -1)
    else:
        x = jax.image.resize(x, (len(x), *spec.shape[1:3], x.shape[-1]), "linear")
        x = jnp.broadcast_to(x, (len(x), *spec.shape[1:]))
    return x, x if spec.bernoulli else jnp.asarray(labels, jnp.int32)


def trained(
    problem: Problem, spec: Spec, data: Any, rank: float, config: Config
) -> tuple[list[dict[str, Any]], float]:
    """Trains a network and compares its inverses."""
    rng, size = np.random.default_rng(0), spec.shape[0]

    def draw() -> tuple[jax.Array, jax.Array]:
        rows = rng.integers(0, len(data.x_train), size)
        images = data.x_train[rows] / data.maximum
        return batch_of(images, data.y_train[rows], spec)

    tagged = kfac.tag(problem.marked_loss(), problem.params, draw(), fisher="mc")
    tx = kfac.kfac(
        tagged.layers,
        config.learning_rate,
        damping=config.damping,
        interval=kfac.intervals.every(config.every),
        inverse=kfac.low_rank(rank),
        inverse_interval=config.every,
    )

    @jax.jit
    def step(params, state, batch, key):
        value, grads, statistics = tagged.value_and_grad(
            params, batch, opt_state=state, key=key
        )
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, value

    params, state, value = problem.params, tx.init(problem.params), jnp.inf
    keys = jax.random.split(jax.random.key(0), config.steps)
    for key in keys:
        params, state, value = step(params, state, draw(), key)
    return kfac.inverse_error(tagged.layers, state), float(value)


def main(config: Config) -> dict[str, Any]:
    """Trains every network with every rank and writes ``low_rank_error.json``."""
    data = load(config.dataset, config.data_dir)
    settings = vars(config) | {"data_dir": None, "out": None}
    result: dict[str, Any] = {"machine": machine(), "settings": settings, "runs": []}
    for name in config.models:
        spec = SPECS[name]
        problem = make_problem(name, spec)
        for rank in config.ranks:
            records, loss = trained(problem, spec, data, rank, config)
            run = {"model": name, "rank": rank, "loss": loss, "layers": records}
            result["runs"].append(run)
            rows = [(r["name"], *(r[k] for k in HEAD)) for r in records]
            print(f"\n{name}, rank {rank}: loss {loss:.4g} after {config.steps} steps")
            print(text_table(("layer", *HEAD), rows), flush=True)
            write_json(config.out / "low_rank_error.json", result)
    return result


if __name__ == "__main__":
    raise SystemExit(ended(lambda: main(tyro.cli(Config, description=__doc__))))
