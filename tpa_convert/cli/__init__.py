"""The command line."""

from tpa_convert.cli.commands import main

__all__ = ["main"]
