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
# # Eight devices in one notebook
#
# JAX can divide one processor into several *host devices*. They are no faster, but they
# run the programs that eight accelerators would run, and so show what those programs
# compute and what they send. Here the same ten steps are taken
#
# - on one device with the whole batch,
# - by `jax.jit` with a batch that is sharded over eight devices,
# - by `jax.pmap`,
# - by `jax.shard_map`,
#
# and must give the same numbers. Then the notebook counts what travels.

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

DEVICES = 8
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", DEVICES)  # before the library is imported

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import kfac_jax_lite as kfac

plt.rcParams.update({"figure.dpi": 72, "axes.grid": True, "grid.alpha": 0.3})
print(jax.devices())

# %% [markdown]
# ## A network and ten batches of digits

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images = (images[order] / 16).astype(np.float32)
labels = labels[order].astype(np.int32)
STEPS, BATCH = 10, 128
batches = [
    (images[i : i + BATCH], labels[i : i + BATCH])
    for i in range(0, STEPS * BATCH, BATCH)
]


def network(params, x):
    x = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    x = jnp.tanh(x @ params["second"]["w"] + params["second"]["b"])
    return x @ params["out"]["w"] + params["out"]["b"]


def loss_fn(params, x, y):
    logits = kfac.categorical(network(params, x))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_params(seed):
    sizes = {"first": (64, 96), "second": (96, 64), "out": (64, 10)}
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    return {
        name: {
            "w": jax.random.normal(key, shape) / shape[0] ** 0.5,
            "b": jnp.zeros(shape[1]),
        }
        for key, (name, shape) in zip(keys, sizes.items(), strict=True)
    }


params = make_params(0)
tagged = kfac.tag(loss_fn, params, *batches[0])
print(tagged)

# %% [markdown]
# ## One device, and `jit` with a sharded batch
#
# The step is the same function. With a batch that is divided over the devices XLA
# averages what has to be averaged, and it does so inside the conditional of each layer:
# a layer that is not due sends nothing.

# %%
INTERVAL = kfac.intervals.adaptive(0.5, rule="elapsed")
SETTINGS = {"learning_rate": 0.05, "damping": 0.1, "interval": INTERVAL}
tx = kfac.kfac(tagged.layers, **SETTINGS)


@jax.jit
def step(params, opt_state, x, y):
    loss, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=opt_state)
    updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
    return optax.apply_updates(params, updates), opt_state, loss


def train(step, params, opt_state, place=lambda batch: batch):
    """Ten steps; returns losses, parameters and state."""
    losses = []
    for batch in batches:
        params, opt_state, loss = step(params, opt_state, *place(batch))
        losses.append(float(loss))
    return np.array(losses), jax.device_get(params), opt_state


results = {"one device": train(step, params, tx.init(params))}

mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
divided = NamedSharding(mesh, PartitionSpec("batch"))
everywhere = NamedSharding(mesh, PartitionSpec())
start = jax.device_put((params, tx.init(params)), everywhere)
results["jit, sharded batch"] = train(
    step, *start, lambda batch: jax.device_put(batch, divided)
)
for shard in jax.device_put(batches[0][0], divided).addressable_shards[:2]:
    print(f"{shard.device}: rows {shard.index[0]}, shape {shard.data.shape}")

# %% [markdown]
# ## `pmap`
#
# The function is written for one device; the loss and the gradients are averaged by the
# user, the statistics by K-FAC, which has to know the name of the axis.

# %%
pmap_tx = kfac.kfac(tagged.layers, axis_name="batch", **SETTINGS)


@functools.partial(
    jax.pmap, axis_name="batch", in_axes=(None, None, 0, 0), out_axes=None
)
def pmap_step(params, opt_state, x, y):
    loss, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=opt_state)
    loss, grads = jax.lax.pmean((loss, grads), "batch")
    updates, opt_state = pmap_tx.update(grads, opt_state, params, statistics=statistics)
    return optax.apply_updates(params, updates), opt_state, loss


def in_parts(batch):
    """``[devices, examples of each, …]``."""
    return [part.reshape(DEVICES, -1, *part.shape[1:]) for part in batch]


results["pmap"] = train(pmap_step, params, pmap_tx.init(params), in_parts)

# %% [markdown]
# ## `shard_map`
#
# As under `pmap`, but for one trap. With `check_vma=True`, the default, autodiff has
# already *summed* the gradient of parameters that are the same on all devices: it is
# divided by their number, not averaged again.


# %%
@jax.jit
@functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec(), *2 * [PartitionSpec("batch")]),
    out_specs=PartitionSpec(),
)
def shard_step(params, opt_state, x, y):
    loss, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=opt_state)
    grads = jax.tree.map(lambda g: g / DEVICES, grads)
    updates, opt_state = pmap_tx.update(grads, opt_state, params, statistics=statistics)
    params = optax.apply_updates(params, updates)
    return params, opt_state, jax.lax.pmean(loss, "batch")


results["shard_map"] = train(shard_step, params, pmap_tx.init(params))

# %% [markdown]
# ## The same numbers
#
# The largest difference to one device, after ten steps, over all parameters; and
# relative to the largest change of a parameter since the start. In float32 nothing but
# the order of the sums differs.

# %%
reference = results["one device"][1]


def farthest(one, other):
    """Largest absolute difference between two trees."""
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, other)
    return max(jax.tree.leaves(gaps))


moved = farthest(reference, jax.device_get(params))
print(f"{'':20} last loss   largest difference   relative to the way trained")
for name, (losses, trained, _) in results.items():
    gap = farthest(reference, trained)
    print(f"{name:20} {losses[-1]:9.6f}   {gap:18.1e}   {gap / moved:27.1e}")
    assert gap < 1e-3 * moved, name

# %% [markdown]
# All four agree on when each layer is refreshed, too: the decision is taken from
# averaged statistics, so that it is the same on every device.

# %%
for name, (_, _, state) in results.items():
    counts = {r["name"]: r["refreshes"] for r in kfac.report(jax.device_get(state))}
    print(f"{name:20} refreshes {counts}")

# %% [markdown]
# ## What travels
#
# `kfac.report` counts what the refreshes so far have moved, beside what refreshes at
# every step would have.

# %%
print("layer    refreshes   bytes moved   if refreshed at every step")
for r in kfac.report(results["pmap"][2]):
    print(
        f"{r['name']:8} {r['refreshes']:4} of {r['steps']}   "
        f"{r['bytes_reduced']:11,}   {r['bytes_if_every_step']:26,}"
    )

# %% [markdown]
# `kfac.traffic` lists every collective from the shapes alone, with the event that
# causes it, so the modes of `kfac.Reduction` can be compared before anything is run:
#
# - `"all"`: every device gets all statistics and inverts all layers;
# - `"owner"`: a layer's statistics go to one device, which inverts it and hands the
#   inverse, or rows of the preconditioned gradient, to the others;
# - a precision for the wire, here bfloat16.
#
# Small layers would be treated as in `"all"`; `bucket=0` says that none is small.

# %%
owner = functools.partial(kfac.Reduction, "owner", devices=DEVICES, bucket=0)
options = {
    "all": kfac.Reduction(),
    "all, bfloat16": kfac.Reduction(dtype=jnp.bfloat16),
    "owner, inverses": owner(share="inverses"),
    "owner, gradients": owner(share="gradients"),
}
sent = {}
print("bytes that a device sends     refresh  inversion       step")
for name, reduction in options.items():
    events = dict.fromkeys(("refresh", "inversion", "step"), 0.0)
    for collective in kfac.traffic(tagged.layers, reduction, DEVICES):
        events[collective.event] += collective.sent
    sent[name] = events
    print(f"{name:26} " + " ".join(f"{value:10,.0f}" for value in events.values()))

# %%
figure, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
left = np.zeros(len(sent))
for event in ("refresh", "inversion", "step"):
    width = np.array([events[event] for events in sent.values()]) / 1e3
    ax.barh(list(sent), width, left=left, label=f"per {event}")
    left += width
ax.set(xlabel="kilobytes that a device sends")
ax.invert_yaxis()
ax.legend()
plt.show()

# %% [markdown]
# The bars add up what happens at different times: a refresh only where a layer is due,
# an inversion every `inverse_interval` steps, the last part at every step. Which mode
# is best depends on how often each happens; `kfac.cost_model` reckons with a trace of
# refreshes.
