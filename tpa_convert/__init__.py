"""Convert pretrained LLaMA-style checkpoints to Tensor Product Attention."""

__version__ = "0.1.0"
