"""The public names and signatures are a contract: this is its snapshot."""

import inspect
import re

import jax
import optax
import pytest

import kfac_jax_lite as kfac
from tests.helpers import first_pass

EMPTY = inspect.Parameter.empty
TRANSFORM = {
    "damping": 1e-3,
    "factor_decay": 0.95,
    "interval": kfac.intervals.every(1),
    "inverse": "cholesky",
    "inverse_interval": 1,
    "axis_name": None,
    "reduction": kfac.Reduction(),
    "stagger": False,
    "packed": False,
}
MATRIX = {
    "tagged": EMPTY,
    "params": EMPTY,
    "batches": EMPTY,
    "approximation": "full",
    "progress": False,
    "chunk": None,
}
POSTERIOR = {"prior_precision": 1.0, "temperature": 1.0, "augmentation": 1.0}
PREDICT = {
    "apply_fn": EMPTY,
    "state": EMPTY,
    "params": EMPTY,
    "inputs": EMPTY,
    "key": None,
    "num_samples": 32,
    "likelihood": "categorical",
    "batch_size": None,
    "progress": False,
}
SIGNATURES = {
    "tag": {
        "loss_fn": EMPTY,
        "params": EMPTY,
        "args": EMPTY,
        "fisher": "empirical",
        "weight_sharing": "expand",
        "has_aux": False,
        "num_examples": None,
        "strict": False,
        "max_factor_dim": 8192,
        "subsample": kfac.Subsample(),
        "statistics": "factors",
        "curvature": None,
    },
    "scale_by_kfac": {"layers": EMPTY, **TRANSFORM},
    "kfac": {
        "layers": EMPTY,
        "learning_rate": EMPTY,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "kl_clip": 1e-3,
        "mask": None,
        **TRANSFORM,
    },
    "categorical": {"logits": EMPTY, "mask": None, "weight": None},
    "bernoulli": {"logits": EMPTY, "mask": None, "weight": None},
    "normal": {"mean": EMPTY, "variance": 1.0, "mask": None, "weight": None},
    "tag_as": {"output": EMPTY, "reference": EMPTY, "operands": EMPTY},
    "tag_dense": {"output": EMPTY, "x": EMPTY, "w": EMPTY, "b": None},
    "tag_conv": {"output": EMPTY, "x": EMPTY, "w": EMPTY, "b": None, "options": EMPTY},
    "register_rule": {"primitive": EMPTY, "reference": EMPTY},
    "report": {"opt_state": EMPTY, "layers": None, "spectra": False},
    "doctor": {
        "tagged": EMPTY,
        "opt_state": EMPTY,
        "batch": None,
        "params": None,
        "key": None,
        "learning_rate": None,
        "history": (),
    },
    "rescale_weights": {"layers": EMPTY, "epsilon": 1e-9},
    "low_rank": {"rank": 0.125},
    "choose_ranks": {"layers": EMPTY, "opt_state": EMPTY, "retained_trace": 0.95},
    "inverse_error": {"layers": EMPTY, "opt_state": EMPTY},
    "layer_rows": {"tagged": EMPTY, "params": EMPTY, "args": EMPTY},
    "cost_model": {
        "layers": EMPTY,
        "reduction": kfac.Reduction(),
        "devices": 1,
        "rows": None,
        "interval": kfac.intervals.every(1),
        "inverse": "cholesky",
        "inverse_interval": 1,
        "batch_norm": "unit",
        "mapped": True,
    },
    "damping.adaptive": {
        "initial": 1.0,
        "gain": 0.5,
        "minimum": 1e-8,
        "maximum": 1e8,
        "retreat": 10.0,
    },
    "ntk.kernel": {
        "tagged": EMPTY,
        "params": EMPTY,
        "batch": EMPTY,
        "other": None,
        "trace": False,
        "independent": False,
        "chunk": None,
    },
    "ntk.eigenvalues": {
        "tagged": EMPTY,
        "params": EMPTY,
        "batch": EMPTY,
        "independent": False,
        "chunk": None,
    },
    "ntk.dual_natural_gradient": {
        "tagged": EMPTY,
        "damping": EMPTY,
        "solver": "cholesky",
        "independent": False,
        "chunk": None,
    },
    "bayes.noisy_kfac": {
        "layers": EMPTY,
        "num_data": EMPTY,
        "learning_rate": EMPTY,
        **POSTERIOR,
        "damping": 1e-3,
        "momentum": 0.9,
        "kl_clip": 1e-3,
        **{k: v for k, v in TRANSFORM.items() if k not in ("damping", "packed")},
    },
    "bayes.vogn": {
        "layers": EMPTY,
        "num_data": EMPTY,
        "learning_rate": EMPTY,
        **POSTERIOR,
        "damping": 1e-3,
        "momentum": 0.9,
        "decay": 0.999,
        "axis_name": None,
    },
    "bayes.ivon": {
        "num_data": EMPTY,
        "learning_rate": EMPTY,
        **POSTERIOR,
        "initial": 0.1,
        "momentum": 0.9,
        "decay": 0.99999,
        "axis_name": None,
    },
    "bayes.value_and_grad": {
        "tagged": EMPTY,
        "params": EMPTY,
        "args": EMPTY,
        "opt_state": EMPTY,
        "key": EMPTY,
        "num_samples": 1,
        "has_aux": False,
        "axis_name": None,
        "deferred": False,
    },
    "bayes.sample": {
        "state": EMPTY,
        "params": EMPTY,
        "key": EMPTY,
        "num_samples": None,
    },
    "bayes.laplace": {
        "tagged": EMPTY,
        "params": EMPTY,
        "batches": EMPTY,
        "structure": "kronecker",
        "num_data": None,
        "prior_precision": 1.0,
        "temperature": 1.0,
        "last_layer": None,
        "variance": 1.0,
        "key": None,
        "progress": False,
    },
    "bayes.predict": {**PREDICT, "variance": 1.0},
    "bayes.predict_each": PREDICT,
    "bayes.predict_glm": {
        "apply_fn": EMPTY,
        "posterior": EMPTY,
        "params": EMPTY,
        "inputs": EMPTY,
        "key": None,
        "likelihood": "categorical",
        "link": "probit",
        "num_samples": 256,
        "variance": 1.0,
        "batch_size": None,
    },
    "curvature.hessian": {**MATRIX, "key": None, "num_samples": 32},
    "curvature.ggn": MATRIX,
    "curvature.fisher": MATRIX,
    "curvature.mc_fisher": {**MATRIX, "key": None, "num_samples": 1},
    "curvature.empirical_fisher": MATRIX,
    "curvature.gradient_covariance": MATRIX,
    "intervals.every": {"n": EMPTY},
    "intervals.adaptive": {
        "threshold": EMPTY,
        "rule": "multiple",
        "max_interval": None,
        "together": None,
    },
    "intervals.staleness": {
        "threshold": 0.1,
        "max_interval": None,
        "together": None,
    },
}
NAMES = {name for name in SIGNATURES if "." not in name}
NAMES |= {"Reduction", "bayes", "curvature", "intervals", "damping", "ntk"}


def lookup(name):
    """The object behind a dotted public name."""
    found = kfac
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(lookup(name)).parameters
    seen = {key: value.default for key, value in parameters.items()}
    assert seen == SIGNATURES[name]


def test_positional_and_keyword_only():
    tag = inspect.signature(kfac.tag).parameters
    assert tag["args"].kind is inspect.Parameter.VAR_POSITIONAL
    assert tag["fisher"].kind is inspect.Parameter.KEYWORD_ONLY
    for make in (kfac.kfac, kfac.bayes.noisy_kfac, kfac.bayes.vogn, kfac.bayes.ivon):
        parameters = list(inspect.signature(make).parameters.values())
        after = [p.name for p in parameters].index("learning_rate") + 1
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters[after:]), make
    damping = inspect.signature(kfac.scale_by_kfac).parameters["damping"]
    assert damping.kind is damping.KEYWORD_ONLY


def test_names():
    assert set(kfac.__all__) >= NAMES
    for name in kfac.__all__:
        assert hasattr(kfac, name)
        assert not name.startswith("_")


def test_everything_public_has_a_docstring():
    for name in [*kfac.__all__, *SIGNATURES]:
        assert inspect.getdoc(lookup(name)), name


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_argument_is_documented(name):
    """Sections of docstrings are asked for of public names, and of these only."""
    text = inspect.getdoc(lookup(name)) or ""
    for argument, parameter in inspect.signature(lookup(name)).parameters.items():
        if argument != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            assert re.search(rf"^ +\**{argument}: ", text, re.M), argument
    if "Returns:" not in text and len(text.splitlines()) > 1:
        assert "Yields:" in text or inspect.isclass(lookup(name)), name


def test_tagged_loss():
    tagged = first_pass("mlp")[0]
    parameters = inspect.signature(tagged.value_and_grad).parameters
    assert list(parameters) == ["params", "args", "opt_state", "key", "deferred"]
    assert parameters["opt_state"].default is None
    assert parameters["key"].default is None
    assert parameters["deferred"].default is False
    assert isinstance(tagged.layers, tuple)
    layer = tagged.layers[0]
    for field in ("name", "kind", "params", "a_shape", "g_shape"):
        assert hasattr(layer, field)
    assert isinstance(layer.params, tuple)
    assert layer.params == ("['layer0']['kernel']", "['layer0']['bias']")


def test_operators():
    verbs = {
        "mv": ["v"],
        "mm": ["vs", "chunk"],
        "to_dense": [],
        "diagonal": ["key", "num_samples"],
        "trace": ["key", "num_samples", "options"],
        "eigsh": ["k", "key", "which", "options"],
        "eigenvalues": [],
        "logdet": ["damping", "key", "num_samples", "num_steps", "options"],
        "solve": ["b", "damping", "options"],
    }
    for name, arguments in verbs.items():
        method = getattr(kfac.curvature.Operator, name)
        assert list(inspect.signature(method).parameters)[1:] == arguments
        assert inspect.getdoc(method), name


def test_transformations_are_optax():
    layers = first_pass("mlp")[0].layers
    for tx in (kfac.scale_by_kfac(layers), kfac.kfac(layers, 0.1)):
        assert isinstance(tx, optax.GradientTransformationExtraArgs)


def test_statistics_are_dense_float32_matrices():
    statistics = first_pass("mlp")[-1]
    assert isinstance(statistics, dict)
    shapes = {n: (s.a.shape, s.g.shape) for n, s in statistics.items()}
    assert shapes == {"layer0": ((5, 5), (5, 5)), "layer1": ((6, 6), (3, 3))}
    assert all(isinstance(v, jax.Array) for v in jax.tree.leaves(statistics))
