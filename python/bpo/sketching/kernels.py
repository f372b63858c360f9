"""Triton kernels of the sparse sketch: the bits of ``rust/sketch/sparse.rs``. To import this needs Triton.

With m = dim / nnz outputs of a repetition, coordinate c is position c % m of block c // m, and meets output
(c % m + the block's rotation) % m. An output takes one coordinate of each block, in ascending order.

What changes from call to call is no constant of the compiler's, so that a kernel is compiled once for a sketch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tasks", "owners"])  # type: ignore[untyped-decorator]
def draw(
    table: tl.tensor,  # int64: the seed first
    tasks: tl.tensor,  # where in the table: (purpose, repetition, first position, count, destination, first program)
    owners: tl.tensor,  # where in the table: the task of each program
    signs: tl.tensor,  # int32, four words of a position one after the other
    rotations: tl.tensor,  # int32, one of a position
    outputs: tl.constexpr,
    draws: tl.constexpr,
) -> None:
    """Draws the signs and rotations of all slices; a program draws some positions of one stream."""
    program = tl.program_id(0)
    task = table + tasks + tl.load(table + owners + program) * 6
    place = (program - tl.load(task + 5)) * draws + tl.arange(0, draws)
    position = tl.load(task + 2) + place
    inside = place < tl.load(task + 3)
    to = tl.load(task + 4) + place
    purpose = tl.load(task)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    repetition = tl.zeros_like(low) + tl.load(task + 1).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(table), low, high, repetition, tl.zeros_like(low) + purpose.to(tl.uint32))
    if purpose == 1:  # signs; else rotations
        tl.store(signs + 4 * to, a.to(tl.int32, bitcast=True), mask=inside)
        tl.store(signs + 4 * to + 1, b.to(tl.int32, bitcast=True), mask=inside)
        tl.store(signs + 4 * to + 2, c.to(tl.int32, bitcast=True), mask=inside)
        tl.store(signs + 4 * to + 3, d.to(tl.int32, bitcast=True), mask=inside)
    else:
        # The upper half of 64 random bits times the number of outputs, which is below 2^32.
        carry = (a.to(tl.uint64) * outputs) >> 32
        rotation = (b.to(tl.uint64) * outputs + carry) >> 32
        tl.store(rotations + to, rotation.to(tl.int32), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _position(
    rotation_of: tl.tensor, block: tl.tensor, count: tl.tensor, output: tl.tensor, outputs: tl.constexpr
) -> tl.tensor:
    """Which position of a block each output meets."""
    position = output - tl.load(rotation_of + block, mask=block < count, other=0)
    return tl.where(position < 0, position + outputs, position)


@triton.jit  # type: ignore[untyped-decorator]
def _fetch(
    gradients: tl.tensor,
    width: tl.tensor,
    signs: tl.tensor,
    first_bit: tl.tensor,
    position: tl.tensor,
    begin: tl.tensor,  # of the block, from the first coordinate of the slice on
    own: tl.tensor,
    outputs: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The gradients at positions of a block, zero outside the slice; and their signs, in the highest bit."""
    # In 32 bits, of which the positions need no more.
    low = tl.maximum(-begin, 0).to(tl.int32)
    high = tl.minimum(tl.maximum(width - begin, 0), outputs).to(tl.int32)
    inside = own & (position >= low) & (position < high)
    value = tl.load(gradients + begin + position, mask=inside, other=0.0)
    bit = first_bit + begin
    near = (bit & 31).to(tl.int32) + position
    word = tl.load(signs + (bit >> 5) + (near >> 5), mask=inside, other=0)
    return value, word.to(tl.uint32, bitcast=True) >> (near & 31).to(tl.uint32) << 31


@triton.jit  # type: ignore[untyped-decorator]
def _term(value: tl.tensor, sign: tl.tensor, scale: tl.tensor) -> tl.tensor:
    return ((scale * value).to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["visits", "begins", "slices"])  # type: ignore[untyped-decorator]
def add(
    table: tl.tensor,
    slices: tl.tensor,  # where in the table: (address, stride, first row, width, positions of the first block before,
    # first sign, signs of a repetition, first rotation, blocks) of each slice
    begins: tl.tensor,  # where in the table: the first visit of each row, and the end of the last
    visits: tl.tensor,  # where in the table: the slices that each row meets
    signs: tl.tensor,
    rotations: tl.tensor,
    sums: tl.tensor,  # (n, dim) float32, to which is added
    scale: tl.tensor,
    outputs: tl.constexpr,
    repetitions: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Adds the sketch of the slices to the sums; a program has some outputs of one repetition and row.

    Must be compiled without fused multiplication and addition.
    """
    tiles: tl.constexpr = (outputs + tile - 1) // tile
    row = tl.program_id(0) // (tiles * repetitions)
    repetition = tl.program_id(0) // tiles % repetitions
    output = tl.program_id(0) % tiles * tile + tl.arange(0, tile)
    own = output < outputs
    sums += (row.to(tl.int64) * repetitions + repetition) * outputs + output
    total = tl.load(sums, mask=own, other=0.0)
    for visit in range(tl.load(table + begins + row), tl.load(table + begins + row + 1)):
        entry = table + slices + tl.load(table + visits + visit) * 9
        gradients = tl.load(entry).to(tl.pointer_type(tl.float32), bitcast=True)
        gradients += tl.load(entry + 1) * (row - tl.load(entry + 2))
        width = tl.load(entry + 3)
        lead = tl.load(entry + 4)
        first_bit = tl.load(entry + 5) + repetition * tl.load(entry + 6)
        count = tl.load(entry + 8)
        rotation_of = rotations + tl.load(entry + 7) + repetition * count
        # By hand, since a compiler that keeps loads in order would wait for each before the next.
        for start in range(0, count, 8):
            p0 = _position(rotation_of, start + 0, count, output, outputs)
            p1 = _position(rotation_of, start + 1, count, output, outputs)
            p2 = _position(rotation_of, start + 2, count, output, outputs)
            p3 = _position(rotation_of, start + 3, count, output, outputs)
            p4 = _position(rotation_of, start + 4, count, output, outputs)
            p5 = _position(rotation_of, start + 5, count, output, outputs)
            p6 = _position(rotation_of, start + 6, count, output, outputs)
            p7 = _position(rotation_of, start + 7, count, output, outputs)
            v0, s0 = _fetch(gradients, width, signs, first_bit, p0, (start + 0) * outputs - lead, own, outputs)
            v1, s1 = _fetch(gradients, width, signs, first_bit, p1, (start + 1) * outputs - lead, own, outputs)
            v2, s2 = _fetch(gradients, width, signs, first_bit, p2, (start + 2) * outputs - lead, own, outputs)
            v3, s3 = _fetch(gradients, width, signs, first_bit, p3, (start + 3) * outputs - lead, own, outputs)
            v4, s4 = _fetch(gradients, width, signs, first_bit, p4, (start + 4) * outputs - lead, own, outputs)
            v5, s5 = _fetch(gradients, width, signs, first_bit, p5, (start + 5) * outputs - lead, own, outputs)
            v6, s6 = _fetch(gradients, width, signs, first_bit, p6, (start + 6) * outputs - lead, own, outputs)
            v7, s7 = _fetch(gradients, width, signs, first_bit, p7, (start + 7) * outputs - lead, own, outputs)
            # Outside the slice it adds zero, which changes nothing: a sum that begins at zero is never minus zero.
            total += _term(v0, s0, scale)
            total += _term(v1, s1, scale)
            total += _term(v2, s2, scale)
            total += _term(v3, s3, scale)
            total += _term(v4, s4, scale)
            total += _term(v5, s5, scale)
            total += _term(v6, s6, scale)
            total += _term(v7, s7, scale)
    tl.store(sums, total, mask=own)


# Whether Triton runs them on the CPU, without compiling them, as it does where TRITON_INTERPRET was set.
INTERPRETED = not isinstance(add, triton.JITFunction)
