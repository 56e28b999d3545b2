"""The source's own cache quantised without a conversion, scales counted.

KIVI's kind (arXiv 2402.02750): keys per channel over 32 tokens, after rotation, values per token
over 32 channels, a scale and an offset of 16 bits each. TurboQuant's kind: a random rotation of
each head, its norm in 16 bits, the levels of Lloyd and Max for a Gaussian.
"""

from __future__ import annotations

import torch
from coded_rows import rotary, rotate


def group_baselines(bench) -> None:
    d, model = bench.head_dim, bench.model

    def minmax(x, bits):  # over the last dimension
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp_min(1e-8).half().float()
        low = low.half().float()
        return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low

    def kivi(bits, name):
        def code(x, position):
            if name == "v":
                return minmax(x.unflatten(-1, (-1, 32)), bits).flatten(-2)
            table = rotary(model, position)
            x = rotate(x, table).mT.unflatten(-1, (-1, 32))
            return rotate(minmax(x, bits).flatten(-2).mT, table, back=True)

        return code

    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator))[0].to(bench.device)

    def turbo(bits, name):
        normal = torch.randn(200_000, generator=generator)
        levels = torch.quantile(normal, (torch.arange(2**bits) + 0.5) / 2**bits)
        for _ in range(60):
            edges = (levels[1:] + levels[:-1]) / 2
            label = torch.bucketize(normal, edges)
            levels = torch.zeros_like(levels).index_add_(0, label, normal) / torch.bincount(label)
        levels, edges = levels.to(bench.device), edges.to(bench.device)

        def code(x, position):
            table = rotary(model, position) if name == "k" else None
            x = rotate(x, table) if table else x
            y = x.unflatten(-1, (-1, d)) @ turn
            norm = y.norm(dim=-1, keepdim=True).half().float() / d**0.5
            y = (levels[torch.bucketize(y / norm, edges)] * norm @ turn.mT).flatten(-2)
            return rotate(y, table, back=True) if table else y

        return code

    for bits in (4, 3, 2):
        coders = {part: kivi(bits, part[1]) for part in bench.samples}
        bench.measure(f"KIVI-like int{bits}", coders=coders, share=(bits + 1) / 16)
    for bits in (4, 3, 2):
        coders = {part: turbo(bits, part[1]) for part in bench.samples}
        bench.measure(f"TurboQuant-like {bits} bits", coders=coders, share=(bits + 0.25) / 16)
