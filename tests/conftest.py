"""Set-up shared by all tests: eight host devices, float64, one hypothesis profile."""

import gc
import importlib.metadata
import os

DEVICES = 8
_FLAGS = {"--xla_force_host_platform_device_count": DEVICES}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Tests compile far longer than they run: five times faster, with slower kernels.
    # Other versions may not know these flags, and end the process for it.
    _FLAGS |= {
        "--xla_cpu_use_fusion_emitters": "false",
        "--xla_backend_optimization_level": 0,
        "--xla_llvm_disable_expensive_passes": "true",
    }
_given = os.environ.get("XLA_FLAGS", "")
_more = [f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_more]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Threads for all devices, here and in the processes that tests start.
os.environ.setdefault("NPROC", str(2 * DEVICES))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_enable_x64", True)

hypothesis.settings.register_profile(
    "kfac",
    deadline=None,
    max_examples=15,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
    ],
)
hypothesis.settings.load_profile("kfac")


def pytest_configure(config):
    """Compiles every program once: tests share them through pytest's cache folder."""
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def precision(request):
    """Programs run in JAX's default precision, everything else in float64."""
    single = {"experiments", "soak", "coverage", "checkouts"} & {*request.path.parts}
    with jax.enable_x64(not single):
        yield


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Compiled programs live as long as their module: a worker stays small."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def rng():
    """A numpy generator, the same in every test."""
    return np.random.default_rng(0)


@pytest.fixture
def compiled_anew():
    """Nothing comes out of the persistent compilation cache.

    With jaxlib 0.10.2 on CPUs, programs over several devices that spread inversions and
    were loaded from that cache gave numbers that changed from call to call, or crashed;
    compiled anew they do not.
    """
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", kept)
    compilation_cache.reset_cache()
