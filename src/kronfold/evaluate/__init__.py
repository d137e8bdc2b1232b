"""Perplexity under named protocols, and text samples."""

from kronfold.evaluate.perplexity import PerplexityResult, perplexity
from kronfold.evaluate.samples import sample

__all__ = ["PerplexityResult", "perplexity", "sample"]
