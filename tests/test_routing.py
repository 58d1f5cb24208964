"""The router's whole menu: scorings, bias, groups, zero sums, replay, masks, maps; values, derivatives, kernels."""

import functools
import itertools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import rng
from compiled import for_h200, launches, needs_pjrt, needs_plugin, whole_program_for_h200
from conftest import KERNELS
from derivatives import check_derivatives
from hypothesis import HealthCheck, given, settings
from shapes import MODELS

import ferrum_jax
from ferrum_jax import route_topk
from ferrum_jax.ops.scoring import GROUP_SCORES, SCORINGS, ZERO_SUMS

GROUPS = ({}, *({"num_groups": 5, "group_top_k": 3, "group_score": score} for score in GROUP_SCORES))
DIVISIONS = [*({"norm_topk_prob": True, "zero_sum": rule} for rule in ZERO_SUMS), {"norm_topk_prob": False}]
MENU = [{"scale": 2.5, **division, **groups} for division, groups in itertools.product(DIVISIONS, GROUPS)]
HOSTILE = [-np.inf, np.inf, np.nan, -np.nan, 0.0, -0.0, 1e-40, -1e-45, 3e38, -3e38, -90.0, -200.0, 90.0]


def rows(r, experts):
    """Plain, tied, equal, masked, low, wide, broken and hostile rows."""
    x = r.normal(size=(10, experts)).astype(np.float32)
    x[1], x[2], x[3] = np.round(x[1]), 0.5, -np.inf
    x[4, r.random(experts) < 0.6] = -np.inf
    x[5] -= 100
    x[6] *= 60
    x[7] = np.nan
    for t in (8, 9):
        where = r.random(experts) < 0.4
        x[t, where] = r.choice(HOSTILE, size=where.sum())
    return x


def biases(r, experts):
    """Of the scores' size; negative and tied; towards what is masked or low; hostile."""
    anything = np.where(r.random(experts) < 0.3, r.choice([np.nan, np.inf, -np.inf], size=experts), 0.5)
    some = [r.normal(size=experts), np.round(r.normal(size=experts)) - 3, np.arange(experts) * 10.0, anything]
    return np.stack(some).astype(np.float32)


def check(got, x, bias, top_k, **chosen):
    want = oracle.route_topk(x, bias, top_k=top_k, got=np.asarray(got.expert_ids), **chosen)
    oracle.assert_matches(got, want)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_every_combination(scoring):
    """In one program for each scoring: every row with every bias, and with none."""
    r = rng("menu", scoring)
    x, every = rows(r, 15), biases(r, 15)

    @jax.jit
    def run(x, every):
        wide = jnp.broadcast_to(x, (len(every), *x.shape))
        route = functools.partial(route_topk, top_k=6, scoring=scoring)
        return [(route(x, **chosen), route(wide, bias=every, **chosen)) for chosen in MENU]

    for chosen, (plain, biased) in zip(MENU, run(x, every), strict=True):
        check(plain, x, None, 6, scoring=scoring, **chosen)
        for i, bias in enumerate(every):
            one = ferrum_jax.RouterOutput(*(result[i] for result in biased))
            check(one, x, bias, 6, scoring=scoring, **chosen)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_any_shape(data):
    """Any groups of any size, one group, groups of one, K = E; logits of any bits."""
    groups, size = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 6))
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, kept * size))
    r = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = rows(r, groups * size)
    x[8] = r.integers(0, 2**32, size=groups * size, dtype=np.uint32).view(np.float32)
    bias = data.draw(st.sampled_from([None, *biases(r, groups * size)]))
    chosen = {
        "scoring": data.draw(st.sampled_from(SCORINGS)),
        "norm_topk_prob": data.draw(st.booleans()),
        "zero_sum": data.draw(st.sampled_from(ZERO_SUMS)),
        "scale": data.draw(st.sampled_from([1.0, -0.5, 1e3])),
        "group_score": data.draw(st.sampled_from(GROUP_SCORES)),
        "num_groups": groups,
        "group_top_k": kept,
    }
    check(route_topk(x, top_k, bias=bias, **chosen), x, bias, top_k, **chosen)


def interpreted_case(seed):
    r = rng("interpreted", seed)
    groups, size = (int(r.integers(1, most)) for most in (6, 7))
    kept = int(r.integers(1, groups + 1))
    chosen = {
        "scoring": SCORINGS[seed % 4],
        "norm_topk_prob": bool(r.integers(4)),
        "zero_sum": ZERO_SUMS[seed % 3],
        "scale": float(r.choice([1.0, -2.5])),
        "group_score": GROUP_SCORES[seed // 4 % 2],
        "num_groups": groups,
        "group_top_k": kept,
    }
    x = rows(r, groups * size)
    bias = None if r.integers(3) == 0 else biases(r, groups * size)[r.integers(4)]
    return x, bias, int(r.integers(1, kept * size + 1)), chosen


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(n, marks=pytest.mark.full) for n in range(6, 24))])
def test_menu_on_each_implementation(seed, implementation):
    x, bias, top_k, chosen = interpreted_case(seed)
    check(route_topk(x, top_k, bias=bias, implementation=implementation, **chosen), x, bias, top_k, **chosen)


def test_menu_on_a_kernel():
    """One of the same in every run."""
    x, bias, top_k, chosen = interpreted_case(4)
    with ferrum_jax.interpret_kernels():
        got = route_topk(x, top_k, bias=bias, implementation="triton", **chosen)
    check(got, x, bias, top_k, **chosen)


# ---- what the rules say, in numbers


def ids(x, top_k, **chosen):
    return route_topk(np.asarray([x], np.float32), top_k, **chosen).expert_ids[0].tolist()


def test_masked_groups_are_not_masked_by_zero():
    """Biased scores below 0: experts of a group that is not kept would come first, were they 0."""
    bias = np.array([-5, -5, -4, -4, -6, -6], np.float32)
    grouped = {"scoring": "sigmoid", "bias": bias, "num_groups": 3, "group_top_k": 2}
    assert ids([0.0] * 6, 4, **grouped) == [2, 3, 0, 1]
    assert ids([0.0] * 6, 4, **grouped, group_score="max") == [2, 3, 0, 1]


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("group_score", GROUP_SCORES)
def test_ties_go_to_the_smaller_group_and_id(scoring, group_score):
    grouped = {"scoring": scoring, "num_groups": 4, "group_top_k": 2, "group_score": group_score}
    assert ids([1.0] * 12, 6, **grouped) == [0, 1, 2, 3, 4, 5]
    assert ids([0, 0, 0, 2, 1, 0, 1, 2, 0, 2, 1, 1], 3, **grouped) == [3, 7, 4]
    assert ids([np.nan] * 12, 6, **grouped) == [0, 1, 2, 3, 4, 5]


def test_how_groups_rank():
    """By two, by one, and by the one that a group has; a sum with NaN last."""
    x = [3, 0, 0, 2, 2, 0, 2, 1.5, 1.5]
    groups = {"scoring": "topk_softmax", "num_groups": 3, "group_top_k": 1}
    assert ids(x, 2, **groups) == [3, 4]
    assert ids(x, 2, **groups, group_score="max") == [0, 1]
    x = [3, np.nan, np.nan, 0, 0, 0, -1, -1, np.nan]
    assert ids(x, 3, **groups) == [3, 4, 5]
    assert ids(x, 3, **groups, group_score="max") == [0, 1, 2]
    for group_score in GROUP_SCORES:
        one = {"num_groups": 4, "group_top_k": 2, "group_score": group_score}
        assert ids([1, 3, 2, 3], 2, scoring="sigmoid", **one) == [1, 3]


def test_a_bias_chooses_and_does_not_weigh():
    x = np.log(np.array([[1, 2, 3, 4]], np.float32))
    got = route_topk(x, 2, bias=np.array([2.0, 1.0, 0.0, 0.0]))
    assert got.expert_ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(got.expert_weights, [[1 / 3, 2 / 3]], rtol=1e-6)
    got = route_topk(x, 2, bias=np.array([2.0, 1.0, 0.0, 0.0]), norm_topk_prob=False)
    np.testing.assert_allclose(got.expert_weights, [[0.1, 0.2]], rtol=1e-6)
    gradient = jax.grad(lambda b: jnp.sum(route_topk(x, 2, bias=b).expert_weights[:, 0]))(jnp.ones(4))
    np.testing.assert_array_equal(gradient, np.zeros(4))


@pytest.mark.parametrize(("zero_sum", "want"), [("uniform", 1.25), ("zero", 0), ("eps", 0)])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_zero_sums(scoring, zero_sum, want):
    """Of chosen experts that are all masked; nothing that is only small counts as 0."""
    x = jnp.array([[-jnp.inf, -jnp.inf, 1.0, 2.0], [-jnp.inf] * 4, [-300.0, -301.0, -302.0, -303.0]])
    forced = np.array([[0, 1]] * 3)  # as no bias can with "topk_softmax"
    given = {"forced_ids": forced} if scoring == "topk_softmax" else {"bias": np.array([2e3, 1e3, 0, 0])}
    route = functools.partial(route_topk, top_k=2, scoring=scoring, zero_sum=zero_sum, scale=2.5, **given)
    got = route(x).expert_weights
    np.testing.assert_array_equal(got[:2], np.full((2, 2), want))
    gradient = jax.grad(lambda x: jnp.sum(route(x).expert_weights[:, 0]))(x)
    np.testing.assert_array_equal(gradient[:2], np.zeros((2, 4)))
    ratio = 1 / (1 + np.exp(-0.5 if scoring == "sqrt_softplus" else -1))
    small = scoring in ("sigmoid", "sqrt_softplus") and zero_sum == "eps"
    np.testing.assert_allclose(got[2, 0], 0 if small else 2.5 * ratio, rtol=1e-6, atol=1e-30)


def test_special_logits():
    """What each scoring gives for masked, infinite and undefined logits."""
    x = np.array([[np.inf, 0.0, np.nan, -np.inf]], np.float32)
    for scoring, raw, norm in [
        ("softmax", [np.nan] * 4, [np.nan] * 4),
        ("topk_softmax", [np.nan] * 4, [np.nan] * 4),
        ("sigmoid", [1, 0.5, 0, np.nan], [np.nan] * 4),
        ("sqrt_softplus", [np.inf, np.log(2) ** 0.5, 0, np.nan], [np.nan] * 4),
    ]:
        for want, norm_topk_prob in ((raw, False), (norm, True)):
            got = route_topk(x, 4, scoring=scoring, norm_topk_prob=norm_topk_prob)
            assert got.expert_ids.tolist() == [[0, 1, 3, 2]]
            np.testing.assert_allclose(got.expert_weights[0], want, rtol=1e-6)
    got = route_topk(x, 2, scoring="topk_softmax", bias=np.array([-np.inf, 1, 0, 2]))
    np.testing.assert_array_equal(got.expert_weights, [[1, 0]])  # what is not chosen does not count
    got = route_topk(x, 2, scoring="sqrt_softplus")
    np.testing.assert_array_equal(got.expert_weights, [[np.nan, 0]])


# ---- replay, mask, map

SETTINGS = [
    {"scoring": "softmax", "scale": 2.0, "zero_sum": "eps"},
    {"scoring": "softmax", "norm_topk_prob": False},
    {"scoring": "topk_softmax"},
    {"scoring": "sigmoid", "scale": 2.5},
    {"scoring": "sqrt_softplus", "zero_sum": "zero"},
    {"scoring": "sqrt_softplus", "norm_topk_prob": False},
]


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_replay(chosen):
    """Values and gradients of the ids that a routing chose are that routing's; a stranger's are 0."""
    r = rng("replay", chosen)
    x, bias, g = jnp.asarray(rows(r, 12)), biases(r, 12)[0], r.normal(size=(10, 4)).astype(np.float32)
    alone = np.where(np.arange(4) == 1, g, 0).astype(np.float32)

    @jax.jit
    def run(x, g, alone):
        route = functools.partial(route_topk, top_k=4, **chosen)
        routed = functools.partial(route, bias=bias, num_groups=4, group_top_k=3)
        ids = routed(x).expert_ids
        first, back = jax.vjp(lambda x: routed(x).expert_weights, x)
        again, back_again = jax.vjp(lambda x: route(x, forced_ids=ids).expert_weights, x)
        strange = jnp.where(jnp.arange(4) == 1, jnp.arange(10)[:, None] % 2 * 13 - 1, ids)
        kept = route(x, forced_ids=strange).expert_ids
        got, back_strange = jax.vjp(lambda x: route(x, forced_ids=strange).expert_weights, x)
        return ids, (first, back(g)), (again, back_again(g)), kept, got, back_strange(alone)[0]

    ids, first, again, kept, got, gradient = run(x, g, alone)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(kept, np.where(np.arange(4) == 1, -1, ids))
    defaults = {"norm_topk_prob": True, "scale": 1.0, "zero_sum": "uniform"}
    for t in range(7):  # those of finite logits
        want = oracle.topk_weights(np.asarray(x)[t], np.asarray(kept)[t], **{**defaults, **chosen})
        oracle.assert_close(got[t], want, np.abs(want), np.float32)
    np.testing.assert_array_equal(gradient[:7], np.zeros((7, 12)))


def test_replay_has_no_kernel_and_says_so():
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(NotImplementedError, match="no kernel for forced_ids"), ferrum_jax.interpret_kernels():
        route_topk(x, 1, forced_ids=np.zeros((2, 1), np.int32), implementation="triton")


@pytest.mark.parametrize(("scoring", "replay"), [*zip(SCORINGS, [False, True, True, False], strict=True)])
def test_token_mask(scoring, replay):
    x = jnp.asarray(rows(rng("mask"), 8))
    mask = np.arange(10) % 7 < 2
    forced = np.zeros((10, 3), np.int32) + np.arange(3, dtype=np.int32) if replay else None
    route = functools.partial(route_topk, top_k=3, scoring=scoring, forced_ids=forced)
    got, want = route(x, token_mask=mask), route(x)
    for a, b, none in zip(got, want, (-1, 0), strict=True):
        np.testing.assert_array_equal(a, np.where(mask[:, None], b, none))

    def loss(x, **given):
        return jnp.sum(route(x, **given).expert_weights ** 2 * jnp.arange(1.0, 4)[None])

    gradient = jax.jit(jax.grad(loss))
    np.testing.assert_array_equal(gradient(x, token_mask=mask)[~mask], np.zeros((6, 8)))
    np.testing.assert_array_equal(gradient(x, token_mask=mask)[mask], gradient(x)[mask])


def test_expert_map():
    x = np.array([[3, 2, 1, 0], [0, 1, 2, 3], [1, 2, 3, 0]], np.float32)
    names = np.array([-1, 0, 2**32, 1])
    got = route_topk(x, 2, expert_map=names, token_mask=np.array([True, True, False]))
    assert got.expert_ids.tolist() == [[-1, 0], [1, -1], [-1, -1]]
    np.testing.assert_array_equal(got.expert_weights[:2], route_topk(x, 2).expert_weights[:2])
    got = route_topk(x, 2, expert_map=names, forced_ids=np.array([[1, 4], [3, -1], [0, 1]]))
    assert got.expert_ids.tolist() == [[0, -1], [1, -1], [-1, 0]]


def test_expert_map_and_mask_in_an_explicit_mesh():
    x = rng("mesh").normal(size=(8, 4)).astype(np.float32)
    mask, names = np.arange(8) % 3 > 0, np.array([3, -1, 1, 0])
    route = jax.jit(lambda x, mask: route_topk(x, 2, token_mask=mask, expert_map=names, scoring="sigmoid"))
    want = route(x, mask)
    mesh = jax.make_mesh((min(4, jax.device_count()),), ("d",))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, jax.sharding.PartitionSpec("d")) for a in (x, mask)]
        for got, w in zip(route(*placed), want, strict=True):
            np.testing.assert_allclose(got, w, rtol=1e-6)


# ---- derivatives


@pytest.mark.parametrize("chosen", [SETTINGS[i] for i in (2, 4, 5)], ids=str)  # cases.py has the others
def test_derivatives_to_second_order(chosen, every_implementation):
    x = (np.argsort(rng("order").random((3, 6)), axis=1) * 0.7 - 2).astype(np.float32)
    bias, groups = np.array([1.0, 0, 5, 4, 2, 3]), {"num_groups": 3, "group_top_k": 2}

    def f(x):
        return [route_topk(x, 3, bias=bias, implementation=every_implementation, **groups, **chosen).expert_weights]

    check_derivatives(f, (x,), seed=0)


def plain(x, ids, scoring="softmax", norm_topk_prob=True, scale=1.0, zero_sum="uniform"):
    """The weights in jnp, for JAX to differentiate; of finite logits near 0."""
    s = {
        "softmax": lambda x: jax.nn.softmax(x, axis=-1),
        "topk_softmax": jnp.exp,
        "sigmoid": jax.nn.sigmoid,
        "sqrt_softplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    }[scoring](x)
    s = jnp.take_along_axis(s, ids, axis=-1)
    if norm_topk_prob or scoring == "topk_softmax":
        s /= jnp.sum(s, axis=-1, keepdims=True) + (1e-20 if zero_sum == "eps" else 0)
    return s * scale


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_gradients_equal_those_of_plain_jnp(chosen):
    r = rng("plain", chosen)
    x = r.normal(size=(6, 9)).astype(np.float32)
    x[4] = np.where(np.arange(9) < 3, -46.0, 1.0)  # the chosen ones as small as 1e-20, where "eps" counts
    ids = np.array(list(itertools.islice(itertools.permutations(range(3)), 6)), np.int32)
    g = r.normal(size=ids.shape).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def both(f, x, g):
        out, back = jax.vjp(f, x)
        return out, back(g)[0]

    got, gradient = both(lambda x: route_topk(x, 3, forced_ids=ids, **chosen).expert_weights, x, g)
    with jax.enable_x64(True):
        want, exact = both(lambda x: plain(x, ids, **chosen), x.astype(np.float64), g.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("scoring", "zero_sum"), [*((s, "uniform") for s in SCORINGS), ("softmax", "eps")])
def test_derivatives_are_finite_where_no_logit_is_nan_or_inf(scoring, zero_sum):
    x = rows(rng("finite"), 8)[:7]
    x[6, ::2] = [3e38, -3e38, 1e-45, -1e4]
    for norm in (True, False):
        route = functools.partial(route_topk, top_k=5, scoring=scoring, zero_sum=zero_sum, norm_topk_prob=norm)

        def f(x):
            return jnp.sum(route(x, bias=jnp.arange(8.0)).expert_weights ** 2 * jnp.arange(5.0)[None])  # noqa: B023

        gradient, hessian = jax.jit(lambda x: (jax.grad(f)(x), jax.hessian(f)(x)))(x)
        assert bool(jnp.all(jnp.isfinite(gradient)))
        assert bool(jnp.all(jnp.isfinite(hessian)))
        np.testing.assert_array_equal(gradient[3], np.zeros(8))


# ---- transformations and shapes


BY_NAME = ["xla", *(pytest.param(name, marks=pytest.mark.interpreted) for name in KERNELS)]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_bias_of_some_leading_axes(name):
    """One for all, one a layer, one that only vmap maps, and logits that all of them share."""
    r = rng("leads")
    x, bias = r.normal(size=(2, 3, 6)).astype(np.float32), r.normal(size=(2, 6)).astype(np.float32)

    def route(x, b):
        return route_topk(x, 2, bias=b, scoring="sigmoid", implementation=name)

    interpreting = ferrum_jax.interpret_kernels() if name in KERNELS else jax.disable_jit(False)
    with interpreting:
        layers = route(x, bias), jax.vmap(route)(x, bias)
        shared = jax.vmap(route, (None, 0))(x[0], bias)
    for i in range(2):
        want = route_topk(x[i], 2, bias=bias[i], scoring="sigmoid", implementation="xla")
        alone = route_topk(x[0], 2, bias=bias[i], scoring="sigmoid", implementation="xla")
        for got, w in [*((layer, want) for layer in layers), (shared, alone)]:
            np.testing.assert_array_equal(got.expert_ids[i], w.expert_ids)
            np.testing.assert_allclose(got.expert_weights[i], w.expert_weights, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chosen", SETTINGS[::2], ids=str)
def test_x64_changes_nothing(chosen):
    x = rows(rng("x64"), 9)
    given = {"bias": np.arange(9.0) / 7, "num_groups": 3, "group_top_k": 2, **chosen}
    got = route_topk(x, 4, **given)
    check(got, x, given.pop("bias"), 4, **given)
    replayed = route_topk(x, 4, forced_ids=got.expert_ids, token_mask=[True] * 10, expert_map=np.arange(9), **chosen)
    np.testing.assert_array_equal(replayed.expert_weights, got.expert_weights)
    assert [r.dtype for r in replayed] == [np.int32, np.float32]
    assert not any(jax.typeof(r).weak_type for r in (*got, *replayed))


def test_groups_that_are_all_kept_are_none():
    """The ids are then those of the logits, which saturated scores do not tell apart."""
    x = [30.0, 31.0, 32.0, 33.0]
    assert ids(x, 2, scoring="sigmoid") == ids(x, 2, scoring="sigmoid", num_groups=2, group_top_k=2) == [3, 2]


# ---- errors and the choice of implementation

X = np.zeros((3, 8), np.float32)
WRONG = {
    "scoring": ({"scoring": "relu"}, ValueError, ["scoring", "'topk_softmax'", "'relu'"]),
    "group_score": ({"group_score": "sum"}, ValueError, ["group_score", "'top2_sum', 'max'", "'sum'"]),
    "zero_sum": ({"zero_sum": None}, ValueError, ["zero_sum", "'uniform', 'zero', 'eps'", "None"]),
    "groups alone": ({"num_groups": 2}, ValueError, ["num_groups=2", "group_top_k=None"]),
    "kept alone": ({"group_top_k": 2}, ValueError, ["num_groups=None", "group_top_k=2"]),
    "groups": ({"num_groups": 3, "group_top_k": 1}, ValueError, ["num_groups", "8 experts", "got 3"]),
    "no groups": ({"num_groups": 0, "group_top_k": 1}, ValueError, ["num_groups", "[1, 8]", "got 0"]),
    "kept": ({"num_groups": 4, "group_top_k": 5}, ValueError, ["group_top_k", "[1, 4]", "got 5"]),
    "float groups": ({"num_groups": 4.0, "group_top_k": 1}, TypeError, ["num_groups", "int", "float"]),
    "top_k": ({"num_groups": 8, "group_top_k": 1}, ValueError, ["top_k", "at most 1", "got 2"]),
    "scale nan": ({"scale": np.nan}, ValueError, ["scale", "finite", "nan"]),
    "scale": ({"scale": 1e39}, ValueError, ["scale", "finite", "1e+39"]),
    "scale huge": ({"scale": 10**400}, ValueError, ["scale", "finite"]),
    "scale tiny": ({"scale": 1e-40}, ValueError, ["scale", "normal", "1e-40"]),
    "scale array": ({"scale": jnp.ones(())}, TypeError, ["scale", "Python number"]),
    "bias": ({"bias": np.zeros(7)}, ValueError, ["bias", "E = 8", "(1, 7)"]),
    "int bias": ({"bias": np.zeros(8, int)}, TypeError, ["bias", "floating", "int"]),
    "bias leads": ({"bias": np.zeros((2, 8))}, ValueError, ["bias", "leading", "(2, 8)"]),
    "forced_ids": ({"forced_ids": np.zeros((3, 3), int)}, ValueError, ["forced_ids", "(3, 2)", "(3, 3)"]),
    "float ids": ({"forced_ids": np.zeros((3, 2))}, TypeError, ["forced_ids", "integers", "float"]),
    "mask": ({"token_mask": np.ones((3, 1), bool)}, ValueError, ["token_mask", "(3,)", "(3, 1)"]),
    "int mask": ({"token_mask": np.ones(3, int)}, TypeError, ["token_mask", "bool", "int"]),
    "map": ({"expert_map": np.zeros((1, 8), int)}, ValueError, ["expert_map", "(8,)", "(1, 8)"]),
    "float map": ({"expert_map": np.zeros(8)}, TypeError, ["expert_map", "integers", "float"]),
    "forced kernel": (
        {"forced_ids": np.zeros((3, 2), int), "implementation": "triton"},
        NotImplementedError,
        ["'triton'", "forced_ids"],
    ),
    "implementation": ({"implementation": "cuda"}, ValueError, ["implementation", "'pallas'", "'cuda'"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_named_errors(name):
    given, error, words = WRONG[name]
    with pytest.raises(error) as info:
        jax.eval_shape(lambda x: route_topk(x, 2, **given), X)
    for word in ("route_topk: ", *words):
        assert word in str(info.value), str(info.value)


@pytest.mark.parametrize(("x", "top_k"), [(X[:, :0], 1), (X, 0), (X, 9), (np.float32(1), 1)])
def test_sizes_out_of_range(x, top_k):
    with pytest.raises(ValueError, match=r"route_topk: (top_k|logits)"):
        route_topk(x, top_k)


def test_which():
    which = functools.partial(ferrum_jax.which, route_topk, X, 2, bias=np.zeros(8), platform="cuda", device_kind="H200")
    assert which(scoring="sigmoid", num_groups=4, group_top_k=2).implementation in ("xla", "triton")
    assert which(implementation="xla", expert_map=np.arange(8), token_mask=np.ones(3, bool)).implementation == "xla"
    assert "no triton kernel" in which(forced_ids=np.zeros((3, 2), int), expert_map=np.arange(8)).passed_over["triton"]


def test_rows_that_fit_no_program_are_refused_by_name():
    def zeros(experts):
        return np.zeros((1, experts), np.float32)

    with ferrum_jax.interpret_kernels():
        with pytest.raises(NotImplementedError, match="16384 lanes at most; 16400 take 32768"):
            route_topk(zeros(16400), 2, implementation="triton")
        with pytest.raises(NotImplementedError, match="16384 lanes at most; 10250 in 1025 groups take 32768"):
            route_topk(zeros(10250), 2, num_groups=1025, group_top_k=1, implementation="triton")
        if "pallas" in KERNELS:
            with pytest.raises(NotImplementedError, match="512 at most; got 600"):
                route_topk(zeros(1200), 2, num_groups=600, group_top_k=1, implementation="pallas")


# ---- compiled for an H200

REAL = {
    "deepseek_v3": {"scoring": "sigmoid", "num_groups": 8, "group_top_k": 4, "scale": 2.5, "zero_sum": "eps"},
    "kimi_k2": {"scoring": "sigmoid", "scale": 2.5, "zero_sum": "eps"},
    "qwen3": {"scoring": "softmax", "num_groups": 16, "group_top_k": 4, "group_score": "max", "zero_sum": "eps"},
    "qwen3_next": {"scoring": "sqrt_softplus", "norm_topk_prob": False},
    "mixtral": {"scoring": "topk_softmax"},
}


def real(model, implementation):
    experts, top_k, _ = MODELS[model]

    def f(x, bias):
        return route_topk(x, top_k, bias=bias, implementation=implementation, **REAL[model])

    return f, jax.ShapeDtypeStruct((8192, experts), jnp.bfloat16), jax.ShapeDtypeStruct((experts,), jnp.float32)


@needs_plugin
@pytest.mark.compiled
@pytest.mark.parametrize("model", REAL)
def test_triton_compiles_for_an_h200_without_spills(model):
    program = for_h200(*real(model, "triton"))
    (code,) = program.codes
    assert len(program.launches) == 1
    assert code.spilled == 0, code.registers
    assert code.registers <= 128, code.registers


@needs_plugin
@pytest.mark.compiled
def test_words_move_up_by_the_multiplier():
    """In a warp's four rows of 256, each thread's eight words do so, one less a turn; a compiler may select."""
    x = jax.ShapeDtypeStruct((65536, 256), jnp.bfloat16)
    (code,) = for_h200(lambda x: route_topk(x, 8, implementation="triton"), x).codes
    assert len(re.findall(r"@!?P\d IMAD R", code.sass)) >= 4 * sum(range(8))


@needs_plugin
@needs_pjrt
@pytest.mark.compiled
@pytest.mark.pallas
def test_pallas_compiles_for_an_h200_without_spills():
    for model in REAL:
        text, kernels = whole_program_for_h200(*real(model, "pallas"))
        assert len(launches(text)) == 1, model
        for kernel in kernels:  # what is the same as in a test before, JAX may have compiled already
            assert kernel.spilled == 0, (model, kernel.registers)
            assert kernel.registers <= 128, (model, kernel.registers)


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [
        (256, "float32"),
        *(
            pytest.param(n, d, marks=pytest.mark.interpreted)
            for n in (3, 200, 256, 4100)
            for d in ("float16", "bfloat16", "float32")
            if (n, d) != (256, "float32")
        ),
    ],
)
def test_logits_a_last_bit_apart(dtype, experts):
    """Triton's kernel first compares the bits for which a word has room beside the lane: all others must decide too."""
    r = rng(dtype, experts)
    whole = np.uint32 if dtype == "float32" else np.uint16
    small = 2**-20 if dtype == "float16" else 2**-130  # subnormal
    ones = np.array([1, -1, 300, small, -small], np.float32).astype(jnp.dtype(dtype)).view(whole)
    bits = ones[np.arange(10) % 5, None] + (r.random((10, experts)) < 9 / experts).astype(whole)
    x = jnp.asarray(bits.view(jnp.dtype(dtype)))
    top_k = min(experts, 20)
    with ferrum_jax.interpret_kernels():
        ids, weights = route_topk(x, top_k, implementation="triton")
    want = route_topk(x, top_k, implementation="xla")
    np.testing.assert_array_equal(ids, want.expert_ids)
    np.testing.assert_allclose(weights, want.expert_weights, rtol=1e-6)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("norm", [True, False])
def test_softmax_of_a_row_that_holds_what_is_not_chosen(name, norm):
    """Every score is NaN, so the first experts are chosen; the weights are NaN all the same."""
    x = np.zeros((3, 8), np.float32)
    x[:2, 7] = np.inf, np.nan
    ways = {"bias": np.zeros(8, np.float32)}, {"num_groups": 4, "group_top_k": 1}

    @jax.jit
    def run(x):
        settings = [{"norm_topk_prob": norm, "zero_sum": rule, **way} for rule in ZERO_SUMS for way in ways]
        return [route_topk(x, 2, implementation=name, **chosen) for chosen in settings]

    with ferrum_jax.interpret_kernels() if name in KERNELS else jax.disable_jit(False):
        found = run(x)
    for ids, weights in found:
        assert ids.tolist() == [[0, 1]] * 3
        assert np.isnan(weights).tolist() == [[True, True], [True, True], [False, False]]


@pytest.mark.interpreted
@pytest.mark.parametrize("scoring", ["topk_softmax", "sigmoid", "sqrt_softplus"])
def test_nan_beside_the_lanes_that_fill_up_a_group(scoring):
    """Three experts a group take four lanes: the fourth must pass for none of the next group's."""
    x = jnp.array([[0, 0, 0, jnp.nan, 5, 6.0]])
    settings = {"scoring": scoring, "num_groups": 2, "group_top_k": 1, "group_score": "max"}
    with ferrum_jax.interpret_kernels():
        ids, weights = route_topk(x, 3, **settings, implementation="triton")
    want = route_topk(x, 3, **settings, implementation="xla")
    assert ids.tolist() == want.expert_ids.tolist() == [[5, 4, 3]]
    np.testing.assert_array_equal(np.isnan(weights), np.isnan(want.expert_weights))
    assert np.isnan(weights).any()


# ---- with the tables that follow


BESIDE = {
    "plain": {},
    "settings": {"scoring": "sigmoid", "norm_topk_prob": False, "num_groups": 4, "group_top_k": 2, "scale": 2.5},
    "bias": {"bias": np.linspace(0, 1, 8, dtype=np.float32)},
    "bias of each slice": {"bias": np.linspace(0, 1, 16, dtype=np.float16).reshape(2, 8)},
    "bias of each token": {"bias": np.linspace(0, 1, 96, dtype=np.float32).reshape(2, 6, 8)},
    "forced_ids": {"forced_ids": np.arange(24).reshape(2, 6, 2) % 10 - 1},
    "token_mask": {"token_mask": np.arange(12).reshape(2, 6) % 3 > 0},
    "expert_map": {"expert_map": np.arange(8) // 2 - 1, "num_experts": 3},
    "more experts than logits": {"num_experts": 11},
}


@pytest.mark.parametrize("name", BESIDE)
def test_route_plan_is_one_after_the_other(name):
    logits, router = rng("plan").normal(size=(2, 6, 8)).astype(np.float32), dict(BESIDE[name])
    got = ferrum_jax.moe_route_plan(logits, 2, 4, pair_ids=True, **router)
    experts = router.pop("num_experts", 8)
    routed = ferrum_jax.route_topk(logits, 2, **router)
    want = routed, ferrum_jax.moe_plan(routed.expert_ids, experts, 4, pair_ids=True)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize(
    ("tokens", "experts", "together"), [(127, 5, 1), (128, 5, 1), (129, 5, 0), (32, 100, 1), (33, 100, 0), (1, 5000, 0)]
)
def test_route_plan_of_more_than_one_launch_takes(tokens, experts, together):
    logits = rng("limit").normal(size=(tokens, experts)).astype(np.float32)
    routed, plan = ferrum_jax.moe_route_plan(logits, np.int32(2), 4)
    oracle.assert_matches(routed, oracle.route_topk_softmax(logits, top_k=2))
    oracle.assert_matches(plan, oracle.moe_plan(np.asarray(routed.expert_ids), num_experts=experts, block_size=4))
    ops = str(jax.make_jaxpr(lambda x: ferrum_jax.moe_route_plan(x, 2, 4))(logits)).count("ferrum_moe_route_plan")
    assert ops == together


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": np.zeros(8, np.float32)}, ValueError, ["logits", "(8,)"]),
        ({"top_k": 9}, ValueError, ["top_k", "[1, 8]", "got 9"]),
        ({"block_size": 0}, ValueError, ["block_size", "got 0"]),
        ({"num_experts": 0}, ValueError, ["num_experts", "got 0"]),
        ({"bias": np.zeros((3, 8), np.float32)}, ValueError, ["bias", "(3, 8)"]),
        ({"scoring": "relu"}, ValueError, ["scoring", "'relu'"]),
        ({"block_size": 2.5}, TypeError, ["block_size", "float"]),
        ({"temperature": 2}, TypeError, ["moe_route_plan", "'temperature'"]),
        ({"top_k": 2.0}, TypeError, ["moe_route_plan", "top_k", "float"]),
    ],
    ids=str,
)
def test_named_errors_of_route_plan(change, error, words):
    with pytest.raises(error) as info:
        ferrum_jax.moe_route_plan(**{"logits": np.zeros((2, 6, 8), np.float32), "top_k": 2, "block_size": 4, **change})
    for word in words:
        assert word in str(info.value), str(info.value)
