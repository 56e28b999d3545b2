"""Healing speed: random weights in a model's shape, 32 x 1024 tokens a step.

    PYTHONPATH=. python benchmarks/heal_throughput.py
    PYTHONPATH=. python benchmarks/heal_throughput.py --shape 1b --no-loss
    PYTHONPATH=. accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 \\
        benchmarks/heal_throughput.py --shape 1b --no-loss

Prints, as Markdown, the time and the peak memory of the fused loss by chunk size, then tokens per
second, peak memory of a GPU, share of its peak arithmetic (MFU) and losses of whole steps
(`heal()`) by batch size, by what is compiled and by settings. No download. A variant is left out
once --seconds are spent; --variants picks some, in their order.

In the shape 135m both models are SmolLM2-135M, in 135m-third the student is converted to a third of
the cache with latent keys, in 135m-coded to 12.5 %, coded; in 1b a Llama of 1.1 B parameters
(TinyLlama's shape) teaches its conversion at a third of the cache, in 1b-coded that at 12.5 %,
coded; in 8b one of Llama-3-8B's shape teaches its conversion at 12.5 %, coded.

With --memory it prints too what each process had of main memory without models and at most, and
what it took of its GPU: in tensors while it trained, and from the driver since before models were
made. With FSDP they are made in the first process only, as `tpa-convert heal` loads them.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from common.arguments import given_settings
from common.healing import mfu_of
from common.machine import device_name, forget_peak, main_memory, versions
from common.random_models import coded_shape
from tpa_convert.families import family_of
from tpa_convert.healing import HealingSettings, chunked_divergence, heal, skewed_kl
from tpa_convert.healing.training import run as healing_run
from tpa_convert.healing.training.distributed import (
    from_first,
    outline,
    processes,
    sharding,
    smallest,
)
from tpa_convert.plans import plan_widths

DEVICE = "cuda"
BLOCKS, LENGTH = 32, 1024


SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TINYLLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "135m": SMOLLM2,
    "135m-third": SMOLLM2,
    "135m-coded": SMOLLM2,
    "1b": TINYLLAMA,
    "1b-coded": TINYLLAMA,
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
CONVERTED: dict[str, dict[str, Any]] = {
    "135m-third": {"widths": (48, 80), "gauge": "absorbed", "key_cache": "latent"},
    "1b": {"widths": (88, 88), "gauge": "absorbed"},
}
CODED = {"135m-coded": 12.5, "1b-coded": 12.5, "8b": 12.5}  # percent of the source's bytes

# name -> (batch size, what to compile: nothing, equal layers once, the whole decoder)
VARIANTS = {
    "b32-layers": (32, "layers"),
    "b16-layers": (16, "layers"),
    "b8-layers": (8, "layers"),
    "b8-eager": (8, "nothing"),
    "b32-decoder": (32, "decoder"),
}
DEFAULT_VARIANTS = {
    "135m": list(VARIANTS),
    "135m-third": ["b32-layers"],
    "135m-coded": ["b32-layers"],
    "1b": ["b16-layers", "b8-layers"],
    "1b-coded": ["b16-layers", "b8-layers"],
    "8b": ["b8-layers"],
}


def shared_models(shape: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """`random_models`. With FSDP all processes but the first have outlines of them."""
    make = partial(random_models, shape)
    if not sharding():
        return make()
    return from_first(make, lambda pair: (outline(pair[0]), outline(pair[1])))


def random_models(shape: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student in fp32 and teacher in bf16, on the CPU, the same in all processes."""
    llama = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    torch.manual_seed(0)
    with processes().device:  # one after the other: large ones do not fit it together
        teacher = LlamaForCausalLM(llama).eval()
        converted = shape in CODED or shape in CONVERTED
        student = None if converted else copy.deepcopy(teacher).cpu()
        teacher = teacher.to(torch.bfloat16).cpu()  # in main memory, too, once only
        if shape in CODED:
            student = coded_conversion(llama, CODED[shape]).cpu()
        elif shape in CONVERTED:
            student = random_conversion(llama, **CONVERTED[shape]).cpu()
    return student, teacher


def random_conversion(
    source: LlamaConfig, widths: tuple[int, int], **settings: Any
) -> PreTrainedModel:
    """What a model becomes whose layers all have these widths of keys and values."""
    family = family_of(source)
    all_widths = [widths] * source.num_hidden_layers
    plan = plan_widths(all_widths, family.attention_sizes(source), **settings)
    return family.causal_lm(family.tpa_config(source, [asdict(s) for s in plan.layers])).eval()


def coded_conversion(source: LlamaConfig, percent: float) -> PreTrainedModel:
    """What a model becomes whose layers all are cached in this percentage of its bytes."""
    family = family_of(source)
    sizes = family.attention_sizes(source)
    layer = coded_shape(percent, sizes["num_key_value_heads"], sizes["head_dim"])
    layers = [asdict(layer)] * source.num_hidden_layers
    return family.causal_lm(family.tpa_config(source, layers)).eval()


def time_loss(chunk_tokens: int, compiled: bool, shape: str) -> tuple[float, float]:
    """Milliseconds, forward and backward, and peak GB beyond the arguments."""
    divergence = torch.compile(skewed_kl, dynamic=False) if compiled else skewed_kl
    hidden, vocab = SHAPES[shape]["hidden_size"], SHAPES[shape]["vocab_size"]
    size = (BLOCKS * LENGTH, hidden)
    student, teacher = (torch.randn(size, device=DEVICE, dtype=torch.bfloat16) for _ in "st")
    weight = torch.randn(vocab, hidden, device=DEVICE).mul_(0.02).requires_grad_()
    student.requires_grad_()

    def step() -> None:
        student.grad = weight.grad = None
        chunked_divergence(
            student, weight, teacher, weight, divergence=divergence, chunk_tokens=chunk_tokens
        ).backward()

    step()
    student.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - start) / 5 * 1e3
    return milliseconds, (torch.cuda.max_memory_allocated() - before) / 1e9


@contextmanager
def peaks() -> Iterator[list[str]]:
    """Lines, when it ends, on the memory that each process had inside of this."""
    found: list[str] = []
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = forget_peak()
    yield found
    _, peak = main_memory()
    line = f"main memory {before / 1e9:.2f} GB before, {peak / 1e9:.2f} at most"
    if torch.cuda.is_available():
        # The allocator keeps what it once had, also from before healing forgets its own peak.
        tensors, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        line += f"; GPU {tensors / 1e9:.2f} GB in tensors, {reserved / 1e9:.2f} in all"
    found += [f"process {i}: {line}" for i, line in enumerate(gather_object([line]))]


def whole_decoder(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [model.get_decoder()]


def time_healing(
    shape: str, batch_size: int, compiled: str, steps: int, changes: dict[str, Any]
) -> tuple[healing_run.HealingReport, float]:
    """The report, and the share of the GPUs' peak arithmetic that was used."""
    student, teacher = shared_models(shape)
    vocab, size = SHAPES[shape]["vocab_size"], (BLOCKS * steps, LENGTH)
    blocks = torch.randint(vocab, size, generator=torch.Generator().manual_seed(0))
    layers = healing_run.modules_to_compile
    healing_run.modules_to_compile = whole_decoder if compiled == "decoder" else layers
    torch.compiler.reset()
    try:
        with shared_folder() as directory:
            report = heal(
                student,
                teacher,
                None,
                blocks,
                settings=HealingSettings(
                    tokens=blocks.numel(),
                    tokens_per_step=BLOCKS * LENGTH,
                    batch_size=batch_size,
                    torch_compile=compiled != "nothing",
                    save_steps=10**9,
                    **changes,
                ),
                output_dir=directory,
                progress=False,
            )
    finally:
        healing_run.modules_to_compile = layers
    return report, mfu_of(student, teacher, report, LENGTH)


@contextmanager
def shared_folder() -> Iterator[str]:
    """One temporary folder for all processes of this host."""
    with tempfile.TemporaryDirectory() as folder:
        yield broadcast_object_list([folder])[0]
        processes().wait_for_everyone()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="by default, all that fit")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=75, help="start no variant after these")
    parser.add_argument("--no-loss", action="store_true", help="leave out the table of the loss")
    parser.add_argument("--memory", action="store_true", help="of every process")
    parser.add_argument("--settings", nargs="+", default=[""], help="hidden_weight=0,skew=0")
    options = parser.parse_args()
    start = time.perf_counter()
    first = processes().is_main_process
    show = partial(print, flush=True) if first else lambda *_: None
    show(f"{processes().num_processes} x {device_name()}, {options.shape}, {versions()}")
    if not options.no_loss and first:
        vocab = SHAPES[options.shape]["vocab_size"]
        show(f"\nKL over {BLOCKS * LENGTH} tokens, vocabulary {vocab}, bf16 logits")
        show("\n| chunk | compiled | ms | peak GB |\n|---|---|---|---|")
        for chunk, compiled in ((512, False), (1024, True), (2048, True), (4096, True)):
            milliseconds, gigabytes = time_loss(chunk, compiled, options.shape)
            show(f"| {chunk} | {compiled} | {milliseconds:.1f} | {gigabytes:.2f} |")
    show("\n| batch | compiled | settings | tokens/s | MFU | peak GB | seconds in all | losses |")
    show("|---" * 8 + "|")
    for name, settings in product(
        options.variants or DEFAULT_VARIANTS[options.shape], options.settings
    ):
        if smallest(int(options.seconds - (time.perf_counter() - start))) < 0:
            show(f"| {name} {settings}: left out, time is up |")
            continue
        batch_size, compiled_part = VARIANTS[name]
        with peaks() as memory:
            report, mfu = time_healing(
                options.shape, batch_size, compiled_part, options.steps, given_settings(settings)
            )
        losses = ", ".join(f"{step}: {loss:.5f}" for step, loss in report.losses)
        show(
            f"| {report.batch_size} | {compiled_part} | {settings} "
            f"| {report.tokens_per_second or 0:,.0f} | {mfu:.1%} "
            f"| {(report.peak_memory_bytes or 0) / 1e9:.1f} | {report.seconds:.0f} | {losses} |"
        )
        if options.memory:
            show("\n".join(memory))
    processes().destroy_process_group()


if __name__ == "__main__":
    main()
