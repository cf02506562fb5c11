"""What executes PTX: each kind of instruction, and that every fault it looks for is found."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from tests.ptx.blocks import Blocks
from tests.ptx.instructions import HANDLERS
from tests.ptx.machine import DivergedError, EarlyError, Machine
from tests.ptx.memory import MisalignedError, RaceError
from tests.ptx.numbers import Array, decode, encode
from tests.ptx.program import parse

HEAD = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry _kernel(
    .param .u64 .ptr .global .align 1 x_ptr,
    .param .u64 .ptr .global .align 1 out_ptr
)
.reqntid {threads}
{{
    .reg .pred     %p<9>;
    .reg .b16     %rs<9>;
    .reg .b32     %r<99>;
    .reg .b64     %rd<9>;
    .loc    1 29 0                          // kernel.py:29:0
    ld.param.b64     %rd1, [x_ptr];
    ld.param.b64     %rd2, [out_ptr];
    mov.u32     %r1, %tid.x;
    mul.wide.u32     %rd3, %r1, {size};
    add.s64     %rd4, %rd1, %rd3;          // the thread's input
    add.s64     %rd5, %rd2, %rd3;          // and output
{body}
    ret;
}}
"""
LOAD, STORE = "ld.global.b32 %r2, [%rd4];", "st.global.b32 [%rd5], %r3;"


def execute(
    body: str,
    x: Array,
    out: Array,
    *,
    threads: int = 32,
    blocks: int = 1,
    block: int = 0,
    between: Blocks | None = None,
    before: Blocks | None = None,
) -> Machine:
    """Runs ``body`` in blocks from ``block`` on, with a thread for each word of ``x``."""
    text = HEAD.format(threads=threads, size=out.dtype.itemsize, body=body)
    program = parse(text)
    given: Mapping[str, int] = {"x_ptr": x.ctypes.data, "out_ptr": out.ctypes.data}
    numbers = np.array([(block + number, 0, 0) for number in range(blocks)], np.int64)
    machine = Machine(
        program, HANDLERS, given, (3, 1, 1), numbers, 1024, between=between, before=before
    )
    machine.run()
    return machine


def by_thread(body: str, x: Any, kind: Any = np.uint32) -> Array:
    """What threads make of the words of ``x``: ``%r3`` of ``%r2``."""
    words = np.zeros(32, np.uint32)
    given = np.asarray(x, kind).view(np.uint32)
    words[: len(given)] = given
    out = np.zeros_like(words)
    execute(f"{LOAD}\n{body}\n{STORE}", words, out)
    return np.asarray(out[: len(given)].view(kind))


@pytest.mark.parametrize(
    ("body", "x", "kind", "expected"),
    [
        ("add.s32 %r3, %r2, -3;", [2, 7], np.int32, [-1, 4]),
        ("mul.hi.u32 %r3, %r2, %r2;", [3, 1 << 31], np.uint32, [0, 1 << 30]),
        ("mad.lo.s32 %r3, %r2, 3, 5;", [-2, 4], np.int32, [-1, 17]),
        ("div.s32 %r3, %r2, 4;", [-7, 7], np.int32, [-1, 1]),
        ("rem.s32 %r3, %r2, 4;", [-7, 7], np.int32, [-3, 3]),
        ("shl.b32 %r3, %r2, 32;", [5, -1], np.int32, [0, 0]),
        ("shr.s32 %r3, %r2, 40;", [5, -1], np.int32, [0, -1]),
        ("bfe.u32 %r3, %r2, 4, 8;", [0x12345], np.uint32, [0x34]),
        ("bfe.s32 %r3, %r2, 0, 4;", [0x1F, 0x17], np.int32, [-1, 7]),
        ("prmt.b32 %r3, %r2, 0, 0x7771U;", [0x8180], np.uint32, [0x81]),
        ("prmt.b32 %r3, %r2, %r2, 0x0129U;", [0x11228044], np.uint32, [0x448022FF]),
        ("popc.b32 %r3, %r2;", [0xFF00FF, 0], np.uint32, [16, 0]),
        ("not.b32 %r3, %r2;", [0, 5], np.int32, [-1, -6]),
        ("fma.rn.f32 %r3, %r2, %r2, 0fBF800000;", [1 + 2**-20], np.float32, [2**-19 + 2**-40]),
        ("max.f32 %r3, %r2, 0f00000000;", [float("nan"), -1.0, 2.0], np.float32, [0, 0, 2]),
        ("rsqrt.approx.ftz.f32 %r3, %r2;", [4.0], np.float32, [0.5]),
        ("setp.lt.s32 %p1, %r2, 0;\nselp.b32 %r3, 1, 2, %p1;", [-1, 1], np.int32, [1, 2]),
        (
            "setp.ltu.f32 %p1, %r2, 0f00000000;\nselp.f32 %r3, 0f3F800000, 0f00000000, %p1;",
            [float("nan"), 1.0],
            np.float32,
            [1, 0],
        ),
        (
            "setp.neu.f32 %p1, %r2, %r2;\n@%p1 mov.b32 %r2, 0f40000000;\nmov.b32 %r3, %r2;",
            [float("nan"), 1.0],
            np.float32,
            [2, 1],
        ),
        ("cvt.rn.f32.s32 %r3, %r2;", [1], np.uint32, [0x3F800000]),
        ("cvt.rzi.s32.f32 %r3, %r2;", [0x40200000, 0xFF800000], np.uint32, [2, 1 << 31]),
        (
            "cvt.rn.bf16.f32 %rs1, %r2;\nmov.b32 %r3, {%rs1, 0};",
            [0x3F808000, 0x3F818000, 0x3F808001],  # halfway to even, and beyond
            np.uint32,
            [0x3F80, 0x3F82, 0x3F81],
        ),
        ("cvt.rn.bf16x2.f32 %r3, %r2, 0f40000000;", [0x3F800000], np.uint32, [0x3F804000]),
        (
            "mov.b32 {%rs1, %rs2}, %r2;\nmov.b32 %r3, {%rs2, %rs1};",
            [0x12345],
            np.uint32,
            [0x23450001],
        ),
        (
            "mov.b32 {%rs1, %rs2}, %r2;\ncvt.f32.bf16 %r3, %rs2;",
            [0xC0400000],
            np.uint32,
            [0xC0400000],
        ),
        (
            "mov.b32 %r4, 0x40004000;\nfma.rn.bf16x2 %r3, %r2, %r4, %r4;",
            [0x3F804000],  # 1 and 2, by 2, and 2
            np.uint32,
            [0x408040C0],
        ),
    ],
)
def test_arithmetic(body: str, x: list[Any], kind: Any, expected: list[Any]) -> None:
    assert by_thread(body, x, kind).tolist() == np.asarray(expected, kind).tolist()


def test_threads_that_part_meet_again() -> None:
    """Each goes around as often as its number says; all of a warp are at the shuffle."""
    body = """
    mov.b32 %r3, 0;
    mov.b32 %r4, 0;
$L__loop:
    setp.ge.u32 %p1, %r4, %r1;
    @%p1 bra $L__done;
    add.s32 %r3, %r3, %r2;
    add.s32 %r4, %r4, 1;
    bra.uni $L__loop;
$L__done:
    shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;
    add.s32 %r3, %r3, %r5;
"""
    found = by_thread(body, np.arange(32, dtype=np.uint32) + 1)
    own = np.arange(32) * (np.arange(32) + 1)
    assert found.tolist() == (own + own[np.arange(32) ^ 1]).tolist()


def test_a_shuffle_by_half_a_warp() -> None:
    body = "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra $L__end;\n{}\n$L__end:"
    shuffle = "shfl.sync.up.b32 %r3|%p2, %r2, 1, 0, -1;"
    with pytest.raises(DivergedError):
        by_thread(body.format(shuffle), range(32))


def test_shuffles_know_their_range() -> None:
    body = "shfl.sync.up.b32 %r3|%p2, %r2, 2, 0, -1;\n@!%p2 mov.b32 %r3, -1;"
    assert by_thread(body, range(32), np.int32).tolist() == [-1, -1, *range(30)]
    body = "shfl.sync.idx.b32 %r3, %r2, 5, 31, -1;"
    assert by_thread(body, range(32)).tolist() == [5] * 32


def test_atomic_additions_come_one_after_another() -> None:
    x, out = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    body = f"atom.global.gpu.acq_rel.add.u32 %r3, [%rd1], 2;\n{STORE}"
    execute(body, x, out)
    assert x[0] == 64 and sorted(out) == list(range(0, 64, 2))


ROUND = """
    ld.global.b32 %r2, [%rd4];
    shl.b32 %r5, %r1, 2;
    mov.b32 %r6, global_smem;
    add.s32 %r7, %r6, %r5;
    st.shared.b32 [%r7], %r2;
    {barrier}
    xor.b32 %r8, %r5, {other};
    ld.shared.b32 %r3, [%r8];
    st.global.b32 [%rd5], %r3;
    {last}
"""


@pytest.mark.parametrize(
    ("barrier", "other", "last", "fault"),
    [
        ("bar.sync 0;", 128, "", None),
        ("", 64, "", None),  # within the warp
        ("", 128, "", "reads what warp 1 wrote"),
        ("bar.sync 0;", 128, "st.shared.b32 [%r7], %r1;", "overwrites what warp 1 read"),
        ("bar.sync 0;", 128, "bar.sync 0;\nst.shared.b32 [%r7], %r1;", None),
        ("bar.sync 0;", 128, "bar.sync 0;\nst.shared.b32 [%r6], %r1;", "different values"),
        ("setp.lt.u32 %p1, %r1, 32;\n@%p1 bar.sync 0;", 128, "", "not all threads"),
    ],
)
def test_races(barrier: str, other: int, last: str, fault: str | None) -> None:
    """Two warps of each of two blocks hand their numbers over through shared memory."""
    x, out = np.arange(100, 164, dtype=np.uint32), np.zeros(64, np.uint32)
    body = ROUND.format(barrier=barrier, other=other, last=last)
    if fault is not None:
        with pytest.raises((RaceError, DivergedError), match=fault) as found:
            execute(body, x, out, threads=64, blocks=2)
        assert "kernel.py:29:0" in found.value.__notes__[0]
    else:
        execute(body, x, out, threads=64, blocks=2)
        assert out.tolist() == x[np.arange(64) ^ (other // 4)].tolist()


COPY = """
    shl.b32 %r5, %r1, 2;
    mov.b32 %r6, global_smem;
    add.s32 %r7, %r6, %r5;
    cp.async.ca.shared.global [%r7 + 0], [%rd4 + 0], 0x4, {length};
    cp.async.commit_group;
    cp.async.ca.shared.global [%r7 + 256], [%rd4 + 0], 0x4;
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r3, [%r7];
    st.global.b32 [%rd5], %r3;
    cp.async.wait_group 0;
"""


def test_copies_arrive_when_they_are_waited_for() -> None:
    x, out = np.arange(1, 33, dtype=np.uint32), np.zeros(32, np.uint32)
    execute(COPY.format(wait="cp.async.wait_group 1;", length=4), x, out)
    assert out.tolist() == x.tolist()
    execute(COPY.format(wait="cp.async.wait_group 1;", length=0), x, out)
    assert not out.any()
    with pytest.raises(RaceError, match="still being copied"):
        execute(COPY.format(wait="cp.async.wait_group 2;", length=4), x, out)


HAND_OVER = """
    mov.u32 %r4, %ctaid.x;
    mov.b32 %r9, 0;
    setp.ne.u32 %p1, %r4, 1;
    @%p1 bra $L__take;                     // block 1 comes first and writes
    add.s32 %r3, %r1, 100;
    st.global.b32 [%rd4], %r3;
    {before}
$L__take:
    setp.eq.u32 %p2, %r1, 0;
    @%p2 atom.global.gpu.{order}.add.u32 %r9, [%rd2 + 512], 1;
    {after}
    setp.eq.u32 %p3, %r4, 1;
    @%p3 bra $L__end;
    xor.b32 %r5, %r1, 33;                  // of another warp
    mul.wide.u32 %rd6, %r5, 4;
    add.s64 %rd7, %rd1, %rd6;
    {use}
$L__end:
"""
READ = "ld.global.b32 %r3, [%rd7];\nst.global.b32 [%rd5], %r3;"


@pytest.mark.parametrize(
    ("before", "order", "after", "use", "fault"),
    [
        ("bar.sync 0;", "acq_rel", "bar.sync 0;", READ, None),
        ("", "acq_rel", "bar.sync 0;", READ, "block 0 reads what block 1 writes"),
        ("bar.sync 0;", "acq_rel", "", READ, "block 0 reads what block 1 writes"),
        ("bar.sync 0;", "relaxed", "bar.sync 0;", READ, "block 0 reads what block 1 writes"),
        ("bar.sync 0;", "release", "bar.sync 0;", READ, "block 0 reads what block 1 writes"),
        ("bar.sync 0;", "acq_rel", "bar.sync 0;", "st.global.b32 [%rd7], %r1;", None),
        ("", "acq_rel", "bar.sync 0;", "st.global.b32 [%rd7], %r1;", "overwrites what block 1 wri"),
    ],
)
def test_blocks_hand_over_by_atomic_operations(
    before: str, order: str, after: str, use: str, fault: str | None
) -> None:
    x, out = np.zeros(64, np.uint32), np.zeros(129, np.uint32)
    body = HAND_OVER.format(before=before, order=order, after=after, use=use)
    between = Blocks()
    for block in (1, 0):
        expects = fault is not None and block == 0
        with pytest.raises(RaceError, match=fault) if expects else nullcontext():
            execute(body, x, out, threads=64, block=block, between=between)
    if use == READ and fault is None:
        assert out[:64].tolist() == [100 + (number ^ 33) for number in range(64)]


def test_blocks_that_read_what_another_overwrites() -> None:
    x, out = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    between = Blocks()
    for block in (2, 1):
        execute(LOAD, x, out, block=block, between=between)
    with pytest.raises(RaceError, match="overwrites what several blocks read"):
        execute("st.global.b32 [%rd4], %r1;", x, out, block=0, between=between)


WAIT = "griddepcontrol.wait;"
UPDATE = "atom.global.gpu.relaxed.add.u32 %r4, [%rd5], 1;"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (f"{WAIT} {LOAD}", None),
        (f"{LOAD} {WAIT}", "reads ahead"),
        (f"ld.global.b32 %r2, [%rd4 + 512]; {WAIT}", None),
        (f"ld.global.v2.b32 {{%r2, %r3}}, [%rd2 + 32]; {WAIT}", "reads ahead"),
        (f"ld.global.b32 %r2, [%rd2 + 36]; {WAIT}", None),
        (f"cp.async.ca.shared.global [%r1], [%rd1], 4; {WAIT}", "reads ahead"),
        (f"{STORE} {WAIT}", "writes or exits"),
        (f"{UPDATE} {WAIT}", "writes or exits"),
        ("", "writes or exits"),
        (f"setp.lt.u32 %p1, %r1, 16; @%p1 {WAIT} {STORE}", "writes or exits"),
        (f"setp.lt.u32 %p1, %r1, 16; @%p1 ret; {WAIT}", "writes or exits"),
    ],
)
def test_launches_that_begin_early(body: str, fault: str | None) -> None:
    """Behind one that stores to what this one finds as ``x``, and updates a word of its ``out``."""
    x, out, before = np.zeros(256, np.uint32), np.zeros(32, np.uint32), Blocks()
    execute(STORE, np.zeros(32, np.uint32), x[:128], threads=32, between=before)
    execute("atom.global.gpu.relaxed.add.u32 %r4, [%rd2 + 32], 1;", x, out, between=before)
    with pytest.raises(EarlyError, match=fault) if fault else nullcontext():
        execute(body, x, out, threads=1 if "cp.async" in body else 32, before=before)


def test_accesses_that_are_not_aligned() -> None:
    x, out = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    with pytest.raises(MisalignedError, match="8 bytes"):
        execute("ld.global.v2.b32 {%r2, %r3}, [%rd4];", x, out)
    with pytest.raises(IndexError, match="shared"):
        execute("ld.shared.b32 %r2, [%r1 + 1024];", x, out, threads=1)


def test_a_product_of_matrices() -> None:
    """Rows come through shared memory in the layouts of ``ldmatrix``, also transposed."""
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-8, 8, shape).astype(np.float32) for shape in ((16, 16), (16, 8)))
    x = np.concatenate([encode(each, "bf16").ravel() for each in (a, b)]).view(np.uint32)
    out = np.zeros(16 * 8, np.float32)
    body = """
    mul.wide.u32 %rd3, %r1, 16;            // 16 bytes for each thread, and for half of them more
    add.s64 %rd4, %rd1, %rd3;
    shl.b32 %r5, %r1, 4;
    setp.lt.u32 %p1, %r1, 16;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd4];
    st.shared.v4.b32 [%r5], {%r10, %r11, %r12, %r13};
    @%p1 ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd4 + 512];
    @%p1 st.shared.v4.b32 [%r5 + 512], {%r10, %r11, %r12, %r13};
    and.b32 %r20, %r1, 15;                 // the row of A, and which half of it
    shl.b32 %r21, %r20, 5;
    and.b32 %r22, %r1, 16;
    add.s32 %r21, %r21, %r22;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r30, %r31, %r32, %r33}, [%r21];
    shl.b32 %r23, %r20, 4;
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r34, %r35}, [%r23 + 512];
    mov.b32 %r40, 0f00000000;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r50, %r51, %r52, %r53},
        {%r30, %r31, %r32, %r33}, {%r34, %r35}, {%r40, %r40, %r40, %r40};
    shr.u32 %r60, %r1, 2;                  // row g, columns 2 t and 2 t + 1
    and.b32 %r61, %r1, 3;
    shl.b32 %r60, %r60, 5;
    shl.b32 %r61, %r61, 3;
    add.s32 %r62, %r60, %r61;
    cvt.u64.u32 %rd6, %r62;
    add.s64 %rd7, %rd2, %rd6;
    st.global.v2.b32 [%rd7], {%r50, %r51};
    st.global.v2.b32 [%rd7 + 256], {%r52, %r53};
"""
    execute(body, x, out)
    assert np.array_equal(out.reshape(16, 8), a @ b)


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32", "s8", "u16", "f64"])
def test_numbers_are_what_they_were(kind: str) -> None:
    values = np.arange(100, dtype=np.float32)
    assert np.array_equal(decode(encode(values, kind), kind).astype(np.float32), values)
