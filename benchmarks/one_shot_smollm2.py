"""One-shot conversion of SmolLM2-135M-Instruct: perplexity beside source and ungauged baselines.

    python benchmarks/one_shot_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf \\
        --train healing-train.jsonl.xz --valid healing-valid.jsonl.xz
"""

from __future__ import annotations

import time
import warnings
from typing import Any

from common.arguments import parser
from common.blocks import train_blocks
from common.models import load
from common.tables import Table
from tpa_convert.calibration.moments import collect_moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.decomposition import METHODS
from tpa_convert.plans import Budget, plan_uniform

ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(("gauge", {"kv_floats": n}, {}) for n in (256, 192, 128)),
    *(("SVD over heads, whitened", {"kv_floats": n}, {"method": "svd"}) for n in (256, 192, 128)),
    *(
        ("SVD over heads, plain", {"kv_floats": n}, {"method": "svd", "whiten": False})
        for n in (256, 192, 128)
    ),
    ("Tucker, whitened", {"kv_floats": 256}, {"method": "tucker"}),
    ("CP, whitened", {"kv_floats": 256}, {"method": "cp"}),
    ("gauge, plain", {"kv_floats": 256}, {"whiten": False}),
    ("linear, full rank", {"rank_k": 3, "rank_v": 3}, {"method": "svd", "form": "linear"}),
]


def main() -> None:
    arguments = parser(__doc__).parse_args()
    source = load(arguments.source)
    config = source.family.attention_sizes(source.model.config)
    table = Table.start(source, arguments.valid, arguments.valid_blocks)
    start = time.perf_counter()
    blocks = train_blocks(arguments.train, source, 512, arguments.calibration_blocks)
    moments = collect_moments(source, blocks)
    calibration = time.perf_counter() - start
    for name, budget, settings in ROWS:
        start = time.perf_counter()
        method = settings.get("method", "gauge")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # full rank caches more than the source
            plan = plan_uniform(
                config,
                Budget(**budget),
                form=settings.get("form", "static"),
                whole_heads=METHODS[method].whole_heads,
            )
        whiten = settings.get("whiten", True)
        model = convert_model(source, plan, moments, method=method, whiten=whiten)
        table.row(name, model, plan.kv_floats, time.perf_counter() - start)
    print(f"\ncalibration on {moments.num_tokens} tokens: {calibration:.1f} s")


if __name__ == "__main__":
    main()
