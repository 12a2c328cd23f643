"""Configurations: frozen dataclasses, checked when they are made."""

from experiments.configs.train import (
    DATASETS,
    MODELS,
    OPTIMIZERS,
    AdamConfig,
    AdamWConfig,
    KFACConfig,
    NetConfig,
    ScheduleConfig,
    SGDConfig,
    TrainConfig,
    default_config,
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
