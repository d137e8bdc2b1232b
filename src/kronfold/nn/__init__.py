"""Structured modules. Each knows its spec, its cost and its dense twin; none knows a model."""

from kronfold.nn.embedding import FactorizedEmbedding, TiedHead
from kronfold.nn.fused import FusedLinear
from kronfold.nn.kronecker_linear import KroneckerLinear

__all__ = ["FactorizedEmbedding", "FusedLinear", "KroneckerLinear", "TiedHead"]
