"""From a user's loss function to its jaxpr, plan and layers, with the errors said."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# The rules register themselves.
from kfac_jax_lite.likelihoods import MASK, row_shape
from kfac_jax_lite.tagging import elementwise as _elementwise
from kfac_jax_lite.tagging import lookups as _lookups
from kfac_jax_lite.tagging import matchers as _matchers
from kfac_jax_lite.tagging import nesting as _nesting
from kfac_jax_lite.tagging import structure as _structure
from kfac_jax_lite.tagging.analysis import Walk, analyse
from kfac_jax_lite.tagging.examples import place_examples
from kfac_jax_lite.tagging.layers import Plan, Site
from kfac_jax_lite.tagging.resolve import resolve
from kfac_jax_lite.tagging.tags import Facts, plain
from kfac_jax_lite.tree import is_key, without_value
from kfac_jax_lite.types import ClosedJaxpr, LayerTag

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
        num_examples: ``N``.
        marks: Likelihood of every marked output, in program order.
        out_tree: Structure of the loss function's result.
    """

    closed: ClosedJaxpr
    plan: Plan
    layers: tuple[LayerTag, ...]
    sites: dict[str, list[Site]]
    num_examples: int
    marks: tuple[str, ...]
    out_tree: Any


@dataclasses.dataclass(frozen=True)
class TraceOptions:
    """What a trace depends on beside the loss and its arguments.

    Attributes:
        has_aux: Whether the loss function returns ``(loss, aux)``.
        num_examples: ``N`` where it cannot be read off.
        sampled: Whether the output must be marked (MC or exact Fisher).
        max_factor_dim: Largest Kronecker factor that is kept in full.
    """

    has_aux: bool
    num_examples: int | None
    sampled: bool
    max_factor_dim: int


def trace(
    loss_fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    options: TraceOptions,
) -> Trace:
    """Traces ``loss_fn(params, *args)`` abstractly and finds its layers.

    Args:
        loss_fn: Returns the mean loss, a scalar, or ``(loss, aux)``.
        params: Parameters, arrays or ``ShapeDtypeStruct``.
        args: Further arguments.
        options: What else matters.

    Returns:
        What was found.

    Raises:
        TypeError: Integer or complex parameters; a loss that is no real scalar.
        ValueError: No parameters; ``N`` unknown, contradictory or zero; a parameter
            inside a ``while`` loop; no marked output where one is needed.
        NameError: The loss uses a mapped axis that is not bound here.
    """
    has_aux = options.has_aux
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    check_params(flat)
    try:
        closed, shape = jax.make_jaxpr(loss_fn, return_shape=True)(params, *args)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise NameError(
            f"{error} The loss uses a mapped axis: call kfac.tag where that axis is "
            "bound, inside the function given to jax.pmap or jax.shard_map "
            "(jax.eval_shape of it suffices)."
        ) from error
    check_loss(shape, has_aux)
    walk, plan = analyse(closed, len(flat))
    if walk.while_leaves:
        check_while(loss_fn, params, args, has_aux, flat, walk.while_leaves)
    n = count_examples(walk, args, options.num_examples)
    place_examples(walk, plan, closed.jaxpr, len(flat), n)
    check_marks(walk, options.sampled)
    check_masks(walk)
    paths = [without_value(path) for path, _ in flat]
    shapes = [tuple(leaf.shape) for _, leaf in flat]
    facts = Facts(paths, shapes, n, leading_axes(args), options.max_factor_dim)
    layers = resolve(walk, facts)
    sites: dict[str, list[Site]] = {}
    for site in walk.sites:
        if site.layer is not None:
            sites.setdefault(site.layer, []).append(site)
    marks = () if walk.nested_marks else tuple(name for name, _, _ in walk.marks)
    out_tree = jax.tree_util.tree_structure(shape)
    return Trace(closed, plan, layers, sites, n, marks, out_tree)


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


def count_examples(walk: Walk, args: tuple[Any, ...], given: int | None) -> int:
    """``N``: rows of the marked output, else given, else the shared leading axis."""
    marked = {
        math.prod(row_shape(shape, name)) * math.prod(loops)
        for name, shape, loops in walk.marks
        if name != MASK
    }
    if given is not None and (
        isinstance(given, bool) or given != int(given) or given < 1
    ):
        raise ValueError(f"num_examples must be a whole number >= 1, got {given!r}.")
    if len(marked) > 1 or (marked and given is not None and marked != {given}):
        raise ValueError(
            f"the marked outputs have {sorted(marked)} rows and num_examples is "
            f"{given}: which is the number of terms that the loss averages over? "
            "Mark one output, or leave num_examples out."
        )
    if marked:
        n = marked.pop()
    elif given is not None:
        n = int(given)
    else:
        n = leading_axis(args)
    if n < 1:
        raise ValueError(f"the batch is empty: the loss averages over {n} terms.")
    return n


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
    """One mask, of the only marked output, outside loops and branches."""
    names = [name for name, _, _ in walk.marks]
    if MASK in names and (walk.nested_marks or len(names) > 2):
        raise ValueError(
            "a mask says how many terms the loss has: mark one output with it, outside "
            f"scan and cond. This loss marks {len(names) - names.count(MASK)}"
            + (", inside a loop or branch." if walk.nested_marks else ".")
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
