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


def in_turn():
    """Each architecture in one framework, another one than the architecture before."""
    found = {}
    for net in NETS:
        found.setdefault(net.name.rsplit("-", 1)[0], []).append(net)
    return [nets[i % len(nets)] for i, nets in enumerate(found.values())]


FAST_NETS = in_turn()
