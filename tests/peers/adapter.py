"""K-FAC for tests that know parameters and gradients only.

The peers' tests call ``tx.update(grads, state, params)``: no loss, no network. K-FAC
wants statistics, so a loss is made that has this very gradient, as a user without the
loss could do: the linear one, ``L(p) = Σ pᵀ g``, tagged like any other, of one example.

- ``kfac`` and its relatives: ``pᵀ g`` is a matrix product, every parameter a dense
  layer with one output. ``A = g gᵀ`` over the whole parameter and ``G = 1``: the full
  matrix of gradient covariances, in every inverse method. ``kfac_elementwise`` makes
  the same gradient entry by entry: kind ``scale_shift``, for parameters on meshes.
- ``kfac_units``: the parameters are the mean of a normal output. With
  ``fisher="exact"``: kind ``diagonal``, for want of a layer.

What else is adapted: complex parameters are taken apart into real and imaginary parts
by ``optax.contrib.split_real_and_imaginary``; trees without a leaf and whole numbers,
both of which ``kfac.tag`` refuses, are left alone and made real; the layers of the last
``init`` are remembered for all, because ``optax.tree.map_params`` calls ``init``
without parameters, where a user would have given layers before.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import kfac_jax_lite as kfac

CALLS = {"init": 0, "update": 0}
HELD: dict[str, Any] = {}


def linear(params: Any, grads: Any) -> Any:
    """The loss whose gradient is ``grads``."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True)
    return sum(jnp.sum(jnp.vdot(p, g)) for p, g in pairs)


def elementwise(params: Any, grads: Any) -> Any:
    """The same as products of entries, which JAX also does on sharded axes."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True)
    return sum(jnp.sum(p * g) for p, g in pairs)


def units(params: Any, grads: Any) -> Any:
    """The same, the parameters being the mean of a normal output."""
    whole, slope = (
        jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])
        for tree in (params, grads)
    )
    return jnp.vdot(kfac.normal(whole[None])[0], slope)


def as_arrays(tree: Any) -> Any:
    """Python's numbers as arrays, whole numbers as real ones."""

    def convert(x):
        dtype = jnp.result_type(x)
        real = jnp.issubdtype(dtype, jnp.inexact)
        return jnp.asarray(x, dtype if real else jnp.float32)

    return jax.tree.map(
        lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else convert(x), tree
    )


def from_gradients(loss: Any, fisher: str, make: Any) -> Any:
    """A transformation of gradients alone.

    Args:
        loss: ``linear`` or ``units``.
        fisher: the Fisher of the statistics.
        make: layers to K-FAC.

    Returns:
        The transformation.
    """

    def tagged(tree):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        return kfac.tag(loss, shapes, shapes, num_examples=1, fisher=fisher)

    def init(params):
        CALLS["init"] += 1
        if jax.tree.leaves(params):
            params = as_arrays(params)
            HELD["layers"] = tagged(params).layers
        elif "layers" not in HELD or isinstance(params, (dict, list, tuple)):
            return optax.EmptyState()
        return make(HELD["layers"]).init(params)

    def update(updates, state, params=None, **extra_args):
        CALLS["update"] += 1
        if not jax.tree.leaves(updates):
            return updates, state
        updates = as_arrays(updates)
        found = tagged(updates)
        at = jax.tree.map(jnp.zeros_like, updates)
        *_, statistics = found.value_and_grad(at, updates, opt_state=state)
        step = make(found.layers).update
        return step(updates, state, params, statistics=statistics, **extra_args)

    plain = optax.GradientTransformationExtraArgs(init, update)
    split = optax.contrib.split_real_and_imaginary(plain)
    return optax.with_extra_args_support(split)


def factory(inverse: str, loss: Any = linear, fisher: str = "empirical") -> Any:
    """An optimiser as optax's tests look them up: keywords to transformation."""

    def make(
        learning_rate: optax.ScalarOrSchedule,
        damping: optax.ScalarOrSchedule = 1.0,
        momentum: float | None = 0.9,
    ):
        def of(layers):
            return kfac.kfac(
                layers, learning_rate, damping=damping, momentum=momentum,
                kl_clip=None, inverse=inverse,
            )  # fmt: skip

        return from_gradients(loss, fisher, of)

    return make


FACTORIES = {
    "kfac": factory("cholesky"),
    "kfac_eigh": factory("eigh"),
    "kfac_ekfac": factory("ekfac"),
    "kfac_low_rank": factory("low_rank"),
    "kfac_newton_schulz": factory("newton_schulz"),
    "kfac_units": factory("cholesky", units, "exact"),
    "kfac_elementwise": factory("cholesky", elementwise),
}


# Damping so large that nothing of the curvature is left: of explicit inverses, which
# split it over two factors, one part in √LIMIT.
LIMIT = 1e16


def in_place(
    learning_rate: Any = 1e-3,
    momentum: Any = None,
    nesterov: Any = None,
    b1: Any = None,
    b2: Any = None,
    weight_decay: Any = None,
    mu_dtype: Any = None,
    accumulator_dtype: Any = None,
) -> Any:
    """K-FAC where a test asks optax for one of its optimisers.

    Many of those tests ask for gradient descent and know its numbers. K-FAC has them in
    the limit of large damping, ``η λ (F + λ I)⁻¹ g → η g``; learning rate and momentum
    are taken, the rest is dropped.
    """
    del nesterov, b1, b2, weight_decay, mu_dtype, accumulator_dtype
    if callable(learning_rate):
        schedule = learning_rate
        rate = lambda count: LIMIT * schedule(count)  # noqa: E731
    else:
        rate = LIMIT * learning_rate
    return FACTORIES["kfac"](rate, LIMIT, momentum)


def counted(tx: Any) -> Any:
    """A transformation whose calls are counted, as those of ``from_gradients`` are."""

    def init(params):
        CALLS["init"] += 1
        return tx.init(params)

    def update(updates, state, params=None, **extra_args):
        CALLS["update"] += 1
        return tx.update(updates, state, params, **extra_args)

    tx = optax.with_extra_args_support(tx)
    return optax.GradientTransformationExtraArgs(init, update)


def control(
    learning_rate: Any = 1e-3,
    momentum: Any = None,
    nesterov: Any = None,
    b1: Any = None,
    b2: Any = None,
    weight_decay: Any = None,
    mu_dtype: Any = None,
    accumulator_dtype: Any = None,
) -> Any:
    """Optax's RMSProp in the same place: what it fails is about the optimiser named."""
    del momentum, nesterov, b1, b2, weight_decay, mu_dtype, accumulator_dtype
    return counted(optax.rmsprop(learning_rate))
