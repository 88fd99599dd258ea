"""The Triton kernels of the grouped low-rank product. Only what runs on the device; launches: launch.py.

The work is a long, thin one: `[M, D]` activations with D in the thousands meet `R` rank columns, R in the
tens. A pass over an `[M, D]` tensor costs far more than the arithmetic (up to R of about 180 by the peak
rates of an H200), so each kernel reads or writes its wide tensor once, and everything else happens in rank
space. Three kernels make forward and backward, because with banks stored `[E, r, D]` the two directions are
the same products:

    shrink   rank = wide @ bank^T       s  = x @ A^T     dh = dy @ B^T
    expand   wide = (g * rank) @ bank   y += (g*s) @ B   dx = (g*dh) @ A
    wgrad    bank' = (g * rank)^T wide  dB = (g*s)^T dy  dA = (g*dh)^T x

`reduce` adds the partial sums of wgrad in a fixed order; `gate_grad` takes the gates' gradient from `s` and
`dh`, which are there anyway. No atomics: the same inputs give the same bits.

What all of them share:

- *Rows.* The rows of a batch are cut into groups (one task each, or one expert each when rows are sorted by
  expert). A table of tiles `[n, 3]` = (group, first row, row after the last) says what one program works on;
  a tile never straddles a group, and one with first >= last does nothing. With `pairs`, row `i` of a tile
  stands for the pair `p = pairs[i]` of a token and one of its `PER` experts: the wide tensor is read at row
  `p // PER`, the rank tensor at row `p`.
- *Columns.* The R = k * r columns of a group are those of its k experts side by side: column `c` is row `c %
  r` of the expert in slot `c // r`, which `slots[group, c // r]` names. So four experts of rank 1 fill one
  tile of a matrix product together, and no rank needs a case of its own. A tile has `BR` columns, a power of
  two >= 16 (the least that a tensor core takes), the surplus masked.
- *Numbers.* Products are summed in `ACC` (fp32; fp64 for fp64). Gates and scale act on the rank tensor,
  before it is rounded to the wide tensor's type for the product. Row numbers are int64: M * D passes 2^31.
- A matrix that is needed transposed is loaded transposed, through its pointers: the transpose of a product's
  result is miscompiled for Hopper by Triton 3.4 to 3.7.0.

Without a GPU, tests/kernels/interpreted.py runs these kernels through Triton's interpreter, into memory full
of NaN, against the reference in fp64; tests/kernels/compiled.py compiles every launch of configs.py for
three architectures.

Legend: M rows, D the wide dimension (d_in or d_out), E experts, r rank of one expert, k slots of a group, R
= k*r.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _columns(
    first, group, slots_ptr, r: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, SLOTS: tl.constexpr
):
    """Columns `first ... first + BR` of a group: (column, its mask, its slot, its row in the bank [E * r,
    D])."""
    column = first + tl.arange(0, BR)
    mask = column < R
    slot = column // r
    if SLOTS:
        expert = tl.load(slots_ptr + group * (R // r) + slot, mask=mask, other=0).to(tl.int64)
    else:
        expert = slot.to(tl.int64)
    return column, mask, slot, expert * r + column % r


@triton.jit
def _rows(first, end, pairs_ptr, BM: tl.constexpr, PAIRS: tl.constexpr, PER: tl.constexpr):
    """Rows `first ... first + BM` below `end`: (row of the rank tensor, row of the wide tensor, mask)."""
    row = first + tl.arange(0, BM)
    mask = row < end
    if PAIRS:
        rank_row = tl.load(pairs_ptr + row, mask=mask, other=0).to(tl.int64)
    else:
        rank_row = row.to(tl.int64)
    return rank_row, rank_row // PER, mask


@triton.jit
def shrink(
    wide_ptr, bank_ptr, slots_ptr, tiles_ptr, pairs_ptr, rank_ptr,
    wide_stride, D,
    r: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, PAIRS: tl.constexpr, PER: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rank[row, c] = sum_d wide[row, d] * bank[c, d]; wide [M, D], bank [E * r, D], rank [M, R] in ACC.

    One program keeps BM x BR sums in registers and walks along D once: it reads M * D of the wide tensor, the
    group's bank rows (which stay in the L2 cache), and writes M * R. Bytes: 2MD (bf16) + 4MR + the bank.

    Test: interpreted.py, every op: the output and dx, dA come from it; slots against repeated and unused
        experts.
    """
    tile = tl.program_id(0)
    group = tl.load(tiles_ptr + 3 * tile)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    end = tl.load(tiles_ptr + 3 * tile + 2)
    if first >= end:
        return
    rank_row, wide_row, row_mask = _rows(first, end, pairs_ptr, BM, PAIRS, PER)
    column, column_mask, _, bank_row = _columns(tl.program_id(1) * BR, group, slots_ptr, r, R, BR, SLOTS)
    sums = tl.zeros((BM, BR), dtype=ACC)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        d_mask = d < D
        wide = tl.load(
            wide_ptr + wide_row[:, None] * wide_stride + d[None, :],
            mask=row_mask[:, None] & d_mask[None, :],
            other=0.0,
        )
        bank_t = tl.load(
            bank_ptr + bank_row[None, :] * D + d[:, None],
            mask=column_mask[None, :] & d_mask[:, None],
            other=0.0,
        )
        sums = tl.dot(wide, bank_t.to(wide.dtype), sums, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        rank_ptr + rank_row[:, None] * R + column[None, :],
        sums,
        mask=row_mask[:, None] & column_mask[None, :],
    )


@triton.jit
def expand(
    rank_ptr, gates_ptr, bank_ptr, slots_ptr, tiles_ptr, pairs_ptr, y_ptr, out_ptr,
    rank_stride, y_stride, D,
    SCALE: tl.constexpr, r: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, PAIRS: tl.constexpr,
    PER: tl.constexpr, ROW_GATES: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    BD: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[row, d] = y[row, d] + SCALE * sum_c gate[c] * rank[row, c] * bank[c, d]; out, y [M, D], rank [M,
    R].

    The sum over R is one or a few products of BM x BR by BR x BD tiles: the program has nothing to wait for
    but its store. Bytes: 2MD written (bf16), 2MD more read when it adds to y (ADD), 4MR per column block of
    D from L2. gates [groups, k], or one row a rank row (ROW_GATES) [M, k]. `out` may be `y`: a program reads
    just what it writes.

    Test: interpreted.py, every op, with and without y; row by row gates in `gated`, pairs in `grouped`.
    """
    tile = tl.program_id(0)
    group = tl.load(tiles_ptr + 3 * tile)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    end = tl.load(tiles_ptr + 3 * tile + 2)
    if first >= end:
        return
    rank_row, wide_row, row_mask = _rows(first, end, pairs_ptr, BM, PAIRS, PER)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    d_mask = d < D
    sums = tl.zeros((BM, BD), dtype=ACC)
    for c0 in tl.static_range(0, R, BR):
        column, column_mask, slot, bank_row = _columns(c0, group, slots_ptr, r, R, BR, SLOTS)
        mask = row_mask[:, None] & column_mask[None, :]
        rank = tl.load(rank_ptr + rank_row[:, None] * rank_stride + column[None, :], mask=mask, other=0.0)
        if ROW_GATES:
            gate = tl.load(gates_ptr + rank_row[:, None] * (R // r) + slot[None, :], mask=mask, other=0.0)
        else:
            gate = tl.load(gates_ptr + group * (R // r) + slot, mask=column_mask, other=0.0)[None, :]
        gated = rank * (gate.to(ACC) * SCALE)
        bank = tl.load(
            bank_ptr + bank_row[:, None] * D + d[None, :],
            mask=column_mask[:, None] & d_mask[None, :],
            other=0.0,
        )
        sums = tl.dot(gated.to(DOT), bank.to(DOT), sums, input_precision=PRECISION, out_dtype=ACC)
    at = wide_row[:, None] * D + d[None, :]
    mask = row_mask[:, None] & d_mask[None, :]
    if ADD:
        y = tl.load(y_ptr + wide_row[:, None] * y_stride + d[None, :], mask=mask, other=0.0)
        sums += y.to(ACC)
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def wgrad(
    rank_ptr, gates_ptr, wide_ptr, chunks_ptr, pairs_ptr, part_ptr,
    rank_stride, wide_stride, D,
    SCALE: tl.constexpr, r: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, PER: tl.constexpr,
    ROW_GATES: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """part[chunk, c, d] = SCALE * sum over the chunk's rows of gate[c] * rank[row, c] * wide[row, d].

    A chunk is a run of rows of one group. Its BR x BD sums, written once in fp32, are few beside what was
    read while 2R is well below its rows. Bytes: 2MD read (bf16) and 4RD a chunk written; the chunk's rank
    rows come from L2 but for the first time.

    Test: interpreted.py, the gradients of A and B of every op; several chunks a task in the segments `long`.
    """
    chunk = tl.program_id(0)
    group = tl.load(chunks_ptr + 3 * chunk)
    first = tl.load(chunks_ptr + 3 * chunk + 1)
    end = tl.load(chunks_ptr + 3 * chunk + 2)
    if first >= end:
        return
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    d_mask = d < D
    column = tl.program_id(2) * BR + tl.arange(0, BR)
    column_mask = column < R
    slot = column // r
    sums = tl.zeros((BR, BD), dtype=ACC)
    for row0 in range(first, end, BM):
        rank_row, wide_row, row_mask = _rows(row0, end, pairs_ptr, BM, PAIRS, PER)
        mask = column_mask[:, None] & row_mask[None, :]
        rank_t = tl.load(rank_ptr + rank_row[None, :] * rank_stride + column[:, None], mask=mask, other=0.0)
        if ROW_GATES:
            gate = tl.load(gates_ptr + rank_row[None, :] * (R // r) + slot[:, None], mask=mask, other=0.0)
        else:
            gate = tl.load(gates_ptr + group * (R // r) + slot, mask=column_mask, other=0.0)[:, None]
        gated_t = rank_t * (gate.to(ACC) * SCALE)
        wide = tl.load(
            wide_ptr + wide_row[:, None] * wide_stride + d[None, :],
            mask=row_mask[:, None] & d_mask[None, :],
            other=0.0,
        )
        sums = tl.dot(gated_t.to(wide.dtype), wide, sums, input_precision=PRECISION, out_dtype=ACC)
    at = (chunk.to(tl.int64) * R + column[:, None]) * D + d[None, :]
    tl.store(part_ptr + at, sums, mask=column_mask[:, None] & d_mask[None, :])


@triton.jit
def gate_grad(
    rank_ptr, drank_ptr, chunks_ptr, part_ptr,
    rank_stride,
    R: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """part[chunk, c] = sum over the chunk's rows of rank[row, c] * drank[row, c]; both [M, R] in ACC.

    The gates' gradient without an `[M, k, D]` of expert outputs. Bytes: 8MR, rank space alone.

    Test: interpreted.py, the gradient of the gates of `soft`, `slots` and `split`.
    """
    chunk = tl.program_id(0)
    first = tl.load(chunks_ptr + 3 * chunk + 1)
    end = tl.load(chunks_ptr + 3 * chunk + 2)
    column = tl.program_id(1) * BR + tl.arange(0, BR)
    sums = tl.zeros((BR,), dtype=ACC)
    for row0 in range(first, end, BM):
        row = row0 + tl.arange(0, BM)
        mask = (row < end)[:, None] & (column < R)[None, :]
        row = row.to(tl.int64)[:, None]
        rank = tl.load(rank_ptr + row * rank_stride + column[None, :], mask=mask, other=0.0)
        product = rank * tl.load(drank_ptr + row * R + column[None, :], mask=mask, other=0.0)
        sums += tl.sum(product, axis=0)
    tl.store(part_ptr + chunk * R + column, sums, mask=column < R)


@triton.jit
def _add_chunks(sums, part_ptr, chunk_ptr, group, first_row, within, mask, R, D):
    """`sums` plus the rows `first_row ...` of the partial sums [R, D] of every chunk of a group, in their
    order."""
    first = tl.load(chunk_ptr + group)
    end = tl.load(chunk_ptr + group + 1)
    at = part_ptr + (first.to(tl.int64) * R + first_row) * D + within
    for _ in range(first, end):
        sums += tl.load(at, mask=mask, other=0.0)
        at += R * D
    return sums


@triton.jit
def reduce(
    part_ptr, slots_ptr, chunk_ptr, out_ptr,
    E, D, groups,
    k: tl.constexpr, r: tl.constexpr, SLOTS: tl.constexpr, BY_EXPERT: tl.constexpr, BR: tl.constexpr,
    BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[g, e, :, :] = the partial sums of expert e, added in the order of groups, slots and chunks.

    part [chunks, k * r, D] in ACC from wgrad, chunks sorted by group; chunk_ptr [G * groups + 1] says where
    those of a group begin; out [G, E, r, D]: entry g adds the groups g * groups ... (g + 1) * groups. The
    expert of a slot is read from slots [G * groups, k] (SLOTS), or is the slot's own number, or, BY_EXPERT,
    group number modulo E (k = 1). An expert that no group names gets zeros. Bytes: each partial sum once,
    4GErD written.

    Test: interpreted.py, `per_task` and not; exact zeros for who has no rows; the same bits again.
    """
    e = tl.program_id(0) % E
    g = tl.program_id(0) // E
    row = tl.arange(0, BR)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (row < r)[:, None] & (d < D)[None, :]
    within = row[:, None] * D + d[None, :]
    sums = tl.zeros((BR, BD), dtype=ACC)
    if BY_EXPERT:
        for group in range(g * groups + e, g * groups + groups, E):
            sums = _add_chunks(sums, part_ptr, chunk_ptr, group, 0, within, mask, r, D)
    elif SLOTS:
        for group in range(g * groups, g * groups + groups):
            for j in range(k):
                if tl.load(slots_ptr + group * k + j) == e:
                    sums = _add_chunks(sums, part_ptr, chunk_ptr, group, j * r, within, mask, k * r, D)
    else:
        for group in range(g * groups, g * groups + groups):
            sums = _add_chunks(sums, part_ptr, chunk_ptr, group, e * r, within, mask, k * r, D)
    at = tl.program_id(0).to(tl.int64) * r * D + within
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=mask)
