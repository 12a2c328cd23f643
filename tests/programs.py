"""Programs of small networks, and what their products cost, counted one by one."""

import math

import jax
import jax.numpy as jnp

import kfac_jax_lite as kfac


def shapes(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def mlp(widths, batch, norm=False, limit=8192):
    """A tagged loss of ``x W tanh W …``, its parameters and its batch, as shapes."""

    def loss(params, x, y):
        for number, layer in enumerate(params):
            if number:
                x = jnp.tanh(x)
                if norm:
                    x = x * layer["scale"] + layer["shift"]
            x = x @ layer["w"] + layer["b"]
        return jnp.mean(jnp.sum((kfac.normal(x) - y) ** 2, -1))

    params = []
    for a, g in zip(widths, widths[1:], strict=False):
        params.append({"w": shapes(a, g), "b": shapes(g)})
        if norm and len(params) > 1:
            params[-1] |= {"scale": shapes(a), "shift": shapes(a)}
    batch = shapes(batch, widths[0]), shapes(batch, widths[-1])
    return kfac.tag(loss, params, *batch, max_factor_dim=limit), params, batch


def products(jaxpr):
    """Operations of the products and factorisations of a program, one by one.

    Of a conditional the branch with the most, or what a CPU takes.
    """
    total = 0
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval.shape if eqn.outvars else ()
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(shape[i] for i in contracted)
        elif eqn.primitive.name == "cholesky":
            total += math.prod(out[:-2]) * out[-1] ** 3 / 3
        elif eqn.primitive.name == "triangular_solve":
            total += math.prod(out) * eqn.invars[0].aval.shape[-1]
        elif eqn.primitive.name == "eigh":
            matrix = eqn.invars[0].aval.shape
            total += 9 * math.prod(matrix) * matrix[-1]
        elif eqn.primitive.name == "cond":
            branches = eqn.params["branches"]
            if platforms := eqn.params.get("branches_platforms"):
                chosen = [names is None or "cpu" in names for names in platforms]
                branches = [branches[chosen.index(True)]]
            total += max(products(branch.jaxpr) for branch in branches)
        else:
            inside = sum(products(getattr(j, "jaxpr", j)) for j in inner(eqn))
            total += inside * eqn.params.get("length", 1)
    return total


def inner(eqn):
    """Programs inside an equation, each once."""
    found = [v for v in eqn.params.values() if hasattr(getattr(v, "jaxpr", v), "eqns")]
    assert len(found) < 2 or eqn.primitive.name == "while", eqn.primitive
    return found
