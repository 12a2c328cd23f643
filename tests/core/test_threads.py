"""Programs end on two threads: no factorisation waits for XLA's threads in one."""

import os
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.core import threads

INVERSES = ["cholesky", "eigh", "ekfac", "low_rank", "newton_schulz", "auto"]
LAPACK = re.compile(r"= (.*?) custom-call\(.*custom_call_target=\"lapack")

STACKS = """
import sys, jax, jax.numpy as jnp, optax
import kfac_jax_lite as kfac

inverse, form = sys.argv[1:]


def loss(p, x, y):
    def body(h, ws):
        for w in ws:
            h = h + 0.1 * jnp.tanh(h @ w)
        return h, None

    h, _ = jax.lax.scan(body, x, tuple(p["stacks"]))
    logits = kfac.categorical(h @ p["out"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


k = jax.random.split(jax.random.key(0), 5)
p = {"stacks": [jax.random.normal(q, (4, 96, 96)) / 10 for q in k[:3]],
     "out": jax.random.normal(k[3], (96, 4)) / 10}
x = jax.random.normal(k[4], (64, 96))
y = jnp.argmax(x[:, :4], -1)
tagged = kfac.tag(loss, p, x, y)
tx = kfac.kfac(tagged.layers, 0.05, damping=0.1, inverse=inverse)


def train(p):
    def step(carry, _):
        p, s = carry
        value, g, st = tagged.value_and_grad(p, x, y, opt_state=s)
        u, s = tx.update(g, s, p, statistics=st)
        return (optax.apply_updates(p, u), s), value

    return jax.lax.scan(step, (p, tx.init(p)), None, 4)[1]


if form == "vmap":
    p = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 1.1 * x]), p)
    train = jax.vmap(train)
assert bool(jnp.isfinite(jax.jit(train)(p)).all())
print("done")
"""

DEVICES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax
import kfac_jax_lite as kfac

print(os.environ["NPROC"], len(jax.devices()))
"""


def run(program, *args, **environment):
    """A program's output; a program that does not end fails here."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    kept = {k: v for k, v in kept.items() if k != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("form", ["stack", "vmap"])
@pytest.mark.parametrize("inverse", INVERSES)
def test_a_training_on_two_threads_ends(inverse, form):
    assert "done" in run(STACKS, inverse, form, NPROC="2")


def lapack_calls(inverse, mapped):
    """Shapes of what LAPACK computes in an update, as XLA compiles it for a CPU."""

    def loss(p, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])
        return jnp.mean(jnp.sum(kfac.normal(h @ p["out"]) ** 2, -1))

    p = {"stack": jnp.ones((3, 70, 70)), "out": jnp.ones((70, 2))}
    x = jnp.ones((5, 70))
    tagged = kfac.tag(loss, p, x)
    tx = kfac.scale_by_kfac(tagged.layers, inverse=inverse)

    def step(p, x):
        s = tx.init(p)
        _, g, statistics = tagged.value_and_grad(p, x, opt_state=s)
        return tx.update(g, s, p, statistics=statistics)

    if mapped:
        step, p = jax.vmap(step, (0, None)), jax.tree.map(lambda x: x[None], p)
        p = jax.tree.map(lambda x: jnp.repeat(x, 2, 0), p)
    return LAPACK.findall(jax.jit(step).lower(p, x).compile().as_text())


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("inverse", INVERSES)
def test_lapack_takes_one_matrix_at_a_time(inverse, mapped):
    found = lapack_calls(inverse, mapped)
    assert bool(found) == (inverse in ("eigh", "ekfac", "low_rank"))
    for shapes in found:
        sizes = re.findall(r"f(?:32|64)\[([\d,]*)\]", shapes)
        assert max(len(s.split(",")) for s in sizes) == 2, shapes


def test_devices_that_are_more_than_the_cores_get_threads():
    """However many cores there are: the flag asks for at least eight devices."""
    out = run(DEVICES)
    assert out.split() == ["16", "8"] or threads.usable_cores() >= 8
    assert run(DEVICES, NPROC="9").split() == ["9", "8"]


def test_few_threads_are_named_once(monkeypatch):
    """Not in this suite, whose set-up has enough; nor for what is only traced."""
    params = {"w": jnp.ones((2, 2))}
    tagged = kfac.tag(
        lambda p, x: jnp.mean(kfac.normal(x @ p["w"])), params, params["w"]
    )
    tx = kfac.scale_by_kfac(tagged.layers)
    tx.init(params)
    monkeypatch.setenv("NPROC", "3")
    threads.warn_once.cache_clear()
    jax.eval_shape(tx.init, params)
    with pytest.warns(UserWarning, match="8 CPU devices share 3 threads.*NPROC=16"):
        tx.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.init(params)


def test_threads_of_the_blas_are_the_users_if_a_variable_says_so():
    """The limit is set where a factorisation is traced, and nowhere else."""
    program = """
import ctypes, glob, os, jax, scipy
from kfac_jax_lite.core import linalg
folder = os.path.join(os.path.dirname(scipy.__file__), "..", "scipy.libs")
paths = glob.glob(folder + "/*openblas*")
count = lambda: [ctypes.CDLL(p).scipy_openblas_get_num_threads() for p in paths]
x = jax.numpy.eye(3)
linalg.spd_inverse(x)
before = count()
linalg.eigh(x)
print(before, count())
"""
    assert run(program, OPENBLAS_NUM_THREADS="2").strip() in ("[2] [2]", "[] []")
    before, after = run(program).strip().split("] ")
    assert after in ("[1]", "[]")
    assert before != "[1" or threads.usable_cores() == 1
