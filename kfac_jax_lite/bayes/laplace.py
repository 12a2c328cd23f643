"""Laplace approximations: a normal posterior around trained weights.

posterior = kfac.bayes.laplace(tagged, params, batches).tune_prior()
weights = posterior.draw(params, key)
probabilities = kfac.bayes.predict_glm(apply_fn, posterior, params, inputs)

Of the verbs that the methods share, ``laplace`` is ``init`` and ``update`` in one call:
the weights are trained already, and the data are gone through once. It makes what the
others' optimiser states are, an object with ``draw``.

References:
    MacKay, 1992, "A practical Bayesian framework for backpropagation networks", Neural
    Computation 4(3), 448-472; Ritter, Botev & Barber, 2018, "A scalable Laplace
    approximation for neural networks" (Kronecker); Immer et al., 2021,
    arXiv:2104.04975; Daxberger et al., 2021, arXiv:2106.14806.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.bayes.laplace_blocks import (
    Eigenblocks,
    Leaves,
    blocks_within,
    eigenblocks,
    uncertain_leaves,
)
from kfac_jax_lite.bayes.laplace_passes import (
    last_layer_name,
    layer_block,
    log_likelihood,
)
from kfac_jax_lite.bayes.laplace_posterior import LaplacePosterior
from kfac_jax_lite.curvature import matrices
from kfac_jax_lite.curvature.blocks import DensePart, Part
from kfac_jax_lite.curvature.laws import Law
from kfac_jax_lite.curvature.layout import Layout, make_layout
from kfac_jax_lite.curvature.operator import Kept
from kfac_jax_lite.curvature.stream import Stream, ravel
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss

KEPT = ("diagonal", "kronecker", "ekfac", "unit_wise")
STRUCTURES = (*KEPT, "full", "last_layer")
# Most parameters of which a covariance is formed.
LARGEST = 8192


def laplace(
    tagged: TaggedLoss,
    params: Any,
    batches: Any,
    structure: str = "kronecker",
    *,
    num_data: int | float | None = None,
    prior_precision: Any = 1.0,
    temperature: int | float = 1.0,
    last_layer: str | None = None,
    variance: Any = 1.0,
    key: Any = None,
    progress: bool = False,
) -> LaplacePosterior:
    """The posterior ``N(μ, (N/τ F + p I)⁻¹)`` around the weights ``μ``.

    ``F`` is the generalised Gauss-Newton matrix of the mean loss, ``p`` the precision
    of the prior ``N(0, I/p)``: with ``δ = τ p / N`` the covariance is ``(τ/N)
    (F + δ I)⁻¹``. ``μ`` ought to be near a maximum a posteriori; weights that training
    left elsewhere are taken for one.

    Args:
        tagged: The tagged loss, the mean of ``−log p(y | x, w)`` alone, with the output
            marked. The prior belongs to ``prior_precision``: what a loss adds to its
            likelihood would be counted as part of it by the marginal likelihood.
        params: ``μ``.
        batches: Tuples of the loss's other arguments, as for ``kfac.curvature.ggn``.
        structure: ``"kronecker"`` (each layer's ``A ⊗ G``, damped exactly, in the
            factors' eigenbases), ``"ekfac"``, ``"diagonal"``, ``"unit_wise"`` (see
            ``kfac.curvature.ggn`` for their costs), ``"full"`` (one matrix) or
            ``"last_layer"`` (one matrix of the last layer's parameters).
        num_data: ``N``; None: the rows of all batches (terms of the mean loss that
            count). More than those where batches are a sample of the data, or data are
            augmented.
        prior_precision: ``p``; or one for every layer, by name.
        temperature: ``τ``: one for Bayes, less for a cold posterior.
        last_layer: Name of the only layer that is uncertain, of ``tagged.layers``; the
            other parameters stay at ``μ``. None: all of them, and for ``"last_layer"``
            the layer that runs last before the marked output.
        variance: Of a normal output's noise, as given to ``kfac.normal``; only the
            constant of the likelihood needs it.
        key: PRNG key: ``F`` is estimated with one label per row drawn from the model
            (``kfac.curvature.mc_fisher``), cheaper where there are many outputs.
        progress: Whether to show a bar over the batches (needs rich).

    Returns:
        The posterior.

    Raises:
        ValueError: An unknown structure or layer; a precision, temperature or ``N``
            that is not positive; more parameters than a matrix is formed of; no output
            marked.
        FloatingPointError: The curvature is not finite.
    """
    if structure not in STRUCTURES:
        raise ValueError(
            f"laplace: structure must be one of {STRUCTURES}, got {structure!r}."
        )
    law = Law("ggn", "exact") if key is None else Law("mc_fisher", "mc")
    matrices.check_batches(law, batches)
    layout = make_layout(tagged, params)
    if structure == "last_layer" and last_layer is None:
        last_layer = last_layer_name(tagged, params, tuple(next(iter(batches))))
    covered = covered_entries(layout, last_layer)
    if structure in ("full", "last_layer"):
        check_size(structure, last_layer, int(covered.sum()))
    leaves, moved = uncertain_leaves(params, covered)
    stream = Stream(tagged, law, params, batches, key, progress, None)
    parts = curvature_parts(stream, structure, covered, leaves, moved)
    mean_log, rows = log_likelihood(stream, variance)
    n = rows if num_data is None else num_data
    whole = structure == "full" and last_layer is None
    names, owner = (("all",), 0 * covered) if whole else owners(layout, covered)
    blocks = owned_blocks(parts, moved, owner, names)
    flat = np.asarray(ravel(params), np.float64)[covered]
    groups = owner[covered].astype(int)
    posterior = LaplacePosterior(
        blocks=blocks,
        mean=params,
        num_data=float(n),
        temperature=temperature,
        prior_precision=jnp.ones(len(names)),
        log_likelihood=n * mean_log,
        squared_norms=np.bincount(groups, np.square(flat), len(names)),
        names=names,
        leaves=leaves,
        structure=structure,
    )
    for name, value in (("num_data", n), ("temperature", temperature)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"laplace: {name} must be positive, got {value!r}.")
    return posterior.with_prior(prior_precision)


def covered_entries(layout: Layout, name: str | None) -> np.ndarray:
    """Which entries are uncertain: all, or those of one layer, bool ``[P]``."""
    if name is None:
        return np.ones(layout.size, bool)
    covered = np.zeros(layout.size, bool)
    known = {layer.name: index for layer, index in layout.layers}
    if name not in known:
        raise ValueError(
            f"laplace: last_layer={name!r} is not a layer of the tagged loss, wanted "
            f"one of {tuple(known)}."
        )
    covered[known[name]] = True
    return covered


def check_size(structure: str, name: str | None, size: int) -> None:
    """A matrix must be small enough to be formed."""
    if size > LARGEST:
        what = "the network" if name is None else f"layer {name}"
        raise ValueError(
            f"laplace: structure={structure!r} forms the matrix of {what}, of {size:,} "
            f"parameters, more than the {LARGEST:,} that are formed: use "
            "structure='kronecker' or 'diagonal'."
        )


def curvature_parts(
    stream: Stream,
    structure: str,
    covered: np.ndarray,
    leaves: Leaves,
    moved: np.ndarray,
) -> list[Part]:
    """The blocks of the curvature that are uncertain."""
    if structure in KEPT:
        form = matrices.APPROXIMATIONS[structure](stream)
        assert isinstance(form, Kept)
        found = [blocks_within(part, covered) for part in form.parts]
        return [part for part in found if part is not None]
    place = np.flatnonzero(covered)
    block = layer_block(stream, moved[place], leaves.numbers)
    return [DensePart(jnp.asarray(place)[None], block[None])]


def owners(layout: Layout, covered: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the uncertain layers, and the number of every entry's, ``[P]``."""
    owner, names = np.full(layout.size, -1), []
    for layer, index in layout.layers:
        if covered[index].all():
            owner[index] = len(names)
            names.append(layer.name)
    if (owner[covered] < 0).any():  # entries that no layer reads
        owner[covered & (owner < 0)] = len(names)
        names.append("rest")
    return tuple(names), owner


def owned_blocks(
    parts: list[Part], moved: np.ndarray, owner: np.ndarray, names: tuple[str, ...]
) -> tuple[Eigenblocks, ...]:
    """All parts in their eigenbases; they must be finite."""
    found = []
    for part in parts:
        place = np.asarray(part.place)
        group = owner[place.reshape(len(place), -1)[:, 0]]
        blocks = eigenblocks(part, moved, group)
        finite = np.isfinite(np.asarray(blocks.values)).all((1, 2))
        if not finite.all():
            bad = sorted({names[number] for number in group[~finite]})
            raise FloatingPointError(
                f"laplace: the curvature of {', '.join(bad)} is not finite: are the "
                "parameters and the batches?"
            )
        found.append(jax.tree.map(jnp.asarray, blocks))
    return tuple(found)
