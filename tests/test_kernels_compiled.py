"""The kernels for coded latent keys, compiled for an H100 that is not there.

What a GPU would run is looked at, not run: that it compiles, fits, and takes nothing from registers
that an assembler may overwrite (see `kernels/latent.py`).
"""

from __future__ import annotations

import importlib.util
import os
import re

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget

from tpa_convert.kernels import launch_hopper as hopper
from tpa_convert.kernels import launch_latent as launches
from tpa_convert.kernels import launch_latent_shape as shapes
from tpa_convert.kernels import launch_products, launch_prompt, token_tables
from tpa_convert.kernels.encode_reference import row_codes, row_tables
from tpa_convert.kernels.launch import COMPILERS_SHARED_BYTES
from tpa_convert.kernels.start import start_kernel

from .compiled import Launches, matrix_products, overwritten_left_sides
from .encode_cases import random_components, random_tables
from .kernel_cases import random_layout
from .latent_cases import random_case

KERNELS = ("latent_weights_kernel", "latent_sums_kernel", "latent_join_kernel")
SHARED_BYTES = 227 * 1024
WHOLE = [(4, 30), (3, 20), (2, 60), (1, 40)]  # codes whose weights come in whole numbers
CODES = [[(8, 4), (4, 30), (3, 20), (2, 60), (1, 40)]], [(4, 100), (2, 60), (1, 20)]
CASES = {
    "coded": {"shape": (9, 3, 64), "codes": CODES},
    "normalised": {"shape": (8, 2, 128), "codes": CODES, "norm": "head"},
}


@pytest.mark.parametrize(
    ("case", "shape", "added"),
    [
        ("coded", shapes.SHAPES[0], False),
        ("coded", shapes.SHAPES[1], True),
        ("normalised", shapes.SHAPES[0], False),
    ],
)
def test_compiles_for_hopper(monkeypatch, case, shape, added) -> None:
    launched = {name: Launches(getattr(shapes, name)) for name in KERNELS}
    for name, launch in launched.items():
        monkeypatch.setattr(shapes, name, launch)
    monkeypatch.setattr(shapes, "overlapped", lambda device: True)
    monkeypatch.setattr(launches, "SHAPES", (shape,))
    made = random_case(slots=512, dtype=torch.bfloat16, **CASES[case])
    mask = torch.ones(2, 512, dtype=torch.bfloat16 if added else torch.bool)
    launches.launch_latent(*made.call(), 0.3, None, made.end, 40, None, mask)
    for name, launch in launched.items():
        kernel = launch.compile()
        products = matrix_products(kernel.asm["ptx"])
        assert products["registers"] == 0
        assert kernel.metadata.shared <= SHARED_BYTES
        if name == "latent_weights_kernel":
            assert products["shared"]  # the keys are rebuilt by the asynchronous unit


ring_of = hopper.ring_of.__wrapped__


@pytest.fixture
def in_gluon(monkeypatch):
    """Launches of the kernels in Gluon, as a GPU that has room for three stages of weights in eight
    bits, and for two in 16, would have them."""
    launched = {
        name: Launches(getattr(hopper, name)()) for name in ("weights_kernel", "sums_kernel")
    }
    for name, launch in launched.items():
        monkeypatch.setattr(hopper, name, lambda launch=launch: launch)
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)
    monkeypatch.setattr(hopper, "ring_of", lambda _, __, size, ___: hopper.Ring(4 - size))
    monkeypatch.setattr(hopper, "SUM_BLOCKS", 1)
    monkeypatch.setattr(shapes, "overlapped", lambda device: True)
    for name in ("latent_weights_kernel", "latent_join_kernel"):
        monkeypatch.setattr(shapes, name, Launches(getattr(shapes, name)))
    shapes.latent_shape.cache_clear()
    shapes.latent_constants.cache_clear()
    yield launched
    shapes.latent_shape.cache_clear()
    shapes.latent_constants.cache_clear()


@pytest.mark.parametrize(
    ("whole", "positions", "added", "window", "softcap"),
    [(True, 1, None, None, None), (False, 3, False, 400, 3.0), (True, 1, True, 400, None)],
)
def test_warps_that_differ_compile_for_hopper(
    in_gluon, whole, positions, added, window, softcap
) -> None:
    """In Triton's newest release here; the oldest is that of the GPU tests."""
    codes = [WHOLE] * 4, CODES[1]
    made = random_case(
        shape=(32, 8, 128), codes=codes, slots=512, positions=positions, dtype=torch.bfloat16
    )
    assert made.tables.whole is not None
    if not whole:
        made = made._replace(tables=made.tables._replace(whole=None, unit=None))
    mask = None
    if added is not None:
        mask = torch.ones(2, 512, dtype=torch.bfloat16 if added else torch.bool)
    launches.launch_latent(*made.call(), 0.3, None, made.end, window, softcap, mask)
    kernel = in_gluon["weights_kernel"].compile()
    products = matrix_products(kernel.asm["ptx"])
    assert products["registers"] == 0
    assert products["shared"]
    assert kernel.metadata.shared <= SHARED_BYTES


@pytest.mark.parametrize(
    ("shape", "blocks", "positions"), [((32, 32, 128), 16, 1), ((16, 16, 64), 4, 2)]
)
def test_rings_fit_shared_memory(monkeypatch, in_gluon, shape, blocks, positions) -> None:
    """As many stages as are said to fit, in layers that leave little room beside them."""
    monkeypatch.setattr(hopper, "ring_of", ring_of)
    monkeypatch.setattr(hopper, "all_shared_bytes", lambda device: SHARED_BYTES)
    codes = [WHOLE] * blocks, CODES[1]
    made = random_case(
        shape=shape, codes=codes, slots=512, positions=positions, dtype=torch.bfloat16
    )
    mask = torch.ones(2, 512, dtype=torch.bool)
    launches.launch_latent(*made.call(), 0.3, None, made.end, None, None, mask)
    kernel = in_gluon["weights_kernel"].compile()
    assert 0.75 * SHARED_BYTES < kernel.metadata.shared <= SHARED_BYTES


def test_kinds_of_weights_are_compiled_apart(monkeypatch) -> None:
    """Of what launches have in common, which keeps what was compiled for them."""
    codes = [WHOLE] * 4, CODES[1]
    tables = random_case(shape=(32, 8, 128), codes=codes, slots=8, dtype=torch.bfloat16).tables
    monkeypatch.setattr(hopper, "MOST_STAGES", 2)  # both have room for
    found = [
        hopper.ring_of.__wrapped__(tables.layout, 16, size, torch.device("cpu")) for size in (1, 2)
    ]
    assert found[0] != found[1]
    assert found[0][:1] == found[1][:1]


@pytest.mark.parametrize(
    ("shape", "start", "window", "block"),
    [
        ((32, 8, 128), False, None, 64),
        ((8, 8, 128), True, 400, 64),
        ((9, 3, 64), False, None, 64),
        ((32, 8, 128), False, None, 32),  # behind weights in Triton
    ],
)
def test_sums_compile_for_hopper(monkeypatch, in_gluon, shape, start, window, block) -> None:
    """Their ring is all that is in shared memory: they find it by where that begins. Registers that
    products read are not written before the products have ended."""
    codes = [CODES[0][0]] * (4 if shape[1] == 8 else 1), CODES[1]
    made = random_case(shape=shape, codes=codes, slots=512, dtype=torch.bfloat16)
    first = made.start if start else None
    if block == 32:
        monkeypatch.setattr(hopper, "enough_tiles", lambda *_: False)
        monkeypatch.setattr(launches, "SHAPES", ((block, 4),))
    launches.launch_latent(*made.call(), 0.3, first, made.end, window, None)
    launch = in_gluon["sums_kernel"]
    kernel, named = launch.compile(), launch.calls[-1][1]
    ptx, columns, stages = kernel.asm["ptx"], named["COLUMNS"], named["STAGES"]
    assert named["BLOCK"] == block
    products = block // 16 * 4
    assert matrix_products(ptx) == {"registers": products, "shared": 0, "synchronous": 0}
    shared, layout = kernel.metadata.shared, made.tables.layout
    assert stages > 2
    assert hopper.sum_stages(shared, layout, columns, block) == stages
    assert hopper.sum_stages(shared - 1, layout, columns, block) < stages
    # The compiler writes nothing there by itself: maxima and sums of weights are, and weights.
    assert len(re.findall(r"\bst\.shared\.b32", ptx)) == columns // 8 + 1
    assert len(re.findall("stmatrix", ptx)) == block // 8
    assert len(re.findall(r"\bst\.\S*shared\.v4", ptx)) == products  # none, but they hold registers
    assert overwritten_left_sides(kernel.asm["sass"]) == []
    assert kernel.asm["sass"].count("HGMMA") == products


@pytest.mark.parametrize(
    ("batch", "slots", "others", "in_gluon"),
    [
        (8, 32768, {}, (True, True)),
        (16, 2048, {}, (True, True)),
        (16, 512, {}, (False, True)),
        (4, 512, {}, (False, False)),  # programs of sums would be too few
        (1, 2048, {}, (False, False)),  # too few of them
        (8, 32768, {"window": 1024}, (False, True)),
        (8, 32768, {"norm": torch.float32}, (False, False)),
        (8, 32768, {"dtype": torch.float32}, (False, False)),
        (8, 32768, {"page": 16}, (False, False)),
        (8, 32768, {"rows_fit": False}, (False, True)),
        (8, 32768, {"cosines": torch.float32}, (False, True)),
        (8, 32768, {"whole": False}, (True, True)),
        (8, 32768, {"start": torch.int64}, (True, True)),
        (8, 32768, {"mask": torch.bool}, (True, True)),
    ],
)
def test_which_kernels_run_on_hopper(monkeypatch, batch, slots, others, in_gluon) -> None:
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)
    monkeypatch.setattr(shapes, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(shapes, "overlapped", lambda device: True)
    codes = [CODES[0][0]] * 4, CODES[1]
    tables = random_case(shape=(32, 8, 128), codes=codes, slots=8, dtype=torch.bfloat16).tables
    shapes.latent_shape.cache_clear()
    shape = shapes.latent_shape(
        tables.layout,
        0.0,
        torch.device("cpu"),
        (
            others.get("dtype", torch.bfloat16),
            others.get("cosines", torch.bfloat16),
            *(others.get(name) for name in ("norm", "pages", "start", "end", "mask")),
        ),
        (batch, 32, 1, 128),
        (4096, 128, 128, 256, 512, 64, 1),
        (slots // 32, others.get("window", slots) // 32, others.get("page", 0)),
        (0.1, None, None),
        shapes.SHAPES,
        False,
        others.get("rows_fit", True),
        others.get("whole", True),
    )
    shapes.latent_shape.cache_clear()
    wanted = hopper.weights_kernel(), hopper.sums_kernel()
    assert tuple(a is b for a, b in zip(shape.kernels[:2], wanted, strict=True)) == in_gluon


@pytest.mark.parametrize(
    ("sequences", "slots", "reach", "wanted"),
    [
        (8, 32768, 32, (4, 8)),  # nearly as many as run at once, three on each processor
        (8, 32768, 49, (3, 8)),  # less room for rows
        (8, 32768, 120, (4, 5)),  # two programs at a time
        (8, 8192, 150, (4, 5)),  # one, and then another
        (8, 16384, 32, (4, 8)),
        (64, 2048, 32, (4, 1)),
        (4, 8192, 32, (4, 11)),
        (1, 8192, 32, (4, 16)),  # as short as they may be
        (1, 32768, 32, (4, 22)),  # one on each processor
        (16, 2048, 32, (4, 4)),
        (1, 2048, 32, None),
        (16, 256, 32, None),
        (8, 32768, 300, None),  # no room for three blocks
    ],
)
def test_how_sums_are_shared_out_on_hopper(monkeypatch, sequences, slots, reach, wanted) -> None:
    left = SHARED_BYTES - COMPILERS_SHARED_BYTES
    monkeypatch.setattr(hopper, "shared_bytes", lambda device: left)
    codes = [CODES[0][0]] * 4, CODES[1]
    layout = random_case(shape=(32, 8, 128), codes=codes, slots=8, dtype=torch.bfloat16).tables[0]
    layout = layout._replace(first_item=0, key_items=128, items=384, reach=reach)
    device = torch.device("cpu")
    found = hopper.sums_shape(layout, 32, 64, sequences, slots // 64, device, 132)
    assert (found and (found.stages, found.splits)) == wanted
    assert found is None or found.programs == 2 + 4
    layout = layout._replace(key_items=64, items=192, reach=32)
    found = hopper.sums_shape(layout, 16, 64, 64, 128, device, 132)
    assert found is not None
    assert (found.programs, found.splits) == (1 + 2, 2)


def test_a_left_side_from_registers_would_be_seen() -> None:
    """Control: the two forms of the instruction."""
    accumulators = "{%f1, %f2}"
    shared = f"wgmma.mma_async.sync.aligned.m64n8k16 {accumulators}, %rd1, %rd2, 1, 1, 1, 0;"
    registers = f"wgmma.mma_async.sync.aligned.m64n8k16 {accumulators}, {{%r1, %r2}}, %rd2, 1, 1;"
    assert matrix_products(shared)["registers"] == 0
    assert matrix_products(shared + registers) == {"registers": 1, "shared": 1, "synchronous": 0}


def test_registers_that_are_written_too_early_would_be_seen() -> None:
    """Control: products of two groups; the first has ended where all but one have."""
    lines = [
        "HGMMA.64x32x16.F32 R24, R100, gdesc[UR4], R24",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "HGMMA.64x32x16.F32 R24, R104, gdesc[UR8], R24",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "@P0 IMAD.WIDE R102, R2, 0x4, R4",  # of the first
        "STS.128 [R107], R104",
        "SHFL.BFLY PT, R108, R107, 0x1, 0x1f",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "LDS.128 R104, [R2]",
    ]
    assert overwritten_left_sides("\n".join(lines)) == []
    early = lines[:2] + lines[4:5] + lines[2:]
    assert overwritten_left_sides("\n".join(early)) == [lines[4]]
    for line in ("IMAD.WIDE R106, R2, 0x4, R4", "SHFL.BFLY PT, R104, R2, 0x1, 0x1f"):
        assert overwritten_left_sides("\n".join([*lines[:6], line, *lines[6:]])) == [line]


@pytest.mark.parametrize("rotated", [False, True])
def test_coding_compiles_for_hopper(monkeypatch, rotated) -> None:
    """Codes wait in the memory of numbers of 16 bits; queries are rotated by programs behind."""
    launch = Launches(launch_prompt.encode_kernel)
    monkeypatch.setattr(launch_prompt, "encode_kernel", launch)
    generator = torch.Generator().manual_seed(0)
    layout, row_bytes = random_layout([(4, 200), (3, 100), (1, 90)], 2, generator)
    tables = random_tables(390, 2, generator)
    where = row_tables(layout.tiers, layout.header, row_bytes)
    x = random_components(3, tables, generator).bfloat16()
    query, table = torch.zeros(1, 3, 8, 64).bfloat16(), torch.zeros(1, 1, 3, 64).bfloat16()
    codes = row_codes(tables, where)
    launch_prompt.launch_prompt(x, x, query, token_tables(codes, codes, None), table, table)
    of_keys, of_values = launch.calls
    launch.calls = [of_keys if rotated else of_values]
    ptx = launch.compile().asm["ptx"]
    assert "bar.sync" in ptx or "bar.warp.sync" in ptx  # between codes that are written and read


def launched_product(monkeypatch, kernel, rows, dtype=torch.bfloat16) -> Launches:
    launch = Launches(getattr(launch_products, kernel))
    monkeypatch.setattr(launch_products, kernel, launch)
    launch_products.product_launch.cache_clear()
    launch_products.projections_launch.cache_clear()
    place, width = (torch.device("cpu"), dtype, rows), 2048
    if kernel == "product_kernel":
        width = 808  # of features: whole words, but not of 32 bytes
        made = launch_products.product_launch(*place, width, 64, True, 8, 4)
        outputs = [torch.zeros(rows, 64, dtype=dtype)]
    else:
        sizes, biased = (2048, 352, 440), (False, True, True)
        made = launch_products.projections_launch(*place, width, sizes, biased)
        outputs = [torch.zeros(rows, size, dtype=dtype) for size in sizes]
    weights = [torch.zeros(8, width, dtype=dtype) for _ in outputs]
    biases = [torch.zeros(8, dtype=dtype) for _ in outputs]
    tensors = torch.zeros(rows, width, dtype=dtype), *weights, *biases, *outputs
    start_kernel(*made, tensors, (rows,))
    launch_products.product_launch.cache_clear()
    launch_products.projections_launch.cache_clear()
    return launch


@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("kernel", ["projections_kernel", "product_kernel"])
def test_products_compile_for_hopper(monkeypatch, kernel, rows) -> None:
    """Matrices are read in words of 16 bytes; several rows are multiplied by the matrix unit: many
    by the asynchronous one."""
    launch = launched_product(monkeypatch, kernel, rows)
    ptx = launch.compile().asm["ptx"]
    wide = "cp.async.cg.shared.global" if rows > 1 else "ld.global.v4"
    assert wide in ptx
    found = matrix_products(ptx)
    assert bool(found["synchronous"]) == (1 < rows <= 16)
    assert bool(found["shared"]) == (rows > 16)


@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["projections_kernel", "product_kernel"])
@pytest.mark.parametrize(("capability", "kilobytes"), [(80, 163), (86, 99), (90, 227)])
def test_products_fit_into_shared_memory(
    monkeypatch, capability, kilobytes, kernel, dtype, rows
) -> None:
    monkeypatch.setattr(launch_products, "all_shared_bytes", lambda device: kilobytes * 1024)
    launch = launched_product(monkeypatch, kernel, rows, dtype)
    taken = launch.compile(GPUTarget("cuda", capability, 32)).metadata.shared
    assert 0 < taken <= kilobytes * 1024
