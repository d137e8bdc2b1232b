"""Moves of the permutation search: ways to deal the members of one side to its groups anew.

Every move sees one side (rows, or columns) as n members in groups of k slots, the other side held fixed:
    x (n, m_a, m_b)        the members, the other side arranged in its groups (m_a) and slots (m_b)
    basis (k, m_b, rank)   orthonormal basis Q of the block subspace, this side's slot first
    groups (g, k)          the member in every slot
and returns new groups. For a fixed basis the energy captured is Σ_groups ‖S_g‖² with S_g = Σ_slots V[member, slot] and
V[c, t] = x_c Q_t, (m_a, rank). With R = S_g − V[c, t] the rest of the group, member c' in that slot would bring
‖V[c', t]‖² + 2⟨V[c', t], R⟩, and ⟨V[c', t], R⟩ = ⟨x_c', R Q_tᵀ⟩: one matrix product scores every member against every
place. No move can lower the energy at the basis it was given; refitting the basis cannot lose either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

GROUPS_AT_ONCE = 384  # an assignment is solved over at most this many groups: its cost grows with their cube
GROUPS_AT_ONCE_LARGE = 192  # the same where there are more than LARGE numbers to arrange
LARGE = 1 << 20  # above this a search settles for a little less, to stay within seconds
NUMBERS_AT_ONCE = 1 << 24  # x is gathered for at most this many numbers at a time
MEMBERS_AT_ONCE = 1024  # a score matrix of members against members is at most this square
PAIR_ROUNDS = 2
ROUNDS = 4  # mutual-best rounds per score matrix


def assign(x: Tensor, basis: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """Slot by slot, all groups hand out their members of that slot again, optimally: one pass over the slots.

    With the other slots fixed this is a linear assignment problem, and the present arrangement is feasible.
    """
    groups = groups.clone()
    for part in chunks(groups, x.shape[0], x[0].numel(), generator):
        dealt = groups[part]
        total = _sums(x, basis, dealt)
        for slot in range(groups.shape[1]):
            dealt, total = _refill(x, basis, dealt, torch.full((len(part),), slot), total)
        groups[part] = dealt
    return groups


def exchange(x: Tensor, basis: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """Random exchange: a large neighbourhood search whose neighbourhood is a whole assignment problem.

    Every group gives up the member of one slot, drawn at random, and all of these members are handed back optimally:
    unlike in `assign`, members change slots. As many rounds as there are slots, so that every member is loose once on
    average; pairs have a way of their own.
    """
    groups = groups.clone()
    for part in chunks(groups, x.shape[0], x[0].numel(), generator):
        dealt = groups[part]
        g, k = dealt.shape
        if k == 2:
            groups[part] = _exchange_pairs(x, basis, dealt, generator)
            continue
        total = _sums(x, basis, dealt)
        for _ in range(k):
            slots = torch.randint(k, (g,), generator=generator)
            dealt, total = _refill(x, basis, dealt, slots, total)
        groups[part] = dealt
    return groups


def _exchange_pairs(x: Tensor, basis: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """Groups of two: the energy of every ordered pair at once, so a pair chooses its order too.

    Matching between random halves, repeated, comes close to a maximum-weight matching at a fraction of its cost.
    """
    names = groups.reshape(-1)
    x = x[names]
    alone = _energies(x, basis)
    cross = x.flatten(1) @ (x @ (basis[1] @ basis[0].T)).flatten(1).T
    ordered = alone[:, :1] + alone[:, 1] + 2.0 * cross  # [c, d]: c in slot 0, d in slot 1
    either = torch.maximum(ordered, ordered.T)
    first, second = torch.arange(len(names)).view(-1, 2).unbind(1)
    for _ in range(PAIR_ROUNDS):
        turn = torch.rand(len(first), generator=generator) < 0.5
        stay, loose = torch.where(turn, second, first), torch.where(turn, first, second)
        loose = loose[match(either[stay][:, loose])]
        keep = ordered[stay, loose] >= ordered[loose, stay]
        first, second = torch.where(keep, stay, loose), torch.where(keep, loose, stay)
    return names[torch.stack([first, second], dim=1)]


def swap(x: Tensor, basis: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """2-opt, vectorised: the gain of swapping any two members from one matrix product, many swaps per sweep.

    Swaps that touch different groups do not see each other, so their gains add up exactly.
    """
    groups = groups.clone()
    for part in chunks(groups, MEMBERS_AT_ONCE, x[0].numel(), generator):
        dealt = groups[part]
        g, k = dealt.shape
        members = x[dealt.reshape(-1)]
        total, alone = _sums(x, basis, dealt), _energies(members, basis)
        worth = members.new_empty(g, k, g * k)  # [place, member]: what the member would bring at that place
        for t in range(k):
            rest = total - x[dealt[:, t]] @ basis[t]
            worth[:, t] = alone[:, t] + 2.0 * (rest @ basis[t].T).flatten(1) @ members.flatten(1).T
        worth = worth.flatten(0, 1)
        own = worth.diagonal()
        gain = (worth - own[:, None]) + (worth - own[:, None]).T  # members at places p and q change places
        best, which = gain.view(g, k, g, k).permute(0, 2, 1, 3).reshape(g, g, k * k).max(dim=2)
        best.fill_diagonal_(-torch.inf)  # two slots of one group: the gains above do not hold
        for p, q in mutual_best(best, 1e-6 * float(own.abs().max())):
            slot_p, slot_q = which[p, q] // k, which[p, q] % k
            dealt[p, slot_p], dealt[q, slot_q] = dealt[q, slot_q], dealt[p, slot_p]
        groups[part] = dealt
    return groups


def alike(x: Tensor, basis: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """Groups of members that look alike, whatever the basis: a start, not an improvement of `groups`.

    Largest member first: it takes the k − 1 free members that point its way most; by size into the slots.
    """
    groups = groups.clone()
    for part in chunks(groups, MEMBERS_AT_ONCE, x[0].numel(), generator):
        names = groups[part].reshape(-1)
        flat = x[names].flatten(1)
        size = flat.norm(dim=1)
        likeness = flat @ (flat / size.clamp_min(1e-30)[:, None]).T  # [leader, follower], cosine times leader's size
        order = size.argsort(descending=True, stable=True)
        likeness.fill_diagonal_(-torch.inf)
        free = [True] * len(names)
        teams = []
        for leader in order.tolist():
            if not free[leader]:
                continue
            team = [leader, *likeness[leader].topk(groups.shape[1] - 1).indices.tolist()]
            likeness[:, team] = -torch.inf
            for member in team:
                free[member] = False
            teams.append(team)
        dealt = torch.tensor(teams).view(len(part), -1)
        groups[part] = names[dealt.gather(1, order.argsort()[dealt].argsort(dim=1))]
    return groups


def chunks(groups: Tensor, members: int, width: int, generator: torch.Generator) -> list[Tensor]:
    """The group indices in random, equal parts small enough for one move; one part when everything fits.

    A part holds at most `members` members; `width` is the count of numbers in each.
    """
    g, k = groups.shape
    most = GROUPS_AT_ONCE if g * k * width <= LARGE else GROUPS_AT_ONCE_LARGE
    limit = max(2, min(most, members // k, NUMBERS_AT_ONCE // (k * width)))
    if g <= limit:
        return [torch.arange(g)]
    return list(torch.randperm(g, generator=generator).tensor_split(-(-g // limit)))


def _refill(x: Tensor, basis: Tensor, groups: Tensor, slots: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Take the member out of slot `slots[g]` of every group g and hand these members back optimally.

    `total` holds the groups' `_sums`. Returns the groups and their sums.
    """
    taken = groups.gather(1, slots[:, None])
    loose = x[taken[:, 0]]  # (g, m_a, m_b)
    rest = total - loose @ basis[slots]  # R, (g, m_a, rank)
    pull = rest @ basis[slots].transpose(1, 2)  # R Q_tᵀ, (g, m_a, m_b)
    gain = 2.0 * pull.flatten(1) @ loose.flatten(1).T + _energies(loose, basis)[:, slots].T
    order = match(gain)
    return groups.scatter(1, slots[:, None], taken[order]), rest + loose[order] @ basis[slots]


def _energies(x: Tensor, basis: Tensor) -> Tensor:
    """‖V[c, t]‖² of every member in every slot: (n, k)."""
    grams = x.transpose(1, 2) @ x  # (n, m_b, m_b)
    return grams.flatten(1) @ (basis @ basis.transpose(1, 2)).flatten(1).T


def _sums(x: Tensor, basis: Tensor, groups: Tensor) -> Tensor:
    """S_g of every group: (g, m_a, rank)."""
    total = x[groups[:, 0]] @ basis[0]
    for slot in range(1, groups.shape[1]):
        total += x[groups[:, slot]] @ basis[slot]
    return total


def match(gain: Tensor) -> Tensor:
    """For every row of gain (n, n) its column in the assignment with the largest sum.

    Taking off row and column means leaves the optimum where it is and makes the solver two to three times faster.
    """
    centred = gain - gain.mean(0, keepdim=True)
    centred -= centred.mean(1, keepdim=True)
    return torch.from_numpy(linear_sum_assignment(centred.double().numpy(), maximize=True)[1])


def mutual_best(table: Tensor, floor: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Disjoint pairs p < q, each the best above `floor` for both, a few rounds over: index tensors (pairs,) per round.

    Args:
        table: (n, n), symmetric, -inf where a pair is not allowed; overwritten.
    """
    index = torch.arange(len(table))
    for _ in range(ROUNDS):
        top, partner = table.max(dim=1)
        chosen = (partner[partner] == index) & (index < partner) & (top > floor)
        if not chosen.any():
            return
        p, q = index[chosen], partner[chosen]
        yield p, q
        used = torch.cat([p, q])
        table[used] = -torch.inf
        table[:, used] = -torch.inf
