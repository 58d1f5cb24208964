"""JAX as strict as it gets: on four CPU devices, or with `-m gpu` on the GPUs there are."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import pytest
from cases import IMPLEMENTATIONS

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def on_gpu(config):
    return config.option.markexpr == "gpu"


def pytest_configure(config):
    if not on_gpu(config):
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")


def pytest_xdist_auto_num_workers(config):
    return 0 if on_gpu(config) else None


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
