"""What the statistics of a layer must be, from the uses of a recorded run.

A layer says which entries of the parameters it holds, as a matrix ``[in, out]`` (and a
vector of biases), or as scales and shifts. Every use of those entries is looked up: a
matrix must be a block of rows and columns of the matrix of each use that touches it,
or of its transpose. Then ``A = 1/N sum a a^T`` and ``G = N^2/R sum c c^T`` over the
rows of these uses that are executed, in float64 numpy.
"""

import numpy as np

from tests.fuzz.program import Recording


class Wrong(AssertionError):
    """A layer claims what is not so."""


def touching(recording: Recording, index, kinds):
    """Numbers of the uses of these kinds that read any of these entries."""
    return [
        k
        for k, use in enumerate(recording.uses)
        if use.kind in kinds and np.isin(use.index, index).any()
    ]


class Site:
    """Rows of one use that belong to a layer: inputs ``[R, in]``, cotangents."""

    def __init__(self, recording, number, fisher, rows=None, columns=None):
        use, (x, taken) = recording.uses[number], recording.inputs[number]
        self.use, self.taken, self.fisher = use, bool(taken), fisher
        self.heads = recording.reach[use.site] if recording.reach else ()
        cs = recording.cotangents[fisher][use.site]
        x = use.rows_of(x)
        c = np.stack([use.cut(c, recording.inputs[number][0]) for c in cs])
        self.x = x if rows is None else x[:, rows]
        self.c = c if columns is None else c[..., columns]
        if use.kind == "matrix":  # all groups of a convolution see the same rows
            whole = np.asarray(cs).reshape(len(cs), len(self.x), -1)
            seen = whole if use.layer == "conv" else self.c
            self.live = (seen != 0).any((0, -1))


def matrix_sites(recording, matrix, fisher):
    """The sites at which a matrix is applied, and those where its transpose is."""
    forward, reverse = [], []
    for k in touching(recording, matrix, ("matrix",)):
        index = recording.uses[k].index
        at = {entry: place for place, entry in np.ndenumerate(index)}
        if not all(entry in at for entry in matrix.ravel()):
            raise Wrong("a use reads only some of the layer's entries")
        places = np.array([[at[e] for e in row] for row in matrix])
        for turned, sites in ((False, forward), (True, reverse)):
            i, j = np.moveaxis(places.swapaxes(0, 1) if turned else places, -1, 0)
            if (i == i[:, :1]).all() and (j == j[:1]).all():
                sites.append(Site(recording, k, fisher, i[:, 0], j[0]))
                break
        else:
            raise Wrong("the layer's entries are no block of the matrix of a use")
    return forward, reverse


def by_row(index):
    """Numbers of added entries as ``[R, out]``, the same in every row."""
    for axis in range(index.ndim):
        rows = index.reshape(int(np.prod(index.shape[:axis])), -1)
        if (rows == rows[0]).all():
            found = rows
    return found


def bias_sites(recording, bias, fisher):
    """The sites at which a bias is added: cotangents ``[columns, R, out]``."""
    sites = []
    if touching(recording, bias, ("matrix", "scale")):
        raise Wrong("what is claimed as a bias is used as a weight")
    for k in touching(recording, bias, ("shift",)):
        site = Site(recording, k, fisher)
        index = by_row(site.use.index)
        if not np.isin(bias, index).all():
            raise Wrong("a use adds only some of the biases")
        places = [list(index[0]).index(e) for e in bias]
        c = site.c.reshape(len(site.c), len(index), -1)[..., places]
        site.c = c * site.x.reshape(len(index), -1)[:, places]
        sites.append(site)
    return sites


def with_bias(sites, biases):
    """Sites whose inputs end with 1, where each has a bias behind it."""
    if len(sites) != len(biases):
        raise Wrong(f"{len(sites)} uses of the weight, {len(biases)} of the bias")
    left = list(biases)
    for site in sites:
        alike = [b for b in left if b.c.shape == site.c.shape]
        same = [b for b in alike if np.allclose(b.c, site.c, 1e-6, 1e-13)]
        if not same:
            raise Wrong("the bias has other cotangents than the weight")
        left.remove(same[0])
        site.x = np.concatenate([site.x, np.ones((len(site.x), 1))], 1)
    return sites


def positions(rows, terms):
    """How many rows are one term's; None where they are not those of whole terms."""
    leading = [int(np.prod(rows[: k + 1])) for k in range(len(rows))]
    return int(np.prod(rows)) // terms if terms in leading else None


def one_per_term(sites, terms, together):
    """``reduce``: the mean input and the summed cotangent of a term's rows.

    Over all sites ``together`` where each has rows that belong to the terms, else site
    by site where they do. Sites count where they run.
    """
    every = [positions(s.use.rows, terms) for s in sites]
    if together and all(every):
        width, out = sites[0].x.shape[1], sites[0].c.shape[-1]
        x, c = np.zeros((terms, width)), np.zeros((len(sites[0].c), terms, out))
        rows = 0
        for site in sites:
            if site.taken:
                x += site.x.reshape(terms, -1, width).sum(1)
                c += site.c.reshape(len(c), terms, -1, out).sum(2)
                rows += len(site.x)
        return [(x * terms / max(rows, 1), c)], terms
    pairs = []
    for site, k in zip(sites, every, strict=True):
        k = k or 1
        x = site.x.reshape(-1, k, site.x.shape[1]).mean(1)
        c = site.c.reshape(len(site.c), -1, k, site.c.shape[-1]).sum(2)
        pairs += [(x, c)] * site.taken
    return pairs, max(sum(len(x) for x, _ in pairs), 1)


def live_per_term(sites, terms, count):
    """``reduce`` with a mask: the mean input over the rows of a term that count."""
    x = np.zeros((terms, sites[0].x.shape[1]))
    c = np.zeros((len(sites[0].c), terms, sites[0].c.shape[-1]))
    live = np.zeros((terms, 1))
    for site in sites:
        if site.taken:
            seen = site.live[:, None]
            x = x + (site.x * seen).reshape(terms, -1, site.x.shape[1]).sum(1)
            live = live + seen.reshape(terms, -1, 1).sum(1)
            c = c + site.c.reshape(len(site.c), terms, -1, site.c.shape[-1]).sum(2)
    return [(x / np.maximum(live, 1), c)], count


def live_rows(site, k):
    """Of every ``k`` rows one: the mean input of those that count, if any does."""
    seen = site.live.reshape(-1, k, 1)
    x = (site.x.reshape(-1, k, site.x.shape[1]) * seen).sum(1)
    x = x / np.maximum(seen.sum(1), 1)
    c = site.c.reshape(len(site.c), -1, k, site.c.shape[-1]).sum(2)
    some = seen.any((1, 2))
    return x[some], c[:, some]


def factors(sites, terms, sharing, tied, mask):
    """``A`` and ``G`` of a layer from its sites."""
    every = [positions(s.use.rows, terms) for s in sites]
    if mask is not None and sharing == "reduce" and all(every) and not tied:
        terms = mask.sum()
        pairs, rows = live_per_term(sites, mask.size, terms)
    elif mask is not None:
        reduce = sharing == "reduce"
        each = [k if reduce and k else 1 for k in every]
        pairs = [live_rows(s, k) for s, k in zip(sites, each, strict=True) if s.taken]
        terms = mask.sum()
        rows = max(sum(len(x) for x, _ in pairs), 1)
    elif sharing == "reduce":
        several = len(sites) > 1
        pairs, rows = one_per_term(sites, terms, several and not tied)
    else:
        pairs = [(s.x, s.c) for s in sites if s.taken]
        rows = max(sum(len(x) for x, _ in pairs), 1)
    a = sum(x.T @ x for x, _ in pairs) / terms
    g = sum(np.einsum("kri,krj->ij", c, c) for _, c in pairs) * terms**2 / rows
    n_in, n_out = sites[0].x.shape[1], sites[0].c.shape[-1]
    return np.zeros((n_in, n_in)) + a, np.zeros((n_out, n_out)) + g


def row_weight(site, program):
    """``ω`` of a row: the mean weight of the heads that see it over its terms."""
    weights = program.head_terms[1]
    mean = np.mean([weights[k] for k in site.heads])
    return mean / terms_of(site, program)


def product_weight(site, program):
    """What products of a row's cotangents are multiplied with.

    Columns of the Hessian's root hold ``√(ω / N_1)``; of the loss's gradient, what one
    head asks holds ``ω``.
    """
    sizes, weights = program.head_terms
    if site.fisher == "exact":
        return program.terms
    if len(site.heads) == 1:
        return sizes[site.heads[0]] / weights[site.heads[0]]
    return terms_of(site, program)


def terms_of(site, program):
    """``N`` of the heads that see a row; of the first where they differ."""
    own = {program.head_terms[0][k] for k in site.heads}
    return own.pop() if len(own) == 1 else program.terms


def weighted_factors(sites, program):
    """``A = Σ ω a aᵀ`` and ``G = Σ ω c̃ c̃ᵀ / Σ ω`` of a loss of several terms."""
    n_in, n_out = sites[0].x.shape[1], sites[0].c.shape[-1]
    a, g, total = np.zeros((n_in, n_in)), np.zeros((n_out, n_out)), 0.0
    for site in sites:
        if site.taken:
            omega = row_weight(site, program)
            a += omega * site.x.T @ site.x
            own = np.einsum("kri,krj->ij", site.c, site.c)
            g += product_weight(site, program) * own
            total += omega * len(site.x)
    return a, g / (total or 1)


def squares(forward, reverse, terms, mask):
    """``N sum_n g_n^2`` of the terms' gradients; None where rows are nobody's."""
    total, count = 0.0, terms if mask is None else mask.sum()
    for sites, turned in ((forward, False), (reverse, True)):
        for site in sites:
            if positions(site.use.rows, terms) is None:
                return None
            x = site.x.reshape(terms, -1, site.x.shape[1])
            c = site.c.reshape(len(site.c), terms, -1, site.c.shape[-1])
            g = np.einsum("npi,knpo->knio", x, c)
            total = total + (g.swapaxes(-1, -2) if turned else g)
    return np.square(total).sum((0, 1)) * count


def unit_blocks(recording, entries, program, fisher):
    """``sum_n s_n s_n^T`` of scales and shifts ``entries [units, k]``.

    An example is a term of the loss where a result has a row for each (every position
    of a sequence), else an example of the batch. All uses are added up first, unless
    they differ in what an example is.
    """
    numbers = touching(recording, entries, ("scale", "shift"))
    if touching(recording, entries, ("matrix",)):
        raise Wrong("what is claimed as a scale or shift is used as a weight")
    if not numbers:
        raise Wrong("no use of it is known")
    place = {e: n for n, e in enumerate(entries.ravel())}
    found = []
    for site in (Site(recording, k, fisher) for k in numbers):
        index, values = site.use.index, site.c * site.x
        by_term = program.terms != program.batch and index.ndim > 2
        s = np.zeros((len(site.c), program.terms, len(place)))
        for at, entry in np.ndenumerate(index):
            if entry in place:
                n = at[0] * index.shape[1] + at[1] if by_term else at[0]
                s[:, n, place[entry]] += values[(slice(None), *at)]
        factor = product_weight(site, program) if program.weighted else 1
        found.append(((by_term, site.heads), s * factor**0.5))
    # What the same heads see is added up first, unless an example is something else.
    if len({by_term for (by_term, _), _ in found}) > 1:
        found = [(number, s) for number, (_, s) in enumerate(found)]
    groups = {group: sum(s for own, s in found if own == group) for group, _ in found}
    shaped = [s.reshape(-1, *entries.shape) for s in groups.values()]
    return sum(np.einsum("nuk,nul->ukl", s, s) for s in shaped)


def gradient(recording, size):
    """The gradient that all proper uses add up to, and which entries are odd."""
    total, odd = np.zeros(size), np.zeros(size, bool)
    for k, use in enumerate(recording.uses):
        if use.kind == "odd":
            odd[use.index.ravel()] = True
            continue
        site = Site(recording, k, "empirical")
        if use.kind == "matrix":
            part = site.x.T @ site.c[0]
        else:
            part = site.c[0] * site.x
        np.add.at(total, use.index.ravel(), part.ravel())
    return total, odd


def bias_alone(recording, bias, fisher):
    """A bias that is a block of its own: its rows' inputs are 1."""
    sites = bias_sites(recording, bias, fisher)
    for site in sites:
        site.c, rows = np.asarray(site.c), site.c.shape[1]
        site.x = np.ones((rows, 1))
        site.live = (site.c != 0).any((0, -1))
        shape = site.use.index.shape
        lead = 0
        while int(np.prod(shape[:lead])) < rows:
            lead += 1
        site.use.rows = shape[:lead]
    return sites
