"""Healing speed on one GPU: random weights in SmolLM2-135M's shape, 32 x 1024 tokens a step.

    PYTHONPATH=. python benchmarks/heal_throughput.py

Prints, as Markdown, the time and the peak memory of the fused loss by chunk size, then tokens per
second and peak memory of whole steps (`heal()`) by batch size and by what is compiled. No download.
A variant is left out once --seconds are spent; --variants picks some, in their order.
"""

from __future__ import annotations

import argparse
import copy
import platform
import tempfile
import time
from functools import partial

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tpa_convert.healing import HealingSettings, chunked_divergence, forward_kl, heal
from tpa_convert.healing import run as healing_run

DEVICE = "cuda"
HIDDEN, VOCAB, BLOCKS, LENGTH = 576, 49152, 32, 1024

# name -> (batch size, what to compile: nothing, equal layers once, the whole decoder)
VARIANTS = {
    "b32-layers": (32, "layers"),
    "b16-layers": (16, "layers"),
    "b8-layers": (8, "layers"),
    "b8-eager": (8, "nothing"),
    "b32-decoder": (32, "decoder"),
}


def smollm2_135m() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).eval()


def time_loss(chunk_tokens: int, compiled: bool) -> tuple[float, float]:
    """Milliseconds, forward and backward, and peak GB beyond the arguments."""
    divergence = torch.compile(forward_kl, dynamic=False) if compiled else forward_kl
    shape = (BLOCKS * LENGTH, HIDDEN)
    student, teacher = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in "st")
    weight = torch.randn(VOCAB, HIDDEN, device=DEVICE).mul_(0.02).requires_grad_()
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


def whole_decoder(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [model.get_decoder()]


def time_healing(batch_size: int, compiled: str, steps: int) -> healing_run.HealingReport:
    teacher = smollm2_135m()
    student = copy.deepcopy(teacher)
    teacher = teacher.to(torch.bfloat16)
    blocks = torch.randint(VOCAB, (BLOCKS * steps, LENGTH))
    layers = healing_run.modules_to_compile
    healing_run.modules_to_compile = whole_decoder if compiled == "decoder" else layers
    torch.compiler.reset()
    try:
        with tempfile.TemporaryDirectory() as directory:
            return heal(
                student,
                teacher,
                None,
                blocks,
                settings=HealingSettings(
                    tokens=blocks.numel(),
                    tokens_per_step=BLOCKS * LENGTH,
                    batch_size=batch_size,
                    torch_compile=compiled != "nothing",
                ),
                output_dir=directory,
                progress=False,
            )
    finally:
        healing_run.modules_to_compile = layers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=75, help="start no variant after these")
    parser.add_argument("--no-loss", action="store_true", help="leave out the table of the loss")
    options = parser.parse_args()
    start = time.perf_counter()
    show = partial(print, flush=True)
    show(
        f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{time.strftime('%Y-%m-%d')}"
    )
    if not options.no_loss:
        show(f"\nKL over {BLOCKS * LENGTH} tokens, vocabulary {VOCAB}, bf16 logits")
        show("\n| chunk | compiled | ms | peak GB |\n|---|---|---|---|")
        for chunk, compiled in ((512, False), (1024, True), (2048, True), (4096, True)):
            milliseconds, gigabytes = time_loss(chunk, compiled)
            show(f"| {chunk} | {compiled} | {milliseconds:.1f} | {gigabytes:.2f} |")
    show("\n| batch | compiled | tokens/s | peak GB | seconds in all |\n|---|---|---|---|---|")
    for name in options.variants:
        if time.perf_counter() - start > options.seconds:
            show(f"| {name}: left out, time is up |")
            continue
        batch_size, compiled_part = VARIANTS[name]
        report = time_healing(batch_size, compiled_part, options.steps)
        show(
            f"| {batch_size} | {compiled_part} | {report.tokens_per_second:,.0f} "
            f"| {(report.peak_memory_bytes or 0) / 1e9:.1f} | {report.seconds:.0f} |"
        )


if __name__ == "__main__":
    main()
