"""What a member is worth in a slot: the arithmetic shared by every move of the permutation search.

All moves see one side as n members (rows, or columns) in groups of k slots:
    x (n, m_a, m_b)    the members, the other side arranged in its groups (m_a) and slots (m_b)
    basis (k, m_b, rank)   orthonormal basis Q of the block subspace, this side's slot first
    groups (g, k)      the member in every slot
The energy captured is Σ_groups ‖S_g‖² with S_g = Σ_slots V[member, slot] and V[c, t] = x_c Q_t, (m_a, rank). With
R = S_g − V[c, t] the rest of the group, member c' in that slot would bring ‖V[c', t]‖² + 2⟨V[c', t], R⟩, and
⟨V[c', t], R⟩ = ⟨x_c', R Q_tᵀ⟩: one matrix product scores every member against every place.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

GROUPS_AT_ONCE = 384  # an assignment is solved over at most this many groups: its cost grows with their cube
GROUPS_AT_ONCE_LARGE = 192  # the same where there are more than LARGE numbers to arrange
LARGE = 1 << 20  # above this a search settles for a little less, to stay within seconds
NUMBERS_AT_ONCE = 1 << 24  # x is gathered for at most this many numbers at a time


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


def energies(x: Tensor, basis: Tensor) -> Tensor:
    """‖V[c, t]‖² of every member in every slot: (n, k)."""
    grams = x.transpose(1, 2) @ x  # (n, m_b, m_b)
    return grams.flatten(1) @ (basis @ basis.transpose(1, 2)).flatten(1).T


def sums(x: Tensor, basis: Tensor, groups: Tensor) -> Tensor:
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


def loosen(x: Tensor, basis: Tensor, groups: Tensor, slots: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Take one member out of every group: these members (g, m_a, m_b), and R (g, m_a, rank) of what is left.

    `slots` (g,) says from where; `total` holds the groups' `sums`.
    """
    loose = x[groups.gather(1, slots[:, None])[:, 0]]
    return loose, total - loose @ basis[slots]


def pulls(rest: Tensor, basis: Tensor, slots: Tensor) -> Tensor:
    """R Q_tᵀ of every group and its open slot: (g, m_a, m_b)."""
    return rest @ basis[slots].transpose(1, 2)


def refill(x: Tensor, basis: Tensor, groups: Tensor, slots: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Take the member out of slot `slots[g]` of every group g and hand these members back optimally.

    Returns the groups and their sums.
    """
    loose, rest = loosen(x, basis, groups, slots, total)
    pull = pulls(rest, basis, slots)
    gain = 2.0 * pull.flatten(1) @ loose.flatten(1).T + energies(loose, basis)[:, slots].T
    order = match(gain)
    taken = groups.gather(1, slots[:, None])
    return groups.scatter(1, slots[:, None], taken[order]), rest + loose[order] @ basis[slots]
