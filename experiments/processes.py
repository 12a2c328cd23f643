"""Several processes that train together: joining, agreeing, leaving.

JAX's multi-controller runtime runs the same program in every process; a collective
waits for all of them. What only one process can know, such as the newest checkpoint, is
therefore agreed upon before anybody acts on it. See docs/multihost.md.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.errors import ConfigError, ExperimentError, ProcessError

# `experiments.launch` sets these. JAX itself reads the first one too.
ADDRESS = "JAX_COORDINATOR_ADDRESS"
COUNT = "JAX_NUM_PROCESSES"
NUMBER = "JAX_PROCESS_ID"
LOCAL_DEVICES = "JAX_LOCAL_DEVICE_IDS"
HEARTBEAT = "KFAC_HEARTBEAT_SECONDS"
DEFAULT_HEARTBEAT = 60

# What `srun` sets for every task, and `sbatch` alone does not.
SLURM_TASK = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
SLURM_COUNT = "SLURM_NTASKS"

FAILED = -1
FAILURE, INTERRUPTED = 2, 128 + signal.SIGINT


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Trains with the other processes, if the environment names any.

    A process that fails must not wait for the others at the end, as JAX does when
    Python ends: they wait for it in a collective. It leaves at once, and they get an
    error.
    """
    join()
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        tell(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILURE)


def join() -> None:
    """Connects to the other processes; does nothing if this one is alone.

    The launcher's variables come first, then those of a SLURM step with several tasks.
    """
    heartbeat = whole(HEARTBEAT, str(DEFAULT_HEARTBEAT), 1)
    slurm = all(name in os.environ for name in SLURM_TASK)
    named: dict[str, Any] = {}
    if COUNT in os.environ:
        if ADDRESS not in os.environ:
            raise ConfigError(f"{COUNT} is set; wanted {ADDRESS} too, as host:port.")
        named = {
            "coordinator_address": os.environ[ADDRESS],
            "num_processes": whole(COUNT, None, 1),
            "process_id": whole(NUMBER, None, 0),
        }
    elif not (slurm and whole(SLURM_COUNT, "1", 1) > 1):
        return
    # The service catches the signal that asks a process to end, and nobody reads it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        cluster_detection_method="deactivate" if named else "slurm",
        heartbeat_timeout_seconds=heartbeat,
        **named,
    )


def whole(name: str, default: str | None, at_least: int) -> int:
    """Reads a whole number from the environment."""
    text = os.environ.get(name, default)
    if text is None or not text.isdecimal() or int(text) < at_least:
        raise ConfigError(f"{name} is {text!r}; wanted a whole number >= {at_least}.")
    return int(text)


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def told_by_first(ask: Callable[[], int]) -> int:
    """Lets the first process find something out for all."""
    if jax.process_count() == 1:
        return ask()
    number, error = FAILED, None
    if is_first():
        try:
            number = ask()
        except ExperimentError as caught:
            error = caught
    number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    if error is not None:
        raise error
    if number == FAILED:
        raise ProcessError("Process 0 cannot go on; its own message says why.")
    return number


def check_same(what: str, number: int) -> None:
    """Raises in every process unless all have the same number."""
    if jax.process_count() == 1:
        return
    seen: Any = multihost_utils.process_allgather(np.uint32(number))
    others = np.flatnonzero(np.asarray(seen) != seen[0])
    if len(others):
        raise ProcessError(
            f"Process {others[0]} has another {what} than process 0; wanted the same "
            f"in all {jax.process_count()} processes."
        )


def tell(error: BaseException) -> None:
    """Says on standard error why this process leaves."""
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted. The same command continues from the last checkpoint."
    elif isinstance(error, ExperimentError):
        text = str(error)
    else:
        traceback.print_exception(error)
        text = (
            f"{type(error).__name__}: {str(error).strip()[:300]}\nIf another process "
            "died, this is what follows from it. The same command continues from the "
            "last checkpoint."
        )
    number, count = jax.process_index(), jax.process_count()
    print(f"error: process {number} of {count}: {text}", file=sys.stderr)
