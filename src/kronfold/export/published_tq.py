"""Read a published TQCompressedGPT2 state dict into a kronfold model with the same logits.

The layers of that checkpoint, as they are described (no code of theirs is used):

- `kn_pr_Conv1D`, in place of a Conv1D (in, out): `A` (r, n1, m1), `B` (r, m2, n2), bias `b` (m1·m2), gathers `p_inv`
  (n1·n2) and `q` (m1·m2). Forward: `index_select(x, p_inv)`, seen as (n1, n2), times B, times A, seen as m1·m2 outputs,
  `index_select(q)`, plus b. So A_kᵀ ⊗ B_k is the canonical weight (out, in).
- `kn_Embedding`: `embedding.weight` (V, k), `B` (1, d), gather `p` (k·d): the stored row times B, as k·d columns,
  `index_select(p)`. Its `embedding` may be such a module again.
- The LM head is a dense matrix of its own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from kronfold.base.errors import CheckpointError, InputError, KronfoldError
from kronfold.export.quantizer import attach
from kronfold.models.place import build_skeleton
from kronfold.structures.permutations import drop_identity

_BODY = "transformer."
_HEAD = "lm_head.weight"
_HEAD_SIZE = 64  # channels of an attention head in every published GPT-2
_MASKS = re.compile(r".*\.attn\.(bias|masked_bias)")  # causal masks that older versions of transformers saved


@dataclass
class _Translated:
    """Specs by module name, tensors by the names of the kronfold model, keys of the source that were used."""

    specs: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def model_from_tq(
    state: Mapping[str, Tensor], config: GPT2Config | None = None, heads: int | None = None
) -> GPT2LMHeadModel:
    """The model of a published state dict, in eval mode and in the dtype of its position embedding.

    Args:
        state: names -> tensors. A missing `lm_head.weight` means a head tied to the embedding; one that is there stays
            a matrix of its own, unless the embedding is dense and equal to it.
        config: for what tensors do not tell (heads, activation, epsilon); None: GPT-2's own, with heads of 64 channels.
        heads: number of attention heads, whatever `config` says.

    Raises:
        CheckpointError: what is missing, not understood, or of another shape, all at once. InputError: heads that do
            not divide the width.
    """
    state = {_named(key): value for key, value in state.items() if not _MASKS.fullmatch(key)}
    made = _embedding(state)
    for prefix in sorted(key.removesuffix(".A") for key in state if key.endswith(".A")):
        _linear(state, prefix, made)
    for key, value in state.items():
        if key not in made.used:
            made.tensors[key] = value
    tied = _ties(made)
    config = _config_of(made.tensors, config, heads, tied)
    model = GPT2LMHeadModel(config).to(made.tensors[_BODY + "wpe.weight"].dtype).eval()
    if made.specs:
        try:
            build_skeleton(model, made.specs)
        except KronfoldError as error:
            raise CheckpointError(f"The published state dict does not describe a GPT-2: {error}") from error
    _fill(model, made.tensors, tied)
    if made.specs:
        attach(model)
    return model


def _named(key: str) -> str:
    return key if key.startswith((_BODY, "lm_head.")) else _BODY + key


def _taken(state: Mapping[str, Tensor], key: str, dims: int, made: _Translated) -> Tensor:
    if key not in state or state[key].dim() != dims:
        found = f"is {tuple(state[key].shape)}" if key in state else "is missing"
        raise CheckpointError(
            f"{key} {found}; a tensor of {dims} dimension{'s' * (dims > 1)} is expected. This is no complete "
            "TQCompressedGPT2 state dict; take it from model.state_dict() of the loaded model."
        )
    made.used.add(key)
    return state[key]


def _gather(state: Mapping[str, Tensor], key: str, size: int, made: _Translated) -> Tensor | None:
    """The gather under a key as int32 (size,), None for the identity or where there is none."""
    if key not in state:
        return None
    found = _taken(state, key, 1, made).long()
    if not torch.equal(found.sort().values, torch.arange(size)):
        raise CheckpointError(f"{key} {tuple(found.shape)} is no permutation of 0 to {size - 1}; the file is damaged.")
    moved = drop_identity(found)
    return None if moved is None else moved.int()


def _embedding(state: Mapping[str, Tensor]) -> _Translated:
    made, prefix, name = _Translated(), _BODY + "wte", _BODY + "wte"
    levels: list[dict[str, Any]] = []
    factors: list[tuple[str, Tensor]] = []
    while f"{prefix}.B" in state:
        small = _taken(state, f"{prefix}.B", 2, made)
        if small.shape[0] != 1:
            raise CheckpointError(f"{prefix}.B is {tuple(small.shape)}; one row (1, d) is expected.")
        factors.append((prefix, small))
        prefix += ".embedding"
    weight = _taken(state, f"{prefix}.weight", 2, made)
    made.tensors[name + ".weight"] = weight
    width = weight.shape[1]
    for depth, (place, small) in reversed(list(enumerate(factors))):
        width *= small.shape[1]
        gather = _gather(state, f"{place}.p", width, made)
        levels.insert(0, {"block": small.shape[1], "rank": 1, "permute": gather is not None})
        made.tensors[f"{name}.levels.{depth}.b"] = small
        if gather is not None:
            made.tensors[f"{name}.levels.{depth}.gather"] = gather
    if levels:
        made.specs[name] = {"structure": "factorized_embedding", "levels": levels}
    return made


def _linear(state: Mapping[str, Tensor], name: str, made: _Translated) -> None:
    a, b = _taken(state, f"{name}.A", 3, made), _taken(state, f"{name}.B", 3, made)
    bias = _taken(state, f"{name}.b", 1, made)
    (rank, n1, m1), (_, m2, n2) = a.shape, b.shape
    if b.shape[0] != rank or bias.numel() != m1 * m2:
        raise CheckpointError(
            f"{name}: A {tuple(a.shape)} (r, n1, m1), B {tuple(b.shape)} (r, m2, n2) and b {tuple(bias.shape)} (m1·m2) "
            "do not belong together."
        )
    gather_in = _gather(state, f"{name}.p_inv", n1 * n2, made)
    gather_out = _gather(state, f"{name}.q", m1 * m2, made)
    made.specs[name] = {
        "structure": "kronecker",
        "a": [m1, n1],
        "b": [m2, n2],
        "rank": rank,
        "permute_in": gather_in is not None,
        "permute_out": gather_out is not None,
    }
    made.tensors |= {f"{name}.a.weight": a.transpose(1, 2).flatten(0, 1), f"{name}.b": b, f"{name}.bias": bias}
    for side, gather in (("in", gather_in), ("out", gather_out)):
        if gather is not None:
            made.tensors[f"{name}.gather_{side}"] = gather


def _ties(made: _Translated) -> bool:
    """Whether the head reads the embedding; if so, the head's own copy is dropped and its spec set."""
    embedding = made.tensors[_BODY + "wte.weight"]
    head = made.tensors.get(_HEAD)
    structured = _BODY + "wte" in made.specs
    if head is not None and (structured or not torch.equal(head, embedding)):
        return False
    made.tensors.pop(_HEAD, None)
    if structured:
        made.specs["lm_head"] = {"structure": "tied_head"}
    return True


def _config_of(tensors: Mapping[str, Tensor], given: GPT2Config | None, heads: int | None, tied: bool) -> GPT2Config:
    """`given` with the sizes that the tensors have."""
    if _BODY + "wpe.weight" not in tensors:
        raise CheckpointError(f"{_BODY}wpe.weight is missing: this is no complete GPT-2 state dict.")
    positions, width = tensors[_BODY + "wpe.weight"].shape
    blocks = [int(found[1]) for key in tensors if (found := re.match(r"transformer\.h\.(\d+)\.", key))]
    inner = tensors.get(_BODY + "h.0.mlp.c_fc.bias")
    if not blocks or inner is None:
        raise CheckpointError("There is no transformer.h.0.mlp.c_fc: this is no complete GPT-2 state dict.")
    config = GPT2Config() if given is None else copy.deepcopy(given)
    for name in ("auto_map", "quantization_config"):  # ours is a plain GPT-2
        config.__dict__.pop(name, None)
    heads = heads or (config.n_head if given is not None else width // _HEAD_SIZE)
    if heads < 1 or width % heads:
        raise InputError(
            f"{heads} attention heads do not divide the width {width}. The state dict does not say how many there are; "
            "give --heads."
        )
    config.update(
        {
            "vocab_size": tensors[_BODY + "wte.weight"].shape[0],
            "n_positions": positions,
            "n_embd": width,
            "n_layer": max(blocks) + 1,
            "n_head": heads,
            "n_inner": inner.numel(),
            "tie_word_embeddings": tied,
        }
    )
    return config


def _fill(model: GPT2LMHeadModel, tensors: Mapping[str, Tensor], tied: bool) -> None:
    """Load `tensors`. Raises CheckpointError with all that does not fit, before anything is loaded."""
    expected = model.state_dict()
    names = {name for name in expected if not (tied and name == _HEAD)}
    faults = [f"missing: {name}" for name in sorted(names - set(tensors))]
    faults += [f"not understood: {name} {tuple(tensors[name].shape)}" for name in sorted(set(tensors) - names)]
    faults += [
        f"{name}: shape {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(names & set(tensors))
        if tensors[name].shape != expected[name].shape
    ]
    if faults:
        more = f"\n  … and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(
            "The state dict is no TQCompressedGPT2 that kronfold understands:\n  " + "\n  ".join(faults[:8]) + more
        )
    model.load_state_dict(dict(tensors), strict=False)
