"""`python -m tpa_convert`."""

from tpa_convert.cli.commands import main

main()
