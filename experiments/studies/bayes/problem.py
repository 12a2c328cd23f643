"""Images of the Bayesian study (to train, to judge, strange, shifted), and networks."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import datasets
from experiments.configs import NetConfig
from experiments.datasets import Dataset
from experiments.models import Task
from experiments.models.registry import linen_functions, linen_module
from experiments.models.task import classifier, make_preprocess
from experiments.studies.bayes.config import BayesStudy
from experiments.studies.images import Pair, load_split, shrunk
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
    """A network for a data set."""
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
