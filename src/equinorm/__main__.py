"""`python -m equinorm`: the `equinorm` command."""

from equinorm_command import main

main()
