"""Progress by named steps: pace and time left by hand numbers, one line every 30 s where there is no terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from kronfold.base.progress import Progress, State
from kronfold.cli import terminal


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def told(clock):
    states: list[State] = []
    return Progress(states.append, clock), states


def test_pace_and_time_left_count_from_the_first_update(told, clock):
    progress, states = told
    progress.step("heal ffn")
    clock.now += 60  # getting ready is no training
    progress.update(0, 100, tokens=0)
    clock.now += 10
    progress.update(20, 100, tokens=4_000, loss=3.5)
    assert (states[0].first, states[0].left, states[0].tokens_per_second) == (True, None, None)
    assert states[1] == State("heal ffn", 20, 100, {"tokens": 4_000, "loss": 3.5}, False, 70.0, 40.0, 400.0)


def test_a_step_resumed_in_its_middle_is_no_fast_one(told, clock):
    progress, states = told
    progress.step("heal").update(80, 100, tokens=16_000)
    clock.now += 10
    progress.update(85, 100, tokens=17_000)
    assert (states[1].left, states[1].tokens_per_second) == (30.0, 100.0)


def test_the_next_step_starts_anew(told, clock):
    progress, states = told
    progress.step("one").update(0, 2)
    clock.now += 100
    progress.step("two").update(0, 4, item="h.1", loss=None)
    clock.now += 1
    progress.update(1, 4)
    assert [state.first for state in states] == [True, True, False]
    assert states[1].facts == {"item": "h.1"}  # what is not known is not told
    assert (states[2].seconds, states[2].left) == (1.0, 3.0)


def test_a_step_that_counts_from_the_start_again_has_no_negative_pace(told, clock):
    progress, states = told
    for done in (0, 9, 0, 1):
        clock.now += 5
        progress("evaluate test", done, 10)
    assert [state.left for state in states] == [None, pytest.approx(5 / 9), None, 45.0]


OLD = [
    ("decompose transformer.h.1.mlp", "decompose", {"item": "transformer.h.1.mlp"}),
    ("decompose", "decompose", {}),
    ("sensitivity h.0.attn", "sensitivity", {"item": "h.0.attn"}),
    ("heal ffn (loss 3.250)", "heal ffn", {"loss": 3.25}),
    ("fine-tune (seed 3)", "fine-tune", {}),
    ("evaluate the teacher", "evaluate the teacher", {}),
    ("heal (loss nan)", "heal", {}),
]


@pytest.mark.parametrize(("words", "step", "facts"), OLD)
def test_words_without_named_steps_are_understood(told, words, step, facts):
    progress, states = told
    progress(words, 1, 3)
    progress(words, 2, 3)
    assert [(state.step, state.facts, state.first) for state in states] == [(step, facts, True), (step, facts, False)]


def test_items_of_one_step_are_no_new_steps(told):
    progress, states = told
    for number in range(3):
        progress(f"decompose h.{number}", number, 3)
    assert [state.first for state in states] == [True, False, False]


def test_a_plain_callback_hears_the_same_words():
    heard: list[tuple[str, int, int]] = []
    progress = Progress.of(lambda *told: heard.append(told))
    progress.step("heal auto").update(3, 40, loss=4.125, tokens=99)
    progress.step("decompose").update(0, 2, item="h.1")
    assert heard == [("heal auto (loss 4.125)", 3, 40), ("decompose h.1", 0, 2)]
    assert Progress.of(progress) is progress


def test_a_log_says_more_every_thirty_seconds(clock, capsys):
    progress = Progress(terminal.log_lines(clock), clock)
    progress.step("heal ffn")
    for step in range(101):
        progress.update(step, 1_000, loss=4 - step / 1000, tokens=step * 2_048)
        clock.now += 1
    progress.step("evaluate").update(0, 5)
    assert capsys.readouterr().err.splitlines() == [
        "heal ffn ...",
        "heal ffn: 30 of 1,000, loss 3.970, 2,048 tokens/s, 16 min 10 s left",
        "heal ffn: 60 of 1,000, loss 3.940, 2,048 tokens/s, 15 min 40 s left",
        "heal ffn: 90 of 1,000, loss 3.910, 2,048 tokens/s, 15 min 10 s left",
        "evaluate ...",
    ]


def test_a_bar_shows_the_step_and_its_facts():
    with Bars(TextColumn("{task.description}", markup=False), BarColumn(), disable=True) as bars:
        progress = Progress(terminal.one_bar(bars))
        progress.step("decompose").update(1, 6, item="h.[red]1")
        progress.step("heal").update(5, 7, loss=2.5)
        (task,) = bars.tasks  # the earlier step is gone
        assert (task.description, task.completed, task.total) == ("heal, loss 2.500", 5, 7)


def test_no_torch_and_no_terminal_are_needed():
    program = (
        "import sys\nfrom kronfold.cli import terminal\n"
        "with terminal.progress_bar() as progress:\n"
        "    progress.step('heal').update(1, 9, loss=1.0)\n    progress('decompose h.1', 0, 2)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines() == ["heal ...", "decompose ..."]
