"""TPA configuration and model, registered with transformers' Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_tpa import Form, Gauge, KeyCache, LayerShape, TPAConfig
from .modeling_tpa import TPAForCausalLM, TPAModel

# Whatever is saved brings its code along, also what others make of a converted model.
TPAConfig.register_for_auto_class()
TPAModel.register_for_auto_class("AutoModel")
TPAForCausalLM.register_for_auto_class("AutoModelForCausalLM")

AutoConfig.register(TPAConfig.model_type, TPAConfig, exist_ok=True)
AutoModel.register(TPAConfig, TPAModel, exist_ok=True)
AutoModelForCausalLM.register(TPAConfig, TPAForCausalLM, exist_ok=True)

__all__ = ["Form", "Gauge", "KeyCache", "LayerShape", "TPAConfig", "TPAForCausalLM", "TPAModel"]
