"""Source models: found, checked and loaded."""

from tpa_convert.sources.load import Source, SourceReference, load_source, read_source_config

__all__ = ["Source", "SourceReference", "load_source", "read_source_config"]
