"""What is measured of a network at one checkpoint."""

import math
from typing import Any

import jax
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments.survey import dense
from experiments.survey.config import APPROXIMATIONS, MATRICES, SurveyConfig
from experiments.survey.estimates import estimated_rows
from experiments.survey.matrices import full_matrices, kronecker_matrices
from experiments.survey.problem import Problem, evaluate
from kfac_jax_lite.curvature.layout import make_layout

DIGITS = 4


def size_of(params: Any) -> int:
    """The number of parameters."""
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
) -> dict[str, dict[str, dense.Spectrum]] | None:
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
            name: dense.decompose(
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
        return dense.rows_of(spectra, len(problem.data.y_train), config.damping)
    return no_rows()


def no_rows() -> list[dict[str, Any]]:
    """The rows of matrices that are not finite."""
    return [
        {"matrix": name, "approximation": approximation, **dense.empty()}
        for approximation in APPROXIMATIONS
        for name in MATRICES
    ]


def checkpoint(
    config: SurveyConfig, problem: Problem, params: Any, key: jax.Array
) -> list[dict[str, Any]]:
    """The rows of a checkpoint."""
    state = state_of(config, problem, params)
    finite = math.isfinite(state["train_loss"])
    rows = matrix_rows(config, problem, params, key) if finite else no_rows()
    return [rounded(state | row) for row in rows]
