"""What the compiled program costs: statistics only inside conditionals."""

import re

import jax
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests import models
from tests.helpers import kfac_state

WIDE = models.mlp("wide", (24, 32, 40, 16))
BATCH = 48
DOT = re.compile(r"\b(dot|convolution)\(|__onednn|\$matmul|__cublas")


def computations(text):
    """Compiled HLO text as ``{computation: its lines}``, with the entry's name."""
    found, entry, name = {}, None, None
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            name = head[2]
            entry = name if head[1] else entry
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found, entry


def called(line, names):
    """Computations that an instruction refers to."""
    return [
        n for n in re.findall(r"%?([\w.\-]+)", line.split("=", 1)[-1]) if n in names
    ]


def dots(name, found, gates=()):
    """Number of matrix products that a computation may do outside some gates."""
    total = 0
    for line in found[name]:
        total += bool(DOT.search(line))
        if any(f" {gate}(" in line for gate in gates):
            continue
        total += sum(dots(n, found, gates) for n in called(line, found))
    return total


def conditionals(found):
    """Branches of every conditional, as numbers of matrix products."""
    return [
        sorted(dots(name, found) for name in called(line, found))
        for lines in found.values()
        for line in lines
        if " conditional(" in line
    ]


def compiled(function, *args):
    """Computations of the optimised program."""
    return computations(jax.jit(function).lower(*args).compile().as_text())


@pytest.fixture(scope="module")
def program():
    """Tagged loss with gated statistics, compiled."""
    tagged, params, batch = WIDE.tag(BATCH), WIDE.params(), WIDE.batch(BATCH)
    state = kfac.scale_by_kfac(tagged.layers).init(params)

    def run(params, state, x, y):
        return tagged.value_and_grad(params, x, y, opt_state=state)

    return compiled(run, params, state, *batch)


def test_every_layer_has_a_conditional_with_an_empty_branch(program):
    found, _ = program
    with_products = [branches for branches in conditionals(found) if max(branches)]
    assert len(with_products) >= len(WIDE.layers)
    for skipped, done in with_products:
        assert skipped == 0
        assert done in (1, 2)
    assert sum(done for _, done in with_products) == 2 * len(WIDE.layers)


def test_nothing_but_the_gradient_outside_the_conditionals(program):
    found, entry = program
    args = (WIDE.params(), *WIDE.batch(BATCH))
    plain, plain_entry = compiled(jax.value_and_grad(WIDE.plain_loss), *args)
    assert dots(plain_entry, plain) == 3 * len(WIDE.layers) - 1
    outside = dots(entry, found, gates=["conditional"])
    assert outside == dots(plain_entry, plain)


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "newton_schulz", "low_rank"])
def test_a_step_with_nothing_due_does_two_products_per_layer(inverse):
    tagged, params = WIDE.tag(BATCH), WIDE.params()
    tx = kfac.scale_by_kfac(
        tagged.layers, inverse=inverse, inverse_interval=10,
        interval=kfac.intervals.every(10),
    )  # fmt: skip
    state = tx.init(params)
    *_, statistics = tagged.value_and_grad(params, *WIDE.batch(BATCH))

    def update(grads, state, params, statistics):
        return tx.update(grads, state, params, statistics=statistics)

    found, entry = compiled(update, params, state, params, statistics)
    text = "\n".join(line for lines in found.values() for line in lines)
    outside = dots(entry, found, gates=["conditional", "while"])
    products = 4 if inverse in ("eigh", "low_rank") else 2
    assert outside == products * len(WIDE.layers)
    for name in found:
        assert not (name == entry and "lapack" in "\n".join(found[name]))
    assert len(re.findall(r" while\(", text)) >= 2 * len(WIDE.layers)


def test_statistics_are_zero_where_nothing_is_due():
    tagged, params, batch = WIDE.tag(BATCH), WIDE.params(), WIDE.batch(BATCH)
    tx = kfac.scale_by_kfac(tagged.layers, interval=kfac.intervals.every(5))
    state = tx.init(params)
    _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
    _, state = tx.update(grads, state, params, statistics=statistics)
    assert not kfac_state(state).clock.due.any()
    *_, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
    assert not any(np.asarray(v).any() for v in jax.tree.leaves(statistics))
