"""Networks and the losses they are trained with."""

from experiments.models.task import Task, make_task

__all__ = ["Task", "make_task"]
