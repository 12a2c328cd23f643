"""Where the layers sit in a jaxpr, and the geometry each rule needs.

``Site``: one application of a layer. ``Plan``: the sites and marks of one jaxpr and of
the jaxprs inside it, by equation number; the interpreter follows it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from kfac_jax_lite.core.parameter_views import View
from kfac_jax_lite.core.types import Array, Jaxpr, JaxprEqn, Shape

Steps = tuple[tuple[str, Any], ...]
# ``(cond, branch)`` of every conditional around an equation, outermost first.
Branch = tuple[tuple[int, int], ...]
# Primitives that run a program once: as it is, recomputed in the backward pass, or with
# a derivative of its own. And the parameters that hold it, or that of a loop.
CALLS = ("jit", "pjit", "closed_call", "core_call")
CHECKPOINTS = ("remat2", "checkpoint")
CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
HELD = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Name of the call by which ``byhand.tag_as`` marks a layer.
BY_HAND = "kfac_jax_lite_layer"


@dataclasses.dataclass(frozen=True)
class Scale:
    """A variable that multiplies the weight of a dense or convolutional layer.

    Attributes:
        side: ``"all"`` (a scalar), ``"in"``, ``"out"`` or ``"both"``: the axes along
            which it varies.
        steps: What brings it to ``[]``, ``[*blocks, in]``, ``[*blocks, out]`` or
            ``[*blocks, in, out]``.
    """

    side: str
    steps: Steps = ()


@dataclasses.dataclass(frozen=True)
class DenseGeometry:
    """Axis orders that bring a ``dot_general`` to ``[*blocks, *rows, in|out]``.

    ``span`` is the part of the flattened output axes that belongs to this weight, where
    several stand side by side. With ``shared`` all blocks have the same input, which
    lacks their axes.
    """

    input_order: Shape
    output_order: Shape
    blocks: Shape
    rows: Shape
    n_in: int
    n_out: int
    scales: tuple[Scale, ...] = ()
    span: tuple[int, int] | None = None
    shared: bool = False


@dataclasses.dataclass(frozen=True)
class RaggedGeometry(DenseGeometry):
    """A ``ragged_dot``: each row meets the block of its own group.

    Neither the input nor the output has an axis of blocks. The first axis of the rows
    is sorted by group; how many there are of each is the last of the site's inputs.
    """

    @property
    def num_rows(self) -> int:
        """Rows of all groups."""
        return math.prod(self.rows)


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
    scales: tuple[Scale, ...] = ()

    @property
    def blocks(self) -> Shape:
        """Leading axis of the factors: one block per feature group."""
        return (self.groups,) if self.groups > 1 else ()


@dataclasses.dataclass(frozen=True)
class EmbeddingGeometry:
    """A ``gather`` of table rows: ``[*blocks, *rows]`` indices, ``out`` entries each.

    Attributes:
        index_order: Brings the indices to ``[*blocks, *rows, coordinates]``.
        output_order: Brings the result to ``[*blocks, *rows, out]``.
        unit_rows: ``rows`` with 1 where the result was broadcast before the tap.
        coordinates: ``(coordinate, size)`` of the table axes that are indexed.
        clip: Whether indices out of range are clipped (else they select nothing).
        scales: As for dense layers, scalars only.
    """

    index_order: Shape
    output_order: Shape
    blocks: Shape
    rows: Shape
    n_in: int
    n_out: int
    coordinates: tuple[tuple[int, int], ...]
    clip: bool
    unit_rows: Shape
    scales: tuple[Scale, ...] = ()


@dataclasses.dataclass(frozen=True)
class ScaleShiftGeometry:
    """Axis order that brings ``x̂`` to ``[*rows, units]``; shape steps per factor."""

    order: Shape
    rows: Shape
    units: int
    factor_ops: tuple[Steps, ...]

    @property
    def blocks(self) -> Shape:
        """Unit-wise blocks have no leading axis of their own."""
        return ()


Geometry = DenseGeometry | ConvGeometry | EmbeddingGeometry | ScaleShiftGeometry


@dataclasses.dataclass(eq=False)
class Site:
    """One application of a layer: tapped behind one output of one equation.

    Attributes:
        kind: The layer kind.
        views: Role to view, ``weight``/``bias`` or ``scale``/``shift``.
        inputs: Jaxpr atoms the statistics need; the first is the layer's input (for
            scale_shift there is none), the others multiply the weight.
        geometry: Static shape facts.
        output: Number of the equation's output that is tapped.
        repeat: How often enclosing loops apply the site to the same parameters.
        branch: The branches of ``cond`` it stands in.
        layer: Name of the layer, set when the walk is resolved; None: not tapped.
        reverse: Whether the weight is used in the direction opposite to its layer's.
        place: The plan and the number of the equation it stands behind.
        by_hand: Whether the user named it, whatever else uses its parameters.
        positions: How many rows in a row are one example's; None: they are not side by
            side, or it cannot be told.
        marks: Numbers of the marked outputs that depend on it, where there are several.
        unmarked: Whether no marked output depends on it, where they are sampled.
        slot: Under which name its statistics are added up: the layer's, or one of
            their own for the sites that other outputs depend on.
        spread: Over how many examples it is broadcast, in front of all other axes of
            input and output; 0: it has their axis.
        places: Whether its rows are places that examples are sent to, some of them
            empty.
        devices: How many devices run it, each on rows of its own (``shard_map``).
        copies: How many devices run it on the same rows, each with a part of the
            cotangent (``shard_map`` that does not check what varies).
        axes: Mesh axes along which its rows differ, where types say so.
    """

    kind: str
    views: dict[str, View]
    inputs: tuple[Any, ...]
    geometry: Geometry
    output: int = 0
    repeat: int = 1
    branch: Branch = ()
    layer: str | None = None
    reverse: bool = False
    place: tuple["Plan", int] | None = None
    by_hand: bool = False
    positions: int | None = None
    marks: frozenset[int] = frozenset()
    unmarked: bool = False
    slot: str = ""
    spread: int = 0

    @property
    def complex(self) -> bool:
        """Whether its input is complex: every row is two, real and imaginary part."""
        scales = getattr(self.geometry, "scales", ())
        inputs = [a for a, s in zip(self.inputs[1:], scales) if s.side != "out"]  # noqa: B905
        kinds = [getattr(a, "aval", None) for a in (*self.inputs[:1], *inputs)]
        return any(jnp.issubdtype(k.dtype, jnp.complexfloating) for k in kinds if k)

    places: bool = False
    devices: int = 1
    copies: int = 1
    axes: frozenset[Any] = frozenset()

    @property
    def primary(self) -> View:
        """The view that identifies the layer: its weight, else what there is."""
        for role in ("weight", "scale", "shift", "bias"):
            if role in self.views:
                return self.views[role]
        raise KeyError("a site owns at least one parameter")

    @property
    def examples(self) -> int:
        """How many examples its rows belong to."""
        return math.prod(self.geometry.rows) // (self.positions or 1)


@dataclasses.dataclass(frozen=True)
class Ref:
    """A variable of another jaxpr than the one that reads it."""

    plan: "Plan"
    atom: Any

    @property
    def aval(self) -> Any:
        """Its abstract value."""
        return self.atom.aval


class Step(NamedTuple):
    """What becomes of copies, one for every example, at an equation (see ``spread``).

    Attributes:
        name: ``"map"``, ``"broadcast"``, ``"elementwise"``, ``"product"`` or
            ``"call"``.
        axis: The result's axis of examples.
    """

    name: str
    axis: int


@dataclasses.dataclass(frozen=True)
class Derived:
    """What a function makes of variables of a jaxpr; no derivative goes through it."""

    function: Callable[..., Any]
    atoms: tuple[Any, ...]


def seen_from(plan: "Plan", atom: Any) -> Any:
    """An atom of the jaxpr of ``plan`` as other jaxprs read it."""
    if isinstance(atom, Derived):
        atoms = tuple(seen_from(plan, a) for a in atom.atoms)
        return dataclasses.replace(atom, atoms=atoms)
    return atom if isinstance(atom, Literal | Ref) else Ref(plan, atom)


def moved(steps: Steps, value: Array) -> Array:
    """A variable after the steps of a ``Factor`` or ``Scale``."""
    for name, argument in steps:
        if name == "broadcast":
            value = jnp.broadcast_to(value, argument)
        elif name == "reciprocal":
            value = 1 / value
        else:
            move = lax.transpose if name == "transpose" else lax.reshape
            value = move(value, argument)
    return value


@dataclasses.dataclass(eq=False)
class Plan:
    """What to do at which equation of one jaxpr.

    Attributes:
        sites: Equation number to the sites behind it.
        marks: Equation number to the likelihood marked there.
        children: Equation number to the plans of the jaxprs inside it.
        unstacked: Equation number of a ``scan`` to the leaves it consumes by slices.
        exports: Whether a ``Ref`` from outside reads one of its variables.
        steps: Equation number to what becomes of copies there.
        devices: Elementary indices that number the devices of a ``shard_map`` around.
    """

    sites: dict[int, list[Site]] = dataclasses.field(default_factory=dict)
    marks: dict[int, str] = dataclasses.field(default_factory=dict)
    children: dict[int, tuple["Plan", ...]] = dataclasses.field(default_factory=dict)
    unstacked: dict[int, frozenset[int]] = dataclasses.field(default_factory=dict)
    exports: bool = False
    steps: dict[int, Step] = dataclasses.field(default_factory=dict)
    devices: tuple[Any, ...] = ()

    @property
    def active(self) -> bool:
        """Whether anything in here, at any depth, needs the interpreter."""
        return (
            bool(self.marks or self.steps)
            or self.exports
            or any(s.layer is not None for ss in self.sites.values() for s in ss)
            or any(p.active for ps in self.children.values() for p in ps)
        )

    def all_sites(self) -> list[Site]:
        """Every tapped site, at any depth."""
        own = [s for ss in self.sites.values() for s in ss if s.layer is not None]
        inner = [s for ps in self.children.values() for p in ps for s in p.all_sites()]
        return own + inner


class Inside(NamedTuple):
    """The program inside an equation.

    Attributes:
        jaxpr: Its jaxpr; None if the equation has none.
        consts: Values of that one's constants.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]


def inside(eqn: JaxprEqn) -> Inside:
    """The program that a call, a loop or a function with its own derivative runs."""
    held: Any = next((eqn.params[k] for k in HELD if k in eqn.params), None)
    return Inside(getattr(held, "jaxpr", held), getattr(held, "consts", ()))


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a ``scan`` are constants, and how many are carried.

    Told by ranks: what is scanned over or stacked up has an axis less inside. (JAX 0.12
    no longer writes the numbers into the equation as JAX 0.10 does.)
    """
    body = inside(eqn).jaxpr

    def kept(outside: Any, inside: Any) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

    carried = kept(eqn.outvars, body.outvars)
    return kept(eqn.invars, body.invars) - carried, carried


def manual_axes(eqn: JaxprEqn) -> frozenset[Any]:
    """The mesh axes along which a ``shard_map`` runs a program of its own."""
    names = ("newly_manual_axes", "manual_axes")
    return frozenset(next(eqn.params[name] for name in names if name in eqn.params))


def spec_axes(spec: Any) -> tuple[Any, ...]:
    """The mesh axes that a partition specification names."""
    found: list[Any] = []
    for entry in spec:
        found += entry if isinstance(entry, tuple) else [] if entry is None else [entry]
    return tuple(found)
