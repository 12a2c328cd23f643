"""Every kind of layer on an explicit mesh: value, gradient, statistics, products."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from tests.helpers import cases, close

P = PartitionSpec
DEVICES = 2
ROWS = P("data", None, None)
WIDTH, VOCABULARY, LENGTH, EXAMPLES = 3, 5, 4, 6
pytestmark = [
    pytest.mark.usefixtures("compiled_anew"),
    pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs two devices"),
]


def loss_of(explicit, masked):
    """Embedding (tied), unit-wise, scan, convolution, diagonal; an automatic part."""
    spec = ROWS if explicit else None

    def product(h, p):
        return jnp.tanh(h.reshape(-1, WIDTH) @ p["w"] + p["b"]).reshape(h.shape)

    def turn(h, p):
        return jnp.einsum("btc,cd->btd", h, p["w"], out_sharding=spec) + p["b"], None

    def loss(p, tokens, labels):
        h = p["table"].at[tokens].get(out_sharding=spec)
        h = (h - h.mean(-1, keepdims=True)) * p["scale"] + p["shift"]
        h, _ = jax.lax.scan(turn, h, p["stack"])
        if explicit:  # what a user does where no sharding can be told
            h = jax.sharding.auto_axes(product, out_sharding=spec)(h, p["inner"])
        else:
            h = product(h, p["inner"])
        h = jax.lax.conv_general_dilated(
            h, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        h = h * jnp.cumsum(p["odd"])
        mask = tokens > 0 if masked else None
        z = jnp.einsum("btc,vc->btv", h, p["table"], out_sharding=spec)
        one_hot = labels[..., None] == jnp.arange(VOCABULARY)
        terms = optax.softmax_cross_entropy(kfac.categorical(z, mask), one_hot * 1.0)
        return terms.mean() if mask is None else (terms * mask).sum() / mask.sum()

    return loss


def data():
    """Parameters and a batch."""
    rng = np.random.default_rng(0)
    dense = {"w": (WIDTH, WIDTH), "b": (WIDTH,)}
    shapes = {
        "table": (VOCABULARY, WIDTH), "scale": (WIDTH,), "shift": (WIDTH,),
        "stack": {k: (2, *shape) for k, shape in dense.items()}, "inner": dense,
        "conv": (3, WIDTH, WIDTH), "odd": (WIDTH,),
    }  # fmt: skip
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    make = lambda s: jnp.asarray(0.5 * rng.normal(size=s))  # noqa: E731
    params = jax.tree.map(make, shapes, is_leaf=is_shape)
    batch = [rng.integers(0, VOCABULARY, (EXAMPLES, LENGTH)) for _ in range(2)]
    return params, tuple(map(jnp.asarray, batch))


def compared(run):
    """``run(explicit, params, batch)`` on a mesh is what it is on one device."""
    params, batch = data()
    wanted = jax.device_get(run(False, params, batch))
    mesh = jax.make_mesh(
        (DEVICES,), ("data",), axis_types=(AxisType.Explicit,),
        devices=jax.devices()[:DEVICES],
    )  # fmt: skip
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        close(jax.device_get(run(True, params, batch)), wanted, 1e-8)


def passed(explicit, params, batch, *, fisher, masked, state, jit):
    """A pass, for all layers or for those that are due."""
    tagged = kfac.tag(loss_of(explicit, masked), params, *batch, fisher=fisher)
    tx = kfac.scale_by_kfac(tagged, damping=0.1)
    held, key = tx.init(params) if state else None, jax.random.key(0)

    def run(params, held, *batch):
        return tagged.value_and_grad(params, *batch, opt_state=held, key=key)

    return (jax.jit(run) if jit else run)(params, held, *batch)


FISHERS = ("empirical", "mc", "exact")
CASES = list(itertools.product(FISHERS, (False, True), (False, True), (True, False)))
FAST = [
    ("empirical", False, False, True), ("mc", True, True, True)
]  # fmt: skip


@pytest.mark.parametrize(("fisher", "masked", "state", "jit"), cases(CASES, FAST))
def test_a_pass(fisher, masked, state, jit):
    options = {"fisher": fisher, "masked": masked, "state": state, "jit": jit}
    compared(functools.partial(passed, **options))


def test_kinds():
    """The loss has every kind of layer."""
    params, batch = data()
    kinds = {t.kind for t in kfac.tag(loss_of(False, False), params, *batch).layers}
    assert kinds == {"dense", "conv", "embedding", "scale_shift", "diagonal"}


@pytest.mark.parametrize("jit", cases([True, False], [True]))
def test_the_quadratic_model(jit):
    def run(explicit, params, batch):
        tagged = kfac.tag(loss_of(explicit, True), params, *batch)

        def products(params, *batch):
            model = kfac.quadratic_model(tagged, params, *batch)
            vectors = (jax.tree.map(jnp.ones_like, params), params)
            return model.loss(params), model.products(vectors)

        return (jax.jit(products) if jit else products)(params, *batch)

    compared(run)


@pytest.mark.slow
def test_the_doctor():
    """It reads a state, a batch and parameters that are on the mesh."""

    def run(explicit, params, batch):
        tagged = kfac.tag(loss_of(explicit, False), params, *batch)
        tx = kfac.kfac(tagged, 0.1, damping=0.1)
        state = jax.jit(tx.init)(params)

        @jax.jit
        def step(params, state, *batch):
            _, grads, found = tagged.value_and_grad(params, *batch, opt_state=state)
            return tx.update(grads, state, params, statistics=found)[1]

        state = step(params, state, *batch)
        found = kfac.doctor(tagged, state, batch, params)
        return sorted(len(finding.kind) for finding in found)

    compared(run)


@pytest.mark.parametrize("form", cases(["full", "kronecker", "diagonal"], ["diagonal"]))
def test_curvature(form):
    """The Gauss-Newton matrix as an operator."""

    def run(explicit, params, batch):
        tagged = kfac.tag(loss_of(explicit, False), params, *batch)
        op = kfac.curvature.ggn(tagged, params, [batch], form)
        return op.mv(jax.tree.map(jnp.ones_like, params)), op.diagonal()

    compared(run)
