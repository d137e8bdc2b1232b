"""The nearest sum of Kronecker products (Van Loan and Pitsianis 1993), no permutations.

The rearrangement R(W) turns Σ_k A_k ⊗ B_k into a matrix of rank `rank` (their section 2), so the best fit is the
truncated SVD of R(W). One side of R(W) is usually tiny (the block holds out_b·in_b numbers), so its right
singular vectors come from a Gram matrix of that size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from kronfold.base.specs import KroneckerSpec
from kronfold.decompose.fit import Fit
from kronfold.decompose.kronecker_als import weighted_fit
from kronfold.ops import kronecker
from kronfold.structures.weighting import Weighting, check_weight

GRAM_SIZE = 1024  # a side of R(W) up to this size is solved through its Gram matrix
CHUNK_NUMBERS = 1 << 22  # float64 numbers rearranged at a time (32 MiB)


def nearest_kronecker(weight: Tensor, spec: KroneckerSpec, weighting: Weighting | None = None) -> Fit:
    """The best `Σ_k A_k ⊗ B_k` for `weight` in Frobenius norm; the permutation flags of `spec` are not used.

    Args:
        weight: (out_features, in_features), any floating dtype; worked on in float64 on the CPU.
        spec: shapes and rank.
        weighting: what errors cost. With one, the best sum in Frobenius norm is where alternating least squares on
            the weighted error starts from; the result is never worse, but a local optimum. Errors are then weighted,
            by the damped moments that were solved with.

    Returns:
        Fit with `perm_in` and `perm_out` None. Terms come in falling order of size, each A_k and B_k with equal
        norms and the largest entry of B_k positive. `relative_error` is exact (measured on the residual).

    Raises:
        ShapeError: the weight is not a matrix of the spec's shape.
        InputError: the weight holds NaN or infinities, or only zeros. Both also as `Weighting.checked` does.

    Source: C. F. Van Loan and N. Pitsianis, "Approximation with Kronecker products", 1993, theorem 2.1.
    """
    if weighting is None:
        return nearest_kronecker_batch([weight], spec)[0]
    weight = check_weight(weight, spec)
    weighting = weighting.checked(spec.shape)
    return weighted_fit(weight, weighting, nearest_kronecker_batch([weight], spec)[0])


def nearest_kronecker_batch(weights: Tensor | Sequence[Tensor], spec: KroneckerSpec) -> list[Fit]:
    """`nearest_kronecker` for many weights of one shape: (n, out_features, in_features) or a list of n matrices.

    Every weight is checked before any is solved. Raises as `nearest_kronecker` does.
    """
    matrices = [check_weight(weight, spec) for weight in weights]
    if not matrices:
        return []
    rows, columns = spec.a[0] * spec.a[1], spec.b[0] * spec.b[1]
    if columns <= rows and columns <= GRAM_SIZE:
        bases = _bases_from_chunks(matrices, spec)
    else:
        bases = [_refined(w, spec, right_basis(kronecker.rearrange(w.double(), *spec.b), spec.rank)) for w in matrices]
    return [_finish(w, basis, spec) for w, basis in zip(matrices, bases, strict=True)]


def right_basis(rearranged: Tensor, rank: int) -> Tensor:
    """The `rank` leading right singular vectors of R(W) (rows, columns), float64, as (columns, rank), largest first.

    Where a Gram matrix is used, directions whose singular value is below 1e-8 of the first are blurred.
    """
    rows, columns = rearranged.shape
    if columns <= min(rows, GRAM_SIZE):
        return top_eigenvectors(rearranged.T @ rearranged, rank)
    if rows <= GRAM_SIZE:
        left = top_eigenvectors(rearranged @ rearranged.T, rank)
        return torch.linalg.qr(rearranged.T @ left).Q
    if rank * 4 > min(rows, columns):
        return torch.linalg.svd(rearranged, full_matrices=False).Vh[:rank].T
    start = np.full(min(rows, columns), min(rows, columns) ** -0.5)  # ARPACK starts at random unless told
    _, values, vectors = svds(rearranged.numpy(), k=rank, v0=start)
    return torch.from_numpy(vectors[np.argsort(-values)].T.copy())


def top_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of a (batch of) symmetric matrix (..., n, n), largest first: (..., n, rank)."""
    return torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)


def _chunks(weight: Tensor, spec: KroneckerSpec) -> Iterator[Tensor]:
    """R(W) in float64, a few block rows at a time, so that no float64 copy of a large weight is made."""
    block_row = spec.b[0] * spec.in_features
    step = max(1, CHUNK_NUMBERS // block_row) * spec.b[0]
    for start in range(0, spec.out_features, step):
        yield kronecker.rearrange(weight[start : start + step].double(), *spec.b)


def _bases_from_chunks(matrices: list[Tensor], spec: KroneckerSpec) -> list[Tensor]:
    """Right singular vectors (out_b·in_b, rank) of every R(W): one batched eigenproblem for all layers."""
    values, vectors = torch.linalg.eigh(torch.stack([_total(r.T @ r for r in _chunks(w, spec)) for w in matrices]))
    bases = list(vectors[..., -spec.rank :].flip(-1))
    blurred = values[:, -spec.rank] < 1e-6 * values[:, -1]  # singular values a thousand times apart
    return [_refined(w, spec, v) if bad else v for w, v, bad in zip(matrices, bases, blurred, strict=True)]


def _total(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _refined(weight: Tensor, spec: KroneckerSpec, basis: Tensor) -> Tensor:
    """One step of subspace iteration, then the singular vectors inside the subspace, largest first.

    A Gram matrix holds squares, so terms below 1e-8 of the first are lost in it; this step brings them back.
    """
    left = torch.linalg.qr(torch.cat([r @ basis for r in _chunks(weight, spec)])).Q
    sizes = [r.shape[0] for r in _chunks(weight, spec)]
    image = _total(r.T @ q for r, q in zip(_chunks(weight, spec), left.split(sizes), strict=True))
    basis = torch.linalg.qr(image).Q
    scores = torch.cat([r @ basis for r in _chunks(weight, spec)])
    return basis @ torch.linalg.svd(torch.linalg.qr(scores).R).Vh.T


def _finish(weight: Tensor, basis: Tensor, spec: KroneckerSpec) -> Fit:
    """Factors from the right singular vectors: A = R(W) V, then balance, fix signs, and measure the residual."""
    lead = basis.abs().argmax(0, keepdim=True)
    basis = basis * torch.where(basis.gather(0, lead) < 0, -1.0, 1.0)
    scores, residual, total = [], 0.0, 0.0
    scale = float(torch.linalg.vector_norm(weight, torch.inf))  # squares of very small or large weights stay finite
    for r in _chunks(weight, spec):
        r = r / scale
        score = r @ basis
        residual += float((r - score @ basis.T).square().sum())
        total += float(r.square().sum())
        scores.append(score)
    a = torch.cat(scores)  # as large as the factors: from here in place
    scores.clear()
    a *= scale
    root = a.norm(dim=0).sqrt()  # √σ_k; a term that is not needed (σ_k = 0) becomes zero on both sides
    a.div_(root.clamp_min(torch.finfo(torch.float64).tiny)).masked_fill_(root == 0, 0.0)
    error = (residual / total) ** 0.5
    return Fit(
        spec=spec,
        a=a.T.reshape(spec.rank, *spec.a).contiguous(),
        b=(basis * root).T.reshape(spec.rank, *spec.b).contiguous(),
        perm_in=None,
        perm_out=None,
        relative_error=error,
        history=[error],
    )
