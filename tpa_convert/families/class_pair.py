"""The classes that put Tensor Product Attention into a family: written from one template.

The package's own families stand in `modeling/` as this template writes them, where an auditor reads
them and exports take them from; a test holds them against it. A family that is registered at run
time gets its classes from here as well. To write such a file:

    python -m tpa_convert.families.class_pair PhiForCausalLM output=dense
"""

from __future__ import annotations

import linecache
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from tpa_convert.modeling import AttentionNames

TEMPLATE = '''"""{title} with Tensor Product Attention (arXiv 2501.06425)."""

{source_imports}

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin
{names_import}

class TPA{title}Config(TPAConfigMixin, {config}):
    """[`{config}`] with the shapes of the TPA layers."""

    model_type = "tpa_{model_type}"
    tpa_layers: list | dict | None = None


class TPA{title}Model(TPAModelMixin, {model}):
    """The decoder without its language-model head."""

    config: TPA{title}Config
{names}
    def __init__(self, config: TPA{title}Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPA{title}ForCausalLM(TPAModelMixin, {causal_lm}):
    """The decoder with its language-model head."""

    config: TPA{title}Config
    decoder_class = TPA{title}Model

    def __init__(self, config: TPA{title}Config):
        super().__init__(config)
        self.{decoder} = TPA{title}Model(config)
        self.post_init()


{exported}'''


LINE_LENGTH = 100
KINDS = ("Config", "ForCausalLM", "Model")


def class_pair_source(
    config: type[PreTrainedConfig],
    model: type[PreTrainedModel],
    causal_lm: type[PreTrainedModel],
    names: AttentionNames,
    beside: bool = False,
) -> str:
    """Python source of a family's converted classes.

    Args:
        config, model, causal_lm: classes of the source.
        names: where its attention is.
        beside: whether classes that are not transformers' own are in files beside it, as in an
            export.
    """
    modules: dict[str, list[str]] = {}
    for cls in (config, causal_lm, model):
        module = cls.__module__
        if module.partition(".")[0] == "transformers":
            module = "transformers"
        elif beside:
            module = f".{Path(sys.modules[module].__file__ or module).stem}"
        modules.setdefault(module, []).append(cls.__name__)
    default = AttentionNames()
    changed = [
        f"{field.name}={getattr(names, field.name)!r}".replace("'", '"')
        for field in fields(names)
        if getattr(names, field.name) != getattr(default, field.name)
    ]
    title = causal_lm.__name__.removesuffix("ForCausalLM")
    return TEMPLATE.format(
        title=title,
        model_type=config.model_type,
        decoder=causal_lm.base_model_prefix,
        config=config.__name__,
        model=model.__name__,
        causal_lm=causal_lm.__name__,
        source_imports="\n".join(
            f"from {module} import {', '.join(sorted(found))}" for module, found in modules.items()
        ),
        names_import="from .tpa_source import AttentionNames\n" if changed else "",
        names=_call("    attention_names = AttentionNames", changed) if changed else "",
        exported=_list("__all__", [f'"TPA{title}{kind}"' for kind in KINDS]),
    )


def _call(function: str, arguments: list[str]) -> str:
    """A line that calls `function`, or the lines that it takes."""
    line = f"{function}({', '.join(arguments)})\n"
    if len(line) <= LINE_LENGTH:
        return line
    indent = " " * (len(function) - len(function.lstrip()))
    inner = f"{indent}    {', '.join(arguments)}\n"
    if len(inner) > LINE_LENGTH:
        inner = "".join(f"{indent}    {argument},\n" for argument in arguments)
    return f"{function}(\n{inner}{indent})\n"


def _list(name: str, entries: list[str]) -> str:
    """A line that makes a list, or the lines that it takes."""
    line = f"{name} = [{', '.join(entries)}]\n"
    if len(line) <= LINE_LENGTH:
        return line
    return f"{name} = [\n" + "".join(f"    {entry},\n" for entry in entries) + "]\n"


def class_pair(
    config: type[PreTrainedConfig],
    model: type[PreTrainedModel],
    causal_lm: type[PreTrainedModel],
    names: AttentionNames,
) -> type:
    """The converted `ForCausalLM` of a family that the package does not come with."""
    title = causal_lm.__name__.removesuffix("ForCausalLM")
    name = f"tpa_convert.modeling.tpa_{config.model_type}"
    source = class_pair_source(config, model, causal_lm, names)
    module = ModuleType(name)
    module.__package__ = "tpa_convert.modeling"
    module.__file__ = f"<{name}>"
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(True), module.__file__)
    sys.modules[name] = module
    exec(compile(source, module.__file__, "exec", dont_inherit=True), vars(module))
    return getattr(module, f"TPA{title}ForCausalLM")


def main(arguments: list[str]) -> None:
    """Prints the class pair of a family of transformers: the name of its `ForCausalLM`, then fields
    of `AttentionNames` that are not as in most, as `output=dense`."""
    name, *changes = arguments
    causal_lm = getattr(transformers, name)
    model = MODEL_MAPPING[causal_lm.config_class]
    values: dict[str, Any] = dict(change.split("=", 1) for change in changes)
    if "fused_by_head" in values:
        values["fused_by_head"] = values["fused_by_head"].lower() == "true"
    names = AttentionNames(**values)
    print(class_pair_source(causal_lm.config_class, model, causal_lm, names), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
