"""Losses, counts and the bias's update, against NumPy in float64; sharded ones against those of one device."""

import functools
import itertools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from meshes import mesh_of

import ferrum_jax as fj

DEVICES = min(4, jax.device_count())
KINDS = tuple(itertools.product(("huggingface", "switch", "deepseek"), ("softmax", "sigmoid")))
jobs = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def live_tokens(logits, mask):
    for index in np.ndindex(logits.shape[:-1]):
        if mask[index] and not (logits[index] == -np.inf).all():
            yield index


def scores(row, scoring):
    """p and dp/dx of one row."""
    with np.errstate(over="ignore"):
        log = -np.logaddexp(0, -row) if scoring == "sigmoid" else row
        inner = 1 / (1 + np.exp(row)) if scoring == "sigmoid" else np.ones_like(row)
    p = np.exp(log - log.max())
    p /= p.sum()
    return p, inner


def balance(logits, ids, num_experts, mask, *, normalization, scoring):
    """The loss and its gradient, each with its terms' magnitude."""
    logits, ids, mask = oracle.f64(logits), np.asarray(ids), np.asarray(mask)
    if normalization == "deepseek":
        parts = [[i] for i in np.ndindex(logits.shape[:-2])]
    else:
        parts = [list(np.ndindex(logits.shape[:-2]))]
    value, grad, size = 0.0, np.zeros(logits.shape), np.zeros(logits.shape)
    live = list(live_tokens(logits, mask))
    parts = [p for p in parts if any(t[:-1] in p for t in live)]
    for part in parts:
        tokens = [t for t in live if t[:-1] in part]
        counts, mass = np.zeros(num_experts), np.zeros(num_experts)
        for t in tokens:
            for e in ids[t]:
                if 0 <= e < num_experts:
                    counts[e] += 1
            mass += scores(logits[t], scoring)[0]
        n = len(tokens)
        f = counts / n / (1 if normalization == "huggingface" else ids.shape[-1])
        value += num_experts * np.sum(f * mass / n) / len(parts)
        g = num_experts * f / n / len(parts)
        for t in tokens:
            p, inner = scores(logits[t], scoring)
            grad[t] = p * (g - np.sum(p * g)) * inner
            size[t] = p * (g + np.sum(p * g))
    return (np.asarray(value), np.asarray(value)), (grad, size)


def z(logits, mask):
    """As above; the terms of a logsumexp are the largest logit and the logarithm."""
    logits = oracle.f64(logits)
    value, magnitude, grad, size = 0.0, 0.0, np.zeros(logits.shape), np.zeros(logits.shape)
    live = list(live_tokens(logits, np.asarray(mask)))
    for t in live:
        top = logits[t].max()
        rest = np.log(np.sum(np.exp(logits[t] - top)))
        p = np.exp(logits[t] - top - rest)
        value += (top + rest) ** 2 / len(live)
        magnitude += (abs(top) + rest) ** 2 / len(live)
        grad[t] = 2 * (top + rest) * p / len(live)
        size[t] = 2 * (abs(top) + rest) * p / len(live)
    return (np.asarray(value), np.asarray(magnitude)), (grad, size)


def problem(seed, lead=(), tokens=6, experts=5, top_k=2, dtype=np.float32):
    """Logits, ids (some of no expert) and a mask; masked rows hold NaN and infinities."""
    r = np.random.default_rng(seed)
    logits = r.normal(size=(*lead, tokens, experts)).astype(np.float32) * 2
    ids = r.integers(0, experts, (*lead, tokens, top_k)).astype(np.int32)
    strays = r.random(ids.shape) < 0.15
    ids[strays] = r.choice([-1, experts, 2**31 - 1, -(2**31)], size=strays.sum())
    mask = r.random((*lead, tokens)) < 0.7
    logits[~mask] = r.choice([np.nan, np.inf, -np.inf], size=(int((~mask).sum()), experts))
    return jnp.asarray(logits).astype(dtype), ids, mask


def assert_loss(f, logits, value, gradient):
    got, grad = jax.jit(jax.value_and_grad(f))(logits)
    assert (got.dtype, got.shape, jax.typeof(got).weak_type) == (jnp.float32, (), False)
    oracle.assert_close(got, *value, "float32")
    oracle.assert_close(grad, *gradient, grad.dtype)


@pytest.mark.parametrize(
    ("normalization", "scoring", "lead", "tokens", "experts", "top_k", "dtype"),
    [
        *((*kind, (), 7, 5, 2, "float32") for kind in KINDS),
        *((*kind, (3, 2), 4, 8, 3, "bfloat16") for kind in KINDS),
        *((*kind, (2,), 3, 1, 1, "float16") for kind in KINDS[::5]),
        *((*kind, (), 0, 4, 2, "float32") for kind in KINDS[::5]),
        *((*kind, (0,), 3, 4, 2, "float32") for kind in KINDS[::5]),
    ],
)
def test_load_balancing_loss(normalization, scoring, lead, tokens, experts, top_k, dtype):
    logits, ids, mask = problem(tokens, lead, tokens, experts, top_k, dtype)
    kind = {"normalization": normalization, "scoring": scoring}

    def f(x):
        return fj.load_balancing_loss(x, ids, experts, token_mask=mask, **kind)

    assert_loss(f, logits, *balance(logits, ids, experts, mask, **kind))


@functools.cache
def compiled(normalization, scoring):
    f = functools.partial(fj.load_balancing_loss, normalization=normalization, scoring=scoring)
    return jax.jit(jax.value_and_grad(f), static_argnums=2)


@jobs
@given(
    hnp.arrays(
        np.float32, (4, 3), elements=st.one_of(st.floats(-40, 40, width=32), st.sampled_from([-np.inf, -3e38, 1e-40]))
    ),
    hnp.arrays(np.float32, (4, 1), elements=st.sampled_from([0.0, -200.0, 200.0])),
    hnp.arrays(np.int16, (4, 2), elements=st.integers(-1, 3)),
    st.sampled_from(KINDS),
)
def test_losses_of_any_logits(logits, shift, ids, kind):
    """Experts masked by -inf, rows of -inf only, rows all of whose sigmoids are 0 or 1, no mask."""
    logits = logits + shift
    want = balance(logits, ids, 3, np.ones(4, bool), normalization=kind[0], scoring=kind[1])
    oracle.assert_matches(compiled(*kind)(logits, ids, 3), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lead", [(), (9,), (2, 3)])
def test_router_z_loss(lead, dtype):
    logits, _, mask = problem(len(lead), lead[:-1], lead[-1] if lead else 1, 6, dtype=dtype)
    logits, mask = logits.reshape(*lead, 6), mask.reshape(lead)
    assert_loss(lambda x: fj.router_z_loss(x, token_mask=mask), logits, *z(logits, mask))
    plain = jnp.nan_to_num(logits, posinf=3, neginf=-1).at[..., 2].set(-jnp.inf)
    assert_loss(fj.router_z_loss, plain, *z(plain, np.ones(lead, bool)))


def test_no_token():
    x, ids = jnp.full((3, 4), jnp.nan), np.zeros((3, 2), int)
    none, dead = np.zeros(3, bool), jnp.full((3, 4), -jnp.inf)
    for normalization, scoring in KINDS[::5]:
        kind = {"normalization": normalization, "scoring": scoring}
        for logits, mask in ((x, none), (dead, None), (x[:0], None)):

            def f(x):
                return fj.load_balancing_loss(x, ids[: len(x)], 4, token_mask=mask, **kind)  # noqa: B023

            def g(x):
                return fj.router_z_loss(x, token_mask=mask)  # noqa: B023

            for value, grad in jax.jit(lambda x: [jax.value_and_grad(h)(x) for h in (f, g)])(logits):
                assert value == 0
                assert (grad == 0).all()
    assert np.isnan(fj.load_balancing_loss(x, ids, 4))  # a token that counts hides nothing
    assert np.isnan(fj.router_z_loss(x))


def test_even_load_and_definitions():
    """An even load gives K or 1; with K = 1 Switch's loss; a sequence alone is a batch alone."""
    ids = np.array([[0, 1], [2, 3], [1, 0], [3, 2]])
    loss = functools.partial(fj.load_balancing_loss, jnp.zeros((4, 4)), ids, 4)
    assert [loss(normalization=n) for n, _ in KINDS[::2]] == [2, 1, 1]
    logits, ids, _ = problem(5, (3,), 4)
    logits = jnp.nan_to_num(logits, posinf=0, neginf=0)

    def loss(x, i, n):
        return fj.load_balancing_loss(x, i, 5, normalization=n)

    each = [loss(logits[i], ids[i], "switch") for i in range(3)]
    np.testing.assert_allclose(loss(logits, ids, "deepseek"), np.mean(each), rtol=1e-6)
    p = jax.nn.softmax(logits.reshape(-1, 5))
    top = jnp.argmax(p, axis=-1)
    switch = 5 * jnp.sum(jnp.mean(jax.nn.one_hot(top, 5), 0) * jnp.mean(p, 0))
    np.testing.assert_allclose(loss(logits.reshape(-1, 5), top[:, None], "switch"), switch, rtol=1e-6)


LOSSES = {
    **{"-".join(kind): dict(zip(("normalization", "scoring"), kind, strict=True)) for kind in KINDS},
    "z": None,
}


def loss(name, logits, ids, mask, **axes):
    if LOSSES[name] is None:
        return fj.router_z_loss(logits, token_mask=mask, axis_name=sum((tuple(a) for a in axes.values()), ()) or None)
    return fj.load_balancing_loss(logits, ids, logits.shape[-1], token_mask=mask, **axes, **LOSSES[name])


@pytest.mark.parametrize("name", ["huggingface-softmax", "switch-sigmoid", "deepseek-softmax", "deepseek-sigmoid", "z"])
def test_sharded_as_on_one_device(name):
    """Sequences over one mesh axis, their tokens over another, unevenly masked: one device has none at all."""
    kind = AxisType.Auto if "softmax" in name else AxisType.Explicit
    mesh = jax.make_mesh((2, 2), ("b", "t"), axis_types=(kind, kind))
    logits, ids, mask = problem(7, (4,), 6)
    mask[:2, :3] = False
    logits = logits.at[:2, :3].set(jnp.nan)

    def one(x):
        return loss(name, x, ids, mask)

    axes = {"axis_name": ("t",), "batch_axis_name": ("b",)}

    def local(x, ids, mask):
        value, inside = jax.value_and_grad(lambda x: loss(name, x, ids, mask, **axes))(x)
        return value, inside

    spec = P("b", "t")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=(P(), spec), check_vma=True)
    want, gradient = jax.jit(jax.value_and_grad(one))(logits)
    placed = [jax.device_put(a, jax.sharding.NamedSharding(mesh, spec)) for a in (logits, ids, mask)]
    (value, inside), outside = jax.jit(
        lambda *a: (sharded(*a), jax.grad(lambda x: sharded(x, *a[1:])[0])(a[0])),
    )(*placed)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(inside, gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(outside, gradient, rtol=1e-5, atol=1e-7)


def test_sharded_over_one_axis_by_name():
    mesh = mesh_of(DEVICES)
    logits, ids, mask = problem(8, (), 8)
    want = jax.jit(jax.grad(f_one))(logits, ids, mask)

    def f(x, i, m):
        return fj.load_balancing_loss(x, i, 5, token_mask=m, axis_name="d")

    part = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P(), check_vma=True)
    np.testing.assert_allclose(jax.jit(jax.grad(part))(logits, ids, mask), want, rtol=1e-5, atol=1e-7)
    counts = jax.shard_map(
        lambda i, m: fj.expert_counts(i, 5, token_mask=m, axis_name="d"), mesh=mesh, in_specs=P("d"), out_specs=P()
    )(ids, mask)
    np.testing.assert_array_equal(counts, fj.expert_counts(ids, 5, token_mask=mask))
    # Every device holds the same tokens: a mean over copies is the mean.
    same = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=True)
    value, gradient = jax.jit(jax.value_and_grad(same))(logits, ids, mask)
    np.testing.assert_allclose(value, f_one(logits, ids, mask), rtol=1e-6)
    np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-7)


def f_one(logits, ids, mask):
    return fj.load_balancing_loss(logits, ids, 5, token_mask=mask)


def test_explicit_mesh_without_shard_map():
    mesh = jax.make_mesh((DEVICES,), ("d",))
    logits, ids, mask = problem(9, (), 8)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, P("d")) for a in (logits, ids, mask)]
        value, gradient = jax.jit(jax.value_and_grad(f_one))(*placed)
        assert jax.typeof(gradient).sharding.spec == P("d", None)
    want = jax.value_and_grad(f_one)(logits, ids, mask)
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, want[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["deepseek-sigmoid", "z"])
def test_derivatives(name):
    """Both modes, twice; and vmap over either operand."""
    logits, ids, mask = problem(10, (2,), 4)
    logits = jnp.where(mask[..., None], logits, 0)
    f = jax.jit(lambda x: loss(name, x, ids, mask))
    check_grads(f, (logits,), order=2, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)
    many = jnp.stack([logits, 2 * logits, -logits])
    f = jax.jit(jax.value_and_grad(lambda x, i, m: loss(name, x, i, m)))
    got = jax.jit(jax.vmap(f, (0, None, None)))(many, ids, mask)
    for i, x in enumerate(many):
        for g, w in zip(got, f(x, ids, mask), strict=True):
            np.testing.assert_allclose(g[i], w, rtol=1e-5, atol=1e-7)
    got = jax.vmap(f, (None, 1, 1))(logits[0], np.moveaxis(ids, 0, 1), mask.T)
    for i in range(2):
        np.testing.assert_allclose(got[0][i], f(logits[0], ids[i], mask[i])[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32])
def test_expert_counts(dtype):
    _, ids, mask = problem(11, (2, 3), 5, 4)
    ids = ids.astype(dtype)
    counts = fj.expert_counts(ids, 4, token_mask=mask)
    assert (counts.dtype, counts.shape) == (jnp.int32, (2, 3, 4))
    for i in np.ndindex(2, 3):
        for e in range(4):
            assert counts[(*i, e)] == np.sum((ids[i] == e) & mask[i][:, None])
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(lambda i, m: fj.expert_counts(i, 4, token_mask=m)))(ids, mask), counts
    )
    assert fj.expert_counts(ids[0, 0, :0], 4).tolist() == [0] * 4


def test_masked_ids_stay_masked_whatever_their_dtype():
    """-1 is 255 as uint8, which is an expert of 256."""
    ids = np.full((3, 1), 7, np.uint8)
    assert int(fj.expert_counts(ids, 256, token_mask=np.array([True, False, True])).sum()) == 2


@jobs
@given(hnp.arrays(np.int32, 5, elements=st.integers(0, 2**24 + 1) | st.integers(3, 4)), st.floats(0, 1, width=32))
def test_update_routing_bias(counts, rate):
    bias = np.linspace(-1, 1, len(counts), dtype=np.float32)
    total = sum(map(int, counts))
    sign = np.array([np.sign(total - int(c) * len(counts)) for c in counts], np.float32)
    got = fj.update_routing_bias(bias, counts, rate)
    np.testing.assert_array_equal(got, bias + np.float32(rate) * sign)


@pytest.mark.parametrize(
    ("counts", "signs"),
    [
        (np.array([2**30, 2**30, 0, 2**30], np.int32), [-1, -1, 1, -1]),
        (np.array([2**31 - 1] * 3 + [2**31 - 2], np.int32), [-1, -1, -1, 1]),
        (np.array([3 * 10**9, 5, 5]), [-1, 1, 1]),
        (np.array([2**32 - 1, 5, 5], np.uint32), [-1, 1, 1]),
    ],
)
def test_update_routing_bias_by_counts_whose_sum_is_large(counts, signs):
    assert fj.update_routing_bias(jnp.zeros(len(counts)), counts, 1.0).tolist() == signs


def test_update_routing_bias_of_layers():
    counts = np.array([[3, 1, 2], [5, 5, 5]])
    bias = jnp.zeros((2, 3), jnp.bfloat16)
    update = jax.jit(fj.update_routing_bias)
    got = update(bias, counts, jnp.float32(0.5))
    assert (got.dtype, got.tolist()) == (jnp.bfloat16, [[-0.5, 0.5, 0], [0, 0, 0]])
    np.testing.assert_array_equal(jax.vmap(update, (0, 0, None))(bias, counts, 0.5), got)
    np.testing.assert_array_equal(jax.jacobian(lambda b: update(b, counts[0], 0.5))(bias[0]), np.eye(3))


def test_x64(x64):
    logits, ids, mask = problem(12, (2,), 3)
    ids = ids.astype(np.int64) + 2**32 * (ids == 1)  # no expert: not to be narrowed by wrapping
    results = [loss(name, logits, ids, mask) for name in LOSSES] + [
        fj.update_routing_bias(logits[0, 0], np.arange(5), 0.1)
    ]
    assert {x.dtype for x in results} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(fj.expert_counts(ids, 5), fj.expert_counts(np.where(ids > 4, -1, ids), 5))


X, IDS = jnp.zeros((3, 4)), jnp.zeros((3, 2), jnp.int32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fj.load_balancing_loss(X, IDS, 5), ValueError, r"logits must have num_experts = 5.*\(3, 4\)"),
        (lambda: fj.load_balancing_loss(X, IDS[:2], 4), ValueError, r"expert_ids.*T = 3.*\(2, 2\)"),
        (lambda: fj.load_balancing_loss(X[None], jnp.stack([IDS] * 2), 4), ValueError, r"expert_ids must have.*1, 3"),
        (lambda: fj.load_balancing_loss(X, X[:, :2], 4), TypeError, "load_balancing_loss: expert_ids.*float32"),
        (lambda: fj.load_balancing_loss(IDS, IDS, 2), TypeError, "logits must be float16.*int32"),
        (lambda: fj.load_balancing_loss(X, IDS, 4.0), TypeError, "num_experts.*float"),
        (lambda: fj.load_balancing_loss(X, IDS, 4, normalization="mean"), ValueError, "'huggingface', 's.*'mean'"),
        (lambda: fj.load_balancing_loss(X, IDS, 4, scoring="relu"), ValueError, "'softmax', 'sigmoid'; got 'relu'"),
        (lambda: fj.load_balancing_loss(X, IDS, 4, token_mask=IDS), TypeError, "token_mask must be bool; got int32"),
        (lambda: fj.router_z_loss(X, token_mask=IDS > 0), ValueError, r"token_mask.*\(3,\).*got \(3, 2\)"),
        (lambda: fj.router_z_loss(IDS), TypeError, "router_z_loss: logits"),
        (lambda: fj.router_z_loss(1.0), ValueError, "router_z_loss: logits"),
        (lambda: fj.expert_counts(X, 4), TypeError, "expert_counts: expert_ids must hold integers"),
        (lambda: fj.expert_counts(IDS[0], 4), ValueError, r"expert_counts: expert_ids must be \[..., T, K\]"),
        (lambda: fj.expert_counts(IDS, 0), ValueError, "expert_counts: num_experts.*got 0"),
        (lambda: fj.expert_counts(IDS, 4, token_mask=[True]), ValueError, "expert_counts: token_mask"),
        (lambda: fj.update_routing_bias(X[0], IDS[0], 0.1), ValueError, "counts.*E = 4"),
        (lambda: fj.update_routing_bias(IDS[0], IDS[0], 0.1), TypeError, "bias must be float16"),
        (lambda: fj.update_routing_bias(X[0], X[0], 0.1), TypeError, "counts must hold integers"),
        (lambda: fj.update_routing_bias(X[0], X[0].astype(int), 1j), TypeError, "rate must be a real number"),
        (
            lambda: fj.update_routing_bias(np.zeros(70_000, "f4"), np.zeros(70_000, int), 0.1),
            ValueError,
            "at most 46341 experts",
        ),
        (lambda: fj.update_routing_bias(X, X.astype(int), X), ValueError, r"rate must be a scalar.*\(3, 4\)"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
