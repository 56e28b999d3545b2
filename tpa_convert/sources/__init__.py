"""Source models: found, checked and loaded."""

from tpa_convert.sources.load import Source, SourceReference, load_source, read_source_config
from tpa_convert.sources.on_demand import device_of, held, in_memory
from tpa_convert.sources.opening import open_source

__all__ = [
    "Source",
    "SourceReference",
    "device_of",
    "held",
    "in_memory",
    "load_source",
    "open_source",
    "read_source_config",
]
