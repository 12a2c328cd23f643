"""Measures of a trained network that are made from its information matrices.

They are figures of one matrix, ``M``, or of two, ``C`` and ``F``; which of them says
something about generalisation is a question for experiments. Without a key they are
exact, from all eigenvalues or dense matrices in float64; with one they take products
only, and what is stochastic comes with its error.

References:
    MacKay, 1992, "Bayesian interpolation" (the effective number of parameters);
    Takeuchi, 1976, and Thomas et al., 2020, arXiv:1906.07774 (TIC); Foret et al., 2021,
    arXiv:2010.01412, and Keskar et al., 2017, arXiv:1609.04836 (sharpness); Tropp,
    2015, arXiv:1501.01571, Sec. 2.1.15 (the stable rank).
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kfac_jax_lite.core.types import Array
from kfac_jax_lite.curvature.flat import Estimate, flatten, mean_and_error, signs
from kfac_jax_lite.curvature.spectra import eigsh, frobenius, quadrature

SAMPLES, STEPS = 16, 60


@runtime_checkable
class Matrix(Protocol):
    """What is asked of an operator: ``kfac.curvature.Operator`` is one."""

    @property
    def structure(self) -> Any:
        """Shapes and dtypes of the parameters."""
        ...

    def mv(self, v: Any) -> Any:
        """``M v``."""
        ...

    def to_dense(self) -> Array:
        """``M [P, P]``."""
        ...

    def eigenvalues(self) -> np.ndarray:
        """All of them, descending, ``[P]`` float64."""
        ...


def effective_dimension(
    matrix: Matrix,
    damping: float,
    key: Array | None = None,
    num_samples: int = SAMPLES,
    num_steps: int = STEPS,
) -> Estimate:
    """``d(λ) = tr M (M + λ I)⁻¹``: how many directions are steeper than ``λ``.

    Args:
        matrix: ``M``, positive semidefinite.
        damping: ``λ``, above 0.
        key: PRNG key of a stochastic estimate (Lanczos quadrature); None: exact, from
            all eigenvalues.
        num_samples: Vectors of the estimate.
        num_steps: Products for each.

    Returns:
        The dimension, between 0 and ``P``; its error is 0 where it is exact.

    Raises:
        ValueError: ``λ`` is not positive.
    """
    if not damping > 0:
        raise ValueError(f"damping is {damping}, wanted a number above 0")

    def share(x: Any):
        return x / (x + damping)

    if key is None:
        return Estimate(float(share(np.maximum(matrix.eigenvalues(), 0)).sum()), 0.0)
    found = quadrature(matrix.mv, matrix.structure, key, num_samples, num_steps)
    return found.integrate(lambda x: share(np.maximum(x, 0)))


def stable_rank(
    matrix: Matrix, key: Array | None = None, num_samples: int = SAMPLES
) -> Estimate:
    """``‖M‖_F² / ‖M‖₂²``: between 1 and the rank, and robust against tiny eigenvalues.

    Args:
        matrix: ``M``, symmetric.
        key: PRNG key of a stochastic estimate; None: exact.
        num_samples: Vectors of the estimate of ``‖M‖_F²``.

    Returns:
        The stable rank; 0 for a zero matrix.
    """
    if key is None:
        values = matrix.eigenvalues() ** 2
        return Estimate(
            float(values.sum() / values.max()) if values.any() else 0.0, 0.0
        )
    one, two = jax.random.split(key)
    top = eigsh(matrix.mv, matrix.structure, 1, one, which="magnitude").values[0] ** 2
    square = frobenius(matrix.mv, matrix.structure, two, num_samples)
    if top == 0:
        return Estimate(0.0, 0.0)
    return Estimate(float(square.value / top), float(square.error / top))


def condition_number(matrix: Matrix, key: Array, damping: float = 0.0) -> float:
    """``(λ_max + λ) / (λ_min + λ)``, from the two ends of the spectrum.

    Args:
        matrix: ``M``, positive semidefinite.
        key: PRNG key of Lanczos' first vectors.
        damping: ``λ``.

    Returns:
        The number; infinite where ``λ_min + λ`` is not positive.
    """
    one, two = jax.random.split(key)
    high = eigsh(matrix.mv, matrix.structure, 1, one, which="largest").values[0]
    low = eigsh(matrix.mv, matrix.structure, 1, two, which="smallest").values[0]
    return float((high + damping) / (low + damping)) if low + damping > 0 else np.inf


def trace_of_quotient(
    numerator: Matrix,
    denominator: Matrix,
    damping: float,
    key: Array | None = None,
    num_samples: int = SAMPLES,
    max_iterations: int = 200,
    tol: float = 1e-6,
) -> Estimate:
    """``tr C (F + λ I)⁻¹``.

    With ``C`` the gradients' covariance and ``F`` the Hessian or the Fisher matrix over
    ``N`` examples, ``tr(C F⁻¹) / N`` is Takeuchi's correction: the expected gap between
    test and training loss at a minimum.

    Args:
        numerator: ``C``.
        denominator: ``F``, on the same parameters; ``F + λ I`` positive definite.
        damping: ``λ``.
        key: PRNG key of a stochastic estimate: signs ``v``, ``vᵀ C (F + λ I)⁻¹ v`` by
            conjugate gradients; None: exact.
        num_samples: Vectors of the estimate.
        max_iterations: Of conjugate gradients for each.
        tol: Relative residual at which they end.

    Returns:
        The trace, and the standard error of the samples; what conjugate gradients have
        left is not in it.

    Raises:
        ValueError: The matrices act on different parameters.
    """
    if numerator.structure != denominator.structure:
        raise ValueError(
            f"the matrices act on different parameters: {numerator.structure} and "
            f"{denominator.structure}"
        )
    if key is None:
        c, f = (np.asarray(m.to_dense(), np.float64) for m in (numerator, denominator))
        return Estimate(
            float(np.trace(np.linalg.solve(f + damping * np.eye(len(f)), c))), 0.0
        )
    upper = flatten(numerator.mv, numerator.structure)
    lower = flatten(denominator.mv, denominator.structure)
    samples = []
    for one in jax.random.split(key, num_samples):
        (v,) = signs(one, 1, upper)
        solved = conjugate_gradients(
            lambda x: lower.product(x) + damping * x, v, max_iterations, tol
        )
        samples.append(float(jnp.vdot(upper.product(v), solved)))
    return mean_and_error(np.array(samples))


def conjugate_gradients(
    product: Callable[[Array], Array], b: Array, max_iterations: int, tol: float
) -> Array:
    """Solves ``M x = b`` for products that run on the host.

    ``jax.scipy.sparse.linalg.cg`` wants a product that can be traced, which one that
    streams a data set cannot.

    Args:
        product: ``x -> M x``, ``M`` positive definite.
        b: ``[P]``.
        max_iterations: The most products.
        tol: Residual at which it ends, relative to ``‖b‖``.

    Returns:
        ``x``.

    References:
        Hestenes & Stiefel, 1952.
    """
    x, r = jnp.zeros_like(b), b
    p, square = r, float(jnp.vdot(r, r))
    end = tol**2 * square
    for _ in range(max_iterations):
        if square <= end:
            break
        image = product(p)
        step = square / float(jnp.vdot(p, image))
        x, r = x + step * p, r - step * image
        before, square = square, float(jnp.vdot(r, r))
        p = r + (square / before) * p
    return x


def tic(
    covariance: Matrix,
    hessian: Matrix,
    num_data: int,
    damping: float,
    key: Array | None = None,
    num_samples: int = SAMPLES,
) -> Estimate:
    """Takeuchi's information criterion's penalty, ``tr(C (H + λ I)⁻¹) / n``.

    Args:
        covariance: ``C``, the gradients' covariance.
        hessian: ``H``, the Hessian, or the Fisher or Gauss-Newton matrix in its place.
        num_data: ``n``, examples of the training set.
        damping: ``λ``.
        key: PRNG key; None: exact.
        num_samples: Vectors of the estimate.

    Returns:
        The penalty, in units of the loss.
    """
    found = trace_of_quotient(covariance, hessian, damping, key, num_samples)
    return Estimate(found.value / num_data, found.error / num_data)


def sharpness(
    loss: Callable[[Any], Array],
    params: Any,
    radius: float,
    num_steps: int = 20,
) -> tuple[float, Any]:
    """``max L(θ + δ) − L(θ)`` over ``‖δ‖ ≤ ρ``, by projected gradient ascent.

    A lower bound: the ascent may end in another maximum. Its first step, of length
    ``ρ``, is that of sharpness-aware minimisation; later ones are ``ρ / 4`` long.

    Args:
        loss: ``params -> L``, differentiable; may stream data on the host.
        params: ``θ``.
        radius: ``ρ``, above 0.
        num_steps: Gradients of the loss.

    Returns:
        The greatest rise seen, at least 0, and the ``δ`` of it.

    Raises:
        ValueError: ``ρ`` is not positive.
    """
    if not radius > 0:
        raise ValueError(f"radius is {radius}, wanted a number above 0")
    value_and_grad = jax.value_and_grad(loss)
    start, slope = value_and_grad(params)
    delta, length = jax.tree.map(jnp.zeros_like, params), radius
    best: tuple[float, Any] = (0.0, delta)
    for _ in range(num_steps):
        size = optax.tree.norm(slope)
        if not size > 0:
            break
        moved = jax.tree.map(
            lambda d, g, scale=length / size: (d + scale * g).astype(d.dtype),
            delta,
            slope,
        )
        far = jnp.minimum(1.0, radius / optax.tree.norm(moved))
        delta = jax.tree.map(lambda d, far=far: (far * d).astype(d.dtype), moved)
        value, slope = value_and_grad(jax.tree.map(jnp.add, params, delta))
        rise = float(value) - float(start)
        best = max(best, (rise, delta), key=lambda pair: pair[0])
        length = radius / 4
    return best
