"""What is made of trained weights: Laplace's approximation, and an ensemble.

Laplace's posterior is fitted on the training images, its prior precision by the
marginal likelihood there; predictions are those of the linearised network with the
probit approximation. The ensemble averages the probabilities of all seeds.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax_lite as kfac
from experiments.studies.bayes import weights
from experiments.studies.bayes.config import DERIVED, BayesStudy, Cell
from experiments.studies.bayes.measures import Predict, Record, measure
from experiments.studies.bayes.problem import Images, Network
from kfac_jax_lite import bayes

ENSEMBLE = "ensemble"
BASES = frozenset(base for base, _ in DERIVED.values())
# Images whose Jacobians are in memory together.
CHUNK = 250
BATCH = 1_000


def runs(
    config: BayesStudy,
    images: Images,
    network: Network,
    base: Cell,
    how: str,
    done: Any,
) -> Iterator[tuple[int, Record]]:
    """Measures what is missing."""
    like = jax.eval_shape(network.task.init, jax.random.key(0))

    def read(seed):
        return weights.read(weights.path_of(config, base, seed), like)

    if how == ENSEMBLE:
        if 0 not in done:
            members = [read(seed) for seed in range(1, config.seeds + 1)]
            yield 0, measure(config, images, ensemble(network, members))
        return
    for seed in range(1, config.seeds + 1):
        if seed not in done:
            own, fitted = linearised(config, images, network, read(seed), how)
            yield seed, measure(config, images, own) | fitted


def ensemble(network: Network, members: list[Any]) -> Predict:
    """The mean of the members' probabilities."""

    def probabilities(images):
        each = [
            bayes.predict(network.logits, None, member, images, batch_size=BATCH)
            for member in members
        ]
        return jnp.mean(jnp.stack(each), 0)

    return probabilities


def linearised(
    config: BayesStudy, images: Images, network: Network, trained: Any, how: str
) -> tuple[Predict, Record]:
    """Laplace's predictions around some weights."""
    params, model_state = trained
    x, y = images.data.x_train, images.data.y_train
    # Whole batches: one program, as an incomplete one would be another.
    size = min(BATCH, len(x))
    batches = [
        (model_state, x[i : i + size], y[i : i + size])
        for i in range(0, len(x) - size + 1, size)
    ]
    tagged = kfac.tag(network.loss, params, *batches[0])
    posterior = bayes.laplace(tagged, params, batches, how, num_data=len(x))
    posterior = posterior.tune_prior()

    def logits(params, images):
        return network.logits((params, model_state), images)

    def probabilities(images):
        parts = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
        found = [bayes.predict_glm(logits, posterior, params, part) for part in parts]
        return jnp.concatenate(found)

    precision = np.asarray(posterior.prior_precision)
    evidence = float(posterior.log_marginal_likelihood())
    return probabilities, {"precision": float(precision[0]), "evidence": evidence}
