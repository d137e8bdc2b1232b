"""A command made from an options class reads what the class says, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kronfold.base.errors import InputError
from kronfold.cli.command import add_command
from kronfold.options import Options, option


class Inner(Options):
    rate: float = option(0.5, "How fast.", group="Training", gt=0)
    tokens: int | None = option(None, "How long.", group="Training", names=("--heal-tokens",))
    settings: dict[str, object] = option(dict, "More.", group="Training", names=("--setting",), pairs=True)
    hidden: int = 3


class Outer(Options):
    model: str = option(..., "What to read.", argument=True)
    output: str = option(..., "Where.", group="Output", names=("--output", "-o"))
    texts: list[str] = option(list, "Texts.", names=("--text",))
    sequential: bool | None = option(None, "In sequence.", group="How", names=("--sequential/--together",))
    resume: bool = option(False, "Go on.", group="Output")
    cache: bool = option(True, "Keep.", group="How", names=("--cache/--no-cache",))
    train: Inner = option(Inner)


class Ready(Options):
    rate: float = option(0.5, "How fast.", group="Training", gt=0)
    words: tuple[str, ...] = option(("a", "b"), "Words.", group="Training", commas=True)
    notes: tuple[str, ...] = option((), "Notes.", group="Training")


class Others(Options):
    both: tuple[str, str] | None = option(None, "Two at once.", group="Output")
    numbers: tuple[int, ...] = option((0,), "Numbers.", group="How", commas=True, min_length=1)
    none: tuple[str, ...] | None = option(None, "None, or some.", group="How", commas=True)
    train: Ready = Ready(rate=0.25, words=("c",), notes=("kept",))


def call(*words: str, options: type[Options] = Outer) -> tuple[Any, str, BaseException | None]:
    app, seen = typer.Typer(), []

    def work(given: Options, json: bool) -> None:
        """Does things."""
        seen.append((given, json))

    add_command(app, options, work, "work")
    result = CliRunner().invoke(app, list(words))
    return (seen[0][0] if seen else None), result.output, result.exception


def test_everything_given_arrives_in_its_place():
    words = ["m", "-o", "out", "--text", "a", "--text", "b", "--together", "--resume", "--no-cache", "--rate", "0.25"]
    options, _, _ = call(*words, "--heal-tokens", "7", "--setting", "x=1", "--setting", "y=[1, 2]")
    inner = Inner(rate=0.25, tokens=7, settings={"x": 1, "y": [1, 2]})
    assert options == Outer(
        model="m", output="out", texts=["a", "b"], sequential=False, resume=True, cache=False, train=inner
    )


def test_what_is_not_given_keeps_the_default_of_the_class():
    options, _, _ = call("m", "--output", "out")
    assert options == Outer(model="m", output="out")
    assert options.train.rate == 0.5


def test_faults_are_named_all_at_once():
    _, _, error = call("m", "-o", "o", "--rate", "-1", "--setting", "x=1")
    assert isinstance(error, InputError)
    assert "train.rate" in str(error)
    assert "given: -1.0" in str(error)


@pytest.mark.parametrize("pairs", [["x"], ["x=1", "x=2"], ["x=[1"]])
def test_pairs_that_are_none(pairs):
    words = [word for pair in pairs for word in ("--setting", pair)]
    assert isinstance(call("m", "-o", "o", *words)[2], InputError)


def test_help_has_groups_defaults_and_no_field_without_an_option():
    _, text, _ = call("--help")
    for words in (
        "Training",
        "How fast.",
        "0.5",
        "--heal-tokens",
        "--sequential",
        "--together",
        "MODEL",
        "Does things.",
    ):
        assert words in text
    assert "--hidden" not in text


def test_a_class_held_ready_made_gives_the_defaults():
    options, _, _ = call(options=Others)
    assert options == Others()
    assert (options.train.rate, options.train.words, options.train.notes) == (0.25, ("c",), ("kept",))
    text = call("--help", options=Others)[1]
    assert "0.25" in text
    assert "0.5" not in text


def test_lists_in_one_word_and_two_words_at_once():
    words = ["--both", "x", "y", "--numbers", "3, 4,", "--none", "", "--words", "d", "--notes", "n", "--notes", "m"]
    options, _, _ = call(*words, options=Others)
    train = Ready(rate=0.25, words=("d",), notes=("n", "m"))
    assert options == Others(both=("x", "y"), numbers=(3, 4), none=(), train=train)
    for wrong in ("", "1,x"):
        assert "numbers" in str(call("--numbers", wrong, options=Others)[2])


def test_groups_stand_in_one_order_whatever_that_of_the_fields():
    text = call("--help")[1]
    places = [text.index(f"─ {group} ─") for group in ("What", "How", "Training", "Output")]
    assert places == sorted(places)
