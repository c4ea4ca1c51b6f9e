"""Draw recipes/results/ridge_curves.json: held-out cosine over the steps of stages 1 and 2, a line a start.

Run from the repository's root: python recipes/scripts/plot_ridge_curves.py
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> None:
    """Draw the mean over seeds, and the range as a band."""
    runs = json.loads((RESULTS / "ridge_curves.json").read_text())["runs"]
    align_steps = max(point["step"] for point in runs[0]["curve"] if point["stage"] == "align")
    starts: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        values = starts[run["start"]]
        values[0].append(run["stages"][0]["cosine"])
        for point in run["curve"]:
            values[point["step"] + align_steps * (point["stage"] == "recover")].append(point["cosine"])
    plt.rcParams |= {"svg.hashsalt": "gspn2convert", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(8.0, 3.6), layout="constrained")
    for start, points in starts.items():
        steps = sorted(points)
        (line,) = axes.plot(steps, [mean(points[step]) for step in steps], label=start)
        low, high = ([end(points[step]) for step in steps] for end in (min, max))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axvline(align_steps, color="0.6", linewidth=1, linestyle=":")
    axes.set(xlabel="step: stage 1, then stage 2", ylabel="held-out cosine", ylim=(0.8, 0.98), xlim=(0, None))
    axes.legend(title="start of the mixers", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "ridge_curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
