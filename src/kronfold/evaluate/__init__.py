"""Perplexity under named protocols, and text samples."""
