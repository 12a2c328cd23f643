"""Threads on a CPU: those of XLA's devices, and those of the BLAS under LAPACK.

Host devices that are more than the machine's cores share a pool with a thread for each
core. A step with several all-reduces then waits for devices that have no thread to run
on, and XLA ends the process after a minute. ``NPROC``, which XLA reads when the devices
are made, sets the size of the pool.
"""

import ctypes
import functools
import glob
import os
import re
import warnings
from typing import Any

import jax
import scipy
from jax.core import Tracer

# How many threads a host device gets.
PER_DEVICE = 2
FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
BLAS_SETTINGS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")


def usable_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pool_size() -> int:
    """How many threads XLA's pool has, or would have."""
    given = os.environ.get("NPROC", "")
    return int(given) if given.isdecimal() else usable_cores()


def provide_threads() -> None:
    """Sets ``NPROC`` if more host devices are asked for than there are threads."""
    asked = [int(n) for n in FLAG.findall(os.environ.get("XLA_FLAGS", ""))][-1:]
    wanted: int = getattr(jax.config, "jax_num_cpu_devices", 0)
    count = max(0, wanted, *asked)
    if "NPROC" not in os.environ and count > usable_cores():
        os.environ["NPROC"] = str(PER_DEVICE * count)


def warn_of_few_threads(arrays: list[Any]) -> None:
    """Warns once if the arrays live on a CPU with more devices than threads."""
    concrete = (
        x for x in arrays
        if isinstance(x, jax.Array) and not isinstance(x, Tracer)
    )  # fmt: skip
    first = next(concrete, None)
    if first is None or {d.platform for d in first.devices()} != {"cpu"}:
        return
    count, threads = len(jax.local_devices(backend="cpu")), pool_size()
    if count > threads:
        warn_once(count, threads)


@functools.cache
def warn_once(devices: int, threads: int) -> None:
    """Says what is going to happen, and the remedy."""
    warnings.warn(
        f"{devices} CPU devices share {threads} threads: a step over several of them "
        "may end with \"Termination timeout for all reduce\". Set the environment "
        f"variable NPROC={PER_DEVICE * devices} before JAX makes its devices, or "
        "XLA_FLAGS before kfac_jax_lite is imported, which then sets NPROC itself.",
        stacklevel=2,
    )  # fmt: skip


@functools.cache
def limit_blas() -> None:
    """One thread for SciPy's OpenBLAS, which jaxlib calls, unless a variable is set.

    XLA calls it from threads of its own. Threads of OpenBLAS on top of them wait for
    one another: factorisations become many times slower beside any other work.
    """
    if any(name in os.environ for name in BLAS_SETTINGS):
        return
    here = os.path.dirname(scipy.__file__)
    folders = os.path.join(here, "..", "scipy.libs"), os.path.join(here, ".dylibs")
    for path in [p for f in folders for p in glob.glob(f"{f}/*openblas*")]:
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_set_num_threads", "openblas_set_num_threads"):
            if hasattr(library, name):
                getattr(library, name)(1)
                break
