"""Figures of matrices that are there in full, by LAPACK in float64.

A matrix comes with its diagonal blocks, outside of which it is zero; each block is
decomposed once. Where an eigenvalue must not be negative, it is taken as zero: in the
effective dimension, the condition number, the log-determinant and Takeuchi's penalty.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg

from experiments.survey.config import TOP

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
        """All eigenvalues, descending."""
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
    """The measures of one matrix."""
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
    """The rows of a checkpoint."""
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
