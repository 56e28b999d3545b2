"""What each part of a coded cache is worth: one change a row, at the same bytes.

    python benchmarks/coded_ablation.py SmolLM2-135M-Instruct.Q4_1.gguf --train tokens.npy \\
        --valid valid.npz --valid-blocks 24 --calibration-blocks 128 --refit \\
        --heal-tokens 8e6 --heal-for 'default|16 bits' --json benchmarks/results/ablation_coded.json

The first row is what the package does. Every other one changes one thing: the levels that codes may
have, the class of sinks, the scale of a token, how bits are shared, blocks of rotary pairs, the
share of the keys, values that are not predicted from keys; last the forms in 16 bits, which have no
codes. A second table says how much more each loses than the first row, block by block of the same
text, with 95 % intervals, and whether the first row is first, tied, or behind; it is also written,
as `…_paired.json`. With `--refit` and
`--heal-tokens` rows are repeated after these, and each stage is compared with its own first row.
common/arguments.py says the rest.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common import results
from common.arguments import given_settings, parser
from common.blocks import train_blocks
from common.models import load, source_heads
from common.paired import difference
from common.tables import Table, heal_row
from tpa_convert.calibration.cache_moments import collect_cache_moments
from tpa_convert.calibration.moments import Moments, collect_moments
from tpa_convert.coding import LEVELS, CacheMoments, RowTable, groups_of_bits, share_bytes
from tpa_convert.conversion.coded import ROUNDS, CodedLayer, with_codes
from tpa_convert.conversion.model import convert_model
from tpa_convert.errors import UserError
from tpa_convert.modeling.tpa_coder import RowCoder, features_of
from tpa_convert.modeling.tpa_codes import ROW_WORD, straight_through
from tpa_convert.plans import Budget, Plan, plan_coded, plan_uniform
from tpa_convert.refinement.least_squares import refit
from tpa_convert.sources import Source

DEFAULT = "default"

Energies = list[list[Tensor]]
"""What leaving components out would cost, by layer and block."""
Share = Callable[[Energies, Energies, int, int], list[list[Tensor]]]
"""Energies of keys and values, bytes of a token and the alignment of tiers to the bits of the keys
and then the values of each layer in turn."""


def in_turn(keys: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """The first of both, the second of both, and so on."""
    return [part for pair in zip(keys, values, strict=True) for part in pair]


def by_nats(
    keys: Energies, values: Energies, total: int, align: int, levels: Sequence[int] = LEVELS
) -> list[list[Tensor]]:
    """One budget for all: what the package does."""
    return share_bytes(in_turn(keys, values), total, align, levels)


def layers_alike(keys: Energies, values: Energies, total: int, align: int) -> list[list[Tensor]]:
    """As many bytes for every layer."""
    pairs = zip(keys, values, strict=True)
    return [part for pair in pairs for part in share_bytes(pair, total // len(keys), align)]


def fixed_share(
    keys: Energies, values: Energies, total: int, align: int, share: float
) -> list[list[Tensor]]:
    """A share of all bytes for the keys, whatever they are worth."""
    for_keys = int(share * total)
    return in_turn(share_bytes(keys, for_keys, align), share_bytes(values, total - for_keys, align))


def all_alike(
    keys: Energies, values: Energies, total: int, align: int, bits: int
) -> list[list[Tensor]]:
    """As many bytes for every row, and as many bits for every component that has any."""
    size = total // (2 * len(keys))
    return [
        RowTable.of(part, size, align, (0, bits)).bits(size // ROW_WORD)
        for part in in_turn(keys, values)
    ]


def codes(plan: Plan, moments: Moments, share: Share) -> Plan:
    """The plan with codes chosen as `conversion.coded.choose_codes` does, but for how bytes are
    shared."""
    budget = plan.coded
    assert budget is not None
    layers = [
        CodedLayer(m, moments.num_tokens, budget.key_blocks, plan.head_dim) for m in moments.layers
    ]
    keys = [layer.keys.energies for layer in layers]
    values = [layer.values(None)[0].energies for layer in layers]
    for _ in range(1 + ROUNDS * budget.predict_values):
        bits = share(keys, values, budget.total_bytes, budget.align)
        if budget.predict_values:
            groups = [[groups_of_bits(block)[0] for block in part] for part in bits[::2]]
            pairs = zip(layers, groups, strict=True)
            values = [layer.values(runs)[0].energies for layer, runs in pairs]
    return with_codes(plan, bits)


# ------------------------------------------------------------------------------- moments


def without_sinks(layer: CacheMoments) -> CacheMoments:
    """First tokens are thought to be like all others: both classes have one mean."""
    return replace(layer, sink_mean=layer.mean)


def as_large_as_it_is(layer: CacheMoments) -> CacheMoments:
    """An error costs its square, whatever the model does with it: principal components."""
    identity = torch.eye(len(layer.key_metric)).to(layer.key_metric)
    return replace(layer, key_metric=identity, value_metric=identity)


def without_scale(coder: RowCoder, inputs: tuple[Tensor], features: Tensor) -> Tensor:
    """A forward hook: features as if every header said a scale of 1."""
    quantiser = coder.quantiser()
    scales = quantiser.tables.scales.clone()
    scales[:, :1] = torch.ones(1, device=scales.device).view(torch.int32)
    quantiser = quantiser._replace(kept=quantiser.tables._replace(scales=scales))
    numbers, label = straight_through(inputs[0].float(), quantiser)
    return features_of(numbers, label, features.dtype)


# ------------------------------------------------------------------------------- rows


@dataclass
class Bench:
    """What every row works on.

    Attributes:
        share: of the source's bytes that is kept, 0 to 1.
    """

    source: Source
    blocks: Tensor
    share: float

    @cached_property
    def sizes(self) -> dict[str, Any]:
        return self.source.family.attention_sizes(self.source.model.config)

    @cached_property
    def cache_moments(self) -> Moments:
        return collect_cache_moments(self.source, self.blocks)

    @cached_property
    def moments(self) -> Moments:
        return collect_moments(self.source, self.blocks)

    def coded(
        self,
        share: Share = by_nats,
        blocks: int | None = None,
        predicted: bool = True,
        seen: Callable[[CacheMoments], CacheMoments] = lambda layer: layer,
        scaled: bool = True,
    ) -> tuple[PreTrainedModel, Plan]:
        """A coded model and its plan.

        Args:
            blocks: of rotary pairs; None for what is quick.
            seen: what is made of the moments of a layer.
            scaled: whether tokens have scales.
        """
        plan = plan_coded(self.sizes, Budget(kv_ratio=self.share), key_blocks=blocks)
        assert plan.coded is not None
        plan = replace(plan, coded=replace(plan.coded, predict_values=predicted))
        layers = [seen(layer) for layer in self.cache_moments.layers]
        moments = replace(self.cache_moments, layers=layers)
        plan = codes(plan, moments, share)
        model = convert_model(self.source, plan, moments)
        if not scaled:
            for module in model.modules():
                if isinstance(module, RowCoder):
                    module.register_forward_hook(without_scale)
        return model, plan

    def plain(self, **settings: Any) -> tuple[PreTrainedModel, Plan]:
        """A model with numbers of 16 bits, and its plan."""
        floats = round(self.share * 2 * source_heads(self.source))
        plan = plan_uniform(self.sizes, Budget(kv_floats=floats), **settings)
        return convert_model(self.source, plan, self.moments), plan


Make = Callable[[Bench], tuple[PreTrainedModel, Plan]]


def levels(*given: int) -> Make:
    return lambda bench: bench.coded(partial(by_nats, levels=given))


ROWS: dict[str, Make] = {
    DEFAULT: lambda bench: bench.coded(),
    "levels 0 to 8": levels(*range(9)),
    "levels 0, 1, 2, 4, 8": levels(0, 1, 2, 4, 8),
    "levels 0, 2, 4, 8": levels(0, 2, 4, 8),
    "levels 0, 4": levels(0, 4),
    "no class of sinks": lambda bench: bench.coded(seen=without_sinks),
    "no scale of a token": lambda bench: bench.coded(scaled=False),
    "bits by variance, not importance": lambda bench: bench.coded(seen=as_large_as_it_is),
    "as many bytes for every layer": lambda bench: bench.coded(layers_alike),
    "2 bits for all that fit": lambda bench: bench.coded(partial(all_alike, bits=2)),
    "4 bits for all that fit": lambda bench: bench.coded(partial(all_alike, bits=4)),
    "K : V = 3 : 5": lambda bench: bench.coded(partial(fixed_share, share=3 / 8)),
    "K : V = 1 : 1": lambda bench: bench.coded(partial(fixed_share, share=1 / 2)),
    "K : V = 5 : 3": lambda bench: bench.coded(partial(fixed_share, share=5 / 8)),
    "values by themselves": lambda bench: bench.coded(predicted=False),
    "keys in 1 block": lambda bench: bench.coded(blocks=1),
    "keys in 2 blocks": lambda bench: bench.coded(blocks=2),
    "keys in 4 blocks": lambda bench: bench.coded(blocks=4),
    "16 bits, latent keys": lambda bench: bench.plain(key_cache="latent"),
    "16 bits, rotated keys": lambda bench: bench.plain(),
    "16 bits, affine": lambda bench: bench.plain(form="affine"),
    "16 bits, linear (the paper's form)": lambda bench: bench.plain(form="linear"),
}


def paired_rows(table: Table) -> tuple[list[str], list[list[results.Cell]]]:
    """How much more every row loses than the first of its stage: columns and rows."""
    columns = ["", "log loss above", "KL above"]
    found: list[list[results.Cell]] = []
    for name, scores in table.scores.items():
        first = re.sub(r"^[^;]*", DEFAULT, name)
        if name in ("source", first) or first not in table.scores:
            continue
        kinds: tuple[Literal["nll", "kl"], ...] = ("nll", "kl")
        cells = [str(difference(table.scores[first], scores, kind)) for kind in kinds]
        found.append([name, *cells])
    return columns, found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--share", type=float, default=12.5, help="percent of the source's bytes")
    options.add_argument("--only", default="", metavar="REGEX", help="rows beside the first")
    options.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    options.add_argument("--refit", action="store_true", help="rows before and after a refit")
    options.add_argument("--refit-blocks", type=int, default=64, help="sequences to refit on")
    options.add_argument("--heal-tokens", type=float, default=0)
    options.add_argument("--heal-for", default="", metavar="REGEX", help="rows beside the first")
    options.add_argument("--settings", default="", help="of healing: seed=1,learning_rate=1e-4")
    arguments = options.parse_args()
    source = load(arguments.source)
    table = Table.start(source, arguments.valid, arguments.valid_blocks, arguments.length)
    blocks = train_blocks(arguments.train, source, 512, arguments.calibration_blocks)
    bench = Bench(source, blocks, arguments.share / 100)
    training = train_blocks(arguments.train, source, arguments.length)
    refit_blocks = training[: arguments.refit_blocks]

    for name, make in ROWS.items():
        if name != DEFAULT and not re.search(arguments.only, name):
            continue
        start = time.perf_counter()
        try:
            model, plan = make(bench)
        except UserError as error:
            print(f"<!-- {name}: not on this model ({error}) -->")
            continue
        model = model.to(source.model.device)
        table.row(name, model, plan.kv_floats, time.perf_counter() - start)
        if arguments.refit:
            start = time.perf_counter()
            refit(source.model, model, refit_blocks)
            table.row(f"{name}; refit", model, plan.kv_floats, time.perf_counter() - start)
        if arguments.heal_tokens and (name == DEFAULT or re.search(arguments.heal_for, name)):
            torch.compiler.reset()
            student, changes = copy.deepcopy(model), given_settings(arguments.settings)
            heal_row(table, f"{name};", student, training, arguments, plan.kv_floats, **changes)

    columns, pairs = paired_rows(table)
    print(f"\n{results.line(columns)}")
    print("|---" * len(columns) + "|")
    for pair in pairs:
        print(results.line(map(results.text, pair)))
    if arguments.json is not None:
        title = f"{Path(arguments.source).stem}: parts of a coded cache"
        table.save(title, arguments.json)
        beside = results.of_this_run(f"{title}, beside the first row", columns, pairs)
        results.save(beside, results.beside(arguments.json))


if __name__ == "__main__":
    main()
