"""What structured layers have in common; the rest of the project relies on nothing else of them.

`StructuredLinear` and `StructuredEmbedding` are the bases of the layers of all structures. `FusedLinear` holds several
linear maps of one input, as GPT-2's c_attn does.

A factor that is a plain product is an `nn.Linear` inside its layer (`product`), so that adapters, quantisers, hooks and
profilers find it. Fast ways to compute read its weight past the module; they are taken only while that changes nothing
(`plain_weight`). Otherwise the layer calls what stands there now.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kronfold.base.errors import CheckpointError
from kronfold.structures.registry import STRUCTURES, Structure, Where

if TYPE_CHECKING:
    from typing_extensions import Self

Side = Literal["in", "out"]


TOKEN_COUNTS = tuple(4**power for power in range(9))  # calls of 1 to 65,536 tokens, where a layer asks what it would do


def product(
    in_features: int, out_features: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Linear:
    """A factor as an `nn.Linear` without bias whose numbers are not drawn yet; its weight is (out, in)."""
    # Built small: drawing numbers that are drawn again below would be slow, and would move torch's random state.
    made = nn.Linear(1, 1, bias=False, device="meta")
    made.in_features, made.out_features = in_features, out_features
    made.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
    return made


def plain_weight(module: nn.Module | None) -> Tensor | None:
    """The weight of a factor that is a stock `nn.Linear` nobody listens to, so that it may be used past its call.

    None once the module was replaced (an adapter, a quantised layer), has hooks or a forward put over its own (weights
    that are fetched for the call), or holds numbers that are no plain tensor.
    """
    if type(module) is not nn.Linear:
        return None
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    if "forward" in module.__dict__:
        return None
    weight = module._parameters["weight"]
    return weight if type(weight) is nn.Parameter or type(weight) is Tensor else None


def product_weight(module: nn.Module, in_features: int) -> Tensor:
    """The matrix (out, in) that a factor multiplies by: its weight, or what a module that is not plain makes of the
    identity."""
    weight = plain_weight(module)
    if weight is not None:
        return weight
    held = next((p for p in module.parameters() if p.is_floating_point()), None)
    here = held is not None and not held.is_meta  # numbers on disk are fetched by the call
    dtype, device = (torch.float32, None) if held is None else (held.dtype, held.device if here else None)
    made: Tensor = module(torch.eye(in_features, dtype=dtype, device=device))
    return made.t()


class Structured(nn.Module):
    """Anything that stands in a model in place of one of its modules: structured layers and what contains them.

    Integer buffers of a structured module are index buffers (gathers): they are applied on every call and counted as
    such. A layer whose channels can be reordered offers `permute_inputs(perm)` and `permute_outputs(perm)`.
    """

    @abstractmethod
    def to_spec(self) -> dict[str, Any]:
        """What checkpoints carry of this module, `structure` included; `Structure.build` makes it again."""

    def macs_per_token(self) -> float:
        """Multiply-accumulates per token when many tokens share the call, with those of its parts; of an embedding
        for a row that is looked up."""
        return 0.0

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The layers whose outputs stand side by side in this one's, by name; empty for any but a fused layer."""
        return {}

    @property
    def reads(self) -> nn.Module | None:
        """The embedding whose numbers this module multiplies by, where it holds none of its own (a tied head)."""
        return None

    def gather_place(self, side: Side) -> tuple[nn.Module, str] | None:
        """Where the gather of a side is held: the module and the buffer's name (the buffer is None while the side
        stands in order). None where reordering the side needs no gather."""
        name = f"gather_{side}"
        return (self, name) if hasattr(self, name) else None


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a fused structured layer by name, empty for any other module."""
    return module.parts if isinstance(module, Structured) else {}


def dense_rows(embedding: nn.Module) -> Tensor:
    """The dense weight (vocabulary, width) of an embedding, structured or not, detached if it is its own."""
    if isinstance(embedding, StructuredEmbedding):
        return embedding.dense_weight()
    return embedding.get_parameter("weight").detach()


def read_by(module: nn.Module | None) -> nn.Module | None:
    """The structured embedding whose numbers a module multiplies by, as a tied head does; None for any other."""
    return module.reads if isinstance(module, Structured) else None


def structured_modules(model: nn.Module) -> Iterator[tuple[str, Structured]]:
    """(dotted name, module) of the structured modules of a model, in model order; what is inside one is its own."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, Structured) and not (name + ".").startswith(inside):
            inside = (*inside, name + "." if name else "")
            yield name, module


class StructuredLinear(Structured, ABC):
    """A linear map (in_features -> out_features) held in fewer numbers than its dense weight.

    A class adds its parameters, `forward`, and the verbs below; `from_fit` takes what its solver returns.

    Attributes:
        structure: the name in specs and recipes. spec: the typed spec of this layer.

    A layer may keep a weight it built between calls (`keep`), in eval mode without gradients. What is kept is no part
    of the state dict, and is built anew when a parameter or buffer was changed in place or replaced. Changes through
    `.data` go unnoticed, as they do everywhere in PyTorch.
    """

    structure: ClassVar[str]
    spec: Any
    in_features: int
    out_features: int
    bias: nn.Parameter | None
    _keeps = False
    _kept: tuple[list[tuple[Tensor, int, int]], Tensor] | None = None

    def kept_shape(self) -> tuple[int, int] | None:
        """Shape of the weight that `keep` would hold; None where no number of tokens would be faster with it."""
        return None

    def keep(self, on: bool = True) -> None:
        """Keep a weight built for a call for the next one, or no more. It is built when a call first wants it."""
        self._keeps, self._kept = on, None

    def may_keep(self) -> bool:
        """Whether this call may use and leave a kept weight. Compiled code may not: it cannot see that one is stale."""
        return self._keeps and not self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def kept(self, build: Callable[[], Tensor]) -> Tensor:
        """The kept weight, by `build` where there is none or it is stale."""
        owners = (self, *(module for module in self._modules.values() if module is not None))
        held = [
            tensor
            for owner in owners
            for tensor in (*owner._parameters.values(), *owner._buffers.values())
            if tensor is not None
        ]
        if any(tensor.is_inference() for tensor in held):  # their changes are not counted
            return build()
        state = [(tensor, tensor._version, tensor.data_ptr()) for tensor in held]
        if self._kept is None or not _same_state(self._kept[0], state):
            self._kept = (state, build())
        return self._kept[1]

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; training frees what is kept."""
        if mode:
            self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._kept = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def add_bias(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Hold a zero bias of out_features numbers, or none."""
        value = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", value)

    def set_bias(self, bias: Tensor | None) -> None:
        """Copy the numbers of `bias` (out_features,) where the layer holds one."""
        if self.bias is not None and bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight this layer stands for: (out_features, in_features), in the source's order of features."""

    def macs_per_token(self) -> float:
        """Multiply-accumulates per token when many tokens share the call."""
        return STRUCTURES.get(self.structure).macs(self.spec)

    def to_spec(self) -> dict[str, Any]:
        """The layer's spec as checkpoints carry it, `structure` included."""
        return {"structure": self.structure, **self.spec.to_dict()}

    @classmethod
    @abstractmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StructuredLinear:
        """A layer of the right shapes for `spec` (as `to_spec` gives it, `structure` or not), its numbers still to be
        read."""

    @classmethod
    @abstractmethod
    def from_fit(
        cls,
        fit: Any,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StructuredLinear:
        """The layer that holds what a solver found."""


class StructuredEmbedding(Structured, ABC):
    """A token embedding (num_embeddings, embedding_dim) held in fewer numbers than its dense weight.

    A class adds `forward(ids)`, `macs_per_token`, `to_spec`, `from_spec` and `from_fit` (as `StructuredLinear`, without
    a bias), and the verbs below.

    Attributes:
        num_embeddings: size of the vocabulary. embedding_dim: width of the looked-up vectors.
    """

    num_embeddings: int
    embedding_dim: int

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:
        """Logits `hidden · Eᵀ`: (..., embedding_dim) -> (..., num_embeddings)."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """E, (num_embeddings, embedding_dim)."""

    @abstractmethod
    def head_macs(self) -> float:
        """Multiply-accumulates of the logits of one token, for a head that reads this embedding."""

    def site_weight(self) -> Tensor:
        """The matrix that a later structure would be fitted to, one row per token; as a rule E itself."""
        return self.dense_weight()

    @property
    def site_shape(self) -> tuple[int, int]:
        """Shape of `site_weight`, known without making it."""
        return self.num_embeddings, self.embedding_dim

    def site_metric(self, metric: Tensor) -> Tensor:
        """The metric of the columns of E (embedding_dim, embedding_dim) as one of the columns of `site_weight`."""
        return metric


def _same_state(old: list[tuple[Tensor, int, int]], new: list[tuple[Tensor, int, int]]) -> bool:
    """The same tensors, with the same storage, unchanged."""
    pairs = zip(old, new, strict=False)
    return len(old) == len(new) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in pairs)


class FusedLinear(Structured):
    """Several linear maps of one input whose outputs stand side by side, as GPT-2's c_attn holds q, k and v.

    `y = [part_1(x), part_2(x), ...]` along the last axis; stock attention code that splits y stays untouched.

    Args:
        parts: name -> layer (structured, or a dense `nn.Linear`), in the order of their outputs. Names become
            submodules, so the state dict reads `c_attn.q.b`, `c_attn.k.b`, ...
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.part_names = tuple(parts)
        for name, part in parts.items():
            self.add_module(name, part)

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {name: self.get_submodule(name) for name in self.part_names}

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns (..., sum of the parts' out_features)."""
        return torch.cat([part(x) for part in self.parts.values()], dim=-1)

    def to_spec(self) -> dict[str, Any]:
        parts = {}
        for name, part in self.parts.items():
            dense = {"structure": "dense", "out_features": getattr(part, "out_features", None)}
            parts[name] = part.to_spec() if isinstance(part, Structured) else dense
        return {"structure": "fused", "parts": parts}

    def macs_per_token(self) -> float:
        return sum(
            part.macs_per_token() if isinstance(part, Structured) else part.get_parameter("weight").numel()
            for part in self.parts.values()
        )


class _Dense(Structure):
    """A part of a fused layer that is still a plain matrix."""

    name = "dense"

    def build(self, content: Mapping[str, Any], where: Where) -> nn.Module:
        self.check_place(where)
        return nn.Linear(where.shape[1], where.shape[0], bias=where.bias, **where.factory)


class _Fused(Structure):
    name = "fused"

    def build(self, content: Mapping[str, Any], where: Where) -> nn.Module:
        self.check_place(where)
        if not where.parts or set(content["parts"]) != set(where.parts):
            raise CheckpointError(f"parts {list(content['parts'])} do not match this layer's parts {list(where.parts)}")
        shape = (where.shape[0] // len(where.parts), where.shape[1])
        inner = replace(where, shape=shape, parts=())
        own = {part: content["parts"][part] for part in where.parts}
        return FusedLinear({part: STRUCTURES.get(spec["structure"]).build(spec, inner) for part, spec in own.items()})


DENSE, FUSED = _Dense(), _Fused()


def dense_cache_bytes(model: nn.Module) -> int:
    """Bytes that `cache_dense` may take for `model` at most, in the dtype it has now; nothing is changed.

    Only layers that would be faster with a kept weight for some number of tokens count: the dense weight of a
    Kronecker layer, the output factor of a low-rank one. Works on the meta device.
    """
    return sum(out * columns * next(layer.parameters()).element_size() for layer, (out, columns) in _keepers(model))


def cache_dense(model: nn.Module, on: bool = True) -> int:
    """Let the structured layers of `model` keep the weights they build, for faster inference; or let them free these.

    A weight is built when a call first wants it, and used in eval mode without gradients only. `model.train()`, a move
    to another device or dtype and every change of a parameter free it; it is never saved. Results agree with those
    without the cache up to rounding. Compiled models (`torch.compile`) run as without it.

    Args:
        on: False frees what is kept and builds weights for each call again.

    Returns:
        The bytes it may take at most (`dense_cache_bytes`), 0 when switched off.
    """
    layers = [module for module in model.modules() if isinstance(module, StructuredLinear)]
    for layer in layers:
        layer.keep(False)
    if not on:
        return 0
    for layer, _ in _keepers(model):
        layer.keep()
    return dense_cache_bytes(model)


def _keepers(model: nn.Module) -> Iterator[tuple[StructuredLinear, tuple[int, int]]]:
    for module in model.modules():
        if isinstance(module, StructuredLinear) and (shape := module.kept_shape()) is not None:
            yield module, shape
