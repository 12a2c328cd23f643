"""Tables: classifiers over tokens, language models, tied tables, positions."""

import jax.numpy as jnp

from tests.zoo import oracle
from tests.zoo.nets import FRAMEWORKS, everywhere, zoo_net
from tests.zoo.parts import Bare, Linear, Table, head, mean_pool

VOCAB, LENGTH = 5, 3


def bag(parts, ids):
    """The mean of the tokens' rows, then a dense layer."""
    return parts["head"](jnp.tanh(mean_pool(parts["embed"](ids))))


def language_model(parts, ids):
    """Logits at every token, from the token and those before it."""
    h = jnp.cumsum(parts["embed"](ids), 1)
    return parts["out"](jnp.tanh(parts["hidden"](h)))


class TiedTable(Table):
    """A table that is the output layer's weight too."""

    def apply(self, p, ids, out=False):
        return ids @ p["table"].T if out else self.take(p["table"], ids)

    def bind(self, framework, module):
        found = super().bind(framework, module)
        return lambda x, out=False: found.attend(x) if out else found(x)

    def spec(self):
        return oracle.Tied(self.vocab)

    def reference(self, r, name, ids, out=False):
        if not out:
            return super().reference(r, name, ids)
        table = r.find(name, "table", "embedding", "embeddings", "weight")
        h = ids
        return r.hook(name + oracle.OUT, h, jnp.einsum("...d,vd->...v", h, table))


def tied(parts, ids):
    """A language model with one table at both ends."""
    h = jnp.tanh(parts["hidden"](jnp.cumsum(parts["embed"](ids), 1)))
    return parts["embed"](h, out=True)


def positions(parts, x):
    """A learned vector added at every position of the input."""
    h = parts["positions"](lambda p, x: x + p, x)
    return parts["head"](mean_pool(jnp.tanh(h)))


def positions_after_dense(parts, x):
    """The same behind a dense layer, as in vision transformers."""
    h = parts["positions"](lambda p, x: x + p, parts["patches"](x))
    return parts["head"](mean_pool(jnp.tanh(h)))


def positions_lm(parts, ids):
    """Learned positions in a language model, where a term is a token."""
    h = parts["positions"](lambda p, x: x + p, parts["embed"](ids))
    return parts["out"](jnp.tanh(jnp.cumsum(h, 1)))


def position_table(parts, x):
    """Positions from a table looked up by number."""
    number = jnp.broadcast_to(jnp.arange(LENGTH), x.shape[:2])
    return parts["head"](mean_pool(jnp.tanh(x + parts["embed"](number))))


class PositionTable(Table):
    """A table looked up once, its rows broadcast to every example."""

    def apply(self, p, ids):
        return self.take(p["table"], ids[0])

    def bind(self, framework, module):
        found = super().bind(framework, module)
        return lambda ids: found(ids[0])


SHIFT = Bare((LENGTH, 4), oracle.ScaleShift(scale=False, axes=2))
TOKENS = {"x_shape": (LENGTH,), "vocab": VOCAB}
PREDICTED = {"outputs": VOCAB, "terms": (LENGTH,)}


def one_hot_nets():
    """Tables as a product with one-hot rows."""
    hot, tied_hot = Table(VOCAB, 4, one_hot=True), TiedTable(VOCAB, 4, one_hot=True)
    return [
        *everywhere(
            "bag_one_hot", {"embed": hot, **head(4)}, bag,
            frameworks=("jax", "haiku"), **TOKENS,
        ),
        *everywhere(
            "tied_one_hot", {"embed": tied_hot, "hidden": Linear(4, 4)}, tied,
            frameworks=("jax", "haiku"), **TOKENS, **PREDICTED,
        ),
    ]  # fmt: skip


def nets():
    """Every network of this family."""
    table = Table(VOCAB, 4)
    lm = {"embed": table, "hidden": Linear(4, 3), "out": Linear(3, VOCAB)}
    positioned = {"embed": table, "positions": SHIFT, "out": Linear(4, VOCAB)}
    numbered = {"embed": PositionTable(LENGTH, 4), **head(4)}
    shape = {"x_shape": (LENGTH, 4)}
    return [
        *everywhere("bag", {"embed": table, **head(4)}, bag, **TOKENS),
        *everywhere("lm", lm, language_model, **TOKENS, **PREDICTED),
        *everywhere(
            "tied", {"embed": TiedTable(VOCAB, 4), "hidden": Linear(4, 4)}, tied,
            **TOKENS, **PREDICTED,
        ),
        *one_hot_nets(),
        *everywhere("positions", {"positions": SHIFT, **head(4)}, positions, **shape),
        *everywhere(
            "positions_after_dense",
            {"patches": Linear(2, 4), "positions": SHIFT, **head(4)},
            positions_after_dense, x_shape=(LENGTH, 2),
        ),
        *everywhere("positions_lm", positioned, positions_lm, **TOKENS, **PREDICTED),
        *[
            zoo_net("position_table", f, numbered, position_table, **shape)
            for f in FRAMEWORKS
        ],
    ]  # fmt: skip
