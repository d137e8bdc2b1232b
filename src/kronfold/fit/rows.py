"""The solver's answer for one row of a plan, and many rows side by side; what both ways of fitting share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from kronfold.base.errors import InputError
from kronfold.base.memory import give_back
from kronfold.planner.plan import PlanRow
from kronfold.structures.rates import one_thread
from kronfold.structures.registry import structure_of
from kronfold.structures.weighting import Weighting


def fit_row(weight: Tensor, row: PlanRow, seed: int, weighting: Weighting | None = None) -> tuple[Any, float | None]:
    """The solver's result for a weight (out, in), and the relative error of the same shape without permutations, None
    for a structure that has none to leave out.

    `weighting`: all that is known of the site; the structure takes the part that it is fitted under.

    Raises RecipeError, ShapeError, InputError, each with the row's name.
    """
    structure, spec = structure_of(row.spec), row.spec
    plain = structure.plain(spec)
    if weighting is not None:
        weighting = structure.weighting(spec, weighting)
    searched = weighting is None and plain is not None and structure.held(spec) != plain
    try:
        # first, and only its error is kept: one fit in memory
        plain_error = structure.fit(weight, plain, seed).relative_error if searched else None
        fit = structure.fit(weight, spec, seed, weighting, row.init)
    except InputError as error:
        raise type(error)(f"{row.name}: {error}") from error
    return fit, fit.relative_error if plain is not None and plain_error is None else plain_error


# Independent fits side by side: one matrix per core, each on one thread, instead of all cores on one matrix.
#
# A permutation search is many short tensor operations that leave a second thread waiting, and they give up Python's
# lock (so does scipy's assignment solver): threads share the model's weights and still run at once. A fit always runs
# on one thread, or for a very large weight always alone on all, so its numbers do not depend on what runs beside it.


AT_ONCE = 1 << 25  # numbers in all weights worked on at a time; a search holds about 40 bytes for each
LARGE = 1 << 24  # numbers, from which a weight is worked on alone

T = TypeVar("T")


def side_by_side(works: Sequence[Callable[[], T]], numbers: Sequence[int]) -> Generator[T, None, None]:
    """The results of `works`, in order; as many run at a time as torch has threads here, within AT_ONCE.

    Args:
        numbers: how many numbers each of them works on.

    What a work raises is raised in its turn; those that were not begun then never run.
    """
    jobs = list(zip(works, numbers, strict=True))
    for is_large, group in groupby(jobs, key=lambda job: job[1] > LARGE):
        alike = list(group)
        if is_large:
            for work, _ in alike:
                yield _done(work)
        else:
            fitting = AT_ONCE // max(1, *(size for _, size in alike))
            yield from _shared([work for work, _ in alike], min(torch.get_num_threads(), len(alike), fitting))


def _shared(works: Sequence[Callable[[], T]], workers: int) -> Generator[T, None, None]:
    if workers == 1:
        for work in works:
            with one_thread():
                result = _done(work)
            yield result
        return
    grad = torch.is_grad_enabled()  # a setting of each thread

    def run(work: Callable[[], T]) -> T:
        with torch.set_grad_enabled(grad):
            return _done(work)

    with one_thread():  # new threads take their number of threads from here
        pool = ThreadPoolExecutor(workers)
        try:
            for future in [pool.submit(run, work) for work in works]:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _done(work: Callable[[], T]) -> T:
    try:
        return work()
    finally:
        give_back()  # a search frees twenty times what it leaves
