"""What weights of keys in whole numbers of eight bits cost, as kernels on Hopper have them.

    python benchmarks/whole_numbers.py SmolLM2-135M-Instruct.Q4_1.gguf small --text held-out.txt

Emulated in fp32, on a CPU too: keys are made of the codes in rows, as kernels make them, once with
weights as they are and once with those in eight bits. The divergence is from the source, on windows
of the text; the first two of its rows say that the emulation is right if they are the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.machine import device_name, versions
from common.models import load
from tpa_convert.export.save import load_converted
from tpa_convert.forward.divergence import forward_kl
from tpa_convert.kernels.latent_places import BYTES, WORD
from tpa_convert.kernels.latent_tables import CHUNK, KeyMap, LatentTables, latent_tables
from tpa_convert.modeling.tpa_coded import key_map_of, rows_of
from tpa_convert.modeling.tpa_codes import LOWEST_OCTAVE, SCALES_PER_OCTAVE
from tpa_convert.modeling.tpa_kernels import CodedKernels, find_coded
from tpa_convert.modeling.tpa_rotary import rotate


def left_of_bytes(rows: Tensor, tables: LatentTables) -> tuple[Tensor, Tensor]:
    """What the masks of items leave of the bytes of rows [b, t, bytes], in the order of memory,
    [b, t, items, 4], and the masks [items, 1]."""
    items = tables.items[: tables.layout.chunks * CHUNK // WORD].long()
    words = rows.contiguous().view(torch.int32).long()[..., items & 0xFFFF] % 2**32
    turn, keep = (items >> 16) & 31, (items >> 24)[:, None]
    turned = (words >> turn | words << (32 - turn)) % 2**32
    return (turned[..., None] >> 8 * torch.arange(WORD)) % 256 & keep, keep


def in_blocks(places: Tensor, weight: Tensor, tables: LatentTables) -> Tensor:
    """Keys [b, t, B, spans, 2 N] of the numbers in places [b, t, chunks · CHUNK], before they are
    scaled and offsets are added, for weights in the type of the places."""
    places = places.unflatten(-1, (-1, CHUNK))
    of_chunks = torch.einsum("btkc,ksnc->btksn", places, weight.to(places.dtype))
    found = of_chunks.new_zeros(*of_chunks.shape[:2], tables.layout.blocks, *weight.shape[1:3])
    return found.index_add(2, tables.chunks[:-1].long(), of_chunks)


def keys_of(rows: Tensor, tables: LatentTables, whole: bool) -> Tensor:
    """Keys [b, g, t, d] of rows of bytes [b, t, bytes] without their offsets, of weights as they
    are or in eight bits."""
    layout = tables.layout
    left, keep = left_of_bytes(rows, tables)
    if whole:
        assert tables.whole is not None
        assert tables.unit is not None
        keys = in_blocks((2 * left - keep).flatten(-2).float(), tables.whole, tables)
        keys = keys * tables.unit.repeat(1, 1, 2)
    else:
        numbers = (left / 8 - keep / 16)[..., list(BYTES)]
        keys = in_blocks(numbers.flatten(-2), tables.weight, tables)
    header = rows[..., layout.header_k].int() % 128
    scale = torch.exp2(header / SCALES_PER_OCTAVE + LOWEST_OCTAVE)
    keys = keys * scale[..., None, None, None]
    # [b, t, B, spans, 2 N] to heads.
    low = min(8, layout.padded)
    keys = keys.unflatten(-1, (2, layout.padded // low, layout.heads, low))
    keys = keys.permute(0, 3, 6, 1, 4, 2, 5, 7).flatten(1, 2).flatten(-2)[..., : layout.pairs]
    return keys.flatten(3)[:, : layout.groups]


def made_for(attention: Any, kernels: CodedKernels) -> tuple[LatentTables, KeyMap]:
    """What kernels have of a layer."""
    keys, values = attention.keys, attention.values
    rows = rows_of(kernels, keys.coder), rows_of(kernels, values.coder)
    key_map = key_map_of(kernels, keys)
    if key_map.unscale is not None:
        raise SystemExit("keys that are normalised have no weights in eight bits")
    return latent_tables(*rows, key_map, torch.float32, keys.shape.predict_values), key_map


def emulate(attention: Any, tables: LatentTables, key_map: KeyMap, whole: bool) -> bool:
    """Has a layer make its keys so; whether kernels would have its weights in eight bits."""
    coder, seen = attention.keys.coder, {}
    code = type(coder).forward

    def noted(x: Tensor, *others: Any, **settings: Any) -> Any:
        found = code(coder, x, *others, **settings)
        if settings.get("rows"):
            seen["rows"] = found[0]
        return found

    in_eight = whole and tables.whole is not None

    def expand(packed: Tensor, table: Any, heads: Any = None) -> Tensor:
        rows = seen["rows"][:, 0]
        made = keys_of(rows, tables, in_eight) + key_map.offset[:, None]
        if key_map.of_class is not None:
            label = (rows[..., tables.layout.header_k] >= 128).float()
            made = made + label[:, None, :, None] * key_map.of_class[:, None]
        return rotate(made if heads is None else made[:, heads], table)

    coder.forward, attention.keys.expand = noted, expand
    return in_eight


@torch.no_grad()
def divergence(model: Any, windows: Tensor, of_source: list[Tensor]) -> float:
    """Mean over the tokens of windows [n, s], in nats."""
    total = 0.0
    for window, logits in zip(windows, of_source, strict=True):
        found = model(input_ids=window[None], use_cache=True).logits[0]
        total += float(forward_kl(found, logits)[0])
    return total / windows.numel()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("source", help="the source model")
    options.add_argument("models", nargs="+", help="directories of converted models")
    options.add_argument("--text", required=True, help="held-out text")
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--length", type=int, default=512, help="tokens of a window")
    arguments = options.parse_args()
    kernels = find_coded()
    assert kernels is not None
    source = load(arguments.source)
    ids = source.tokenizer(Path(arguments.text).read_text(), return_tensors="pt").input_ids[0]
    count = min(len(ids), arguments.tokens) // arguments.length
    windows = ids[: count * arguments.length].view(count, arguments.length)
    model = source.model.cpu()
    with torch.no_grad():
        of_source = [model(input_ids=window[None]).logits[0] for window in windows]
    print(f"{device_name()}, {versions()}, {windows.numel()} tokens\n")
    print("| model | keys | layers in eight bits | KL, nats |\n|---|---|---|---|")
    for directory in arguments.models:
        converted, _ = load_converted(directory, dtype=torch.float32)
        name, layers = Path(directory).name, [x.self_attn for x in converted.model.layers]
        found = divergence(converted, windows, of_source)
        print(f"| {name} | of features | | {found:.5f} |", flush=True)
        tables = [made_for(layer, kernels) for layer in layers]
        for whole in (False, True):
            in_eight = sum(emulate(x, *y, whole) for x, y in zip(layers, tables, strict=True))
            found = divergence(converted, windows, of_source)
            what = "of codes, weights in eight bits" if whole else "of codes"
            print(f"| {name} | {what} | {in_eight} of {len(layers)} | {found:.5f} |", flush=True)


if __name__ == "__main__":
    main()
