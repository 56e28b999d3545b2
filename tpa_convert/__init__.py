"""Convert pretrained LLaMA-style checkpoints to Tensor Product Attention.

Importing the package makes converted models known to transformers' Auto classes.
"""

import os
import sys
from pathlib import Path

# Before torch is imported: threads that wait for work sleep instead of spinning. While they spin,
# processes that share a machine take each other's cores; many small decompositions then take a
# hundred times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.3.0.dev0"


def _is_command_line() -> bool:
    """Whether the process runs `tpa-convert`, or `python -m tpa_convert`."""
    program = Path(sys.argv[0]).stem if sys.argv else ""
    if program == "-m" and "-m" in sys.orig_argv[:-1]:  # a module is being looked for
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
        return module.split(".")[0] == "tpa_convert"
    return program == "tpa-convert"


# The command line imports what each command needs: its --help does not wait for torch.
if not _is_command_line():
    import tpa_convert.modeling  # noqa: F401
