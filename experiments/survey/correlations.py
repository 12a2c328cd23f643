"""Rank correlations: does a measure of a trained network go with its generalisation?

Over ``n`` trained networks, ``x [n]`` is a measure (see ``kfac.curvature.measures``)
and ``y [n]`` the gap between test and training loss. All figures depend on the order
of the values alone, so that a measure's units do not matter. All are symmetric in ``x``
and ``y``.

A high plain correlation may come from one hyper-parameter that moves both, such as the
width: ``granulated`` compares only runs that differ in one hyper-parameter, ``partial``
takes out what a third figure explains of both.

References:
    Kendall, 1938 and 1945 (tau, and tau-b for ties); Kendall, 1942, "Partial rank
    correlation"; Jiang et al., 2020, arXiv:1912.02178; Dziugaite et al., 2020,
    arXiv:2010.11924 (why averages over hyper-parameters can mislead).
"""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

SAME = 1e-10  # what is left of a unit of tau, or of the largest eigenvalue: none
MOST_DROPPED = 0.1  # share of the resamples that may be without a value


class Granulated(NamedTuple):
    """``value``: ``Ψ``; ``settings``: ``ψ_i`` by the hyper-parameter's name."""

    value: float
    settings: dict[str, float]


class Interval(NamedTuple):
    """A figure of the data, and the two ends of its confidence interval."""

    value: float
    low: float
    high: float


def kendall(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b, ``(P − Q) / √((P + Q + X)(P + Q + Y))``.

    ``P`` and ``Q`` count the pairs of rows that ``x`` and ``y`` order alike and
    unlike, ``X`` and ``Y`` those that only ``x`` or only ``y`` ties. Pairs tied in
    both do not count at all. Without ties it is tau-a.

    Args:
        x: ``[n]``.
        y: ``[n]``.

    Returns:
        tau, from −1 to 1; NaN where all of ``x`` or all of ``y`` is tied.

    Raises:
        ValueError: Unequal lengths, fewer than two rows, numbers that are not finite.

    References:
        Kendall, 1945, "The treatment of ties in ranking problems".
    """
    return _tau_b(*_numbers(x=x, y=y))


def granulated(
    x: ArrayLike, y: ArrayLike, settings: Mapping[str, ArrayLike] | np.ndarray
) -> Granulated:
    """The granulated Kendall coefficient: one hyper-parameter moves at a time.

    For hyper-parameter ``i``, runs that agree in all the others are a group;
    ``ψ_i = mean over groups τ(group)`` and ``Ψ = mean_i ψ_i``. In a group, ``τ`` is the
    mean of ``sign(x_a − x_b) sign(y_a − y_b)`` over the pairs of runs that differ in
    hyper-parameter ``i``.

    That is tau-a, as in the paper: a pair tied in ``x`` or ``y`` adds 0 and counts, so
    that a measure on which ``i`` has no influence gets ``ψ_i = 0``, not a gap in the
    table. In the paper's complete grid with one run per setting, all pairs of a group
    differ in ``i``. With repeated runs (seeds; rows drawn twice by a bootstrap) the
    pairs of one and the same setting say nothing about ``i`` and are not counted.
    Groups without a pair that differs are left out, and so are, of ``Ψ``,
    hyper-parameters without a group.

    Args:
        x: ``[n]``.
        y: ``[n]``.
        settings: Hyper-parameters: values ``[n]``, numbers or other, by name; or a
            structured array ``[n]``.

    Returns:
        ``Ψ`` and every ``ψ_i``; NaN for a hyper-parameter without a group, and for
        ``Ψ`` if none has one.

    Raises:
        ValueError: Unequal lengths, fewer than two rows, numbers that are not finite,
            no hyper-parameter.

    References:
        Jiang et al., 2020, arXiv:1912.02178, Sec. 4.
    """
    x, y = _numbers(x=x, y=y)
    codes = _codes(settings, len(x))
    psi = {name: _psi(x, y, codes, name) for name in codes}
    known = [value for value in psi.values() if not math.isnan(value)]
    return Granulated(float(np.mean(known)) if known else math.nan, psi)


def partial(x: ArrayLike, y: ArrayLike, z: ArrayLike) -> float:
    """Kendall's partial tau of ``x`` and ``y``, given ``z``.

    ``(τ_xy − τ_xz τ_yz) / √((1 − τ_xz²)(1 − τ_yz²))``, of tau-b. For several ``z`` the
    same relation holds as for partial correlations, ``−Q_xy / √(Q_xx Q_yy)`` with ``Q``
    the inverse of the matrix of all taus: tau-b is the cosine between the signs of all
    pairs' differences, and this one the cosine between what is left of ``x``'s and
    ``y``'s signs after a least-squares fit by those of ``z``. It is taken from that
    remainder, a Schur complement, so that columns of ``z`` may repeat one another.

    Given ``z``, independent ``x`` and ``y`` may still have a partial tau other than 0
    (Korn, 1984): it compares measures and is no test of independence.

    Args:
        x: ``[n]``.
        y: ``[n]``.
        z: ``[n]`` or ``[n, k]``.

    Returns:
        The partial tau, from −1 to 1; NaN where ``x``, ``y`` or a column of ``z`` is
        constant, or where ``z`` orders all pairs as ``x`` or ``y`` does.

    Raises:
        ValueError: Unequal lengths, fewer than two rows, numbers that are not finite.

    References:
        Kendall, 1942, "Partial rank correlation", Biometrika 32; Moran, 1951, "Partial
        and multiple rank correlation", Biometrika 38; Kim, 2015, "ppcor", CSAM 22(6)
        (several ``z``); Korn, 1984, The American Statistician 38.
    """
    given = np.asarray(z)
    if given.ndim == 2:
        named = {f"z[:, {j}]": given[:, j] for j in range(given.shape[1])}
    else:
        named = {"z": given}
    columns = _numbers(x=x, y=y, **named)
    taus = np.eye(len(columns))
    for i, one in enumerate(columns):
        for j, other in enumerate(columns[:i]):
            taus[i, j] = taus[j, i] = _tau_b(one, other)
    if np.isnan(taus).any():
        return math.nan
    fit = np.linalg.pinv(taus[2:, 2:], rcond=SAME, hermitian=True) @ taus[2:, :2]
    left = taus[:2, :2] - taus[:2, 2:] @ fit
    if min(left[0, 0], left[1, 1]) < SAME:
        return math.nan
    return float(np.clip(left[0, 1] / math.sqrt(left[0, 0] * left[1, 1]), -1, 1))


def interval(
    statistic: Callable[..., float],
    *arrays: ArrayLike,
    groups: ArrayLike | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic, over rows or over groups of rows.

    Rows that belong together, such as the checkpoints of one run, are no independent
    draws: with ``groups``, whole groups are drawn, as many as there are. A row drawn
    twice is tied with itself, and such pairs enter none of the figures above.

    Resamples without a value (NaN: all drawn rows tied, say) are dropped; where more
    than one in ten are, both ends are NaN.

    Args:
        statistic: Function of the arrays, such as ``kendall``; of settings too, e.g.
            ``lambda x, y, s: granulated(x, y, s).value``.
        *arrays: ``[n, …]`` each, drawn together: numbers, text or structured.
        groups: ``[n]``, a label for each row; None: every row is a group.
        confidence: The interval's, between 0 and 1.
        num_resamples: How often rows are drawn anew.
        seed: Of the draws.

    Returns:
        The figure of all rows and the interval's ends.

    Raises:
        ValueError: No array, unequal lengths, fewer than two rows or groups, numbers
            that are not finite, a confidence that is none, no resamples.

    References:
        Efron & Tibshirani, 1993, "An Introduction to the Bootstrap", Sec. 13.3;
        Davison & Hinkley, 1997, "Bootstrap Methods and their Application", Sec. 3.8.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, wanted one between 0 and 1")
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}, wanted at least 1")
    data = _rows({f"arrays[{i}]": array for i, array in enumerate(arrays)})
    members = _members(groups, len(data[0]))
    value = float(statistic(*data))
    rng = np.random.default_rng(seed)
    values = np.empty(num_resamples)
    for i in range(num_resamples):
        drawn = rng.integers(len(members), size=len(members))
        rows = np.concatenate([members[group] for group in drawn])
        values[i] = statistic(*(array[rows] for array in data))
    kept = values[~np.isnan(values)]
    if len(kept) < (1 - MOST_DROPPED) * num_resamples:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(kept, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def _rows(arrays: Mapping[str, ArrayLike]) -> list[np.ndarray]:
    """The arrays, equally long, of two rows or more, with finite numbers."""
    found = {name: np.asarray(array) for name, array in arrays.items()}
    if not found:
        raise ValueError("no array given, wanted at least one")
    first, *_ = found
    for name, array in found.items():
        if array.ndim < 1:
            raise ValueError(f"{name} is a single value, wanted an array of rows")
        if len(array) != len(found[first]):
            raise ValueError(
                f"{name} has {len(array)} rows and {first} has {len(found[first])}, "
                "wanted equal lengths"
            )
        if len(array) < 2:
            raise ValueError(f"{name} is of length {len(array)}, wanted two rows")
        if array.dtype.kind in "fc" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0, 0])
            raise ValueError(
                f"{name} has {array[row]} in row {row}, wanted finite numbers"
            )
    return list(found.values())


def _numbers(**arrays: ArrayLike) -> list[np.ndarray]:
    """The arrays, one-dimensional, in float64."""
    found = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    for name, array in found.items():
        if array.ndim != 1:
            raise ValueError(
                f"{name} has shape {array.shape}, wanted one number for each row"
            )
    return _rows(found)


def _tau_b(x: np.ndarray, y: np.ndarray) -> float:
    """tau-b as SciPy counts it, in ``n log n``."""
    found: Any = scipy.stats.kendalltau(x, y)
    return float(found.statistic)


def _codes(
    settings: Mapping[str, ArrayLike] | np.ndarray, rows: int
) -> dict[str, np.ndarray]:
    """A hyper-parameter's values as whole numbers ``[n]``, equal where they are."""
    names = settings.dtype.names if isinstance(settings, np.ndarray) else settings
    if not names:
        raise ValueError("settings has no hyper-parameter, wanted at least one")
    named: dict[str, Any] = {f"settings[{name!r}]": settings[name] for name in names}
    _, *columns = _rows({"x": np.arange(rows), **named})
    found = {}
    for name, column in zip(names, columns, strict=True):
        order: dict[Hashable, int] = {}
        codes = [order.setdefault(value, len(order)) for value in column.tolist()]
        found[name] = np.array(codes)
    return found


def _psi(
    x: np.ndarray, y: np.ndarray, codes: Mapping[str, np.ndarray], name: str
) -> float:
    """``ψ`` of one hyper-parameter; NaN without a pair that differs in it alone."""
    others = [code for other, code in codes.items() if other != name]
    taus = []
    for rows in _together(np.stack([np.zeros_like(codes[name]), *others])):
        differ = np.not_equal.outer(codes[name][rows], codes[name][rows])
        if differ.any():
            product = _order(x[rows]) * _order(y[rows])
            taus.append(product[differ].mean())
    return float(np.mean(taus)) if taus else math.nan


def _order(x: np.ndarray) -> np.ndarray:
    """``sign(x_a − x_b) [n, n]``, whatever the size of the numbers."""
    return np.greater.outer(x, x).astype(int) - np.less.outer(x, x)


def _together(columns: np.ndarray) -> list[np.ndarray]:
    """Rows that agree in all of ``columns [k, n]``, a list of indices each."""
    _, labels = np.unique(columns, axis=1, return_inverse=True)
    labels = labels.ravel()
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _members(groups: ArrayLike | None, rows: int) -> list[np.ndarray]:
    """The rows of every group."""
    if groups is None:
        return list(np.arange(rows)[:, None])
    _, labels = _rows({"arrays[0]": np.arange(rows), "groups": groups})
    if labels.ndim != 1:
        raise ValueError(f"groups has shape {labels.shape}, wanted one label a row")
    _, codes = np.unique(labels, return_inverse=True)
    members = _together(codes[None])
    if len(members) < 2:
        raise ValueError(f"groups has {len(members)} group, wanted at least two")
    return members
