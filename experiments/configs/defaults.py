"""Hyper-parameters for each data set and model, used unless the user gives others."""

import dataclasses
from typing import Any

from experiments.configs.checks import check_choice
from experiments.configs.optimizers import (
    AdamConfig,
    AdamWConfig,
    KFACConfig,
    ScheduleConfig,
    SGDConfig,
)
from experiments.configs.train import DATASETS, MODELS, NetConfig, TrainConfig

# How long to train: smaller sets get more epochs.
LENGTH: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 20, "batch_size": 100},
    "mnist5k": {"epochs": 10, "batch_size": 200},
    "mnist": {"epochs": 10, "batch_size": 512},
    "fashion_mnist": {"epochs": 10, "batch_size": 512},
    "cifar10": {"epochs": 10, "batch_size": 128},
    "tinyshakespeare": {
        "epochs": 1,
        "batch_size": 32,
        "eval_examples": 512,
        "evals_per_epoch": 10,
    },
    "pydoc": {
        "epochs": 2,
        "batch_size": 32,
        "eval_examples": 512,
        "evals_per_epoch": 5,
    },
}

COSINE = ScheduleConfig("cosine", warmup_steps=50, final_scale=0.01)
LONG_WARMUP = ScheduleConfig("cosine", warmup_steps=150, final_scale=0.01)

OPTIMISERS: dict[str, dict[str, Any]] = {
    "mlp": {
        "kfac": KFACConfig(),
        "sgd": SGDConfig(learning_rate=0.1),
        "adam": AdamConfig(learning_rate=2e-3),
        "adamw": AdamWConfig(learning_rate=2e-3),
    },
    "lenet5": {
        "kfac": KFACConfig(),
        "sgd": SGDConfig(learning_rate=0.03),
        "adam": AdamConfig(learning_rate=2e-3),
        "adamw": AdamWConfig(learning_rate=2e-3),
    },
    "resnet": {
        "kfac": KFACConfig(every=10, inverse_interval=20),
        "sgd": SGDConfig(learning_rate=0.1),
        "adam": AdamConfig(learning_rate=2e-3),
        "adamw": AdamWConfig(learning_rate=2e-3),
    },
    "autoencoder": {
        "kfac": KFACConfig(damping=1.0, kl_clip=None),
        "sgd": SGDConfig(learning_rate=0.01),
        "adam": AdamConfig(learning_rate=1e-3),
        "adamw": AdamWConfig(learning_rate=1e-3),
    },
    "lm": {
        # The curvature of the inner layers is small and changes fast at the start:
        # little damping, no momentum, and a warm-up beside the trust region.
        "kfac": KFACConfig(
            learning_rate=0.02,
            schedule=COSINE,
            damping=4e-5,
            momentum=0.0,
            kl_clip=2.5e-3,
            factor_decay=0.9,
            fisher="mc",
            inverse_interval=5,
        ),
        "sgd": SGDConfig(learning_rate=0.1, schedule=COSINE),
        "adam": AdamConfig(learning_rate=8e-3, b2=0.98, schedule=LONG_WARMUP),
        "adamw": AdamWConfig(learning_rate=8e-3, b2=0.98, schedule=LONG_WARMUP),
    },
}
OPTIMISERS["mlp_nnx"] = OPTIMISERS["mlp"]


def default_config(dataset: str = "mnist5k", model: str = "mlp") -> TrainConfig:
    """Returns the default configuration of a data set and a model."""
    check_choice("dataset", dataset, DATASETS)
    check_choice("model", model, MODELS)
    config = TrainConfig(
        dataset=dataset,  # pyright: ignore[reportArgumentType]
        model=model,  # pyright: ignore[reportArgumentType]
        **LENGTH[dataset],
        **OPTIMISERS[model],
    )
    if dataset == "mnist5k":
        config = dataclasses.replace(config, net=NetConfig(hidden=(500, 300)))
    if dataset == "digits":
        config = dataclasses.replace(
            config, net=NetConfig(hidden=(128, 128), code=(64, 16))
        )
    if model == "autoencoder" and dataset in ("mnist", "fashion_mnist"):
        config = dataclasses.replace(config, batch_size=1000, epochs=8)
    return config
