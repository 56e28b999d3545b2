"""This package beside what else shrinks a cache, at equal bytes and on the same text.

    python benchmarks/comparison.py SmolLM2-135M-Instruct.Q4_1.gguf --train tokens.npy \\
        --valid valid.npz --healed 12.5=healed --json benchmarks/results/comparison_smollm2.json

Every method is measured at the shares that it can take. What loses is in the table too. Bytes are
shares of 16 bits a number and count scales, norms and headers. `--healed SHARE=DIR` adds a model
of a directory. shared.py says the rest.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import baselines
import torch
from coded_cache import converted
from layer_statistics import collect, layer_weights
from other_caches import other_cache
from shared import Table, load, parser, source_heads, train_blocks
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.calibration.cache_moments import collect_cache_moments
from tpa_convert.calibration.moments import Moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.decomposition import AttentionWeights
from tpa_convert.errors import UserError
from tpa_convert.export.save import load_converted
from tpa_convert.plans import Budget, plan_uniform
from tpa_convert.refinement.least_squares import refit
from tpa_convert.sources import Source

Made = tuple[str, PreTrainedModel, float]
"""Name of a method, a model, and the percentage of the source's bytes that it caches."""

OURS = "tpa-convert, no training"


@dataclass
class Comparison:
    """What every method works on."""

    source: Source
    weights: list[AttentionWeights]
    moments: Moments
    cache_moments: Moments
    refit_blocks: Tensor

    def other(self, kind: str, method: str) -> Made:
        """The source with its own cache coded by a method of other_caches.py."""
        model, floats = other_cache(self.source, self.cache_moments, method)
        return kind, model, 100 * floats / (2 * source_heads(self.source))

    def quantised(self) -> Iterator[Made]:
        """The source's own cache in so many bits."""
        for bits in (8, 4, 3, 2):
            yield self.other("KIVI's kind", f"int{bits}")
        for bits in (4, 3, 2):
            yield self.other("TurboQuant's kind", f"rotated{bits}")

    def coded(self, share: float) -> Iterator[Made]:
        """Bits for components: ours, and principal components."""
        numbers = 2 * source_heads(self.source)
        model, floats = converted(self.source, self.cache_moments, str(share))
        yield OURS, model, 100 * floats / numbers
        model = copy.deepcopy(model)
        refit(self.source.model, model, self.refit_blocks)
        yield f"{OURS}, refit", model, 100 * floats / numbers
        yield self.other("KVTC's kind", f"transform{share:g}")

    def plain(self, share: float) -> Iterator[Made]:
        """Fewer numbers of 16 bits."""
        numbers = 2 * source_heads(self.source)
        floats = round(share / 100 * numbers)
        sizes = self.source.family.attention_sizes(self.source.model.config)
        for name, change in (
            ("low rank (Palu, CARE)", baselines.whitened_joint_svd),
            ("one latent (MLA, TransMLA)", baselines.joint_latent),
        ):
            yield name, self.changed(change, floats // 2, floats // 2), share
        width = floats // 2 // sizes["head_dim"] * sizes["head_dim"]
        if width:
            model = self.changed(baselines.aligned_pooled, width, width)
            yield "fewer heads, aligned (GQA)", model, 200 * width / numbers
        for name, settings in (
            ("TPA of the paper (linear)", {"form": "linear"}),
            ("tpa-convert, 16 bits", {"key_cache": "latent"}),
        ):
            try:
                plan = plan_uniform(sizes, Budget(kv_floats=floats), **settings)
            except UserError:  # too few numbers for one factor
                continue
            model = convert_model(self.source, plan, self.moments)
            yield name, model, 100 * plan.kv_floats / numbers

    def changed(self, change: baselines.Change, width_k: int, width_v: int) -> PreTrainedModel:
        """The source with the weights that `change` makes of every layer."""
        layers = self.moments.layers
        return baselines.changed(self.source.model, change, self.weights, layers, width_k, width_v)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shares", nargs="+", type=float, default=[50, 25, 18.75, 12.5, 6.25])
    options.add_argument("--healed", nargs="*", default=[], help="SHARE=DIR of healed models")
    options.add_argument("--length", type=int, default=1024, help="tokens of a held-out sequence")
    options.add_argument("--refit-blocks", type=int, default=64, help="sequences to refit on")
    arguments = options.parse_args()
    source = load(arguments.source)
    table = Table.start(source, arguments.valid, arguments.valid_blocks, arguments.length)
    blocks = train_blocks(arguments.train, source, 512, arguments.calibration_blocks)
    comparison = Comparison(
        source,
        layer_weights(source),
        collect(source, blocks),
        collect_cache_moments(source, blocks),
        train_blocks(arguments.train, source, arguments.length, arguments.refit_blocks),
    )
    healed = [pair.split("=", 1) for pair in arguments.healed]
    numbers = 2 * source_heads(source)

    def measure(made: Iterator[Made]) -> None:
        start = time.perf_counter()
        for name, model, share in made:
            seconds = time.perf_counter() - start
            table.row(f"{name} {share:.4g} %", model, share / 100 * numbers, seconds)
            start = time.perf_counter()

    measure(comparison.quantised())
    for share in arguments.shares:
        measure(comparison.coded(share))
        measure(comparison.plain(share))
    for share, directory in healed:
        model, _ = load_converted(directory, dtype=torch.float32)
        measure(iter([("tpa-convert, healed", model, float(share))]))
    table.save(f"{Path(arguments.source).stem}: ways to shrink a cache", arguments.json)


if __name__ == "__main__":
    main()
