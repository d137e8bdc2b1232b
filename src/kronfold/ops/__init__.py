"""Pure tensor functions on factors: apply, to_dense, cost. No modules, no models."""
