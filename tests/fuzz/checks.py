"""What must hold for every program: gradients, coverage, statistics, reports."""

import collections
from typing import Any

import jax
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests.fuzz import oracle
from tests.fuzz.layers import Conv
from tests.fuzz.oracle import Wrong
from tests.fuzz.program import record
from tests.helpers import close, leaves

KRONECKER = ("dense", "conv", "embedding")
OPTIONS = {
    "empirical": {},
    "exact": {"fisher": "exact"},
    "reduce": {"weight_sharing": "reduce"},
    "reduced exact": {"weight_sharing": "reduce", "fisher": "exact"},
    "squares": {"statistics": "squares"},
    "exact squares": {"statistics": "squares", "fisher": "exact"},
}
SEEN: collections.Counter = collections.Counter()  # what the programs came to
SELECTIONS = {"transpose": np.transpose, "reshape": np.reshape, "rev": np.flip}
FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


class Claim:
    """One layer of the tagged loss, in numbers of entries.

    Attributes:
        layer: The layer.
        parts: By role, the numbers of its entries, ``[*stack, *core]``.
    """

    def __init__(self, program, layer):
        index = list(program.index.values())
        self.layer = layer
        self.parts = {
            role: read(view.ops, index[view.leaf])
            for role, view in zip(layer.roles, layer.views, strict=True)
        }

    @property
    def entries(self):
        """All of them."""
        return np.concatenate([part.ravel() for part in self.parts.values()])

    def blocks(self):
        """``(weight [in, out] or None, bias [out] or None)`` of every block."""
        shapes = self.layer.stack + self.layer.blocks
        count = int(np.prod(shapes))
        weight, bias = (self.parts.get(role) for role in ("weight", "bias"))
        weights = [None] * count
        if weight is not None:
            weights = weight.reshape(count, *weight.shape[-2:])
        biases = [None] * count if bias is None else bias.reshape(count, -1)
        return list(zip(weights, biases, strict=True))


def read(ops, x):
    """What a view's steps select, in numpy: ``[*stack, *core]``."""
    for number, (name, argument) in enumerate(ops):
        if name == "unstack":
            return np.stack([read(ops[number + 1 :], row) for row in x])
        if name == "slice":
            x = x[tuple(slice(*s) for s in zip(*argument, strict=True))]
        else:
            x = SELECTIONS[name](x, argument)
    return x


def check_program(program, variant="exact"):
    """Everything: values, gradients, layers, the statistics of two kinds."""
    params, args = program.params(), program.arguments
    if program.heads[0].mark == "unmarked":  # nothing to sample from
        variant = variant.replace("reduced exact", "reduce").removeprefix("exact ")
        variant = "empirical" if variant == "exact" else variant
    text = repr(program)
    if program.weighted or "Complex" in text:
        # Reduced rows of several terms, or of both parts: not in the oracle.
        variant = "exact" if "exact" in variant else "empirical"
    tagged: Any = {k: tag_or_none(program, OPTIONS[k]) for k in {"empirical", variant}}
    check_coverage(program, tagged["empirical"].layers)
    if program.seed < 2:
        check_strict(program, tagged["empirical"].layers)
    arrays, finish = record(program, params, "exact" in variant)

    def run(*args):
        plain = jax.value_and_grad(program.plain_loss)(*args)
        found = {k: t and t.value_and_grad(*args) for k, t in tagged.items()}
        return plain, found, arrays()

    run = jax.jit(run, compiler_options=FAST)
    plain, found, recorded = run(params, *args)
    tolerance = 2e-5 if program.coarse else 1e-8
    recording = finish(recorded)
    check_oracle(program, recording, program.leaves(plain[1]), tolerance)
    for kind, result in found.items():
        if result is None:
            SEEN["no squares of rows that are nobody's"] += 1
            check_no_squares(program, recording, tagged["empirical"])
            continue
        value, grads, statistics = result
        close((value, grads), plain, 1e-5 if program.coarse else 1e-10)
        check_unread(program, tagged[kind].layers, program.leaves(grads))
        Comparison(program, recording, kind, tolerance).run(
            tagged[kind].layers, statistics, program.leaves(grads)
        )
    count_layers(program, recording, tagged["empirical"].layers)
    return tagged["empirical"]


def tag_or_none(program, options):
    """The tagged loss; None where squares have no meaning."""
    try:
        return program.tag(**options)
    except ValueError as error:
        if "squares of single examples' gradients need rows" in str(error):
            return None
        raise


def check_coverage(program, layers):
    """Every leaf is in a layer, no entry in two; whatever fell back says why."""
    owned = {path for layer in layers for path in layer.params}
    assert owned == set(leaves(program.params()))
    claims = [Claim(program, t) for t in layers if t.kind != "diagonal"]
    entries = np.concatenate([np.zeros(0, int), *(c.entries for c in claims)])
    assert len(set(entries)) == len(entries), "an entry is in two layers"
    for layer in layers:
        if layer.kind == "diagonal":
            assert layer.note, layer
            (index,) = Claim(program, layer).parts.values()
            assert not np.isin(index, entries).any(), "a fallback is in a layer, too"
    total = sum(int(np.prod(s)) for s in program.shapes.values())
    assert sum(t.elements for t in layers) == total


def check_strict(program, layers):
    """``strict`` raises exactly where something fell back, and names it."""
    fallen = [t for t in layers if t.kind == "diagonal"]
    if not fallen:
        program.tag(strict=True)
        return
    with pytest.raises(ValueError, match="no layer rule covers") as caught:
        program.tag(strict=True)
    for layer in fallen:
        assert layer.params[0] in str(caught.value)


def check_oracle(program, recording, grads, tolerance):
    """The uses add up to the gradient: none of them was forgotten."""
    flat = np.concatenate([np.ravel(g) for g in grads.values()])
    total, odd = oracle.gradient(recording, len(flat))
    scale = np.abs(flat).max()
    assert np.allclose(total[~odd], flat[~odd], 0, tolerance * 10 * scale), "oracle"


def check_unread(program, layers, grads):
    """What is said not to reach the loss has no gradient."""
    flat = np.concatenate([np.ravel(g) for g in grads.values()])
    claimed = np.zeros(len(flat), bool)
    for layer in layers:
        entries = Claim(program, layer).entries
        claimed[entries] = True
        if "does not reach the loss" in layer.note:
            assert not flat[entries].any(), layer
    assert not flat[~claimed].any(), "entries with a gradient are in no layer"


def check_no_squares(program, recording, tagged):
    """Squares are refused only where some rows belong to no term.

    Rows before a convolution that mixes positions belong to none, either.
    """
    if program.terms != program.batch and any(map(mixes, program.steps[1:])):
        return
    kinds = [t for t in tagged.layers if t.kind in KRONECKER]
    entries = np.concatenate([Claim(program, t).entries for t in kinds])
    uses = oracle.touching(recording, entries, ("matrix", "shift"))
    rows = [recording.uses[k].rows for k in uses]
    assert None in [oracle.positions(r, program.terms) for r in rows]


def mixes(step):
    """Whether it is a convolution of more than single positions."""
    if not isinstance(step, Conv):
        return False
    return {*step.kernel, *step.strides} != {1} or any(map(any, step.padding))


class Comparison:
    """Statistics of one kind against the oracle."""

    def __init__(self, program, recording, kind, tolerance):
        options = OPTIONS[kind]
        self.program, self.recording, self.tolerance = program, recording, tolerance
        self.fisher = options.get("fisher", "empirical")
        self.sharing = options.get("weight_sharing", "expand")
        self.squares = "statistics" in options
        self.mask = np.asarray(program.arguments[-1]) if program.masked else None

    def run(self, layers, statistics, grads):
        """Every layer."""
        by_path = dict(zip(leaves(self.program.params()), grads.values(), strict=True))
        for layer in layers:
            seen = statistics[layer.name]
            if layer.kind == "diagonal":
                close(seen.gradient, by_path[layer.params[0]])
                terms = self.program.terms if self.mask is None else self.mask.sum()
                assert seen.num_examples == terms
                continue
            try:
                self.layer(layer, seen)
            except Wrong as error:
                raise Wrong(f"layer {layer.name}: {error}\n{layer}") from None

    def layer(self, layer, seen):
        """One layer."""
        if (
            "function of its entries" in layer.note
        ):  # see tests.tagging.test_reparametrised
            SEEN["a function of a weight"] += 1
            return
        claim = Claim(self.program, layer)
        if "whole batch" in layer.note:
            uses = oracle.touching(self.recording, claim.entries, ("matrix", "shift"))
            if not any(self.recording.uses[k].spread for k in uses):
                raise Wrong("no use of it is made once for the whole batch")
            SEEN["used once for the whole batch, and said so"] += 1
            return
        odd = oracle.touching(self.recording, claim.entries, ("odd",))
        if odd and "also used by" not in layer.note:
            raise Wrong("a use that is no layer goes unmentioned")
        if layer.kind == "scale_shift":
            self.units(claim, seen.blocks)
            return
        found: Any = [self.block(layer, *pair) for pair in claim.blocks()]
        for field in found[0]:
            wanted = np.stack([one[field] for one in found])
            actual = np.asarray(getattr(seen, field))
            actual = actual.reshape(wanted.shape)
            self.equal(layer, field, actual, wanted)

    def equal(self, layer, field, actual, wanted):
        """Equal, relative to the largest entry."""
        scale = max(np.abs(wanted).max(initial=0.0), 1e-12)
        error = np.abs(actual - wanted).max(initial=0.0) / scale
        if not error <= self.tolerance:
            raise Wrong(f"{field} is off by {error:.2g}:\n{actual}\nwanted\n{wanted}")

    def block(self, layer, weight, bias):
        """The statistics of one block, by field."""
        if weight is None:
            forward, reverse = oracle.bias_alone(self.recording, bias, self.fisher), []
        else:
            sites = oracle.matrix_sites(self.recording, weight, self.fisher)
            forward, reverse = sites
            if bias is not None:
                biases = oracle.bias_sites(self.recording, bias, self.fisher)
                if reverse and layer.tied:
                    raise Wrong("a bias in the block of a weight used both ways")
                forward = oracle.with_bias(forward, biases)
        if "outside the batch" in layer.note:
            SEEN["uses outside the batch, and said so"] += 1
            forward, reverse = (
                [s for s in own if not s.use.spread] for own in (forward, reverse)
            )
        if not forward:
            raise Wrong("no use of it is known")
        if reverse and not layer.tied and "also used by" in layer.note:
            SEEN["used the other way round, too, and said so"] += 1
            reverse = []
        if layer.tied != bool(reverse):
            raise Wrong(f"tied is {layer.tied}, but {len(reverse)} uses are reverse")
        return self.fields(layer, forward, reverse)

    def fields(self, layer, forward, reverse):
        """What the statistics of one block must be."""
        terms, mask = self.program.terms, self.mask
        if self.squares:
            found = oracle.squares(forward, reverse, terms, mask)
            assert found is not None, "squares of rows that belong to no term"
            return {"squares": found}
        one_hot = layer.kind == "embedding"
        known = terms, self.sharing, layer.tied, mask
        if self.program.weighted:
            known = (self.program,)
        factors = oracle.weighted_factors if self.program.weighted else oracle.factors
        a, g = factors(forward, *known)
        found = {"a": np.diag(a) if one_hot else a, "g": g}
        if reverse:
            a, g = factors(reverse, *known)
            found |= {"a_out": a, "g_out": np.diag(g) if one_hot else g}
        return found

    def units(self, claim, actual):
        """Unit-wise blocks of scales and shifts."""
        roles = [r for r in ("scale", "shift") if r in claim.parts]
        entries = np.stack([claim.parts[r].ravel() for r in roles], -1)
        known = self.recording, entries, self.program, self.fisher
        terms = self.program.terms if self.mask is None else self.mask.sum()
        weighted = self.program.weighted  # the products have their factor already
        wanted = oracle.unit_blocks(*known) * (1 if weighted else terms)
        actual = np.asarray(actual).reshape(wanted.shape)
        self.equal(claim.layer, "blocks", actual, wanted)


def count_layers(program, recording, layers):
    """Counts what the layers came to, for a reader of the slow run's output."""
    for layer in layers:
        SEEN[f"kind {layer.kind}{', tied' if layer.tied else ''}"] += 1
        if layer.kind == "diagonal":
            entries = Claim(program, layer).entries
            proper = oracle.touching(recording, entries, ("matrix", "scale", "shift"))
            odd = oracle.touching(recording, entries, ("odd",))
            if proper and not odd:
                SEEN[f"missed: {layer.note}"] += 1


def check_step(program):
    """Two steps of the optimiser: finite, one compilation, nothing stands still."""
    tagged = program.tag()
    tx = kfac.kfac(tagged.layers, 0.1, damping=0.1, momentum=0.0, kl_clip=None)
    params, args = program.params(), program.arguments
    state, traces = tx.init(params), []

    @jax.jit
    def step(params, state):
        traces.append(1)
        _, grads, statistics = tagged.value_and_grad(params, *args, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return updates, grads, state

    for _ in range(2):
        updates, grads, state = step(params, state)
        for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            assert np.isfinite(u).all()
            assert not np.any((np.asarray(g) != 0) & (np.asarray(u) == 0))
    assert len(traces) == 1


def check_eager(program):
    """Value and gradient outside ``jit``."""
    params, args = program.params(), program.arguments
    value, grads, _ = program.tag().value_and_grad(params, *args)
    wanted = jax.value_and_grad(program.plain_loss)(params, *args)
    close((value, grads), wanted, 1e-5 if program.coarse else 1e-10)
