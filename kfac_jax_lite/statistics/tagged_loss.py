"""``tag`` and ``TaggedLoss``: value, gradient and statistics in one backward pass."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.likelihoods import BESIDE, count_terms, masked_rows, outputs_of
from kfac_jax_lite.core.mesh import explicit_mesh
from kfac_jax_lite.core.pytree import find_states, leaves_by_path, vary, varying_axes
from kfac_jax_lite.core.types import (
    Array,
    Deferred,
    DiagonalStatistics,
    KroneckerStatistics,
    LayerTag,
    ScaleShiftStatistics,
    SquareStatistics,
    Statistics,
    TiedStatistics,
    accumulation_dtype,
)
from kfac_jax_lite.statistics.deferred import Watched, thin_layers, watchable
from kfac_jax_lite.statistics.estimators import Recipe, make_recipe, zero_probes
from kfac_jax_lite.statistics.fisher_passes import (
    Finisher,
    resampled,
    sampled_pull,
    zeros_of,
)
from kfac_jax_lite.statistics.subsample import Subsample
from kfac_jax_lite.statistics.weights import with_weights
from kfac_jax_lite.tagging.interpreter import Interpreter, Slot
from kfac_jax_lite.tagging.table import fingerprint, table
from kfac_jax_lite.tagging.trace import Trace, TraceOptions, trace

FISHERS = ("empirical", "mc", "exact")
WEIGHT_SHARING = ("expand", "reduce")
STATISTICS = ("factors", "squares")
P = ParamSpec("P")
R = TypeVar("R")


def by_position(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with an error that says where arguments of the loss go."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters
    known = {name for name, p in parameters.items() if p.kind in kinds}

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        unknown = ", ".join(name for name in kwargs if name not in known)
        if unknown:
            raise TypeError(
                f"{function.__name__} has no argument named {unknown}. The arguments "
                "of the loss go in by position, (params, x, y); where the loss takes "
                "them by name, wrap it: kfac.tag(lambda params, x, y: loss_fn(params, "
                "x, y=y), …)."
            )
        return function(*args, **kwargs)

    return called


@by_position
def tag(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    fisher: str = "empirical",
    weight_sharing: str = "expand",
    has_aux: bool = False,
    num_examples: int | None = None,
    strict: bool = False,
    max_factor_dim: int = 8192,
    subsample: Subsample = Subsample(),  # noqa: B008 (frozen)
    statistics: str = "factors",
    curvature: Callable[..., Any] | None = None,
) -> "TaggedLoss":
    """Finds the layers of a loss function; nothing is executed.

    Args:
        loss_fn: ``loss_fn(params, *args)``, the *mean* of ``N`` loss terms: a scalar,
            or ``(scalar, aux)`` with ``has_aux``.
        params: Any pytree of real arrays or ``jax.ShapeDtypeStruct``.
        *args: Further arguments, arrays or ``jax.ShapeDtypeStruct``.
        fisher: ``"empirical"`` (gradients of the loss), ``"mc"`` (labels sampled from
            the marked output) or ``"exact"`` (the output's Hessian, one backward pass
            per output).
        weight_sharing: ``"expand"`` (every position is a row) or ``"reduce"``
            (positions of one example are reduced first).
        has_aux: Whether ``loss_fn`` returns ``(loss, aux)``.
        num_examples: ``N``, where it is neither the rows of a marked output nor the
            leading axis that all arguments share.
        strict: Raise when a parameter falls back to a diagonal.
        max_factor_dim: Largest Kronecker factor that is kept in full; one up to four
            times as large is kept as diagonal blocks, a larger one as its diagonal.
        subsample: Every how many examples and positions Kronecker factors are
            estimated from, by default all; unbiased whatever the choice.
        statistics: ``"factors"``, or ``"squares"``: for dense layers, convolutions and
            embeddings the exact mean of the squares of single examples' gradients, as
            ``kfac.bayes.vogn`` wants them (no matter the weight sharing).
        curvature: ``curvature(params, *args)``: the function whose Fisher matrix is
            wanted where it is not the loss's, as in variational Monte Carlo and policy
            gradients: value and gradient are those of ``loss_fn``, layers and
            statistics those of this. With ``"mc"`` and ``"exact"`` what it marks is all
            that matters; with ``"empirical"`` it returns a mean loss. It is evaluated
            only when a layer is due.

    Returns:
        The tagged loss. ``print`` it for the table of layers.

    Raises:
        TypeError: Parameters that are not real arrays; arguments that are no arrays or
            were given by name; a loss that is not a scalar.
        ValueError: ``N`` cannot be told; the batch is empty; a parameter sits inside a
            ``while`` loop; ``strict`` and a parameter fell back.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671; Grosse & Martens, 2016,
        arXiv:1602.01407; Eschenhagen et al., 2023, arXiv:2311.00636.
    """
    for name, value, known in (
        ("fisher", fisher, FISHERS),
        ("weight_sharing", weight_sharing, WEIGHT_SHARING),
        ("statistics", statistics, STATISTICS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}.")
    sampled = fisher != "empirical"
    check_factor_dim(max_factor_dim)
    if statistics == "squares" and subsample != Subsample():
        raise ValueError('statistics="squares" takes all rows: no subsample.')
    tagged = TaggedLoss(
        loss_fn,
        (),
        fisher,
        weight_sharing,
        has_aux,
        num_examples,
        max_factor_dim,
        subsample,
        statistics,
        curvature,
    )
    found = tagged.trace(params, args, sampled)
    tagged = dataclasses.replace(tagged, layers=found.layers)
    tagged.check_subsample(found)
    fallen = [t for t in found.layers if t.fallback]
    if strict and fallen:
        lines = "\n".join(f"  {', '.join(t.params)}: {t.note}" for t in fallen)
        raise ValueError(f"no layer rule covers these parameters:\n{lines}")
    return tagged


@dataclasses.dataclass(frozen=True)
class Outputs:
    """A function of which only the marked outputs matter, as a loss: zero."""

    function: Callable[..., Any]

    def __call__(self, params: Any, *args: Any) -> jax.Array:
        """Evaluates the function and returns zero."""
        self.function(params, *args)
        return jnp.zeros(())


def seen_rows(names: Sequence[str], marks: Sequence[jax.Array]) -> list[jax.Array]:
    """Cotangents of marks that are not zero in the rows that count."""
    outputs = iter(outputs_of(names, marks))
    return [
        jnp.zeros_like(mark)
        if name in BESIDE
        else masked_rows(next(outputs), jnp.ones_like(mark))
        for name, mark in zip(names, marks, strict=True)
    ]


def check_factor_dim(size: Any) -> None:
    """It must be a whole number, at least 1."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"max_factor_dim must be a whole number >= 1, got {size!r}.")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class TaggedLoss:
    """A loss function whose layers are known; a pytree without leaves.

    Attributes:
        loss_fn: The user's function.
        layers: One ``LayerTag`` per curvature block; every parameter is in one.
        fisher: ``"empirical"``, ``"mc"`` or ``"exact"``.
        weight_sharing: ``"expand"`` or ``"reduce"``.
        has_aux: Whether the function returns ``(loss, aux)``.
        num_examples: ``N`` if the user gave it.
        max_factor_dim: Largest factor that is kept in full.
        subsample: Which rows the factors are estimated from.
        statistics: ``"factors"`` or ``"squares"``.
        curvature: The function whose Fisher matrix is wanted; None: ``loss_fn``.
    """

    loss_fn: Callable[..., Any]
    layers: tuple[LayerTag, ...]
    fisher: str
    weight_sharing: str
    has_aux: bool
    num_examples: int | None
    max_factor_dim: int
    subsample: Subsample = Subsample()
    statistics: str = "factors"
    curvature: Callable[..., Any] | None = None

    def __str__(self) -> str:
        """The table of layers."""
        return table(self.layers)

    def fingerprint(self) -> str:
        """Stable text of layers and kinds, to be compared in a test of yours.

        One line per layer: kind, name, factor shapes, parameters. It does not depend
        on the batch size. A later trace that finds other layers is an error; one that
        uses them in other ways, a warning.

        Returns:
            The text.
        """
        return fingerprint(self.layers)

    def __call__(self, params: Any, *args: Any) -> Any:
        """``loss_fn(params, *args)``, without statistics.

        Args:
            params: Parameters.
            *args: Further arguments.

        Returns:
            What the loss function returns; called with nothing but a step count, as
            ``optax.inject_hyperparams`` calls every callable argument, the tagged loss.
        """
        if not args and jnp.ndim(params) == 0 and jnp.result_type(params) == jnp.int32:
            return self
        return self.loss_fn(params, *args)

    @by_position
    def value_and_grad(
        self,
        params: Any,
        *args: Any,
        opt_state: Any = None,
        key: Any = None,
        deferred: bool = False,
    ) -> tuple[Any, Any, Any]:
        """Loss, gradient and statistics: one forward pass, one backward pass.

        ``fisher="mc"`` pulls a second cotangent back, ``"exact"`` one per output, both
        only when a layer is due. Call it inside ``jax.jit``: outside, every call traces
        the loss anew.

        Args:
            params: Parameters, structured as in ``tag``.
            *args: Further arguments; other batch sizes retrace.
            opt_state: Optimiser state that contains a ``KFACState``: layers it does not
                list as due return zeros and cost nothing. None: all layers. Not read
                for ``statistics="squares"``.
            key: PRNG key, for ``fisher="mc"``.
            deferred: Leave the statistics to ``update``, which must be called in the
                same traced step with ``statistics=statistics``: a step with nothing due
                then writes nothing in their place. They cannot be read or returned.

        Returns:
            ``(value, grads, statistics)``; ``value`` is ``(loss, aux)`` with
            ``has_aux``; ``statistics[layer.name]`` is a NamedTuple by kind.
            ``Deferred`` statistics with ``deferred``.

        Raises:
            TypeError: Arguments that are no arrays or were given by name.
            ValueError: ``key`` is missing; the state is of another model; the layers
                are no longer those of ``tag``.
        """
        if self.fisher == "mc" and key is None:
            raise ValueError('fisher="mc" samples labels: pass key=jax.random.key(…).')
        if self.curvature is not None:
            value, grads = jax.value_and_grad(self.loss_fn, has_aux=self.has_aux)(
                params, *args
            )
            found = self._apart(params, args, opt_state, key, deferred)
            return value, grads, found
        sampled = self.fisher != "empirical"
        found = self.trace(params, args, sampled)
        self._check_layers(found)
        watched = self._watched(found, params, args, opt_state, deferred)
        leaves = jax.tree.leaves((params, args))
        axes = varying_axes(leaves)
        stacks = {k: own[0].primary.leaf for k, own in found.slots.items()}
        run = Interpreter(watched.on_site, stacks).run
        num, closed = len(jax.tree.leaves(params)), found.closed

        def tapped(flat: list[Any], *probes: Any):
            filled, operands = watched.filled(*probes), [*flat, *leaves[num:]]
            out, marked = run(found.plan, closed.jaxpr, closed.consts, operands, filled)
            aux = out, marked, watched.inputs, watched.thin_inputs
            return (out[0], marked if sampled else []), aux

        probes = watched.probes(axes), watched.outputs()
        (loss, pulled), pullback, (out, marked, inputs, operands) = jax.vjp(
            tapped, leaves[:num], *probes, has_aux=True
        )
        one, silent = jnp.ones_like(loss), [jnp.zeros_like(z) for z in pulled]
        if isinstance(self.loss_fn, Outputs):
            # Input factors, and rows that count, come from this pass.
            silent = seen_rows(found.marks, pulled)
        flat_grads, raw, cotangents = pullback((one, silent))
        rows = watched.rows(found.layers, operands, cotangents, flat_grads)
        outputs = with_weights(found, leaves, outputs_of(found.marks, marked))
        terms = count_terms(outputs)
        finisher = Finisher(watched.recipes, watched.slots, outputs, sampled)
        n = found.num_examples if terms is None else terms
        own = [t.views[0].leaf for t in found.layers if t.fallback]
        diagonals = {i: flat_grads[i] for i in own}

        def compute(gated: bool):
            if not sampled:
                by_field = finisher(watched.raw(raw, inputs, axes))
                return pack_statistics(found, diagonals, by_field, n)
            plain = raw
            back = lambda marks: pullback((jnp.zeros_like(loss), marks))[:2]  # noqa: E731
            if not gated and terms is None:
                plain = back(silent)[1]  # input factors inside the caller's gate, too
            pull = functools.partial(
                sampled_pull, found.marks, marked, back, plain, n, finisher
            )
            sampled_too = resampled(
                self.fisher, outputs, pull, plain, key, diagonals, finisher, gated=gated
            )
            return pack_statistics(found, *sampled_too, n)

        grads = jax.tree.unflatten(jax.tree.structure(params), flat_grads)
        value = jax.tree.unflatten(found.out_tree, out)
        return value, grads, Deferred(compute, rows) if deferred else compute(True)

    def of_curvature(self) -> "TaggedLoss":
        """The tagged function that the statistics are of."""
        if self.curvature is None:
            return self
        sampled = self.fisher != "empirical"
        loss = Outputs(self.curvature) if sampled else self.curvature
        return dataclasses.replace(self, loss_fn=loss, has_aux=False, curvature=None)

    def _apart(
        self,
        params: Any,
        args: tuple[Any, ...],
        opt_state: Any,
        key: Any,
        deferred: bool,
    ) -> Any:
        """Statistics of another function than the loss, where some are due."""
        own = self.of_curvature()

        def compute():
            return own.value_and_grad(params, *args, opt_state=opt_state, key=key)[2]

        if deferred:
            return Deferred(lambda gated: compute())
        due, _, _ = read_state(opt_state, self.layers)
        shapes = jax.eval_shape(compute)  # raises what there is to raise
        if due is None or not due:
            return compute()
        axes = varying_axes((params, args))
        return jax.lax.cond(
            jnp.any(jnp.stack([*due.values()])),
            lambda: vary(compute(), axes),
            lambda: vary(zeros_of(shapes), axes),
        )

    def trace(self, params: Any, args: tuple[Any, ...], sampled: bool) -> Trace:
        """The trace of the loss on these arguments, with the options of ``tag``."""
        own = self.of_curvature()
        options = TraceOptions(
            own.has_aux,
            self.num_examples,
            sampled,
            self.max_factor_dim,
            isinstance(own.loss_fn, Outputs),
        )
        return trace(own.loss_fn, params, args, options)

    def _watched(
        self,
        found: Trace,
        params: Any,
        args: tuple[Any, ...],
        opt_state: Any,
        deferred: bool,
    ) -> Watched:
        """What every layer is tapped with, and which ones are only watched."""
        opt_state = None if self.statistics == "squares" else opt_state
        due, bases, phases = read_state(opt_state, found.layers)
        recipes = self._recipes(found)
        slots = make_slots(recipes, params, due, bases)
        sites, thin = {}, {}
        if deferred and explicit_mesh((params, args)) is None:
            sites = watchable(found, slots) if self.fisher == "empirical" else {}
            thin = {} if varying_axes((params, args)) else thin_layers(found)
        return Watched(recipes, phases, slots, sites, thin)

    def _recipes(self, found: Trace) -> dict[str, Recipe]:
        layers = {t.name: t for t in found.layers}
        return {
            slot: make_recipe(
                layers[sites[0].layer or ""],
                sites,
                found.terms_of(sites[0]),
                self.weight_sharing == "reduce",
                found.masked(sites[0]),
                self.subsample,
                self.statistics == "squares",
            )
            for slot, sites in found.slots.items()
        }

    def check_subsample(self, found: Trace) -> None:
        """Every layer must have rows that a part can be taken of, or it is named."""
        for slot, recipe in self._recipes(found).items():
            for site in found.slots[slot]:
                recipe.lattice(site)

    def _check_layers(self, found: Trace) -> None:
        before, now = fingerprint(self.layers), fingerprint(found.layers)
        changed = set(before.splitlines()) ^ set(now.splitlines())
        if changed:
            names = {line.split(": ", 1)[1].split()[0] for line in changed}
            raise ValueError(
                f"layers {', '.join(sorted(names))} differ from those found by "
                "kfac.tag: the parameters or the loss function's structure changed; "
                "tag it again."
            )
        notes = zip(self.layers, found.layers, strict=True)
        for old, new in notes:
            if without_numbers(old.note) != without_numbers(new.note):
                warnings.warn(
                    f"layer {new.name} is used differently with these arguments than "
                    f"with those of kfac.tag: {new.note or 'no note'}, was "
                    f"{old.note or 'no note'}.",
                    stacklevel=4,
                )


def without_numbers(note: str) -> str:
    """A note without what may depend on the size of the batch."""
    return "".join(c for c in note if not c.isdigit())


def pack_statistics(
    found: Trace, diagonals: dict[int, jax.Array], by_field: dict[str, Any], terms: Any
) -> dict[str, Statistics]:
    """Statistics by layer; those of diagonals are made from the gradient."""
    statistics: dict[str, Statistics] = {}
    for layer in found.layers:
        if layer.fallback:
            gradient = diagonals[layer.views[0].leaf]
            gradient = gradient.astype(accumulation_dtype(gradient.dtype))
            n = jnp.asarray(terms, jnp.float32)
            statistics[layer.name] = DiagonalStatistics(gradient, n)
        elif layer.name not in by_field:
            continue
        elif layer.unitwise:
            statistics[layer.name] = ScaleShiftStatistics(**by_field[layer.name])
        elif "squares" in by_field[layer.name]:
            statistics[layer.name] = SquareStatistics(**by_field[layer.name])
        elif layer.tied:
            statistics[layer.name] = TiedStatistics(**by_field[layer.name])
        else:
            statistics[layer.name] = KroneckerStatistics(**by_field[layer.name])
    return statistics


def read_state(
    opt_state: Any, layers: tuple[LayerTag, ...]
) -> tuple[dict[str, Array] | None, dict[str, tuple[Any, ...]], dict[str, Array]]:
    """Due flags, EKFAC bases and numbers of refreshes, by layer name.

    Where several states name a layer it is due if one of them wants it.
    """
    if opt_state is None:
        return None, {}, {}
    states = find_states(opt_state)
    if not states:
        raise ValueError(
            f"opt_state ({type(opt_state).__name__}) contains no KFACState: pass the "
            "state of the optimiser made by kfac.kfac or kfac.scale_by_kfac."
        )
    known = {layer.name for layer in layers}
    due: dict[str, Array] = {}
    bases: dict[str, tuple[Any, ...]] = {}
    phases: dict[str, Array] = {}
    for state in states:
        for i, name in enumerate(sorted(state.factors)):
            if name not in known:
                raise ValueError(
                    f"opt_state is of another model: it holds a layer {name}, which "
                    "this loss does not have."
                )
            # Wrappers that choose between states by a sum make numbers of flags.
            flag = state.clock.due[i].astype(bool)
            due[name] = due[name] | flag if name in due else flag
            phases[name] = state.clock.refreshes[i].astype(jnp.int32)
            inverse = state.inverses[name]
            if getattr(state.factors[name], "s", None) is not None:
                if name in bases:
                    raise ValueError(f"two EKFAC states share the layer {name}.")
                bases[name] = (inverse.q_a, inverse.q_g)
    return due, bases, phases


def make_slots(
    recipes: dict[str, Recipe],
    params: Any,
    due: dict[str, Array] | None,
    bases: dict[str, tuple[Any, ...]],
) -> dict[str, Slot]:
    """Probes, due flag and bases, by slot."""
    dtypes = {k: leaf.dtype for k, leaf in leaves_by_path(params).items()}
    slots = {}
    for slot, recipe in recipes.items():
        name = recipe.layer.name
        if due is not None and name not in due:
            slots[slot] = Slot(jnp.zeros((), bool), {})
            continue
        dtype = dtypes[recipe.layer.params[0]]
        probes = zero_probes(recipe, dtype, name in bases)
        flag = None if due is None else due[name]
        slots[slot] = Slot(flag, probes, bases.get(name, ()))
    return slots
