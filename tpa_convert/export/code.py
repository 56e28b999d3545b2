"""The code of a family that was registered at run time, beside the weights of a conversion.

What transformers itself carries along are files of the package; these classes have none.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from tpa_convert.families.class_pair import class_pair_source
from tpa_convert.families.own_code import own_files
from tpa_convert.modeling import legacy


def write_own_code(causal_lm: Any, directory: Path) -> None:
    """Writes the modules that a model of this class needs to load by itself, if transformers has
    not done so."""
    module = causal_lm.__module__.rpartition(".")[2]
    if (directory / f"{module}.py").is_file():
        return
    converted = (causal_lm.config_class, causal_lm.decoder_class, causal_lm)
    config, model, source = (cls.__bases__[-1] for cls in converted)
    names = causal_lm.decoder_class.attention_names
    text = class_pair_source(config, model, source, names, beside=True)
    (directory / f"{module}.py").write_text(text, encoding="utf-8")
    modeling = Path(legacy.__file__).parent
    shared = get_relative_import_files(modeling / "tpa_llama.py")
    for file in [*map(Path, shared), *own_files((config, model, source))]:
        shutil.copyfile(file, directory / file.name)
