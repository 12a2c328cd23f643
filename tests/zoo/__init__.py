"""Architectures written in plain JAX, Flax (Linen and NNX), Equinox and Haiku."""

from tests.zoo import attention, embeddings, stacked

NETS = [*embeddings.nets(), *attention.nets(), *stacked.nets()]
BY_NAME = {net.name: net for net in NETS}
