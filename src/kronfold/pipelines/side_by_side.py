"""Independent fits side by side: one matrix per core, each on one thread, instead of all cores on one matrix.

A permutation search is many short tensor operations that leave a second thread waiting, and they give up Python's lock
(so does scipy's assignment solver): threads share the model's weights and still run at once. A fit always runs on one
thread, or for a very large weight always alone on all, so its numbers do not depend on what runs beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TypeVar

import torch

from kronfold.base.memory import give_back
from kronfold.ops.threads import one_thread

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
