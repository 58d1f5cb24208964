"""Set JAX up for the tests, with strict promotion: eight CPU devices, or with `-m gpu` all GPUs of the machine."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=12"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one thread a worker: with more, the workers compete for cores

import jax
import pytest

import ferrum_jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # for products in the tests themselves, on a GPU


def on_gpu(config):
    return config.option.markexpr.split(" and ")[0] == "gpu"


def pytest_configure(config):
    if on_gpu(config):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share the GPUs' memory
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    # XLA's own passes stay on. LLVM optimizes less, since these programs take longer to compile than to run.
    jax.config.update("jax_disable_most_optimizations", True)
    # Compilation takes most of the time, so all workers share a cache of compiled programs, which lasts between runs.
    if hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir(f"xla-{jax.__version__}")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_collection_modifyitems(items):
    """Drop the tests that cannot run here.

    These are tests of Pallas on ops that it refuses (test_implementations tests the refusal), tests of Pallas with a
    JAX that is too old for it, and tests that need more GPUs than the machine has. Pallas' interpreter is slow, and
    its float16 products repeat those of bfloat16, so they are part of a full run alone.
    """
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("implementation") == "pallas-interpreted" and params.get("dtype") == "float16":
            item.add_marker(pytest.mark.full)
    items[:] = [item for item in items if not (refused(item) or lacks_pallas(item) or lacks_gpus(item))]


def lacks_pallas(item):
    return "pallas" not in KERNELS and item.get_closest_marker("pallas") is not None


def lacks_gpus(item):
    needed = item.get_closest_marker("gpus")
    return needed is not None and on_gpu(item.config) and jax.device_count() < needed.args[0]


def refused(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    backend = (params.get("implementation") or params.get("every_implementation") or "").partition("-")[0]
    if backend not in ferrum_jax.kernels.BACKENDS:
        return False
    if "case" in params and not params["case"].has_kernel(backend):
        return True
    if backend != "pallas":
        return False
    half = params.get("dtype") in ("float16", "bfloat16")
    if "case" in params:
        return params["case"].name.startswith(("grouped", "ragged")) and not half
    return item.get_closest_marker("tables") is not None and not half


def pytest_xdist_auto_num_workers(config):
    return min(14, os.cpu_count()) if on_gpu(config) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Compiled programs are used within a file. Beyond it they would fill a worker's memory."""
    yield
    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()


# The Pallas kernels need a newer JAX than the rest of the library. An older JAX refuses them.
KERNELS = ["triton", "pallas"] if jax.__version_info__ >= (0, 11, 2) else ["triton"]
collect_ignore = [] if "pallas" in KERNELS else ["test_pallas.py", "test_pallas_grouped.py"]


def implementations(*marks, pallas=()):
    """xla on a CPU; each kernel backend interpreted on a CPU, and on a GPU; and xla on a GPU, in a full run only.

    `marks` are added to the kernels' parameters, and those of `pallas` where Pallas is interpreted, which is slow.
    """
    more = {"triton": (), "pallas": pallas}
    interpreted = [
        pytest.param(f"{name}-interpreted", marks=[pytest.mark.interpreted, *marks, *more[name]]) for name in KERNELS
    ]
    on_gpu = (pytest.param(f"{name}-gpu", marks=[pytest.mark.gpu, *marks]) for name in KERNELS)
    return ["xla", *interpreted, *on_gpu, pytest.param("xla-gpu", marks=[pytest.mark.gpu, pytest.mark.full])]


def run_by(param):
    name, _, where = param.partition("-")
    if where == "interpreted":
        with ferrum_jax.interpret_kernels():
            yield name
    else:
        yield name


@pytest.fixture(params=implementations())
def implementation(request):
    """Each implementation, for tests of what a kernel computes: values, dtypes, sizes, and patterns of leading axes."""
    yield from run_by(request.param)


@pytest.fixture(params=implementations(pytest.mark.full))
def every_implementation(request):
    """Each implementation, for tests of JAX's rules (grad, vmap, sharding). The kernels run only in a full run.

    The rules do not depend on the implementation. All that a kernel sees of them is leading axes, which the tests of
    values cover.
    """
    yield from run_by(request.param)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
