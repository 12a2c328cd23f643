"""Weight sharing: over positions, over time, and by calling a layer again."""

import jax.numpy as jnp

from tests.zoo.nets import everywhere
from tests.zoo.parts import Convolution, Linear, head, mean_pool


def over_positions(parts, x):
    """A multilayer perceptron at every position, then the mean."""
    h = jnp.tanh(parts["second"](jnp.tanh(parts["first"](x))))
    return parts["head"](mean_pool(h))


def twice(parts, x):
    """One layer, called again on what it computed."""
    return parts["head"](jnp.tanh(parts["again"](jnp.tanh(parts["again"](x)))))


def positions_then_pooled(parts, x):
    """One layer at three positions, then on their mean."""
    h = mean_pool(jnp.tanh(parts["again"](x)))
    return parts["head"](jnp.tanh(parts["again"](h)))


def convolved_again(parts, x):
    """One convolution, called again on its smaller output."""
    h = jnp.tanh(parts["again"](jnp.tanh(parts["again"](x))))
    return parts["head"](mean_pool(h))


def time_major(parts, x):
    """A layer over ``[time, batch]``: an example's rows are not side by side."""
    h = jnp.tanh(parts["layer"](jnp.swapaxes(x, 0, 1)))
    return parts["head"](h.mean(0))


def time_major_then_not(parts, x):
    """One layer, first over ``[time, batch]``, then on the mean over time."""
    h = jnp.tanh(parts["again"](jnp.swapaxes(x, 0, 1)))
    return parts["head"](jnp.tanh(parts["again"](h.mean(0))))


def nets():
    """Every network of this family."""
    mlp = {"first": Linear(2, 3), "second": Linear(3, 2, False), **head(2)}
    again, sequence = {"again": Linear(3, 3), **head(3)}, {"x_shape": (3, 3)}
    conv = {"again": Convolution(2, 2, (2, 2), padding=0), **head(2)}
    some = ("jax", "linen")
    return [
        *everywhere("positions_mlp", mlp, over_positions, x_shape=(3, 2)),
        *everywhere("twice", again, twice, x_shape=(3,)),
        *everywhere("twice_pooled", again, positions_then_pooled, **sequence),
        *everywhere("conv_twice", conv, convolved_again, x_shape=(4, 4, 2)),
        *everywhere(
            "time_major", {"layer": Linear(3, 3), **head(3)}, time_major,
            frameworks=some, **sequence,
        ),
        *everywhere(
            "time_major_then_not", again, time_major_then_not, frameworks=some,
            **sequence,
        ),
    ]  # fmt: skip
