"""Weighted Kronecker sums: alternating least squares on `tr(G (W − Σ_k A_k ⊗ B_k) H (W − Σ_k A_k ⊗ B_k)ᵀ)`.

For fixed B's the objective is quadratic in all A's together, and the other way round. With R the rearrangement of
Van Loan and Pitsianis (1993), the normal equations of the A's read `R(G K H) B = R(G W H) B`, B the B_k as columns.
Without G they are the same (rank·in_a) square system for every row of A. The B's need one (rank·out_b·in_b) system.

Letters in the contractions: i, j index A's rows and columns; s, t those of B; k the term.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronfold.decompose.weighting import Weighting
from kronfold.structures.kronecker.matrix import Fit, rearrange, to_dense

SWEEPS = 20
TOLERANCE = 1e-4  # a fit ends when a sweep lowers its error by less than this share of it
CG_STEPS = 10  # conjugate gradients per step over the A's where the outputs are weighted
FINE = 1e-6  # squared relative error below which differences cancel and the residual itself is measured


@dataclass(frozen=True)
class Problem:
    """A weight and its metric, both arranged in groups and slots, float64.

    Attributes:
        weight: W (out, in). weighting: checked; its inputs H are never None here.
        product: W H. weighted: G W H. total: tr(G W H Wᵀ).
    """

    weight: Tensor
    weighting: Weighting
    product: Tensor
    weighted: Tensor
    total: float

    @classmethod
    def of(cls, weight: Tensor, weighting: Weighting) -> Problem:
        if weighting.inputs is None:
            weighting = replace(weighting, inputs=torch.eye(weight.shape[1], dtype=torch.float64))
        assert weighting.inputs is not None
        product = weight @ weighting.inputs
        weighted = weighting.times_outputs(product)
        return cls(weight, weighting, product, weighted, float((weight * weighted).sum()))

    def arranged(self, rows: Tensor, cols: Tensor) -> Problem:
        """The problem of `weight[rows][:, cols]`, without computing a product again."""

        def take(matrix: Tensor) -> Tensor:
            return matrix.index_select(0, rows).index_select(1, cols)

        product = take(self.product)
        weighted = product if self.weighted is self.product else take(self.weighted)
        return Problem(take(self.weight), self.weighting.arranged(rows, cols), product, weighted, self.total)

    @property
    def moment(self) -> Tensor:
        """H (in, in)."""
        assert self.weighting.inputs is not None
        return self.weighting.inputs

    def relative_error(self, a: Tensor, b: Tensor) -> float:
        """Measured on the residual."""
        return self.weighting.relative_error(self.weight, to_dense(a, b))


def weighted_fit(weight: Tensor, weighting: Weighting, start: Fit) -> Fit:
    """`start` (for `weight` (out, in)) fitted on under a checked `weighting`; its permutations stay as they are.

    The history holds the weighted relative errors, from that of `start` on; it never rises. Without moments `start` is
    the answer already.
    """
    if weighting.inputs is None and weighting.outputs is None:
        return start
    scale = weight.abs().max().double()  # squares of very small or large weights stay finite
    rows = torch.arange(weight.shape[0]) if start.perm_out is None else start.perm_out
    cols = torch.arange(weight.shape[1]) if start.perm_in is None else start.perm_in
    arranged = weight.double()[rows][:, cols] / scale
    problem = Problem.of(arranged, weighting.arranged(start.perm_out, start.perm_in))
    if not problem.total > 0:  # the weight itself costs nothing
        return replace(start, relative_error=0.0, history=[0.0])
    a, b, history = descend(problem, start.a / scale, start.b)
    a, b = _balanced(a, b)
    root = scale.sqrt()
    error = problem.relative_error(a, b)
    history = [max(past, error) for past in history]
    return replace(start, a=a * root, b=b * root, relative_error=error, history=[*history, error])


def descend(
    problem: Problem, a: Tensor, b: Tensor, sweeps: int = SWEEPS, tolerance: float = TOLERANCE
) -> tuple[Tensor, Tensor, list[float]]:
    """Alternate over A's and B's until a sweep gains too little; (a, b, relative errors, the start's first)."""
    history = [problem.relative_error(a, b)]
    for _ in range(sweeps):
        new_a, new_b, error = sweep(problem, a, b)
        if not error < history[-1]:  # converged to rounding
            break
        a, b = new_a, new_b
        history.append(error)
        if history[-2] - error < tolerance * history[-2]:
            break
    return a, b, history


def sweep(problem: Problem, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """All A's, then all B's: (a, b, relative error)."""
    a, b = with_orthonormal_b(a, b)
    a = a_step(problem, a, b)
    b, a = with_orthonormal_b(b, a)
    b, error = b_step(problem, a, b)
    if error < FINE:
        return a, b, problem.relative_error(a, b)
    return a, b, error**0.5


def with_orthonormal_b(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum with orthonormal B's. Its normal equations are then no worse conditioned than H and G are, and
    terms that are zero or alike do no harm: their B's become directions a step can use."""
    q, r = torch.linalg.qr(b.flatten(1).T)
    return torch.einsum("lk,kij->lij", r, a), q.T.reshape(b.shape).contiguous()


def a_step(problem: Problem, a: Tensor, b: Tensor) -> Tensor:
    """The best A's (rank, out_a, in_a) for these orthonormal B's; with weighted outputs, a better set than `a`."""
    (rank, out_a, in_a), (_, out_b, in_b) = a.shape, b.shape
    outputs = problem.weighting.outputs

    def per_row(product: Tensor) -> Tensor:
        """R(product) contracted with the B's, one line per row of A: (out_a, rank·in_a)."""
        scores = rearrange(product, out_b, in_b) @ b.flatten(1).T
        return scores.view(out_a, -1, rank).transpose(1, 2).reshape(out_a, -1)

    normal = a_normal(problem.moment, b)
    x = a.transpose(0, 1).flatten(1)  # one line per row of A, as above
    if outputs is None or out_b == 1:  # for out_b = 1, G stands on both sides and cancels
        x = _solve(normal, per_row(problem.product), x)
        return x.view(out_a, rank, in_a).transpose(0, 1).contiguous()

    # Preconditioned conjugate gradients from `a`: the objective, which is the one they minimise, falls with each step.
    # The preconditioner stands for G ≈ (its mean over B's slots) ⊗ 1: the A-side Kronecker product of that and N.
    inputs = cholesky(normal)
    if outputs.dim() == 1:
        mean = outputs.view(out_a, out_b).mean(1)  # (out_a,)
    else:  # (out_a, out_a), factored
        mean = cholesky(outputs.view(out_a, out_b, out_a, out_b).diagonal(dim1=1, dim2=3).mean(-1))

    def gradient(x: Tensor) -> Tensor:
        dense = to_dense(x.view(out_a, rank, in_a).transpose(0, 1), b)
        return per_row(problem.weighting.times_outputs(dense @ problem.moment))

    def precondition(x: Tensor) -> Tensor:
        x = torch.cholesky_solve(x.T, inputs).T
        return x / mean[:, None] if mean.dim() == 1 else torch.cholesky_solve(x, mean)

    residual = per_row(problem.weighted) - gradient(x)
    step = towards = precondition(residual)
    size = first = float((residual * towards).sum())
    for _ in range(CG_STEPS):
        if not size > 1e-24 * first:
            break
        image = gradient(step)
        length = size / float((step * image).sum())
        x = x + length * step
        residual = residual - length * image
        towards = precondition(residual)
        size, before = float((residual * towards).sum()), size
        step = towards + (size / before) * step
    return x.view(out_a, rank, in_a).transpose(0, 1).contiguous()


def a_normal(moment: Tensor, b: Tensor) -> Tensor:
    """N[(k, j), (l, m)] = Σ_s Σ_tu B_k[s, t] B_l[s, u] H[(j, t), (m, u)]: (rank·in_a) square."""
    rank, _, in_b = b.shape
    in_a = moment.shape[0] // in_b
    pairs = torch.einsum("kst,lsu->kltu", b, b).reshape(rank * rank, in_b * in_b)
    slots = moment.view(in_a, in_b, in_a, in_b).permute(1, 3, 0, 2).reshape(in_b * in_b, in_a * in_a)
    return (pairs @ slots).view(rank, rank, in_a, in_a).transpose(1, 2).reshape(rank * in_a, rank * in_a)


def b_step(problem: Problem, a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """The best B's (rank, out_b, in_b) for these orthonormal A's, and the squared relative error reached."""
    rank, out_b, in_b = b.shape
    normal = _b_normal(problem, a, out_b, in_b)
    right = (a.flatten(1) @ rearrange(problem.weighted, out_b, in_b)).view(rank, out_b, in_b)
    right = right.transpose(0, 1).reshape(1, -1)
    current = b.transpose(0, 1).reshape(1, -1)
    new = _solve(normal, right, current)
    lost = problem.total - float((new * (2.0 * right - new @ normal)).sum())
    return new.view(out_b, rank, in_b).transpose(0, 1).contiguous(), max(0.0, lost) / problem.total


def _b_normal(problem: Problem, a: Tensor, out_b: int, in_b: int) -> Tensor:
    """N[(s, k, t), (v, l, u)] = Σ_jm (A_kᵀ G_sv A_l)[j, m] H[(j, t), (m, u)]: (out_b·rank·in_b) square."""
    rank, out_a, in_a = a.shape
    slots = problem.moment.view(in_a, in_b, in_a, in_b).permute(0, 2, 1, 3).reshape(in_a * in_a, in_b * in_b)
    wide = a.transpose(0, 1).reshape(out_a, rank * in_a)

    def block(gram: Tensor) -> Tensor:
        pairs = gram.view(rank, in_a, rank, in_a).transpose(1, 2).reshape(rank * rank, in_a * in_a)
        square = (pairs @ slots).view(rank, rank, in_b, in_b).transpose(1, 2)
        return square.reshape(rank * in_b, rank * in_b)

    outputs = problem.weighting.outputs
    if outputs is None:
        return torch.block_diag(*[block(wide.T @ wide)] * out_b)
    if outputs.dim() == 1:
        weights = outputs.view(out_a, out_b)
        return torch.block_diag(*[block(wide.T @ (weights[:, s, None] * wide)) for s in range(out_b)])
    parts = outputs.view(out_a, out_b, out_a, out_b)
    blocks = {(s, v): block(wide.T @ (parts[:, s, :, v] @ wide)) for s in range(out_b) for v in range(s, out_b)}
    lines = [[blocks[s, v] if s <= v else blocks[v, s].T for v in range(out_b)] for s in range(out_b)]
    return torch.cat([torch.cat(line, dim=1) for line in lines])


def _solve(normal: Tensor, right: Tensor, current: Tensor) -> Tensor:
    """X with X N = right (n, m), N (m, m). Where N is singular, a damped step from `current`, which cannot lose."""
    factor, failed = torch.linalg.cholesky_ex(normal)
    if not int(failed):
        return torch.cholesky_solve(right.T, factor).T
    identity = torch.eye(normal.shape[0], dtype=normal.dtype)
    ridge = 1e-12 * float(normal.diagonal().mean())
    while int(failed):
        factor, failed = torch.linalg.cholesky_ex(normal + ridge * identity)
        ridge *= 100.0
    return current + torch.cholesky_solve((right - current @ normal).T, factor).T


def cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factor of a semidefinite matrix, damped as little as it takes."""
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype)
    ridge = 0.0
    factor, failed = torch.linalg.cholesky_ex(matrix)
    while int(failed):
        ridge = max(100.0 * ridge, 1e-12 * float(matrix.diagonal().mean()))
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * identity)
    return factor


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum as its own singular terms, as `nearest_kronecker` returns them: by falling size, A_k and B_k with
    equal norms, the largest entry of B_k positive."""
    left, core = torch.linalg.qr(a.flatten(1).T)
    right, other = torch.linalg.qr(b.flatten(1).T)
    u, sizes, vh = torch.linalg.svd(core @ other.T)
    right = right @ vh.T
    lead = right.abs().argmax(0, keepdim=True)
    signs = torch.where(right.gather(0, lead) < 0, -1.0, 1.0)
    root = sizes.sqrt()
    new_a = (left @ u * signs * root).T.reshape(a.shape)
    return new_a.contiguous(), (right * signs * root).T.reshape(b.shape).contiguous()
