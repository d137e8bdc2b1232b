"""Terminal tables: every row, at 100 columns, nothing cut."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from kronfold.base.errors import InputError
from kronfold.report import numbers
from kronfold.report.document import short_names
from kronfold.report.plans import plan_table
from kronfold.report.tables import gathers_line, run_summary
from report_examples import bare_document, run_document, unfinished_document


def _text(renderable: Any, width: int = 100) -> list[str]:
    console = Console(width=width, record=True, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text().splitlines()


def _row(name: str, stage: str, a: tuple[int, int], b: tuple[int, int], rank: int, **more: Any) -> dict[str, Any]:
    return {
        "stage": stage,
        "name": name,
        "structure": "kronecker",
        "spec": {"a": list(a), "b": list(b), "rank": rank, "permute_in": True, "permute_out": True},
        "label": f"{rank} x {a}⊗{b}",
        "held_parameters": rank * (a[0] * a[1] + b[0] * b[1]),
        "teacher_parameters": a[0] * a[1] * b[0] * b[1],
        **more,
    }


def gpt2_plan(**more: Any) -> dict[str, Any]:
    """The released TQCompressor recipe on GPT-2: 14 matrices of three stages."""
    blocks = [1, 3, 5, 7, 9, 11]
    rows = [_row("transformer.wte", "embedding", (50257, 384), (1, 2), 1)]
    for h in blocks:
        rows.append(_row(f"transformer.h.{h}.mlp.c_fc", "feed-forward", (768, 384), (4, 2), 4))
        rows.append(_row(f"transformer.h.{h}.mlp.c_proj", "feed-forward", (384, 768), (2, 4), 4))
    rows.append(_row("transformer.wte", "embedding-again", (50257, 192), (1, 4), 1))
    return {
        "schema": "kronfold/plan",
        "schema_version": 1,
        "held_parameters": 81_336_388,
        "teacher_parameters": 124_439_808,
        "macs_per_token": 80_000_123,
        "teacher_macs_per_token": 123_532_032,
        "bytes_fp16": 162_672_776,
        "bytes_fp32": 325_345_552,
        "index_bytes": 187_392,
        "recipe": {"name": "tqcompressor"},
        "rows": rows,
        **more,
    }


@pytest.mark.parametrize("make", [run_document, bare_document, unfinished_document])
def test_run_summary_shows_every_stage_and_matrix(make):
    document = make()
    lines = _text(run_summary(document))
    assert max(map(len, lines)) <= 100
    for stage in document["stages"]:
        assert any(stage["name"] in line and numbers.perplexity(stage["before_healing"]) in line for line in lines)
        for row in stage["rows"]:
            name, error = row["name"].removeprefix("transformer."), f"{row['relative_error']:.4f}"
            assert any(name in line and error in line and f"{row['held_parameters']:,}" in line for line in lines)
    text = "\n".join(lines)
    assert "2,145,408" in text
    assert "61.8 %" in text
    assert "sliding (window 256, stride 128)" in text
    assert ("not finished" in text) == (not document["complete"])


def test_run_summary_has_every_control():
    lines = _text(run_summary(run_document()))
    for who, perplexity, excess in (
        ("Dense teacher", "27.31", ""),
        ("Dense, fine-tuned on the same data", "25.87", "−5.3 %"),
        ("Compressed, before healing (stage 3)", "64.05", "+134.5 %"),
        ("Compressed and healed", "38.42", "+40.7 %"),
        ("Plain Kronecker, healed", "44.95", "+64.6 %"),
    ):
        assert any(who in line and perplexity in line and excess in line for line in lines)


def test_run_summary_takes_square_brackets_as_text():
    document = run_document()
    document["model"] = document["stages"][0]["name"] = document["protocol"]["name"] = "[bold]x[/bold] [/]"
    text = "\n".join(_text(run_summary(document)))
    assert text.count("[bold]x[/bold] [/]") >= 3


def test_plan_table_groups_equal_matrices_and_keeps_their_sum():
    lines = _text(plan_table(gpt2_plan()))
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 25
    fc = next(line for line in lines if "h.{1,3,5,7,9,11}.mlp.c_fc " in line)
    assert "4 x (768, 384)⊗(4, 2)" in fc
    assert f"{6 * 4 * (768 * 384 + 8):,}" in fc
    assert f"{6 * 768 * 3072:,}" in fc
    text = "\n".join(lines)
    for number in (
        "81,336,388",
        "124,439,808",
        "80,000,123",
        "162,672,776",
        "325,345,552",
        "187,392",
        "65.4 %",
    ):
        assert number in text
    assert [line.strip() for line in lines if line.strip().startswith("embedding")] == [
        "embedding · kronecker",
        "embedding-again · kronecker",
    ]
    assert sum("wte" in line for line in lines) == 2


def test_plan_table_names_the_gathers_that_remain():
    names = [f"transformer.h.{i}.mlp.{part}" for part in ("c_fc.gather_in", "c_proj.gather_in") for i in (0, 1)]
    found = {"absorbed": 2, "remaining": names, "bytes": 30_720}
    listed = "h.{0,1}.mlp.c_fc.gather_in, h.{0,1}.mlp.c_proj.gather_in"
    assert gathers_line(found) == f"Gathers: 2 absorbed by neighbouring layers, 4 remain (30,720 bytes): {listed}"
    assert gathers_line({"absorbed": 0, "remaining": [], "bytes": 0}) == "Gathers: none remain."
    lines = _text(plan_table({**gpt2_plan(), "gathers": found}))
    assert sum("Gathers:" in line for line in lines) == 1
    assert max(map(len, lines)) <= 100


def test_plan_table_shows_the_range_of_errors_of_a_group():
    plan = gpt2_plan()
    for index, row in enumerate(plan["rows"]):
        row["relative_error"] = 0.4 + index / 100
    fc = next(line for line in _text(plan_table(plan)) if "c_fc" in line)
    assert "0.4100–0.5100" in fc


def test_plan_table_keeps_different_matrices_apart():
    plan = gpt2_plan()
    plan["rows"][3] = _row("transformer.h.3.mlp.c_fc", "feed-forward", (768, 384), (4, 2), 2)
    lines = _text(plan_table(plan))
    assert any("h.{1,5,7,9,11}.mlp.c_fc " in line for line in lines)
    assert any("h.3.mlp.c_fc " in line and "2 x (768, 384)⊗(4, 2)" in line for line in lines)


def test_plan_table_shortens_long_even_rows_of_blocks():
    rows = [_row(f"transformer.h.{h}.mlp.c_fc", "all", (1600, 800), (4, 2), 4) for h in range(1, 48, 2)]
    lines = _text(plan_table(gpt2_plan(rows=rows)))
    assert any("h.{1,3,…,47}.mlp.c_fc ×24" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "kronfold/run", "schema_version": 1}, "schema 'kronfold/run'.*reads 'kronfold/plan'"),
        ({"schema": "kronfold/plan", "schema_version": 9}, "schema_version 9.*Upgrade"),
    ],
)
def test_plan_table_refuses_other_documents(change, message):
    with pytest.raises(InputError, match=message):
        plan_table(gpt2_plan(**change))
    with pytest.raises(InputError, match="lacks rows"):
        plan_table({key: value for key, value in gpt2_plan().items() if key != "rows"})


def test_plan_table_compares_bytes_when_the_plan_has_the_teacher_s():
    row = next(line for line in _text(plan_table(gpt2_plan(teacher_bytes_fp16=248_879_616))) if "Bytes at fp16" in line)
    assert all(text in row for text in ("248,879,616", "162,672,776", "65.4 %", "1.53 × smaller"))


def test_run_summary_refuses_other_documents():
    with pytest.raises(InputError, match="schema 'kronfold/plan'"):
        run_summary(run_document() | {"schema": "kronfold/plan"})


NUMBERS = [
    (numbers.count, (81336388,), "81,336,388"),
    (numbers.count, (None,), "–"),
    (numbers.perplexity, (32.414,), "32.41"),
    (numbers.perplexity, (18204.4,), "18,204"),
    (numbers.perplexity, (2.1e8,), "2.1e+08"),
    (numbers.perplexity, (float("inf"),), "–"),
    (numbers.share, (1, 3), "33.3 %"),
    (numbers.share, (1, 0), "–"),
    (numbers.signed_percent, (0.2384,), "+23.8 %"),
    (numbers.signed_percent, (-0.05,), "−5.0 %"),
    (numbers.signed_percent, (2e5,), "+2.0e+07 %"),
    (numbers.smaller, (124439808, 81336388), "1.53 × smaller"),
    (numbers.smaller, (10, 12), "1.20 × larger"),
    (numbers.smaller, (10, 10), "same size"),
    (numbers.smaller, (None, 10), "–"),
    (numbers.size, (999,), "999 bytes"),
    (numbers.size, (6946560,), "6.9 MB"),
    (numbers.size, (2.5e9,), "2.50 GB"),
    (numbers.duration, (42.34,), "42.3 s"),
    (numbers.duration, (59.97,), "1 min 00 s"),
    (numbers.duration, (192,), "3 min 12 s"),
    (numbers.duration, (7500,), "2 h 05 min"),
    (numbers.spec, ({"a": [768, 384], "b": [4, 2], "rank": 4},), "4 × (768×384 ⊗ 4×2)"),
    (
        numbers.spec,
        ({"a": [4, 2], "b": [1, 2], "rank": 1, "permute_in": True, "permute_out": False},),
        "1 × (4×2 ⊗ 1×2), permuted in only",
    ),
    (
        numbers.spec,
        ({"a": [4, 2], "b": [1, 2], "permute_in": False, "permute_out": False},),
        "1 × (4×2 ⊗ 1×2), permuted no",
    ),
    (
        numbers.spec,
        ({"structure": "x", "rank": 64, "ranks": [2, 3], "tied": True},),
        "rank 64, ranks 2×3, tied yes",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "expected"), NUMBERS)
def test_numbers_as_text(function, arguments, expected):
    assert function(*arguments) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["transformer.h.1.c_fc", "transformer.wte"], ["h.1.c_fc", "wte"]),
        (["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"], ["h.1.mlp.c_fc", "h.1.mlp.c_proj"]),
        (["transformer.wte"], ["transformer.wte"]),
        (["a.b", "c.b"], ["a.b", "c.b"]),
        ([], []),
    ],
)
def test_short_names_drop_only_what_all_share(names, expected):
    assert list(short_names(names).values()) == expected


def test_the_run_summary_shows_what_each_model_writes():
    document = run_document()
    text = " ".join(" ".join(_text(run_summary(document))).split())
    for sample in document["samples"]:
        assert sample["who"] in text
        assert sample["text"].split()[0] in text
    document.pop("samples")
    assert "Text samples" not in " ".join(_text(run_summary(document)))


def test_a_join_of_blank_lines_stays_on_its_line():
    told = numbers.protocol({"name": "paper", "join": "\n\n", "window": 1024})
    assert told == r"paper (join '\n\n', window 1,024)"
