"""From a user's loss function to its jaxpr, plan and layers, with the errors said."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# The rules register themselves.
from kfac_jax_lite.core.likelihoods import BESIDE, MASK, row_shape
from kfac_jax_lite.core.pytree import is_key, without_value
from kfac_jax_lite.core.types import ClosedJaxpr, LayerTag
from kfac_jax_lite.tagging import rules_control as _nesting
from kfac_jax_lite.tagging import rules_elementwise as _elementwise
from kfac_jax_lite.tagging import rules_lookups as _lookups
from kfac_jax_lite.tagging import rules_products as _matchers
from kfac_jax_lite.tagging import rules_structure as _structure
from kfac_jax_lite.tagging.analysis import Walk, analyse
from kfac_jax_lite.tagging.example_axes import place_examples, terms_of
from kfac_jax_lite.tagging.resolve import Facts, plain, resolve
from kfac_jax_lite.tagging.sites import Plan, Site
from kfac_jax_lite.tagging.unbatched import plan_spreads, spread_sites

__all__ = ["Trace", "trace"]
del _elementwise, _lookups, _matchers, _nesting, _structure


@dataclasses.dataclass(frozen=True)
class Trace:
    """One abstract trace of a loss.

    Attributes:
        closed: The jaxpr; parameters come first among its inputs.
        plan: Where its layers sit.
        layers: Its layers.
        sites: The chosen sites, by layer name.
        slots: The same sites by slot: those of a layer that the same marked outputs
            depend on have one together.
        num_examples: ``N``; of several terms with their own, that of the first.
        terms: ``N_k`` of every marked output.
        marks: Likelihood of every marked output, in program order, and what stands in
            front of them.
        out_tree: Structure of the loss function's result.
    """

    closed: ClosedJaxpr
    plan: Plan
    layers: tuple[LayerTag, ...]
    sites: dict[str, list[Site]]
    slots: dict[str, list[Site]]
    num_examples: int
    terms: tuple[int, ...]
    marks: tuple[str, ...]
    out_tree: Any

    def terms_of(self, site: Site) -> int:
        """``N`` of the outputs that depend on a site."""
        return terms_of(site, self.terms, self.num_examples)

    def masked(self, site: Site) -> bool:
        """Whether one of the outputs that depend on a site has a mask."""
        if not site.marks:
            return MASK in self.marks
        number = 0
        for name in self.marks:
            if name == MASK and number in site.marks:
                return True
            number += name not in BESIDE
        return False


@dataclasses.dataclass(frozen=True)
class TraceOptions:
    """What a trace depends on beside the loss and its arguments.

    Attributes:
        has_aux: Whether the loss function returns ``(loss, aux)``.
        num_examples: ``N`` where it cannot be read off.
        sampled: Whether the output must be marked (MC or exact Fisher).
        max_factor_dim: Largest Kronecker factor that is kept in full.
        outputs_only: Whether the marked outputs are all that matters, not the loss.
    """

    has_aux: bool
    num_examples: int | None
    sampled: bool
    max_factor_dim: int
    outputs_only: bool = False


def trace(
    loss_fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    options: TraceOptions,
) -> Trace:
    """Traces ``loss_fn(params, *args)`` abstractly and finds its layers.

    Args:
        loss_fn: Returns the mean loss, a scalar, or ``(loss, aux)``.
    """
    has_aux = options.has_aux
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    check_params(flat)
    numbers = check_args(args)
    try:
        closed, shape = jax.make_jaxpr(loss_fn, return_shape=True)(params, *args)
    except CONCRETE as error:
        if not numbers:
            raise
        raise TypeError(
            f"args{numbers[0]} is a Python number, and the loss must know it while it "
            "is traced. Close over it: kfac.tag(lambda params, x: loss_fn(params, x, "
            "True), params, x)."
        ) from error
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise NameError(
            f"{error} The loss uses a mapped axis: call kfac.tag where that axis is "
            "bound, inside the function given to jax.pmap or jax.shard_map "
            "(jax.eval_shape of it suffices)."
        ) from error
    check_loss(shape, has_aux)
    walk, plan = analyse(closed, len(flat), options.sampled, options.outputs_only)
    if walk.while_leaves:
        check_while(loss_fn, params, args, has_aux, flat, walk.while_leaves)
    n, terms = count_examples(walk, args, options.num_examples)
    check_marks(walk, options.sampled)
    find_marks(walk, options.sampled)
    followed = place_examples(walk, plan, closed.jaxpr, len(flat), n, terms)
    spread_sites(walk, *followed)
    check_masks(walk)
    paths = [without_value(path) for path, _ in flat]
    shapes = [tuple(leaf.shape) for _, leaf in flat]
    sizes, limit = leading_axes(args), options.max_factor_dim
    facts = Facts(paths, shapes, n, terms, sizes, limit)
    layers = resolve(walk, facts)
    plan_spreads(walk, *followed)
    sites: dict[str, list[Site]] = {}
    for site in walk.sites:
        if site.layer is not None:
            sites.setdefault(site.layer, []).append(site)
    marks = () if walk.nested_marks else tuple(mark.name for mark in walk.marks)
    out_tree = jax.tree_util.tree_structure(shape)
    slots = slots_of(sites)
    return Trace(closed, plan, layers, sites, slots, n, terms, marks, out_tree)


def slots_of(sites: dict[str, list[Site]]) -> dict[str, list[Site]]:
    """Names the slot of every site; returns the sites by slot."""
    slots: dict[str, list[Site]] = {}
    for layer, own in sites.items():
        kinds = [*dict.fromkeys(site.marks for site in own)]
        for site in own:
            number = kinds.index(site.marks)
            # No layer has such a name: the slot's number stands behind a control code.
            site.slot = f"{layer}\0{number}" if number else layer
            slots.setdefault(site.slot, []).append(site)
    return slots


def check_params(flat: list[Any]) -> None:
    """Parameters must be real floating-point arrays, at least one."""
    if not flat:
        raise ValueError("params has no leaves: there is nothing to train.")
    for path, leaf in flat:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not hasattr(leaf, "shape"):
            kind = type(leaf).__name__
            raise TypeError(f"params[{plain(path)}] is a {kind}, not an array.")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params[{plain(path)}] has dtype {dtype}; K-FAC trains real "
                "floating-point parameters. Pass it as a further argument instead."
            )


# Errors of programs that must know a value while they are traced.
CONCRETE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerArrayConversionError,
)


def check_args(args: tuple[Any, ...]) -> list[str]:
    """Arguments must be arrays or numbers; paths of the Python numbers."""
    numbers = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(args)[0]:
        if isinstance(leaf, (bool, int, float, complex)):
            numbers.append(jax.tree_util.keystr(path))
        elif not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"args{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, not an "
                "array. Close over what is none: kfac.tag(lambda params, x: "
                "loss_fn(params, x, mode), params, x)."
            )
    return numbers


def check_loss(shape: Any, has_aux: bool) -> None:
    """The loss must be one real number."""
    if has_aux and not (isinstance(shape, tuple) and len(shape) == 2):
        raise TypeError("has_aux=True wants loss_fn to return (loss, aux).")
    value: Any = shape[0] if has_aux else shape
    if isinstance(shape, tuple) and not has_aux:
        raise TypeError("loss_fn returned a tuple; pass has_aux=True for (loss, aux).")
    if not hasattr(value, "shape") or value.shape != ():
        seen = getattr(value, "shape", type(value).__name__)
        raise TypeError(f"loss_fn must return a scalar, got {seen}; take the mean.")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"loss_fn must return a real number, got {value.dtype}.")


def check_while(
    loss_fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    has_aux: bool,
    flat: list[tuple[Any, Any]],
    leaves: int,
) -> None:
    """A ``while`` loop is fine only where no derivative has to pass it."""
    value = (lambda *a: loss_fn(*a)[0]) if has_aux else loss_fn
    try:
        jax.eval_shape(jax.grad(value), params, *args)
    except ValueError as error:
        names = [plain(p) for i, (p, _) in enumerate(flat) if leaves >> i & 1]
        raise ValueError(
            f"parameters {', '.join(names)} reach a while loop, which has no "
            "reverse-mode derivative; use lax.scan or a loop of static length."
        ) from error


def count_examples(
    walk: Walk, args: tuple[Any, ...], given: int | None
) -> tuple[int, tuple[int, ...]]:
    """``N``: rows of the first marked output, else given, else the leading axis."""
    marked = tuple(
        math.prod(row_shape(mark.shape, mark.name)) * math.prod(mark.loops)
        for mark in walk.marks
        if mark.name not in BESIDE
    )
    if given is not None and (
        isinstance(given, bool) or given != int(given) or given < 1
    ):
        raise ValueError(f"num_examples must be a whole number >= 1, got {given!r}.")
    unknown = walk.nested_marks and len(set(marked)) > 1
    if unknown or (marked and given is not None and set(marked) != {given}):
        raise ValueError(
            f"the marked outputs have {sorted(set(marked))} rows and num_examples is "
            f"{given}: which is the number of terms that the loss averages over? "
            "Leave num_examples out, and mark what leaves loops and branches."
        )
    n = marked[0] if marked else leading_axis(args) if given is None else int(given)
    if min((n, *marked)) < 1:
        raise ValueError(f"the batch is empty: the loss averages over {n} terms.")
    return n, marked


def find_marks(walk: Walk, sampled: bool) -> None:
    """Sets which marked outputs depend on every site, where it matters."""
    numbers = [mark for mark in walk.marks if mark.name not in BESIDE]
    if walk.nested_marks or not numbers or not walk.of_marks:
        return
    for site in walk.sites:
        plan, index = site.place  # type: ignore[misc]
        scope = walk.scopes[plan]
        var = scope.jaxpr.eqns[index].outvars[site.output]
        found = frozenset(
            k
            for k, mark in enumerate(numbers)
            if var in scope.reaching[id(mark.eqn)].variables
        )
        site.unmarked = sampled and not found
        site.marks = found if len(numbers) > 1 else frozenset()


def leading_axes(args: tuple[Any, ...]) -> dict[int, str]:
    """Leading axes of the array arguments (PRNG keys aside), each with an example."""
    sizes: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(args)[0]:
        shape = tuple(getattr(leaf, "shape", ()))
        if shape and not is_key(leaf):
            sizes.setdefault(shape[0], f"args{jax.tree_util.keystr(path)} {shape}")
    return sizes


def leading_axis(args: tuple[Any, ...]) -> int:
    """The leading axis that all array arguments share."""
    sizes = leading_axes(args)
    if len(sizes) == 1:
        return next(iter(sizes))
    seen = "; ".join(sizes.values()) or "no array arguments"
    raise ValueError(
        f"cannot tell how many terms the loss averages over ({seen}). Mark the "
        "network's output with kfac.categorical, kfac.bernoulli or kfac.normal, or "
        "pass num_examples."
    )


def check_masks(walk: Walk) -> None:
    """No masks and weights inside loops and branches."""
    if walk.nested_marks and any(mark.name in BESIDE for mark in walk.marks):
        raise ValueError(
            "masks and weights say what the terms of the loss are: mark an output with "
            "them outside scan and cond. This loss marks one inside."
        )


def check_marks(walk: Walk, sampled: bool) -> None:
    """MC and exact Fisher need an output whose distribution is known."""
    if not sampled:
        return
    if not walk.marks:
        raise ValueError(
            'fisher="mc" and "exact" need the network\'s output marked: wrap it in '
            "kfac.categorical, kfac.bernoulli or kfac.normal inside loss_fn."
        )
    if walk.nested_marks:
        raise ValueError(
            "an output marked inside scan, cond or shard_map cannot be sampled; mark "
            "what leaves it."
        )
