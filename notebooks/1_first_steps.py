# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First steps
#
# K-FAC preconditions the gradient with an approximate inverse of the Fisher matrix: one
# Kronecker product `A ⊗ G` per layer, `A` from the layer's inputs and `G` from the
# gradients of its outputs. In `kfac_jax_lite` this is an ordinary optax transformation.
# Three lines differ from a loop with Adam:
#
# 1. mark the output of the network inside the loss, here with `kfac.categorical`;
# 2. `kfac.tag` the loss, which finds its layers;
# 3. take loss, gradients and curvature statistics from `tagged.value_and_grad`, and
#    hand the statistics to `update`.
#
# The data are the 1,797 handwritten digits of 8 × 8 pixels that come with scikit-learn.

# %%
# On a hosted machine: installs the library, from the checkout around this notebook or
# else from the package index. Does nothing where it is installed already.
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("kfac_jax_lite") is None:
    source = ".." if pathlib.Path("../setup.cfg").exists() else "kfac_jax_lite"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", f"{source}[notebooks]"]
    subprocess.check_call(pip)

# %%
import functools
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import kfac_jax_lite as kfac

plt.rcParams.update({"figure.dpi": 72, "axes.grid": True, "grid.alpha": 0.3})

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images = jnp.asarray(images[order] / 16.0, jnp.float32)
labels = jnp.asarray(labels[order], jnp.int32)
x_train, y_train = images[:1437], labels[:1437]
x_test, y_test = images[1437:], labels[1437:]
print(f"{len(x_train)} digits to train, {len(x_test)} to test")

# %% [markdown]
# ## A loss, and its layers
#
# Any function of parameters and data will do. There is nothing to register in the
# model: the parameters may be any tree of arrays, and the layers are found in the
# program of the loss itself.


# %%
def network(params, x):
    x = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    x = jnp.tanh(x @ params["second"]["w"] + params["second"]["b"])
    return x @ params["out"]["w"] + params["out"]["b"]


def loss_fn(params, x, y):
    logits = kfac.categorical(network(params, x))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_params(seed):
    def layer(key, inputs, outputs):
        w = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
        return {"w": w, "b": jnp.zeros(outputs)}

    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = {"first": (64, 64), "second": (64, 64), "out": (64, 10)}
    return {n: layer(k, *s) for (n, s), k in zip(sizes.items(), keys, strict=True)}


params = make_params(0)
tagged = kfac.tag(loss_fn, params, x_train[:256], y_train[:256])
print(tagged)

# %% [markdown]
# The table says which parameters form a layer and how large its two factors are.
# Weights and bias of a layer belong together: `A` has a row for the bias, 65 instead of
# 64. A parameter that no rule recognises would be listed here as `diagonal`, with the
#     reason.
#
# ## A step

# %%
tx = kfac.kfac(tagged.layers, learning_rate=0.05, damping=0.03)
opt_state = tx.init(params)


@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, opt_state, x, y):
    loss, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=opt_state)
    updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
    return optax.apply_updates(params, updates), opt_state, loss


for number in range(60):
    rows = slice(256 * (number % 5), 256 * (number % 5 + 1))
    params, opt_state, loss = step(tx, params, opt_state, x_train[rows], y_train[rows])
    if number % 10 == 9:
        print(f"step {number + 1:3}   loss {loss:.4f}")
accuracy = jnp.mean(jnp.argmax(network(params, x_test), -1) == y_test)
print(f"test accuracy {accuracy:.1%}")

# %% [markdown]
# `kfac.report` reads the counters of the optimiser: how often a layer was refreshed, at
# which interval, with which damping.

# %%
for record in kfac.report(opt_state):
    names = ("interval", "refreshes", "inversions", "damping", "skipped")
    figures = "   ".join(f"{name} {record[name]:.3g}" for name in names)
    print(f"{record['name']:8} {figures}")

# %% [markdown]
# ## Beside Adam
#
# Both train the same network from the same start on the same batches, and both get four
# learning rates to choose from: the one with the lowest training loss at the end is
# shown. The loss is that of all training digits. Seconds are processor seconds of the
# steps alone, after compilation and without the evaluations: what else the machine does
# then matters little.

# %%
BATCH, STEPS, EVERY = 256, 150, 10


@functools.partial(jax.jit, static_argnums=0)
def adam_step(tx, params, opt_state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


full_loss = jax.jit(loss_fn)


def train(step, tx):
    """Records (steps, seconds, training loss) every few steps."""
    params = make_params(1)
    opt_state = tx.init(params)
    draw = np.random.default_rng(0)
    step(tx, params, opt_state, x_train[:BATCH], y_train[:BATCH])  # compiles
    seconds, curve = 0.0, [(0, 0.0, float(full_loss(params, x_train, y_train)))]
    for number in range(1, STEPS + 1):
        rows = draw.choice(len(x_train), BATCH, replace=False)
        x, y = x_train[rows], y_train[rows]
        begin = time.process_time()
        params, opt_state, loss = step(tx, params, opt_state, x, y)
        jax.block_until_ready(loss)
        seconds += time.process_time() - begin
        if number % EVERY == 0:
            curve.append((number, seconds, float(full_loss(params, x_train, y_train))))
    return np.array(curve), params


def best(step, make, rates):
    """The run whose loss ends lowest, among the learning rates."""
    runs = {rate: train(step, make(rate)) for rate in rates}
    rate = min(runs, key=lambda r: np.nan_to_num(runs[r][0][-1, 2], nan=np.inf))
    return rate, *runs[rate]


found = {
    "Adam": best(adam_step, optax.adam, (3e-3, 1e-2, 3e-2, 1e-1)),
    "K-FAC": best(
        step,
        lambda rate: kfac.kfac(tagged.layers, rate, damping=0.03),
        (0.05, 0.1, 0.2, 0.4),
    ),
}
for name, (rate, curve, trained) in found.items():
    right = jnp.mean(jnp.argmax(network(trained, x_test), -1) == y_test)
    print(
        f"{name:6} rate {rate:<6g} loss {curve[-1, 2]:.2e}   "
        f"{1e3 * curve[-1, 1] / STEPS:.2f} ms per step   test accuracy {right:.1%}"
    )

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
for name, (rate, curve, _) in found.items():
    for ax, column in zip(axes, (0, 1), strict=True):
        ax.semilogy(curve[:, column], curve[:, 2], label=f"{name}, rate {rate:g}")
axes[0].set(xlabel="steps", ylabel="training loss")
axes[1].set(xlabel="processor seconds")
axes[0].legend()
plt.show()

# %% [markdown]
# Against steps K-FAC is ahead. A step of it costs more: statistics, an inversion of
# every factor, and two small matrix products per layer. On a network as tiny as this
# one that overhead weighs most, and per second little or nothing is gained.
# `inverse_interval=10` inverts at every tenth step only, and
# `interval=kfac.intervals.adaptive(0.2)` refreshes a layer only as often as its
# statistics change: the second notebook shows how.
