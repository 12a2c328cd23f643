"""A regression example: noisy values of a cubic, with a gap where there are none.

The data are synthetic, of a fixed seed: ``y = 2 x³ − x / 2 + ε`` with x uniform in
``[-1, -0.3]`` and ``[0.3, 1]``. Both posteriors know the noise; they should be as
certain as it lets them where there are data, and less so in the gap and outside.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments.studies.bayes.config import (
    REGRESSION,
    BayesStudy,
    Regression,
)
from experiments.studies.bayes.problem import Record
from kfac_jax_lite import bayes

NOISY, LAPLACE = REGRESSION
SEED = 0
EVERY = 10  # steps between inversions
GAP, END, FARTHEST, POINTS = 0.3, 1.0, 1.4, 141


def truth(x: Any) -> Any:
    return 2 * x**3 - x / 2


def points(part: Regression) -> tuple[np.ndarray, np.ndarray]:
    """The data, ``[n, 1]`` each, float32."""
    rng = np.random.default_rng(SEED)
    side = rng.choice([-1.0, 1.0], part.examples)
    x = side * rng.uniform(GAP, END, part.examples)
    y = truth(x) + part.noise * rng.normal(size=part.examples)
    return x[:, None].astype(np.float32), y[:, None].astype(np.float32)


def start(part: Regression, key: Any) -> list[dict[str, jax.Array]]:
    """Initial weights, normal with variance one over the number of inputs."""
    sizes, params = (1, *part.hidden, 1), []
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        key, of_w, of_b = jax.random.split(key, 3)
        w = jax.random.normal(of_w, (n_in, n_out)) * n_in**-0.5
        # The units of the first layer bend at different places.
        params.append({"w": w, "b": 0.5 * jax.random.normal(of_b, (n_out,))})
    return params


def network(params: Any, x: Any) -> jax.Array:
    """The mean of the outputs, ``[n, 1]``."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def train(part: Regression, noisy: bool) -> tuple[Any, Any, Any]:
    """Full-batch steps of K-FAC, noisy, or to the maximum a posteriori.

    Args:
        part: the example.
        noisy: whether weights are drawn.

    Returns:
        Parameters, the optimiser's state, and the tagged loss.
    """
    x, y = points(part)
    variance = part.noise**2

    def loss(params, x, y):
        mean = kfac.normal(network(params, x), variance)
        return jnp.mean((mean - y) ** 2) / (2 * variance)

    params = start(part, jax.random.key(SEED))
    tagged = kfac.tag(loss, params, x, y, fisher="mc")
    rate = optax.cosine_decay_schedule(part.learning_rate, part.steps)
    decay = part.prior_precision / part.examples
    curved: Any = {"damping": part.damping, "inverse_interval": EVERY}
    if noisy:
        n, prior = part.examples, part.prior_precision
        tx = bayes.noisy_kfac(tagged.layers, n, rate, prior_precision=prior, **curved)
    else:
        tx = kfac.kfac(tagged.layers, rate, **curved)
    state = tx.init(params)

    @jax.jit
    def step(params, state, key):
        given = {"opt_state": state, "key": key}
        if noisy:
            found = bayes.value_and_grad(tagged, params, x, y, **given)
        else:
            found = tagged.value_and_grad(params, x, y, **given)
        _, grads, statistics = found
        if not noisy:  # noisy K-FAC adds it by itself
            grads = optax.tree.add_scale(grads, decay, params)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    for number in range(part.steps):
        key = jax.random.fold_in(jax.random.key(SEED + 1), number)
        params, state = step(params, state, key)
    return params, state, tagged


def runs(config: BayesStudy, name: str, done: Any) -> Iterator[tuple[int, Record]]:
    """Runs a method of the example if it is missing.

    Yields:
        The seed, 0, and lists over a grid of inputs: mean and standard deviation of the
        observations; the data; the mean deviation of the function where there are data,
        in the gap and outside.
    """
    if SEED in done:
        return
    part = config.regression
    grid = np.linspace(-FARTHEST, FARTHEST, POINTS, dtype=np.float32)
    params, state, tagged = train(part, name == NOISY)
    x, y = points(part)
    shared: Any = {"likelihood": "normal", "variance": part.noise**2}
    if name == NOISY:
        key = jax.random.key(SEED + 2)
        given = network, state, params, grid[:, None], key, part.samples
        found = bayes.predict(*given, **shared)
    else:
        prior: Any = {"prior_precision": part.prior_precision}
        prior["variance"] = part.noise**2
        posterior = bayes.laplace(tagged, params, [(x, y)], "full", **prior)
        found = bayes.predict_glm(network, posterior, params, grid[:, None], **shared)
    mean = np.asarray(found.mean)[:, 0]
    deviation = np.sqrt(np.asarray(found.variance)[:, 0])
    found = {
        "precision": part.prior_precision,
        "x": grid.tolist(),
        "mean": mean.tolist(),
        "deviation": deviation.tolist(),
        "data_x": x[:, 0].tolist(),
        "data_y": y[:, 0].tolist(),
        "where": uncertainty(grid, deviation, part.noise),
    }
    yield SEED, found


def uncertainty(
    grid: np.ndarray, deviation: np.ndarray, noise: float
) -> dict[str, float]:
    """Mean standard deviation of the function in three regions, the noise taken off."""
    own = np.sqrt(np.maximum(deviation**2 - noise**2, 0))
    size = np.abs(grid)
    regions = {
        "data": (size >= GAP) & (size <= END),
        "gap": size < GAP,
        "outside": size > END,
    }
    return {name: float(own[rows].mean()) for name, rows in regions.items()}
