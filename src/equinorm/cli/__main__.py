"""`python -m equinorm.cli`."""

from equinorm_command import main

main()
