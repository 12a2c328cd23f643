"""Networks and the losses they are trained with."""

from experiments.models.registry import make_task
from experiments.models.task import Task

__all__ = ["Task", "make_task"]
