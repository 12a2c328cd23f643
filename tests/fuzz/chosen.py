"""Programs that every run of the suite checks: much in few compilations."""

from tests.fuzz.blocks import (
    Bounded,
    Branches,
    Context,
    Dead,
    Inside,
    Loop,
    Members,
    Once,
    Unrolled,
)
from tests.fuzz.layers import Conv, Embed, Experts, Heads
from tests.fuzz.program import Head, Program
from tests.fuzz.steps import Complex, Dense, Function, Mix, Scale
from tests.fuzz.weights import Weight

TANH = Function("tanh")


def dense(name, n_in, n_out, form="matmul", bias="plus", order=(0, 1, 2, 3), **weight):
    """A dense layer with a bias of its own."""
    own = Weight(name, n_in, n_out, **weight)
    return Dense(own, form, bias, order, "" if bias == "none" else name + "_b")


GROUPS = Conv(
    "k0", 4, 4, (2, 3), (2, 1), ((1, 0), (1, 2)), (1, 2), (1, 2), 2, True,
    (3, 0, 2, 1), (0, 3, 1, 2), (3, 1, 0, 2),
)  # fmt: skip
SHIFTED = Conv(
    "k1", 4, 2, (3, 2), (1, 1), ((1, 1), (0, 1)), (1, 1), (1, 1), 1, True,
    (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3),
)  # fmt: skip
LINE = Conv("k0", 2, 4, (3,), (2,), ((1, -1),), (1,), (1,), 2, False, (2, 0, 1),
            (1, 0, 2), (0, 2, 1))  # fmt: skip

CONVOLUTIONS = Program(
    3, (4, 4, 4), 0,
    (GROUPS, TANH, SHIFTED, Function("own_softsign"), Mix("pool")),
    (Head(dense("w0", 2, 3), "categorical"),),
)  # fmt: skip
MASKED = Program(
    3, (5, 2), 0,
    (LINE, TANH, dense("w1", 4, 3, "einsum", "late", (1, 0, 2, 3)), Mix("attend"),
     Scale("n1", (3,), "rms")),
    (Head(dense("w0", 3, 2, "flattened"), "bernoulli", "masked"),),
    nesting="pairs",
)  # fmt: skip
TABLES = Program(
    3, (2,), 5,
    (Embed("t0", 5, 4, "one_hot", 2, "looked_up"),
     Heads("e0", 4, 2, 2, True, True), TANH, Scale("n0", (2, 4), "positions")),
    (Head(Dense(Weight("t0", 4, 5, "plain", "none", True)), "categorical"),),
    nesting="flat",
)  # fmt: skip
LOOPS = Program(
    4, (3, 4), 0,
    (Loop("remat", (dense("w1", 4, 4, store="transposed"), TANH,
                    Scale("n1", (4,), "grouped")), 2, True),
     Loop("fori", (Inside("residual", (dense("w2", 4, 4, "own_product"), TANH)),), 2,
          False),
     Members((dense("w3", 2, 2), TANH, Scale("n3", (2,))), 2, True),
     Context((Experts("e0", 4, 2, 2, False, True, True),))),
    (Head(dense("w0", 4, 2, store="padded"), "normal"),),
    nesting="tuple",
)  # fmt: skip
TWICE = Program(
    3, (2, 3), 0,
    (Inside("checkpoint", (dense("w1", 3, 4, "weight_first"), TANH)),
     Dense(Weight("w1", 4, 3, tie=True), "einsum", "none", (1, 2, 0, 3)), TANH,
     Unrolled((dense("w2", 3, 3, store="flat"), TANH)),
     Inside("jit", (dense("w2", 3, 3, bias="none", store="flat"), TANH)), Mix("pool")),
    (Head(dense("w0", 3, 2, store="beside"), "normal"),
     Head(dense("w4", 3, 2, bias="minus", store="strided"), "bernoulli")),
)  # fmt: skip
ODD = Program(
    3, (4,), 0,
    (dense("w1", 4, 3, arithmetic="gain"), TANH, dense("w2", 3, 3, arithmetic="norm"),
     Branches("cond", ((dense("w3", 3, 3, store="reversed"), TANH),
                       (dense("w3", 3, 3, "vmapped", "none", store="reversed"),))),
     dense("w4", 3, 3, bias="twice", arithmetic="square"),
     dense("w7", 3, 3, bias="read_twice"),
     dense("w5", 3, 3, bias="half", arithmetic="frozen"),
     dense("w6", 3, 3, bias="after", arithmetic="half"), Scale("n0", (), "scalar"),
     Scale("n1", (3,), "one_plus")),
    (Head(dense("w0", 3, 2, store="indexed"), "normal", "unmarked"),),
    penalties=("w0",),
    unused=("unused",),
)  # fmt: skip
# One weight for the positions of an example and, transposed, for their mean.
TIED = Program(
    4, (3, 4), 0,
    (dense("w1", 4, 3, "einsum", store="transposed"), TANH, Mix("pool")),
    (Head(Dense(Weight("w1", 3, 4, "transposed", "none", True)), "normal", "masked"),),
)  # fmt: skip
TIED_TABLE = Program(
    4, (3,), 5,
    (Embed("t0", 5, 4), TANH, Mix("pool")),
    (Head(Dense(Weight("t0", 4, 5, "plain", "none", True)), "categorical", "masked"),),
)  # fmt: skip

# What no derivative passes through, what is made once, and turns that are not taken.
DEAD = Program(
    4, (3,), 0,
    (Dead("carried", (dense("w1", 3, 3), TANH)), dense("w1", 3, 3), TANH,
     Dead("stopped", (dense("w2", 3, 3),)),
     Once("late", (dense("w3", 2, 3), TANH, dense("w4", 3, 3, bias="none")), 2),
     Inside("examples", (Once("multiply", (dense("w4", 3, 3, bias="none"),), 3),)),
     Dead("unread", (dense("w4", 3, 3, bias="none"),))),
    (Head(dense("w0", 3, 2), "bernoulli"),),
)  # fmt: skip
BOUNDED = Program(
    3, (2, 3), 0,
    (Bounded((dense("w1", 3, 3), TANH, Scale("n1", (3,))), 3, False),
     Bounded((dense("w2", 3, 3, bias="none"), TANH), 3, True),
     Complex(dense("w3", 3, 3, bias="none"), "turned")),
    (Head(dense("w0", 3, 2), "categorical"),),
    seed=1,
)  # fmt: skip
TERMS = Program(
    4, (3, 3), 0,
    (dense("w1", 3, 4), TANH, Scale("n1", (4,)),
     Inside("residual", (dense("w2", 4, 4), TANH))),
    (Head(dense("w0", 4, 3), "categorical", weight=0.5),
     Head(dense("w2", 4, 4), "normal", weight=3.0, pool=True)),
)  # fmt: skip

SMALL = Program(
    3, (4,), 0,
    (dense("w1", 4, 4, arithmetic="half"), TANH,
     Inside("residual", (dense("w1", 4, 4, bias="none", arithmetic="half"),))),
    (Head(dense("w0", 4, 2, store="transposed"), "normal"),),
)  # fmt: skip

CHOSEN = {
    "convolutions": (CONVOLUTIONS, "exact"),
    "masked": (MASKED, "reduce"),
    "tables": (TABLES, "reduced exact"),
    "loops": (LOOPS, "exact"),
    "twice": (TWICE, "reduce"),
    "odd": (ODD, "squares"),
    "dead": (DEAD, "exact"),
    "bounded": (BOUNDED, "empirical"),
    "terms": (TERMS, "exact"),
    "tied": (TIED, "reduced exact"),
    "tied table": (TIED_TABLE, "reduced exact"),
}
