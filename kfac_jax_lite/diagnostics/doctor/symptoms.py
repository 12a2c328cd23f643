"""What the averaged factors show to be wrong: one function per complaint.

Every threshold is a constant with its reason; ``kfac_jax_lite.doctor`` asks them all.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.diagnostics.accuracy import kronecker_layers
from kfac_jax_lite.diagnostics.doctor.findings import ERROR, NOTICE, WARNING, Finding
from kfac_jax_lite.diagnostics.report import Damped, damped_extremes, eigenvalues
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker.inverses import FactorInverses

# Rounding errors grow with the condition number: above a tenth of 1 / eps, not one
# digit of the inverse along the smallest eigenvalues is right.
ROUNDED = 0.1
# How much farther than a typical direction the flattest one may be carried. Factors
# are estimates: eigenvalues thousands of times below the mean are noise, or directions
# that no batch has shown yet, and a gradient along them is noise as well.
MOST_AMPLIFIED = 1e4
# The least damping to advise, over the mean eigenvalue: ten times what amplifies so.
SHARE = 1e-3
# Where even the largest curvature changes the damped matrix by less than a tenth, the
# step is the gradient over the damping: K-FAC's cost for plain gradient descent.
FLAT = 1.1
# Trace shared by one direction: 1 + 2 · (what is left) for small rests. Inputs whose
# mean is thirty times their deviation.
CONSTANT_RANK = 1.002
# Diagonal entries this far below the largest are zero; images have a tenth of pixels
# that never change, so that only a quarter is a complaint.
ZERO, DEAD = 1e-10, 0.25
# Refreshes before "never" is said: of few images, a third of the pixels is black.
SEEN = 5
# Notes of the table that speak of rows which belong to no example, and what follows.
UNBATCHED = {
    "applied once for the whole batch": "the rows that it sees are not examples. They "
    "are counted as they are, so that its curvature is that of these rows, not a mean "
    "over examples.",
    "products outside the batch": "beside its layer the weight is applied to fewer "
    "rows than the batch has examples. The curvature is that of the layer alone.",
}
# Parameters outside of any curvature block that couples them.
FALLBACK, MOSTLY_FALLBACK = 0.05, 0.5


class Rule(NamedTuple):
    """A rule that adapts the damping.

    Attributes:
        name: Of the function in ``kfac.damping`` that makes it.
        rises: Whether the last step asked for a larger damping.
    """

    name: str
    rises: bool


class Factors(NamedTuple):
    """A Kronecker layer's averaged factors, on the host.

    Attributes:
        layer: The layer.
        statistics: Its averaged factors.
        a: Eigenvalues of the input factor, ascending.
        g: Of the output factor.
        damping: ``λ`` in force; 0 before the first inversion.
        damped: The spectrum of the damped block, or None without damping.
        eps: Relative rounding error of the state's arithmetic.
        refreshes: How many refreshes have gone into them.
        memory: How many refreshes the average is worth once it has filled up,
            ``(1 + d) / (1 − d)`` (see ``kfac_jax_lite.diagnostics.report.memory``).
        rule: What adapts the damping, or None.
    """

    layer: LayerTag
    statistics: Any
    a: np.ndarray
    g: np.ndarray
    damping: float
    damped: Damped | None
    eps: float
    refreshes: int
    memory: float
    rule: Rule | None

    @property
    def largest(self) -> float:
        """The largest eigenvalue of ``A ⊗ G``."""
        return float(np.max(self.a[..., -1] * self.g[..., -1]))


def factors_of(
    layers: Sequence[LayerTag],
    state: Any,
    records: dict[str, dict[str, Any]],
    rule: Rule | None,
) -> list[Factors]:
    """The factors of the Kronecker layers that have been refreshed."""
    found, names = [], sorted(state.factors)
    clock, damping = jax.device_get((state.clock, state.damping))
    for layer, averaged, inverse in kronecker_layers(layers, state):
        refreshes = records[layer.name]["refreshes"]
        if not refreshes:
            continue
        split = isinstance(inverse, FactorInverses)
        index = names.index(layer.name)
        held = clock.inverse_damping[index]
        shift = float(held if split else damping)
        a, g = map(eigenvalues, averaged[:2], forms.forms_of(layer), layer.sizes)
        damped = damped_extremes(a, g, shift, split) if shift > 0 else None
        eps = float(np.finfo(averaged.a.dtype).eps)
        rest = max(1 - float(clock.weight[index]), eps)
        decay = min(rest ** (1 / refreshes), 1 - eps)
        numbers = (eps, refreshes, (1 + decay) / (1 - decay), rule)
        found.append(Factors(layer, averaged, a, g, shift, damped, *numbers))
    return found


def damping(factors: Factors) -> Iterator[Finding]:
    """A damping far too small or far too large against the factors' eigenvalues."""
    block, value, name = factors.damped, factors.damping, factors.layer.name
    if block is None or factors.largest <= 0:
        return
    condition = float(np.max(block.condition))
    if condition * factors.eps > ROUNDED:
        yield Finding(
            ERROR,
            "damping_below_rounding",
            name,
            f"With damping {value:.1g}, the matrices to be inverted have a condition "
            f"number of {condition:.1e}: more than this precision resolves.",
            "A damping that is orders of magnitude larger, or kfac.damping.adaptive()."
            if factors.rule is None
            else larger(factors.rule, block),
            {"damping": value, "condition": condition, "eps": factors.eps},
        )
    amplified = float(np.max(block.mean / block.low))
    if amplified > MOST_AMPLIFIED:
        yield Finding(
            WARNING,
            "damping_too_small",
            name,
            f"With damping {value:.1g}, directions of the least curvature are carried "
            f"{amplified:.1e} times as far as typical ones: so small eigenvalues of an "
            "estimate are noise.",
            "A larger damping, about the mean eigenvalue times 1e-3 to 1, or "
            "kfac.damping.adaptive()."
            if factors.rule is None
            else larger(factors.rule, block),
            {"damping": value, "amplification": amplified},
        )
    ratio = float(np.max(block.high)) / value
    if ratio < FLAT:
        yield Finding(
            WARNING,
            "damping_too_large",
            name,
            f"Damping {value:.1g} outweighs the largest curvature "
            f"({factors.largest:.1g}): the step is the gradient, scaled.",
            "A smaller damping or kfac.damping.adaptive(). Where the loss is next to "
            'zero, the empirical Fisher matrix vanishes: fisher="mc" or "exact".',
            {"damping": value, "largest": factors.largest, "ratio": ratio},
        )


def larger(rule: Rule, block: Damped) -> str:
    """What keeps a rule from making the damping too small."""
    call = f"kfac.damping.{rule.name}(), about {SHARE * np.max(block.mean):.1g}"
    if rule.rises:
        return f"A larger initial of {call}: the rule is raising the damping already."
    where = {
        "adaptive": "steps end too short, as those do that kl_clip shortens",
        "levenberg_marquardt": "the quadratic model predicts the loss well",
    }[rule.name]
    return (
        f"A larger minimum of {call}: the rule does not see the eigenvalues, and "
        f"lowers the damping where {where}."
    )


def degenerate(factors: Factors) -> Iterator[Finding]:
    """Constant inputs, dead inputs and dead units."""
    layer, numbers = factors.layer, factors.statistics
    ranks = np.square(factors.a.sum(-1)) / np.maximum(
        np.square(factors.a).sum(-1), np.finfo(np.float64).tiny
    )
    if layer.sizes[0] > 1 and ranks.min() < CONSTANT_RANK:
        yield Finding(
            WARNING,
            "constant_inputs",
            layer.name,
            "The inputs hardly vary: their second moments have one direction only "
            f"(effective rank {ranks.min():.4f} of {layer.sizes[0]}).",
            "Standardise the inputs; look for a dead layer below, or statistics taken "
            "with constant inputs or in evaluation mode.",
            {"effective_rank": float(ranks.min()), "size": layer.sizes[0]},
        )
    form_a, form_g = forms.forms_of(layer)
    of_g = diagonal(numbers.g, form_g, layer.sizes[1])
    if not np.all(of_g.max(-1) > 0):
        yield Finding(
            WARNING,
            "no_gradient",
            layer.name,
            "No gradient has reached this layer, or a part of it: its output factor is "
            "zero.",
            "Freeze it on purpose (optax.masked), or look for a dead or cut network "
            "above it.",
            {"largest_g": float(of_g.max())},
        )
        return
    if factors.refreshes < SEEN:
        return
    yield from dead(layer, "dead_units", of_g, "units have never had a gradient")
    if form_a.matrix:
        size = layer.sizes[0] - layer.bias
        of_a = diagonal(numbers.a, form_a, layer.sizes[0])[..., :size]
        yield from dead(layer, "dead_inputs", of_a, "inputs have always been zero")


def dead(
    layer: LayerTag, kind: str, entries: np.ndarray, words: str
) -> Iterator[Finding]:
    """Many entries of a factor's diagonal that are zero."""
    if not entries.size:
        return
    share = float(np.mean(entries <= ZERO * entries.max(-1, keepdims=True)))
    if share > DEAD:
        yield Finding(
            WARNING,
            kind,
            layer.name,
            f"{share:.0%} of its {words}.",
            "Look for dead ReLUs (a lower learning rate, another initialisation), "
            "masked or unused features.",
            {"share": share, "size": entries.shape[-1]},
        )


def diagonal(factor: Any, form: forms.Form, size: int) -> np.ndarray:
    """A factor's diagonal, ``[*blocks, size]``."""
    factor = np.asarray(factor, np.float64)
    if form.matrix:
        factor = np.diagonal(factor, axis1=-2, axis2=-1)
        if form is forms.BLOCKS:
            factor = factor.reshape(*factor.shape[:-2], -1)
    return factor[..., :size]


def is_unbatched(layer: LayerTag) -> bool:
    """Whether the table notes a use of the layer without the examples' axis."""
    return any(note in layer.note for note in UNBATCHED)


def unbatched(layers: Sequence[LayerTag]) -> Iterator[Finding]:
    """Layers that the loss applies, also or only, to something without examples."""
    for layer in filter(is_unbatched, layers):
        (note, meaning), *_ = ((n, UNBATCHED[n]) for n in UNBATCHED if n in layer.note)
        yield Finding(
            NOTICE,
            "unbatched_use",
            layer.name,
            f"The table notes {note!r}: {meaning}",
            "Nothing, where that is meant (spectral normalisation, a network over "
            "parameters). Else let the examples' axis go through the layer: jax.vmap "
            "over the loss of one example, or inputs [batch, …].",
            {"note": layer.note},
        )


def fallback(layers: Sequence[LayerTag]) -> Iterator[Finding]:
    """Parameters under a diagonal, for want of a rule."""
    fallen = [layer for layer in layers if layer.fallback]
    elements = sum(layer.elements for layer in fallen)
    share = elements / max(1, sum(layer.elements for layer in layers))
    if share > FALLBACK:
        first = max(fallen, key=lambda layer: layer.elements)
        yield Finding(
            WARNING if share > MOSTLY_FALLBACK else NOTICE,
            "diagonal_fallback",
            None,
            f"{share:.0%} of the parameters have only a diagonal; the largest is "
            f"{', '.join(first.params)} ({first.note or 'no rule'}).",
            "print(tagged) says why; kfac.tag_as, kfac.tag_dense and kfac.tag_conv "
            "tag by hand.",
            {"share": share, "elements": elements, "layers": len(fallen)},
        )
