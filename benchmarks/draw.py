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
    """SmolLM2-135M at 65 %: perplexity over dense of each way to meet the budget, on both texts."""
    rows = read("smollm2-budget-65.json")["rows"]
    names = [name for name in rows if name != "dense"]
    figure, axes = plt.subplots(figsize=(6, 2.6))
    for i, text in enumerate(("wikitext2", "lambada")):
        dense = rows["dense"]["perplexity"][text]["perplexity"]
        ratios = [rows[name]["perplexity"][text]["perplexity"] / dense for name in names]
        bars = axes.barh([j + 0.38 * i for j in range(len(names))], ratios, 0.36, label=text)
        axes.bar_label(bars, [f"{ratio:.3g}x" for ratio in ratios], padding=3, fontsize=8)
    axes.set_yticks([j + 0.19 for j in range(len(names))], names)
    axes.set(xscale="log", xlabel="perplexity over that of the dense model (1 = no loss)")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_title("SmolLM2-135M at 65 % of its held parameters, nothing trained", fontsize=10)
    axes.legend(frameon=False)
    save(figure, "smollm2")


def ranks() -> None:
    """What the planner keeps of every matrix of SmolLM2-135M at 65 %."""
    plan = read("smollm2-plan-65.json")
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    blocks = 1 + max(int(row["name"].split(".")[2]) for row in plan["rows"] if ".layers." in row["name"])
    kept = [[1.0] * blocks for _ in kinds]
    for row in plan["rows"]:
        if ".layers." in row["name"]:
            parts = row["name"].split(".")
            kept[kinds.index(parts[-1])][int(parts[2])] = row["held_parameters"] / row["teacher_parameters"]
    figure, axes = plt.subplots(figsize=(7, 2.4))
    image = axes.imshow(kept, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block")
    axes.set_title("Share of the numbers kept, SmolLM2-135M at 65 %", fontsize=10)
    figure.colorbar(image, ax=axes)
    save(figure, "ranks")


def save(figure: Any, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
    print(f"docs/pictures/{name}.svg")


if __name__ == "__main__":
    plt.rcParams |= {"svg.hashsalt": "kronfold", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    budgets()
    smollm()
    ranks()
