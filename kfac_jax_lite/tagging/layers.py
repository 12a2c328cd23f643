"""Where the layers sit in a jaxpr, and the geometry each rule needs.

``Site``: one application of a layer. ``Plan``: the sites and marks of one jaxpr and of
the jaxprs inside it, by equation number; the interpreter follows it.
"""

import dataclasses
import math
from typing import Any

from kfac_jax_lite.types import Shape, View


@dataclasses.dataclass(frozen=True)
class DenseGeometry:
    """Axis orders that bring a ``dot_general`` to ``[*blocks, *rows, in|out]``."""

    input_order: Shape
    output_order: Shape
    blocks: Shape
    rows: Shape
    n_in: int
    n_out: int


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """Parameters of a ``conv_general_dilated`` (orders as in its dimension numbers)."""

    lhs_spec: Shape
    out_spec: Shape
    kernel: Shape
    window_strides: Shape
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: Shape
    rhs_dilation: Shape
    groups: int
    rows: Shape
    n_in: int
    n_out: int

    @property
    def blocks(self) -> Shape:
        """Leading axis of the factors: one block per feature group."""
        return (self.groups,) if self.groups > 1 else ()


@dataclasses.dataclass(frozen=True)
class ScaleShiftGeometry:
    """Axis order that brings ``x̂`` to ``[*rows, units]``; shape steps per factor."""

    order: Shape
    rows: Shape
    units: int
    factor_ops: tuple[tuple[tuple[str, Any], ...], ...]

    @property
    def blocks(self) -> Shape:
        """Unit-wise blocks have no leading axis of their own."""
        return ()


Geometry = DenseGeometry | ConvGeometry | ScaleShiftGeometry


@dataclasses.dataclass(eq=False)
class Site:
    """One application of a layer: tapped behind one output of one equation.

    Attributes:
        kind: The layer kind.
        views: Role to view, ``weight``/``bias`` or ``scale``/``shift``.
        inputs: Jaxpr atoms the statistics need; for dense and conv the first is the
            layer's input, the others scalars that multiply the weight.
        geometry: Static shape facts.
        output: Number of the equation's output that is tapped.
        repeat: How often enclosing loops apply the site to the same parameters.
        branch: ``(cond, branch)`` it stands in, or None.
        layer: Name of the layer, set when the walk is resolved; None: not tapped.
    """

    kind: str
    views: dict[str, View]
    inputs: tuple[Any, ...]
    geometry: Geometry
    output: int = 0
    repeat: int = 1
    branch: tuple[int, int] | None = None
    layer: str | None = None

    @property
    def primary(self) -> View:
        """The view that identifies the layer: its weight, else its scale or shift."""
        for role in ("weight", "scale", "shift"):
            if role in self.views:
                return self.views[role]
        raise KeyError("a site owns at least one parameter")


@dataclasses.dataclass(eq=False)
class Plan:
    """What to do at which equation of one jaxpr.

    Attributes:
        sites: Equation number to the sites behind it.
        marks: Equation number to the likelihood marked there.
        children: Equation number to the plans of the jaxprs inside it.
        unstacked: Equation number of a ``scan`` to the leaves it consumes by slices.
    """

    sites: dict[int, list[Site]] = dataclasses.field(default_factory=dict)
    marks: dict[int, str] = dataclasses.field(default_factory=dict)
    children: dict[int, tuple["Plan", ...]] = dataclasses.field(default_factory=dict)
    unstacked: dict[int, frozenset[int]] = dataclasses.field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether anything in here, at any depth, needs the interpreter."""
        return (
            bool(self.marks)
            or any(s.layer is not None for ss in self.sites.values() for s in ss)
            or any(p.active for ps in self.children.values() for p in ps)
        )

    def all_sites(self) -> list[Site]:
        """Every tapped site, at any depth."""
        own = [s for ss in self.sites.values() for s in ss if s.layer is not None]
        inner = [s for ps in self.children.values() for p in ps for s in p.all_sites()]
        return own + inner


def positions_per_example(rows: Shape, num_examples: int) -> int | None:
    """How many rows belong to one example, when rows are example-major.

    The examples are found as the leading axes whose product is ``num_examples``, or as
    a leading axis that flattens examples and positions.

    Returns:
        ``R / N`` with rows reshapable to ``[N, R / N]``, or None when they are not.
    """
    product = 1
    for size in rows:
        product *= size
        if product == num_examples or (size == product and size % num_examples == 0):
            return math.prod(rows) // num_examples
        if product > num_examples:
            break
    return None
