"""Dense layers and convolutions: which equations are, and with what geometry.

Each rule sees one equation and the facts of its operands. It records a ``Site`` where
the equation applies a layer and returns the facts of its outputs.
"""

import dataclasses
import math
from typing import Any

from kfac_jax_lite.core.parameter_views import Shape, View
from kfac_jax_lite.core.types import JaxprEqn
from kfac_jax_lite.tagging.analysis import (
    Beside,
    Counting,
    Fact,
    Factor,
    Output,
    Scaled,
    Scope,
    rule,
    shape_of,
)
from kfac_jax_lite.tagging.sites import (
    ConvGeometry,
    DenseGeometry,
    RaggedGeometry,
    Scale,
    Site,
)


def weight_of(fact: Fact) -> tuple[View, tuple[Factor, ...]]:
    """The view of a weight operand and the variables that multiply it."""
    if isinstance(fact, Scaled):
        return fact.view, fact.factors
    assert isinstance(fact, View)
    return fact, ()


def scales_of(
    factors: tuple[Factor, ...], batch: Shape, ins: Shape, outs: Shape, shape: Shape
) -> tuple[Scale, ...]:
    """How variables that multiply a weight act on rows and cotangents."""
    scales = []
    for factor in factors:
        varying = {i for i, d in enumerate(factor.shape) if d > 1}
        if not varying:
            scales.append(Scale("all", (*factor.steps, ("reshape", ()))))
            continue
        on_in, on_out = varying & set(ins), varying & set(outs)
        if on_in and on_out:
            full = tuple(shape[i] for i in batch + ins + outs)
            blocks, d = full[: len(batch)], math.prod(shape[i] for i in ins)
            own = tuple(factor.shape[i] for i in batch + ins + outs)
            steps = (
                ("transpose", batch + ins + outs),
                ("reshape", own),
                ("broadcast", full),
                ("reshape", (*blocks, d, math.prod(full[len(batch) :]) // max(d, 1))),
            )
            scales.append(Scale("both", factor.steps + steps))
            continue
        side, axes = ("in", ins) if on_in else ("out", outs)
        others = tuple(i for i in range(len(shape)) if i not in batch + axes)
        kept = tuple(factor.shape[i] for i in batch + axes)
        full = tuple(shape[i] for i in batch + axes)
        blocks = full[: len(batch)]
        steps = (
            ("transpose", batch + axes + others),
            ("reshape", kept),
            ("broadcast", full),
            ("reshape", blocks + (math.prod(full[len(batch) :]),)),
        )
        scales.append(Scale(side, factor.steps + steps))
    return tuple(scales)


@rule("dot_general")
def dense(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """``dot_general`` of a parameter with anything: contracted, batch, output axes."""
    owned = [isinstance(f, View | Scaled | Beside) for f in facts]
    if all(owned) or not any(owned):
        return None
    side = owned.index(True)
    fact: Any = facts[side]
    (contract, batch) = eqn.params["dimension_numbers"]
    same = repeated_axes(fact, batch[side])
    if same and (fact := once(fact, [batch[side][k] for k in same])) is None:
        return None
    own = [k for k in range(len(batch[side])) if k not in same]
    axes = tuple(contract[side]), tuple(batch[side][k] for k in own)
    x_in, x_batch = tuple(contract[1 - side]), tuple(batch[1 - side][k] for k in own)
    x_same = tuple(batch[1 - side][k] for k in same)
    x = eqn.invars[1 - side]
    x_shape = shape_of(x)
    x_rows = tuple(i for i in range(len(x_shape)) if i not in x_in + batch[1 - side])
    one_hot = is_one_hot(facts[1 - side], x_in)
    # Axes of the result: batch, then the left operand's free axes, then the right's.
    b, r = len(batch[side]), len(x_rows)
    o = len(shape_of(eqn.invars[side])) - b - len(x_in)
    first_row, first_out = (b + o, b) if side == 0 else (b, b + r)
    rows = (*same, *range(first_row, first_row + r))
    outs = tuple(range(first_out, first_out + o))
    pieces = fact.views if isinstance(fact, Beside) else (fact,)
    if isinstance(fact, Beside) and (o != 1 or fact.axis in axes[0] + axes[1]):
        return None
    lead = leading_block(pieces[0], *axes) if len(pieces) == 1 and not b else None
    outs_in_order = outs
    if lead is not None:
        first = [i for i in range(o + len(x_in)) if i not in axes[0]].index(lead)
        outs_in_order = (outs[first], *outs[:first], *outs[first + 1 :])
        axes = (axes[0], (lead,))
    blocks_first = outs_in_order[:1] if lead is not None else tuple(own)
    sites, start = [], 0
    for piece in pieces:
        found = matrix_of(piece, *axes)
        if found is None:
            return None
        weight, scales, factors = found
        blocks, (n_in, n_out) = weight.core[:-2], weight.core[-2:]
        geometry = DenseGeometry(
            input_order=x_batch + x_same + x_rows + x_in,
            output_order=blocks_first + rows + outs_in_order[lead is not None :],
            blocks=blocks,
            rows=tuple(x_shape[i] for i in x_same + x_rows),
            n_in=n_in,
            n_out=n_out,
            scales=scales,
            span=(start, start + n_out) if len(pieces) > 1 else None,
            shared=lead is not None,
        )
        start += n_out
        kind = "embedding" if one_hot else "dense"
        inputs = (x, *(f.atom for f in factors))
        sites.append(Site(kind, {"weight": weight}, inputs, geometry))
    for site in sites:
        scope.add_site(index, site)
    labels: list[int | None] = [None] * (b + r + o)
    for label, axis in enumerate(tuple(own) + outs_in_order):
        labels[axis] = label
    return [Output(sites[0], tuple(labels), tuple(sites[1:]))]


@rule("ragged_dot_general")
def ragged(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Rows sorted by group times a parameter with a matrix for every group."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_in, w_in), (x_batch, _) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    x, _, sizes, *_ = eqn.invars
    owned = [isinstance(f, View | Scaled) for f in facts]
    if owned != [False, True, *owned[2:]] or any(owned[2:]):
        return None
    if len(groups) != 1 or x_batch or eqn.params["group_offset"] is not None:
        return None
    found = matrix_of(facts[1], tuple(w_in), groups)
    if found is None:
        return None
    weight, scales, factors = found
    blocks, (n_in, n_out) = weight.core[:-2], weight.core[-2:]
    # Axes of the result: the free ones of the rows, then those of the weight.
    (first,) = map(int, numbers.lhs_ragged_dimensions)
    x_shape, rank = shape_of(x), len(shape_of(eqn.outvars[0]))
    free = [i for i in range(len(x_shape)) if i not in x_in]
    rows = [first, *(i for i in free if i != first)]
    outs = range(len(free), rank)
    geometry = RaggedGeometry(
        input_order=(*rows, *map(int, x_in)),
        output_order=(*(free.index(i) for i in rows), *outs),
        blocks=blocks,
        rows=tuple(x_shape[i] for i in rows),
        n_in=n_in,
        n_out=n_out,
        scales=scales,
    )
    inputs = (x, *(f.atom for f in factors), sizes)
    site = Site("dense", {"weight": weight}, inputs, geometry)
    scope.add_site(index, site)
    labels: list[int | None] = [None] * rank
    for label, axis in enumerate(outs):
        labels[axis] = label
    return [Output(site, tuple(labels))]


def repeated_axes(fact: Fact, batch: Shape) -> tuple[int, ...]:
    """Which batch axes of a product only repeat its parameter: they are rows."""
    view = fact.view if isinstance(fact, Scaled) else fact
    if not isinstance(view, View):
        return ()
    pairs = [(k, view.axes[i], view.shape[i]) for k, i in enumerate(batch)]
    return tuple(k for k, axis, size in pairs if axis is None and size > 1)


def once(fact: View | Scaled, axes: list[int]) -> View | Scaled | None:
    """A parameter that is repeated along some axes, without the repetition."""
    if isinstance(fact, Scaled):
        factors = [f for f in fact.factors if f.shape]
        if any(f.shape[axis] > 1 for f in factors for axis in axes):
            return None
        view = once(fact.view, axes)
        return dataclasses.replace(fact, view=view)
    shape = tuple(1 if i in axes else size for i, size in enumerate(fact.shape))
    return dataclasses.replace(fact, shape=shape)


def leading_block(fact: Fact, contracted: Shape, batch: Shape) -> int | None:
    """The axis that numbers experts, members or heads that share one input.

    A weight ``[experts, in, out]`` (or ``[experts, out, in]``) is one matrix for every
    index of its first axis; ``[in, heads, width]`` is one matrix.
    """
    view, _ = weight_of(fact)
    outs = [i for i in range(len(view.shape)) if i not in contracted + batch]
    wide = [i for i in outs if view.shape[i] > 1]
    first = [i for i in wide if view.axes[i] == 0]
    return first[0] if len(wide) > 1 and first else None


def matrix_of(
    fact: Fact, contracted: Shape, batch: Shape
) -> tuple[View, tuple[Scale, ...], tuple[Factor, ...]] | None:
    """A weight operand as ``[*blocks, in, out]``, with what multiplies it."""
    view, factors = weight_of(fact)
    outs = tuple(i for i in range(len(view.shape)) if i not in contracted + batch)
    blocks = tuple(view.shape[i] for i in batch)
    n_in = math.prod(view.shape[i] for i in contracted)
    n_out = math.prod(view.shape[i] for i in outs)
    weight = view.transpose(batch + contracted + outs).reshape(blocks + (n_in, n_out))
    weight = weight and weight.settle()
    scales = scales_of(factors, batch, contracted, outs, view.shape)
    return None if weight is None else (weight, scales, factors)


def is_one_hot(fact: Fact, contracted: Shape) -> bool:
    """Whether the contracted axis of an input is that of one-hot vectors."""
    if not isinstance(fact, Counting) or not fact.one_hot:
        return False
    return [i for i, label in enumerate(fact.labels) if label] == list(contracted)


@rule("conv_general_dilated")
def conv(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A convolution with a parameter as kernel, in any layout."""
    p, (image, kernel) = eqn.params, facts
    if not isinstance(kernel, View | Scaled) or isinstance(image, View | Scaled):
        return None
    if p["batch_group_count"] != 1:
        return None
    view, factors = weight_of(kernel)
    dims = p["dimension_numbers"]
    groups = p["feature_group_count"]
    out_axis, in_axis, *space = dims.rhs_spec
    sizes = tuple(view.shape[i] for i in space)
    n_in = math.prod(sizes) * view.shape[in_axis]
    n_out = view.shape[out_axis] // groups
    weight = view.transpose((*space, in_axis, out_axis)).reshape((n_in, groups, n_out))
    weight = weight and weight.settle()
    if weight is None:
        return None
    weight = weight.transpose((1, 0, 2)) if groups > 1 else weight
    blocks = (groups,) if groups > 1 else ()
    weight = weight.reshape(blocks + (n_in, n_out))
    weight = weight and weight.settle()
    scales = scales_of(factors, (), (*space, in_axis), (out_axis,), view.shape)
    if weight is None:
        return None
    scales = tuple(by_group(scale, groups, n_out) for scale in scales)
    out_shape = shape_of(eqn.outvars[0])
    batch_axis, feature_axis, *out_space = dims.out_spec
    geometry = ConvGeometry(
        lhs_spec=tuple(dims.lhs_spec),
        out_spec=tuple(dims.out_spec),
        kernel=sizes,
        window_strides=tuple(p["window_strides"]),
        padding=tuple((int(a), int(b)) for a, b in p["padding"]),
        lhs_dilation=tuple(p["lhs_dilation"]),
        rhs_dilation=tuple(p["rhs_dilation"]),
        groups=groups,
        rows=tuple(out_shape[i] for i in (batch_axis, *out_space)),
        n_in=n_in,
        n_out=n_out,
        scales=scales,
    )
    inputs = (eqn.invars[0], *(f.atom for f in factors))
    site = Site("conv", {"weight": weight}, inputs, geometry)
    scope.add_site(index, site)
    labels = tuple(0 if i == feature_axis else None for i in range(len(out_shape)))
    return [Output(site, labels)]


def by_group(scale: Scale, groups: int, n_out: int) -> Scale:
    """A scale of all output channels by group."""
    if groups == 1 or scale.side not in ("out", "both"):
        return scale
    if scale.side == "out":
        return Scale("out", (*scale.steps, ("reshape", (groups, n_out))))
    n_in = scale.steps[-1][1][0]
    steps = (("reshape", (n_in, groups, n_out)), ("transpose", (1, 0, 2)))
    return Scale("both", (*scale.steps, *steps))
