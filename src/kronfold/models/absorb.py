"""Permutations that cost nothing at run time: reorder channels of the network so that its layers need fewer gathers.

A decoder computes the same function when the hidden units of a feed-forward part, the value channels inside a head, the
query and key channels inside a head, or the channels of the whole residual stream are reordered in every weight that
touches them. So a gather that a Kronecker layer holds on such a side can move into its neighbours.

Everywhere: channel i of the new order is channel `perm[i]` of the old one. Logits stay equal up to the order in which
sums are added up; bitwise equal where every reader of the channels is a Kronecker layer that gathers them, because its
factors then meet the same numbers in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kronfold.base.errors import InputError
from kronfold.models.families import FAMILIES, Family, family_of
from kronfold.models.linear_view import is_tied
from kronfold.models.ports import Port, check_ports, readers, writer
from kronfold.structures.layer import structured_modules

Moves = list[tuple[Port, Tensor]]


@dataclass(frozen=True)
class Gather:
    """An index buffer of a structured layer, applied on every call: its dotted name and its bytes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class AbsorbReport:
    """Attributes:
    absorbed: gathers that are gone. remaining: gathers the model still holds.
    bytes_before, bytes_after: of all gathers.
    """

    absorbed: list[Gather]
    remaining: list[Gather]
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """The `gathers` entry of result documents: how many are gone, the names of those that stay and their bytes."""
        return {
            "absorbed": len(self.absorbed),
            "remaining": [gather.name for gather in self.remaining],
            "bytes": self.bytes_after,
        }

    def __str__(self) -> str:
        return (
            f"{len(self.absorbed)} gathers absorbed, {len(self.remaining)} remain "
            f"({self.bytes_before:,} -> {self.bytes_after:,} bytes)"
        )


def remaining_gathers(model: PreTrainedModel) -> list[Gather]:
    """Every gather the model runs, in model order: the integer buffers of its structured modules, with them the order
    of tokens in a grouped embedding (`position`). Works on the meta device.
    """
    return [
        Gather(f"{name}.{key}", buffer.numel() * buffer.element_size())
        for name, module in structured_modules(model)
        for key, buffer in module.named_buffers()
        if not buffer.is_floating_point()
    ]


def expected_gathers(skeleton: PreTrainedModel) -> AbsorbReport:
    """What `absorb(model, residual=False)` will do to a model of this structure, told without its permutations.

    It supposes that no two gathers agree and that none which spans several heads stays inside them; where a search ends
    that way by chance fewer remain. Of a family without a record none is absorbed.

    Args:
        skeleton: with the gathers as fitting leaves them; their numbers are not read (meta device).
    """
    family = family_of(skeleton)
    freed: set[str] = set()
    for block in range(0 if family.generic else _depth(skeleton, family)):
        hidden = _hidden_ports(skeleton, family, block)
        freed |= _freed(hidden, hidden)
        heads, kv_heads, _ = _heads(skeleton, family, block)
        value = _query_key_value(skeleton, family, block)[2]
        output = readers(skeleton, family.block_name(block, family.attention_output[0]))
        inside = [*([value] if kv_heads == 1 else []), *(output if heads == 1 else [])]
        freed |= _freed([value, *output], inside)
    before = remaining_gathers(skeleton)
    return _report(before, [gather for gather in before if gather.name not in freed])


def _freed(ports: list[Port], undoable: list[Port]) -> set[str]:
    """The gather that `_reorder_best` removes from ports whose gathers all differ; none if another gets a new one."""
    if any(port.fault or (port.holds_gather and port.gather is None) for port in ports):
        return set()
    held = [port for port in undoable if port.gather is not None]
    return {f"{port.name}.gather_{port.side}" for port in held[:1]}


def permute_hidden_units(model: PreTrainedModel, block: int, perm: Tensor) -> None:
    """Reorder the hidden units of a feed-forward part, in place; any permutation. perm: (hidden units,).

    Raises InputError before anything is changed: no permutation of that length, an unknown block or model type.
    """
    family = _known(model)
    ports = _hidden_ports(model, family, _block(model, family, block))
    perm = _permutation(perm, (ports[0].size,))
    _carry_out(_alike(ports, perm))


def permute_value_channels(model: PreTrainedModel, block: int, perm: Tensor) -> None:
    """Reorder the value channels inside each head of keys and values, in place. perm: (kv heads, head width), each row
    a permutation of its head's channels; all query heads of a group follow.

    Raises InputError before anything is changed.
    """
    family = _known(model)
    block = _block(model, family, block)
    perm = _permutation(perm, _heads(model, family, block)[1:])
    _carry_out(_value_moves(model, family, block, perm))


def permute_query_key_channels(model: PreTrainedModel, block: int, perm: Tensor) -> None:
    """Reorder query and key channels inside each head alike, in place. perm: (kv heads, head width).

    Raises InputError before anything is changed; always for a family with rotary positions. There each pair of
    channels turns at a frequency of its own, the same table for all heads, so no reordering leaves the scores as
    they are.
    """
    family = _known(model)
    if family.rotary:
        raise InputError(
            f"Models of type {family.model_type!r} turn every pair of query and key channels at its own frequency "
            "(rotary positions); they cannot be reordered. Value channels and hidden units can."
        )
    block = _block(model, family, block)
    heads, kv_heads, width = _heads(model, family, block)
    perm = _permutation(perm, (kv_heads, width))
    query, key, _ = _query_key_value(model, family, block)
    _carry_out([(query, _spread(perm, heads // kv_heads)), (key, _spread(perm, 1))])


def permute_residual(model: PreTrainedModel, perm: Tensor) -> None:
    """Reorder the channels of the residual stream in the whole model, in place; any permutation. perm: (width,).

    Raises InputError before anything is changed.
    """
    ports = _residual_ports(model, _known(model))
    perm = _permutation(perm, (ports[0].size,))
    _carry_out(_alike(ports, perm))


def absorb(model: PreTrainedModel, residual: bool = True, blocks: Iterable[int] | None = None) -> AbsorbReport:
    """Remove, in place, the gathers that a reordering of hidden units, value channels or the residual stream saves.

    Each reordering is chosen among those that free one layer of its gather, and made only if the gathers it leaves
    take fewer bytes in all. Biases move along; saving writes the new specs. Channels with a layer that cannot be
    reordered are left as they are.

    Args:
        residual: also reorder the residual stream. Hidden states then no longer agree, channel by channel, with those
            of the original model; say False when they are still to be compared (distillation of features).
        blocks: only the hidden units and value channels of these, None for all. What one block gives does not depend
            on the others, which may be on the meta device.

    Raises InputError for a model without a family record.
    """
    family = _known(model)
    before = remaining_gathers(model)
    for block in range(_depth(model, family)) if blocks is None else blocks:
        hidden = _hidden_ports(model, family, block)
        _reorder_best(_undoing(hidden), partial(_alike, hidden))
        _reorder_best(_value_candidates(model, family, block), partial(_value_moves, model, family, block))
    if residual:
        stream = _residual_ports(model, family)
        _reorder_best(_undoing(stream), partial(_alike, stream))
    return _report(before, remaining_gathers(model))


def _report(before: list[Gather], after: list[Gather]) -> AbsorbReport:
    names = {gather.name for gather in after}
    return AbsorbReport(
        absorbed=[gather for gather in before if gather.name not in names],
        remaining=after,
        bytes_before=sum(gather.bytes for gather in before),
        bytes_after=sum(gather.bytes for gather in after),
    )


# --- what touches which channels --------------------------------------------------------------------------------


def _hidden_ports(model: PreTrainedModel, family: Family, block: int) -> list[Port]:
    into = [writer(model, family.block_name(block, name)) for name in family.mlp_inputs]
    return [*into, *readers(model, family.block_name(block, family.mlp_output[0]))]


def _query_key_value(model: PreTrainedModel, family: Family, block: int) -> list[Port]:
    names = [family.block_name(block, name) for name in family.attention_inputs]
    parts = family.parts_of(names[0])
    if parts is None:
        return [writer(model, name) for name in names]
    return [writer(model, names[0], part, parts) for part in parts]


def _residual_ports(model: PreTrainedModel, family: Family) -> list[Port]:
    embeddings = [name for name in (family.embedding, family.positions) if name]
    norms = [family.final_norm] if family.final_norm else []
    reading = [] if family.head is None or is_tied(model, family) else [family.head]
    writing = []
    for block in range(_depth(model, family)):
        norms += [family.block_name(block, norm) for norm in family.norms]
        reading += [family.block_name(block, n) for n in (*family.attention_inputs, *family.mlp_inputs)]
        writing += [family.block_name(block, n) for n in (*family.attention_output, *family.mlp_output)]
    width = model.get_submodule(embeddings[0]).embedding_dim
    vectors = [Port(name, model.get_submodule(name), "out", 0, width) for name in (*embeddings, *norms)]
    return [
        *vectors,
        *(port for name in reading for port in readers(model, name)),
        *(writer(model, name) for name in writing),
    ]


def _value_moves(model: PreTrainedModel, family: Family, block: int, perm: Tensor) -> Moves:
    """perm: (kv heads, head width)."""
    heads, kv_heads, _ = _heads(model, family, block)
    value = _query_key_value(model, family, block)[2]
    output = readers(model, family.block_name(block, family.attention_output[0]))
    return [(value, _spread(perm, 1)), *((port, _spread(perm, heads // kv_heads)) for port in output)]


def _heads(model: PreTrainedModel, family: Family, block: int) -> tuple[int, int, int]:
    """Query heads, heads of keys and values, width of a head."""
    heads = model.config.num_attention_heads
    kv_heads = getattr(model.config, "num_key_value_heads", None) or heads
    return heads, kv_heads, _query_key_value(model, family, block)[2].size // kv_heads


def _spread(perm: Tensor, times: int) -> Tensor:
    """(heads, width), permutations inside each head -> one permutation of all channels, each head `times` times.

    A group of query heads shares one head of keys and values, and stands together (transformers' `repeat_kv`).
    """
    inner = perm.repeat_interleave(times, dim=0)
    return (inner + perm.shape[1] * torch.arange(inner.shape[0])[:, None]).flatten()


# --- choosing and carrying out ----------------------------------------------------------------------------------


def _alike(ports: list[Port], perm: Tensor) -> Moves:
    return [(port, perm) for port in ports]


def _undoing(ports: list[Port]) -> Iterator[Tensor]:
    for port in ports:
        perm = port.undoing()
        if perm is not None:
            yield perm.cpu()


def _value_candidates(model: PreTrainedModel, family: Family, block: int) -> Iterator[Tensor]:
    """The reorderings (kv heads, head width) that undo a gather which stays inside heads."""
    _, kv_heads, width = _heads(model, family, block)
    identity = torch.arange(width).expand(kv_heads, width)
    for port, _ in _value_moves(model, family, block, identity):
        perm = port.undoing()
        if perm is None:
            continue
        count = perm.numel() // width
        inner = perm.cpu().view(count, width) - width * torch.arange(count)[:, None]
        if inner.min() >= 0 and inner.max() < width:
            yield inner[:: count // kv_heads]  # of each group its first head; where the others differ nothing is saved


def _reorder_best(candidates: Iterator[Tensor], moves_for: Callable[[Tensor], Moves]) -> None:
    """Carry out the candidate that leaves the fewest bytes of gathers, if any saves some."""
    best: Moves | None = None
    least = None
    for perm in candidates:
        moves = moves_for(perm)
        if any(port.fault for port, _ in moves):
            return
        if least is None:
            least = sum(port.size for port, _ in moves if port.gather is not None)
        left = sum(_is_kept(port, own) * port.size for port, own in moves if port.holds_gather)
        if left < least:
            best, least = moves, left
    if best is not None:
        _carry_out(best)


def _is_kept(port: Port, perm: Tensor) -> bool:
    gather = port.gather_after(perm.to(next(port.layer.parameters()).device))
    return not torch.equal(gather, torch.arange(gather.numel(), device=gather.device))


def _carry_out(moves: Moves) -> None:
    check_ports([port for port, _ in moves])
    for port, perm in moves:
        port.permute(perm)


def _known(model: PreTrainedModel) -> Family:
    family = family_of(model)
    if family.generic:
        raise InputError(
            f"What reads what is not known for models of type {family.model_type!r}, so their channels cannot be "
            f"reordered. Known: {', '.join(FAMILIES.names())}."
        )
    return family


def _depth(model: PreTrainedModel, family: Family) -> int:
    return len(list(model.get_submodule(family.blocks).children()))


def _block(model: PreTrainedModel, family: Family, block: int) -> int:
    depth = _depth(model, family)
    if not 0 <= block < depth:
        raise InputError(f"Block {block} is not in this model; it has blocks 0 to {depth - 1}.")
    return block


def _permutation(perm: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`perm` as int64 on the CPU. Raises InputError unless each row permutes 0 ... shape[-1] - 1."""
    rows = perm.detach().long().cpu()
    if tuple(rows.shape) != tuple(shape) or not bool((rows.sort(-1).values == torch.arange(shape[-1])).all()):
        raise InputError(
            f"Needed: {'a permutation' if len(shape) == 1 else 'a permutation in each row'}, of shape {tuple(shape)}, "
            f"of the numbers 0 to {shape[-1] - 1}; given: shape {tuple(rows.shape)}. The model is unchanged."
        )
    return rows
