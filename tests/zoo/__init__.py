"""Architectures written in plain JAX, Flax (Linen and NNX), Equinox and Haiku."""

from tests.zoo import (
    attention,
    embeddings,
    recurrent,
    scales,
    shared,
    special,
    stacked,
    vision,
)

FAMILIES = [embeddings, attention, stacked, recurrent, scales, vision, special, shared]
NETS = [net for family in FAMILIES for net in family.nets()]
HALF_NETS = special.half_nets()
BY_NAME = {net.name: net for net in NETS}
