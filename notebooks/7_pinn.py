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
# # A differential equation, solved by a network
#
# A physics-informed network `u(x)` is trained to satisfy Poisson's equation `−Δu = f`
# on the unit square with `u = 0` on its boundary. The solution here is known, `u* = sin
# πx sin πy`, so the error can be measured. Such losses are badly conditioned, and
# first-order methods need very many steps. Three methods are compared:
#
# - Adam,
# - K-FAC,
# - the exact natural gradient of `kfac.ntk.dual_natural_gradient`, which costs a linear
#   system with as many unknowns as there are points.
#
# Numbers are float64: the last digits are what it is about.

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
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import kfac_jax_lite as kfac

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.dpi": 72, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## The loss
#
# One row of the marked output is the residual at one point: of the equation inside the
# square, of the boundary's value on its rim. The rows are weighted so that the loss is
# half the mean square of the equation plus 100 times that of the boundary.
# `kfac.normal` marks the residuals as the mean of a normal distribution: the Fisher
# matrix is then the Gauss-Newton matrix of the least squares. The Laplacian is taken by
# forward mode, twice.


# %%
def network(params, x):
    *hidden, (w, b) = params
    for weights, bias in hidden:
        x = jnp.tanh(x @ weights + bias)
    return (x @ w + b)[:, 0]


def laplacian(params, x):
    def second(axis):
        along = jnp.zeros_like(x).at[:, axis].set(1)

        def slope(y):
            return jax.jvp(lambda z: network(params, z), (y,), (along,))[1]

        return jax.jvp(slope, (x,), (along,))[1]

    return second(0) + second(1)


def solution(x):
    return jnp.sin(jnp.pi * x[:, 0]) * jnp.sin(jnp.pi * x[:, 1])


def loss_fn(params, x, inside, weight):
    equation = -laplacian(params, x) - 2 * jnp.pi**2 * solution(x)
    rows = weight * jnp.where(inside, equation, network(params, x))
    return 0.5 * jnp.mean(kfac.normal(rows) ** 2)


def points(count):
    """A grid of ``count²`` points inside, and ``count`` on each side."""
    ticks = (np.arange(count) + 0.5) / count
    grid = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    zero, one = np.zeros(count), np.ones(count)
    sides = [(ticks, zero), (ticks, one), (zero, ticks), (one, ticks)]
    x = np.concatenate([grid, *(np.stack(side, -1) for side in sides)])
    inside = np.arange(len(x)) < len(grid)
    rim = 100 * len(x) / (len(x) - len(grid))
    weight = np.sqrt(np.where(inside, len(x) / len(grid), rim))
    return jnp.asarray(x), jnp.asarray(inside), jnp.asarray(weight)


def make_params(seed):
    sizes = (2, 32, 32, 1)
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [
        (jax.random.normal(key, (i, o)) * (2 / (i + o)) ** 0.5, jnp.zeros(o))
        for key, i, o in pairs
    ]


batch = points(12)
tagged = kfac.tag(loss_fn, make_params(0), *batch, fisher="exact")
print(tagged)
print(f"\n{len(batch[0])} points")

# %% [markdown]
# All weights are found through the two derivatives of the Laplacian. The biases become
# layers of their own, because the second derivatives do not see them.
#
# ## Three methods
#
# K-FAC and the natural gradient give a direction; how far to go along it is chosen by
# trying the step sizes 1, 1/2, 1/4, … Seconds are processor seconds of the steps alone,
# without compiling and measuring.


# %%
def best_step(params, direction):
    def moved(rate):
        return jax.tree.map(lambda p, d: p - rate * d, params, direction)

    rates = 2.0 ** -jnp.arange(12)
    losses = jax.lax.map(lambda rate: loss_fn(moved(rate), *batch), rates)
    losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
    return moved(rates[jnp.argmin(losses)])


def adam(learning_rate):
    tx = optax.adam(learning_rate)

    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def kronecker(damping):
    tx = kfac.scale_by_kfac(tagged.layers, damping=damping, factor_decay=0.9)

    def step(params, state):
        _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return best_step(params, updates), state

    return tx, step


def dual(damping):
    tx = kfac.ntk.dual_natural_gradient(tagged, damping, independent=True)

    def step(params, state):
        grads = jax.grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return best_step(params, updates), state

    return tx, step


ticks = jnp.linspace(0, 1, 40)
fine = jnp.stack(jnp.meshgrid(ticks, ticks), -1).reshape(-1, 2)


@jax.jit
def error(params):
    """``‖u − u*‖ / ‖u*‖`` on a finer grid."""
    wanted = solution(fine)
    return jnp.linalg.norm(network(params, fine) - wanted) / jnp.linalg.norm(wanted)


def train(method, steps, every):
    """Records (steps, seconds, error), without compiling and measuring; parameters."""
    tx, step = method

    @jax.jit
    def advance(*carry):
        return jax.lax.fori_loop(0, every, lambda _, carry: step(*carry), carry)

    carry = make_params(0), tx.init(make_params(0))
    jax.block_until_ready(advance(*carry))  # compiles
    seconds, records = 0.0, [(0, 0.0, float(error(carry[0])))]
    for number in range(every, steps + 1, every):
        begin = time.process_time()
        carry = jax.block_until_ready(advance(*carry))
        seconds += time.process_time() - begin
        records.append((number, seconds, float(error(carry[0]))))
    return np.array(records), carry[0]


runs = {
    "Adam": train(adam(1e-2), 2000, 50),
    "K-FAC": train(kronecker(1e-6), 200, 5),
    "natural gradient": train(dual(1e-8), 60, 2),
}
print(f"{'':18} steps   seconds   relative error")
for name, (records, _) in runs.items():
    steps, seconds, gap = records[-1]
    print(f"{name:18} {steps:5.0f}   {seconds:7.2f}   {gap:.1e}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for name, (records, _) in runs.items():
    axes[0].loglog(records[1:, 0], records[1:, 2], label=name)
    axes[1].semilogy(records[:, 1], records[:, 2])
axes[0].set(xlabel="steps", ylabel="relative error")
axes[1].set(xlabel="processor seconds")
axes[0].legend()
plt.show()

# %% [markdown]
# ## Where the errors are
#
# The solution and the pointwise error of each method, each with a scale of its own.

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained")
shape = (len(ticks), len(ticks))
shown = axes[0].imshow(solution(fine).reshape(shape))
axes[0].set(title="solution")
figure.colorbar(shown, ax=axes[0], shrink=0.7)
for ax, (name, (_, params)) in zip(axes[1:], runs.items(), strict=True):
    gap = (network(params, fine) - solution(fine)).reshape(shape)
    most = float(jnp.abs(gap).max())
    shown = ax.imshow(gap, cmap="RdBu", vmin=-most, vmax=most)
    ax.set(title=name)
    figure.colorbar(shown, ax=ax, shrink=0.7, format="%.0e")
for ax in axes:
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
plt.show()

# %% [markdown]
# One seed and one setting for each method. The natural gradient is cheap here because
# there are fewer points than parameters: with many more points this would turn around.
# The study in `experiments/studies/results` tries several settings, adds L-BFGS, and
# gives every method the same processor time.
