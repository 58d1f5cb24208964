"""The static sizes of block-aligned tables. They may be symbolic, except the number of experts and the block's size."""

from jax.core import min_dim

from ..core.settings import INT32_MAX, as_int, as_size


def max_aligned_rows(num_pairs: int, num_experts: int, block_size: int) -> int:
    """S, the rows of a block-aligned table: the fewest that are enough for every routing of `num_pairs` pairs.

    At most m = min(num_experts, num_pairs) experts have rows. The first row of each opens a block, and the other P - m
    rows open at most (P - m) // block_size more.

    Args:
      num_pairs: P = T * K, >= 0. With a symbolic size of `jax.export`, so is the result.
      num_experts: E, >= 1.
      block_size: rows in a block, >= 1.

    Returns:
      (m + (P - m) // block_size) * block_size.

    Raises:
      TypeError: an argument is no int.
      ValueError: an argument out of range, or a table too long for int32 ids.

    >>> max_aligned_rows(256, 128, 16)
    2176
    """
    op = "max_aligned_rows"
    num_pairs = as_size(op, "num_pairs", num_pairs, 0)
    return aligned_rows(num_pairs, as_int(op, "num_experts", num_experts), as_int(op, "block_size", block_size))


def usual_block_size(num_pairs: int, num_experts: int) -> int:
    """The power of two in [16, 128] that holds the rows of an average expert; 64 if their number is symbolic."""
    if not isinstance(num_pairs, int):
        return 64
    average = -(-num_pairs // num_experts)
    return min(max(1 << (average - 1).bit_length() if average else 0, 16), 128)


def aligned_rows(num_pairs: int, num_experts: int, block_size: int) -> int:
    """`max_aligned_rows` of checked sizes."""
    busy = min_dim(num_experts, num_pairs)
    rows = (busy + (num_pairs - busy) // block_size) * block_size
    if isinstance(rows, int) and rows > INT32_MAX:
        raise ValueError(
            f"max_aligned_rows: {num_pairs} pairs, {num_experts} experts and block_size {block_size} make {rows} "
            f"aligned rows; int32 ids allow {INT32_MAX}"
        )
    return rows
