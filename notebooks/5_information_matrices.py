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
# # Information matrices and the tangent kernel
#
# Several matrices go by the name of curvature: the Hessian of the loss, the generalised
# Gauss-Newton matrix, the Fisher matrix, its estimate with sampled labels, the
# "empirical" Fisher matrix, and the covariance of the gradients. `kfac.curvature` has
# all of them as operators with the same verbs, full or in the approximations that
# optimisers use. The network here is so small that every matrix can be formed and
# looked at. Then `kfac.ntk`, which sees the Fisher matrix from the side of the outputs.
#
# The data are digits of scikit-learn, averaged to 4 × 4 pixels. Numbers are float64.

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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import kfac_jax_lite as kfac

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.dpi": 72})

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images = images[order].reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) / 16
x, y = jnp.asarray(images[:200]), jnp.asarray(labels[order][:200])


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    logits = kfac.categorical(hidden @ params["out"]["w"] + params["out"]["b"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_params(seed):
    one, two = jax.random.split(jax.random.key(seed))
    return {
        "hidden": {"w": jax.random.normal(one, (16, 8)) / 4, "b": jnp.zeros(8)},
        "out": {"w": jax.random.normal(two, (8, 10)) / 8**0.5, "b": jnp.zeros(10)},
    }


params = make_params(0)
tagged = kfac.tag(loss_fn, params, x, y)
print(tagged)

# %% [markdown]
# The matrices are looked at after a few steps. With the right model at its true
# parameters and very many data they would all agree; this is neither.

# %%
tx = kfac.kfac(tagged.layers, learning_rate=0.1, damping=0.03)


@jax.jit
def step(params, opt_state):
    loss, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=opt_state)
    updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
    return optax.apply_updates(params, updates), opt_state, loss


opt_state = tx.init(params)
for _ in range(15):
    params, opt_state, loss = step(params, opt_state)
print(f"loss {loss:.4f}, {sum(p.size for p in jax.tree.leaves(params))} parameters")

# %% [markdown]
# ## Six matrices

# %%
batches = [(x, y)]
matrices = {
    "Hessian": kfac.curvature.hessian(tagged, params, batches),
    "Gauss-Newton": kfac.curvature.ggn(tagged, params, batches),
    "Fisher": kfac.curvature.fisher(tagged, params, batches),
    "Fisher, sampled labels": kfac.curvature.mc_fisher(
        tagged, params, batches, key=jax.random.key(0)
    ),
    "empirical Fisher": kfac.curvature.empirical_fisher(tagged, params, batches),
    "gradient covariance": kfac.curvature.gradient_covariance(tagged, params, batches),
}
dense = {name: np.asarray(op.to_dense()) for name, op in matrices.items()}

figure, axes = plt.subplots(2, 3, figsize=(9, 6), layout="constrained")
for ax, (name, m) in zip(axes.flat, dense.items(), strict=True):
    shown = ax.imshow(np.log10(np.abs(m) + 1e-12), vmin=-6, vmax=-1)
    ax.set(title=name, xticks=[], yticks=[])
figure.colorbar(shown, ax=axes, label="log10 of the magnitude", shrink=0.6)
plt.show()

# %% [markdown]
# The blocks are, from the top, bias and weights of the hidden layer, then of the last
# one. How far are the matrices from each other? The distance `‖M₁ − M₂‖ / ‖M₂‖` in the
# Frobenius norm, and the cosine between the natural gradients that they give with a
# damping of 0.1.

# %%
fisher = dense["Fisher"]
gradient = ravel_pytree(jax.grad(loss_fn)(params, x, y))[0]


def direction(m, damping=0.1):
    return np.linalg.solve(m + damping * np.eye(len(m)), gradient)


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


print(f"{'':24} distance to Fisher   cosine of the natural gradients")
for name, m in dense.items():
    gap = np.linalg.norm(m - fisher) / np.linalg.norm(fisher)
    print(f"{name:24} {gap:18.3f}   {cosine(direction(m), direction(fisher)):12.3f}")

# %% [markdown]
# Gauss-Newton and Fisher are the same matrix for the likelihoods that are marked here.
# The Hessian differs by the curvature of the network itself, and may have negative
# eigenvalues. The empirical Fisher matrix takes the labels of the data where the Fisher
# matrix takes the model's: the two agree only as far as the model is right about its
# labels. The covariance is the empirical Fisher matrix without the mean gradient, whose
# share shrinks as training goes on.
#
# ## Spectra
#
# `eigenvalues()` forms the matrix. For large networks `eigsh` gives the ends of the
# spectrum and `kfac.curvature.spectra` its density, from products alone.

# %%
figure, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
for name, op in matrices.items():
    if name == "Gauss-Newton":  # the Fisher matrix
        continue
    values = op.eigenvalues()
    (line,) = ax.semilogy(np.maximum(values, 1e-12), label=name)
    if values[-1] < -1e-9:
        negative = np.where(values < -1e-9, -values, np.nan)
        ax.semilogy(negative, ":", color=line.get_color(), label=f"{name}, −λ")
ax.set(xlabel="index", ylabel="eigenvalue", ylim=(1e-9, None))
ax.legend(fontsize=8)
plt.show()

# %%
top = matrices["Fisher"].eigsh(3, jax.random.key(0))
print("largest, from products: ", np.array2string(top.values, precision=6))
exact = matrices["Fisher"].eigenvalues()
print("largest, by eigh:       ", np.array2string(exact[:3], precision=6))
for damping in (1e-1, 1e-2, 1e-3, 1e-4):
    dimension = kfac.curvature.measures.effective_dimension(matrices["Fisher"], damping)
    print(f"directions steeper than {damping:<6g}: {dimension.value:6.1f}")

# %% [markdown]
# ## What the approximations keep
#
# The same Fisher matrix with less of its structure: layers apart from each other; each
# layer a Kronecker product; that with exact second moments in its eigenbasis; blocks
# for units; the diagonal.

# %%
names = ("block_diagonal", "kronecker", "ekfac", "unit_wise", "diagonal")
kept = {n: kfac.curvature.fisher(tagged, params, batches, n) for n in names}
print(f"{'':16} distance   cosine of the natural gradients")
for name, op in kept.items():
    m = np.asarray(op.to_dense())
    gap = np.linalg.norm(m - fisher) / np.linalg.norm(fisher)
    print(f"{name:16} {gap:8.3f}   {cosine(direction(m), direction(fisher)):12.3f}")

figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
for ax, name in zip(axes, ("block_diagonal", "kronecker", "diagonal"), strict=True):
    m = np.asarray(kept[name].to_dense())
    ax.imshow(np.log10(np.abs(m) + 1e-12), vmin=-6, vmax=-1)
    ax.set(title=name, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## The tangent kernel has the same eigenvalues
#
# Let `K` be the Jacobian of a batch's outputs, whitened by the likelihood: a row for
# each output, a column for each parameter. Then the Fisher matrix is `Kᵀ K` and the
# tangent kernel, in the metric of the outputs, is `K Kᵀ`: both have the same
# eigenvalues but for zeros. With fewer outputs than parameters the second is the
# smaller one.

# %%
few = x[:12], y[:12]
of_kernel = kfac.ntk.eigenvalues(tagged, params, few, independent=True)
of_fisher = kfac.curvature.fisher(tagged, params, [few]).eigenvalues()
print(f"kernel {len(of_kernel)} eigenvalues, Fisher matrix {len(of_fisher)}")
gap = np.abs(np.asarray(of_kernel) - of_fisher[: len(of_kernel)]).max()
print(f"largest difference {gap:.1e}, the largest eigenvalue is {of_fisher[0]:.3g}")
assert gap < 1e-10 * of_fisher[0]

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
axes[0].semilogy(np.maximum(of_fisher, 1e-20), label=f"Fisher, {len(of_fisher)}")
axes[0].semilogy(np.maximum(of_kernel, 1e-20), "--", label=f"kernel, {len(of_kernel)}")
axes[0].set(xlabel="index", ylabel="eigenvalue", ylim=(1e-12, None))
axes[0].legend()
by_label = jnp.argsort(y[:60])
some = x[:60][by_label], y[:60][by_label]
kernel = kfac.ntk.kernel(tagged, params, some, trace=True, independent=True)
axes[1].imshow(np.asarray(kernel))
axes[1].set(title="kernel of 60 digits, by label", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## The dual solution is the primal one
#
# `kfac.ntk.dual_natural_gradient` solves `(F + λI)⁻¹ ∇L` through the kernel, and so in
# the space of the outputs. Beside it the solution with the dense Fisher matrix.

# %%
grads = jax.grad(loss_fn)(params, *few)
matrix = np.asarray(kfac.curvature.fisher(tagged, params, [few]).to_dense())
print("damping   difference, relative   Kronecker's cosine with the exact one")
for damping in (1.0, 1e-2, 1e-4, 1e-6):
    dual = kfac.ntk.dual_natural_gradient(tagged, damping, independent=True)
    updates, _ = dual.update(grads, dual.init(params), params, batch=few)
    found = ravel_pytree(updates)[0]
    g = ravel_pytree(grads)[0]
    wanted = np.linalg.solve(matrix + damping * np.eye(len(matrix)), g)
    gap = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    product = kfac.curvature.fisher(tagged, params, [few], "kronecker").to_dense()
    rough = np.linalg.solve(np.asarray(product) + damping * np.eye(len(matrix)), g)
    print(f"{damping:7.0e}   {gap:20.1e}   {cosine(rough, wanted):12.3f}")
    assert gap < 1e-6, damping

# %% [markdown]
# So where a batch has fewer outputs than the network has parameters, the exact natural
# gradient is there for the price of a small linear system. The last notebook solves a
# differential equation with it.
