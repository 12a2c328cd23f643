"""Configurations: frozen dataclasses, checked when they are made."""

from experiments.configs.defaults import default_config
from experiments.configs.optimizers import (
    AdamConfig,
    AdamWConfig,
    KFACConfig,
    ScheduleConfig,
    SGDConfig,
)
from experiments.configs.train import (
    DATASETS,
    MODELS,
    OPTIMIZERS,
    NetConfig,
    TrainConfig,
)

__all__ = [
    "DATASETS",
    "MODELS",
    "OPTIMIZERS",
    "AdamConfig",
    "AdamWConfig",
    "KFACConfig",
    "NetConfig",
    "SGDConfig",
    "ScheduleConfig",
    "TrainConfig",
    "default_config",
]
