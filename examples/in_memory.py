"""Convert a model in memory and say what that cost, without writing a file.

python examples/in_memory.py recipes/embedded_model/model --text recipes/embedded_model/valid.txt.xz
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tpa_convert.calibration.cache_moments import collect_cache_moments
from tpa_convert.conversion.coded import choose_codes
from tpa_convert.conversion.model import convert_model
from tpa_convert.evaluation import blocks_by_source, cache_bytes, compare
from tpa_convert.forward.quantised import quantised_source
from tpa_convert.plans import Budget, plan_coded
from tpa_convert.sources import load_source
from tpa_convert.text.read import default_calibration_documents, load_documents, token_blocks


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", type=Path, help="directory or .gguf file")
    options.add_argument("--text", required=True, help="held-out text")
    options.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.125, 0.0625])
    options.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    options.add_argument("--sequences", type=int, default=16, help="to calibrate and to measure on")
    arguments = options.parse_args()

    source = load_source(arguments.model)
    calibration = token_blocks(
        default_calibration_documents(),
        source.tokenizer,
        arguments.length,
        arguments.sequences,
        seed=0,
    )
    # One pass measures what an error of every cached number costs; it serves all budgets.
    moments = collect_cache_moments(source, calibration)

    models = {"source": source.model, "int4": quantised_source(source.model, 4)}
    for ratio in arguments.ratios:
        plan = plan_coded(
            source.family.attention_sizes(source.model.config), Budget(kv_ratio=ratio)
        )
        codes = choose_codes(plan, moments.layers, moments.num_tokens)
        models[f"{ratio:g}"] = convert_model(source, codes.plan, moments)

    [blocks] = blocks_by_source(
        source.tokenizer, load_documents(arguments.text), arguments.length, arguments.sequences
    ).values()
    perplexities, agreements = compare(models, blocks)
    print(f"{'cache':>8} {'bytes a token':>14} {'perplexity':>11} {'KL':>7}")
    for name, model in models.items():
        kl = agreements[name].kl if name in agreements else 0.0
        size = "" if name == "int4" else f"{cache_bytes(model, arguments.length).at(2):,.0f}"
        print(f"{name:>8} {size:>14} {perplexities[name].perplexity:>11.2f} {kl:>7.4f}")


if __name__ == "__main__":
    main()
