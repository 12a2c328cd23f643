"""Architectures written in plain JAX, Flax (Linen and NNX), Equinox and Haiku."""

from tests.zoo import attention, embeddings, recurrent, scales, stacked, vision

FAMILIES = [embeddings, attention, stacked, recurrent, scales, vision]
NETS = [net for family in FAMILIES for net in family.nets()]
BY_NAME = {net.name: net for net in NETS}
