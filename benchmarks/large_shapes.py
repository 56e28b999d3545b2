"""Conversion of models of real sizes, read and written layer by layer: memory, time, and on what.

    python benchmarks/large_shapes.py llama-3-8b --folder /tmp/large
    python benchmarks/large_shapes.py llama-3-8b --folder /tmp/large --calibrated --layers 4
    python benchmarks/large_shapes.py llama-2-7b --folder /tmp/large --kills 20
    python benchmarks/large_shapes.py llama-3-8b --folder /tmp/large --calibrated --cold \\
        --device cuda
    python benchmarks/large_shapes.py llama-3.2-1b --folder /tmp/large --plan

Makes a checkpoint of the shape with random bf16 weights in shards, converts it in a process of its
own, and prints what that process needed. Without --calibrated, weights alone are decomposed
(rotated keys in 16 bits, half of the cache); with it, the cache is coded in an eighth of the bytes
after 16 x 512 tokens. With --plan, `plan` measures caches in 16 bits on 4 x 128 tokens instead.
With --kills, the conversion is killed so many times, every --every seconds, and has to have the
same bytes as an undisturbed one after that. With --cold, the system forgets the source's files
before it is converted, so that they are read from the disk. The folder is removed at the end,
unless --keep is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.machine import device_name, versions

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
SHARD = 4 << 30  # bytes
PLAIN = ["--kv-ratio", "0.5", "--no-whiten", "--cache-bits", "16", "--gauge", "applied"]
CODED = ["--kv-ratio", "0.125", "--block-length", "512"]
PLANNED = ["--kv-ratio", "0.5", "--cache-bits", "16", "--block-length", "128"]

# The system's own peak of this process, mapped pages included. Its ru_maxrss would be at least that
# of the process that started it, which has had a whole shard in memory: exec does not reset it.
CHILD = """
import resource, sys
from pathlib import Path
from tpa_convert.cli import main
try:
    main()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    status = Path("/proc/self/status").read_text().split()
    peak = status[status.index("VmHWM:") + 1]
    torch = sys.modules["torch"]
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    print(f"MEASURED {peak} {used.ru_utime + used.ru_stime} {gpu}", file=sys.stderr)
"""


def make_source(name: str, layers: int | None, folder: Path) -> int:
    """Writes a checkpoint with random weights, shard by shard. Returns its bytes."""
    shape = SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(
        **shape, dtype="bfloat16", max_position_embeddings=8192, rope_theta=5e5, architectures=None
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    vocabulary = {f"t{i}": i for i in range(shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2").save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    size = total = count = 0

    def write() -> None:
        nonlocal shard, size, count
        count += 1
        file = f"model-{count:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard, size = {}, 0

    for key, tensor in model.state_dict().items():
        values = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
        if tensor.ndim == 1:
            values.fill_(1)
        else:
            values.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
        values = values.cpu()
        if size and size + values.nbytes > SHARD:
            write()
        shard[key] = values
        size, total = size + values.nbytes, total + values.nbytes
    write()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def forget(folder: Path) -> None:
    """Has the system write the files of a folder to the disk, and keep none of them in memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def command(source: Path, out: Path, blocks: int, refit: bool, device: str) -> list[str]:
    arguments = ["convert", str(source), "--out", str(out), "--device", device, "--profile"]
    if not blocks:
        return [sys.executable, "-c", CHILD, *arguments, *PLAIN]
    text = ["--calibration", str(source / "text.txt"), "--calibration-blocks", str(blocks)]
    coded = CODED + ["--refit"] * refit
    return [sys.executable, "-c", CHILD, *arguments, *coded, *text]


def plan_command(source: Path, device: str) -> list[str]:
    text = ["--calibration", str(source / "text.txt"), "--calibration-blocks", "4"]
    return [sys.executable, "-c", CHILD, "plan", str(source), "--device", device, *PLANNED, *text]


def measured(line: list[str]) -> list[str]:
    """Runs a conversion, showing what it prints as it comes; returns what it used."""
    found: list[str] = []
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for text in process.stderr:
            if text.startswith("MEASURED"):
                found = text.split()[1:]
            else:
                print(text, end="", flush=True)
    if process.returncode:
        sys.exit(f"the conversion ended with {process.returncode}")
    return found


def digest(directory: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            found.update(path.name.encode())
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def killed(line: list[str], times: int, every: float) -> int:
    """Runs a command and kills it so many times; then lets it end. Returns how often it was killed
    before it had ended by itself."""
    for done in range(times):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(every)
            return done
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--folder", type=Path, required=True, help="is made")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--calibrated", action="store_true")
    parser.add_argument("--blocks", type=int, default=16, help="of 512 tokens, with --calibrated")
    parser.add_argument("--refit", action="store_true", help="too, with --calibrated")
    parser.add_argument("--plan", action="store_true", help="instead of a conversion")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--keep", action="store_true", help="the folder, with both models")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--every", type=float, default=15.0, help="seconds between kills")
    given = parser.parse_args()
    print(f"{given.shape}: {device_name()}, {versions()}")
    source, out = given.folder / "source", given.folder / "out"
    try:
        start = time.perf_counter()
        size = make_source(given.shape, given.layers, source)
        print(f"made {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s", flush=True)
        if given.calibrated or given.plan:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(
                3, SHAPES[given.shape]["vocab_size"], (40_000,), generator=generator
            )
            text = " ".join(f"t{i}" for i in ids.tolist())
            (source / "text.txt").write_text(text, encoding="utf-8")
        blocks = given.blocks if given.calibrated else 0
        line = command(source, out, blocks, given.refit, given.device)
        if given.plan:
            line = plan_command(source, given.device)
        if given.cold:
            forget(source)
        start = time.perf_counter()
        peak, cpu, gpu = measured(line)
        seconds = time.perf_counter() - start
        print(
            f"wall {seconds:.0f} s, CPU {float(cpu):.0f} s, "
            f"peak memory {int(peak) / 2**20:.2f} GiB, of the GPU {int(gpu) / 2**30:.2f} GiB, "
            f"{size / 1e9 / seconds:.3f} GB of weights a second",
            flush=True,
        )
        if given.kills:
            expected = digest(out)
            shutil.rmtree(out)
            times = killed(line, given.kills, given.every)
            same = digest(out) == expected
            print(f"killed {times} times, every {given.every:g} s: identical: {same}")
    finally:
        if not given.keep:
            shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
