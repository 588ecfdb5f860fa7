# mypy: ignore-errors
# What Triton compiles is not typed as Python is.
"""The Triton kernels of the contrastive loss; ``contrast_triton`` launches them. Importing this imports triton.

Anchors come as ``groups`` of ``segments`` (the ranks) of ``length`` rows each, of which the first ``counts`` are
anchors, the ones computed here being those of segment ``own``. A program owns a block of rows, loops over all keys
and writes its results once: no atomics, the same bits every time. Blocks beyond the device's count leave at once.

ACC is the type of the arithmetic and DOT that of the products' operands: x's own, but float32 for bfloat16 under
the interpreter, which cannot multiply it.
"""

# Annotations must stay objects: Triton reads tl.constexpr from them.
import triton
import triton.language as tl


@triton.jit
def _similarities(
    rows_ptr,
    keys_ptr,
    row_ok,
    key_ok,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of S; the pointers are at the first components of the tile's first row and key."""
    tile = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for d in range(0, D, BLOCK_D):
        cols = d + tl.arange(0, BLOCK_D)
        row_mask, key_mask = row_ok[:, None], key_ok[None, :]
        if D % BLOCK_D != 0:
            row_mask = row_mask & (cols < D)[None, :]
            key_mask = key_mask & (cols < D)[:, None]
        a = tl.load(rows_ptr + tl.arange(0, BLOCK_M)[:, None] * D + cols[None, :], mask=row_mask, other=0.0)
        b = tl.load(keys_ptr + tl.arange(0, BLOCK_N)[None, :] * D + cols[:, None], mask=key_mask, other=0.0)
        tile = tl.dot(a.to(DOT), b.to(DOT), tile, input_precision=PRECISION, out_dtype=ACC)
    return tile


@triton.jit(do_not_specialize=["own"])
def sums_kernel(
    x_ptr,
    class_ptr,
    counts_ptr,
    scale_ptr,
    logpos_ptr,
    logneg_ptr,
    length,
    own,
    D: tl.constexpr,
    SEGMENTS: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Log P and log N of the own anchors, into (groups, length). Grid: row blocks, groups."""
    group = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_M
    n_own = tl.load(counts_ptr + group * SEGMENTS + own)
    if start >= n_own:
        return
    scale = tl.load(scale_ptr)  # 1/τ, and the fixed shift: |s| ≤ 1
    place = tl.arange(0, BLOCK_M)
    row_ok = place < n_own - start
    row = (group * SEGMENTS + own) * length + start  # int64, as all that grows with the number of anchors
    row_class = tl.load(class_ptr + row + place, mask=row_ok, other=255)
    pos = tl.zeros((BLOCK_M,), dtype=ACC)
    neg = tl.zeros((BLOCK_M,), dtype=ACC)
    # The online form keeps sums of e^{z − top} beside the maxima. 0 is a fine first maximum for empty sums of it.
    top_pos = tl.full((BLOCK_M,), float("-inf"), dtype=ACC)
    top_neg = tl.full((BLOCK_M,), float("-inf"), dtype=ACC)
    for segment in range(0, SEGMENTS):
        n_keys = tl.load(counts_ptr + group * SEGMENTS + segment)
        base = (group * SEGMENTS + segment) * length
        for first in range(0, n_keys, BLOCK_N):
            key_place = tl.arange(0, BLOCK_N)
            key_ok = key_place < n_keys - first
            key = base + first
            tile = _similarities(
                x_ptr + row * D, x_ptr + key * D, row_ok, key_ok, D, BLOCK_M, BLOCK_N, BLOCK_D, ACC, DOT, PRECISION
            )
            itself = (start + place)[:, None] == (first + key_place)[None, :]
            itself = itself & (segment == own)
            exists = key_ok[None, :] & (itself == 0)
            key_class = tl.load(class_ptr + key + key_place, mask=key_ok, other=255)
            same = row_class[:, None] == key_class[None, :]
            if FIXED:
                e = tl.exp(tile * scale - scale) * exists.to(ACC)
            else:
                z = tl.where(exists, tile * scale, float("-inf"))
                new_pos = tl.maximum(top_pos, tl.max(tl.where(same, z, float("-inf")), axis=1))
                new_neg = tl.maximum(top_neg, tl.max(tl.where(same, float("-inf"), z), axis=1))
                safe_pos = tl.where(new_pos == float("-inf"), 0.0, new_pos)  # −∞ − −∞ is NaN
                safe_neg = tl.where(new_neg == float("-inf"), 0.0, new_neg)
                pos *= tl.exp(top_pos - safe_pos)
                neg *= tl.exp(top_neg - safe_neg)
                top_pos = new_pos
                top_neg = new_neg
                e = tl.exp(z - tl.where(same, safe_pos[:, None], safe_neg[:, None])) * exists.to(ACC)
            pos += tl.sum(tl.where(same, e, 0.0), axis=1)
            neg += tl.sum(tl.where(same, 0.0, e), axis=1)
    if FIXED:
        top_pos = tl.zeros((BLOCK_M,), dtype=ACC) + scale
        top_neg = top_pos
    # An empty sum is log 0 = −∞ whatever its shift.
    log_pos = tl.where(pos > 0, tl.log(tl.where(pos > 0, pos, 1.0)) + top_pos, float("-inf"))
    log_neg = tl.where(neg > 0, tl.log(tl.where(neg > 0, neg, 1.0)) + top_neg, float("-inf"))
    tl.store(logpos_ptr + group * length + start + place, log_pos, mask=row_ok)
    tl.store(logneg_ptr + group * length + start + place, log_neg, mask=row_ok)


@triton.jit(do_not_specialize=["own"])
def gradient_kernel(
    x_ptr,
    class_ptr,
    counts_ptr,
    scale_ptr,
    kpos_ptr,
    kneg_ptr,
    grad_ptr,
    length,
    own,
    D: tl.constexpr,
    SEGMENTS: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Gradient of the sum of own losses by every anchor, as anchor and as key: (groups, segments·length, D).

    Grid: row blocks of all segments, chunks of D, groups. kpos and kneg are what multiplies e^{S/τ} of a
    pair (signed, with the fixed shift), or its logarithm (online); nothing for anchors of other segments, which
    therefore have only own anchors to meet. SPLIT: x is bfloat16, and the factors of x are split in two bfloat16.
    """
    group = tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(length, BLOCK_M)
    mine = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * BLOCK_M
    n_rows = tl.load(counts_ptr + group * SEGMENTS + mine)
    if start >= n_rows:
        return
    scale = tl.load(scale_ptr)
    place = tl.arange(0, BLOCK_M)
    row_ok = place < n_rows - start
    row = (group * SEGMENTS + mine) * length + start
    chunk = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    chunk_ok = chunk < D
    row_class = tl.load(class_ptr + row + place, mask=row_ok, other=255)
    absent: tl.constexpr = 0.0 if FIXED else float("-inf")
    row_kpos = tl.load(kpos_ptr + row + place, mask=row_ok, other=absent)
    row_kneg = tl.load(kneg_ptr + row + place, mask=row_ok, other=absent)
    acc = tl.zeros((BLOCK_M, CHUNK), dtype=ACC)
    begin = tl.where(mine == own, 0, own)
    end = tl.where(mine == own, SEGMENTS, own + 1)
    for segment in range(begin, end):
        n_keys = tl.load(counts_ptr + group * SEGMENTS + segment)
        base = (group * SEGMENTS + segment) * length
        for first in range(0, n_keys, BLOCK_N):
            key_place = tl.arange(0, BLOCK_N)
            key_ok = key_place < n_keys - first
            key = base + first
            tile = _similarities(
                x_ptr + row * D, x_ptr + key * D, row_ok, key_ok, D, BLOCK_M, BLOCK_N, BLOCK_D, ACC, DOT, PRECISION
            )
            itself = (start + place)[:, None] == (first + key_place)[None, :]
            itself = itself & (segment == mine)
            exists = key_ok[None, :] & (itself == 0)
            key_class = tl.load(class_ptr + key + key_place, mask=key_ok, other=255)
            same = row_class[:, None] == key_class[None, :]
            key_kpos = tl.load(kpos_ptr + key + key_place, mask=key_ok, other=absent)
            key_kneg = tl.load(kneg_ptr + key + key_place, mask=key_ok, other=absent)
            row_k = tl.where(same, row_kpos[:, None], row_kneg[:, None])
            key_k = tl.where(same, key_kpos[None, :], key_kneg[None, :])
            if FIXED:
                factor = tl.exp(tile * scale - scale) * (row_k + key_k) * exists.to(ACC)
            else:
                z = tl.where(exists, tile * scale, float("-inf"))  # e^z·k ≤ 1 only for pairs that exist
                factor = (tl.exp(z + row_k) + tl.exp(z + key_k)) * exists.to(ACC)
                factor = tl.where(same, -factor, factor)
            mask = key_ok[:, None]
            if D % CHUNK != 0:
                mask = mask & chunk_ok[None, :]
            x = tl.load(x_ptr + key * D + key_place[:, None] * D + chunk[None, :], mask=mask, other=0.0).to(DOT)
            if SPLIT:
                high = factor.to(tl.bfloat16)
                low = (factor - high.to(ACC)).to(tl.bfloat16)
                acc = tl.dot(high.to(DOT), x, acc, out_dtype=ACC)
                acc = tl.dot(low.to(DOT), x, acc, out_dtype=ACC)
            else:
                acc = tl.dot(factor, x, acc, input_precision=PRECISION, out_dtype=ACC)
    acc *= scale
    tl.store(grad_ptr + row * D + place[:, None] * D + chunk[None, :], acc, mask=row_ok[:, None] & chunk_ok[None, :])
