"""Train the embedded model: a small multi-head-attention LLaMA on the corpus of corpus.py.

    python recipes/embedded_model/train.py --out DIR [--minutes 2.5 | --steps N]

Writes model, tokenizer and training_log.json into DIR. With --minutes the learning-rate schedule
follows the elapsed time, so training ends on time on any machine; with --steps, the steps.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import platform
import shutil
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[2]
EOS = "<|endoftext|>"  # stands before, between and after documents; also BOS and padding
BLOCK = 512
PROMPTS = [
    "It was a bright morning, and",
    "The President of the United States",
    "And the LORD said unto",
    "Captain Ahab stood upon the deck, and",
]


def read_documents(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that every text has an encoding and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=2 * BLOCK,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """One stream of token ids, with EOS around every document; int64 `[tokens]`."""
    ids: list[int] = [tokenizer.eos_token_id]
    for document in tokenizer(documents, verbose=False)["input_ids"]:
        ids += [*document, tokenizer.eos_token_id]
    return torch.tensor(ids)


def model_config(vocab_size: int) -> LlamaConfig:
    """2.83 million parameters (5.7 MB in bf16); six attention heads, none shared."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=2 * BLOCK,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,  # else the embedding of EOS, the same token, would stay zero
    )


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, ids: torch.Tensor, text_bytes: int) -> float:
    """Held-out bits per byte: the summed negative log2-likelihood of the stream over its bytes.

    `ids` is cut into blocks of BLOCK + 1 tokens that share one token, so that every token but the
    first is predicted once, with at most BLOCK tokens of context. fp32.
    """
    total = 0.0
    for start in range(0, len(ids) - 1, 64 * BLOCK):
        part = ids[start : start + 64 * BLOCK + 1]
        whole = (len(part) - 1) // BLOCK * BLOCK
        batches = [part[whole:].unsqueeze(0)] if whole < len(part) - 1 else []
        if whole:
            batches.append(part[: whole + 1].unfold(0, BLOCK + 1, BLOCK))
        for batch in batches:
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
            loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            total += loss.item()
    return total / math.log(2) / text_bytes


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 2 %, then a cosine to 2 % of the peak; progress in [0, 1]."""
    if progress < 0.02:
        return peak * max(progress / 0.02, 0.01)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98))
    return peak * (0.02 + 0.98 * cosine)


def train(model: LlamaForCausalLM, ids: torch.Tensor, settings: argparse.Namespace) -> dict:
    """AdamW on random blocks of the token stream, which stays on the device; returns figures."""
    device = ids.device
    cuda = device.type == "cuda"
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=cuda)
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    offsets = torch.arange(BLOCK + 1, device=device)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if cuda else loss_of

    def step(fraction: float) -> torch.Tensor:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(fraction, settings.learning_rate)
        high = len(ids) - BLOCK
        starts = torch.randint(high, (settings.batch, 1), generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = step_loss(ids[starts + offsets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def progress() -> float:
        if settings.steps:
            return done / settings.steps
        return (time.perf_counter() - begin) / (settings.minutes * 60)

    model.train()
    done, history, recent = 0, [], torch.zeros((), device=device)
    begin = time.perf_counter()
    step(0.0)  # compiles; the learning rate is still almost nothing
    if cuda:
        torch.cuda.synchronize()
    print(f"first step, with compilation: {time.perf_counter() - begin:.1f} s", flush=True)
    begin = time.perf_counter()
    while (fraction := progress()) < 1:
        recent += step(fraction)
        done += 1
        # item() waits for the device, so the clock never runs far behind the queued work
        if done % settings.log_steps == 0 or done == settings.steps:
            count = done % settings.log_steps or settings.log_steps
            loss, seconds = recent.item() / count, time.perf_counter() - begin
            history.append({"step": done, "loss": round(loss, 4), "seconds": round(seconds, 1)})
            print(
                f"step {done:6}  loss {loss:.4f}  {done / seconds:6.1f} steps/s"
                f"  {done * settings.batch * BLOCK / seconds:11,.0f} tokens/s"
                f"  {seconds:5.0f} s  {progress():6.1%}",
                flush=True,
            )
            recent.zero_()
    if cuda:
        torch.cuda.synchronize()
    model.eval()
    return {
        "steps": done,
        "tokens_seen": done * settings.batch * BLOCK,
        "seconds": round(time.perf_counter() - begin, 1),
        "history": history,
    }


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int
) -> str:
    ids = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]
    torch.manual_seed(0)
    out = model.generate(
        torch.tensor([ids], device=model.device),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.7,
        top_k=40,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, default=REPOSITORY / ".work" / "corpus")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=2.5, help="wall clock of the training loop"
    )
    parser.add_argument("--steps", type=int, default=0, help="train for so many steps instead")
    parser.add_argument(
        "--batch", type=int, default=128, help=f"sequences of {BLOCK} tokens a step"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--log-steps", type=int, default=100)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()

    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    documents = read_documents(settings.corpus / "train.jsonl.xz")
    valid = read_documents(settings.corpus / "valid.jsonl.xz")
    tokenizer = train_tokenizer(documents, settings.vocab_size)
    seen = documents[::40]  # how much lower its loss is tells whether the model over-fits
    ids, seen_ids, valid_ids = (encode(tokenizer, texts) for texts in (documents, seen, valid))
    text_bytes, seen_bytes, valid_bytes = (
        sum(len(text.encode()) for text in texts) for texts in (documents, seen, valid)
    )
    model = LlamaForCausalLM(model_config(len(tokenizer))).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters, {len(ids):,} tokens of {text_bytes / len(ids):.2f} bytes",
        flush=True,
    )

    figures = train(model, ids.to(device), settings)

    # the file holds bf16 numbers, so the figures and samples are those of bf16 weights
    model.to(torch.bfloat16)
    temporary = settings.out.with_name(settings.out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    model.float()
    log = {
        "bits_per_byte": bits_per_byte(model, valid_ids.to(device), valid_bytes),
        "train_bits_per_byte": bits_per_byte(model, seen_ids.to(device), seen_bytes),
        "parameters": parameters,
        "train": {"documents": len(documents), "bytes": text_bytes, "tokens": len(ids)},
        "valid": {"documents": len(valid), "bytes": valid_bytes, "tokens": len(valid_ids)},
        "settings": {k: v for k, v in vars(settings).items() if k not in ("corpus", "out")}
        | {"block": BLOCK},
        **figures,
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "samples": [
            sample(model, tokenizer, prompt, 120 if device.type == "cuda" else 20)
            for prompt in PROMPTS
        ],
    }
    (temporary / "training_log.json").write_text(
        json.dumps(log, indent=1, ensure_ascii=False) + "\n"
    )
    if settings.out.exists():
        shutil.rmtree(settings.out)
    os.replace(temporary, settings.out)
    print(
        f"bits per byte: held-out {log['bits_per_byte']:.4f}, "
        f"train {log['train_bits_per_byte']:.4f}"
    )
    print("\n---\n".join(log["samples"]))


if __name__ == "__main__":
    main()
