"""Primitive by primitive: ``vmap``'s axis is followed through whatever JAX offers.

The oracle is ``vmap`` itself: the first axis of its result is the axis mapped over, and
no other axis is. Every other axis is as long.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from kfac_jax_lite.tagging import trace  # noqa: F401 (registers the rules)
from kfac_jax_lite.tagging.example_axes import follow, fresh_axes, settled
from kfac_jax_lite.tagging.sites import Plan
from tests.helpers import cases

N = 4


def positive(m):
    """A positive definite matrix."""
    return m @ m.T + jnp.eye(N)


MATRICES = {
    "slogdet": lambda m: jnp.linalg.slogdet(m)[1],
    "det": jnp.linalg.det,
    "inv": jnp.linalg.inv,
    "solve": lambda m: jnp.linalg.solve(m, jnp.ones(N)),
    "solve_of_many": lambda m: jnp.linalg.solve(jnp.ones((N, N)), m),
    "cholesky": lambda m: jnp.linalg.cholesky(positive(m)),
    "eigh": lambda m: jnp.linalg.eigh(positive(m))[1],
    "eigvalsh": lambda m: jnp.linalg.eigvalsh(m),
    "svd": lambda m: jnp.linalg.svd(m)[0],
    "singular_values": lambda m: jnp.linalg.svd(m, compute_uv=False),
    "qr": lambda m: jnp.linalg.qr(m)[1],
    "qr_complete": lambda m: jnp.linalg.qr(m, "complete")[0],
    "pinv": jnp.linalg.pinv,
    "expm": jax.scipy.linalg.expm,
    "lstsq": lambda m: jnp.linalg.lstsq(m, jnp.ones(N))[0],
    "matrix_power": lambda m: jnp.linalg.matrix_power(m, 3),
    "lu": lambda m: jax.scipy.linalg.lu(m)[0],
    "lu_solve": lambda m: jax.scipy.linalg.lu_solve(
        jax.scipy.linalg.lu_factor(m), jnp.ones(N)
    ),
    "cho_solve": lambda m: jax.scipy.linalg.cho_solve(
        jax.scipy.linalg.cho_factor(positive(m)), jnp.ones(N)
    ),
    "solve_triangular": lambda m: jax.scipy.linalg.solve_triangular(m, jnp.ones(N)),
    "solve_triangular_of_many": lambda m: jax.scipy.linalg.solve_triangular(
        jnp.eye(N), m, lower=True
    ),
    "eig": lambda m: jnp.abs(jnp.linalg.eig(m)[0]),
    "schur": lambda m: jax.scipy.linalg.schur(m)[0],
    "hessenberg": lambda m: lax.linalg.hessenberg(m)[0],
    "tridiagonal": lambda m: lax.linalg.tridiagonal(m)[0],
    "polar": lambda m: jax.scipy.linalg.polar(m)[0],
    "sqrtm": lambda m: jax.scipy.linalg.sqrtm(m).real,
    "cg": lambda m: jax.scipy.sparse.linalg.cg(positive(m), jnp.ones(N))[0],
    "gmres": lambda m: jax.scipy.sparse.linalg.gmres(positive(m), jnp.ones(N))[0],
    "bicgstab": lambda m: jax.scipy.sparse.linalg.bicgstab(positive(m), jnp.ones(N))[0],
    "custom_linear_solve": lambda m: lax.custom_linear_solve(
        lambda x: m @ x,
        jnp.ones(N),
        lambda f, b: jnp.linalg.inv(m) @ b,
        symmetric=False,
        transpose_solve=lambda f, b: b,
    ),
    "spectral_norm": lambda m: jnp.linalg.norm(m, 2),
    "cond": jnp.linalg.cond,
    "matrix_rank": lambda m: jnp.linalg.matrix_rank(m) * 1.0,
    "kron": lambda m: jnp.kron(m, m),
    "einsum": lambda m: jnp.einsum("ij,jk->ik", m, m),
    "tensordot": lambda m: jnp.tensordot(m, m),
    "fft2": lambda v: jnp.abs(jnp.fft.fft2(v)),
    "convolve2d": lambda v: jax.scipy.signal.convolve2d(v, v),
    "take_along": lambda m: jnp.take_along_axis(m, jnp.argsort(m, -1), -1),
    "fill_diag": lambda m: jnp.fill_diagonal(m, 0.0, inplace=False),
    "diagonal": jnp.diagonal,
    "trace": jnp.trace,
    "tril": jnp.tril,
    "triu_idx": lambda m: m[jnp.triu_indices(N)],
    "rot": jnp.rot90,
    "apply_along": lambda m: jnp.apply_along_axis(jnp.sum, 0, m),
    "cov": jnp.cov,
    "corrcoef": jnp.corrcoef,
    "attention": lambda m: jax.nn.dot_product_attention(
        m[:, None, :], m[:, None, :], m[:, None, :]
    ),
    "normal_density": lambda m: jax.scipy.stats.multivariate_normal.logpdf(
        jnp.ones(N), jnp.zeros(N), positive(m)
    ),
    "map_coordinates": lambda m: jax.scipy.ndimage.map_coordinates(
        m, [jnp.ones(2) * 0.5, jnp.ones(2)], 1
    ),
    "map_coordinates_at_data": lambda m: jax.scipy.ndimage.map_coordinates(
        jnp.ones((N, N)), [m[0], m[1]], 1
    ),
    "resize": lambda m: jax.image.resize(m, (6, 6), "bilinear"),
    "scale_and_translate": lambda m: jax.image.scale_and_translate(
        m, (5, 5), (0, 1), m[0, :2], m[1, :2], "linear"
    ),
    "maxpool": lambda m: lax.reduce_window(
        m, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID"
    ),
    "avgpool": lambda m: lax.reduce_window(m, 0.0, lax.add, (2, 2), (1, 1), "SAME"),
    "product_pool": lambda m: lax.reduce_window(
        m, 1.0, lax.mul, (2, 2), (1, 1), "SAME"
    ),
    "norm_pool": lambda m: lax.reduce_window(
        m, 0.0, lambda a, b: lax.sqrt(a * a + b * b), (2, 2), (1, 1), "SAME"
    ),
    "max_pool_gradient": jax.grad(
        lambda m: jnp.sin(
            lax.reduce_window(m, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID")
        ).sum()
    ),
    "max_pool_tangent": lambda m: jax.jvp(
        lambda m: lax.reduce_window(m, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID"),
        (m,),
        (m,),
    )[1],
    "max_pool_hessian_product": lambda m: jax.jvp(
        jax.grad(
            lambda m: jnp.sin(
                lax.reduce_window(m, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID")
            ).sum()
        ),
        (m,),
        (m,),
    )[1],
    "average_pool_gradient": jax.grad(
        lambda m: jnp.sin(
            lax.reduce_window(m, 0.0, lax.add, (2, 2), (1, 1), "SAME")
        ).sum()
    ),
    "lax_map": lambda m: lax.map(jnp.sum, m),
    "vmap_in_vmap": lambda m: jax.vmap(jnp.cumsum, 1, 1)(m),
    "conv": lambda m: lax.conv(m[None, None], jnp.ones((2, 1, 2, 2)), (1, 1), "SAME"),
    "conv_of_a_kernel": lambda m: lax.conv(
        jnp.ones((1, 1, 5, 5)), m[None, None], (1, 1), "SAME"
    ),
    "conv_of_both": lambda m: lax.conv(m[None, None], m[None, None], (1, 1), "SAME"),
    "conv_kernel_gradient": lambda m: jax.grad(
        lambda k: jnp.sin(lax.conv(m[None, None], k, (1, 1), "SAME")).sum()
    )(jnp.ones((1, 1, 2, 2))),
    "conv_transpose": lambda m: lax.conv_transpose(
        m[None, :, :, None], jnp.ones((2, 2, 1, 3)), (2, 2), "SAME"
    ),
    "depthwise_conv": lambda m: lax.conv_general_dilated(
        m[None], jnp.ones((N, 1, 2)), (1,), "SAME", feature_group_count=N
    ),
    "conv_patches": lambda m: lax.conv_general_dilated_patches(
        m[None, None], (2, 2), (1, 1), "SAME"
    ),
    "multivariate_normal": lambda m: jax.random.multivariate_normal(
        jax.random.key(0), jnp.zeros(N), positive(m)
    ),
}
VECTORS = {
    "tridiagonal_solve": lambda v: lax.linalg.tridiagonal_solve(
        v, v + 3, v, jnp.ones((N, 1))
    ),
    "cross": lambda v: jnp.cross(v[:3], v[1:]),
    "cumsum": jnp.cumsum,
    "cumprod": jnp.cumprod,
    "cumlogsumexp": lambda v: lax.cumlogsumexp(v),
    "cummax": lax.cummax,
    "diff": jnp.diff,
    "ediff1d": jnp.ediff1d,
    "gradient": jnp.gradient,
    "sort": jnp.sort,
    "argsort": lambda v: jnp.argsort(v) * 1.0,
    "take_argsort": lambda v: v[jnp.argsort(v)],
    "searchsorted": lambda v: jnp.searchsorted(jnp.sort(v), v) * 1.0,
    "median": jnp.median,
    "quantile": lambda v: jnp.quantile(v, 0.3),
    "percentile": lambda v: jnp.percentile(v, 0.3),
    "nanmedian": jnp.nanmedian,
    "lexsort": lambda v: jnp.lexsort((v, v)) * 1.0,
    "unique": lambda v: jnp.unique(v, size=N),
    "histogram": lambda v: jnp.histogram(v, 5)[0] * 1.0,
    "bincount": lambda v: jnp.bincount(v.astype(int), length=5) * 1.0,
    "digitize": lambda v: jnp.digitize(v, jnp.arange(3.0)) * 1.0,
    "interp": lambda v: jnp.interp(v, jnp.arange(3.0), jnp.arange(3.0)),
    "top_k": lambda v: lax.top_k(v, 2)[0],
    "top_k_indices": lambda v: v[lax.top_k(v, 2)[1]],
    "approx_max_k": lambda v: lax.approx_max_k(v, 2)[0],
    "argmax": lambda v: jax.nn.one_hot(jnp.argmax(v), N),
    "where": lambda v: jnp.where(v > 0, v, 0),
    "partition": lambda v: jnp.partition(v, 2),
    "fft": lambda v: jnp.abs(jnp.fft.fft(v)),
    "rfft": lambda v: jnp.abs(jnp.fft.rfft(v)),
    "irfft": lambda v: jnp.fft.irfft(v),
    "fftshift": jnp.fft.fftshift,
    "dct": lambda v: jax.scipy.fft.dct(v),
    "convolve": lambda v: jnp.convolve(v, jnp.ones(2)),
    "convolve_with_itself": lambda v: jnp.convolve(v, v),
    "correlate": lambda v: jnp.correlate(v, v[:2]),
    "fftconvolve": lambda v: jax.scipy.signal.fftconvolve(v, v),
    "dynamic_update_slice": lambda v: lax.dynamic_update_slice(
        jnp.zeros(N), v[:2], (1,)
    ),
    "dynamic_update_slice_at_data": lambda v: lax.dynamic_update_slice(
        v, v[:2], ((v[0] > 0).astype(int),)
    ),
    "dynamic_slice_at_data": lambda v: lax.dynamic_slice(
        v, ((v[0] > 0).astype(int),), (2,)
    ),
    "dynamic_slice": lambda v: lax.dynamic_slice(v, (1,), (2,)),
    "index_by_data": lambda v: v[(v[0] > 0).astype(int)],
    "at_set": lambda v: jnp.zeros(N).at[v.astype(int)].set(v),
    "at_add": lambda v: jnp.zeros(N).at[v.astype(int)].add(1.0),
    "at_add_of_some": lambda v: v.at[jnp.arange(2)].add(1.0),
    "at_mul": lambda v: v.at[0].multiply(2.0),
    "at_max": lambda v: jnp.zeros((N, 2)).at[:, 0].max(v),
    "segment_sum": lambda v: jax.ops.segment_sum(v, v.astype(int), N),
    "segment_max": lambda v: jax.ops.segment_max(v, jnp.array([0, 0, 1, 1]), 2),
    "put_along": lambda v: jnp.put_along_axis(v, jnp.argsort(v), 1.0, 0, inplace=False),
    "take": lambda v: jnp.take(v, v.astype(int)),
    "diag": jnp.diag,
    "select": lambda v: jnp.select([v > 0, v < 0], [v, -v]),
    "piecewise": lambda v: jnp.piecewise(v, [v > 0], [jnp.sin, jnp.cos]),
    "compress": lambda v: jnp.compress(jnp.array([True, False, True, True]), v, size=3),
    "nonzero": lambda v: jnp.nonzero(v > 0, size=2)[0] * 1.0,
    "roll": lambda v: jnp.roll(v, 1),
    "roll_by_data": lambda v: jnp.roll(v, (v[0] > 0).astype(int)),
    "pad": lambda v: jnp.pad(v, 1, mode="edge"),
    "pad_reflect": lambda v: jnp.pad(v, 2, mode="reflect"),
    "repeat": lambda v: jnp.repeat(v, 2),
    "tile": lambda v: jnp.tile(v, 2),
    "stack": lambda v: jnp.stack([v, v]),
    "concatenate": lambda v: jnp.concatenate([v, v]),
    "flip": jnp.flip,
    "split": lambda v: jnp.split(v, 2)[0],
    "outer": lambda v: jnp.outer(v, v),
    "meshgrid": lambda v: jnp.meshgrid(v, v)[0],
    "vander": jnp.vander,
    "polyval": lambda v: jnp.polyval(v, 2.0),
    "broadcast_to": lambda v: jnp.broadcast_to(v, (3, N)),
    "vectorize": lambda v: jnp.vectorize(lambda a, b: a * b)(v, v[:, None]),
    "softmax": jax.nn.softmax,
    "logsumexp": jax.nn.logsumexp,
    "gelu": jax.nn.gelu,
    "std": jnp.std,
    "standardize": jax.nn.standardize,
    "glu": jax.nn.glu,
    "erf": jax.scipy.special.erf,
    "erfinv": jax.scipy.special.erfinv,
    "gammainc": lambda v: jax.scipy.special.gammainc(v, 2.0),
    "gammainc_gradient": jax.grad(lambda v: jax.scipy.special.gammainc(v, 2.0).sum()),
    "betainc": lambda v: jax.scipy.special.betainc(v, 2.0, 0.3),
    "digamma": jax.scipy.special.digamma,
    "polygamma": lambda v: jax.scipy.special.polygamma(1, v),
    "zeta": lambda v: jax.scipy.special.zeta(v, 2.0),
    "i0": jax.scipy.special.i0,
    "i1e": jax.scipy.special.i1e,
    "ndtri": jax.scipy.special.ndtri,
    "expi": jax.scipy.special.expi,
    "exp1": jax.scipy.special.exp1,
    "bessel_j": lambda v: jax.scipy.special.bessel_jn(v[0], v=3),
    "hypergeometric": lambda v: jax.scipy.special.hyp1f1(v, 2.0, 0.3),
    "spence": jax.scipy.special.spence,
    "fresnel": lambda v: jax.scipy.special.fresnel(v)[0],
    "spherical_harmonics": lambda v: (
        jax.scipy.special.sph_harm_y(
            jnp.array([1]), jnp.array([0]), v[:1], v[:1], n_max=2
        ).real
    ),
    "norm_pdf": jax.scipy.stats.norm.logpdf,
    "gamma_pdf": lambda v: jax.scipy.stats.gamma.logpdf(v, 2.0),
    "normal_cdf": lambda v: jax.scipy.stats.norm.cdf(v),
    "rankdata": lambda v: jax.scipy.stats.rankdata(v),
    "density_estimate": lambda v: jax.scipy.stats.gaussian_kde(v)(v),
    "mode": lambda v: jax.scipy.stats.mode(v)[0],
    "trapezoid": lambda v: jax.scipy.integrate.trapezoid(v),
    "scan_outputs": lambda v: lax.scan(lambda c, _: (c * 0.5, c), v, None, 3)[1],
    "top_k_gradient": jax.grad(lambda v: lax.top_k(v, 2)[0].sum()),
    "reduce": lambda v: lax.reduce(v, 1.0, lambda a, b: a * b + 1, (0,)),
    "reduce_of_two": lambda v: lax.reduce(
        (v, v), (1.0, 0.0), lambda a, b: (a[0] * b[0], a[1] + b[1]), (0,)
    )[1],
    "associative_scan": lambda v: lax.associative_scan(jnp.multiply, v),
    "prod_gradient": jax.grad(jnp.prod),
    "cumprod_gradient": jax.grad(lambda v: jnp.cumprod(v).sum()),
    "while_loop": lambda v: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * v), (0, v)
    )[1],
    "while_by_data": lambda v: lax.while_loop(
        lambda c: c.sum() < 3, lambda c: c + jnp.abs(v) + 1, v
    ),
    "fori_loop": lambda v: lax.fori_loop(0, 3, lambda i, c: c.at[i].add(v[i]), v),
    "fori_loop_by_data": lambda v: lax.fori_loop(
        0, (v[0] > 0).astype(int), lambda i, c: c * v, v
    ),
    "scan": lambda v: lax.scan(lambda c, x: (c + x, c * x), 0.0, v)[1],
    "cond": lambda v: lax.cond(v[0] > 0, jnp.sin, jnp.cos, v),
    "switch": lambda v: lax.switch(v[0].astype(int), [jnp.sin, jnp.cos, jnp.exp], v),
    "remat": jax.checkpoint(jnp.sin),
    "custom_jvp": jax.nn.relu6,
    "stop_gradient": lax.stop_gradient,
    "hessian": lambda v: jax.hessian(lambda v: jnp.sin(v).prod())(v),
    "jacfwd": lambda v: jax.jacfwd(jnp.cumsum)(v) * v,
    "jacrev": lambda v: jax.jacrev(lambda v: jnp.sin(jnp.cumsum(v)))(v),
    "optimization_barrier": lax.optimization_barrier,
    "device_put": lambda v: jax.device_put(v) * 1.0,
    "bitcast": lambda v: lax.bitcast_convert_type(v, jnp.int64) * 1.0,
    "bitcast_to_narrower": lambda v: lax.bitcast_convert_type(v, jnp.int32) * 1.0,
    "nextafter": lambda v: jnp.nextafter(v, 0.0),
    "clip": lambda v: jnp.clip(v, 0, 1),
    "round": jnp.round,
    "noise_times_data": lambda v: (
        jax.random.normal(jax.random.fold_in(jax.random.key(0), v[0].astype(int)), (N,))
        * v
    ),
    "noise_by_data": lambda v: jax.random.normal(
        jax.random.fold_in(jax.random.key(0), v[0].astype(int)), (N,)
    ),
    "key_by_data": lambda v: jax.random.uniform(jax.random.key(v[0].astype(int)), (3,)),
    "split_key": lambda v: jax.random.uniform(
        jax.random.split(jax.random.key(v[0].astype(int)))[0], (N,)
    ),
    "raw_key": lambda v: jax.random.uniform(jax.random.PRNGKey(v[0].astype(int)), (N,)),
    "gamma": lambda v: jax.random.gamma(jax.random.key(0), jnp.abs(v)),
    "categorical": lambda v: jax.random.categorical(jax.random.key(0), v) * 1.0,
    "permutation": lambda v: jax.random.permutation(jax.random.key(0), v),
    "permutation_by_data": lambda v: jax.random.permutation(
        jax.random.key(v[0].astype(int)), v
    ),
    "choice": lambda v: jax.random.choice(jax.random.key(v[0].astype(int)), v, (2,)),
    "poisson": lambda v: jax.random.poisson(jax.random.key(0), jnp.abs(v)) * 1.0,
    "beta": lambda v: jax.random.beta(jax.random.key(0), jnp.abs(v), 2.0),
    "dirichlet": lambda v: jax.random.dirichlet(jax.random.key(0), jnp.abs(v)),
    "gumbel": lambda v: jax.random.gumbel(jax.random.key(0), (N,)) * v,
    "truncated_normal": lambda v: jax.random.truncated_normal(
        jax.random.key(0), v, v + 1
    ),
    "orthogonal": lambda v: jax.random.orthogonal(jax.random.key(v[0].astype(int)), N),
    "rbg": lambda v: jax.random.uniform(
        jax.random.key(v[0].astype(int), impl="rbg"), (N,)
    ),
    "binom": lambda v: jax.random.binomial(jax.random.key(0), 5.0, jax.nn.sigmoid(v)),
    "student_t": lambda v: jax.random.t(jax.random.key(0), jnp.abs(v)),
}
FUNCTIONS = {k: (f, (N, N)) for k, f in MATRICES.items()}
FUNCTIONS |= {k: (f, (N,)) for k, f in VECTORS.items()}
# Long programs, which take seconds to trace.
LONG = """
binom density_estimate digitize dirichlet exp1 expi expm fresnel gmres histogram
hypergeometric interp map_coordinates mode ndtri poisson polar rankdata
scale_and_translate spence spherical_harmonics sqrtm
"""
SHORT = [name for name in FUNCTIONS if name not in LONG.split()]


def followed(function, *shapes):
    """Axes of the operands and of the results, in elementary indices."""
    args = [jax.ShapeDtypeStruct(shape, jnp.float64) for shape in shapes]
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    inputs = [fresh_axes(shape) for shape in shapes]
    outputs = follow(jaxpr, Plan(), inputs, {})
    return [[[*map(settled, axes)] for axes in side] for side in (inputs, outputs)]


@pytest.mark.parametrize("name", cases(FUNCTIONS, SHORT))
def test_mapped_axis(name):
    function, shape = FUNCTIONS[name]
    (x,), results = followed(jax.vmap(function, 1), (shape[0], N, *shape[1:]))
    for first, *rest in results:
        assert first == x[1]
        assert x[1] not in rest


def test_the_right_hand_sides_of_one_system():
    """The axis of the unknowns is a new one, that of the right-hand sides is not."""

    def solve(m, x):
        left = lax.linalg.triangular_solve(m, x, left_side=True)
        return left, lax.linalg.triangular_solve(m, x, left_side=False)

    (_, x), (left, right) = followed(solve, (N, N), (N, N))
    assert left[1] == x[1] and left[0] not in x
    assert right[0] == x[0] and right[1] not in x


def test_axes_that_a_factorisation_mixes_are_new():
    (m,), results = followed(
        lambda m: (*lax.linalg.eigh(m), lax.linalg.cholesky(m)), (N, N)
    )
    assert not any(axis in m for axes in results for axis in axes)


def test_ragged_rows():
    """Rows stay rows, whichever group they are in; their sums by group are new."""

    def product(x, w, c):
        sizes = jnp.array([1, 3])
        z = lax.ragged_dot(x, w, sizes)
        return z, jax.grad(lambda w: (lax.ragged_dot(x, w, sizes) * c).sum())(w)

    (x, w, c), (z, grad) = followed(product, (N, 3), (2, 3, N), (N, N))
    assert z == [x[0], w[2]] == c
    assert grad[1:] == w[1:] and grad[0] not in x
