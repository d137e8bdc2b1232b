"""Structured modules. Each knows its spec, its cost and its dense twin; none knows a model."""

from kronfold.nn.embedding import FactorizedEmbedding, TiedHead
from kronfold.nn.fused import FusedLinear
from kronfold.nn.grouped_embedding import GroupedEmbedding
from kronfold.nn.low_rank import LowRankLinear
from kronfold.nn.structured import StructuredLinear
from kronfold.nn.sum_linear import SumLinear
from kronfold.nn.tensor_train_embedding import TensorTrainEmbedding

__all__ = [
    "FactorizedEmbedding",
    "FusedLinear",
    "GroupedEmbedding",
    "LowRankLinear",
    "StructuredLinear",
    "SumLinear",
    "TensorTrainEmbedding",
    "TiedHead",
]
