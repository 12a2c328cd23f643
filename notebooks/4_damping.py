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
# # Damping explored
#
# K-FAC solves `(F + λI) u = ∇L`. The damping `λ` says how far the curvature `F` is
# trusted: where an eigenvalue of `F` is well above `λ` the step is Newton's, where it
# is well below, the step is that of gradient descent with the rate `1/λ`. In this
# library `λ` is added to the Fisher block of the *mean* loss, so it means the same
# whatever the batch size and the number of devices. It is the setting that matters
# most, and the right one differs by orders of magnitude between networks.
#
# Here a network with four layers of weights learns the 8 × 8 digits of scikit-learn,
# with dampings over eight decades.

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
from sklearn.datasets import load_digits

import kfac_jax_lite as kfac

plt.rcParams.update({"figure.dpi": 72, "axes.grid": True, "grid.alpha": 0.3})

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
x_train = jnp.asarray(images[order][:1437] / 16, jnp.float32)
y_train = jnp.asarray(labels[order][:1437], jnp.int32)


def network(params, x):
    *hidden, (w, b) = params
    for weights, bias in hidden:
        x = jnp.tanh(x @ weights + bias)
    return x @ w + b


def loss_fn(params, x, y):
    logits = kfac.categorical(network(params, x))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_params(seed):
    sizes = (64, 32, 32, 32, 10)
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [
        (jax.random.normal(key, (i, o)) / i**0.5, jnp.zeros(o)) for key, i, o in pairs
    ]


BATCH, STEPS = 200, 120
tagged = kfac.tag(loss_fn, make_params(0), x_train[:BATCH], y_train[:BATCH])
print(tagged)

# %% [markdown]
# ## All dampings in one program
#
# The state of the optimiser is a tree of arrays and the damping may be a traced value:
# a whole run is one `lax.scan`, and `lax.map` makes it a run for each damping. The
# trust region (`kl_clip`) is switched off first, to see what the damping does alone.


# %%
def run(make, damping, seed):
    """The loss at the end, and the batches' losses and the dampings, ``[steps]``."""
    tx = make(damping)
    params = make_params(seed)

    def step(carry, key):
        params, opt_state = carry
        rows = jax.random.choice(key, len(x_train), (BATCH,), replace=False)
        x, y = x_train[rows], y_train[rows]
        loss, grads, statistics = tagged.value_and_grad(
            params, x, y, opt_state=opt_state
        )
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        params = optax.apply_updates(params, updates)
        in_force = jnp.asarray(getattr(opt_state, "damping", damping))
        return (params, opt_state), (loss, in_force)

    keys = jax.random.split(jax.random.key(seed), STEPS)
    (params, _), trace = jax.lax.scan(step, (params, tx.init(params)), keys)
    return loss_fn(params, x_train, y_train), *trace


def fixed(kl_clip, damping):
    """K-FAC with a constant damping."""
    return kfac.kfac(tagged.layers, learning_rate=0.1, damping=damping, kl_clip=kl_clip)


dampings = 10.0 ** np.arange(-6, 3)


# Not vmap: two batches of Cholesky factorisations at a time can block each other for
# good on a CPU of two cores (jaxlib 0.10.2).
@functools.partial(jax.jit, static_argnums=0)
def sweep(kl_clip, dampings):
    make = functools.partial(fixed, kl_clip)
    return jax.lax.map(lambda damping: run(make, damping, seed=1), dampings)


final, losses, _ = jax.device_get(sweep(None, jnp.asarray(dampings, jnp.float32)))
bounded, bounded_losses, _ = jax.device_get(
    sweep(1e-3, jnp.asarray(dampings, jnp.float32))
)
print("damping    loss at the end    with the trust region")
for damping, one, two in zip(dampings, final, bounded, strict=True):
    print(f"{damping:7.0e}   {one:16.2e}   {two:22.2e}")

# %%
colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(dampings)))
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
titles = ("no trust region", "kl_clip=1e-3, the default")
for ax, rows, title in zip(axes, (losses, bounded_losses), titles, strict=True):
    for damping, row, colour in zip(dampings, rows, colours, strict=True):
        ax.semilogy(row, color=colour, label=f"{damping:.0e}", linewidth=1)
    ax.set(xlabel="step", title=title, ylim=(1e-4, 30))
axes[0].set(ylabel="loss of the batch")
axes[1].legend(title="damping", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# Too small a damping trusts small eigenvalues that are mostly noise, and the run
# diverges or oscillates; too large a one is slow. The trust region shortens steps that
# the model says go too far, which widens the range of dampings that work, and limits
# how fast the best can be.
#
# ## Damping that tunes itself
#
# `kfac.damping.adaptive` looks at where the last step ended: the slope along it, on the
# next batch, over the slope where it began. Above zero the step stopped short of the
# minimum in its direction, and the damping falls; below zero it went too far, and the
# damping rises. A step that ended far too steep uphill is taken back. It costs two
# inner products. Here it starts from four values over eight decades.

# %%
FIRST = (1e-6, 1e-3, 1.0, 100.0)


def adaptive(first):
    return kfac.kfac(
        tagged.layers, learning_rate=0.1, damping=kfac.damping.adaptive(first)
    )


traces = {
    first: jax.device_get(jax.jit(lambda f=first: run(adaptive, f, seed=1))())
    for first in FIRST
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for first, (_, row, damping) in traces.items():
    axes[0].semilogy(damping, label=f"from {first:g}")
    axes[1].semilogy(row, linewidth=1)
axes[0].set(xlabel="step", ylabel="damping")
axes[1].set(xlabel="step", ylabel="loss of the batch")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# In the run shown, the dampings that start large fall to about 1e-3 within 30 steps.
# Those that start small hardly move: the trust region shortens their steps already.
# Later, with a loss near zero, where batches disagree about the slope, two of the
# dampings jump to the upper bound within ten steps or so, and the training all but
# stands still. A smaller `maximum`, larger batches or a decaying learning rate are ways
# to meet that.
#
# ## Loss against damping
#
# Training loss at the end, for every fixed damping and for each first value of the
# adaptive one.

# %%
figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ax.loglog(dampings, np.clip(final, None, 30), "o-", label="fixed, no trust region")
ax.loglog(dampings, np.clip(bounded, None, 30), "s-", label="fixed, trust region")
ends = [trace[0] for trace in traces.values()]
ax.loglog(FIRST, ends, "D--", label="adaptive, from this value")
ax.set(xlabel="damping", ylabel="training loss at the end")
ax.legend()
plt.show()
for first, end in zip(FIRST, ends, strict=True):
    print(f"adaptive from {first:<6g} loss {end:.2e}")

# %% [markdown]
# One seed, one network and one learning rate: the curves show the shape, not a ranking.
# The damping study in `experiments/studies/results` tunes learning rate, decay and
# momentum for each damping.
