"""The source model, and where to compute."""

from __future__ import annotations

from tpa_convert.options.declaration import ARGUMENT, REQUIRED, SOURCE, Section, option


class SourceAccess(Section):
    """How to get at a source, whichever it is."""

    revision: str | None = option(
        None, "Branch, tag or commit of the source on the Hub.", SOURCE, metavar="REV"
    )
    trust_remote_code: bool = option(
        False, "Run the Python code that comes with the source.", SOURCE
    )


class SourceOptions(SourceAccess):
    """A source model."""

    model: str = option(
        REQUIRED,
        "Hub id, local directory or .gguf file.",
        ARGUMENT,
        metavar="SOURCE",
        reads="model",
    )


DEVICE = option(
    "auto", "Where to compute: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.", SOURCE
)


class DeviceOptions(Section):
    """Where to compute."""

    device: str = DEVICE
