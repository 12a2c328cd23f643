"""The table of small networks that drives the tests: every form a layer can take."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.networks import Model, dense, weight, with_head
from tests.oracles import Conv, Dense, ScaleShift, no_hook

# ---------------------------------------------------------------- dense


def mlp(name="mlp", sizes=(4, 5, 3), bias=True, positions=(), act=jnp.tanh, **more):
    """A multilayer perceptron; ``positions`` adds axes behind the example axis."""
    names = [f"layer{i}" for i in range(len(sizes) - 1)]

    def init(rng):
        return {
            n: {"kernel": weight(rng, i, o), "bias": weight(rng, o)}
            if bias
            else {"kernel": weight(rng, i, o)}
            for n, i, o in zip(names, sizes[:-1], sizes[1:], strict=True)
        }

    def forward(p, x, hook):
        for n in names[:-1]:
            x = act(dense(p[n], x, hook, n))
        return dense(p[names[-1]], x, hook, names[-1])

    return Model(
        name, init, forward, (*positions, sizes[0]), dict.fromkeys(names, Dense(bias)),
        outputs=sizes[-1], terms=positions, **more,
    )  # fmt: skip


def tuples():
    """Parameters as a list of ``(w, b)``: layers named by their position."""

    def init(rng):
        return [(weight(rng, i, o), weight(rng, o)) for i, o in [(4, 5), (5, 3)]]

    def forward(p, x, hook):
        x = jnp.tanh(hook("0", x, x @ p[0][0] + p[0][1]))
        return hook("1", x, x @ p[1][0] + p[1][1])

    return Model("tuples", init, forward, (4,), {"0": Dense(), "1": Dense()})


def flat():
    """Parameters at the top level; the first without bias."""

    def init(rng):
        return {"w": weight(rng, 4, 5), "v": weight(rng, 5, 3), "b": weight(rng, 3)}

    def forward(p, x, hook):
        x = jnp.tanh(hook("w", x, x @ p["w"]))
        return hook("v", x, x @ p["v"] + p["b"])

    return Model("flat", init, forward, (4,), {"w": Dense(False), "v": Dense()})


def transposed():
    """``x @ w.T + b``."""
    return with_head(
        "transposed",
        lambda p, x, hook: hook("layer", x, x @ p["w"].T + p["b"]),
        lambda rng: {"w": weight(rng, 5, 4), "b": weight(rng, 5)},
        5, (4,), Dense(),
    )  # fmt: skip


def einsum(name, equation, shape):
    """A dense layer written as an einsum."""
    return with_head(
        name,
        lambda p, x, hook: hook("layer", x, jnp.einsum(equation, x, p["w"]) + p["b"]),
        lambda rng: {"w": weight(rng, *shape), "b": weight(rng, 5)},
        5, (4,), Dense(),
    )  # fmt: skip


def heads_out(positions=3):
    """Dense to several axes: ``[B, T, D] -> [B, T, heads, width]``."""

    def layer(p, x, hook):
        z = jnp.einsum("btd,dhk->bthk", x, p["kernel"]) + p["bias"]
        return hook("layer", x, z).reshape(*x.shape[:2], -1)

    return with_head(
        "heads_out", layer,
        lambda rng: {"kernel": weight(rng, 4, 2, 3), "bias": weight(rng, 2, 3)},
        6, (positions, 4), Dense(out_axes=2),
    )  # fmt: skip


def heads_in(positions=3):
    """Dense from several axes: ``[B, T, heads, width] -> [B, T, D]``."""

    def layer(p, x, hook):
        z = jnp.einsum("bthk,hkd->btd", x, p["kernel"]) + p["bias"]
        return hook("layer", x, z)

    return with_head(
        "heads_in", layer,
        lambda rng: {"kernel": weight(rng, 2, 3, 5), "bias": weight(rng, 5)},
        5, (positions, 2, 3), Dense(in_axes=2),
    )  # fmt: skip


def linen_dense_general():
    """Flax's ``DenseGeneral``, contracting two axes into two."""
    module = nn.DenseGeneral((2, 3), axis=(-2, -1), param_dtype=jnp.float64)

    def layer(p, x, hook):
        z = jnp.einsum("btij,ijhk->bthk", x, p["kernel"]) + p["bias"]
        return hook("layer", x, z).reshape(*x.shape[:2], -1)

    return with_head(
        "linen_dense_general", layer,
        lambda rng: {"kernel": weight(rng, 2, 2, 2, 3), "bias": weight(rng, 2, 3)},
        6, (3, 2, 2), Dense(in_axes=2, out_axes=2),
        traced=lambda p, x: module.apply({"params": p}, x).reshape(*x.shape[:2], -1),
    )  # fmt: skip


def reshaped():
    """A weight kept as ``[in, heads, width]`` and used as a matrix."""

    def layer(p, x, hook):
        return hook("layer", x, x @ p["w"].reshape(4, 6) + p["b"].reshape(6))

    return with_head(
        "reshaped", layer,
        lambda rng: {"w": weight(rng, 4, 2, 3), "b": weight(rng, 2, 3)},
        6, (4,), Dense(),
    )  # fmt: skip


def simple(p, x, hook=no_hook):
    """The plain layer that the wrapped forms below stand for."""
    return dense(p, x, hook, "layer")


def simple_init(rng):
    """Parameters of ``simple``."""
    return {"kernel": weight(rng, 4, 5), "bias": weight(rng, 5)}


def wrapped(name, traced, x_shape=(4,)):
    """``simple`` in a wrapper that the interpreter has to look into."""
    return with_head(name, simple, simple_init, 5, x_shape, Dense(), traced=traced)


def in_cond(p, x):
    """Both branches call the layer."""
    finite = jnp.isfinite(x).all()
    return jax.lax.cond(finite, simple, lambda p, x: -simple(p, x), p, x)


def twice():
    """One square layer called two times."""

    def layer(p, x, hook):
        x = jnp.tanh(dense(p, x, hook, "layer"))
        return dense(p, x, hook, "layer")

    return with_head(
        "twice", layer,
        lambda rng: {"kernel": weight(rng, 4, 4), "bias": weight(rng, 4)},
        4, (4,), Dense(),
    )  # fmt: skip


def recurrent():
    """``scan`` over time with constant weights; the oracle unrolls it."""

    def cell(p, h, x, hook):
        joined = jnp.concatenate([h, x], -1)
        return jnp.tanh(dense(p, joined, hook, "layer"))

    def layer(p, x, hook):
        h = jnp.zeros((x.shape[0], 3), x.dtype)
        for t in range(x.shape[1]):
            h = cell(p, h, x[:, t], hook)
        return h

    def scanned(p, x):
        h = jnp.zeros((x.shape[0], 3), x.dtype)
        step = lambda h, x: (cell(p, h, x, no_hook), None)  # noqa: E731
        return jax.lax.scan(step, h, jnp.swapaxes(x, 0, 1))[0]

    return with_head(
        "recurrent", layer,
        lambda rng: {"kernel": weight(rng, 5, 3), "bias": weight(rng, 3)},
        3, (4, 2), Dense(), traced=scanned,
    )  # fmt: skip


# ---------------------------------------------------------------- convolutions

_SPACE = "HWD"


def convolution(
    name="conv", kernel=(3, 3), channels=2, features=4, size=5, strides=1, padding=1,
    lhs=1, rhs=1, groups=1, bias=True, order=None,
):  # fmt: skip
    """One convolution and a head; channels last unless ``order`` says otherwise."""
    rank = len(kernel)
    space = _SPACE[:rank]
    last = (f"N{space}C", f"{space}IO", f"N{space}C")
    order = order or last

    def many(v):
        return v if isinstance(v, tuple) else (v,) * rank

    pads = tuple(q if isinstance(q, tuple) else (q, q) for q in many(padding))
    spec = Conv(
        kernel, many(strides), pads, many(lhs), many(rhs), groups=groups, bias=bias
    )

    def moved(x, source, target):
        return jnp.transpose(x, [source.index(axis) for axis in target])

    def init(rng):
        w = weight(rng, *kernel, channels // groups, features)
        w = np.transpose(w, [last[1].index(axis) for axis in order[1]])
        return {"kernel": w} | ({"bias": weight(rng, features)} if bias else {})

    def layer(p, x, hook):
        z = jax.lax.conv_general_dilated(
            moved(x, last[0], order[0]), p["kernel"], spec.strides, pads,
            lhs_dilation=spec.lhs_dilation, rhs_dilation=spec.rhs_dilation,
            dimension_numbers=order, feature_group_count=groups,
        )  # fmt: skip
        if bias:
            shape = [features if axis == "C" else 1 for axis in order[2]]
            z = z + p["bias"].reshape(shape)
        return hook("layer", x, moved(z, order[2], last[2]))

    return with_head(name, layer, init, features, ((size,) * rank) + (channels,), spec)


def convolutions():
    """Every form of convolution, a name each."""
    two = functools.partial(convolution, kernel=(2, 3), size=4)
    return [
        convolution("conv1d", (3,)),
        convolution("conv2d"),
        convolution("conv3d", (2, 2, 2), size=3, padding=0),
        two("strides", strides=(2, 1)),
        two("valid", padding=0),
        two("uneven_padding", padding=((0, 2), (1, 0))),
        two("rhs_dilation", rhs=(2, 1), padding=1),
        two("lhs_dilation", lhs=(1, 2), padding=1),
        two("all_dilations", lhs=(2, 1), rhs=(1, 2), strides=2, padding=(1, 2)),
        two("groups", channels=4, groups=2),
        two("depthwise", channels=4, groups=4),
        two("depthwise_multiplier", channels=2, features=4, groups=2),
        two("no_bias", bias=False),
        two("nchw", order=("NCHW", "OIHW", "NCHW")),
        two("nchw_hwio", order=("NCHW", "HWIO", "NHWC")),
        two("chwn", order=("CHWN", "HIOW", "WNCH")),
        two("grouped_nchw", channels=4, groups=2, order=("NCHW", "OIHW", "NCHW")),
    ]


# ---------------------------------------------------------------- norms


def norm(name, axes_of, traced, scale=True, shift=True, x_shape=(3, 4), mean=True):
    """Normalise over ``axes_of(x)``, scale and shift, then a dense head."""
    width = x_shape[-1]

    def init(rng):
        p = {"scale": 1 + 0.1 * weight(rng, width)} if scale else {}
        return p | ({"bias": 0.1 * rng.normal(size=width)} if shift else {})

    def layer(p, x, hook):
        grouped, axes = axes_of(x)
        centre = grouped.mean(axes, keepdims=True) if mean else 0.0
        variance = ((grouped - centre) ** 2).mean(axes, keepdims=True)
        a = ((grouped - centre) / jnp.sqrt(variance + 1e-3)).reshape(x.shape)
        z = a * p["scale"] if scale else a
        return hook("layer", a, z + p["bias"] if shift else z)

    return with_head(
        name, layer, init, width * int(np.prod(x_shape[:-1])), x_shape,
        ScaleShift(scale, shift), traced=traced, pool=False,
    )  # fmt: skip


def norms():
    """Batch, layer, RMS and group norm as Flax Linen writes them."""

    def apply(module, **mutable):
        def run(p, x):
            stats = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
            variables = {"params": p} | ({"batch_stats": stats} if mutable else {})
            out = module.apply(variables, x, **mutable)
            return out[0] if mutable else out

        return run

    def groups(x):
        return x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2), (1, 3)

    def features(x):
        return x, (-1,)

    kw = {"epsilon": 1e-3, "param_dtype": jnp.float64}
    batch = functools.partial(nn.BatchNorm, use_running_average=False, **kw)
    stats = {"mutable": ["batch_stats"]}
    return [
        norm("batch_norm", lambda x: (x, (0, 1)), apply(batch(), **stats)),
        norm("batch_norm_flat", lambda x: (x, (0,)), apply(batch(), **stats),
             x_shape=(4,)),
        norm("layer_norm", features, apply(nn.LayerNorm(**kw))),
        norm("layer_norm_scale", features, apply(nn.LayerNorm(use_bias=False, **kw)),
             shift=False),
        norm("layer_norm_shift", features, apply(nn.LayerNorm(use_scale=False, **kw)),
             scale=False),
        norm("rms_norm", features, apply(nn.RMSNorm(**kw)), shift=False, mean=False),
        norm("group_norm", groups, apply(nn.GroupNorm(num_groups=2, **kw))),
        norm("norm_by_hand", features, None),
    ]  # fmt: skip


def dense_forms():
    """Every form of dense layer, a name each."""
    return [
        mlp(),
        mlp("no_bias_mlp", bias=False),
        mlp("language", (4, 5, 3), positions=(3,)),
        mlp("bernoulli", (4, 3, 5), likelihood="bernoulli"),
        mlp("normal", (4, 3, 2), likelihood="normal", variance=0.5),
        tuples(),
        flat(),
        transposed(),
        einsum("einsum_io", "bi,io->bo", (4, 5)),
        einsum("einsum_oi", "bi,oi->bo", (5, 4)),
        heads_out(),
        heads_in(),
        linen_dense_general(),
        reshaped(),
        twice(),
        recurrent(),
        wrapped("jitted", jax.jit(simple)),
        wrapped("remat", jax.checkpoint(simple)),
        wrapped("remat_in_jit", jax.jit(jax.checkpoint(jax.jit(simple)))),
        wrapped("cond", in_cond),
    ]


MODELS = [*dense_forms(), *convolutions(), *norms()]
BY_NAME = {model.name: model for model in MODELS}
