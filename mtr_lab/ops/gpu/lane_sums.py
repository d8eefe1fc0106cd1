"""Sums over the channels of a warp on tensor cores, in PTX, without a detour through shared memory.

A lane has eight numbers, one for each token. A product with a matrix of zeros and ones adds them over four neighbouring
lanes (``quad_sums``), and a second product adds over the eight groups of four lanes (``add_quads``), for two states at
once. The operands are rounded to bfloat16, and added in float32. With ``tl.dot``, numbers would reach the tensor cores
through shared memory: the compiler does not know that the order of the summands is free.

Lane 4 g + q of a product ``mma.m16n8k16`` holds the rows g and g + 8, and of eight columns the columns 2 q and 2 q + 1
(PTX ISA, "Matrix fragments for mma.m16n8k16"). Every tensor here has one entry for each lane of a warp.
"""

import triton
import triton.language as tl

ONES = tl.constexpr(0x3F803F80)  # a pair of bfloat16 ones


@triton.jit
def bfloat16_pair(x, y):
    """Two numbers, rounded to bfloat16, in the lower and the upper half of an integer."""
    return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x, y], tl.int32, is_pure=True, pack=1)


@triton.jit
def pair_products(xs, factors):
    """Numbers, two and two rounded to bfloat16, times pairs.

    The product is a sum with -0: ``mul.bf16x2`` needs compute capability 9.0, ``fma.bf16x2`` only 8.0.
    """
    products = ()
    for i in tl.static_range(len(factors)):
        product = tl.inline_asm_elementwise(
            """{
            .reg .b32 pair, zero;
            cvt.rn.bf16x2.f32 pair, $2, $1;
            mov.b32 zero, 0x80008000;
            fma.rn.bf16x2 $0, pair, $3, zero;
            }""",
            "=r,f,f,r", [xs[2 * i], xs[2 * i + 1], factors[i]], tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        products = products + (product,)
    return products


@triton.jit
def add_pair_products(totals, xs, factors):
    """``totals`` plus ``pair_products(xs, factors)``, rounded once."""
    sums = ()
    for i in tl.static_range(len(factors)):
        total = tl.inline_asm_elementwise(
            "{ .reg .b32 pair; cvt.rn.bf16x2.f32 pair, $3, $2; fma.rn.bf16x2 $0, pair, $4, $1; }",
            "=r,r,f,f,r", [totals[i], xs[2 * i], xs[2 * i + 1], factors[i]], tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        sums = sums + (total,)
    return sums


@triton.jit
def selection(LANES: tl.constexpr):
    """The matrix of ``quad_sums``: column i is 1 in the rows that hold number i. Four pairs for each lane."""
    g = tl.arange(0, LANES) % 32 // 4
    pairs = ()
    for i in tl.static_range(0, 8, 2):
        pairs = pairs + (tl.where(g == i, ONES & 0xFFFF, tl.where(g == i + 1, ONES & 0xFFFF0000, 0)).to(tl.int32),)
    return pairs


@triton.jit
def quad_sums(b, c, select):
    """The sums of eight numbers b and eight numbers c over each group of four lanes.

    Args:
        b, c: four pairs of numbers.
        select: of ``selection``.

    Returns:
        Pairs of b and c: in lane 4 g + q the sums of number g over the groups 2 q and 2 q + 1.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 pair;
        .reg .f32 none, s, t, u, v;
        mov.f32 none, 0f00000000;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {s, t, u, v}, {$2, $6, $3, $7}, {$10, $11}, {none, none, none, none};
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {s, t, u, v}, {$4, $8, $5, $9}, {$12, $13}, {s, t, u, v};
        cvt.rn.bf16x2.f32 pair, t, s;
        movmatrix.sync.aligned.m8n8.trans.b16 $0, pair;
        cvt.rn.bf16x2.f32 pair, v, u;
        movmatrix.sync.aligned.m8n8.trans.b16 $1, pair;
        }""",
        "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r",
        [b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], select[0], select[1], select[2], select[3]],
        (tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def add_quads(total, first, second, column):
    """``total`` plus the sums over groups, of two quantities b and c of eight tokens, for two states.

    Args:
        total: four numbers of a lane: for the states of columns 2 q and 2 q + 1, b of token g, then c of token g.
        first, second: of ``quad_sums``, for the states of columns ``column`` and ``column`` + 1.
    """
    g = tl.arange(0, first[0].shape[0]) % 32 // 4
    return tl.inline_asm_elementwise(
        """{
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};
        }""",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [first[0], first[1], second[0], second[1], tl.where(g == column, ONES, 0), tl.where(g == column + 1, ONES, 0),
         total[0], total[1], total[2], total[3]],
        (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip
