"""Pure solvers: tensor in, factors out. They know no models."""
