"""What every room may use: errors, registries, specs, result files. Nothing here imports torch."""
