"""Laplace posteriors of small problems and their dense float64 covariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.bayes.laplace import laplace
from tests import information
from tests.information import Problem
from tests.oracles import no_hook

STRUCTURES = (
    "diagonal",
    "kronecker",
    "ekfac",
    "unit_wise",
    "full",
    "last_layer",
)
QUICK = ("diagonal", "kronecker", "full", "last_layer")
PRIOR, TEMPERATURE, DATA = 0.7, 0.5, 40.0
HEADS = {"mlp": "layer1", "small_conv": "head", "embedding": "head"}

problem = functools.cache(lambda name: Problem(information.MODELS[name]))


@functools.cache
def dense_ggn(name, approximation):
    """The curvature, from explicit Jacobians."""
    return information.dense(problem(name), "ggn", approximation)


@functools.cache
def mean_loss(name):
    """The loss at the parameters of a problem."""
    case = problem(name)
    return float(case.model.plain_loss(case.params, case.x, case.y))


@functools.cache
def posterior(name, structure):
    """A posterior of a problem of the table."""
    case = problem(name)
    options = {"num_data": DATA, "prior_precision": PRIOR, "temperature": TEMPERATURE}
    return laplace(case.tagged, case.params, case.batches, structure, **options)


def uncertain(name, structure):
    """Which entries are uncertain, bool ``[P]``."""
    case = problem(name)
    if structure != "last_layer":
        return np.ones(case.flat.size, bool)
    head = HEADS.get(name, "layer1")
    marks = {
        layer: jax.tree.map(lambda x, v=layer == head: np.full(x.shape, v), p)
        for layer, p in case.params.items()
    }
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(marks)])


def precision(name, structure, prior=PRIOR, temperature=TEMPERATURE):
    """``N/τ F + p I`` of the uncertain entries."""
    form = "full" if structure == "last_layer" else structure
    matrix = dense_ggn(name, form)
    keep = uncertain(name, structure)
    matrix = matrix[np.ix_(keep, keep)]
    return DATA / temperature * matrix + prior * np.eye(len(matrix))


def covariance(name, structure):
    """``Σ [P, P]``, zero where nothing is uncertain."""
    keep = uncertain(name, structure)
    whole = np.zeros((len(keep), len(keep)))
    whole[np.ix_(keep, keep)] = np.linalg.inv(precision(name, structure))
    return whole


def root(found, params):
    """``R``: where every unit of noise takes the parameters, ``[P, D]``."""

    def offset(noise):
        moved = found.moved(params, noise)
        flat = [jax.flatten_util.ravel_pytree(tree)[0] for tree in (moved, params)]
        return flat[0] - flat[1]

    size = sum(leaf.size for leaf in found.uncertain(params))
    return np.asarray(jax.jit(jax.vmap(offset))(jnp.eye(size))).T


def run_mlp(params, x):
    """The network of the problem ``mlp``."""
    return problem("mlp").model.forward(params, x, no_hook)
