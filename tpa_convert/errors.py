"""The one exception that means "the user can fix this"."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a bad environment.

    The message is a single line that says what is wrong and what to do about it. The command line
    prints it without a traceback and exits with status 1.
    """
