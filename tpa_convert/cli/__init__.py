"""The command line."""

from tpa_convert.cli import usage  # noqa: F401  (its commands register themselves)
from tpa_convert.cli.commands import main

__all__ = ["main"]
