"""The command line: every command is a thin shell over a Python function. `--help` imports no torch."""
