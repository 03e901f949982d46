"""What a group of four warps writes of a block of scores in `kernels.marks`: marks, bits of sure keys, and how many.

Few scores are marked, so a thread puts those it holds of a query into shared memory, notes in a word which are marked,
reserves room for as many in the query's list, and then takes these alone out again. To store each score under a
predicate took two thirds longer: such stores wait for one another's registers. Which keys reach a ceiling a thread
knows of two queries; eight of them exchange these bits until each has those of 16 queries, which are half a word.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BLOCK = gl.constexpr(64)  # keys that a group of warps scores at once


@gluon.constexpr_function
def _stash_asm(place, values, first):
    """Four values into the stash."""
    return f"st.shared.v4.f32 [slot + {place}], {{{', '.join(f'${first + i}' for i in values)}}};"


@gluon.constexpr_function
def _write_asm(group):
    """PTX of `write_block`: the 16 values that a thread has of each of two queries, two of each eight columns.

    Where they are of the product that makes them, it knows from its number: that takes no registers between products.
    Value 2b + o, of column 8b + o, has bits 16·o + 2b and the one above it in a word, and in the stash place b % 4 of
    quad 2·o + b // 4.
    """
    names = ("scale0", "shift0", "scale1", "shift1", "end", "stash", "block", "room", "num_keys", "base", "words")
    given = {name: f"${48 + 16 * i}" for i, name in enumerate(names)}
    stash, block = given["stash"], given["block"]
    counts = 32768 + group % 2 * 256
    quads = [(group * 8192 + i * 2048, [8 * (i % 2) + 2 * j + i // 2 for j in range(4)]) for i in range(4)]
    lines = [
        "{ .reg .pred p, two; .reg .f32 over; .reg .b32 t, n, id, slot, at, query, column, key, keep, x, y, i, j;",
        ".reg .b32 mask<2>, sure<2>, first<2>; .reg .b64 to;",
        f"mov.u32 id, %tid.x; and.b32 t, id, 127; mad.lo.u32 slot, t, 16, {stash};",
        "and.b32 query, t, 96; shr.u32 query, query, 1; bfe.u32 n, t, 2, 3; add.u32 query, query, n;",
        f"mad.lo.u32 at, query, 4, {stash};",
    ]
    # Below the bound the sign is 1; from the ceiling on numbers are 2 or more, NaN too, and have the bit after it.
    for half in range(2):
        lines.append("mov.b32 x, 0; mov.b32 y, 0;")
        for b in reversed(range(8)):
            for o, bits in ((0, "x"), (1, "y")):
                value = f"${16 + 16 * half + 2 * b + o}"
                lines.append(f"fma.rn.f32 over, {value}, {given[f'scale{half}']}, {given[f'shift{half}']};")
                lines.append(f"mov.b32 n, over; shf.l.wrap.b32 {bits}, n, {bits}, 2;")
        lines += [
            "mad.lo.u32 x, y, 65536, x; shr.u32 n, x, 1;",
            f"lop3.b32 sure{half}, x, n, 0x55555555, 0x20;",  # a & ~b & c
            f"lop3.b32 mask{half}, x, n, 0x55555555, 0x02;",  # ~a & ~b & c
            f"popc.b32 n, sure{half}; setp.ne.u32 p, n, 0; @p red.shared.add.u32 [at + {counts + 512 + 32 * half}], n;",
            f"popc.b32 n, mask{half}; atom.shared.add.u32 first{half}, [at + {counts + 32 * half}], n;",
        ]
        if half == 0:
            lines += [_stash_asm(*quad, 16) for quad in quads]
    # Bits of a thread's two queries beside each other; then eight threads that have the same columns exchange bits,
    # until each has those of 16 queries for two columns that are neighbours.
    lines.append("shl.b32 x, sure1, 1; or.b32 x, x, sure0;")
    # bit 16·o + 2b + h, of query 8h + r, becomes 16·o + 8h + b
    for distance, mask in ((1, 0x22222222), (2, 0x0C0C0C0C), (4, 0x00F000F0)):
        lines.append(f"shr.u32 t, x, {distance}; lop3.b32 t, t, x, {mask}, 0x28;")  # (a ^ b) & c
        lines.append(f"shl.b32 y, t, {distance}; lop3.b32 x, x, t, y, 0x96;")  # a ^ b ^ c
    # and then 16·o + 8h + r, of column 8b + o, where b is this thread's r
    for lane, distance, mask in ((16, 4, 0x0F0F0F0F), (8, 2, 0x33333333), (4, 1, 0x55555555)):
        lines.append(f"shfl.sync.bfly.b32 y, x, {lane}, 31, 0xFFFFFFFF;")
        lines.append(f"and.b32 t, id, {lane}; setp.ne.u32 p, t, 0; selp.b32 t, {32 - distance}, {distance}, p;")
        lines.append(f"shf.l.wrap.b32 y, y, y, t; selp.b32 keep, {mask ^ 0xFFFFFFFF}, {mask}, p;")
        lines.append("lop3.b32 x, x, y, keep, 0xE4;")  # (a & c) | (b & ~c)
    lines += [
        f"bfe.u32 y, id, 5, 2; bfe.u32 key, id, 2, 3; and.b32 n, id, 3; mad.lo.u32 column, n, 2, {block};",
        f"mad.lo.u32 key, key, 8, column; shr.u32 t, y, 1; mad.lo.u32 t, t, {given['num_keys']}, key;",
        f"mad.wide.u32 to, t, 4, {given['words']}; and.b32 t, y, 1; mad.wide.u32 to, t, 2, to;",
        f"setp.lt.s32 p, key, {given['end']}; and.b32 t, x, 0xFFFF; setp.ne.and.u32 p, t, 0, p;",
        f"@p st.global.u16 [to], t; add.u32 key, key, 1; setp.lt.s32 p, key, {given['end']};",
        "shr.u32 t, x, 16; setp.ne.and.u32 p, t, 0, p; @p st.global.u16 [to + 4], t;",
    ]
    for half in range(2):
        if half == 1:
            lines += [_stash_asm(*quad, 32) for quad in quads]
        lines += [
            f"popc.b32 n, mask{half}; add.u32 n, first{half}, n; setp.gt.u32 p, n, {given['room']};",
            f"selp.b32 mask{half}, 0, mask{half}, p;",  # too many: `counts` says so
            f"add.u32 n, query, {8 * half}; mad.lo.u32 n, n, {given['room']}, first{half};",
            f"mad.wide.u32 to, n, 8, {given['base']};",
            f"setp.eq.u32 p, mask{half}, 0; @p bra DONE{half};",
            # two at a time, so that one waits beside the other
            f"MORE{half}: bfind.u32 i, mask{half}; shl.b32 t, 1, i; xor.b32 mask{half}, mask{half}, t;",
            f"setp.ne.u32 two, mask{half}, 0; bfind.u32 j, mask{half}; shl.b32 t, 1, j; not.b32 t, t;",
            f"and.b32 mask{half}, mask{half}, t;",
            "and.b32 x, i, 24; mad.lo.u32 x, x, 256, slot; and.b32 n, i, 6; mad.lo.u32 x, n, 2, x;",
            "and.b32 y, j, 24; mad.lo.u32 y, y, 256, slot; and.b32 n, j, 6; mad.lo.u32 y, n, 2, y;",
            f"ld.shared.b32 x, [x + {group * 8192}]; @two ld.shared.b32 y, [y + {group * 8192}];",
            "and.b32 n, i, 14; mad.lo.u32 n, n, 4, column; shr.u32 t, i, 4; add.u32 n, n, t;",
            "and.b32 key, j, 14; mad.lo.u32 key, key, 4, column; shr.u32 t, j, 4; add.u32 key, key, t;",
            "st.global.v2.b32 [to], {n, x}; @two st.global.v2.b32 [to + 8], {key, y}; add.u64 to, to, 16;",
            f"setp.ne.u32 p, mask{half}, 0; @p bra MORE{half}; DONE{half}:",
        ]
    lines.append("}")
    return " ".join(lines)


@gluon.constexpr_function
def _write_constraints():
    return ",".join(["=r"] * 16 + ["f"] * 96 + ["r"] * 80 + ["l"] * 32)


@gluon.jit
def write_block(values, scales, shifts, ends, stash, sizes, bases, GROUP: gl.constexpr):
    """Write down, and count, scores of which scale · score + shift is in [0, 2), and set the bits of those from 2 on.

    Args:
        values: [4, 8, BLOCK] of each of two halves, and so are `scales` and `shifts`.
        ends: of the first half, the key at which the walk ends, or 0 where 16 queries are none.
        stash: `stash_address`.
        sizes: the block's first key; how many marks a query has room for; how many keys there are.
        bases: addresses of the 64 queries' marks and words.
    """
    block, room, num_keys = sizes
    lines = [scales[0], shifts[0], scales[1], shifts[1]]
    gl.inline_asm_elementwise(
        _write_asm(GROUP), _write_constraints(),
        [values[0], values[1]] + lines + [ends, stash, block, room, num_keys, bases[0], bases[1]],
        gl.int32, is_pure=False, pack=16,
    )  # fmt: skip


@gluon.jit
def stash_address(zero):
    """The address of shared memory beside the compiler's: 8 KiB of scores for each of four groups, then for each of 128
    queries the number of its marks, and then of those of its keys that are sure."""
    return gl.inline_asm_elementwise(
        "{ .shared .align 1024 .b8 stash[33792]; mov.u32 $0, stash; add.u32 $0, $0, $1; }",
        "=r,r", [zero], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def forget_counts(row, stash):
    """Set the counts of queries to 0."""
    gl.inline_asm_elementwise(
        "{ .reg .b32 at; mad.lo.u32 at, $1, 4, $2; mov.b32 $0, 0; st.shared.b32 [at], $0; "
        "st.shared.b32 [at + 512], $0; }",
        "=r,r,r", [row, stash], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def counts_held(row, stash):
    """The counts of queries."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 at; mad.lo.u32 at, $1, 4, $2; ld.shared.b32 $0, [at]; }",
        "=r,r,r", [row, stash], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
