"""Every block of commands or Python in README and docs runs on the embedded model, or says that it needs a larger one.

The blocks of a page run in their order in one directory, in which `demo-text` is the beginning of the text inside the
package: whether the commands work does not depend on how much they read. A block under the line `<!-- not run: ... -->`
is not run; the options of its kronfold commands must exist all the same.
"""

from __future__ import annotations

import gzip
import itertools
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from kronfold import assets
from kronfold.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
FENCE = re.compile(r"(?:^<!-- (not run[^>]*) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = ("sh", "python")


def blocks(page: Path) -> list[tuple[str | None, str, str]]:
    """(why it is not run or None, language, text) of the blocks that are commands or Python."""
    return [(why or None, kind, text) for why, kind, text in FENCE.findall(page.read_text()) if kind in RUN]


def run_pages() -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES if any(not why for why, _, _ in blocks(page))]


@cache
def options(command: str) -> set[str]:
    """Every way to write an option of `command`, such as "heal" or "data clean"."""
    found: Any = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    return {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def commands(text: str) -> list[list[str]]:
    """The kronfold commands of a shell block, as words."""
    lines = text.replace("\\\n", " ").split("\n")
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"\s*(kronfold|\S.* -m kronfold)\s", line)]
    return [line[line.index("kronfold") + 1 :] for line in words if "kronfold" in line]


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_options_of_all_commands_exist(page):
    shell = [text for _, kind, text in blocks(page) if kind == "sh"]
    inline = re.findall(r"`(kronfold [a-z][^`]* --?[^`]*)`", page.read_text())
    for words in [words for text in [*shell, *inline] for words in commands(text)]:
        name = " ".join(words[:2]) if words[0] == "data" else words[0]
        options_given = [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]
        unknown = set(options_given) - options(name) - {"--debug"}
        assert not unknown, f"kronfold {name}: {sorted(unknown)}"


@pytest.mark.parametrize("page", run_pages())
def test_blocks_run(page, tmp_path):
    texts = tmp_path / "demo-text"
    texts.mkdir()
    for source, rows in ((assets.heal_text(), 600), (assets.eval_text(), 20)):
        with gzip.open(source, "rt") as whole, gzip.open(texts / Path(source).name, "wt") as part:
            part.writelines(itertools.islice(whole, rows))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "KRONFOLD_CACHE": str(tmp_path / "cache")}
    for why, kind, text in blocks(page):
        if why is None:
            shell = ["bash", "-euo", "pipefail", "-c", text] if kind == "sh" else [sys.executable, "-c", text]
            done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_every_page_is_covered():
    ran = sum(1 for page in PAGES for why, _, _ in blocks(page) if why is None)
    assert ran >= 15
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"^    kronfold ", text, re.MULTILINE), f"{page.name}: put commands in ```sh blocks"
