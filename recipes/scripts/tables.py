"""Write the tables of the README from the JSON files that commands of this repository wrote.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`. Where its JSON is missing, a note takes its place.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"(<!-- table:(\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
STAGES = {"fit": "stage 0", "align": "stage 1", "recover": "stage 2"}
Document = dict[str, Any]
Row = Sequence[str]


def grid(head: Row, rows: Iterable[Row]) -> list[str]:
    """Lines of a table; all columns but the first stand to the right."""
    return [f"| {' | '.join(row)} |" for row in (head, [":--", *["--:"] * (len(head) - 1)], *rows)]


def demo(found: Document) -> list[str]:
    """Accuracy, cost and time of `make demo`."""
    teacher, student = found["teacher"], found["student"]
    rows = [
        *((f"top-1 after {STAGES[one['stage']]}", "", f"{one['top1']:.2%}") for one in found["stages"]),
        ("top-1, loaded again from the folder", f"{teacher['top1']:.2%}", f"{student['top1']:.2%}"),
        ("top-1 in ONNX Runtime", "", f"{found['onnx']['top1']:.2%}"),
        ("largest difference of the logits from PyTorch's", "", f"{found['onnx']['max_abs']:.1e}"),
        ("same first guess as the teacher", "", f"{student['agreement']:.2%}"),
        ("mean error of the layers after stage 0", "", f"{found['fit_error']:.3f}"),
        ("parameters", f"{teacher['parameters']:,}", f"{student['parameters']:,}"),
        ("M MACs for one image", f"{teacher['macs'] / 1e6:.1f}", f"{student['macs'] / 1e6:.1f}"),
        (f"seconds in all, {found['environment']['device']}", "", f"{sum(found['seconds'].values()):.0f}"),
    ]
    return grid((f"{student['images']:,} test images", "teacher", "student"), rows)


def ridge(found: Document) -> list[str]:
    """Held-out cosine on the way, for every start of the mixers."""
    runs: dict[str, list[Document]] = {}
    for run in found["runs"]:
        run["at"] = {(one["stage"], one["step"]): one["cosine"] for one in run["curve"]}
        runs.setdefault(run["start"], []).append(run)

    def row(title: str, value: Callable[[Document], float], digits: int = 4) -> Row:
        return [title, *(f"{mean(map(value, same)):.{digits}f}" for same in runs.values())]

    def at(point: tuple[str, int]) -> Row:
        return row(f"cosine at {STAGES[point[0]]}, step {point[1]}", lambda run: run["at"][point])

    points = {stage: sorted(point for point in run["at"] if point[0] == stage) for stage in ("align", "recover")}
    rows = [
        row("error of the layers after stage 0", lambda run: run["fit_error"], 3),
        row("cosine after stage 0", lambda run: run["stages"][0]["cosine"]),
        *(at(one[-1]) for one in points.values()),
        row("top-1 after stage 2", lambda run: run["stages"][-1]["top1"]),
    ]
    return grid((f"mean of {len({run['seed'] for run in found['runs']})} seeds", *runs), rows)


def fit(found: Document) -> list[str]:
    """What the closed-form fit alone makes of a larger teacher."""
    layers, after = found["layers"], found["stages"][0]
    rows = [
        ("mean held-out error of the layers", f"{found['fit_error']:.3f}"),
        ("the same for an SVD of the attention's weights", f"{mean(one['errors']['svd'] for one in layers):.3f}"),
        *((f"cosine of the final {kind} tokens", f"{after[f'{kind}_cosine']:.3f}") for kind in ("patch", "prefix")),
        (f"seconds, {found['environment']['device']}", f"{after['seconds']:.0f}"),
    ]
    return grid((f"`{found['teacher']}`, {len(layers)} layers, stage 0 alone", ""), rows)


def costs(found: Document) -> list[str]:
    """Parameters, and MACs at growing sizes; token mixing alone is attention against mixers."""
    rows = [["parameters", "", *(f"{count / 1e6:.1f} M" for count in found["parameters"].values()), "", ""]]
    for size in found["sizes"]:
        both = size["teacher"], size["student"]
        fewer = [f"{both[0][part] / both[1][part]:.2f}x" for part in ("all", "mixing")]
        macs = [f"{one['all'] / 1e9:,.1f} G" for one in both]
        rows.append([f"MACs at {size['pixels']} px", f"{both[0]['tokens']:,}", *macs, *fewer])
    head = (f"`{found['teacher']}`, recipe `{found['recipe']}`", "patches", "teacher", "student")
    return grid((*head, "ratio", "ratio, mixing alone"), rows)


def line_scan(found: Document) -> list[str]:
    """How much faster the default CPU path is than the reference; one sentence."""
    ms: dict[str, dict[str, float]] = {"reference": {}, "eager": {}}
    for one in found["rows"]:
        # A row without a time says why; one case may be in the list in several dtypes.
        if "ms" in one and one["provider"] in ms:
            ms[one["provider"]][f"{one['shape']} {one.get('dtype')} {one['pass']}"] = one["ms"]
    ratios = sorted(time / ms["eager"][case] for case, time in ms["reference"].items() if case in ms["eager"])
    span = f"{ratios[0]:.1f} to {ratios[-1]:.1f} times (median {median(ratios):.1f})"
    return [f"The scan's default path is {span} as fast as the reference that defines it, on an {found['device']}."]


def kernels(found: Document) -> list[str]:
    """Time of the fused kernels, and the share of the speed at which a copy would move the same bytes."""
    rows = [one for one in found["rows"] if one["provider"] == "triton"]
    cases = list(dict.fromkeys(f"{'x'.join(map(str, one['shape']))}, {one['dtype']}" for one in rows))
    head = (f"{found['device']}, BxHxWxC: ms (share of a copy's speed)", *cases)
    names = {"infer": "inference", "train": "forward in training", "backward": "backward"}
    return grid(
        head,
        [
            (name, *(f"{one['ms']:.3g} ({100 * one['share_of_floor']:.0f}%)" for one in rows if one["pass"] == key))
            for key, name in names.items()
        ],
    )


TABLES: dict[str, tuple[str, Callable[[Document], list[str]]]] = {
    "demo": ("recipes/results/demo.json", demo),
    "ridge": ("recipes/results/ridge_curves.json", ridge),
    "dinov2": ("recipes/results/dinov2_small_fit.json", fit),
    "costs": ("recipes/results/costs.json", costs),
    "line_scan": ("kernels/benchmarks/results/cpu.json", line_scan),
    "kernels": ("kernels/benchmarks/results/h100.json", kernels),
}


def render(text: str, root: Path) -> tuple[str, list[str]]:
    """Fill the tables of a text from the files under `root`; also returns the files that are missing."""
    missing = []

    def fill(place: re.Match[str]) -> str:
        path, table = TABLES[place[2]]
        if not (root / path).exists():
            missing.append(path)
            return f"{place[1]}*Not measured yet: there is no `{path}`.*\n"
        found = json.loads((root / path).read_text())
        return place[1] + "\n".join([*table(found), ""])

    return PLACE.sub(fill, text), missing


def main() -> None:
    """Rewrite or check the README."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README.md is stale")
    only_check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text()
    fresh, missing = render(text, ROOT)
    for path in missing:
        print(f"no {path}: its table is left out", file=sys.stderr)
    if not only_check:
        readme.write_text(fresh)
    elif fresh != text:
        sys.exit("README.md is stale; mend it with: python recipes/scripts/tables.py")


if __name__ == "__main__":
    main()
