"""The exact natural gradient of a batch, solved in the space of its outputs."""

from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from kfac_jax_lite.core.linalg import all_finite
from kfac_jax_lite.core.mesh import REPLICATED, automatic, explicit_mesh, specs_of
from kfac_jax_lite.core.pytree import choose
from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.ntk.jacobian import Batch, checked, flat, join
from kfac_jax_lite.optimizer import damping as damping_lib
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss

# Of a gradient, what is smaller than so many roundings is no remainder but rounding.
ROUNDINGS = 16.0


class DualState(NamedTuple):
    """State of ``dual_natural_gradient``.

    Attributes:
        count: Steps taken, int32.
        skipped: Steps refused because something was not finite, int32.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    skipped: Array


def dual_natural_gradient(
    tagged: TaggedLoss,
    damping: damping_lib.Damping,
    *,
    solver: str = "cholesky",
    independent: bool = False,
    chunk: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The exact natural gradient ``(F + λI)⁻¹ g`` of one batch, by its dual.

    ``F = Kᵀ K`` is the exact Fisher matrix (the generalised Gauss-Newton matrix) of the
    batch given to ``update``, and for ``g = ∇L = Kᵀ w / √n``, ``S w = r``,

    ``u = Kᵀ (K Kᵀ + λI)⁻¹ w / √n``.

    The residuals ``r`` lie in the range of ``S``, also where ``Λ`` is singular
    (categorical: ``w = r / √p``). Nothing is divided by ``λ``, and ``Kᵀ`` takes back
    what rounding adds to the solution in directions of small eigenvalues; Woodbury's
    formula, ``(g − Kᵀ (K Kᵀ + λI)⁻¹ K g) / λ``, has an error of ``ε |g| / λ``, a
    thousand times and more where ``g`` lies in directions of large eigenvalues.
    Whatever ``g`` is, its part along ``∇L`` is taken the first way and the remainder
    (weight decay, a regulariser in the loss, gradients of other batches) by Woodbury:
    the result is ``(F + λI)⁻¹ g`` for every ``g``. A remainder below the rounding of
    ``Kᵀ w`` is dropped, else it would come back divided by ``λ``.

    ``solver="cholesky"`` makes ``K Kᵀ``: cheapest, ``K`` is streamed, errors up to
    about ``ε λ_max / λ``, largest in directions whose eigenvalue is near ``λ``.
    ``solver="qr"`` factorises ``[Kᵀ; √λ I] = Q R`` and takes ``u = Q₁ R⁻ᵀ w / √n``:
    ``K`` is held in memory (``D`` gradients), several times the arithmetic, errors up
    to about ``ε √(λ_max / λ)``. Where ``λ`` is below ``ε λ_max`` a Cholesky
    factorisation may fail, which makes the update zero.

    Cost: the kernel, two or three passes over the batch, and ``D³/3`` operations.

    Devices: under ``jit`` with a sharded batch nothing changes (Auto and Explicit
    meshes). Under ``pmap`` and ``shard_map`` every device must be given the whole batch
    (``lax.all_gather`` it) and its gradient: the dual couples all rows.

    Args:
        tagged: The tagged loss; its output must be marked.
        damping: ``λ``, a number or an optax schedule of the steps taken.
        solver: ``"cholesky"`` or ``"qr"``.
        independent: As in ``kernel``.
        chunk: As in ``kernel``.

    Returns:
        The transformation; ``update`` needs ``params`` and ``batch=``, the loss's
        arguments after ``params``, as a tuple. Where the gradient, the batch or the
        factorisation is not finite, updates are zero and ``skipped`` counts it.

    Raises:
        TypeError: ``damping`` is no number or schedule.
        ValueError: ``damping`` or ``chunk`` is out of range; an unknown solver.
    """
    damping_lib.check(damping)
    if isinstance(damping, damping_lib.Adaptive):
        raise TypeError("dual_natural_gradient wants a number or a schedule.")
    chunk = checked(chunk)
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {tuple(SOLVERS)}, got {solver!r}.")
    solve = SOLVERS[solver]

    def init(params: Any):
        del params
        return DualState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        batch = extra_args.get("batch")
        if params is None or not isinstance(batch, tuple):
            raise ValueError(
                "dual_natural_gradient: update needs params and batch=(x, y, …), the "
                f"loss's arguments as a tuple; got params of type {type(params)} and "
                f"batch of type {type(batch)}."
            )
        shift = damping_lib.value_at(damping, state.count)

        def compute(grads: Any, params: Any, batch: tuple[Any, ...], shift: Array):
            return solve(Batch(tagged, params, batch, independent, chunk), grads, shift)

        specs = REPLICATED if explicit_mesh(updates) is None else specs_of(updates)
        arguments = updates, params, batch, shift
        new = automatic(compute, *arguments, out_specs=specs)
        good = all_finite(updates) & all_finite(new)
        new = choose(good, new, jax.tree.map(jnp.zeros_like, new))
        return new, DualState(state.count + good, state.skipped + ~good)

    return optax.GradientTransformationExtraArgs(init, update)


def by_cholesky(batch: Batch, grads: Any, shift: Array) -> Any:
    """``(F + λI)⁻¹ g`` by a Cholesky factorisation of ``K Kᵀ + λI``."""
    gram, w = batch.dual(), weights(batch)
    share, rest = split(batch, grads, w, jnp.trace(gram))
    shift = shift.astype(gram.dtype)
    factor = jax.scipy.linalg.cho_factor(gram + shift * jnp.eye(len(gram)))
    x = share * w - batch.whiten(batch.push(rest)) / shift
    pulled = batch.pull(batch.colour(jax.scipy.linalg.cho_solve(factor, x)))

    def combine(p: Any, r: Any, g: Any):
        return (p.astype(r.dtype) / batch.terms + r / shift).astype(g.dtype)

    return jax.tree.map(combine, pulled, rest, grads)


def by_qr(batch: Batch, grads: Any, shift: Array) -> Any:
    """``(F + λI)⁻¹ g`` by a QR factorisation of ``[Kᵀ; √λ I]``."""
    n, w = batch.terms, weights(batch)
    k = batch.whiten(batch.jacobian()) / jnp.sqrt(n)
    share, rest = split(batch, grads, w, jnp.sum(k * k))
    shift, v = shift.astype(k.dtype), flat(rest)
    q, r = jnp.linalg.qr(jnp.concatenate([k.T, jnp.sqrt(shift) * jnp.eye(len(k))]))
    q = q[: k.shape[1]]
    solved = jax.scipy.linalg.solve_triangular(r, w / jnp.sqrt(n), trans="T")
    u = q @ (share * solved) + (v - q @ (q.T @ v)) / shift
    shaped = jax.flatten_util.ravel_pytree(rest)[1](u.astype(v.dtype))
    return jax.tree.map(lambda x, g: x.astype(g.dtype), shaped, grads)


SOLVERS = {"cholesky": by_cholesky, "qr": by_qr}


def weights(batch: Batch) -> Array:
    """``w [D']`` with ``S w = r``."""
    # Categorical: S w = r − p Σ r, and the residuals of a row add up to zero.
    found = []
    for output, r in zip(batch.outputs, batch.residuals(), strict=True):
        z = output.value.astype(accumulation_dtype(output.value.dtype))
        variance = jnp.ones_like(z)
        if output.likelihood == "categorical":
            variance = jax.nn.softmax(z)
        elif output.likelihood == "bernoulli":
            variance = jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)
        tiny = jnp.finfo(z.dtype).tiny
        found.append(r / jnp.sqrt(jnp.maximum(variance, tiny)))
    return join(found)


def split(batch: Batch, grads: Any, w: Array, scale: Array) -> tuple[Array, Any]:
    """``g = a Kᵀ w / √n + rest``, ``w [D']``."""
    pulled = batch.pull(batch.colour(w))
    raised = jax.tree.map(lambda g: g.astype(accumulation_dtype(g.dtype)), grads)
    own = jax.tree.map(lambda p, g: p.astype(g.dtype) / batch.terms, pulled, raised)
    first = flat(own)
    square = jnp.vdot(first, first)
    share = jnp.vdot(flat(raised), first) / jnp.where(square > 0, square, 1)
    rest = jax.tree.map(lambda g, o: g - share * o, raised, own)
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(grads))
    noise = (ROUNDINGS * eps) ** 2 * scale * jnp.vdot(w, w) / batch.terms
    large = jnp.sum(jnp.square(flat(rest))) > noise
    return share, choose(large, rest, jax.tree.map(jnp.zeros_like, rest))
