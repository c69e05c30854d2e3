"""`python -m equinorm.cli`."""

from equinorm.cli.app import main

main()
