"""`python -m equinorm`: the `equinorm` command."""

from equinorm_command import main

if __name__ == "__main__":
    main()
