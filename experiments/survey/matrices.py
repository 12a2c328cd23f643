"""The matrices of a small network in full, by the cheapest exact ways there are.

``op.to_dense()`` takes ``P`` products with a matrix over the data, and a Kronecker
product of the Hessian or the centred covariance its blocks once more. Of a network
whose examples do not mix, one backward pass for each output of each example gives the
Jacobian ``J [N C, P]``, of which all matrices but the Hessian are made; and the nearest
Kronecker products are those of matrices that are there. The tests hold all of them
against the operators.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax_lite as kfac
from experiments.survey.config import MATRICES
from experiments.survey.problem import Problem
from kfac_jax_lite.curvature import blocks
from kfac_jax_lite.curvature.kronecker import kronecker_parts
from kfac_jax_lite.curvature.laws import Law, samples
from kfac_jax_lite.curvature.layout import make_layout
from kfac_jax_lite.curvature.stream import Stream
from kfac_jax_lite.ntk.jacobian import make_batch
from kfac_jax_lite.outputs import marked_loss

# Examples whose rows of the Jacobian are computed together.
CHUNK = 64
# Laws without statistics of K-FAC's: their products are the nearest to their blocks.
NEAREST = {
    "hessian": Law("hessian", "hessian"),
    "gradient_covariance": Law("gradient_covariance", "empirical", centred=True),
}
SAMPLED = Law("mc_fisher", "mc")


@functools.partial(jax.jit, static_argnames=("tagged",))
def sums(tagged: kfac.TaggedLoss, params: Any, args: tuple, key: jax.Array) -> dict:
    """Sums over the examples of a batch, of what the matrices are made.

    Returns:
        ``N`` times the exact, the sampled and the empirical Fisher matrix ``[P, P]``
        and the gradient ``[P]``.
    """
    batch = make_batch(tagged, params, args, True, CHUNK)
    model = marked_loss(tagged, params, args)
    jacobian = batch.jacobian()
    by_example = jacobian.reshape(*batch.only_shape(), -1)

    def gradients(residuals):
        return jnp.einsum("nc,ncp->np", residuals, by_example)

    ((drawn,),) = samples(SAMPLED, model, params, batch.outputs, key)
    sampled, (own,) = gradients(drawn), batch.residuals()
    own = gradients(own)
    root = batch.whiten(jacobian)
    return {
        "fisher": root.T @ root,
        "mc_fisher": sampled.T @ sampled,
        "empirical": own.T @ own,
        "gradient": own.sum(0),
    }


def full_matrices(problem: Problem, params: Any, key: jax.Array) -> dict:
    """The four matrices.

    Returns:
        ``[P, P]`` float64 by name.
    """
    total: dict[str, np.ndarray] = {}
    for number, args in enumerate(problem.batches):
        one = jax.random.fold_in(key, number)
        for name, value in sums(problem.tagged, params, args, one).items():
            total[name] = total.get(name, 0) + np.asarray(value, np.float64)
    mean = {name: value / len(problem.data.y_train) for name, value in total.items()}
    hessian = kfac.curvature.hessian(problem.tagged, params, problem.batches)
    gradient = mean["gradient"]
    found = {
        "hessian": np.asarray(hessian.to_dense(), np.float64),
        "fisher": mean["fisher"],
        "mc_fisher": mean["mc_fisher"],
        "gradient_covariance": mean["empirical"] - np.outer(gradient, gradient),
    }
    return {name: found[name] for name in MATRICES}


@dataclasses.dataclass(frozen=True)
class Formed(Stream):
    """A matrix that is there, in place of one over batches."""

    matrix: jax.Array  # ``[P, P]``

    def moments(self, indices: Sequence[np.ndarray]) -> list[jax.Array]:
        """Diagonal blocks ``[n, k, k]`` at positions ``[n, k]``."""
        return [self.matrix[i[:, :, None], i[:, None, :]] for i in indices]


@functools.partial(jax.jit, static_argnames=("tagged", "law"))
def nearest(tagged: kfac.TaggedLoss, params: Any, law: Law, matrix: jax.Array) -> Any:
    """Each layer's block as the nearest Kronecker product, ``[P, P]``."""
    formed = Formed(tagged, law, params, (), None, False, None, matrix)
    parts = kronecker_parts(formed, make_layout(tagged, params), moments=False)
    return blocks.dense(parts, len(matrix), matrix.dtype)


def kronecker_matrices(
    problem: Problem, params: Any, key: jax.Array, full: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The Kronecker approximations of the four matrices.

    Returns:
        ``[P, P]`` float64 by name.
    """
    record = problem.tagged, params
    operators = {
        "fisher": kfac.curvature.fisher(*record, problem.batches, "kronecker"),
        "mc_fisher": kfac.curvature.mc_fisher(
            *record, problem.batches, "kronecker", key=key
        ),
    }
    found = {name: op.to_dense() for name, op in operators.items()}
    for name, law in NEAREST.items():
        found[name] = nearest(*record, law, jnp.asarray(full[name], jnp.float32))
    return {name: np.asarray(found[name], np.float64) for name in MATRICES}
