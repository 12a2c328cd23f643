"""What is measured of a network at one checkpoint."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
import scipy.sparse.linalg

import kfac_jax_lite as kfac
from experiments.survey.config import APPROXIMATIONS, MATRICES, TOP, SurveyConfig
from experiments.survey.problem import Problem, evaluate
from kfac_jax_lite.curvature import blocks, measures, spectra
from kfac_jax_lite.curvature.blocks import DensePart
from kfac_jax_lite.curvature.kronecker import kronecker_parts
from kfac_jax_lite.curvature.laws import Law, samples
from kfac_jax_lite.curvature.layout import make_layout
from kfac_jax_lite.curvature.operator import Kept
from kfac_jax_lite.curvature.stream import Stream, ravel
from kfac_jax_lite.ntk.jacobian import Batch
from kfac_jax_lite.statistics.outputs import marked_loss

Places = Sequence[np.ndarray]
# Columns of one number each that are made here.
FIGURES = (
    "trace", "frobenius", "stable_rank", "effective_dimension", "condition_number",
    "log_det", "tic", "error", "spectral_error", "cosine", "overlap",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A symmetric matrix of diagonal blocks and its eigenvectors."""

    matrix: np.ndarray  # ``[P, P]``
    # Positions ``[k]`` of each block; None: the matrix is diagonal.
    places: Places | None
    # Eigenvalues of each block, ``[k]``; of a diagonal matrix one ``[P]``.
    values: list[np.ndarray]
    vectors: list[np.ndarray]  # eigenvectors ``[k, k]`` of each block, in columns
    top: np.ndarray  # ``[P, 10]``, eigenvectors of the largest eigenvalues (by value)

    @property
    def all_values(self) -> np.ndarray:
        return np.sort(np.concatenate(self.values))[::-1]

    def quotient(self, numerator: np.ndarray, damping: float) -> float:
        """``tr C (M⁺ + λ I)⁻¹``, ``M⁺`` without negative eigenvalues.

        Args:
            numerator: ``C [P, P]``.
            damping: ``λ``.
        """
        if self.places is None:
            shares = np.diag(numerator) / (np.maximum(self.values[0], 0) + damping)
            return float(shares.sum())
        total = 0.0
        for place, values, q in zip(
            self.places, self.values, self.vectors, strict=True
        ):
            block = numerator[np.ix_(place, place)]
            along = np.einsum("ij,ij->j", q, block @ q)
            total += float((along / (np.maximum(values, 0) + damping)).sum())
        return total


def decompose(matrix: np.ndarray, places: Places | None) -> Spectrum:
    """Eigenvalues and eigenvectors, block by block.

    Args:
        matrix: ``[P, P]``, symmetric but for rounding.
        places: positions of the blocks; None: of single entries.
    """
    size = len(matrix)
    count = min(TOP, size)
    if places is None:
        values = np.diag(matrix).copy()
        best = np.argsort(-values, kind="stable")[:count]
        top = np.zeros((size, count))
        top[best, np.arange(count)] = 1
        return Spectrum(np.diag(values), None, [values], [], top)
    kept = np.zeros_like(matrix)
    found = []
    for place in places:
        index = np.ix_(place, place)
        block = matrix[index]
        kept[index] = block = (block + block.T) / 2
        found.append(scipy.linalg.eigh(block, driver="evd"))
    values, vectors = [v for v, _ in found], [q for _, q in found]
    flat = np.concatenate(values)
    owner = np.repeat(np.arange(len(places)), [len(v) for v in values])
    number = np.concatenate([np.arange(len(v)) for v in values])
    top = np.zeros((size, count))
    for column, at in enumerate(np.argsort(-flat, kind="stable")[:count]):
        best = int(owner[at])
        top[places[best], column] = vectors[best][:, number[at]]
    return Spectrum(kept, places, values, vectors, top)


def empty() -> dict[str, Any]:
    """The columns of a matrix without figures."""
    lists: dict[str, Any] = {"eigenvalues": [], "cosines": [], "overlaps": []}
    return lists | dict.fromkeys(FIGURES)


def figures(values: np.ndarray, damping: float) -> dict:
    squares, positive = values**2, np.maximum(values, 0)
    square, largest = squares.sum(), squares.max()
    return {
        "eigenvalues": values[:TOP].tolist(),
        "trace": values.sum(),
        "frobenius": np.sqrt(square),
        "stable_rank": square / largest if largest else np.nan,
        "effective_dimension": (positive / (positive + damping)).sum(),
        "condition_number": (positive[0] + damping) / (positive[-1] + damping),
        "log_det": np.log(positive + damping).sum(),
    }


def differences(approximation: Spectrum, full: Spectrum) -> dict:
    """How far an approximation is from its matrix."""
    if approximation is full:
        whole = 1.0 if np.any(full.matrix) else np.nan
        return {
            "error": 0.0 * whole,
            "spectral_error": 0.0 * whole,
            "cosine": whole,
            "overlap": 1.0,
        }
    apart = approximation.matrix - full.matrix
    size = np.abs(full.all_values).max()
    return {
        "error": ratio(np.linalg.norm(apart), np.linalg.norm(full.matrix)),
        "spectral_error": ratio(spectral_norm(apart), size),
        "cosine": cosine(approximation.matrix, full.matrix),
        "overlap": overlap(approximation.top, full.top),
    }


def spectral_norm(matrix: np.ndarray) -> float:
    """``‖M‖₂`` of a symmetric matrix, by Lanczos from a fixed vector."""
    if len(matrix) < 3 or not np.any(matrix):
        return float(np.linalg.norm(matrix, 2))
    first = np.random.default_rng(0).standard_normal(len(matrix))
    options: Any = {"v0": first, "tol": 1e-6, "return_eigenvectors": False}
    value: Any = scipy.sparse.linalg.eigsh(matrix, k=1, which="LM", **options)
    return float(abs(value[0]))


def ratio(upper: Any, lower: Any) -> float:
    """A quotient; not a number where the divisor is zero."""
    return float(upper / lower) if lower else np.nan


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    """``⟨A, B⟩ / (‖A‖ ‖B‖)``."""
    both = np.linalg.norm(left) * np.linalg.norm(right)
    return ratio(np.vdot(left, right), both)


def overlap(left: np.ndarray, right: np.ndarray) -> float:
    """``‖Uᵀ V‖_F² / k`` of two orthonormal bases ``[P, k]``: 1 for the same space."""
    return float(np.square(left.T @ right).sum() / left.shape[1])


def rows_of(
    spectra: dict[str, dict[str, Spectrum]], num_train: int, damping: float
) -> list[dict]:
    covariance = spectra["full"]["gradient_covariance"].matrix
    rows = []
    for approximation, matrices in spectra.items():
        for name, one in matrices.items():
            row: dict = {"matrix": name, "approximation": approximation}
            row |= figures(one.all_values, damping)
            row["tic"] = one.quotient(covariance, damping) / num_train
            row |= differences(one, spectra["full"][name])
            others = list(matrices.values())
            row["cosines"] = [cosine(one.matrix, other.matrix) for other in others]
            row["overlaps"] = [overlap(one.top, other.top) for other in others]
            rows.append(row)
    return rows


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
        "stable_rank": ratio(square, ends["magnitude"] ** 2),
        "effective_dimension": dimension,
        "condition_number": (max(largest[0], 0) + damping) / low,
        "log_det": log_det,
    }


def know(operator: Operator, key: jax.Array, damping: float) -> Known:
    """The measures of one matrix and its largest eigenvectors."""
    if isinstance(operator.form, Kept):
        row = figures(operator.eigenvalues(), damping)
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
    return float(np.clip(ratio(found.value, left.norm * right.norm), -1, 1))


def estimated_differences(one: Known, full: Known, key: jax.Array) -> dict[str, float]:
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
        "error": ratio(np.sqrt(square), full.norm),
        "spectral_error": ratio(*np.abs(ends)),
        "cosine": inner(one, full, key),
        "overlap": overlap(one.top, full.top),
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
            rows.append(row | empty())
            continue
        others = [known.get((approximation, other)) for other in MATRICES]
        row |= one.row
        row["tic"] = penalty(covariance, name, one, num_train, key, damping)
        row |= estimated_differences(one, known["full", name], key)
        row["cosines"] = [o and inner(one, o, key) for o in others]
        row["overlaps"] = [o and overlap(one.top, o.top) for o in others]
        rows.append(row)
    return rows


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
    batch = Batch(tagged, params, args, True, CHUNK)
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


DIGITS = 4


def size_of(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def rounded(value: Any) -> Any:
    """Numbers to four significant digits, in nested values; files stay small."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{DIGITS}g}")
    return value


def state_of(config: SurveyConfig, problem: Problem, params: Any) -> dict[str, Any]:
    """Losses, accuracies, gradient and sharpness."""
    data = problem.data
    train = evaluate(problem, params, data.x_train, data.y_train)
    test = evaluate(problem, params, data.x_test, data.y_test)
    gradient = jax.grad(problem.train_loss)(params)
    rise, _ = kfac.curvature.measures.sharpness(
        problem.train_loss, params, config.sharpness_radius, config.sharpness_steps
    )
    return {
        "train_loss": train[0],
        "test_loss": test[0],
        "train_accuracy": train[1],
        "test_accuracy": test[1],
        "gradient_norm": float(optax.tree.norm(gradient)),
        "sharpness": rise,
    }


def dense_spectra(
    problem: Problem, params: Any, key: jax.Array
) -> dict[str, dict[str, Spectrum]] | None:
    """All matrices in full, decomposed."""
    layout = make_layout(problem.tagged, params)
    layers = [place.reshape(-1) for place in layout.blocks]
    places = {
        "full": [np.arange(layout.size)],
        "block_diagonal": layers,
        "kronecker": layers,
        "diagonal": None,
    }

    full = full_matrices(problem, params, key)
    products = kronecker_matrices(problem, params, key, full)
    if not all(np.isfinite(m).all() for m in (*full.values(), *products.values())):
        return None
    return {
        approximation: {
            name: decompose(
                (products if approximation == "kronecker" else full)[name],
                places[approximation],
            )
            for name in MATRICES
        }
        for approximation in APPROXIMATIONS
    }


def matrix_rows(
    config: SurveyConfig, problem: Problem, params: Any, key: jax.Array
) -> list[dict[str, Any]]:
    """The rows of a checkpoint, without what is the same in all of them."""
    if size_of(params) > config.dense_below:
        return estimated_rows(problem, params, key, config.damping)
    spectra = dense_spectra(problem, params, key)
    if spectra is not None:
        return rows_of(spectra, len(problem.data.y_train), config.damping)
    return no_rows()


def no_rows() -> list[dict[str, Any]]:
    """The rows of matrices that are not finite."""
    return [
        {"matrix": name, "approximation": approximation, **empty()}
        for approximation in APPROXIMATIONS
        for name in MATRICES
    ]


def checkpoint(
    config: SurveyConfig, problem: Problem, params: Any, key: jax.Array
) -> list[dict[str, Any]]:
    state = state_of(config, problem, params)
    finite = math.isfinite(state["train_loss"])
    rows = matrix_rows(config, problem, params, key) if finite else no_rows()
    return [rounded(state | row) for row in rows]
