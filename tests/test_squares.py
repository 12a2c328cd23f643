"""Squares of single examples' gradients against explicit Jacobians, in float64."""

import jax
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests import models, oracles
from tests.helpers import cases, close

# Their examples meet in a norm over the batch, or a row is several examples'.
NAMES = [m.name for m in models.MODELS]
FAST = ["mlp", "heads_out", "twice", "recurrent", "conv2d", "groups", "layer_norm"]


def expected(model, params, x, y):
    """``(1/N) Σ_n g_n²`` by one explicit gradient after the other."""

    def loss(params, n, t):
        # The term alone: what the whole batch gives, picked.
        run = model.traced or (lambda p, v: model.forward(p, v, oracles.no_hook))
        output = run(params, x)
        flat = output.reshape(-1, output.shape[-1])
        target = y.reshape(-1, *y.shape[1 + len(model.terms) :])
        at = n * flat.shape[0] // len(x) + t
        return oracles.mean_loss(
            model.likelihood, flat[at][None], target[at][None], model.variance
        )

    per = int(np.prod(model.terms))
    rows = [(n, t) for n in range(len(x)) for t in range(per)]
    grads = [jax.grad(loss)(params, n, t) for n, t in rows]
    return jax.tree.map(lambda *g: sum(np.square(v) for v in g) / len(rows), *grads)


def seen(model, params, x, y, **options):
    """The same by the library."""
    tagged = model.tag(len(x), statistics="squares", **options)
    _, grads, statistics = jax.jit(tagged.value_and_grad)(params, x, y)
    close(grads, jax.grad(model.plain_loss)(params, x, y))
    return kfac.bayes.squares(tagged.layers, statistics, params)


@pytest.mark.parametrize("name", cases(NAMES, FAST))
def test_table_of_models(name):
    model = models.BY_NAME[name]
    if model.diagonal:
        pytest.skip("a parameter without a rule has no squares")
    params, (x, y) = model.params(), model.batch(3)
    close(seen(model, params, x, y), expected(model, params, x, y), 1e-9)
