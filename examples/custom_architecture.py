"""Converting an architecture that transformers does not have: one record says all there is to say.

    tpa-convert convert DIR --import examples/custom_architecture.py --kv-ratio 0.5 --out small

Run by itself, this makes a random model, converts it and compares the two:

    python examples/custom_architecture.py
"""

import tempfile
from pathlib import Path

import torch
from small_model import SmallConfig, SmallForCausalLM, SmallModel

from tpa_convert.families import register_family
from tpa_convert.modeling import AttentionNames

register_family(
    SmallConfig,
    SmallModel,
    SmallForCausalLM,
    AttentionNames(
        layers="blocks",
        rotary="rope",
        attention="attn",
        query="query",
        key="key",
        value="value",
        output="out",
        pairs="neighbours",
        table="neighbours",
    ),
)


def main() -> None:
    """A random model, its conversion at full width and at half, saved and loaded again."""
    from tpa_convert import pipeline
    from tpa_convert.export.save import load_model
    from tpa_convert.recipe import ConvertOptions

    torch.manual_seed(0)
    model = SmallForCausalLM(SmallConfig()).eval()
    tokens = torch.randint(3, 128, (2, 40))
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "source"
        model.save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
        for ratio in (1.0, 0.5):
            out = Path(directory) / f"small-{ratio}"
            options = ConvertOptions(kv_ratio=ratio, block_length=64, calibration_blocks=16)
            result = pipeline.convert(str(source), out, options)
            with torch.no_grad():
                difference = (load_model(out)(tokens).logits - model(tokens).logits).abs().max()
            print(
                f"{result.prediction.source_kv_bytes} -> {result.prediction.kv_bytes} bytes a "
                f"token; logits differ by at most {difference:.1g}"
            )


def byte_tokenizer():
    """One token a character: enough to read the calibration text."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    tokens = [*specials, "\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


if __name__ == "__main__":
    main()
