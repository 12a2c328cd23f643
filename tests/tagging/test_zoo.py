"""Every architecture in every framework: what is found, factors, gradients."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests import oracles, zoo
from tests.helpers import cases, close, leaves
from tests.zoo import oracle
from tests.zoo.nets import by_path, canonical

EXAMPLES = 4
FISHERS = ("empirical", "exact")


def expected_kinds(net):
    """Layer name to kind."""
    kinds = {name: spec.kind for name, spec in net.layers.items()}
    return kinds | dict.fromkeys(net.diagonal, "diagonal")


@functools.cache
def arguments(net):
    """Parameters and a batch."""
    return (net.params(), *net.batch(EXAMPLES))


@functools.cache
def reference(net):
    """The oracle's pass."""
    params, x, _ = arguments(net)
    return oracles.Pass(net, params, x)


@functools.cache
def tagged(net, **options):
    """The tagged loss."""
    return net.tag(EXAMPLES, **options)


@functools.cache
def results(net):
    """Tagged and plain values and gradients, and exact statistics, in one program."""

    def run(*args):
        plain = jax.value_and_grad(net.plain_loss, has_aux=net.aux)(*args)
        seen = tagged(net).value_and_grad(*args)
        return plain, seen, tagged(net, fisher="exact").value_and_grad(*args)[-1]

    return compiled(run)(*arguments(net))


def compiled(run):
    """Compiled in a hurry: every program runs once."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    return jax.jit(run, compiler_options=options)


@pytest.mark.parametrize("net", cases(zoo.NETS, zoo.FAST_NETS), ids=str)
def test_coverage(net):
    layers = tagged(net).layers
    assert {layer.name: layer.kind for layer in layers} == expected_kinds(net)
    params = net.params()
    owned = {path for layer in layers for path in layer.params}
    assert owned == {path.removesuffix(".value") for path in leaves(params)}
    total = sum(layer.elements for layer in layers)
    covered = sum(layer.elements for layer in layers if layer.kind != "diagonal")
    wanted = oracle.covered_share(params, net.diagonal, by_path)
    assert covered / total == wanted
    assert all(layer.note for layer in layers if layer.kind == "diagonal")


@pytest.mark.parametrize("net", cases(zoo.NETS, zoo.FAST_NETS), ids=str)
def test_gradients_and_factors(net):
    """The framework's network, its gradient, and the statistics of every layer.

    In one test, because its programs are the same: the reference first, then what the
    library makes of the framework's own.
    """
    check_reference(net)
    wanted, (value, grads, empirical), exact = results(net)
    close((value, grads), wanted, 1e-10)
    check(net, empirical, y=arguments(net)[-1])
    check(net, exact, fisher="exact")


def check_reference(net):
    """It computes the same, and its rows and cotangents give back the gradient."""
    params, x, y = arguments(net)
    forward = functools.partial(net.forward, hook=oracles.no_hook)

    def run(params, x):
        def loss(params):
            return oracles.mean_loss(net.likelihood, forward(params, x), y)

        return net.traced(params, x), forward(params, x), jax.grad(loss)(params)

    output, again, grads = compiled(run)(params, x)
    output = output[0] if net.aux else output
    assert output.dtype == jnp.float64
    close(output, again)
    for name in net.layers:
        close(oracle.gradient(reference(net), name, y), canonical(net, name, grads))


def check(net, statistics, **options):
    """Every field of every layer's statistics."""
    for name in net.layers:
        wanted = oracle.statistics(reference(net), name, **options)
        seen = {field: getattr(statistics[name], field) for field in wanted}
        close(seen, wanted, 1e-9)


SHARING = ["positions_mlp", "twice", "twice_pooled", "conv_twice", "time_major"]
SHARING += ["time_major_then_not", "simple", "gru", "gru_lm", "lstm", "optimized_lstm"]
SHARING += ["fused_qkv", "layers_scan", "experts", "separable", "conv_transpose"]
SHARED = [net for net in zoo.NETS if net.name.split("-")[0] in SHARING]
FAST_SHARED = [net for net in zoo.FAST_NETS if net in SHARED]


@pytest.mark.parametrize("net", cases(SHARED, FAST_SHARED), ids=str)
def test_reduced_factors(net):
    """One row per example, over all positions, sites and time steps."""
    *_, y = args = arguments(net)
    losses = [tagged(net, fisher=f, weight_sharing="reduce") for f in FISHERS]
    run = compiled(lambda *args: [t.value_and_grad(*args)[-1] for t in losses])
    for fisher, seen in zip(FISHERS, run(*args), strict=True):
        check(net, seen, y=y, fisher=fisher, sharing="reduce")


@pytest.mark.parametrize("net", cases(zoo.HALF_NETS, zoo.HALF_NETS[:1]), ids=str)
def test_half_precision(net):
    """Gradients of the network's own precision, factors in float32."""
    args = (net.params(jnp.float32), *net.batch(EXAMPLES, jnp.float32))
    tagged_loss = net.tag(EXAMPLES, jnp.float32)
    assert {t.name: t.kind for t in tagged_loss.layers} == expected_kinds(net)
    _, grads, statistics = jax.jit(tagged_loss.value_and_grad)(*args)
    close(grads, jax.jit(jax.grad(net.plain_loss))(*args), 0.02)
    run = oracles.Pass(net, *arguments(net)[:2])
    for name in net.layers:
        wanted = oracle.statistics(run, name, arguments(net)[-1])
        seen = statistics[name]
        assert seen.a.dtype == seen.g.dtype == jnp.float32
        close({"a": seen.a, "g": seen.g}, wanted, 0.05)


HIDDEN = [net for net in zoo.NETS if net.name.startswith("custom_vjp_hidden")]


@pytest.mark.parametrize("net", HIDDEN, ids=str)
def test_hidden_weight_says_why(net):
    notes = {layer.name: layer.note for layer in tagged(net).layers}
    assert all("custom_vjp" in notes[name] for name in net.diagonal)
