"""What moving a number costs, in multiply-accumulates of a large matrix product: for choosing between ways to compute.

Measured on two CPU cores with AVX-512, float32, forward and backward: a product runs at 36e9 multiply-accumulates a
second and core; a gather along the last dimension takes 4.5 ns an element, of whole rows 0.4 ns, a rearranging copy
about 1 ns. In bfloat16 the products are 2.6 times as fast, so the same moves weigh more.
"""

from __future__ import annotations

GATHER = 150.0  # one element picked by an index along the last dimension
ROW = 15.0  # one element of a row picked by an index
COPY = 40.0  # one element of a transposition
