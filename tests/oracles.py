"""What the library must compute, written down again from the papers' formulas.

Nothing here knows about taps, probes or jaxprs. A model's ``forward(params, x, hook)``
calls ``hook(name, a, z)`` at every site of every layer with the layer's input ``a`` and
its pre-activation ``z`` (examples first, channels last). The oracle adds explicit zero
offsets to the pre-activations, differentiates the network's output with respect to them
with ``jax.jacrev``, and does the rest in float64 numpy with explicit loops.

Conventions (see the design): ``N`` loss terms, rows ``r = 1..R`` at a layer, ``c`` the
cotangent of the *mean* loss, ``A = 1/N sum a a^T``, ``G = N^2/R sum c c^T``.
"""

import collections
import dataclasses
import itertools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

# ---------------------------------------------------------------- layers


@dataclasses.dataclass(frozen=True)
class Dense:
    """``z = a W + b``, with several contracted and several output axes allowed."""

    bias: bool = True
    in_axes: int = 1
    out_axes: int = 1
    kind: str = "dense"

    def rows(self, a):
        """Inputs as [groups=1, examples, positions, in]."""
        return _flatten(a, self.in_axes)[None]

    def cotangents(self, c):
        """Cotangents as [groups=1, examples, positions, out]."""
        return _flatten(c, self.out_axes)[None]


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution in channels-last order, kernel ``[spatial..., in, out]``."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int = 1
    bias: bool = True
    kind: str = "conv"

    def rows(self, a):
        """Patches as [groups, examples, positions, kernel * in]."""
        padded = _dilate_and_pad(a, self.lhs_dilation, self.padding)
        examples, channels = a.shape[0], a.shape[-1]
        taps = np.array(self.kernel)
        reach = (taps - 1) * self.rhs_dilation + 1
        positions = [
            range(0, size - span + 1, stride)
            for size, span, stride in zip(
                padded.shape[1:-1], reach, self.strides, strict=True
            )
        ]
        per_group = channels // self.groups
        out = []
        for group in range(self.groups):
            chosen = slice(group * per_group, (group + 1) * per_group)
            patches = []
            for start in itertools.product(*positions):
                patch = []
                for tap in itertools.product(*map(range, self.kernel)):
                    at = tuple(np.add(start, np.multiply(tap, self.rhs_dilation)))
                    patch.append(padded[(slice(None), *at, chosen)])
                patches.append(np.concatenate(patch, axis=-1))
            if patches:
                out.append(np.stack(patches, axis=1))
            else:
                width = per_group * int(np.prod(self.kernel))
                out.append(np.zeros((examples, 0, width)))
        return np.stack(out)

    def cotangents(self, c):
        """Cotangents as [groups, examples, positions, out / groups]."""
        flat = _flatten(c, 1)
        return np.stack(np.split(flat, self.groups, axis=-1))


@dataclasses.dataclass(frozen=True)
class ScaleShift:
    """``z = scale * a + shift``; the parameters span the last ``axes`` axes."""

    scale: bool = True
    shift: bool = True
    axes: int = 1
    kind: str = "scale_shift"


def _flatten(x, axes):
    x = np.asarray(x, np.float64)
    lead, tail = x.shape[: x.ndim - axes], x.shape[x.ndim - axes :]
    positions = int(np.prod(lead[1:]))
    return x.reshape(lead[0], positions, int(np.prod(tail)))


def _dilate_and_pad(a, dilation, padding):
    a = np.asarray(a, np.float64)
    sizes = (np.array(a.shape[1:-1]) - 1) * dilation + 1
    spread = np.zeros((a.shape[0], *sizes, a.shape[-1]))
    steps = tuple(slice(None, None, d) for d in dilation)
    spread[(slice(None), *steps)] = a
    widths = [(0, 0), *[(max(p, 0), max(q, 0)) for p, q in padding], (0, 0)]
    spread = np.pad(spread, widths)
    for axis, (low, high) in enumerate(padding, start=1):
        crop = slice(max(-low, 0), spread.shape[axis] - max(-high, 0))
        spread = spread[(slice(None),) * axis + (crop,)]
    return spread


# ---------------------------------------------------------------- likelihoods


def mean_loss(likelihood, output, y, variance=1.0):
    """The mean negative log-likelihood, in jax.numpy (it is the model's loss)."""
    if likelihood == "categorical":
        logp = jax.nn.log_softmax(output)
        return -jnp.take_along_axis(logp, y[..., None], -1)[..., 0].mean()
    if likelihood == "bernoulli":
        return (jax.nn.softplus(output) - y * output).sum(-1).mean()
    return (0.5 * (output - y) ** 2 / variance).sum(-1).mean()


def output_gradient(likelihood, output, y, variance=1.0):
    """Per-term gradient of the negative log-likelihood, in numpy."""
    output = np.asarray(output, np.float64)
    if likelihood == "categorical":
        return softmax(output) - np.eye(output.shape[-1])[np.asarray(y)]
    if likelihood == "bernoulli":
        return 1 / (1 + np.exp(-output)) - np.asarray(y)
    return (output - np.asarray(y)) / variance


def output_root(likelihood, output, variance=1.0):
    """Per-term ``S`` with ``S S^T`` the Hessian of the loss in the output."""
    output = np.asarray(output, np.float64)
    eye = np.eye(output.shape[-1])
    if likelihood == "categorical":
        p = softmax(output)
        root = np.sqrt(p)
        return eye * root[..., None, :] - p[..., :, None] * root[..., None, :]
    if likelihood == "bernoulli":
        p = 1 / (1 + np.exp(-output))
        return eye * np.sqrt(p * (1 - p))[..., None, :]
    return np.broadcast_to(eye / np.sqrt(variance), (*output.shape, output.shape[-1]))


def softmax(x):
    """Softmax over the last axis, in numpy."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---------------------------------------------------------------- statistics


class Pass:
    """One forward pass with its layer inputs and its explicit Jacobians."""

    def __init__(self, model, params, x):
        """Record inputs, then differentiate the output in explicit offsets."""
        self.model = model

        def run(offsets):
            sites = collections.defaultdict(list)

            def add(name, a, z):
                seen = len(sites[name])
                sites[name].append((a, jnp.zeros_like(z)))
                return z + offsets[name][seen] if offsets else z

            output = model.forward(params, x, add)
            return output, (output, dict(sites))

        recorded = jax.eval_shape(run, None)[1][1]
        zeros = {
            name: [jnp.zeros(z.shape, z.dtype) for _, z in sites]
            for name, sites in recorded.items()
        }
        self.jacobian, (output, sites) = jax.jit(jax.jacrev(run, has_aux=True))(zeros)
        self.output = np.asarray(output)
        self.terms = int(np.prod(self.output.shape[:-1]))
        self.inputs = {
            name: [np.asarray(a, np.float64) for a, _ in found]
            for name, found in sites.items()
        }

    def columns(self, fisher, y=None):
        """Cotangents of the mean loss at the output: one, or one per class."""
        m = self.model
        if fisher == "empirical":
            columns = output_gradient(m.likelihood, self.output, y, m.variance)[None]
        else:
            root = output_root(m.likelihood, self.output, m.variance)
            columns = np.moveaxis(root, -1, 0)
        return columns / self.terms

    def cotangents(self, name, fisher, y=None):
        """Cotangents at the sites of a layer: list over sites of [columns, z...]."""
        columns = self.columns(fisher, y)
        rank = self.output.ndim
        return [
            np.tensordot(columns, np.asarray(j, np.float64), rank)
            for j in self.jacobian[name]
        ]

    def factors(self, name, y=None, fisher="empirical", sharing="expand"):
        """``A`` and ``G`` of a dense or convolution layer, with loops over rows."""
        spec = self.model.layers[name]
        a_sum, g_sum, rows = 0.0, 0.0, 0
        for inputs, cotangents in self.uses(name, fisher, y, sharing):
            if sharing == "reduce":
                inputs = inputs.mean(2, keepdims=True)
            rows += inputs.shape[1] * inputs.shape[2]
            a_sum += np.einsum("gnpi,gnpj->gij", inputs, inputs)
            for c in cotangents:
                if sharing == "reduce":
                    c = c.sum(2, keepdims=True)
                g_sum += np.einsum("gnpi,gnpj->gij", c, c)
        a, g = a_sum / self.terms, g_sum * self.terms**2 / rows
        return (a[0], g[0]) if getattr(spec, "groups", 1) == 1 else (a, g)

    def uses(self, name, fisher, y, sharing):
        """Homogeneous inputs and cotangents ``[groups, examples, positions, …]``.

        One pair for every site; under ``reduce`` one pair for all of them, because an
        example's positions are all its uses of the layer.
        """
        spec = self.model.layers[name]
        pairs = []
        cotangents = self.cotangents(name, fisher, y)
        for a, cs in zip(self.inputs[name], cotangents, strict=True):
            inputs = spec.rows(a)
            if spec.bias:
                inputs = np.concatenate([inputs, np.ones((*inputs.shape[:3], 1))], -1)
            pairs.append((inputs, np.stack([spec.cotangents(c) for c in cs])))
        if sharing == "reduce":
            inputs, cs = zip(*pairs, strict=True)
            pairs = [(np.concatenate(inputs, 2), np.concatenate(cs, 3))]
        return pairs

    def blocks(self, name, y=None, fisher="empirical"):
        """``F_u = N sum_n s_n s_n^T`` of a scale-and-shift layer, unit by unit."""
        spec = self.model.layers[name]
        (a,), (cs,) = self.inputs[name], self.cotangents(name, fisher, y)
        total = 0.0
        for c in cs:
            parts = []
            if spec.scale:
                parts.append(_flatten(c * a, spec.axes).sum(1))
            if spec.shift:
                parts.append(_flatten(c, spec.axes).sum(1))
            s = np.stack(parts, -1)
            total += np.einsum("nui,nuj->uij", s, s)
        return total * self.terms


def parameter_jacobian(model, params, x):
    """``d output / d parameters`` as [terms, outputs, P], in ravelled order."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    run = jax.jacrev(lambda p: model.forward(unravel(p), x, no_hook))
    out = jax.jit(run)(flat)
    return np.asarray(out, np.float64).reshape(-1, out.shape[-2], flat.size)


def dense_fisher(model, params, x, y=None, fisher="empirical"):
    """The whole Fisher matrix of the mean loss from explicit Jacobians."""
    j = parameter_jacobian(model, params, x)
    output = np.asarray(model.forward(params, x, no_hook))
    output = output.reshape(-1, output.shape[-1])
    if fisher == "empirical":
        y = np.asarray(y).reshape(-1, *np.shape(y)[np.ndim(y) - y_rank(model) :])
        d = output_gradient(model.likelihood, output, y, model.variance)
        g = np.einsum("nc,ncp->np", d, j)
    else:
        root = output_root(model.likelihood, output, model.variance)
        g = np.einsum("nck,ncp->nkp", root, j).reshape(-1, j.shape[-1])
    return g.T @ g / len(output)


def y_rank(model):
    """Number of axes a single target has."""
    return 0 if model.likelihood == "categorical" else 1


def no_hook(name, a, z):
    """The hook that leaves a network alone."""
    del name, a
    return z


# ---------------------------------------------------------------- dense solves


def pi_of(a, g):
    """``pi`` of the damping split (Martens & Grosse 2015, section 6.3)."""
    ta, tg = np.trace(a) / len(a), np.trace(g) / len(g)
    return np.sqrt(ta / tg) if ta > 0 and tg > 0 else 1.0


def solve_split(a, g, v, damping):
    """``(A + pi sqrt(damping) I)^-1 V (G + sqrt(damping)/pi I)^-1`` densely."""
    a, g, v = (np.asarray(x, np.float64) for x in (a, g, v))
    pi, root = pi_of(a, g), np.sqrt(damping)
    left = a + pi * root * np.eye(len(a))
    right = g + root / pi * np.eye(len(g))
    return np.linalg.solve(np.kron(left, right), v.ravel()).reshape(v.shape)


def solve_exact(a, g, v, damping):
    """``(A (x) G + damping I)^-1 vec V`` densely."""
    a, g, v = (np.asarray(x, np.float64) for x in (a, g, v))
    matrix = np.kron(a, g)
    matrix = matrix + damping * np.eye(len(matrix))
    return np.linalg.solve(matrix, v.ravel()).reshape(v.shape)


def average(values, decay):
    """Bias-corrected moving average; ``decay`` weights the old value."""
    total, weight = 0.0, 0.0
    for value in values:
        total = decay * total + (1 - decay) * np.asarray(value, np.float64)
        weight = decay * weight + (1 - decay)
    return total / weight


# ---------------------------------------------------------------- intervals


def relative_difference(x, past):
    """``max |X - X_past| / |X_past|`` over the factors of a layer."""
    return max(
        np.linalg.norm(p - q) / np.linalg.norm(q) for p, q in zip(x, past, strict=True)
    )


def algorithm_1(statistic, steps, threshold, rule="multiple", max_interval=None):
    """Algorithm 1 of the interval paper for one layer, in plain Python.

    ``statistic(t)`` gives the factors of step ``t``, counted from one. Returns the
    steps at which the layer is refreshed and its interval after every step.
    """
    interval, past, last, refreshed, intervals = 1, None, 0, [], []
    for t in range(1, steps + 1):
        if t == 1:
            past, last = statistic(t), t
            refreshed.append(t)
        elif t % interval == 0 if rule == "multiple" else t - last >= interval:
            new = statistic(t)
            if relative_difference(new, past) < threshold:
                interval += 1
                if max_interval is not None:
                    interval = min(interval, max_interval)
            past, last = new, t
            refreshed.append(t)
        intervals.append(interval)
    return refreshed, intervals


def together(statistics, steps, threshold, share):
    """Algorithm 1, ``elapsed``, in which nearly due layers join those that are due.

    ``statistics[l](t)`` are the factors of layer ``l``. Returns which layers were
    refreshed and their intervals, ``[steps, layers]`` each.
    """
    layers = range(len(statistics))
    interval, last, past = [1 for _ in layers], [0 for _ in layers], {}
    refreshed, intervals = [], []
    for t in range(1, steps + 1):
        due = [last[n] == 0 or t - last[n] >= interval[n] for n in layers]
        if any(due):
            due = [due[n] or t - last[n] >= share * interval[n] for n in layers]
        for n in layers:
            if due[n]:
                new = statistics[n](t)
                if n in past and relative_difference(new, past[n]) < threshold:
                    interval[n] += 1
                past[n], last[n] = new, t
        refreshed.append(due)
        intervals.append(list(interval))
    return np.array(refreshed), np.array(intervals)


def staleness(statistic, steps, threshold, max_interval=None):
    """The doubling and halving rule over the last two refreshes, in plain Python."""
    first = second = None  # the last refreshed statistic and the one before it
    before, interval, last, refreshed, intervals = 1, 1, None, [], []
    for t in range(1, steps + 1):
        if last is None or t - last >= interval:
            new = statistic(t)
            like_first = (
                first is not None and relative_difference(new, first) < threshold
            )
            like_second = (
                second is not None and relative_difference(new, second) < threshold
            )
            if not like_first:
                following = max(1, interval // 2)
            elif not like_second:
                following = interval
            else:
                following = interval + before
            if max_interval is not None:
                following = min(following, max_interval)
            before, interval = interval, following
            first, second, last = new, first, t
            refreshed.append(t)
        intervals.append(interval)
    return refreshed, intervals
