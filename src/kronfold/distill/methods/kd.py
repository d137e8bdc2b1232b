"""Vanilla knowledge distillation: cross entropy with the text plus T² KL of the softened distributions.

Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2. The losses
are those of `kronfold.distill.losses`; nothing else is compared.
"""

from __future__ import annotations

from typing import ClassVar

from kronfold.distill.method import Method


class KD(Method):
    """`ce` and `kl` with the weights and the temperature of the config, the same at every step."""

    learns_from_top_k: ClassVar[bool] = True
