"""Figures of matrices that are too large to be formed, from products with them.

Full and block-diagonal matrices are known by their products: eigenvalues by Lanczos,
traces of functions by Lanczos quadrature, norms and inner products by Hutchinson.
Kronecker products and the (estimated) diagonal have closed forms. What would take more
is None: Takeuchi's penalty of the Hessian, which is indefinite, and all figures of the
nearest Kronecker products where a layer is too large for its block to be formed.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax_lite as kfac
from experiments.survey import dense
from experiments.survey.config import APPROXIMATIONS, MATRICES, TOP
from experiments.survey.problem import Problem
from kfac_jax_lite.curvature import measures, spectra
from kfac_jax_lite.curvature.blocks import DensePart
from kfac_jax_lite.curvature.operator import Kept
from kfac_jax_lite.curvature.stream import ravel

# Products with random vectors; vectors and steps of the quadrature.
SAMPLES, VECTORS, STEPS = 32, 8, 40
Operator = kfac.curvature.Operator


@dataclasses.dataclass(frozen=True)
class Known:
    """A matrix with what its comparisons need."""

    operator: Operator  # its products
    top: np.ndarray  # ``[P, 10]``, eigenvectors of the largest eigenvalues
    norm: float  # ``‖M‖_F``
    row: dict[str, Any]  # its columns


def operators(
    problem: Problem, params: Any, key: jax.Array
) -> Callable[[str, str], Operator | None]:
    """The library's operators on the training set."""

    def make(matrix, approximation):
        options = {"key": key} if matrix == "mc_fisher" else {}
        function = getattr(kfac.curvature, matrix)
        record = problem.tagged, params, problem.batches
        if approximation != "diagonal":
            try:
                return function(*record, approximation, **options)
            except ValueError:  # a layer's dense block is too large
                return None
        whole = function(*record, "full", **options)
        flat = ravel(whole.diagonal(key, SAMPLES).value)
        part = DensePart(jnp.arange(flat.size)[:, None], flat[:, None, None])
        form = Kept([part], flat.size)
        return dataclasses.replace(whole, approximation="diagonal", form=form)

    return make


def streamed(operator: Operator, key: jax.Array, damping: float) -> dict[str, Any]:
    """The measures of a matrix that is known by its products."""
    mv, like = operator.mv, operator.structure
    keys = jax.random.split(key, 5)
    ends = {
        which: operator.eigsh(1, one, which=which).values[0]
        for which, one in zip(("magnitude", "smallest"), keys, strict=False)
    }
    largest = operator.eigsh(TOP, keys[2]).values
    square = spectra.frobenius(mv, like, keys[3], SAMPLES, mm=operator.mm).value
    found = spectra.quadrature(mv, like, keys[4], VECTORS, STEPS)
    low = max(ends["smallest"], 0) + damping

    def functions(values):
        positive = np.maximum(values, 0)
        return np.stack([positive / (positive + damping), np.log(positive + damping)])

    dimension, log_det = found.integrate(functions).value
    return {
        "eigenvalues": largest.tolist(),
        "trace": operator.trace(keys[3], SAMPLES).value,
        "frobenius": np.sqrt(square),
        "stable_rank": dense.ratio(square, ends["magnitude"] ** 2),
        "effective_dimension": dimension,
        "condition_number": (max(largest[0], 0) + damping) / low,
        "log_det": log_det,
    }


def know(operator: Operator, key: jax.Array, damping: float) -> Known:
    """The measures of one matrix and its largest eigenvectors."""
    if isinstance(operator.form, Kept):
        row = dense.figures(operator.eigenvalues(), damping)
    else:
        row = streamed(operator, key, damping)
    vectors = operator.eigsh(TOP, key).vectors
    top = np.asarray(jax.vmap(ravel)(vectors), np.float64).T
    return Known(operator, top, float(row["frobenius"]), row)


def inner(left: Known, right: Known, key: jax.Array) -> float:
    """``⟨A, B⟩ / (‖A‖ ‖B‖)``, at most 1."""
    if left is right:
        return 1.0

    def product(v):
        return left.operator.mv(right.operator.mv(v))

    found = spectra.trace(product, left.operator.structure, key, SAMPLES)
    return float(np.clip(dense.ratio(found.value, left.norm * right.norm), -1, 1))


def differences(one: Known, full: Known, key: jax.Array) -> dict[str, float]:
    """How far an approximation is from its matrix."""
    if one is full:
        return {"error": 0.0, "spectral_error": 0.0, "cosine": 1.0, "overlap": 1.0}

    def apart(v):
        return jax.tree.map(jnp.subtract, one.operator.mv(v), full.operator.mv(v))

    like = full.operator.structure
    square = spectra.frobenius(apart, like, key, SAMPLES).value
    ends = [
        spectra.eigsh(mv, like, 1, key, which="magnitude").values[0]
        for mv in (apart, full.operator.mv)
    ]
    return {
        "error": dense.ratio(np.sqrt(square), full.norm),
        "spectral_error": dense.ratio(*np.abs(ends)),
        "cosine": inner(one, full, key),
        "overlap": dense.overlap(one.top, full.top),
    }


def penalty(
    covariance: Known, name: str, one: Known, num_train: int, key: Any, damping: float
) -> float | None:
    """Takeuchi's penalty; None for the Hessian."""
    if name == "hessian":
        return None
    record = covariance.operator, one.operator, num_train, damping, key
    return float(measures.tic(*record, VECTORS).value)


def estimated_rows(
    problem: Problem, params: Any, key: jax.Array, damping: float
) -> list[dict[str, Any]]:
    """The rows of a checkpoint."""
    make, num_train = operators(problem, params, key), len(problem.data.y_train)
    known: dict[tuple[str, str], Known] = {}
    for pair in itertools.product(APPROXIMATIONS, MATRICES):
        operator = make(pair[1], pair[0])
        if operator is not None:
            known[pair] = know(operator, key, damping)
    covariance = known["full", "gradient_covariance"]
    rows = []
    for approximation, name in itertools.product(APPROXIMATIONS, MATRICES):
        row: dict[str, Any] = {"matrix": name, "approximation": approximation}
        one = known.get((approximation, name))
        if one is None:
            rows.append(row | dense.empty())
            continue
        others = [known.get((approximation, other)) for other in MATRICES]
        row |= one.row
        row["tic"] = penalty(covariance, name, one, num_train, key, damping)
        row |= differences(one, known["full", name], key)
        row["cosines"] = [o and inner(one, o, key) for o in others]
        row["overlaps"] = [o and dense.overlap(one.top, o.top) for o in others]
        rows.append(row)
    return rows
