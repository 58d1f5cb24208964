"""Mutation tests: each mutant is one small fault in the package, with a test that must fail on it.

`python -m tests.mutants` puts each fault into its own copy of the package, runs the fault's test there, and prints
which test caught what. `--only WORD` selects the mutants that contain that word. Most faults change values, but no
shapes, and raise no errors. So a fault counts as caught only if an assertion of
the test failed.

The exit status is 1 if a mutant survives, or if its text is not found once in its file, or if a test fails on the
package as it is.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
AT_A_TIME = 2
SECONDS = 120  # the time limit of a test


class Mutant(NamedTuple):
    """A fault in words; the text to replace in a file of the package; the test that catches it.

    A test is named by its file's name, which may lie in any folder under tests/, and its id.
    """

    fault: str
    file: str
    old: str
    new: str
    test: str


def values(case: str, by: str = "xla") -> str:
    return f"test_values.py::test_matches_oracle[{by}-{case}]"


INTERPRETED = "triton-interpreted"
WIDE, MANY, FULL = "T7-E8-K2-H130-block16", "T9-E257-K10-H20-block8", "T7-E3-K3-H5-block2"
IN_SUMS = "return jnp.sum(jnp.where(valid, weights[..., None] * taken, 0), axis=1).astype(rows.dtype)"
UP = 'Tensor(f"experts.{{}}.{up}.weight", "w_gate_up", "F H", '

MUTANTS = (
    # ---- quantised matrices
    Mutant(
        "a subnormal product of e8m0 is 0",
        "core/quantized.py",
        "jnp.where(shifted > 0, normal, subnormal)",
        "jnp.where(shifted > 0, normal, 0)",
        "test_quantized.py::test_every_number_times_every_power_of_two[mxfp4-e2m1-16]",
    ),
    Mutant(
        "the second number of a byte comes first",
        "core/quantized.py",
        "values = jnp.where(nibble, values >> 4, values & 15)",
        "values = jnp.where(nibble, values & 15, values >> 4)",
        "test_quantized.py::test_the_array_bit_for_bit[int4-1]",
    ),
    Mutant(
        "up goes on with the block of gate",
        "core/quantized.py",
        "return np.concatenate([each + i * -(-part // block) for i in range(parts)]).astype(np.int32)",
        "return (np.arange(width, dtype=np.int32) // block).astype(np.int32)",
        "test_quantized.py::test_the_array_bit_for_bit[fp8 blocks-2]",
    ),
    Mutant(
        "a tile of a matrix takes the scales of the first one",
        "ops/quantized_meaning.py",
        "lax.dynamic_slice_in_dim(of_row, first, tile)",
        "lax.dynamic_slice_in_dim(of_row, 0 * first, tile)",
        "test_quantized.py::test_matrices_of_several_tiles",
    ),
    Mutant(
        "rows are not rounded to fp8",
        "ops/quantized_meaning.py",
        "rounded_rows(lhs) if activations else lhs",
        "lhs",
        "test_quantized.py::test_rows_are_rounded_to_fp8[float32]",
    ),
    Mutant(
        "tangents are rounded to fp8",
        "ops/quantized_ops.py",
        "bind(tangents[0], *primals[1:], activations=None, **params)",
        "bind(tangents[0], *primals[1:], activations=activations, **params)",
        "test_quantized.py::test_rows_are_rounded_to_fp8[float32]",
    ),
    Mutant(
        "numbers of fp8 are cut off to those below",
        "ops/quantize.py",
        "to_fp8(x / scales.astype(jnp.float32))",
        "to_fp8(x / scales.astype(jnp.float32) * 0.97)",
        "test_quantized.py::test_fp8_is_rounded_to_nearest_and_saturates",
    ),
    Mutant(
        "GPTQ's zero points are one too small",
        "model/published.py",
        "_transposed(zeros + np.uint8(shift))",
        "_transposed(zeros)",
        "test_published.py::test_each_form_is_read_means_the_same_and_is_written_back[gptq4-True]",
    ),
    Mutant(
        "AWQ's columns are in the order of their bits",
        "model/published.py",
        "codes[..., np.argsort(_AWQ_ORDER)]",
        "codes[..., :]",
        "test_published.py::test_each_form_is_read_means_the_same_and_is_written_back[awq4-True]",
    ),
    Mutant(
        "gate and up of gpt-oss do not alternate",
        "model/quantized_params.py",
        "return array.reshape(2, n // 2, width).swapaxes(0, 1)",
        "return array",
        "test_published.py::test_gpt_oss",
    ),
    Mutant(
        "devices get the scales of the first one",
        "core/stored.py",
        "            of_scales[axis] = ()\n            continue\n        devices",
        "            of_scales[axis] = ()\n            continue\n        of_scales[axis] = ()\n        devices",
        "test_quantized.py::test_a_layer_that_a_mesh_divides[int4 zeros-F]",
    ),
    Mutant(
        "the kernel takes the scales of gate for up",
        "kernels/triton/quantized.py",
        "up_column = first_column if PAIR else first_column + N",
        "up_column = first_column",
        "test_quantized_kernels.py::test_epilogues_pairs_and_layers[triton-interpreted-int4 zeros-one]",
    ),
    Mutant(
        "the kernel leaves out zero points",
        "kernels/triton/quantized.py",
        "            numbers = minus(numbers, zero.to(numbers.dtype), PACKED)",
        "            numbers = minus(numbers, 0 * zero.to(numbers.dtype), PACKED)",
        "test_quantized_kernels.py::test_products_and_their_gradients[triton-interpreted-int4 zeros-bfloat16]",
    ),
    Mutant(
        "the kernel takes the first scale of a row of fp8 for all",
        "kernels/triton/quantized.py",
        "row_scales + start // LHS_BLOCK",
        "row_scales",
        "test_quantized_kernels.py::test_products_of_fp8_rows[triton-interpreted-block0-bfloat16]",
    ),
    Mutant(
        "the kernel leaves out the scales of fp8 rows",
        "kernels/triton/quantized.py",
        "scale = scale * a_scale[None, :] if ROUNDED else scale",
        "scale = scale",
        "test_quantized_kernels.py::test_products_of_fp8_rows[triton-interpreted-block0-bfloat16]",
    ),
    Mutant(
        "the kernel rounds rows to fp8 at twice their size",
        "kernels/triton/operands.py",
        "rounded = at_most(at_least(floats * tl.div_rn(1.0, scale)[:, None], -MOST), MOST)",
        "rounded = floats * tl.div_rn(1.0, scale)[:, None] * 2",
        "test_quantized_kernels.py::test_products_of_fp8_rows[triton-interpreted-block0-bfloat16]",
    ),
    # ---- sums in 16 bits. Some are written out, since jnp.sum and XLA's products add 16-bit values in float32
    Mutant(
        "combine adds in 16 bits",
        "ops/combine.py",
        IN_SUMS,
        "return sum(jnp.moveaxis(jnp.where(valid, weights[..., None] * taken, 0).astype(rows.dtype), 1, 0))",
        values(f"moe_combine-bfloat16-{WIDE}"),
    ),
    Mutant(
        "combine rounds each weighted row to 16 bits",
        "ops/combine.py",
        IN_SUMS,
        "return jnp.sum(jnp.where(valid, weights[..., None] * taken, 0).astype(rows.dtype), axis=1)",
        values(f"moe_combine-float16-{WIDE}"),
    ),
    Mutant(
        "the gradient of combine's weights rounds each product to 16 bits",
        "ops/combine.py",
        "return jnp.sum(jnp.where(valid, taken * g[:, None].astype(jnp.float32), 0), axis=2)",
        "return jnp.sum(jax.lax.reduce_precision(jnp.where(valid, taken * g[:, None].astype('f4'), 0), 8, 7), axis=2)",
        "test_grad.py::test_combine_against_oracle_with_garbage[xla-T7-E8-K2-H130-block4-True-bfloat16]",
    ),
    Mutant(
        "the weighted sum adds in 16 bits",
        "ops/weighted_sum.py",
        "return jnp.sum(weights[..., None] * slots.astype(jnp.float32), axis=1).astype(slots.dtype)",
        "return sum(jnp.moveaxis((weights[..., None] * slots.astype('f4')).astype(slots.dtype), 1, 0))",
        values(f"weighted_sum_batched-bfloat16-{WIDE}"),
    ),
    Mutant(
        "the gradient of dispatch adds in 16 bits",
        "ops/combine.py",
        "return add_rows(rows.astype(jnp.float32), token, num_tokens).astype(rows.dtype)",
        "return add_rows(rows, token, num_tokens)",
        "test_grad.py::test_dispatch_against_oracle[xla-False-bfloat16]",
    ),
    Mutant(
        "the gradient of rows named twice adds in 16 bits",
        "ops/combine.py",
        "return add_rows(terms.reshape(pairs.size, -1), pairs.reshape(-1), num_rows).astype(g.dtype)",
        "return add_rows(terms.reshape(pairs.size, -1).astype(g.dtype), pairs.reshape(-1), num_rows)",
        "test_grad.py::test_combine_against_oracle_with_garbage[xla-T7-E8-K2-H130-block4-False-bfloat16]",
    ),
    Mutant(
        "the grouped product adds in 16 bits",
        "ops/grouped_meaning.py",
        'rows = lax.dot_general(rows, matrix, contract, precision, preferred_element_type="float32")',
        "rows, matrix = rows.T[..., None], (matrix.T if transposed else matrix)[:, None]; "
        "rows = lax.fori_loop(1, len(rows), lambda h, sums: sums + rows[h] * matrix[h], rows[0] * matrix[0])",
        values(f"grouped_matmul-bfloat16-{WIDE}"),
    ),
    Mutant(
        "the gradient of the matrices adds blocks in 16 bits",
        "ops/grouped_meaning.py",
        "matrix, 0) + term",
        "matrix.astype(lhs.dtype).astype(jnp.float32), 0) + term",
        "test_grouped.py::test_one_expert_owns_all_rows[xla-bfloat16]",
    ),
    Mutant(
        "a token's gradient adds its choices in 16 bits",
        "ops/rows.py",
        "return jnp.sum(by_row, axis=-2, dtype=jnp.float32).astype(dtype)",
        "return sum(jnp.moveaxis(by_row, -2, 0))",
        f"test_grouped.py::test_values_and_gradients_with_garbage[xla-{MANY}-True-float16]",
    ),
    # ---- masks and bounds
    Mutant(
        "an index past the last row takes that row",
        "ops/rows.py",
        "valid = (index >= 0) & (index < rows.shape[0])",
        "valid = index >= 0",
        values(f"moe_combine-float32-{FULL}"),
    ),
    Mutant(
        "combine skips pairs without a row by a factor of 0",
        "ops/combine.py",
        IN_SUMS,
        "return jnp.sum(valid.astype('f4') * weights[..., None] * taken, axis=1).astype(rows.dtype)",
        values(f"moe_combine-float32-{FULL}"),
    ),
    Mutant(
        "the gradient of a row that nobody names is another row's",
        "ops/rows.py",
        'return jnp.where(counts[:, None] > 0, sums.at[offsets[:-1]].get(mode="clip"), 0)',
        'return sums.at[offsets[:-1]].get(mode="clip")',
        "test_grad.py::test_many_rows_of_one_token[xla]",
    ),
    Mutant(
        "the padding of a block reads row 0",
        "ops/grouped_meaning.py",
        "rows, columns = (jnp.where(named, rows_of(x, slice_id, slot, k), 0) for",
        "rows, columns = (rows_of(x, slice_id, slot, k) for",
        f"test_grouped.py::test_values_and_gradients_with_garbage[xla-{WIDE}-True-float32]",
    ),
    # ---- transposes and derivatives
    Mutant(
        "a transpose of combine's tangent takes the weights for their tangent",
        "ops/combine.py",
        "return _combine_to_rows(ct, rows, pairs, d_weights, **how)",
        "return _combine_to_rows(ct, rows, pairs, w, **how)",
        "test_grad.py::test_the_tangent_of_combine_is_linear_in_each_operand",
    ),
    Mutant(
        "the rows of a token's choices are taken for those of K tokens",
        "ops/rows.py",
        "by_row = rows.reshape(*rows.shape[:-2], num_rows, top_k, rows.shape[-1])\n    return jnp.sum(by_row, axis=-2,",
        "by_row = rows.reshape(*rows.shape[:-2], top_k, num_rows, rows.shape[-1])\n    return jnp.sum(by_row, axis=-3,",
        f"test_grouped.py::test_values_and_gradients_with_garbage[xla-{WIDE}-True-float32]",
    ),
    Mutant(
        "the derivative of routing leaves out the sum that weights are divided by",
        "ops/scoring.py",
        "return jnp.where(constant, 0, weights * (change - mean))",
        "return jnp.where(constant, 0, weights * change)",
        "test_grad.py::test_routing_gradient_is_the_softmax_gradient[xla]",
    ),
    Mutant(
        "a layer below 0 is counted from the end",
        "ops/grouped_meaning.py",
        "layer = lax.clamp(jnp.int32(0), layer, jnp.int32(stack.shape[-4] - 1))",
        "layer = layer % stack.shape[-4]",
        "test_layer_of.py::test_a_layer_outside_is_clamped[xla--1-0]",
    ),
    Mutant(
        "a derivative of a layer's product leaves its own slice out",
        "ops/grouped_ops.py",
        "terms.append(op.bind(rows_tangent, rhs, *tables, stack, layer, **params))",
        "terms.append(op.bind(rows_tangent, None if stack is not None else rhs, *tables, stack, layer, **params))",
        "test_layer_of.py::test_second_derivatives_by_the_slice",
    ),
    Mutant(
        "a layer's slice is read from its own array",
        "ops/grouped_ops.py",
        "return products(rows, rhs, stack, layer,",
        "return products(rows, rhs, None if rhs is not None else stack, layer,",
        "test_layer_of.py::test_only_the_layers_own_experts_with_rows_are_read",
    ),
    Mutant(
        "interleaved gate and up are taken for halves",
        "model/local.py",
        "elif interleaved:",
        "elif not interleaved:",
        "test_forms.py::test_equals_the_usual_form[interleaved-packed-True]",
    ),
    Mutant(
        "all slices of a batch take the first one's matrices",
        "ops/grouped_meaning.py",
        "return () if x.ndim == rank else (slice_id,)",
        "return () if x.ndim == rank else (lax.full_like(slice_id, 0),)",
        "test_vmap.py::test_every_subset_and_axis[xla-grouped_matmul-pair_ids]",
    ),
    # ---- routing
    Mutant(
        "of equal logits the last is chosen",
        "ops/routing.py",
        "chosen, ids = lax.top_k(rankable(x), top_k)\n",
        "chosen, ids = lax.top_k(rankable(x[::-1]), top_k); ids = x.size - 1 - ids\n",
        values(f"route_topk_softmax-float32-{FULL}"),
    ),
    Mutant(
        "-0 ranks below +0",
        "ops/scoring.py",
        "bits = lax.select(bits == jnp.int32(-(2**31)), lax.full_like(bits, 0), bits)",
        "bits = bits + 0",
        values(f"route_topk_softmax-float32-{FULL}"),
    ),
    Mutant(
        "weights are not normalised again",
        "ops/scoring.py",
        "total = jnp.sum(weights)\n",
        "total = jnp.sum(jnp.exp(x - base))\n",
        values(f"route_topk_softmax-float32-{WIDE}"),
    ),
    Mutant(
        "a bias weighs, where it should only choose",
        "ops/routing.py",
        "return ids, weigh_ids(x, ids, weighing)",
        "return ids, weigh_ids(x if bias is None else x + bias, ids, weighing)",
        "test_routing.py::test_a_bias_chooses_and_does_not_weigh",
    ),
    # ---- tables
    Mutant(
        "an expert's rows begin where they end",
        "ops/tables.py",
        "return lax.pad(ends, jnp.int32(0), [(1, 0, 0)])",
        "return lax.pad(ends, ends[-1], [(0, 1, 0)])",
        values(f"moe_build_pairs_by_token-int32-{FULL}"),
    ),
    Mutant(
        "the owner of a block is that of the next",
        "ops/tables.py",
        "first = slots.reshape(-1, block_size)[:, 0]",
        "first = jnp.roll(slots.reshape(-1, block_size)[:, 0], -1)",
        values(f"moe_align_block_size-int32-{FULL}"),
    ),
    Mutant(
        "the sort of pairs is not stable",
        "ops/tables.py",
        "return words >> bits, words & ((1 << bits) - 1), counts",
        "words = lax.sort(key << bits | (ids.size - 1 - entry)); "
        "return words >> bits, ids.size - 1 - words & ((1 << bits) - 1), counts",
        values(f"moe_build_pairs_by_token-int32-{FULL}"),
    ),
    Mutant(
        "ids of 64 bits wrap",
        "core/signature.py",
        "return xp.where(fits, ids.astype(xp.int32), xp.int32(-1))",
        "return ids.astype(xp.int32)",
        "test_values.py::test_numpy_ids_of_64_bits_do_not_wrap_without_x64",
    ),
    Mutant(
        "group sizes of 64 bits wrap",
        "core/signature.py",
        "return xp.clip(counts, max(info.min, -INT32_MAX), min(info.max, INT32_MAX)).astype(xp.int32)",
        "return counts.astype(xp.int32)",
        "test_ragged.py::test_types_and_precision",
    ),
    Mutant(
        "sums of group sizes wrap",
        "ops/ragged.py",
        "ends = lax.cummax(lax.cumsum(sizes, sizes.ndim - 1), sizes.ndim - 1)",
        "ends = lax.cumsum(sizes, sizes.ndim - 1)",
        "test_ragged.py::test_group_sizes_that_add_up_past_2_to_the_32",
    ),
    Mutant(
        "an offset near int32's end wraps",
        "ops/ragged.py",
        "first = jnp.clip(group_offset, -num_groups, group_sizes.size)",
        "first = group_offset",
        "test_ragged.py::test_the_table_of_any_offset[xla]",
    ),
    Mutant(
        "each device counts its rows from the first device's",
        "ops/ragged.py",
        "lax.axis_index(rows) * lhs.shape[-2]",
        "0 * lax.axis_index(rows)",
        "test_ragged.py::test_divided_in_an_explicit_mesh[one axis-plain]",
    ),
    Mutant(
        "each device takes its groups for the first ones",
        "ops/ragged.py",
        "lax.axis_index(of_groups) * rhs.shape[-3]",
        "0 * lax.axis_index(of_groups)",
        "test_ragged.py::test_divided_in_an_explicit_mesh[groups-plain]",
    ),
    # ---- roundings
    Mutant(
        "bfloat16 products are not rounded before their activation",
        "ops/epilogue.py",
        'return "bfloat16" if dtype == "bfloat16" else "float32"',
        'return "float32"',
        "test_mlp.py::test_sixteen_bits_before_the_activation",
    ),
    Mutant(
        "a float32 product of bfloat16 rows is rounded to 16 bits",
        "ops/grouped_meaning.py",
        "return out.at[place].set(rows.astype(dtype),",
        "return out.at[place].set(rows.astype(lhs.dtype).astype(dtype),",
        "test_grouped.py::test_preferred_element_type[xla-float32]",
    ),
    # ---- a mesh
    Mutant(
        "a device's part of H is taken for all of it",
        "ops/combine.py",
        'independent="T",',
        'independent="TH",',
        "test_partitioning.py::test_shards_are_computed_where_they_are"
        "[moe_combine-repeated-True-specs3-AxisType.Explicit-collected3-True]",
    ),
    Mutant(
        "every device that has a part of F adds the last bias",
        "model/divided.py",
        "jnp.where(lax.axis_index(axes) == 0, experts.down_bias,",
        "jnp.where(lax.axis_index(axes) >= 0, experts.down_bias,",
        "test_divided.py::test_values_gradients_and_collectives[exchange, width-biased-AxisType.Explicit]",
    ),
    Mutant(
        "every chunk has the whole capacity",
        "model/spread.py",
        "(how.chunks * devices)",
        "devices",
        "test_parallel.py::test_chunks[padded]",
    ),
    Mutant(
        "gate and up are exchanged when their columns travel",
        "model/divided.py",
        "first_is_up = me % 2 == 1",
        "first_is_up = me % 2 == 0",
        "test_divided.py::test_numbers_of_devices_that_are_no_powers_of_two[width-(3, 2)]",
    ),
    # ---- around the ops
    Mutant(
        "a result in an Explicit mesh is not sharded as its operands are",
        "core/primitive.py",
        "if base.sharding.mesh.empty:\n        return results",
        "if base is not None:\n        return results",
        "test_sharding.py::test_explicit_mesh_propagates_shardings",
    ),
    Mutant(
        "a table of rows does not promise that they are unique",
        "ops/combine.py",
        "table is not None if unique_rows is None else unique_rows",
        "False if unique_rows is None else unique_rows",
        "test_tables.py::test_a_table_promises_unique_rows",
    ),
    Mutant(
        "a sender's rows go where they should end",
        "model/exchanged_rows.py",
        "start = jnp.minimum(end - counts, rows)",
        "start = jnp.minimum(end, rows)",
        "test_parallel.py::test_sizes_and_offsets[11-3]",
    ),
    Mutant(
        "an expert takes one pair more than its capacity",
        "ops/capacity.py",
        "kept = (rank >= 0) & (rank < capacity)",
        "kept = (rank >= 0) & (rank <= capacity)",
        f"test_capacity.py::test_values[{FULL}-token]",
    ),
    Mutant(
        "the load-balancing loss does not divide by K",
        "ops/losses.py",
        "return jnp.sum(counts / (n * choices) * (mass / n), axis=-1) * counts.shape[-1]",
        "return jnp.sum(counts / n * (mass / n), axis=-1) * counts.shape[-1]",
        "test_losses.py::test_even_load_and_definitions",
    ),
    Mutant(
        "a checkpoint's up stands where gate belongs",
        "model/layouts.py",
        f'"F H", 0),\n        {UP}1)',
        f'"F H", 1),\n        {UP}0)',
        "test_checkpoint.py::test_the_block_is_that_of_the_model[mixtral]",
    ),
    # ---- Triton's kernels, in its interpreter
    Mutant(
        "Triton's product adds steps in 16 bits",
        "kernels/triton/grouped.py",
        "sums = dot(b.T, a.T, sums, PRECISION) if SWAPPED else dot(a, b, sums, PRECISION)\n",
        "sums = dot(b.T, a.T, sums, PRECISION) if SWAPPED else dot(a, b, sums, PRECISION)\n"
        "        sums = sums.to(lhs.dtype.element_ty).to(tl.float32)\n",
        values(f"grouped_matmul-bfloat16-{WIDE}", INTERPRETED),
    ),
    Mutant(
        "Triton's gradient of the matrices adds steps in 16 bits",
        "kernels/triton/grouped.py",
        "sums = dot(a.T, b, sums, PRECISION)",
        "sums = dot(a.T, b, sums, PRECISION).to(out.dtype.element_ty).to(tl.float32)",
        f"test_grouped.py::test_one_expert_owns_all_rows[{INTERPRETED}-bfloat16]",
    ),
    Mutant(
        "Triton's gradient of dispatch adds in 16 bits",
        "kernels/triton/combine.py",
        "sums += value * tl.load(weights + term) if WEIGHTED else value",
        "sums = (sums + (value * tl.load(weights + term) if WEIGHTED else value)).to(out.dtype.element_ty)"
        ".to(tl.float32)",
        f"test_grad.py::test_dispatch_against_oracle[{INTERPRETED}-False-bfloat16]",
    ),
    Mutant(
        "Triton's product leaves rows that no slot names unwritten",
        "kernels/triton/walk.py",
        "if tl.max(zero.to(tl.int32), 0) > 0:",
        "if tl.max(zero.to(tl.int32), 0) > 1:",
        values(f"grouped_matmul-float32-{WIDE}", INTERPRETED),
    ),
    Mutant(
        "Triton's combine adds row 0 for a pair without a row",
        "kernels/triton/combine.py",
        "row = tl.load(index + at, mask=valid, other=-1).to(tl.int64)\n                valid = (row >= 0) & (row < R)",
        "row = tl.load(index + at, mask=valid, other=-1).to(tl.int64)\n"
        "                row = tl.where((row >= 0) & (row < R), row, 0)",
        values(f"moe_combine-float32-{FULL}", INTERPRETED),
    ),
    Mutant(
        "Triton ranks NaN first",
        "kernels/triton/ranking.py",
        "tl.where(first > INF, 1, unsure)",
        "unsure",
        values(f"route_topk_softmax-bfloat16-{MANY}", INTERPRETED),
    ),
    Mutant(
        "of equal ranks Triton chooses the last",
        "kernels/triton/ranking.py",
        "best = first_best(key, lane, x.shape[1])",
        "best = x.shape[1] - 1 - first_best(key, x.shape[1] - 1 - lane, x.shape[1])",
        values(f"route_topk_softmax-float32-{WIDE}", INTERPRETED),
    ),
    Mutant(
        "the owner of Triton's block is that of the one before",
        "kernels/triton/tables.py",
        "(HALF >> bit) - 1, 0) <= position,",
        "(HALF >> bit) - 1, 0) < position,",
        values(f"moe_align_block_size-int32-{FULL}", INTERPRETED),
    ),
    Mutant(
        "Triton's group table has rows of groups behind those held",
        "kernels/triton/tables.py",
        "held = (group >= begin) & (group - begin < HELD)",
        "held = group >= begin",
        "test_ragged.py::test_the_kernel_equals_xla[5]",
    ),
    # ---- Pallas' kernels, in its interpreter
    Mutant(
        "Pallas' combine adds row 0 for a pair without a row",
        "kernels/pallas/combine.py",
        "return sums + (term if valid is None else where(valid, term))",
        "return sums + term",
        "test_pallas.py::test_values[moe_combine-T5-E6-K3-H4-block4-float32]",
    ),
    Mutant(
        "Pallas' combine adds in 16 bits",
        "kernels/pallas/combine.py",
        "return sums + (term if valid is None else where(valid, term))",
        "return (sums + (term if valid is None else where(valid, term))).astype(rows.dtype).astype(jnp.float32)",
        "test_pallas.py::test_values[moe_combine-T7-E3-K3-H130-block4-bfloat16]",
    ),
)


class Verdict(NamedTuple):
    """The outcome of a test: whether it passed, whether an assertion failed, pytest's output, and seconds."""

    passed: bool
    failed: bool
    said: str
    seconds: float


def copy(place: Path) -> None:
    for name in ("ferrum_jax", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)


def run(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A Python command that imports the package from this copy."""
    env = os.environ | {"PYTHONPATH": str(place)}
    command = (sys.executable, *command)
    try:
        return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -1, "", f"no end in {SECONDS} s")


def verdict(place: Path, test: str) -> Verdict:
    start, (name, colons, case) = time.monotonic(), test.partition("::")
    found = [path for path in sorted((place / "tests").rglob(name)) if path.is_file()]
    options = ("-q", "-x", "-n", "0", "-m", "", "-p", "no:cacheprovider", "--tb=line")
    done = run(place, "-m", "pytest", *options, *(f"{path}{colons}{case}" for path in found or [name]))
    failed = done.returncode == 1 and re.search(r"^/.*:\d+: (AssertionError|assert )", done.stdout, re.MULTILINE)
    return Verdict(done.returncode == 0, bool(failed), done.stdout + done.stderr, time.monotonic() - start)


def broken(mutant: Mutant, folder: Path) -> Verdict:
    """Run the mutant's test on a copy of the package with this fault."""
    place = Path(tempfile.mkdtemp(dir=folder))
    copy(place)
    path = place / "ferrum_jax" / mutant.file
    text = path.read_text() if path.exists() else ""
    if text.count(mutant.old) != 1:
        return Verdict(False, False, f"{mutant.file} holds the text {text.count(mutant.old)} times:\n{mutant.old}", 0)
    path.write_text(text.replace(mutant.old, mutant.new))
    done = verdict(place, mutant.test)
    shutil.rmtree(place)
    return done


def chosen(word: str) -> list[Mutant]:
    """The mutants that contain this word, without those of Pallas if JAX is too old for its kernels."""
    kernels = jax.__version_info__ >= (0, 11, 2)
    return [m for m in MUTANTS if word in " ".join(m) and (kernels or "pallas" not in m.file)]


def control(place: Path, mutants: list[Mutant], pool: concurrent.futures.Executor) -> list[str]:
    """Run the tests on the unchanged package, where all must pass. Returns what failed."""
    copy(place)
    imported = run(place, "-c", "import ferrum_jax; print(ferrum_jax.__file__)").stdout.strip()
    assert Path(imported).resolve().is_relative_to(place.resolve()), f"not the copy in {place}, but {imported}"
    tests = sorted({mutant.test for mutant in mutants})
    results = zip(tests, pool.map(lambda test: verdict(place, test), tests), strict=True)
    return [f"{test} fails on the package as it is:\n{done.said}" for test, done in results if not done.passed]


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(" | ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="the mutants with this word")
    mutants, start = chosen(parser.parse_args().only), time.monotonic()
    if not mutants:
        parser.error("no mutant has this word")
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
        wrong = control(Path(folder, "as it is"), mutants, pool)
        if wrong:
            print("\n".join(wrong))
            return 1
        print(f"The tests pass on the package as it is ({time.monotonic() - start:.0f} s).", flush=True)
        runs = {pool.submit(broken, mutant, Path(folder)): mutant for mutant in mutants}
        done = {}
        for future in concurrent.futures.as_completed(runs):
            mutant, result = runs[future], future.result()
            done[mutant] = result
            word = "caught" if result.failed else "SURVIVES" if result.passed else "NO ASSERTION FAILED"
            print(f"{word}: {mutant.fault} ({result.seconds:.0f} s)", flush=True)
            if not (result.failed or result.passed):
                print(result.said)
    rows = [("fault", "file", "caught by", "seconds")]
    rows += [(m.fault, m.file, m.test if done[m].failed else "NONE", f"{done[m].seconds:.1f}") for m in mutants]
    print(f"\n{table(rows)}\n")
    caught = sum(result.failed for result in done.values())
    print(f"{caught} of {len(mutants)} mutants are caught, in {time.monotonic() - start:.0f} s.")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
