"""Active learning: which images to label next.

A network is trained anew on the labelled images of every round. Then the pool's images
that score highest get their labels:

``active_bald``     mutual information of label and weights under noisy K-FAC; images
                    are drawn in proportion to it, as the highest ones are much alike
``active_random``   a random order, with the same noisy K-FAC
``active_entropy``  predictive entropy of a point estimate by Adam

The first labelled images of a seed are the same for all.

References:
    Houlsby et al., 2011, arXiv:1112.5745; Gal, Islam & Ghahramani, 2017,
    arXiv:1703.02910 (images); Kirsch et al., 2021, arXiv:2106.12059, Sec. 3 (drawn in
    proportion to the score).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.configs import NetConfig
from experiments.studies.bayes import calibration
from experiments.studies.bayes.config import (
    ACTIVE,
    ADAM,
    NOISY,
    ActiveLearning,
    BayesStudy,
)
from experiments.studies.bayes.problem import (
    Network,
    Record,
    Settings,
    Values,
    WithState,
    load,
    make_network,
    make_program,
    on_device,
)
from experiments.studies.training import Program, train
from kfac_jax_lite import bayes

BALD, RANDOM, ENTROPY = ACTIVE
LEAST = 1e-12  # mutual information whose logarithm is taken


class Pool(NamedTuple):
    """What all rounds of a way to acquire share."""

    images: jax.Array  # of the pool, on the device
    labels: jax.Array  # theirs; those of images that are not acquired are not looked at
    test: tuple[np.ndarray, np.ndarray]  # images and labels
    network: Network  # on them
    program: Program  # the method's
    values: Values  # its hyper-parameters


def runs(config: BayesStudy, name: str, done: Any) -> Iterator[tuple[int, Record]]:
    """Runs what is missing of a way to acquire."""
    missing = [s for s in range(1, config.active.seeds + 1) if s not in done]
    if not missing:
        return
    pool = make_pool(config, name)
    for seed in missing:
        yield seed, run_one(config.active, pool, name, seed)


def make_pool(config: BayesStudy, name: str) -> Pool:
    """Loads the images and builds the network."""
    active = config.active
    images = load(of_pool(config), active.dataset)
    data = images.data
    network = make_network("mlp", NetConfig(hidden=active.hidden), data)
    method = ADAM if name == ENTROPY else NOISY
    size = active.batch_size
    example = data.x_train[:size], data.y_train[:size]
    settings = Settings(method, active.start, active.steps, active.noisy_damping)
    settings = settings._replace(kl_clip=config.kl_clip)
    program = make_program(settings, network.task, example)
    values: Values = {
        "learning_rate": active.noisy_learning_rate,
        "prior_precision": active.prior_precision,
        "temperature": 1.0,
    }
    if method == ADAM:
        values = {
            "learning_rate": active.adam_learning_rate,
            "weight_decay": active.adam_weight_decay,
        }
    x, y = on_device((data.x_train, data.y_train))
    return Pool(x, y, (data.x_test, data.y_test), network, program, values)


def of_pool(config: BayesStudy) -> BayesStudy:
    """The study with the images of active learning."""
    return dataclasses.replace(
        config,
        train_examples=config.active.pool_examples,
        validation_examples=1,
        test_examples=config.active.test_examples,
        outside_examples=1,
        batch_size=config.active.batch_size,
        only=(),
    )


def run_one(active: ActiveLearning, pool: Pool, name: str, seed: int) -> Record:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pool.images))
    labelled, others = order[: active.start], order[active.start :]
    curve: Record = {"labelled": [], "accuracy": [], "nll": []}
    for number in range(active.rounds + 1):
        steps = rng.integers(len(labelled), size=(active.steps, active.batch_size))
        rows = [labelled[steps].astype(np.int32)]
        values = pool.values | {"num_data": len(labelled)}
        run = train(pool.program, values, seed, (pool.images, pool.labels), rows)
        params, model_state, state = run.carry
        posterior = None if name == ENTROPY else WithState(state)
        given = posterior, (params, model_state)
        key = jax.random.fold_in(jax.random.key(seed), number)
        x, y = pool.test
        p = bayes.predict(pool.network.logits, *given, x, key, active.samples)
        curve["labelled"].append(len(labelled))
        curve["accuracy"].append(calibration.accuracy(p, y))
        curve["nll"].append(calibration.nll(p, y))
        each = None
        if name != RANDOM:
            unlabelled = pool.images[others]
            each = bayes.predict_each(
                pool.network.logits, *given, unlabelled, key, active.samples
            )
        best = chosen(name, each, len(others), active.acquired, rng)
        labelled = np.concatenate([labelled, others[best]])
        others = np.delete(others, best)
    return curve


def chosen(
    name: str, each: Any, count: int, number: int, rng: np.random.Generator
) -> np.ndarray:
    """Which images to label.

    Args:
        name: of the way to acquire.
        each: probabilities ``[draws, count, classes]`` of images without labels; None
            for a random order.
        count: how many there are.
        number: how many to take.
        rng: of the random order, and of draws in proportion.
    """
    if name == RANDOM:
        return rng.permutation(count)[:number]
    if name == BALD:
        values = calibration.mutual_information(each)
        values = np.log(np.maximum(values, LEAST)) + rng.gumbel(size=count)
    else:
        values = calibration.entropy(np.mean(each, 0))
    return np.argsort(-values, kind="stable")[:number]
