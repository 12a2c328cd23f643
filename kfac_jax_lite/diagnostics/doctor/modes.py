"""Is a loss in evaluation mode? What its program, not its numbers, tells.

A network in evaluation mode leaves two traces in the jaxpr of its loss. Batch norm
standardises activations by *stored* averages: an argument is subtracted from what
parameters have made, and the root of another one divides it, before a further layer.
And dropout that is off leaves the PRNG key that came with the batch unread. Neither can
be seen where the network takes no such argument.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from kfac_jax_lite.core.pytree import is_key
from kfac_jax_lite.core.types import Jaxpr, JaxprEqn
from kfac_jax_lite.diagnostics.doctor.findings import NOTICE, WARNING, Finding
from kfac_jax_lite.tagging.sites import inside
from kfac_jax_lite.tagging.trace import Trace, leading_axes

# What leaves an array what it was, up to its shape and one number: a stored variance
# with epsilon added is still a stored variance; a mean over a batch is none.
CARRYING = frozenset(
    "add add_any broadcast_in_dim convert_element_type copy max min reshape slice "
    "squeeze expand_dims transpose stop_gradient sub mul div dynamic_slice "
    "optimization_barrier clamp".split()
)
ROOTS = frozenset(("sqrt", "rsqrt", "pow"))
PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a variable is made of; numbers are places among the loss's inputs.

    Attributes:
        inputs: Everything that it depends on.
        trained: Whether a parameter is among them.
        stored: The one argument that it is, up to its shape and a few numbers.
        root: The argument whose root it holds as a factor.
        centred: The argument that was subtracted from activations.
        scaled: Arguments that have standardised the activations in it, as pairs
            (mean, variance).
    """

    inputs: frozenset[int] = frozenset()
    trained: bool = False
    stored: int | None = None
    root: int | None = None
    centred: int | None = None
    scaled: frozenset[tuple[int, int]] = frozenset()


class Reading:
    """One walk over a jaxpr.

    Attributes:
        standardised: Pairs (mean, variance) of stored arguments that standardise what
            goes into a layer.
    """

    def __init__(self) -> None:
        """Begins with nothing found."""
        self.standardised: set[tuple[int, int]] = set()

    def run(
        self, jaxpr: Jaxpr, origins: Sequence[Origin], constants: Any = None
    ) -> list[Origin]:
        """The origins of a jaxpr's outputs, given those of its inputs."""
        known = {**(constants or {}), **dict(zip(jaxpr.invars, origins, strict=True))}

        def origin(atom: Any) -> Origin:
            return Origin() if isinstance(atom, Literal) else known.get(atom, Origin())

        for eqn in jaxpr.eqns:
            found = self.equation(eqn, [origin(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, found, strict=True))
        return [origin(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, origins: list[Origin]) -> Sequence[Origin]:
        """The origins of an equation's outputs."""
        body: Any = inside(eqn).jaxpr  # of a primitive that is not known: anything
        if isinstance(body, Jaxpr) and len(body.invars) == len(origins):
            found = self.run(body, origins)
            if len(found) == len(eqn.outvars) and eqn.primitive.name != "scan":
                return found
        return [self.combined(eqn.primitive.name, origins)] * len(eqn.outvars)

    def combined(self, name: str, origins: list[Origin]) -> Origin:
        """The origin of what a primitive makes of its operands."""
        union = Origin(
            frozenset().union(*(o.inputs for o in origins)),
            any(o.trained for o in origins),
            scaled=frozenset().union(*(o.scaled for o in origins)),
        )
        some = [o for o in origins if o.inputs]
        if name in PRODUCTS:
            weights = any(o.trained and not o.scaled for o in origins)
            self.standardised |= union.scaled if weights else frozenset()
            return union
        if name in ROOTS and len(some) == 1 and some[0].stored is not None:
            return dataclasses.replace(union, root=some[0].stored)
        if name not in CARRYING:
            return union
        if len(some) == 1:
            return some[0]
        return self.paired(name, union, some) if len(some) == 2 else union

    def paired(self, name: str, union: Origin, some: list[Origin]) -> Origin:
        """An elementwise operation of two arrays, neither of them a number."""
        left, right = some
        if name == "sub" and left.trained and right.stored is not None:
            return dataclasses.replace(union, centred=right.stored)
        if name not in ("mul", "div"):
            return union
        for one, other in ((left, right), (right, left)):
            if one.root is not None and other.centred is not None:
                pair = (other.centred, one.root)
                return dataclasses.replace(union, scaled=union.scaled | {pair})
            if one.root is not None and other.centred is None and not other.scaled:
                return dataclasses.replace(union, root=one.root)  # with the scale
            if one.centred is not None and other.root is None:
                return dataclasses.replace(union, centred=one.centred)
        return union


def evaluation_mode(
    found: Trace, params: Any, batch: Sequence[Any]
) -> Iterator[Finding]:
    """What evaluation mode leaves behind in the program of a loss.

    Yields:
        ``stored_averages``, ``unused_key``.
    """
    num, data = len(jax.tree.leaves(params)), examples(found.num_examples, batch)
    flat, _ = jax.tree_util.tree_flatten_with_path(batch)
    leaves = [leaf for _, leaf in flat]
    values = [*leaves, *found.closed.consts]
    origins = [Origin(frozenset((i,)), trained=True) for i in range(num)]
    for i, value in enumerate(values):
        read = i < len(leaves) and data[i]
        stored = None if read or not is_array(value) else num + i
        origins.append(Origin(frozenset((num + i,)), stored=stored))
    jaxpr, reading = found.closed.jaxpr, Reading()
    middle = num + len(leaves)
    constants = dict(zip(jaxpr.constvars, origins[middle:], strict=True))
    loss = reading.run(jaxpr, origins[:middle], constants)[0]
    names = [f"args{jax.tree_util.keystr(path)}" for path, _ in flat]
    names += ["a constant"] * len(found.closed.consts)
    pairs = sorted((m - num, v - num) for m, v in reading.standardised)
    if pairs:
        yield stored_averages(pairs, values, names)
    for i, leaf in enumerate(leaves):
        if is_key(leaf) and num + i not in loss.inputs:
            yield unused_key(names[i])


def stored_averages(
    pairs: Sequence[tuple[int, int]], values: Sequence[Any], names: Sequence[str]
) -> Finding:
    """The finding of activations that stored averages standardise."""
    first = [values[i] for i in pairs[0]]
    new = not np.any(first[0]) and bool(np.all(np.asarray(first[1]) == 1))
    where = " and ".join(names[i] for i in pairs[0])
    state = ", which are still 0 and 1, as at the start" if new else ""
    return Finding(
        WARNING if new else NOTICE,
        "stored_averages",
        None,
        f"What goes into a layer is standardised by stored averages ({where}{state}), "
        "as batch norm does in evaluation mode: gradients and statistics are not those "
        "of training mode.",
        "Call the network in training mode inside the tagged loss (train=True, "
        "use_running_average=False); nothing, if the averages are frozen on purpose.",
        {"places": len(pairs), "first": where},
    )


def unused_key(name: str) -> Finding:
    """The finding of a PRNG key that the loss does not read."""
    return Finding(
        NOTICE,
        "unused_key",
        None,
        f"The loss takes a PRNG key ({name}) and does not use it: dropout and other "
        "noise are off, as in evaluation mode.",
        "Call the network in training mode inside the tagged loss "
        "(deterministic=False); leave the key out if nothing is random.",
        {"argument": name},
    )


def examples(terms: int, batch: Sequence[Any]) -> list[bool]:
    """Which leaves of a batch have as many rows as there are examples.

    Their number is the longest leading axis that divides the number of loss terms. As
    many channels would look alike: where all arrays of some argument have that many
    rows, only such arguments count.
    """
    sizes = [size for size in leading_axes(tuple(batch)) if size and terms % size == 0]
    size = max(sizes, default=None)
    found = []
    for argument in batch:
        leaves = jax.tree.leaves(argument)
        flags = [not is_key(x) and np.shape(x)[:1] == (size,) for x in leaves]
        wanted = [np.ndim(x) > 0 and not is_key(x) for x in leaves]
        found.append((flags, any(wanted) and flags == wanted))
    whole = any(alike for _, alike in found)
    return [f and (alike or not whole) for flags, alike in found for f in flags]


def is_array(value: Any) -> bool:
    """Whether it can be an average that a network has stored, one for every channel."""
    floating = jnp.issubdtype(getattr(value, "dtype", np.int32), jnp.floating)
    return floating and math.prod(np.shape(value)) > 1
