"""A linear layer of low rank, held by some of its own rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kronfold.base.specs import LowRankSpec
from kronfold.nn.structured import TOKEN_COUNTS, StructuredLinear
from kronfold.ops import low_rank
from kronfold.ops.cost import Rates, rates_for, rates_of, tokens_of
from kronfold.ops.permutation import drop_identity


class LowRankLinear(StructuredLinear):
    """`y = gather([z, C z]) + bias` with `z = P x`: P holds `rank` rows of the weight, C makes the others from them.

    Args:
        in_features, out_features, rank: sizes; rank at most the smaller of the two. bias: hold a bias.
        permuted: hold a gather for the output features.

    Parameters: `pivots` P (rank, in), `mix` C (out - rank, rank), `bias` (out,) or None. Buffer (int32): `gather_out`
    (out,), where in [z, C z] each output stands; None where they stand in that order.

    Raises:
        ShapeError: impossible sizes.

    Source: pivoting factorisation, arXiv 2501.19090: rank·(out + in - rank) numbers and multiply-accumulates.
    """

    structure = "low_rank"
    pivots: nn.Parameter
    mix: nn.Parameter
    gather_out: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        permuted: bool = True,
    ) -> None:
        super().__init__()
        self.spec = LowRankSpec(out_features, in_features, rank, permuted)
        self.in_features, self.out_features = in_features, out_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pivots = nn.Parameter(torch.empty(rank, in_features, **factory))
        self.mix = nn.Parameter(torch.empty(out_features - rank, rank, **factory))
        self.add_bias(bias, device, dtype)
        identity = torch.arange(out_features, dtype=torch.int32, device=device)
        self.register_buffer("gather_out", identity if permuted else None)
        nn.init.normal_(self.pivots, std=1 / math.sqrt(3 * in_features))  # rows as a fresh nn.Linear has them
        nn.init.normal_(self.mix, std=1 / math.sqrt(rank))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns (..., out_features)."""
        tokens, rates = tokens_of(x), rates_for(x)
        if self.may_keep() and self._by_factor(tokens, rates, kept=True):
            return low_rank.apply_factor(x, self.pivots, self.kept(self._factor), self.bias)
        training = torch.is_grad_enabled() and (x.requires_grad or self.mix.requires_grad)
        if self._by_factor(tokens, rates, training):
            return low_rank.apply_factor(x, self.pivots, self._factor(), self.bias)
        return low_rank.apply_gathered(x, self.pivots, self.mix, self.gather_out, self.bias)

    def _factor(self) -> Tensor:
        return low_rank.output_factor(self.mix, self.gather_out)

    def _by_factor(self, tokens: int, rates: Rates, training: bool = False, kept: bool = False) -> bool:
        gather = self.gather_out is not None
        return low_rank.factor_is_faster(self.out_features, self.spec.rank, tokens, gather, rates, training, kept)

    def kept_shape(self) -> tuple[int, int] | None:
        rates = rates_of(self.mix.device.type, self.mix.dtype)
        wanted = any(self._by_factor(tokens, rates, kept=True) for tokens in TOKEN_COUNTS)
        return (self.out_features, self.spec.rank) if wanted else None

    def dense_weight(self) -> Tensor:
        weight = torch.cat([self.pivots, self.mix @ self.pivots])
        return weight if self.gather_out is None else weight[self.gather_out.long()]

    def permute_inputs(self, perm: Tensor) -> None:
        """Reorder the input features in place: the layer then takes `x[..., perm]` where it took x. perm: (in,)."""
        with torch.no_grad():
            self.pivots.copy_(self.pivots[:, perm.to(self.pivots.device)])

    def permute_outputs(self, perm: Tensor) -> None:
        """Reorder the output features in place, bias included: the layer then returns `y[..., perm]`. perm: (out,)."""
        perm = perm.to(self.pivots.device)
        gather = perm if self.gather_out is None else self.gather_out[perm]
        self.gather_out = drop_identity(gather.int())
        self.spec = replace(self.spec, permuted=self.gather_out is not None)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(self.bias[perm])

    def macs_per_token(self) -> float:
        return self.spec.macs_per_token

    def to_spec(self) -> dict[str, Any]:
        return {"structure": self.structure, **self.spec.to_dict()}

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LowRankLinear:
        s = LowRankSpec(**{k: v for k, v in spec.items() if k != "structure"})
        return cls(s.in_features, s.out_features, s.rank, bias, device, dtype, s.permuted)

    @classmethod
    def from_fit(
        cls,
        fit: Any,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LowRankLinear:
        """`fit`: a `kronfold.decompose.low_rank.LowRankFit`."""
        s = fit.spec
        layer = cls(s.in_features, s.out_features, s.rank, bias is not None, device=device, dtype=dtype)
        with torch.no_grad():
            layer.pivots.copy_(fit.pivots)
            layer.mix.copy_(fit.mix)
            layer.gather_out = fit.gather_out.to(layer.pivots.device, torch.int32)
        layer.set_bias(bias)
        return layer

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec.label()}, bias={self.bias is not None}"
