"""How the statistics of one layer are estimated: static numbers, probes, last touches.

Most statistics are the sum of what the layer's taps return. Some need a last touch,
after all taps have added up:

* ``reduce``, and scales and shifts, over several sites or time steps: taps return sums
  over the positions of each example, and the statistics are made of those;
* masks, branches, and experts that rows are sent to: how many rows count is known only
  at run time;
* losses of several terms, see ``blended``.

References:
    Eschenhagen et al., 2023, arXiv:2311.00636, Secs. 3.2-3.3 (expand and reduce).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from kfac_jax_lite.core.linalg import expanded
from kfac_jax_lite.core.types import Array, LayerTag, accumulation_dtype
from kfac_jax_lite.kronecker.factors import forms_of, turned, widths
from kfac_jax_lite.statistics.subsample import Lattice, Subsample, lattice_of
from kfac_jax_lite.tagging.sites import RaggedGeometry, Site

# What does not depend on the labels: of a sampled Fisher, it comes from the plain pass.
INPUT_SIDE = frozenset({"a", "a_out"})
# Likewise the numbers of rows that the loss sees.
COUNTS = frozenset({"rows", "rows_out", "count"})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Static facts of one layer's statistics.

    Attributes:
        layer: The layer.
        num_examples: ``N``, terms of the mean loss.
        num_rows: ``R``, rows over all its sites (after reduction).
        rows_out: The same over the sites that use its weight in reverse.
        reduce: Whether rows of one example are reduced first.
        by_example: Whether positions are added up over several sites.
        examples: Of scales and shifts: how many examples then have a sum.
        positions: Of the recipe ``at`` one site: how many consecutive rows are reduced.
        masked: Whether only rows count whose cotangent is not zero.
        routed: Whether rows are sent to its blocks, some more and some fewer.
        subsample: Which of its rows are taken.
        squares: Whether squares of the examples' gradients are wanted, not factors;
            ``by_example`` then adds the gradients themselves up over several sites.
        branched: Whether a site is in a branch: rows count as they are executed.
        parts: How many rows a row is: 2 where some are complex.
        marks: Numbers of the marked outputs that depend on these sites; empty: one, or
            it does not matter.
    """

    layer: LayerTag
    num_examples: int
    num_rows: int
    rows_out: int = 0
    reduce: bool = False
    by_example: bool = False
    masked: bool = False
    routed: bool = False
    subsample: Subsample = Subsample()
    squares: bool = False
    examples: int = 0
    positions: int = 1
    branched: bool = False
    parts: int = 1
    marks: frozenset[int] = frozenset()

    @property
    def counted(self) -> bool:
        """Whether the number of rows is known only at run time."""
        return self.masked or self.routed or self.branched

    def lattice(self, site: Site) -> Lattice | None:
        """The rows that are taken at one of its sites; None: all."""
        n, name = self.num_examples // site.devices, self.layer.name
        return lattice_of(self.subsample, name, site, n, self.reduce)

    def on_device(self, site: Site) -> "Recipe":
        """The recipe with as many examples as one device has."""
        return dataclasses.replace(self, num_examples=self.num_examples // site.devices)

    def at(self, site: Site, num_examples: int | None = None) -> "Recipe":
        """The recipe at one of its sites, of all examples or of a part of them."""
        positions = site.positions or 1 if self.reduce else 1
        n = self.num_examples if num_examples is None else num_examples
        return dataclasses.replace(self, num_examples=n, positions=positions)


def make_recipe(
    layer: LayerTag,
    sites: list[Site],
    num_examples: int,
    reduce: bool,
    masked: bool,
    subsample: Subsample = Subsample(),  # noqa: B008 (frozen)
    squares: bool = False,
) -> Recipe:
    """The recipe of a layer applied at these sites."""

    def rows(reverse: bool, reduced: bool = reduce) -> int:
        chosen = [s for s in sites if s.reverse == reverse]
        return count_rows(chosen, reduced)

    several = len(sites) > 1 or any(s.repeat > 1 for s in sites)
    ragged = any(isinstance(s.geometry, RaggedGeometry) for s in sites)
    routed = ragged or any(s.places for s in sites)
    branched = any(s.branch for s in sites) and not layer.unitwise
    if layer.unitwise or ragged:
        subsample = Subsample()
    parts = 2 if any(s.complex for s in sites) else 1
    marks, examples = sites[0].marks, num_examples
    if layer.unitwise:
        groups = {s.examples for s in sites}
        by_example, examples = several and len(groups) == 1, max(groups)
    elif squares:
        for site in sites:
            if site.positions is None:
                raise ValueError(
                    f"layer {layer.name}: squares of single examples' gradients need "
                    f"rows that belong to the {num_examples} terms of the loss, got "
                    f"rows {site.geometry.rows}."
                )
        return Recipe(
            layer,
            num_examples,
            0,
            by_example=several,
            masked=masked,
            squares=True,
            parts=parts,
            marks=marks,
        )
    else:
        by_example = (
            reduce and all(s.positions for s in sites) and not (layer.tied or ragged)
        )
        by_example = by_example and (several or masked or branched)
        if by_example and subsample != Subsample():
            raise ValueError(
                f"layer {layer.name}: subsample needs weight_sharing='expand' where a "
                "layer is used several times or rows are masked, got 'reduce'."
            )
    return Recipe(
        layer,
        num_examples,
        num_rows=rows(False, reduce and not by_example),
        rows_out=rows(True),
        reduce=reduce,
        by_example=by_example,
        masked=masked,
        routed=routed,
        subsample=subsample,
        examples=examples,
        branched=branched,
        parts=parts,
        marks=marks,
    )


def count_rows(sites: list[Site], reduce: bool) -> int:
    """``R``: rows over all sites and repetitions; of a ``cond``, the largest branch."""

    def total(sites: list[Site], depth: int) -> int:
        once = [s for s in sites if len(s.branch) == depth]
        here = sum(site_rows(s, reduce) * s.repeat * s.devices for s in once)
        branches: dict[int, dict[int, list[Site]]] = {}
        for site in sites:
            if len(site.branch) > depth:
                number, k = site.branch[depth]
                branches.setdefault(number, {}).setdefault(k, []).append(site)
        inside = [[total(s, depth + 1) for s in b.values()] for b in branches.values()]
        return here + sum(map(max, inside))

    return total(sites, 0)


def site_rows(site: Site, reduce: bool) -> int:
    """Rows of one site, each time it is run."""
    rows = math.prod(site.geometry.rows) * (2 if site.complex else 1)
    return rows // (site.positions or 1) if reduce else rows


def zero_probes(recipe: Recipe, dtype: Any, moments: bool) -> dict[str, Array]:
    """Zeros in the shapes of what the taps of a layer return, by name."""
    layer = recipe.layer
    a, g = layer.a_shape, layer.g_shape
    if layer.unitwise:
        sums = (*a[:-3], recipe.examples, *a[-3:-1])
        shapes = {"s_sum": sums} if recipe.by_example else {"blocks": a}
    else:
        blocks = layer.stack + layer.blocks
        n, (n_in, n_out) = recipe.num_examples, layer.sizes
        counts = {}
        if recipe.squares and recipe.by_example:
            shapes = {"gradients": (*blocks, n, n_in, n_out)}
        elif recipe.squares:
            shapes = {"squares": (*blocks, n_in, n_out)}
        elif recipe.by_example:
            rows = n * recipe.parts
            shapes = {"x_sum": (*blocks, rows, n_in), "c_sum": (*blocks, rows, n_out)}
            counts = {"count": (*blocks, n)}
        else:
            shapes = {"a": a, "g": g}
            counts = {"rows": blocks}
            if layer.tied:
                shapes |= {"a_out": g, "g_out": a}
                counts |= {"rows_out": blocks}
            if moments:
                shapes["s"] = (*blocks, *widths(layer))
        shapes |= counts if recipe.counted else {}
    dtype = accumulation_dtype(dtype)
    return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}


def finish(
    recipe: Recipe,
    raw: dict[str, Array],
    basis: tuple[Any, ...],
    terms: Array | None,
    wanted: frozenset[str],
) -> dict[str, Array]:
    """Turns what the taps returned into the layer's statistics, by field."""
    n = recipe.num_examples if terms is None else terms
    if "s_sum" in raw:
        found = {"blocks": lambda: unit_blocks(raw["s_sum"], n)}
    elif "gradients" in raw:
        found = {"squares": lambda: n * jnp.square(raw["gradients"]).sum(-3)}
    elif recipe.by_example:
        found = from_examples(recipe, raw, basis, n)
    elif not recipe.counted:
        found = {name: lambda x=x: x for name, x in raw.items()}
    else:
        found = rescaled(recipe, raw, n)
    return {name: found[name]() for name in found if name in wanted}


def unit_blocks(s: Array, num_examples: Any) -> Array:
    """``F_u = N Σ_n s_n s_nᵀ`` of gradients ``[*stack, examples, units, k]``."""
    return num_examples * jnp.einsum("...nuk,...nul->...ukl", s, s)


def from_examples(
    recipe: Recipe, raw: dict[str, Any], basis: tuple[Any, ...], terms: Any
) -> dict[str, Any]:
    """Factors of ``x̄_n`` (mean over positions) and ``c_n`` (sum over positions)."""
    layer, n, parts = recipe.layer, recipe.num_examples, recipe.parts
    form_a, form_g = forms_of(layer)
    c = raw["c_sum"]
    if recipe.counted:
        count = jnp.repeat(jnp.maximum(raw["count"], 1), parts, -1)
        x = raw["x_sum"] / count[..., None]
    else:
        x = raw["x_sum"] * (n * parts / recipe.num_rows)

    def a():
        return form_a.second_moment(x, layer.a_shape) / terms

    def g():
        return form_g.second_moment(c, layer.g_shape) * (terms / parts)

    def s():
        (q_a, q_g), (wide_a, wide_g) = basis, widths(layer)
        inputs = turned(x, q_a, form_a, wide_a)
        cotangents = turned(c, q_g, form_g, wide_g)
        return terms * jnp.einsum("...ni,...nj->...ij", inputs, cotangents)

    return {"a": a, "g": g} | ({"s": s} if basis else {})


def rescaled(recipe: Recipe, raw: dict[str, Any], terms: Any) -> dict[str, Any]:
    """Statistics over ``N`` and ``R`` as over the terms and rows that count."""
    n = recipe.num_examples

    def of(name: str):
        if name in ("a", "a_out"):
            return raw[name] * (n / terms)
        if name in ("s", "blocks", "squares"):
            return raw[name] * (terms / n)
        rows, static = "rows", recipe.num_rows
        if name == "g_out":
            rows, static = "rows_out", recipe.rows_out
        live = expanded(jnp.maximum(raw[rows], 1), raw[name].ndim)
        return raw[name] * ((terms / n) ** 2 * static / live)

    fields = [name for name in raw if name not in ("rows", "rows_out")]
    return {name: lambda name=name: of(name) for name in fields}


class Share(NamedTuple):
    """What the sites of one slot add to their layer's statistics.

    Attributes:
        weight: ``w``: that of the marked output which depends on them.
        scale: ``κ``: what their products of two cotangents are multiplied with. Those
            of a sampled Fisher are scaled for the terms of the first output, so
            ``N_1 / N``; those of the loss's own gradient hold ``w`` twice, so ``1/w``.
        rows: ``R / N``, rows for every term.
        rows_out: The same of the uses in reverse.
    """

    weight: Any
    scale: Any
    rows: Any
    rows_out: Any


def blended(parts: Sequence[tuple[dict[str, Array], Share]]) -> dict[str, Array]:
    """Statistics of a layer that several outputs depend on, each with its own terms.

    With ``A_s`` and ``G_s`` of slot ``s``, those of a mean loss over its own terms,
    ``A = Σ w_s A_s`` and ``G = Σ κ_s (R_s/N_s) G_s / Σ w_s R_s/N_s``: every row counts
    with ``w_s / N_s``, and ``A ⊗ G`` approximates the block of the whole loss.
    """
    found: dict[str, Array] = {}
    for name in parts[0][0]:
        total: Any = 0
        of_rows: Any = 0
        for fields, share in parts:
            x = fields[name]
            factor, rows = share.scale, share.rows
            if name in INPUT_SIDE:
                factor = share.weight
            elif name in ("g", "g_out"):
                rows = share.rows_out if name == "g_out" else rows
                of_rows = of_rows + like(share.weight * rows, x)
                factor = factor * rows
            total = total + like(factor, x) * x
        if name in ("g", "g_out"):
            total = total / jnp.where(of_rows > 0, of_rows, 1)
        found[name] = total.astype(parts[0][0][name].dtype)
    return found


def like(value: Any, x: Array) -> Array:
    """A number, or one for every block, to multiply an array of blocks with."""
    return expanded(jnp.asarray(value), x.ndim)
