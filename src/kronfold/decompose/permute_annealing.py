"""Random restarts and simulated annealing, as the signatures of TQCompressor's released code hint (2401.16367).

One step pairs all groups at random, proposes to swap one random member of each pair of groups, and accepts every
swap on its own by the Metropolis rule: the pairs are disjoint, so their gains add up exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronfold.decompose.permute_assignment import assign
from kronfold.decompose.permute_gains import chunks, energies, loosen, pulls, sums
from kronfold.decompose.permute_starts import shuffled
from kronfold.decompose.permute_state import Arrangement, Search, Side

RESTARTS = 2  # the identity, then random arrangements
STAGES = 12  # temperatures; the basis is refitted after each
STEPS = 12  # proposals per group and temperature
HOT, COLD = 1.0, 0.01  # first and last temperature, in units of the typical change a swap makes


def anneal(search: Search) -> None:
    """Method "annealing": the best over the restarts, each cooled and then finished by alternating assignment."""
    for restart in range(RESTARTS):
        if search.done:
            break
        state = search.identity if restart == 0 else shuffled(search)
        for stage in range(STAGES):
            temperature = HOT * (COLD / HOT) ** (stage / (STAGES - 1))
            for side in search.sides:
                state = _cool(search, state, side, temperature)
            search.accept(state)
        search.descend(state, [assign])


def _cool(search: Search, state: Arrangement, side: Side, temperature: float) -> Arrangement:
    x, basis, groups = search.view(state, side)
    groups = groups.clone()
    for part in chunks(groups, x.shape[0], x[0].numel(), search.generator):
        for _ in range(STEPS):
            groups[part] = _metropolis(x, basis, groups[part], temperature, search.generator)
    return search.refit(state, side, groups)


def _metropolis(x: Tensor, basis: Tensor, groups: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    g, k = groups.shape
    order = torch.randperm(g, generator=generator)[: g - g % 2]
    slots = torch.randint(k, (len(order),), generator=generator)
    chosen, place = groups[order], torch.arange(len(order))
    loose, rest = loosen(x, basis, chosen, slots, sums(x, basis, chosen))
    pull = pulls(rest, basis, slots)
    alone = energies(loose, basis)
    partner = place.view(-1, 2).flip(1).reshape(-1)  # neighbours in the random order trade
    own = alone[place, slots] + 2.0 * (pull * loose).sum((1, 2))
    other = alone[partner, slots] + 2.0 * (pull * loose[partner]).sum((1, 2))
    gain = (other - own).view(-1, 2).sum(1)
    unit = temperature * gain.abs().mean().clamp_min(torch.finfo(gain.dtype).tiny)
    accepted = torch.rand(len(gain), generator=generator) < (gain / unit).clamp(max=0.0).exp()
    swap = accepted.repeat_interleave(2)
    groups = groups.clone()
    taken = chosen[place, slots]
    groups[order, slots] = torch.where(swap, taken[partner], taken)
    return groups
