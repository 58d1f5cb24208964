"""JAX as strict as it gets: on eight CPU devices, or with `-m gpu` on the GPUs there are."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

import ferrum_jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # the tests' own products, on a GPU


def on_gpu(config):
    return config.option.markexpr == "gpu"


def pytest_configure(config):
    if not on_gpu(config):
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")


def pytest_collection_modifyitems(items):
    """What Pallas has no kernel for it refuses, which test_implementations tests; here is nothing more to test.

    Nor is there with a JAX that has no Pallas kernels, or for several GPUs where there are fewer.
    """
    items[:] = [item for item in items if not (refused(item) or lacks_pallas(item) or lacks_gpus(item))]


def lacks_pallas(item):
    return "pallas" not in KERNELS and item.get_closest_marker("pallas") is not None


def lacks_gpus(item):
    needed = item.get_closest_marker("gpus")
    return needed is not None and on_gpu(item.config) and jax.device_count() < needed.args[0]


def refused(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if not params.get("implementation", "").startswith("pallas"):
        return False
    half = params.get("dtype") in ("float16", "bfloat16")
    if "op" in params:
        return not params["op"].has_kernel("pallas") or (params["op"].name.startswith("grouped") and not half)
    return item.get_closest_marker("tables") is not None and not half


def pytest_xdist_auto_num_workers(config):
    return 0 if on_gpu(config) else None


# Pallas kernels need a newer JAX than the rest; an older one has nothing there to test but the refusal.
KERNELS = ["triton", "pallas"] if jax.__version_info__ >= (0, 11, 2) else ["triton"]
collect_ignore = [] if "pallas" in KERNELS else ["test_pallas.py", "test_pallas_grouped.py"]


@pytest.fixture(
    params=[
        "xla",
        *(pytest.param(f"{name}-interpreted", marks=pytest.mark.interpreted) for name in KERNELS),
        *(pytest.param(f"{name}-gpu", marks=pytest.mark.gpu) for name in ["xla", *KERNELS]),
    ]
)
def implementation(request):
    """Each implementation: kernels are interpreted on a CPU, and with `-m gpu` all run on the GPU."""
    name, _, where = request.param.partition("-")
    if where == "interpreted":
        with ferrum_jax.interpret_kernels():
            yield name
    else:
        yield name


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
