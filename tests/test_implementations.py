"""The choice of implementation: `which`, and refusals that say why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPS, SMALL, rng

import ferrum_jax


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("name", ["triton", "pallas"])
def test_kernels_refuse_a_cpu_by_name(op, name):
    args = op.args(rng(op), SMALL, "float32")
    with pytest.raises(NotImplementedError, match=f"implementation='{name}' cannot be used: .*NVIDIA.*cpu"):
        op.results(*args, size=SMALL, implementation=name)
    with pytest.raises(NotImplementedError, match="cpu"):
        jax.jit(lambda *a: op.results(*a, size=SMALL, implementation=name)).lower(*args)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_which_names_every_other_implementation(op):
    args = op.args(rng(op), SMALL, "float32")
    choice = ferrum_jax.which(op.results, *args, size=SMALL, platform="cpu")
    assert choice.implementation == "xla"
    assert set(choice.passed_over) == {"triton", "pallas"}
    assert all("cpu" in reason for reason in choice.passed_over.values())
    assert ferrum_jax.which(op.results, *args, size=SMALL) == choice


def test_which_takes_shapes_and_keywords():
    logits = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    choice = ferrum_jax.which(ferrum_jax.route_topk_softmax, logits, top_k=2, implementation="xla", platform="cuda")
    assert choice.implementation == "xla"


def test_which_takes_arrays_by_keyword():
    (op,) = (op for op in OPS if op.name == "moe_dispatch-pairs")
    x, tokens, pairs = op.args(rng(op), SMALL, "bfloat16")
    choice = ferrum_jax.which(ferrum_jax.moe_dispatch, x, tokens, pairs_by_token=pairs, platform="cpu")
    assert choice.implementation == "xla"


def test_which_sees_through_jit_and_numpy_scalars():
    choice = ferrum_jax.which(jax.jit(ferrum_jax.weighted_sum_batched), jnp.ones((2, 3, 4)), jnp.ones((2, 3)))
    assert choice.implementation == "xla"
    assert ferrum_jax.which(ferrum_jax.route_topk_softmax, jnp.ones((2, 4)), np.int64(2)).implementation == "xla"


def test_which_of_something_else():
    with pytest.raises(ValueError, match="one op of ferrum_jax"):
        ferrum_jax.which(jnp.sin, jnp.ones(3))


def test_explicit_xla_runs():
    for op in OPS:
        op.results(*op.args(rng(op), SMALL, "float32"), size=SMALL, implementation="xla")


def test_an_older_jax_than_pallas_needs_is_refused_by_version(monkeypatch):
    x = jnp.ones((2, 4))
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    passed_over = ferrum_jax.which(ferrum_jax.route_topk_softmax, x, 2, platform="cuda").passed_over
    assert passed_over["pallas"] == "it needs jax >= 0.11.2; this is jax 0.10.2"
    with ferrum_jax.interpret_kernels(), pytest.raises(NotImplementedError, match=r"0\.11\.2.*0\.10\.2"):
        ferrum_jax.route_topk_softmax(x, 2, implementation="pallas")
