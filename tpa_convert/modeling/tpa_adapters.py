"""peft's defaults for converted models: what low-rank adapters are put on if nobody says."""

import sys
from typing import Any

TARGETS = ["q_proj", "values.feature_factor"]
"""As peft does for the sources: queries and values."""
FACTORED_TARGETS = ["feature_factor"]
"""Where the queries are factored, too, and no single projection."""


def tell_peft(config: Any) -> None:
    """Has `LoraConfig` without `target_modules` work. peft is not imported for it: where it is not
    there yet when a model is made, name the modules."""
    constants = sys.modules.get("peft.utils.constants")
    mapping = getattr(constants, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", None)
    if mapping is not None:
        factored = any(layer.get("rank_q") for layer in config.tpa_layers)
        mapping[config.model_type] = FACTORED_TARGETS if factored else TARGETS
