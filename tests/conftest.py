"""Shared, read-only fixtures. Nothing here touches the network."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["KRONFOLD_RATES"] = "builtin"  # the same orders of computing on every machine, whatever its user measured
os.environ["KRONFOLD_TOKEN_CACHE_GB"] = "0"  # tests leave nothing in the user's cache; those of the cache switch it on

import pytest
import torch

import kronfold as kf
import pico

torch.set_num_threads(1)  # pico models: a second thread only waits
SLOW = frozenset((Path(__file__).parent / "slow_tests.txt").read_text(encoding="utf-8").split())


def pytest_collection_modifyitems(items):
    """Mark the slow tests (listed by scripts/slow_tests.py), and let the others come first."""
    for item in items:
        if f"{Path(item.fspath).name}::{item.originalname}" in SLOW:
            item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture
def call(capsys):
    """Run a command; returns (exit code, stdout, stderr)."""
    from kronfold.cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def teacher():
    """A pico GPT-2; do not change it."""
    return pico.gpt2()


@pytest.fixture(scope="session")
def students(teacher):
    """The teacher compressed by each shipped recipe; do not change them."""
    return {recipe: kf.compress(teacher, recipe) for recipe in pico.RECIPES}


@pytest.fixture(scope="session")
def checkpoints(students, tmp_path_factory):
    """Each student saved as a model directory; do not change them."""
    places = {}
    for recipe, student in students.items():
        places[recipe] = tmp_path_factory.mktemp("checkpoints") / recipe
        student.save_pretrained(places[recipe])
        pico.tokenizer().save_pretrained(places[recipe])
    return places
