"""Factors of the layer kinds that ``tests.oracles`` does not know, and ``reduce``.

The rows, their inputs and their cotangents come from ``tests.oracles.Pass``; here they
are only put together, in float64 numpy. A layer's hook is called once per site; a scan
over stacked layers calls it once per layer, in order.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.oracles import Conv, Dense, ScaleShift

__all__ = ["Blocks", "Conv", "Dense", "Embedding", "ScaleShift", "Stacked", "Tied"]

OUT = "@out"  # the hook of a tied table's second use is called ``name + OUT``


@dataclasses.dataclass(frozen=True)
class Embedding:
    """``z = table[ids]``; the hook's input is the ids."""

    vocab: int
    kind: str = "embedding"


@dataclasses.dataclass(frozen=True)
class Tied(Embedding):
    """The same with ``logits = h @ table.T`` under the name ``name + OUT``."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """One dense layer per block; inputs and outputs are ``[blocks, examples, …]``."""

    bias: bool = True
    kind: str = "dense"

    def rows(self, a):
        """Inputs as [groups, examples, positions, in]."""
        a = np.asarray(a, np.float64)
        return a.reshape(*a.shape[:2], -1, a.shape[-1])

    cotangents = rows


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Layers of one kind with stacked parameters: every site is a layer."""

    inner: Any

    @property
    def kind(self):
        """Stacked layers are layers."""
        return self.inner.kind


def statistics(run, name, y=None, fisher="empirical", sharing="expand"):
    """Every field of a layer's statistics, by name."""
    spec = run.model.layers[name]
    sites = run.inputs[name], run.cotangents(name, fisher, y)
    if isinstance(spec, Stacked):
        layers = [
            layer(spec.inner, [a], [c], run.terms, sharing)
            for a, c in zip(*sites, strict=True)
        ]
        return {k: np.stack([one[k] for one in layers]) for k in layers[0]}
    if isinstance(spec, Tied):
        out = run.inputs[name + OUT], run.cotangents(name + OUT, fisher, y)
        return lookup(spec, *sites, run.terms) | read_out(*out, run.terms)
    return layer(spec, *sites, run.terms, sharing)


def layer(spec, inputs, cotangents, terms, sharing):
    """Statistics of one layer from the inputs and cotangents at its sites."""
    if isinstance(spec, Embedding):
        return lookup(spec, inputs, cotangents, terms)
    if isinstance(spec, ScaleShift):
        return {"blocks": unit_blocks(spec, inputs, cotangents, terms)}
    if sharing == "reduce":
        pairs = reduced(spec, inputs, cotangents, terms)
    else:
        pairs = expanded(spec, inputs, cotangents)
    a = sum(np.einsum("grni,grnj->gij", x, x) for x, _ in pairs) / terms
    total = sum(np.einsum("kgrni,kgrnj->gij", c, c) for _, c in pairs)
    rows = sum(x.shape[1] * x.shape[2] for x, _ in pairs)
    g = total * terms**2 / rows
    if not isinstance(spec, Blocks) and len(a) == 1:
        a, g = a[0], g[0]
    return {"a": a, "g": g}


def homogeneous(spec, a):
    """Rows of a site ``[groups, examples, positions, in]``, 1 appended for a bias."""
    rows = spec.rows(a)
    ones = np.ones((*rows.shape[:3], int(spec.bias)))
    return np.concatenate([rows, ones], -1)


def columns(spec, cs):
    """Cotangents of a site, ``[columns, groups, examples, positions, out]``."""
    return np.stack([spec.cotangents(c) for c in cs])


def expanded(spec, inputs, cotangents):
    """A pair of rows and cotangents for every site."""
    return [
        (homogeneous(spec, a), columns(spec, cs))
        for a, cs in zip(inputs, cotangents, strict=True)
    ]


def reduced(spec, inputs, cotangents, terms):
    """One row per example: the mean input and the summed cotangent of all its rows.

    The mean is over rows: a site with more positions counts more. Where the second axis
    of the rows is as long as there are terms, and the first is not, time comes first. A
    site with fewer rows than terms has none for each of them: then no site is reduced.
    """
    pairs = expanded(spec, inputs, cotangents)
    if any(x.shape[1] * x.shape[2] < terms for x, _ in pairs):
        return pairs
    rows, sums = [], []
    for x, c in pairs:
        if x.shape[2] == terms != x.shape[1]:
            x, c = x.swapaxes(1, 2), c.swapaxes(2, 3)
        rows.append(x.reshape(x.shape[0], terms, -1, x.shape[-1]))
        sums.append(c.reshape(*c.shape[:2], terms, -1, c.shape[-1]).sum(3))
    mean = np.concatenate(rows, 2).mean(2, keepdims=True)
    return [(mean, sum(sums)[:, :, :, None])]


def unit_blocks(spec, inputs, cotangents, terms):
    """``F_u = N sum_n s_n s_n^T``, ``s_n`` summed over the positions of an example.

    Where there are as many rows as loss terms, every row is an example.
    """
    parts: Any = 0.0
    for a, cs in zip(inputs, cotangents, strict=True):
        units = int(np.prod(a.shape[a.ndim - spec.axes :]))
        rows = a.size // units
        examples = terms if rows == terms else a.shape[0]
        per = [("scale", cs * a)] * spec.scale + [("shift", cs)] * spec.shift
        split = [v.reshape(len(cs), examples, -1, units).sum(2) for _, v in per]
        parts = parts + np.stack(split, -1)
    return np.einsum("knui,knuj->uij", parts, parts) * terms


def lookup(spec, inputs, cotangents, terms):
    """Counts of every row of the table over ``N``, and ``G`` of the looked-up rows."""
    counts, total, rows = np.zeros(spec.vocab), 0.0, 0
    for ids, cs in zip(inputs, cotangents, strict=True):
        np.add.at(counts, ids.astype(int).ravel(), 1.0)
        flat = cs.reshape(-1, cs.shape[-1])
        total, rows = total + flat.T @ flat, rows + ids.size
    return {"a": counts / terms, "g": total * terms**2 / rows}


def read_out(inputs, cotangents, terms):
    """``1/N sum h h^T`` and the diagonal of ``G`` of ``logits = h @ table.T``."""
    a, g, rows = 0.0, 0.0, 0
    for h, cs in zip(inputs, cotangents, strict=True):
        flat, c = h.reshape(-1, h.shape[-1]), cs.reshape(-1, cs.shape[-1])
        a, g, rows = a + flat.T @ flat, g + (c**2).sum(0), rows + len(flat)
    return {"a_out": a / terms, "g_out": g * terms**2 / rows}


def gradient(run, name, y):
    """The gradient that a layer's rows and cotangents add up to.

    Dense and convolutional layers give ``[groups, in (+1), out]``, tables their own
    shape, scales and shifts ``[units, k]``; stacked layers one of these per layer.
    """
    spec = run.model.layers[name]
    sites = run.inputs[name], run.cotangents(name, "empirical", y)
    if isinstance(spec, Stacked):
        pairs = zip(*sites, strict=True)
        return np.stack([site_gradient(spec.inner, [a], [c]) for a, c in pairs])
    total = site_gradient(spec, *sites)
    if isinstance(spec, Tied):
        out = run.inputs[name + OUT], run.cotangents(name + OUT, "empirical", y)
        for h, (c,) in zip(*out, strict=True):
            total += c.reshape(-1, c.shape[-1]).T @ h.reshape(-1, h.shape[-1])
    return total


def site_gradient(spec, inputs, cotangents):
    """``sum_r a_r c_r^T`` over the rows of all sites of one layer."""
    total: Any = 0.0
    for a, (c,) in zip(inputs, cotangents, strict=True):
        if isinstance(spec, Embedding):
            table = np.zeros((spec.vocab, c.shape[-1]))
            np.add.at(table, a.astype(int).ravel(), c.reshape(-1, c.shape[-1]))
            total = total + table
        elif isinstance(spec, ScaleShift):
            units = int(np.prod(a.shape[a.ndim - spec.axes :]))
            per = [a * c] * spec.scale + [c] * spec.shift
            split = [v.reshape(-1, units).sum(0) for v in per]
            total = total + np.stack(split, -1)
        else:
            x, cot = homogeneous(spec, a), spec.cotangents(c)
            total = total + np.einsum("gnpi,gnpo->gio", x, cot)
    return total


def covered_share(params, diagonal, paths):
    """Share of the parameters whose path is not in ``diagonal``."""
    sizes = {path: int(jnp.size(leaf)) for path, leaf in paths(params).items()}
    fallen = sum(sizes[path.removeprefix("~/")] for path in diagonal)
    total = sum(sizes.values())
    return (total - fallen) / total
