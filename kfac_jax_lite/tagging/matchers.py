"""The layer rules: which equations are layers, and with what geometry.

Each rule sees one equation and the facts of its operands. It records a ``Site`` where
the equation applies a layer and returns the facts of its outputs.
"""

import dataclasses
import math

from jax.extend.core import JaxprEqn, Literal

from kfac_jax_lite.tagging.analysis import (
    Fact,
    Factor,
    Output,
    Scaled,
    Scope,
    rule,
    shape_of,
)
from kfac_jax_lite.tagging.layers import (
    ConvGeometry,
    DenseGeometry,
    ScaleShiftGeometry,
    Site,
)
from kfac_jax_lite.tagging.structure import axis_step, move_scaled
from kfac_jax_lite.types import Shape, View


def weight_of(fact: Fact) -> tuple[View, tuple] | None:
    """The view of a weight operand and the scalars that multiply it."""
    if isinstance(fact, View):
        return fact, ()
    if isinstance(fact, Scaled) and all(f.shape == () for f in fact.factors):
        return fact.view, tuple(f.atom for f in fact.factors)
    return None


@rule("dot_general")
def dense(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """``dot_general`` of a parameter with anything: contracted, batch, output axes."""
    weights = [weight_of(f) for f in facts]
    if (weights[0] is None) == (weights[1] is None):
        return None
    side = 0 if weights[0] is not None else 1
    view, scales = weights[side]  # type: ignore[misc]
    (contract, batch) = eqn.params["dimension_numbers"]
    w_in, w_batch = tuple(contract[side]), tuple(batch[side])
    x_in, x_batch = tuple(contract[1 - side]), tuple(batch[1 - side])
    x_shape = shape_of(eqn.invars[1 - side])
    w_out = tuple(i for i in range(len(view.shape)) if i not in w_in + w_batch)
    x_rows = tuple(i for i in range(len(x_shape)) if i not in x_in + x_batch)
    blocks = tuple(view.shape[i] for i in w_batch)
    n_in = math.prod(view.shape[i] for i in w_in)
    n_out = math.prod(view.shape[i] for i in w_out)
    weight = view.transpose(w_batch + w_in + w_out).reshape(blocks + (n_in, n_out))
    if weight is None:
        return None
    weight = weight.settle()
    if weight is None:
        return None
    # Axes of the result: batch, then the left operand's free axes, then the right's.
    b, r, o = len(w_batch), len(x_rows), len(w_out)
    first_row, first_out = (b + o, b) if side == 0 else (b, b + r)
    rows = tuple(range(first_row, first_row + r))
    outs = tuple(range(first_out, first_out + o))
    geometry = DenseGeometry(
        input_order=x_batch + x_rows + x_in,
        output_order=tuple(range(b)) + rows + outs,
        blocks=blocks,
        rows=tuple(x_shape[i] for i in x_rows),
        n_in=n_in,
        n_out=n_out,
    )
    site = Site(
        "dense",
        {"weight": weight},
        (eqn.invars[1 - side], *scales),
        geometry,
    )
    scope.add_site(index, site)
    labels: list[int | None] = [None] * (b + r + o)
    for label, axis in enumerate(tuple(range(b)) + outs):
        labels[axis] = label
    return [Output(site, tuple(labels))]


@rule("conv_general_dilated")
def conv(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A convolution with a parameter as kernel, in any layout."""
    found = weight_of(facts[1])
    p = eqn.params
    if found is None or facts[0] is not None and weight_of(facts[0]) is not None:
        return None
    if p["batch_group_count"] != 1:
        return None
    view, scales = found
    dims = p["dimension_numbers"]
    groups = p["feature_group_count"]
    out_axis, in_axis, *space = dims.rhs_spec
    kernel = tuple(view.shape[i] for i in space)
    n_in = math.prod(kernel) * view.shape[in_axis]
    n_out = view.shape[out_axis] // groups
    weight = view.transpose((*space, in_axis, out_axis)).reshape((n_in, groups, n_out))
    weight = weight and weight.settle()
    if weight is None:
        return None
    weight = weight.transpose((1, 0, 2)) if groups > 1 else weight
    blocks = (groups,) if groups > 1 else ()
    weight = weight.reshape(blocks + (n_in, n_out))
    weight = weight and weight.settle()
    if weight is None:
        return None
    out_shape = shape_of(eqn.outvars[0])
    batch_axis, feature_axis, *out_space = dims.out_spec
    geometry = ConvGeometry(
        lhs_spec=tuple(dims.lhs_spec),
        out_spec=tuple(dims.out_spec),
        kernel=kernel,
        window_strides=tuple(p["window_strides"]),
        padding=tuple((int(a), int(b)) for a, b in p["padding"]),
        lhs_dilation=tuple(p["lhs_dilation"]),
        rhs_dilation=tuple(p["rhs_dilation"]),
        groups=groups,
        rows=tuple(out_shape[i] for i in (batch_axis, *out_space)),
        n_in=n_in,
        n_out=n_out,
    )
    site = Site("conv", {"weight": weight}, (eqn.invars[0], *scales), geometry)
    scope.add_site(index, site)
    labels = tuple(0 if i == feature_axis else None for i in range(len(out_shape)))
    return [Output(site, labels)]


@rule("mul")
def scale(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Elementwise product with a parameter: collects factors, then emits a site."""
    owned = [isinstance(f, (View, Scaled)) for f in facts]
    if all(owned):
        return None
    if not any(owned):
        return [None]
    side = owned.index(True)
    fact, other = facts[side], eqn.invars[1 - side]
    if isinstance(fact, View):
        fact = Scaled(fact, ())
    shape = shape_of(eqn.outvars[0])
    view = dataclasses.replace(fact.view, shape=shape)  # type: ignore[union-attr]
    if len(view.axes) != len(shape):
        return None
    own = shape_of(other)
    factor = Factor(other, () if math.prod(own) == 1 else own)
    if factor.shape == () and own:
        factor = dataclasses.replace(factor, steps=(("reshape", ()),))
    result = Scaled(view, (*fact.factors, factor))  # type: ignore[union-attr]
    if more_factors_follow(scope, eqn.outvars[0], result):
        return [result]
    if result.constant:
        return [result]
    atoms = [f.atom for f in result.factors]
    if scope.dependencies(atoms) & scope.walk.data_bit:
        return [emit(scope, index, {"scale": view}, result.factors, shape)]
    scope.mark_used([view], "mul")
    return [result]


def more_factors_follow(scope: Scope, var, fact: Scaled) -> bool:
    """Whether the product's only reader multiplies it by more data."""
    if not scope.used_once(var) or scope.consumers[var][0] < 0:
        return False
    eqn = scope.jaxpr.eqns[scope.consumers[var][0]]
    name = eqn.primitive.name
    if name == "mul":
        other = eqn.invars[1] if eqn.invars[0] is var else eqn.invars[0]
        known = not isinstance(other, Literal) and scope.facts.get(other) is not None
        return not known and not isinstance(other, Literal)
    if name == "convert_element_type":
        return more_factors_follow(scope, eqn.outvars[0], fact)
    if name in ("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims"):
        moved = move_scaled(fact, axis_step(eqn))
        return moved is not None and more_factors_follow(scope, eqn.outvars[0], moved)
    return False


def emit(
    scope: Scope,
    index: int,
    views: dict[str, View],
    factors: tuple[Factor, ...],
    shape: Shape,
) -> Output | None:
    """Records a scale or shift site: units are the view's axes, the rest are rows."""
    (role, view), *_ = views.items()
    labelled = [i for i, a in enumerate(view.axes) if a is not None]
    labelled.sort(key=lambda i: view.axes[i])  # type: ignore[arg-type,return-value]
    core = flat_units(view)
    if core is None or view.stack:
        scope.mark_used([view], "mul" if role == "scale" else "add")
        return None
    rest = [i for i in range(len(shape)) if i not in labelled]
    geometry = ScaleShiftGeometry(
        order=tuple(rest + labelled),
        rows=tuple(shape[i] for i in rest),
        units=math.prod(view.core),
        factor_ops=tuple(f.steps for f in factors),
    )
    inputs = tuple(f.atom for f in factors)
    site = Site("scale_shift", {role: core}, inputs, geometry)
    scope.add_site(index, site)
    labels: list[int | None] = [None] * len(shape)
    for label, axis in enumerate(labelled):
        labels[axis] = label
    return Output(site, tuple(labels)) if role == "scale" else None


def flat_units(view: View) -> View | None:
    """The view as ``[units]`` in the order of its core; None if entries are lost."""
    sizes = [view.core[a] for a in view.axes if a is not None]
    units = (math.prod(view.core),)
    if math.prod(sizes) != units[0]:
        return None
    ops = view.ops if view.core == units else (*view.ops, ("reshape", units))
    return View(view.leaf, units, (0,) if units[0] > 1 else (None,), units, ops)


@rule("add", "add_any")
def shift(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A bias behind a layer joins its block; any other added parameter is a shift."""
    views = [isinstance(f, View) for f in facts]
    if all(views):
        return None
    if not any(views):
        return [None]
    side = views.index(True)
    view, other = facts[side], facts[1 - side]
    shape = shape_of(eqn.outvars[0])
    if len(view.axes) != len(shape):  # type: ignore[union-attr]
        return None
    if isinstance(other, Output) and scope.used_once(eqn.invars[1 - side]):
        bias = aligned(view, other, shape)  # type: ignore[arg-type]
        role = "shift" if other.site.kind == "scale_shift" else "bias"
        same_size = shape_of(eqn.invars[1 - side]) == shape
        if bias is not None and same_size and role not in other.site.views:
            other.site.views[role] = bias
            return [other]
    data = scope.dependencies([eqn.invars[1 - side]]) & scope.walk.data_bit
    if not data:
        return None
    view = dataclasses.replace(view, shape=shape)  # type: ignore[type-var]
    return [emit(scope, index, {"shift": view}, (), shape)]


def aligned(view: View, output: Output, shape: Shape) -> View | None:
    """The bias as ``[*blocks, 1, out]`` (or ``[units]``) if its axes are the outputs'.

    Every output axis must carry the bias and no row axis may.

    Returns:
        The bias's view, or None where it is not one.
    """
    site = output.site
    pairs = [
        (label, axis)
        for label, axis, size in zip(output.labels, view.axes, shape, strict=True)
        if size > 1
    ]
    if any((label is None) != (axis is None) for label, axis in pairs):
        return None
    if view.stack != site.primary.stack:
        return None
    order = [
        axis for label, axis in sorted((lb, a) for lb, a in pairs if a is not None)
    ]
    sizes = tuple(view.core[a] for a in order)
    geometry = site.geometry
    if isinstance(geometry, ScaleShiftGeometry):
        target: Shape = (geometry.units,)
    else:
        target = geometry.blocks + (1, geometry.n_out)
    if not math.prod(sizes) == math.prod(view.core) == math.prod(target):
        return None
    axes: tuple[int | None, ...] = tuple(order)
    plain = View(view.leaf, view.core, axes, sizes, view.ops, view.stack).settle()
    moved = plain and plain.reshape(target)
    return moved and moved.settle()
