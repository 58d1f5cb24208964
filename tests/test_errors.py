"""Wrong arguments: the documented error at trace time, in words that help."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, SMALL, rng
from jax.sharding import PartitionSpec as P

import ferrum_jax as fj


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def of(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


BIG = 2**31 - 1
MISUSES = {
    # routing
    "top_k 0": (lambda x: fj.route_topk_softmax(x, 0), [f32(3, 4)], ValueError, ["top_k", "[1, 4]", "got 0"]),
    "top_k > E": (lambda x: fj.route_topk_softmax(x, 5), [f32(3, 4)], ValueError, ["top_k", "[1, 4]", "got 5"]),
    "top_k float": (lambda x: fj.route_topk_softmax(x, 2.0), [f32(3, 4)], TypeError, ["top_k", "int", "float"]),
    "top_k traced": (fj.route_topk_softmax, [f32(3, 4), i32()], TypeError, ["top_k", "traced"]),
    "its name": (lambda x: fj.route_topk_softmax(x, 1), [i32(3, 4)], TypeError, ["route_topk_softmax: logits"]),
    "replay": (
        lambda x, i: fj.route_topk(x, 1, forced_ids=i, implementation="cuda"),
        [f32(3, 4), i32(3, 1)],
        ValueError,
        ["route_topk: implementation", "'cuda'"],
    ),
    "table's name": (
        lambda i: fj.moe_align_block_size_pair_ids(i, 4, 2),
        [f32(3, 2)],
        TypeError,
        ["moe_align_block_size_pair_ids: expert_ids", "float32"],
    ),
    "no experts": (lambda x: fj.route_topk_softmax(x, 1), [f32(3, 0)], ValueError, ["top_k", "logits", "(3, 0)"]),
    "scalar logits": (lambda x: fj.route_topk_softmax(x, 1), [f32()], ValueError, ["logits", "[..., E]", "()"]),
    "int logits": (lambda x: fj.route_topk_softmax(x, 1), [i32(3, 4)], TypeError, ["logits", "float32", "int32"]),
    "f64 logits": (lambda x: fj.route_topk_softmax(x, 1), [of("float64", 3, 4)], TypeError, ["logits", "float64"]),
    "f8 logits": (lambda x: fj.route_topk_softmax(x, 1), [of("float8_e4m3fn", 3, 4)], TypeError, ["logits", "float8"]),
    # tables
    "bool ids": (lambda i: fj.moe_plan(i, 4, 2), [of(bool, 3, 2)], TypeError, ["expert_ids", "integers", "bool"]),
    "float ids": (lambda i: fj.moe_plan(i, 4, 2), [f32(3, 2)], TypeError, ["expert_ids", "integers", "float32"]),
    "flat ids": (lambda i: fj.moe_plan(i, 4, 2), [i32(3)], ValueError, ["expert_ids", "[..., T, K]", "(3,)"]),
    "no num_experts": (lambda i: fj.moe_plan(i, 0, 2), [i32(3, 2)], ValueError, ["num_experts", "got 0"]),
    "pairs, no experts": (lambda i: fj.moe_build_pairs_by_token(i, -1), [i32(3, 2)], ValueError, ["num_experts", "-1"]),
    "block 0": (lambda i: fj.moe_align_block_size(i, 4, 0), [i32(3, 2)], ValueError, ["block_size", "got 0"]),
    "block str": (lambda i: fj.moe_align_block_size_pair_ids(i, 4, "2"), [i32(3, 2)], TypeError, ["block_size", "str"]),
    "P past int32": (lambda i: fj.moe_build_pairs_by_token(i, 4), [i32(2**20, 2**12)], ValueError, [f"{2**32} pairs"]),
    "S past int32": (lambda i: fj.moe_plan(i, 4, 2**30), [i32(3, 2)], ValueError, ["block_size", str(BIG)]),
    "rows past int32": (fj.moe_dispatch, [f32(2**31, 1), i32(3)], ValueError, ["x", str(2**31), str(BIG)]),
    # combine
    "combine T": (fj.moe_combine, [f32(9, 4), i32(3, 2), f32(4, 2)], ValueError, ["pair_weights", "T = 3", "(4, 2)"]),
    "combine K": (fj.moe_combine, [f32(9, 4), i32(3, 2), f32(3, 1)], ValueError, ["pair_weights", "K = 2", "(3, 1)"]),
    "combine rank": (
        fj.moe_combine,
        [f32(4), i32(3, 2), f32(3, 2)],
        ValueError,
        ["packed_down", "[..., R, H]", "(4,)"],
    ),
    "combine leads": (fj.moe_combine, [f32(2, 9, 4), i32(3, 3, 2), f32(3, 3, 2)], ValueError, ["leading", "(3, 3, 2)"]),
    "combine lead ranks": (fj.moe_combine, [f32(9, 4), i32(3, 3, 2), f32(3, 3, 2)], ValueError, ["leading"]),
    "combine int rows": (fj.moe_combine, [i32(9, 4), i32(3, 2), f32(3, 2)], TypeError, ["packed_down", "int32"]),
    "combine weights": (fj.moe_combine, [f32(9, 4), i32(3, 2), i32(3, 2)], TypeError, ["pair_weights", "floating"]),
    "combine pairs": (fj.moe_combine, [f32(9, 4), f32(3, 2), f32(3, 2)], TypeError, ["pairs_by_token", "float32"]),
    "dispatch idx": (fj.moe_dispatch, [f32(9, 4), of(bool, 3)], TypeError, ["packed_token_idx", "bool"]),
    "dispatch f64": (fj.moe_dispatch, [of("float64", 9, 4), i32(3)], TypeError, ["x", "float64"]),
    "dispatch pairs": (
        lambda x, i, p: fj.moe_dispatch(x, i, pairs_by_token=p),
        [f32(9, 4), i32(18), i32(8, 2)],
        ValueError,
        ["pairs_by_token", "T = 9", "(8, 2)"],
    ),
    "slots": (fj.weighted_sum_batched, [f32(3, 2, 4), f32(3, 3)], ValueError, ["weights", "K = 2", "(3, 3)"]),
    # grouped product
    "routing": (
        lambda x, w: fj.grouped_matmul(x, w, (1, 2)),
        [f32(6, 4), f32(3, 4, 5)],
        TypeError,
        ["routing", "tuple"],
    ),
    "blocks": (
        lambda x, w, *r: fj.grouped_matmul(x, w, fj.MoeRouting(*r)),
        [f32(6, 4), f32(3, 4, 5), i32(10), i32(3), i32()],
        ValueError,
        ["routing", "10 slots", "3 blocks"],
    ),
    "no blocks": (
        lambda x, w, *r: fj.grouped_matmul(x, w, fj.MoeRouting(*r)),
        [f32(6, 4), f32(3, 4, 5), i32(10), i32(0), i32()],
        ValueError,
        ["routing", "0 blocks"],
    ),
    "total": (
        lambda x, w, *r: fj.grouped_matmul(x, w, fj.MoeRouting(*r)),
        [f32(6, 4), f32(3, 4, 5), i32(9), i32(3), i32(1)],
        ValueError,
        ["total_tokens_post_pad", "(1,)"],
    ),
    "rhs H": (
        lambda x, w, i: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2)),
        [f32(6, 4), f32(3, 5, 4), i32(6, 1)],
        ValueError,
        ["rhs", "H = 4", "(3, 5, 4)"],
    ),
    "rhs dtype": (
        lambda x, w, i: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2)),
        [f32(6, 4), of("bfloat16", 3, 4, 5), i32(6, 1)],
        TypeError,
        ["rhs", "lhs", "bfloat16"],
    ),
    "product top_k": (
        lambda x, w, i: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2), top_k=0),
        [f32(6, 4), f32(3, 4, 5), i32(6, 1)],
        ValueError,
        ["top_k", "got 0"],
    ),
    "product past int32": (
        lambda x, w, i: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2), top_k=2**30),
        [f32(6, 4), f32(3, 4, 5), i32(6, 1)],
        ValueError,
        ["lhs", "6 rows", str(BIG)],
    ),
    "preferred": (
        lambda x, w, i: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2), preferred_element_type="int32"),
        [f32(6, 4), f32(3, 4, 5), i32(6, 1)],
        TypeError,
        ["preferred_element_type", "int32"],
    ),
    "product activation": (
        lambda x, w, i: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2), activation="tanh"),
        [f32(6, 4), f32(3, 4, 6), i32(6, 1)],
        ValueError,
        ["activation", "'silu'", "'tanh'"],
    ),
    "precision": (
        lambda x, w, i: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2), precision="tf32"),
        [f32(6, 4), f32(3, 4, 5), i32(6, 1)],
        ValueError,
        ["precision", "'tensorfloat32'", "'highest'", "'tf32'"],
    ),
    "gate and up": (
        lambda x, w, i: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2), activation="silu"),
        [f32(6, 4), f32(3, 4, 5), i32(6, 1)],
        ValueError,
        ["rhs", "even", "(3, 4, 5)"],
    ),
    "row weights": (
        lambda x, w, i, r: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2), row_weights=r),
        [f32(6, 4), f32(3, 4, 5), i32(6, 1), f32(5)],
        ValueError,
        ["row_weights", "P = 6", "(5,)"],
    ),
    "row weights of no tokens": (
        lambda x, w, i, r: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2), row_weights=r),
        [f32(0, 4), f32(3, 4, 5), i32(0, 1), f32(5)],
        ValueError,
        ["grouped_matmul:", "row_weights", "P = 0", "(5,)"],
    ),
    "activation's type": (
        lambda x, w, i: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2), activation=("silu",)),
        [f32(6, 4), f32(3, 4, 6), i32(6, 1)],
        TypeError,
        ["activation", "tuple"],
    ),
    "preferred name": (
        lambda x, w, i: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2), preferred_element_type="foo"),
        [f32(6, 4), f32(3, 4, 5), i32(6, 1)],
        TypeError,
        ["preferred_element_type", "foo"],
    ),
    "row weights' dtype": (
        lambda x, w, i, r: fj.grouped_matmul(x, w, fj.moe_plan(i, 3, 2), row_weights=r),
        [f32(6, 4), f32(3, 4, 5), i32(6, 1), i32(6)],
        TypeError,
        ["grouped_matmul:", "row_weights", "int32"],
    ),
    # ragged_dot
    "ragged rank": (fj.ragged_dot, [f32(4), f32(3, 4, 5), i32(3)], ValueError, ["ragged_dot: lhs", "[..., M, H]"]),
    "ragged rhs": (fj.ragged_dot, [f32(6, 4), f32(4, 5), i32(3)], ValueError, ["rhs", "[..., G, H, N]", "(4, 5)"]),
    "ragged H": (fj.ragged_dot, [f32(6, 4), f32(3, 5, 4), i32(3)], ValueError, ["rhs", "H = 4", "(3, 5, 4)"]),
    "ragged, transposed H": (
        lambda *a: fj.ragged_dot(*a, transpose_rhs=True),
        [f32(6, 4), f32(3, 4, 5), i32(3)],
        ValueError,
        ["rhs", "[..., G, N, H]", "H = 4", "(3, 4, 5)"],
    ),
    "ragged dtype": (
        fj.ragged_dot,
        [f32(6, 4), of("bfloat16", 3, 4, 5), i32(3)],
        TypeError,
        ["rhs", "lhs", "bfloat16"],
    ),
    "sizes' rank": (fj.ragged_dot, [f32(6, 4), f32(3, 4, 5), i32()], ValueError, ["group_sizes", "[..., G]", "()"]),
    "sizes' dtype": (
        fj.ragged_dot,
        [f32(6, 4), f32(3, 4, 5), f32(3)],
        TypeError,
        ["group_sizes", "integers", "float32"],
    ),
    "more sizes": (fj.ragged_dot, [f32(6, 4), f32(3, 4, 5), i32(4)], ValueError, ["group_sizes", "G = 3", "(4,)"]),
    "fewer sizes": (
        lambda *a: fj.ragged_dot(*a, group_offset=1),
        [f32(6, 4), f32(3, 4, 5), i32(2)],
        ValueError,
        ["group_sizes", "all groups", "at least the 3 of rhs", "(2,)"],
    ),
    "no groups": (fj.ragged_dot, [f32(6, 4), f32(0, 4, 5), i32(0)], ValueError, ["rhs", "G >= 1", "(0, 4, 5)"]),
    "offset's rank": (
        lambda x, w, s, o: fj.ragged_dot(x, w, s, group_offset=o),
        [f32(6, 4), f32(3, 4, 5), i32(4), i32(1)],
        ValueError,
        ["group_offset", "leading axes", "(1,)"],
    ),
    "offset's dtype": (
        lambda *a: fj.ragged_dot(*a, group_offset=0.5),
        [f32(6, 4), f32(3, 4, 5), i32(4)],
        TypeError,
        ["group_offset", "integers", "float"],
    ),
    "ragged implementation": (
        lambda *a: fj.ragged_dot(*a, implementation="cuda"),
        [f32(6, 4), f32(3, 4, 5), i32(3)],
        ValueError,
        ["ragged_dot: implementation", "'triton'", "'cuda'"],
    ),
    "ragged precision": (
        lambda *a: fj.ragged_dot(*a, precision="tf32"),
        [f32(6, 4), f32(3, 4, 5), i32(3)],
        ValueError,
        ["ragged_dot: precision", "'tensorfloat32'", "'tf32'"],
    ),
    "ragged type": (
        lambda *a: fj.ragged_dot(*a, preferred_element_type="int32"),
        [f32(6, 4), f32(3, 4, 5), i32(3)],
        TypeError,
        ["ragged_dot: preferred_element_type", "int32"],
    ),
    "slots rank": (fj.weighted_sum_batched, [f32(3, 2), f32(3, 2)], ValueError, ["slots", "[..., T, K, H]"]),
}


@pytest.mark.parametrize("name", MISUSES)
@pytest.mark.usefixtures("x64")
def test_named_error_at_trace_time(name):
    f, args, error, words = MISUSES[name]
    with pytest.raises(error) as info:
        jax.eval_shape(f, *args)
    for word in words:
        assert word in str(info.value), str(info.value)


X, IDS = np.ones((3, 4), np.float32), np.zeros((3, 2), np.int32)
ROUTED = fj.RouterOutput(IDS[:, :1], X[:, :1])
PAIRS = fj.TokenPairs(IDS, IDS.reshape(-1), np.zeros(5, np.int32))


def mlp(**kwargs):
    return fj.moe_mlp(X, None if "router_output" in kwargs else X, np.ones((4, 4, 2)), np.ones((4, 1, 4)), **kwargs)


def over_devices(**kwargs):
    def run(*a):
        return fj.parallel.moe_mlp(*a, axis_name="d", **kwargs)

    args = X, X, np.ones((4, 4, 2)), np.ones((4, 1, 4))
    return jax.shard_map(run, mesh=jax.make_mesh((1,), ("d",)), in_specs=P(), out_specs=P())(*args)


SIZES = {
    "route_topk: top_k": lambda v: fj.route_topk(X, v),
    "route_topk: num_groups": lambda v: fj.route_topk(X, 1, num_groups=v, group_top_k=1),
    "route_topk: group_top_k": lambda v: fj.route_topk(X, 1, num_groups=2, group_top_k=v),
    "route_topk_softmax: top_k": lambda v: fj.route_topk_softmax(X, v),
    "moe_route_plan: top_k": lambda v: fj.moe_route_plan(X, v, 2),
    "moe_route_plan: block_size": lambda v: fj.moe_route_plan(X, 1, v),
    "moe_build_pairs_by_token: num_experts": lambda v: fj.moe_build_pairs_by_token(IDS, v),
    "moe_plan: num_experts": lambda v: fj.moe_plan(IDS, v, 2),
    "moe_plan: block_size": lambda v: fj.moe_plan(IDS, 4, v),
    "max_aligned_rows: num_pairs": lambda v: fj.max_aligned_rows(v, 4, 2),
    "moe_mlp: block_size": lambda v: mlp(router_output=ROUTED, block_size=v),
    "moe_mlp: top_k": lambda v: mlp(router_output=ROUTED, top_k=v),
    "parallel.moe_mlp: capacity": lambda v: over_devices(capacity=v, return_dropped=True),
    "limit_capacity: capacity": lambda v: fj.limit_capacity(ROUTED, 4, v),
    "expert_counts: num_experts": lambda v: fj.expert_counts(IDS, v),
    "routing_stats: block_size": lambda v: fj.routing_stats(ROUTED, 4, block_size=v),
}


@pytest.mark.parametrize("name", SIZES)
def test_true_is_no_size(name):
    with pytest.raises(TypeError, match=f"^{name} must be a Python int.*; got bool"):
        jax.eval_shape(lambda: SIZES[name](True))


FLAGS = {
    "route_topk: norm_topk_prob": lambda v: fj.route_topk(X, 1, norm_topk_prob=v),
    "route_topk_softmax: norm_topk_prob": lambda v: mlp(top_k=1, norm_topk_prob=v),
    "moe_route_plan: norm_topk_prob": lambda v: fj.moe_route_plan(X, 1, 2, norm_topk_prob=v),
    "moe_route_plan: pair_ids": lambda v: fj.moe_route_plan(X, 1, 2, pair_ids=v),
    "moe_plan: pair_ids": lambda v: fj.moe_plan(IDS, 4, 2, pair_ids=v),
    "moe_combine: unique_rows": lambda v: fj.moe_combine(X, IDS, np.ones((3, 2)), unique_rows=v),
    "ragged_dot: transpose_rhs": lambda v: fj.ragged_dot(X, np.ones((2, 4, 4), "f4"), [1, 1], transpose_rhs=v),
    "check_routing: pair_ids": lambda v: fj.check_routing(PAIRS, 4, pair_ids=v),
    "parallel.moe_mlp: return_dropped": lambda v: over_devices(top_k=1, return_dropped=v),
}


@pytest.mark.parametrize("name", FLAGS)
def test_what_is_no_bool_is_no_flag(name):
    by_table = name in ("moe_combine: unique_rows", "check_routing: pair_ids")  # None: what the table says
    for wrong, kind in (("no", "str"), (1, "int"), *([] if by_table else [(None, "NoneType")])):
        with pytest.raises(TypeError, match=f"^{name} must be True or False; got {kind}"):
            jax.eval_shape(lambda wrong=wrong: FLAGS[name](wrong))


def test_a_flag_may_be_numpys_and_a_scale_no_flag():
    assert fj.moe_plan(IDS, 4, 2, pair_ids=np.True_).sorted_token_ids.shape == (10,)
    with pytest.raises(TypeError, match=r"route_topk: scale must be a Python number.*; got bool"):
        fj.route_topk(X, 1, scale=True)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("moe_combine", "grouped_matmul")], ids=str)
def test_unknown_implementation_lists_the_choices(case):
    function = case.name.partition("-")[0].removesuffix("_activated")
    with pytest.raises(ValueError, match=rf"^{function}: .* None, 'xla', 'triton', 'pallas'; got 'cuda'"):
        case.results(*case.args(rng(case), SMALL, "float32"), size=SMALL, implementation="cuda")


@pytest.mark.parametrize("wrong", [None, "rows", [[1.0], [2.0, 3.0]]])
def test_what_is_no_array_is_named(wrong):
    with pytest.raises(TypeError, match=r"moe_combine: packed_down must be an array, \[..., R, H\]; got"):
        fj.moe_combine(wrong, np.zeros((3, 2), np.int32), np.zeros((3, 2), np.float32))


def test_a_reduced_operand_is_refused_with_the_remedy():
    mesh = jax.make_mesh((4,), ("d",))
    with jax.set_mesh(mesh):
        rows = jax.device_put(jnp.ones((8, 4)), jax.sharding.NamedSharding(mesh, P(None, None, reduced={"d"})))
        with pytest.raises(ValueError, match=r"packed_down is .*reshard"):
            jax.jit(fj.moe_combine)(rows, jnp.zeros((3, 2), jnp.int32), jnp.zeros((3, 2)))


@pytest.mark.parametrize("args", [(-1, 4, 4), (4, 0, 4), (4, 4, 0), (2**31, 4, 4), (4, 4, 2**30)])
def test_max_aligned_rows_ranges(args):
    with pytest.raises(ValueError, match="max_aligned_rows"):
        fj.max_aligned_rows(*args)
    with pytest.raises(TypeError, match="num_pairs"):
        fj.max_aligned_rows(1.5, 4, 4)


def test_sizes_may_be_numpy_integers():
    assert fj.route_topk_softmax(jnp.zeros((2, 3)), np.int64(2)).expert_ids.shape == (2, 2)
