"""`python -m tpa_convert.cli`, as launchers of several processes start it."""

from tpa_convert.cli.commands import main

main()
