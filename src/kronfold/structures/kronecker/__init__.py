"""Permuted sums of Kronecker products, in the order data flows:

matrix.py       the spec, a solver's result, and the ways to multiply by the factors
als.py          alternating least squares under a weighting by data
van_loan.py     the nearest sum by the truncated SVD of R(W), and two starts for training derived from it
moves.py        ways to deal rows or columns to groups anew
search.py       the search for permutations: starts, nested families, descent
weighted_moves.py  the same under a weighting by data
permutations.py    `permuted_kronecker`, which puts these together
layer.py        the layer, and what a recipe entry may ask
"""

from kronfold.structures.kronecker.layer import INITS, KroneckerLinear, ask, fit, sizes
from kronfold.structures.kronecker.matrix import Fit, KroneckerSpec
from kronfold.structures.kronecker.permutations import permuted_kronecker
from kronfold.structures.kronecker.van_loan import (
    nearest_kronecker,
    nearest_kronecker_batch,
    pruned_kronecker,
    with_equal_entries,
)

__all__ = [
    "INITS",
    "Fit",
    "KroneckerLinear",
    "KroneckerSpec",
    "ask",
    "fit",
    "nearest_kronecker",
    "nearest_kronecker_batch",
    "permuted_kronecker",
    "pruned_kronecker",
    "sizes",
    "with_equal_entries",
]
