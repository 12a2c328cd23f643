"""Weights kept at a fixed norm, for kernels that a normalisation follows.

Behind a batch norm without ``ε`` the network is the same for ``c W`` as for ``W``, but
its gradient is ``1/c`` times as large: as the weights grow, steps turn them less and
less. With the norm fixed, the learning rate alone says how far a step turns them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax

from kfac_jax_lite.core.mesh import automatic, explicit_mesh, specs_of
from kfac_jax_lite.core.pytree import leaves_by_path, replace_leaves
from kfac_jax_lite.core.types import Array, LayerTag, accumulation_dtype
from kfac_jax_lite.kronecker.masking import present_layers


def rescale_weights(
    layers: Sequence[LayerTag], epsilon: float = 1e-9
) -> optax.GradientTransformation:
    """Keeps the Frobenius norm of every kernel at ``√(2 d_out)``.

    To be chained behind the optimiser: it turns the update ``u`` of a kernel ``W`` into
    ``√(2 d_out) (W + u) / (‖W + u‖_F + ε) − W``. Kernels are the weights of dense
    layers and convolutions; biases, scales, embeddings and all else keep their updates.
    ``d_out`` is the number of output units or channels. Every layer of a ``scan``,
    every expert and every other block of a dense weight has its own norm; the groups of
    a convolution are one kernel.

    A kernel whose update is zero everywhere stays as it is, whatever its norm: a batch
    that ``kfac.kfac`` rejects changes nothing.

    Only where a normalisation follows does the network compute the same with another
    norm. Pass those layers alone, not the output layer:
    ``rescale_weights([layer for layer in tagged.layers if layer.kind == "conv"])``.

    Args:
        layers: Layers of ``tagged.layers`` whose kernels are rescaled.
        epsilon: ``ε``.

    Returns:
        An optax transformation without state; ``update`` needs ``params``. Parameters
        may be masked (``optax.masked``).

    Raises:
        ValueError: No layer has a kernel; a kernel is used in both directions, so that
            either axis is its output; ``epsilon`` is negative.

    References:
        Osawa et al., 2020, arXiv:2002.06015 ("weights rescaling"). The authors' code
        (tyohei/chainerkfac) only ever shrinks a kernel; the formula, and this, also
        lets it grow.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon!r}.")
    kernels = [kernel_of(x) for x in layers if x.kind in ("dense", "conv")]
    if not kernels:
        raise ValueError(
            "rescale_weights wants dense layers or convolutions, got "
            f"{', '.join(f'{x.name} ({x.kind})' for x in layers) or 'no layers'}."
        )

    def init_fn(params: Any):
        present_layers(kernels, params, whole=False)
        return optax.EmptyState()

    def update_fn(updates: Any, state: Any, params: Any = None):
        if params is None:
            raise ValueError("rescale_weights needs params: tx.update(…, params).")
        here = present_layers(kernels, params, whole=False)

        def run(updates: Any, params: Any):
            leaves, weights = leaves_by_path(updates), leaves_by_path(params)
            for kernel in here:
                path = kernel.params[0]
                leaves[path] = rescaled(kernel, leaves[path], weights[path], epsilon)
            return replace_leaves(updates, leaves)

        if explicit_mesh(updates) is None:
            return run(updates, params), state
        return automatic(run, updates, params, out_specs=specs_of(updates)), state

    return optax.GradientTransformation(init_fn, update_fn)


def kernel_of(layer: LayerTag) -> LayerTag:
    """A dense layer or convolution with nothing but its weight."""
    if layer.tied:
        raise ValueError(
            f"layer {layer.name}: its weight {layer.params[0]} is used in both "
            "directions, so either axis is an output. Leave the layer out of those "
            "passed to rescale_weights."
        )
    i = layer.roles.index("weight")
    return dataclasses.replace(
        layer,
        params=(layer.params[i],),
        views=(layer.views[i],),
        roles=("weight",),
    )


def rescaled(kernel: LayerTag, update: Array, leaf: Array, epsilon: float) -> Array:
    """The update that leaves a kernel with its norm."""
    view = kernel.views[0]
    u, w = view.read(update), view.read(leaf)
    *blocks, _, out = view.core
    grouped = kernel.kind == "conv"
    axes = tuple(range(-len(view.core) if grouped else -2, 0))
    target = math.sqrt(2 * out * (math.prod(blocks) if grouped else 1))
    wide = w.astype(accumulation_dtype(w.dtype))
    moved = wide + u.astype(wide.dtype)
    norm = jnp.sqrt(jnp.sum(moved * moved, axes, keepdims=True))
    new = (target / (norm + epsilon) * moved - wide).astype(u.dtype)
    new = jnp.where(jnp.any(u != 0, axes, keepdims=True), new, u)
    return update - view.write(u, update) + view.write(new, update)
