"""docs/recipes.md: its table lists every shipped recipe, with the counts and the objective that the planner sees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import GPT2Config

import kronfold as kf
from kronfold.planner.recipe import load_recipe, shipped_recipes

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
WORDS = {"KL": "kl", "CE": "ce", "cosine": "cosine", "embeddings": "embedding", "attention maps": "attention",
         "hidden states": "hidden"}  # fmt: skip


def table() -> dict[str, tuple[str, str]]:
    """Recipe -> (held parameters, objective), as the page says."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): (row[3], row[4]) for row in cells if len(row) == 5}


def test_every_recipe_has_its_row():
    assert sorted(table()) == shipped_recipes()


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name != "auto"])
def test_counts_and_objectives(name):
    held, objective = table()[name]
    assert int(held.replace(",", "")) == kf.plan(GPT2Config(), name).held_parameters
    heals = [stage.heal.objective for stage in load_recipe(name).stages if stage.heal]
    if objective == "none":
        assert not heals
        return
    said = {}
    for part in objective.split(", "):
        found = re.fullmatch(r"([A-Za-z ]+?)(?: ([\d.]+))?(?: \(T = ([\d.]+)\))?", part)
        said[WORDS[found[1]]] = float(found[2] or 1)
        assert all(heal.temperature == float(found[3] or 1) for heal in heals) or found[1] != "KL"
    for heal in heals:
        weights = {key: value for key, value in heal.model_dump().items() if key in WORDS.values() and value}
        assert weights == said


def test_counts_in_the_files_themselves():
    for name, (held, _) in table().items():
        text = (Path(kf.__file__).parent / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        counts = re.findall(r"124,439,808 -> ([\d,]+) held", text)
        assert all(count == held for count in counts)
