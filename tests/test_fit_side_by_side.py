"""Fits side by side: in order, really at once, within bounds, and with the numbers of one after the other."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import kronfold as kf
import pico
from kronfold.base.errors import InputError
from kronfold.fit.rows import AT_ONCE, LARGE, side_by_side


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Watch:
    """Works that note how many of them run at the same time, and with how many torch threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = 0
        self.threads: list[int] = []
        self.begun: list[int] = []

    def work(self, number: int, fails: bool = False):
        def run() -> int:
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
                self.begun.append(number)
            self.threads.append(torch.get_num_threads())
            time.sleep(0.02)
            with self.lock:
                self.now -= 1
            if fails:
                raise ValueError(f"work {number}")
            return number

        return run


def test_in_order_on_one_thread_each(four_threads) -> None:
    watch = Watch()
    assert list(side_by_side([watch.work(i) for i in range(9)], [1] * 9)) == list(range(9))
    assert set(watch.threads) == {1}
    assert 1 < watch.most <= 4
    assert torch.get_num_threads() == 4


def test_two_works_that_wait_for_each_other_both_end(four_threads) -> None:
    meeting = threading.Barrier(2, timeout=30)
    assert len(list(side_by_side([meeting.wait, meeting.wait], [1, 1]))) == 2


def test_one_after_the_other_where_torch_has_one_thread() -> None:
    assert torch.get_num_threads() == 1
    watch = Watch()
    assert list(side_by_side([watch.work(i) for i in range(3)], [1] * 3)) == [0, 1, 2]
    assert watch.most == 1


def test_what_is_worked_on_at_once_is_bounded(four_threads) -> None:
    watch = Watch()
    half = AT_ONCE // 2
    assert list(side_by_side([watch.work(i) for i in range(5)], [1, 1, half, 1, 1])) == list(range(5))
    assert watch.most <= 2


def test_a_large_one_is_alone_on_all_threads(four_threads) -> None:
    watch = Watch()
    works = [watch.work(0), watch.work(1), watch.work(2), watch.work(3)]
    assert list(side_by_side(works, [1, LARGE + 1, LARGE + 1, 1])) == [0, 1, 2, 3]
    assert watch.most == 1
    assert watch.threads == [1, 4, 4, 1]


def test_an_error_comes_in_its_turn_and_ends_it(four_threads) -> None:
    watch = Watch()
    works = [watch.work(i, fails=i in (1, 2)) for i in range(50)]
    found = []
    with pytest.raises(ValueError, match="work 1"):
        for result in side_by_side(works, [1] * 50):
            found.append(result)
    assert found == [0]
    assert len(watch.begun) < 20
    assert watch.now == 0
    assert torch.get_num_threads() == 4


def test_grad_mode_is_that_of_the_caller(four_threads) -> None:
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            assert list(side_by_side([torch.is_grad_enabled] * 3, [1] * 3)) == [wanted] * 3


def test_a_compressed_model_does_not_depend_on_the_threads(teacher, four_threads) -> None:
    seen: list[tuple[str, int, int]] = []
    torch.set_num_threads(2)
    together = kf.compress(teacher, "tqcompressor", progress=lambda *what: seen.append(what))
    torch.set_num_threads(1)
    one_by_one: list[tuple[str, int, int]] = []
    alone = kf.compress(teacher, "tqcompressor", progress=lambda *what: one_by_one.append(what))
    expected, found = alone.state_dict(), together.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert seen == one_by_one
    assert len(seen) > 4


def test_a_weight_that_cannot_be_fitted_is_named_and_the_model_stays(four_threads) -> None:
    torch.set_num_threads(2)
    model = pico.gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="mlp.c_proj"):
        kf.compress(model, "tqcompressor")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items() if "c_proj" not in name)
    assert torch.get_num_threads() == 2


def test_freed_memory_is_given_back_after_every_work(monkeypatch, four_threads):
    given = []
    monkeypatch.setattr("kronfold.fit.rows.give_back", lambda: given.append(threading.get_ident()))
    assert list(side_by_side([lambda: 1] * 3 + [lambda: 2], [10, 10, 10, LARGE + 1])) == [1, 1, 1, 2]
    assert len(given) == 4
