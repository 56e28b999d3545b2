"""The Triton kernels that multiply a few tokens by matrices: what matters is that the matrices are
read at the speed of memory, in as few launches as can be."""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product_rows(
    x,
    weight,
    bias,
    output,
    rows,
    width,
    size,
    output_stride,
    together,
    first,
    tile,
    TAKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns from `first` on, BLOCK of `size`, of x [rows, width] · weightᵀ [width, size] + bias,
    for ROWS rows of a tile.

    Of the rows of the output so many as are `together` are `size` apart, and the next so many
    `output_stride` from there. With TAKEN the product is taken off what is there.
    """
    row = tile * ROWS + tl.arange(0, ROWS)
    column = first + tl.arange(0, BLOCK)
    weight += column.to(tl.int64)[:, None] * width
    used = (column < size)[:, None]
    if ROWS == 1:
        sums = tl.zeros([BLOCK, CHUNK], tl.float32)
        x += tile * width
        for begin in range(0, width, CHUNK):
            at = begin + tl.arange(0, CHUNK)
            numbers = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32)
            inside = used & (at < width)[None, :]
            of_weight = tl.load(weight + at[None, :], mask=inside, other=0.0).to(tl.float32)
            sums += of_weight * numbers[None, :]
        found = tl.sum(sums, 1)[None, :]
    else:
        x += row.to(tl.int64)[:, None] * width
        found = tl.zeros([ROWS, BLOCK], tl.float32)
        for begin in range(0, width, CHUNK):
            at = begin + tl.arange(0, CHUNK)[None, :]
            numbers = tl.load(x + at, mask=(row < rows)[:, None] & (at < width), other=0.0)
            of_weight = tl.load(weight + at, mask=used & (at < width), other=0.0)
            found = tl.dot(numbers, of_weight.T, found, input_precision=PRECISION)
    if bias is not None:
        found += tl.load(bias + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    row = row.to(tl.int64)[:, None]
    output += (row // together) * output_stride + (row % together) * size + column[None, :]
    mask = (row < rows) & (column < size)[None, :]
    if TAKEN:
        found = tl.load(output, mask=mask, other=0.0).to(tl.float32) - found
    tl.store(output, found.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x,
    weight,
    bias,
    output,
    rows,
    words,
    size,
    output_stride,
    together,
    TAKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`product_rows` of every group, x [groups, rows, 8 · words], with a weight [size, 8 · words]
    and a bias of its own. Groups of the output are `together` rows apart."""
    group = tl.program_id(2).to(tl.int64)
    width = words * 8  # so that the compiler knows what it is a multiple of
    if bias is not None:
        bias += group * size
    product_rows(
        x + group * rows * width,
        weight + group * size * width,
        bias,
        output + group * together * size,
        rows,
        width,
        size,
        output_stride,
        together,
        tl.program_id(0) * BLOCK,
        tl.program_id(1),
        TAKEN,
        ROWS,
        BLOCK,
        CHUNK,
        PRECISION,
    )


@triton.jit
def whole_product(
    x,
    weight,
    bias,
    output,
    rows,
    width,
    size,
    program,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`product_rows` of one of the programs that make a product, whose rows lie side by side."""
    product_rows(
        x,
        weight,
        bias,
        output,
        rows,
        width,
        size,
        size,
        1,
        program * BLOCK,
        tl.program_id(1),
        False,
        ROWS,
        BLOCK,
        CHUNK,
        PRECISION,
    )


@triton.jit(do_not_specialize=["rows"])
def projections_kernel(
    x,
    query_weight,
    key_weight,
    value_weight,
    query_bias,
    key_bias,
    value_bias,
    query,
    key,
    value,
    rows,
    words,
    query_size,
    key_size,
    value_size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Three products of the same x [rows, 8 · words], each by programs of its own."""
    program, width = tl.program_id(0), words * 8
    of_query, of_key = tl.cdiv(query_size, BLOCK), tl.cdiv(key_size, BLOCK)
    if program < of_query:
        whole_product(
            x,
            query_weight,
            query_bias,
            query,
            rows,
            width,
            query_size,
            program,
            ROWS,
            BLOCK,
            CHUNK,
            PRECISION,
        )
    elif program < of_query + of_key:
        whole_product(
            x,
            key_weight,
            key_bias,
            key,
            rows,
            width,
            key_size,
            program - of_query,
            ROWS,
            BLOCK,
            CHUNK,
            PRECISION,
        )
    else:
        whole_product(
            x,
            value_weight,
            value_bias,
            value,
            rows,
            width,
            value_size,
            program - of_query - of_key,
            ROWS,
            BLOCK,
            CHUNK,
            PRECISION,
        )
