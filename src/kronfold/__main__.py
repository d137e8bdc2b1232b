"""`python -m kronfold` is the command `kronfold`."""

from kronfold.cli.main import main

main()
