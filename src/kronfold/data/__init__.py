"""Text sources, cleaning, tokenising and packing; no models."""
