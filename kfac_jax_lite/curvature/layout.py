"""Where every block of parameters sits in the ravelled vector.

A block is an array of positions in the order of ``jax.flatten_util.ravel_pytree``;
every parameter is in exactly one.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.kronecker.precondition import gather
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss


@dataclasses.dataclass(frozen=True)
class Layout:
    """Positions of the parameters of every layer.

    Attributes:
        layers: Each layer with its positions: ``[blocks, in(+1), out]`` of a Kronecker
            layer (blocks along scanned axes, groups and experts), ``[units, k]`` of a
            scale and shift, ``[entries]`` of a fallback.
        rest: Positions of entries that no layer reads, ``[entries]`` of each leaf.
        size: ``P``.
    """

    layers: tuple[tuple[LayerTag, np.ndarray], ...]
    rest: tuple[np.ndarray, ...]
    size: int

    @property
    def blocks(self) -> list[np.ndarray]:
        """Positions of every block of ``block_diagonal``."""
        return [*(index for _, index in self.layers), *self.rest]

    def __len__(self) -> int:
        """How many blocks ``block_diagonal`` has."""
        return len(self.layers) + len(self.rest)


def make_layout(tagged: TaggedLoss, params: Any) -> Layout:
    """The layout of a tagged loss's parameters."""
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(params)]
    starts = np.cumsum([0, *map(math.prod, shapes)])
    owner = np.full(starts[-1], -1)
    layers = []
    with jax.ensure_compile_time_eval():
        for number, layer in enumerate(tagged.layers):
            index = positions(layer, shapes, starts)
            if np.any(owner[index] >= 0):
                other = tagged.layers[int(owner[index].max())].name
                raise ValueError(
                    f"layers {other} and {layer.name} share entries of a parameter: "
                    "the blocks of a matrix must not overlap."
                )
            owner[index] = number
            layers.append((layer, index))
    free = owner < 0
    leaves = zip(starts[:-1], starts[1:], strict=True)
    rest = [start + np.flatnonzero(free[start:stop]) for start, stop in leaves]
    return Layout(tuple(layers), tuple(r for r in rest if len(r)), int(starts[-1]))


def positions(layer: LayerTag, shapes: list[Shape], starts: np.ndarray) -> np.ndarray:
    """Positions of one layer's entries, as ``Layout.layers`` keeps them."""
    leaves = {}
    for view, path in zip(layer.views, layer.params, strict=True):
        if view.leaf >= len(shapes):
            raise ValueError(
                f"layer {layer.name} wants {path}, but params has {len(shapes)} "
                "leaves: pass the parameters that the loss was tagged with."
            )
        shape = shapes[view.leaf]
        first = int(starts[view.leaf])
        leaves[path] = jnp.arange(first, first + math.prod(shape)).reshape(shape)
    block = np.asarray(gather(layer, leaves))
    if layer.kronecker:
        return block.reshape(-1, *block.shape[-2:])
    if layer.unitwise:
        return block.reshape(-1, block.shape[-1])
    return block.reshape(-1)


def units(layer: LayerTag, index: np.ndarray) -> np.ndarray:
    """Positions of a layer's unit-wise blocks, ``[units, k]``.

    Incoming weights and bias of every output unit of a dense layer or convolution; the
    rows of an embedding; scale and shift of every channel; else single entries.
    """
    if layer.one_hot:
        return index.reshape(-1, index.shape[-1])
    if layer.kronecker:
        return np.swapaxes(index, -1, -2).reshape(-1, index.shape[-2])
    if layer.unitwise:
        return index
    return index.reshape(-1, 1)


def unit_wise(layout: Layout) -> list[np.ndarray]:
    """Positions of all unit-wise blocks, grouped by size."""
    found = [units(layer, index) for layer, index in layout.layers]
    found += [rest.reshape(-1, 1) for rest in layout.rest]
    sizes = sorted({index.shape[-1] for index in found})
    return [np.concatenate([i for i in found if i.shape[-1] == k]) for k in sizes]


def owners(layout: Layout, params: Any) -> Any:
    """The number of each entry's block of ``block_diagonal``, shaped like params."""
    numbers = np.zeros(layout.size, np.int32)
    for b, index in enumerate(layout.blocks):
        numbers[index] = b
    leaves, structure = jax.tree.flatten(params)
    cuts = np.cumsum([math.prod(leaf.shape) for leaf in leaves])[:-1]
    parts = zip(np.split(numbers, cuts), leaves, strict=True)
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape) for part, leaf in parts]
    )
