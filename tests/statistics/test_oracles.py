"""The oracle itself: its rows and cotangents must give back JAX's gradient."""

import jax
import numpy as np
import pytest

from tests import models, oracles
from tests.helpers import cases, close, homogeneous

FORMS = ["mlp", "transposed", "heads_out", "heads_in", "twice", "recurrent"]
FORMS += ["conv1d", "all_dilations", "uneven_padding", "groups", "chwn"]


FAST = ["transposed", "heads_in", "recurrent", "all_dilations", "groups"]


@pytest.mark.parametrize("name", cases(FORMS, FAST))
def test_rows_and_cotangents_give_the_gradient(name):
    model = models.BY_NAME[name]
    params, (x, y) = model.params(), model.batch(3)
    grads = jax.jit(jax.grad(model.plain_loss))(params, x, y)
    run = oracles.Pass(model, params, x)
    for layer, spec in model.layers.items():
        total = 0.0
        cotangents = run.cotangents(layer, "empirical", y)
        for a, cs in zip(run.inputs[layer], cotangents, strict=True):
            rows = spec.rows(a)
            rows = np.concatenate([rows, np.ones((*rows.shape[:3], 1))], -1)
            total += np.einsum("gnpi,gnpo->gio", rows, spec.cotangents(cs[0]))
        close(total, homogeneous(model, layer, grads))


@pytest.mark.parametrize("model", [m for m in models.MODELS if m.traced], ids=str)
def test_traced_form_computes_the_same(model):
    params, (x, _) = model.params(), model.batch(3)
    close(model.traced(params, x), model.forward(params, x, oracles.no_hook))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "normal"])
def test_output_derivatives(likelihood):
    model = models.mlp(likelihood=likelihood)
    (x, y), params = model.batch(1), model.params()
    output = model.forward(params, x, oracles.no_hook)
    loss = lambda o: oracles.mean_loss(likelihood, o, y, 0.7)  # noqa: E731
    close(oracles.output_gradient(likelihood, output, y, 0.7), jax.grad(loss)(output))
    root = oracles.output_root(likelihood, output, 0.7)[0]
    close(root @ root.T, jax.hessian(loss)(output)[0, :, 0])


def test_algorithm_1_resonates():
    """Read literally, a layer that never changes is still refreshed half the time."""
    same = lambda t: [np.eye(2)]  # noqa: E731
    multiple, _ = oracles.algorithm_1(same, 1000, 0.1, "multiple")
    elapsed, _ = oracles.algorithm_1(same, 1000, 0.1, "elapsed")
    assert 0.45 < len(multiple) / 1000 < 0.55
    assert len(elapsed) / 1000 < 0.05
