"""Kernels kept at their norm, against numpy; all other updates untouched."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from tests.helpers import (
    batches_of,
    cases,
    close,
    first_pass,
    homogeneous,
    identical,
    leaves,
    random_like,
    train,
)
from tests.models import BY_NAME, MODELS

KERNELS = ("dense", "conv")
# The others have parameters that are not in a dict of layers.
FORMS = [
    model.name
    for model in MODELS
    if model.name not in ("tuples", "flat")
    and {spec.kind for spec in model.layers.values()} & {*KERNELS}
]


def rescaled(layers, params, updates, **options):
    """The parameters after an update that is rescaled."""
    tx = kfac.rescale_weights(layers, **options)
    new, state = jax.jit(tx.update)(updates, tx.init(params), params)
    assert state == optax.EmptyState()
    return optax.apply_updates(params, new)


def wanted(w, u, outputs, epsilon=1e-9):
    """The formula, for one kernel."""
    w = np.asarray(w, np.float64) + np.asarray(u, np.float64)
    return np.sqrt(2 * outputs) * w / (np.sqrt(np.sum(w**2)) + epsilon)


FAST = ["mlp", "transposed", "heads_in", "reshaped", "twice", "conv1d", "conv3d"]
FAST += ["groups", "depthwise", "nchw", "chwn", "grouped_nchw", "layer_norm"]


@pytest.mark.parametrize("name", cases(FORMS, FAST))
def test_every_form(rng, name):
    """Whichever axis is the output; biases and the rest move as they were told."""
    model = BY_NAME[name]
    layers, params = first_pass(name)[0].layers, model.params()
    updates = random_like(rng, params)
    new = rescaled(layers, params, updates)
    plain = optax.apply_updates(params, updates)
    kernels = {layer.params[0] for layer in layers if layer.kind in KERNELS}
    for path, leaf in leaves(new).items():
        if path not in kernels:
            np.testing.assert_array_equal(leaf, leaves(plain)[path])
    for name, spec in model.layers.items():
        if spec.kind not in KERNELS:
            continue
        rows = slice(None, -1) if spec.bias else slice(None)
        moved = homogeneous(model, name, plain)[:, rows]
        groups, _, out = moved.shape
        seen = homogeneous(model, name, new)[:, rows]
        close(seen, wanted(moved, 0, groups * out), 1e-12)


@hypothesis.given(
    st.integers(1, 6), st.integers(1, 6), st.floats(0, 2), st.integers(0, 10**6)
)
@hypothesis.settings(max_examples=6)
def test_dense_of_any_shape(rows, outputs, epsilon, seed):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(rows, outputs)), "b": rng.normal(size=outputs)}
    params = jax.tree.map(jnp.asarray, params)
    x, y = rng.normal(size=(3, rows)), rng.normal(size=(3, outputs))

    def loss(p, x, y):
        return jnp.square(kfac.normal(x @ p["w"] + p["b"]) - y).sum(-1).mean()

    updates = random_like(rng, params)
    tagged = kfac.tag(loss, params, jnp.asarray(x), jnp.asarray(y))
    new = rescaled(tagged.layers, params, updates, epsilon=epsilon)
    close(new["w"], wanted(params["w"], updates["w"], outputs, epsilon), 1e-12)
    identical(new["b"], params["b"] + updates["b"])


@hypothesis.given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6)
)
@hypothesis.settings(max_examples=6)
def test_convolutions_of_any_shape(size, groups, features, seed):
    """The groups of a convolution are one kernel."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(groups * features, 2, size, 1))
    params = {"w": jnp.asarray(kernel)}
    x = jnp.asarray(rng.normal(size=(2, 2 * groups, 4, 3)))

    def loss(p, x):
        z = jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", feature_group_count=groups
        )
        return jnp.square(kfac.normal(z.mean((2, 3)))).sum(-1).mean()

    tagged = kfac.tag(loss, params, x)
    assert [layer.kind for layer in tagged.layers] == ["conv"]
    updates = random_like(rng, params)
    new = rescaled(tagged.layers, params, updates)
    close(new["w"], wanted(kernel, updates["w"], groups * features), 1e-12)


def scanned(p, x):
    """Layers of a ``scan``: ``[layer, in, out]``."""
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def experts(p, x):
    """A weight ``[expert, in, out]``, transposed."""
    return jnp.einsum("bi,eoi->beo", x, p["w"].swapaxes(1, 2)).sum(1)


@pytest.mark.parametrize("apply", [scanned, experts])
def test_every_layer_of_a_stack_has_its_own_norm(rng, apply):
    params = {"w": jnp.asarray(rng.normal(size=(4, 3, 3)))}
    x = jnp.asarray(rng.normal(size=(5, 3)))
    tagged = kfac.tag(
        lambda p, x: jnp.square(kfac.normal(apply(p, x))).sum(-1).mean(), params, x
    )
    updates = random_like(rng, params)
    new = rescaled(tagged.layers, params, updates)["w"]
    for w, u, seen in zip(params["w"], updates["w"], new, strict=True):
        close(seen, wanted(w, u, 3), 1e-12)


def side_by_side(rng):
    """Two layers in one parameter ``[in, 2 + 4]``, and a loss of them."""
    params = {"w": jnp.asarray(rng.normal(size=(3, 6)))}
    x = jnp.asarray(rng.normal(size=(5, 3)))

    def loss(p, x):
        left = jnp.tanh(x @ p["w"][:, :2])
        right = jnp.tanh(x @ p["w"][:, 2:])
        return jnp.square(kfac.normal(left.sum(-1) * right.sum(-1))).mean()

    return params, kfac.tag(loss, params, x).layers


def test_parts_of_one_parameter_are_kernels_of_their_own(rng):
    params, layers = side_by_side(rng)
    assert len(layers) == 2
    updates = random_like(rng, params)
    w, u = params["w"], updates["w"]
    left, right = wanted(w[:, :2], u[:, :2], 2), wanted(w[:, 2:], u[:, 2:], 4)
    new = rescaled(layers, params, updates)["w"]
    close(new, np.concatenate([left, right], 1), 1e-12)
    for layer in layers:
        alone = rescaled([layer], params, updates)["w"]
        part = layer.sizes[1] == 2
        close(alone[:, :2], left if part else w[:, :2] + u[:, :2], 1e-12)
        close(alone[:, 2:], w[:, 2:] + u[:, 2:] if part else right, 1e-12)


def test_a_subset_and_a_mask(rng):
    tagged, params = first_pass("mlp")[0], BY_NAME["mlp"].params()
    updates = random_like(rng, params)
    plain = optax.apply_updates(params, updates)
    both = rescaled(tagged.layers, params, updates)
    first = [layer for layer in tagged.layers if layer.name == "layer0"]
    expected = both | {"layer1": plain["layer1"]}
    identical(rescaled(first, params, updates), expected)
    for mask in (
        {"layer0": True, "layer1": False},
        {"layer0": True, "layer1": {"kernel": False, "bias": True}},
    ):
        tx = optax.masked(kfac.rescale_weights(tagged.layers), mask)
        new, _ = jax.jit(tx.update)(updates, tx.init(params), params)
        identical(optax.apply_updates(params, new), expected)


def test_the_network_is_the_same_before_a_batch_norm(rng):
    """With another norm of the kernels it computes the same; its gradient differs."""
    widths = (4, 6, 5, 3)
    params = [
        {"w": rng.normal(size=(i, o)), "b": rng.normal(size=o)}
        for i, o in zip(widths, widths[1:], strict=False)
    ]
    params = jax.tree.map(jnp.asarray, params)
    x = jnp.asarray(rng.normal(size=(8, 4)))

    def forward(params, x):
        for layer in params[:-1]:
            z = x @ layer["w"] + layer["b"]
            z = (z - z.mean(0)) / jnp.sqrt(z.var(0))
            x = jnp.tanh(z)
        return kfac.categorical(x @ params[-1]["w"] + params[-1]["b"])

    def loss(params, x):
        labels = jnp.arange(8) % 3
        logits = forward(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    tagged = kfac.tag(loss, params, x)
    hidden = [layer for layer in tagged.layers if not layer.params[0].startswith("[2]")]
    updates = random_like(rng, params)
    plain, new = optax.apply_updates(params, updates), rescaled(hidden, params, updates)
    for layer, outputs in zip(new, widths[1:-1], strict=False):
        np.testing.assert_allclose(jnp.linalg.norm(layer["w"]) ** 2, 2 * outputs)
    assert abs(jnp.linalg.norm(plain[0]["w"]) ** 2 - 2 * widths[1]) > 1
    close(forward(new, x), forward(plain, x), 1e-10)


def test_a_rejected_batch_changes_nothing():
    """Also before the first step, when kernels do not have their norm yet."""
    tagged, params = first_pass("mlp")[0], BY_NAME["mlp"].params()
    inner = kfac.kfac(tagged.layers, 0.05, damping=0.01)
    tx = optax.chain(inner, kfac.rescale_weights(tagged.layers))
    one, two, three = batches_of(BY_NAME["mlp"], 3)
    bad = one[0].at[0, 0].set(jnp.nan), one[1]
    seen, _, _ = train(tagged, tx, params, [bad, one, bad, two, three, bad])
    clean, _, _ = train(tagged, tx, params, [one, two, three])
    identical(seen, clean)
    for name, outputs in (("layer0", 5), ("layer1", 3)):
        size = jnp.linalg.norm(seen[name]["kernel"]) ** 2
        np.testing.assert_allclose(size, 2 * outputs, rtol=1e-8)
    identical(train(tagged, tx, params, [bad])[0], params)


def test_bfloat16(rng):
    tagged = BY_NAME["mlp"].tag(4, jnp.bfloat16)
    params = BY_NAME["mlp"].params(jnp.bfloat16)
    updates = random_like(rng, params)
    new = rescaled(tagged.layers, params, updates)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
    norm = np.linalg.norm(np.float64(new["layer0"]["kernel"]))
    np.testing.assert_allclose(norm, np.sqrt(2 * 5), rtol=2**-7)


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    "kind", cases([AxisType.Auto, AxisType.Explicit], [AxisType.Explicit])
)
def test_sharded_parameters(rng, kind):
    """Norms are those of whole kernels."""
    params = {"w": jnp.asarray(rng.normal(size=(8, 16)))}
    x = jnp.asarray(rng.normal(size=(5, 8)))
    tagged = kfac.tag(
        lambda p, x: jnp.square(kfac.normal(x @ p["w"])).sum(-1).mean(), params, x
    )
    updates = random_like(rng, params)
    alone = rescaled(tagged.layers, params, updates)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    spec = NamedSharding(mesh, PartitionSpec("data", "model"))
    with jax.set_mesh(mesh):
        new = rescaled(
            tagged.layers,
            jax.device_put(params, spec),
            jax.device_put(updates, spec),
        )
    close(new, alone, 1e-12)
    assert new["w"].sharding.is_equivalent_to(spec, 2)


# ---------------------------------------------------------------- what is refused


def test_a_weight_used_in_both_directions(rng):
    params = {"table": jnp.asarray(rng.normal(size=(5, 3)))}
    x = jnp.asarray(rng.normal(size=(4, 5)))

    def loss(p, x):
        return jnp.square(kfac.normal(jnp.tanh(x @ p["table"]) @ p["table"].T)).mean()

    layers = kfac.tag(loss, params, x).layers
    with pytest.raises(ValueError, match=r"layer table: .*both directions"):
        kfac.rescale_weights(layers)


def test_nothing_to_rescale():
    layers = first_pass("mlp")[0].layers
    with pytest.raises(ValueError, match="got no layers"):
        kfac.rescale_weights([])
    with pytest.raises(ValueError, match="epsilon must not be negative"):
        kfac.rescale_weights(layers, epsilon=-1.0)
    scales = [x for x in first_pass("layer_norm")[0].layers if x.kind == "scale_shift"]
    with pytest.raises(ValueError, match=r"got layer \(scale_shift\)"):
        kfac.rescale_weights(scales)


def test_wrong_parameters():
    params = BY_NAME["mlp"].params()
    tx = kfac.rescale_weights(first_pass("mlp")[0].layers)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="layer0"):
        tx.init({"layer1": params["layer1"]})
