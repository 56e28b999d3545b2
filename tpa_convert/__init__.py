"""Convert pretrained LLaMA-style checkpoints to Tensor Product Attention.

Importing the package makes converted models known to transformers' Auto classes.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

# The command line imports what each command needs: its --help does not wait for torch.
if [Path(program).name for program in sys.argv[:1]] != ["tpa-convert"]:
    import tpa_convert.modeling  # noqa: F401
