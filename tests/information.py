"""Information matrices written down densely, with explicit Jacobians and numpy.

Nothing here knows of the package's products, layouts or statistics: a row's Jacobian is
``jax.jacrev`` of the network, its ``Λ`` is written out, blocks are told apart by the
names of the parameters, and Kronecker factors come from ``oracles.Pass``.
"""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

import kfac_jax_lite as kfac
from kfac_jax_lite.core.likelihoods import sampled_cotangent
from tests import models, oracles
from tests.networks import Model, head, weight
from tests.oracles import Dense, ScaleShift, no_hook

LAWS = (
    "hessian",
    "ggn",
    "fisher",
    "mc_fisher",
    "empirical_fisher",
    "gradient_covariance",
)
APPROXIMATIONS = (
    "full",
    "block_diagonal",
    "kronecker",
    "ekfac",
    "diagonal",
    "unit_wise",
)
SAMPLES = 2
VOCABULARY = 4


def embedding():
    """A table, layer norm by hand and a head; tokens are made of the first input."""

    def tokens(x):
        return jnp.floor(jnp.abs(x[:, 0]) * 5).astype(int) % VOCABULARY

    def rest(p, z, hook):
        centre = z.mean(-1, keepdims=True)
        deviation = jnp.sqrt(((z - centre) ** 2).mean(-1, keepdims=True) + 1e-3)
        a = (z - centre) / deviation
        z = hook("norm", a, a * p["norm"]["scale"] + p["norm"]["bias"])
        a = jnp.tanh(z)
        return hook("head", a, a @ p["head"]["kernel"] + p["head"]["bias"])

    def forward(p, x, hook):
        one_hot = jax.nn.one_hot(tokens(x), VOCABULARY, dtype=x.dtype)
        return rest(p, hook("table", one_hot, one_hot @ p["table"]["kernel"]), hook)

    def traced(p, x):
        return rest(p, p["table"]["kernel"][tokens(x)], no_hook)

    def init(rng):
        norm = {"scale": 1 + 0.1 * weight(rng, 3), "bias": 0.1 * weight(rng, 3)}
        table = {"kernel": weight(rng, VOCABULARY, 3)}
        return {"table": table, "norm": norm, "head": head(rng, 3)}

    layers = {"table": Dense(False), "norm": ScaleShift(), "head": Dense()}
    return Model("embedding", init, forward, (2,), layers, traced=traced)


def small_convolution():
    """A strided convolution without padding, of few parameters."""
    return models.convolution("small_conv", (2, 2), 1, 2, size=4, strides=2, padding=0)


MODELS = {
    model.name: model
    for model in (
        models.mlp(),
        small_convolution(),
        embedding(),
        models.mlp("bernoulli", (3, 2, 2), likelihood="bernoulli"),
        models.mlp("normal", (3, 2, 2), likelihood="normal", variance=0.5),
        models.mlp("language", (3, 2, 3), positions=(2,)),
    )
}


@dataclasses.dataclass
class Problem:
    """A model at one point with batches of unequal size.

    Attributes:
        model: The model.
        sizes: Examples of the batches.
        key: Of sampled labels.
    """

    model: Model
    sizes: tuple[int, ...] = (2, 3)
    key: int = 5

    def __post_init__(self):
        """Data, and everything explicit on all of it at once."""
        self.params = self.model.params()
        self.batches = [
            self.model.batch(n, seed=3 + i) for i, n in enumerate(self.sizes)
        ]
        joined = [jnp.concatenate(parts) for parts in zip(*self.batches, strict=True)]
        self.x, self.y = joined
        self.tagged = self.model.tag(self.sizes[0])
        self.flat, self.unravel = jax.flatten_util.ravel_pytree(self.params)

    def operator(self, law, approximation="full", **options):
        """What the library makes of it."""
        if law == "mc_fisher":
            options = {"key": jax.random.key(self.key), "num_samples": SAMPLES}
        make = getattr(kfac.curvature, law)
        return make(self.tagged, self.params, self.batches, approximation, **options)

    # ------------------------------------------------------------ the whole matrix

    def output(self, x):
        """``z`` as ``[rows, C]``."""
        z = np.asarray(self.model.forward(self.params, x, no_hook))
        return z.reshape(-1, z.shape[-1])

    def columns(self, law):
        """Square roots in the output: ``[rows, C, columns]``."""
        m, z = self.model, self.output(self.x)
        if law in ("ggn", "fisher"):
            return oracles.output_root(m.likelihood, z, m.variance)
        if law == "mc_fisher":
            return self.draws()
        y = np.asarray(self.y).reshape(len(z), *np.shape(self.y)[len(m.terms) + 1 :])
        return oracles.output_gradient(m.likelihood, z, y, m.variance)[..., None]

    def draws(self):
        """Cotangents for labels drawn with the documented keys, ``[rows, C, S]``."""
        found = []
        for number, (x, _) in enumerate(self.batches):
            key = jax.random.fold_in(jax.random.key(self.key), number)
            z = self.model.forward(self.params, x, no_hook)
            scale = 1.0
            if self.model.likelihood == "normal":  # The mark is on mean / deviation.
                scale = np.sqrt(self.model.variance)
            keys = [jax.random.fold_in(key, s) for s in range(SAMPLES)]
            drawn = [
                sampled_cotangent(
                    self.model.likelihood, z / scale, jax.random.split(k, 1)[0]
                )
                / scale
                for k in keys
            ]
            columns = np.stack(drawn, -1) / np.sqrt(SAMPLES)
            found.append(columns.reshape(-1, *columns.shape[-2:]))
        return np.concatenate(found)

    def full(self, law):
        """``M [P, P]``."""
        if law == "hessian":

            def loss(flat):
                return self.model.plain_loss(self.unravel(flat), self.x, self.y)

            return np.asarray(jax.jit(jax.hessian(loss))(self.flat))
        j = oracles.parameter_jacobian(self.model, self.params, self.x)
        u = np.einsum("ncp,nck->nkp", j, self.columns(law)).reshape(-1, j.shape[-1])
        matrix = u.T @ u / len(j)
        if law == "gradient_covariance":
            return np.cov(u, rowvar=False, bias=True)
        return matrix

    # ------------------------------------------------------------ its blocks

    def labels(self, unit):
        """The block that each parameter is in, by layer or by unit, ``[P]``."""
        found = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            layer, role = path[0].key, path[1].key
            place = np.indices(leaf.shape).reshape(leaf.ndim, -1)
            if not unit:
                place = np.zeros_like(place[0])
            elif layer == "table":
                place = place[0]  # a row of an embedding
            else:
                place = place[-1]  # the output unit, or the channel
            found += [f"{layer}/{k}" for k in place]
            assert role in ("kernel", "bias", "scale")
        return np.array(found)

    def masked(self, matrix, unit):
        """The matrix's diagonal blocks."""
        labels = self.labels(unit)
        return np.where(labels[:, None] == labels, matrix, 0)

    # ------------------------------------------------------------ Kronecker

    def index(self, name):
        """Positions of a layer in homogeneous coordinates, ``[in(+1), out]``."""
        place = self.unravel(np.arange(self.flat.size) * 1.0)[name]
        place = jax.tree.map(lambda x: np.asarray(x).astype(int), place)
        if "scale" in place:
            return np.stack([place["scale"], place["bias"]], -1)
        rows = place["kernel"].reshape(-1, place["kernel"].shape[-1])
        return np.concatenate([rows, place["bias"][None]]) if "bias" in place else rows

    def kronecker(self, law, moments):
        """The block-diagonal matrix of ``kronecker`` or ``ekfac``."""
        matrix, whole = np.zeros((self.flat.size,) * 2), self.full(law)
        found = Pass(self, law) if law in FISHERS else None
        for name, spec in self.model.layers.items():
            index = self.index(name)
            for group in index if isinstance(spec, ScaleShift) else [index]:
                at = np.ix_(group.ravel(), group.ravel())
                block = whole[at]
                if not isinstance(spec, ScaleShift):
                    block = self.product(found, name, block, index.shape, moments)
                matrix[at] = block
        return matrix

    def product(self, found, name, block, shape, moments):
        """One layer's block."""
        if found is None:
            a, g = nearest(block, *shape)
        else:
            a, g = found.factors(name, self.y, "empirical")
        if not moments:
            return np.kron(a, g)
        q = np.kron(np.linalg.eigh(a)[1], np.linalg.eigh(g)[1])
        if found is None:
            return q @ np.diag(np.diag(q.T @ block @ q)) @ q.T
        return q @ np.diag(found.moments(name, q, shape)) @ q.T


FISHERS = ("ggn", "fisher", "mc_fisher", "empirical_fisher")


class Pass(oracles.Pass):
    """A pass whose columns are those of the problem's law."""

    def __init__(self, problem, law):
        """Run it on all batches at once."""
        super().__init__(problem.model, problem.params, problem.x)
        self.problem, self.law = problem, law

    def columns(self, fisher, y=None):
        """``[columns, output shape]``, of the mean loss."""
        del fisher, y
        columns = np.moveaxis(self.problem.columns(self.law), -1, 0)
        return columns.reshape(-1, *self.output.shape) / self.terms

    def moments(self, name, q, shape):
        """``N Σ_r ((Q_A ⊗ Q_G)ᵀ vec(ā cᵀ))²``, row by row."""
        total = np.zeros(shape[0] * shape[1])
        for inputs, cotangents in self.uses(name, "empirical", self.problem.y, None):
            for c in cotangents:
                rows = np.einsum("gnpi,gnpj->gnpij", inputs, c)
                total += np.square(rows.reshape(-1, len(q)) @ q).sum(0)
        return total * self.terms


def nearest(block, size_a, size_g):
    """The nearest Kronecker product of two symmetric matrices, by numpy."""
    r = np.zeros((size_a, size_a, size_g, size_g))
    m = block.reshape(size_a, size_g, size_a, size_g)
    for i in range(size_a):
        for k in range(size_a):
            r[i, k] = (m[i, :, k, :] + m[k, :, i, :]) / 2
    u, s, v = np.linalg.svd(r.reshape(size_a**2, size_g**2))
    a = u[:, 0].reshape(size_a, size_a) * np.sqrt(s[0])
    g = v[0].reshape(size_g, size_g) * np.sqrt(s[0])
    return (a + a.T) / 2, (g + g.T) / 2


def dense(problem, law, approximation):
    """What ``to_dense`` must return."""
    if approximation in ("kronecker", "ekfac"):
        return problem.kronecker(law, approximation == "ekfac")
    matrix = problem.full(law)
    if approximation == "diagonal":
        return np.diag(np.diag(matrix))
    if approximation == "full":
        return matrix
    return problem.masked(matrix, approximation == "unit_wise")


__all__ = ["APPROXIMATIONS", "LAWS", "MODELS", "Problem", "dense"]
