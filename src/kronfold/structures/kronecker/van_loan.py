"""The nearest sum of Kronecker products without permutations, and two starts for training derived from it.

The rearrangement R(W) turns Σ_k A_k ⊗ B_k into a matrix of rank `rank`, so the best fit is the truncated SVD of R(W)
(C. F. Van Loan and N. Pitsianis, "Approximation with Kronecker products", 1993, section 2). One side of R(W) is usually
tiny (the block holds out_b·in_b numbers), so its right singular vectors come from a Gram matrix of that size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from kronfold.structures.kronecker.als import weighted_fit
from kronfold.structures.kronecker.matrix import Fit, KroneckerSpec, rearrange
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

    Source: Van Loan and Pitsianis 1993, theorem 2.1.
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
    if columns > rows or columns > GRAM_SIZE:
        bases = [_refined(w, spec, right_basis(rearrange(w.double(), *spec.b), spec.rank)) for w in matrices]
    else:  # one batched eigenproblem for all weights
        grams = torch.stack([_total(r.T @ r for r in _chunks(w, spec)) for w in matrices])
        values, vectors = torch.linalg.eigh(grams)
        bases = list(vectors[..., -spec.rank :].flip(-1))
        blurred = values[:, -spec.rank] < 1e-6 * values[:, -1]  # singular values a thousand times apart
        bases = [_refined(w, spec, v) if bad else v for w, v, bad in zip(matrices, bases, blurred, strict=True)]
    return [_factors(w, basis, spec) for w, basis in zip(matrices, bases, strict=True)]


def right_basis(rearranged: Tensor, rank: int) -> Tensor:
    """The `rank` leading right singular vectors of R(W) (rows, columns), float64, as (columns, rank), largest first.

    Where a Gram matrix is used, directions whose singular value is below 1e-8 of the first are blurred.
    """

    def top_eigenvectors(gram: Tensor) -> Tensor:
        return torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)

    rows, columns = rearranged.shape
    if columns <= min(rows, GRAM_SIZE):
        return top_eigenvectors(rearranged.T @ rearranged)
    if rows <= GRAM_SIZE:
        return torch.linalg.qr(rearranged.T @ top_eigenvectors(rearranged @ rearranged.T)).Q
    if rank * 4 > min(rows, columns):
        return torch.linalg.svd(rearranged, full_matrices=False).Vh[:rank].T
    start = np.full(min(rows, columns), min(rows, columns) ** -0.5)  # ARPACK starts at random unless told
    _, values, vectors = svds(rearranged.numpy(), k=rank, v0=start)
    return torch.from_numpy(vectors[np.argsort(-values)].T.copy())


def _chunks(weight: Tensor, spec: KroneckerSpec) -> Iterator[Tensor]:
    """R(W) in float64, a few block rows at a time, so that no float64 copy of a large weight is made."""
    block_row = spec.b[0] * spec.in_features
    step = max(1, CHUNK_NUMBERS // block_row) * spec.b[0]
    for start in range(0, spec.out_features, step):
        yield rearrange(weight[start : start + step].double(), *spec.b)


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


def _factors(weight: Tensor, basis: Tensor, spec: KroneckerSpec) -> Fit:
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


def with_equal_entries(fit: Fit) -> Fit:
    """The same approximation (`to_dense` unchanged) with rms(A_k) = rms(B_k) for every term k; zero terms stay zero.

    Krony-PT (arXiv 2412.12351) starts from a "modified Van Loan decomposition", in its summary an "adaptive
    normalization" of the factors. Its text does not say how it normalises; what follows is inferred:
    the product stays the nearest one, and its scale is shared out so that A_k and B_k have entries of equal root mean
    square. An optimiser with steps of one size for all entries (Adam) then changes both factors at one relative pace;
    with equal norms, as `nearest_kronecker` gives them, the few entries of B_k are hundreds of times larger than those
    of A_k.
    """
    rms_a = fit.a.square().mean(dim=(1, 2), keepdim=True).sqrt()
    rms_b = fit.b.square().mean(dim=(1, 2), keepdim=True).sqrt()
    scale = (rms_b / rms_a).sqrt().nan_to_num(nan=1.0, posinf=1.0).clamp_min(1e-150)
    return replace(fit, a=fit.a * scale, b=fit.b / scale)


def pruned_kronecker(weight: Tensor, spec: KroneckerSpec, weighting: Weighting | None = None) -> Fit:
    """Factors whose sum is `weight` at the first `rank` positions of every block, and 0 at the others.

    Krony-PT (arXiv 2412.12351) halves a feed-forward weight "deterministically (either pick even or odd rows)" and
    finds that start better for training than the nearest product at 95M parameters. As a Kronecker product: with
    B = (1, 0) the product A ⊗ B has the entries of A in the even columns and zeros in the odd ones, so A is those
    columns of the weight. For other blocks and ranks we read it as: term k keeps position k of every block (row by
    row), B_k being 1 there.

    Args:
        weight: (out_features, in_features), any floating dtype; worked on in float64 on the CPU.
        spec: shapes and rank; of block (1, 2) the even columns are kept, of (2, 1) the even rows.
        weighting: only for the error that is reported; the choice does not depend on data.

    Raises:
        ShapeError, InputError: as `nearest_kronecker`.
    """
    weight = check_weight(weight, spec).double()
    positions = spec.b[0] * spec.b[1]  # at least the rank, the spec saw to that
    a = torch.stack([weight[k // spec.b[1] :: spec.b[0], k % spec.b[1] :: spec.b[1]] for k in range(spec.rank)])
    b = torch.eye(positions, dtype=torch.float64)[: spec.rank].reshape(spec.rank, *spec.b)
    fit = Fit(spec=spec, a=a.contiguous(), b=b, perm_in=None, perm_out=None, relative_error=0.0)
    fit.relative_error = (weighting or Weighting()).checked(spec.shape).relative_error(weight, fit.to_dense())
    fit.history = [fit.relative_error]
    return fit
