"""Pictures of docs/structures.md, drawn from the result files: python benchmarks/draw.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS, PICTURES = HERE / "results", HERE.parent / "docs" / "pictures"
COLOURS = {"auto": "#1b6ca8", "auto, sequential": "#7fb3d5", "whitened SVD": "#c77f1a", "permuted Kronecker": "#8e3b46"}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def budgets() -> None:
    """Excess perplexity of gpt2-wikitext2 at several budgets, nothing trained."""
    found: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(RESULTS.glob("gpt2-wikitext2-budget-*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        dense = rows["dense"]
        for name, row in rows.items():
            if name != "dense":
                share = row["held_parameters"] / dense["held_parameters"]
                excess = (
                    row["perplexity"]["wikitext2"]["perplexity"] / dense["perplexity"]["wikitext2"]["perplexity"] - 1
                )
                found.setdefault(name, []).append((100 * share, excess))
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, points in found.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name, color=COLOURS.get(name))
    axes.set(xlabel="held parameters, % of dense", ylabel="excess perplexity", yscale="log")
    axes.set_title("gpt2-wikitext2, nothing trained", fontsize=10)
    axes.legend(frameon=False)
    save(figure, "budgets")


def smollm() -> None:
    """SmolLM2-135M-Instruct at 65 %: perplexity over dense of each way to meet the budget, on both texts."""
    rows = read("smollm2-budget-65.json")["rows"]
    names = [name for name in rows if name != "dense"]
    figure, axes = plt.subplots(figsize=(6, 2.6))
    for i, text in enumerate(("wikitext2", "lambada")):
        dense = rows["dense"]["perplexity"][text]["perplexity"]
        ratios = [rows[name]["perplexity"][text]["perplexity"] / dense for name in names]
        bars = axes.barh([j + 0.38 * i for j in range(len(names))], ratios, 0.36, label=text)
        labels = [f"{ratio:,.0f}x" if ratio >= 1000 else f"{ratio:.3g}x" for ratio in ratios]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_yticks([j + 0.19 for j in range(len(names))], names)
    axes.set(xscale="log", xlabel="perplexity over that of the dense model (1 = no loss)")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_title("SmolLM2-135M-Instruct (dequantised from Q4_1), 65 % held, untrained", fontsize=10)
    axes.legend(frameon=False)
    save(figure, "smollm2")


def structures() -> None:
    """Mean weighted error of each structure over that of low rank at the same numbers, single weights."""
    summary = read("structures_compared.json")["summary"]
    shown = [row for row in summary if not row["structure"].startswith("low rank +") or "(2, 2)" in row["structure"]]
    names = list(dict.fromkeys(row["structure"] for row in shown if row["structure"] != "low rank"))
    figure, axes = plt.subplots(figsize=(6.5, 0.3 * len(names) + 1.2))
    for i, ratio in enumerate(sorted({row["ratio"] for row in shown})):
        found = {row["structure"]: row["error"] / row["baseline"] for row in shown if row["ratio"] == ratio}
        places = [j + 0.38 * i for j, name in enumerate(names) if name in found]
        axes.barh(places, [found[name] for name in names if name in found], 0.36, label=f"{ratio:.0%} kept")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([j + 0.19 for j in range(len(names))], names, fontsize=7)
    axes.set(xscale="log", xlabel="weighted error over that of low rank (left of the line: better)")
    axes.invert_yaxis()
    axes.legend(frameon=False)
    axes.set_title("gpt2-wikitext2, blocks 1 and 4", fontsize=10)
    save(figure, "structures")


def save(figure: Any, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
    print(f"docs/pictures/{name}.svg")


if __name__ == "__main__":
    plt.rcParams |= {"svg.hashsalt": "kronfold", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    budgets()
    smollm()
    structures()
