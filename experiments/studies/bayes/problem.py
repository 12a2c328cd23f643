"""One step of every method, and a run of them.

All hyper-parameters are arguments of a method's program, so that it is compiled once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments import datasets
from experiments.configs import NetConfig
from experiments.datasets import Dataset
from experiments.models import Task
from experiments.models.task import (
    classifier,
    linen_functions,
    linen_module,
    make_preprocess,
)
from experiments.studies.bayes import calibration
from experiments.studies.bayes.config import (
    ADAM,
    IVON,
    KFAC,
    NOISY,
    POINTS,
    SGD,
    VOGN,
    BayesStudy,
)
from experiments.studies.images import Pair, load_split, shrunk
from experiments.studies.training import Program
from kfac_jax_lite import bayes

NOISE_SEED = 1
NOISE = "noise"
# Strange images beside uniform noise.
STRANGE = {"fashion_mnist": "mnist"}


class Images(NamedTuple):
    """The images of a data set that a study uses."""

    data: Dataset  # training and test images, averaged over squares
    held: Pair  # validation images and labels
    strange: dict[str, np.ndarray]  # images without a label by name of their set
    shifted: dict[float, Pair]  # test images and labels under noise, by its strength


class Network(NamedTuple):
    """A network with its loss."""

    task: Task  # initial parameters, and the loss in training mode
    # ``(params, model_state), images -> logits``, in evaluation mode.
    logits: Callable[[Any, Any], jax.Array]
    # ``params, model_state, images, labels -> loss`` in evaluation mode, with the
    # output marked.
    loss: Callable[..., jax.Array]


class WithState(NamedTuple):
    """A posterior of parameters beside a model state that is certain."""

    inner: Any  # a state that `kfac.bayes.sample` draws parameters from

    def draw(self, params: Any, key: Any) -> Any:
        """Parameters around the mean, and the model state as it is."""
        mean, model_state = params
        return bayes.sample(self.inner, mean, key), model_state


def load(config: BayesStudy, name: str) -> Images:
    """Loads the images and splits the training set, always in the same way.

    Args:
        config: the study.
        name: of the data set.

    Returns:
        The images; `load_split` says which are held out.
    """
    data, (held, labels) = load_split(config, name)
    test = slice(config.test_examples)
    data = dataclasses.replace(
        data,
        x_train=data.x_train.astype(np.float32),
        x_test=data.x_test[test].astype(np.float32),
        y_test=data.y_test[test],
    )
    validation = held.astype(np.float32), labels
    return Images(data, validation, strange(config, data), shifted(config, data))


def strange(config: BayesStudy, data: Dataset) -> dict[str, np.ndarray]:
    """Images that belong to no class, by name of their set."""
    count = config.outside_examples
    rng = np.random.default_rng(NOISE_SEED)
    shape = (count, *data.image_shape)
    found = {NOISE: rng.uniform(0, data.maximum, shape).astype(np.float32)}
    if data.name in STRANGE:
        other = datasets.load(STRANGE[data.name], config.data_dir)
        images = shrunk(other.x_test[:count], config.pool).astype(np.float32)
        found = {other.title: images} | found
    return found


def shifted(config: BayesStudy, data: Dataset) -> dict[float, Pair]:
    """Test images under normal noise of growing strength."""
    x, y = (a[: config.outside_examples] for a in (data.x_test, data.y_test))
    noise = np.random.default_rng(NOISE_SEED + 1).normal(size=x.shape)
    found = {}
    for severity in config.severities:
        moved = np.clip(x + severity * data.maximum * noise, 0, data.maximum)
        found[severity] = moved.astype(np.float32), y
    return found


def make_network(name: str, net: NetConfig, data: Dataset) -> Network:
    init, apply = linen_functions(linen_module(name, net, data))
    preprocess = make_preprocess(data, standardise=True)

    def logits(weights, images):
        params, model_state = weights
        return apply(params, model_state, preprocess(images), False)[0]

    # The classifier's loss with the running averages of batch norm instead.
    def fixed(params, model_state, inputs, train):
        del train
        return apply(params, model_state, inputs, False)

    evaluated = classifier(init, fixed, data)

    def loss(params, model_state, images, labels):
        return evaluated.loss(params, model_state, images, labels)[0]

    return Network(classifier(init, apply, data), logits, loss)


def network_of(config: BayesStudy, name: str, images: Images) -> Network:
    """A network of the study's sizes."""
    net = NetConfig(hidden=config.hidden, blocks=config.blocks, width=config.width)
    return make_network(name, net, images.data)


def on_device(pair: Pair) -> tuple[jax.Array, jax.Array]:
    """Images and labels as JAX's arrays."""
    return jnp.asarray(pair[0]), jnp.asarray(pair[1])


Record = dict[str, Any]
# From images to probabilities ``[n, classes]``.
Predict = Callable[[np.ndarray], Any]


def scores(config: BayesStudy, probabilities: Any, labels: Any) -> Record:
    """Accuracy, losses and calibration errors as numbers.

    Args:
        config: the study.
        probabilities: ``[n, classes]``.
        labels: ``[n]``.
    """
    given, bins = (probabilities, labels), config.bins
    return {
        "accuracy": calibration.accuracy(*given),
        "nll": calibration.nll(*given),
        "brier": calibration.brier(*given),
        "ece": calibration.calibration_error(*given, bins),
        "adaptive_ece": calibration.calibration_error(*given, bins, adaptive=True),
    }


def diagram(config: BayesStudy, probabilities: Any, labels: Any) -> Record:
    """A reliability diagram as lists."""
    bins = calibration.reliability(probabilities, labels, config.bins)
    return {
        "confidence": bins.confidence.tolist(),
        "accuracy": bins.accuracy.tolist(),
        "count": bins.size.tolist(),
    }


def separation(inside: Any, outside: Any) -> Record:
    """How well the largest probability and the entropy tell strange images apart."""
    confident = calibration.confidence(inside), calibration.confidence(outside)
    certain = -calibration.entropy(inside), -calibration.entropy(outside)
    return {
        "auroc": calibration.auroc(*confident),
        "fpr95": calibration.fpr95(*confident),
        "auroc_entropy": calibration.auroc(*certain),
    }


def measure(config: BayesStudy, images: Images, predict: Predict) -> Record:
    """All that is measured of a winner."""
    data = images.data
    inside = predict(data.x_test)
    moved: Record = {"severity": [], "accuracy": [], "nll": [], "ece": [], "auroc": []}
    for severity, (x, y) in images.shifted.items():
        outside = predict(x)
        found = scores(config, outside, y)
        found |= separation(inside, outside) | {"severity": severity}
        for name, values in moved.items():
            values.append(found[name])
    return {
        "test": scores(config, inside, data.y_test),
        "bins": diagram(config, inside, data.y_test),
        "strange": {
            name: separation(inside, predict(x)) for name, x in images.strange.items()
        },
        "shifted": moved,
    }


BETA2 = 0.999
Values = dict[str, Any]
# ``(loss, gradients, statistics)`` of parameters, model state, batch, state and key.
Gradient = Callable[..., tuple[Any, Any, Any]]


class Settings(NamedTuple):
    """What the runs of a method have in common."""

    method: str  # its name
    num_data: int  # training images
    steps: int  # of a run
    damping: float = 0.03  # of K-FAC's steps, noisy or not
    vogn_damping: float = 1e-3  # of VOGN's steps
    refresh_every: int = 10  # steps between refreshes of the factors
    kl_clip: float = 1e-2  # trust region of K-FAC
    momentum: float = 0.9  # of all
    ivon_decay: float = 0.999  # weight of IVON's old curvature


def tag_for(settings: Settings, task: Task, example: tuple[Any, Any]) -> Any:
    """The tagged loss of a method; None where it needs no statistics of layers."""
    if settings.method in (ADAM, SGD, IVON):
        return None
    start = jax.eval_shape(task.init, jax.random.key(0))
    shapes = jax.eval_shape(lambda *batch: batch, *example)
    options: Any = {"fisher": "mc"}
    if settings.method == VOGN:
        options = {"statistics": "squares"}
    return kfac.tag(task.loss, *start, *shapes, has_aux=True, **options)


def make_tx(
    settings: Settings, layers: Any, values: Values
) -> optax.GradientTransformationExtraArgs:
    method, n, momentum = settings.method, settings.num_data, settings.momentum
    rate = optax.cosine_decay_schedule(values["learning_rate"], settings.steps)
    curved: Values = {
        "momentum": momentum,
        "kl_clip": settings.kl_clip,
        "interval": kfac.intervals.every(settings.refresh_every),
        "inverse_interval": settings.refresh_every,
    }
    names = ("prior_precision", "temperature")
    prior: Values = {name: values[name] for name in names if name in values}
    n = values.get("num_data", n)  # a value where it changes
    if method == NOISY:
        damping = settings.damping
        return bayes.noisy_kfac(layers, n, rate, damping=damping, **prior, **curved)
    if method == VOGN:
        damping = settings.vogn_damping
        own: Values = {"damping": damping, "momentum": momentum}
        return bayes.vogn(layers, n, rate, **prior, **own)
    if method == IVON:
        own = {"momentum": momentum, "decay": settings.ivon_decay}
        return bayes.ivon(n, rate, initial=values["initial"], **prior, **own)
    decay = values["weight_decay"]
    if method == KFAC:
        damping = settings.damping
        return kfac.kfac(layers, rate, damping=damping, weight_decay=decay, **curved)
    if method == ADAM:
        tx = optax.adamw(rate, b1=momentum, b2=BETA2, weight_decay=decay)
    else:
        # The order of ``kfac.kfac``: the decay passes through the momentum.
        tx = optax.chain(
            optax.add_decayed_weights(decay),
            optax.trace(momentum),
            optax.scale_by_learning_rate(rate),
        )
    return optax.with_extra_args_support(tx)


def gradient_of(settings: Settings, task: Task, tagged: Any) -> Gradient:
    """How a method takes its gradient."""

    def plain(params, model_state, batch, state, key):
        del state, key
        taken = jax.value_and_grad(task.loss, has_aux=True)
        value, grads = taken(params, model_state, *batch)
        return value, grads, None

    def with_factors(params, model_state, batch, state, key):
        return tagged.value_and_grad(
            params, model_state, *batch, opt_state=state, key=key
        )

    def drawn(params, model_state, batch, state, key):
        loss = task.loss if tagged is None else tagged
        return bayes.value_and_grad(
            loss, params, model_state, *batch, opt_state=state, key=key, has_aux=True
        )

    if settings.method == KFAC:
        return with_factors
    return plain if settings.method in POINTS else drawn


def make_program(settings: Settings, task: Task, example: tuple[Any, Any]) -> Program:
    """Builds a method's functions.

    A step is a call of its own: inside `jax.lax.scan`, jaxlib 0.10.2 computes the
    convolutions on CPUs ten times more slowly.
    """
    tagged = tag_for(settings, task, example)
    layers = None if tagged is None else tagged.layers
    gradient = gradient_of(settings, task, tagged)

    def start(seed, values):
        params, model_state = task.init(jax.random.key(seed))
        state = make_tx(settings, layers, values).init(params)
        return params, model_state, state

    def step(carry, values, images, labels, rows, number, key):
        params, model_state, state = carry
        batch = images[rows], labels[rows]
        key = jax.random.fold_in(key, number)
        (loss, model_state), grads, found = gradient(
            params, model_state, batch, state, key
        )
        extra = {} if found is None else {"statistics": found}
        tx = make_tx(settings, layers, values)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), model_state, state), loss

    return Program(jax.jit(start), jax.jit(step, donate_argnums=0))
