"""Heal a converted model in a training loop of your own: it is an ordinary transformers model.

    tpa-convert convert recipes/embedded_model/model --kv-ratio 0.03125 --out small
    python examples/own_training_loop.py small recipes/embedded_model/model \\
        --text recipes/embedded_model/train-sample.txt.xz --out healed

`tpa-convert heal` does more: it goes on after a kill, uses several GPUs and matches hidden states.
This is the least that a loop with other aims needs.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

import tpa_convert  # noqa: F401  (makes the model type known)


def read(path: Path) -> str:
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", help="directory of a converted model")
    options.add_argument("source", help="the model that it was converted from")
    options.add_argument("--text", type=Path, required=True, help="text file, perhaps .xz")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    arguments = options.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    student = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).train()
    teacher = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=torch.float32).eval()

    tokens = torch.tensor(tokenizer(read(arguments.text), verbose=False)["input_ids"])
    blocks = tokens[: len(tokens) // arguments.length * arguments.length]
    blocks = blocks.view(-1, arguments.length)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-4, betas=(0.9, 0.95))
    torch.manual_seed(0)
    for step in range(arguments.steps):
        batch = blocks[torch.randint(len(blocks), (arguments.batch_size,))]
        with torch.no_grad():
            wanted = teacher(batch).logits.log_softmax(-1)
        # In training mode, too, the student attends to what its cache would hold: it learns with
        # its rounded numbers, and gradients pass straight through the rounding.
        found = student(batch).logits.log_softmax(-1)
        loss = kl_div(found, wanted, reduction="sum", log_target=True) / batch.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: KL {loss.item():.4f}")
    student.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
