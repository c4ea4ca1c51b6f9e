"""Write the tables of the READMEs from the JSON files that commands of this repository wrote.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`. Where its JSON is missing, a note takes its place.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import kernel_tables
from markdown_grid import Document, grid, percent, series

ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"(<!-- table:(\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
PAGES = ("README.md", "recipes/README.md", "recipes/results/README.md", "kernels/README.md")
STAGES = {"fit": "stage 0", "align": "stage 1", "recover": "stage 2"}
DINOV2_ROWS = ("pure-0", "auto-0", "regions_pure-0", "regions-0")  # of the README
LARGE_ROWS = ("regions_pure", "regions")  # which also went on to larger images
THREE_SEEDS = ("auto", *LARGE_ROWS)
PARTS = ("views", "teacher", "both models forward", "forward and backward", "optimizer and average")  # of a step


def demo(found: Document) -> list[str]:
    """Accuracy, cost and time of `make demo`."""
    teacher, student = found["teacher"], found["student"]
    rows = [
        *((f"top-1 after {STAGES[one['stage']]}", "", f"{one['top1']:.2%}") for one in found["stages"]),
        ("top-1, loaded again from the folder", f"{teacher['top1']:.2%}", f"{student['top1']:.2%}"),
        ("top-1 in ONNX Runtime", "", f"{found['onnx']['top1']:.2%}"),
        ("largest difference of the logits from PyTorch's", "", f"{found['onnx']['max_abs']:.1e}"),
        ("same first guess as the teacher", "", f"{student['agreement']:.2%}"),
        ("parameters", f"{teacher['parameters']:,}", f"{student['parameters']:,}"),
        (f"seconds in all, {found['environment']['device']}", "", f"{sum(found['seconds'].values()):.0f}"),
    ]
    return grid((f"{student['images']:,} test images", "teacher", "student"), rows)


def dinov2(found: Document) -> list[str]:
    """What students of DINOv2 keep, on photographs that no stage saw."""
    columns = {f"{attention(one)}{reading(one)}": one for one in map(found.__getitem__, DINOV2_ROWS)}
    figures = [one["evaluation"] for one in columns.values()]
    rows = [
        *(
            (f"cosine of {name} tokens, mean (5th percentile)", *(mean_and_tail(one[key]) for one in figures))
            for name, key in (("patch", "patch_cosine"), ("class", "prefix_cosine"))
        ),
        ("10 nearest images in common", *(percent(one["neighbour_agreement"]) for one in figures)),
        (
            f"minutes, {found['pure-0']['environment']['device']}",
            *(f"{one['minutes']:.1f}" for one in columns.values()),
        ),
    ]
    return grid((f"DINOv2 ViT-S/14, {figures[0]['images']} crops of held-out pictures", *columns), rows)


def summary_accuracy(found: Document) -> list[str]:
    """How near the first and the last of them come to their teacher, and how long each took; two sentences."""
    rows = [found[row] for row in DINOV2_ROWS]
    first, last = (one["evaluation"]["patch_cosine"]["mean"] for one in (rows[0], rows[-1]))
    longest = max(float(one["minutes"]) for one in rows)
    return [
        f"**Fidelity.** The patch tokens of a converted DINOv2 ViT-S/14 have a mean cosine of {first:.3f} with the"
        f" teacher's, or {last:.3f} if three blocks keep attention and the mixers read regions. Each conversion took at"
        f" most {longest:.1f} minutes on one {rows[0]['environment']['device']}."
    ]


def attention(row: Document) -> str:
    """Which blocks keep attention."""
    if row["kept_layers"]:
        return f"blocks {', '.join(map(str, row['kept_layers']))} keep it"
    return "no block keeps attention"


def dinov2_probes(found: Document) -> list[str]:
    """What probes find; one sentence."""
    probes = [found[row]["evaluation"]["fashion"] for row in DINOV2_ROWS]
    teacher = {key: sorted({percent(one[f"teacher_{key}"]) for one in probes}) for key in ("knn", "linear")}
    knn, linear = (
        f"{', '.join(percent(one[key]) for one in probes)} (teacher, by run, {' to '.join(teacher[key])})"
        for key in teacher
    )
    return [
        "Probes on Fashion-MNIST at 224 px (training saw 6,000 of its images, without labels), top-1 of the students in"
        f" the order of the table: k-NN {knn}; linear probe {linear}."
    ]


def dinov2_large(found: Document) -> list[str]:
    """What students of more seeds keep, and those of one after they are taken on to larger images; two sentences."""
    second = [found[f"{row}-1"] for row in ("pure", *THREE_SEEDS)]
    third = [found[f"{row}-2"] for row in THREE_SEEDS]
    after = [found[f"{row}_518-1"] for row in LARGE_ROWS]
    small, smaller, large = (means(rows, "patch_cosine") for rows in (second, third, after))
    classes = means(after, "prefix_cosine")
    minutes = " and ".join(f"{row['minutes']:.1f}" for row in after)
    return [
        "More seeds: students like those of the table, with the blocks that each of them chose, have patch cosines of"
        f" {small} with a second seed; with a third, the last three have {smaller}. The recipe `hires` took the last"
        f" two of the second seed on to 518 px in {minutes} more minutes; at that size their patch cosines are {large}"
        f" and their class cosines {classes}."
    ]


def means(rows: list[Document], cosine: str) -> str:
    """Means of a cosine as text."""
    *most, last = (f"{row['evaluation'][cosine]['mean']:.3f}" for row in rows)
    return f"{', '.join(most)} and {last}"


def mean_and_tail(cosine: dict[str, float]) -> str:
    """Mean and 5th percentile as text."""
    return f"{cosine['mean']:.3f} ({cosine['p5']:.3f})"


def fashion(found: Document) -> list[str]:
    """Top-1 of the students of a ViT-Ti."""
    kinds = ("pure-", "auto-", "longer_pure-", "longer_auto-")
    rows = [[row for name, row in found.items() if name.startswith(kind)] for kind in kinds]
    top1 = [series([f"{100 * row['evaluation']['top1']:.2f}" for row in seeds]) for seeds in rows]
    longest = [max(sum(pair, []), key=lambda row: float(row["minutes"])) for pair in (rows[:2], rows[2:])]
    (steps, minutes), (more, further) = (
        (f"{row['recipe']['recover']['steps']:,}", f"{row['minutes']:.1f}") for row in longest
    )
    return [
        f"A ViT-Ti on Fashion-MNIST has a top-1 of {100 * longest[0]['evaluation']['teacher_top1']:.2f} %. Its students"
        f" have {top1[0]} % with no block of attention, and {top1[1]} % with three blocks of it (one figure per seed),"
        f" after {steps} steps of stage 2, at most {minutes} minutes on one {longest[0]['environment']['device']}."
        f" After {more} steps, at most {further} minutes, the former have {top1[2]} % ({len(rows[2])} of the seeds),"
        f" the latter {top1[3]} %."
    ]


def controls(found: Document) -> list[str]:
    """Every row of a results file."""
    rows = []
    for name, row in found.items():
        figures = row["evaluation"]
        rows.append(
            (
                f"`{name}`: {row['what']}{reading(row)}",
                f"{figures['top1']:.2%}" if "top1" in figures else "",
                *(f"{figures[key]['mean']:.3f}" for key in ("prefix_cosine", "patch_cosine")),
                f"{figures['neighbour_agreement']:.3f}",
                f"{row['minutes']:.1f}" + (" (shared)" if row["device_shared"] else ""),
            )
        )
    return grid(("row, seed", "top-1", "class cosine", "patch cosine", "10 neighbours", "minutes"), rows)


def reading(row: Document) -> str:
    """What else the mixers of a row do; early rows name their recipe alone."""
    recipe = row["recipe"]
    regions = 0 if isinstance(recipe, str) else recipe["mixer"].get("regions", 0)
    return f", mixers read {regions} x {regions} regions" if regions else ""


def self_agreement(found: Document) -> list[str]:
    """What a teacher keeps of its own neighbours."""
    rows = [
        (name, f"{row['prefix_cosine']['mean']:.3f}", f"{row['neighbour_agreement']:.3f}")
        for name, row in found["changes"].items()
    ]
    return grid((f"`{found['teacher']}` itself, {found['images']} images", "class cosine", "10 neighbours"), rows)


def throughput(found: Document) -> list[str]:
    """Speed of stage 2 on one GPU, and on two where that was measured, and the parts of its step."""
    one = found["1"]
    kinds = ("with the mixer term", "without it")
    rows = [
        (f"images/s, GPUs: {gpus}", *(f"{run[kind]['images_per_second']:.0f}" for kind in kinds))
        for gpus, run in found.items()
    ]
    if two := found.get("2"):
        ratios = (two[kind]["images_per_second"] / one[kind]["images_per_second"] for kind in kinds)
        rows.append(("two against one", *(f"{ratio:.2f}x" for ratio in ratios)))
    rows += [(f"{part}, ms", *(f"{one[kind]['parts_ms'][part]:.1f}" for kind in kinds)) for part in PARTS]
    return grid(
        (f"`{one['teacher']}`, {one['batch_per_gpu']} images a GPU, {one['environment']['device']}", *kinds), rows
    )


def costs(found: Document) -> list[str]:
    """Parameters, and MACs at growing sizes; token mixing alone is attention against mixers."""
    students = [name for name in found["parameters"] if name.startswith("regions")]
    millions = [f"{found['parameters'][name] / 1e6:.1f} M" for name in ("teacher", "student")]
    rows = [["parameters", "", *millions, *[""] * (2 + len(students))]]
    for size in found["sizes"]:
        both = size["teacher"], size["student"]
        fewer = [f"{both[0][part] / both[1][part]:.2f}x" for part in ("all", "mixing")]
        macs = [f"{one['all'] / 1e9:,.1f} G" for one in both]
        less = [f"{both[0]['all'] / size[name]['all']:.2f}x" for name in students]
        rows.append([f"MACs at {size['pixels']} px", f"{both[0]['tokens']:,}", *macs, *fewer, *less])
    head = (f"`{found['teacher']}`, recipe `{found['recipe']}`", "patches", "teacher", "student")
    return grid((*head, "ratio", "ratio, mixing alone", *(f"ratio with `{name}`" for name in students)), rows)


TABLES: dict[str, tuple[str, Callable[[Document], list[str]]]] = {
    "summary_speed": ("kernels/benchmarks/results/models_h200.json", kernel_tables.summary_speed),
    "summary_accuracy": ("recipes/results/dinov2_small_photos.json", summary_accuracy),
    "demo": ("recipes/results/demo.json", demo),
    "dinov2": ("recipes/results/dinov2_small_photos.json", dinov2),
    "fashion": ("recipes/results/fashion_mnist_vit_tiny.json", fashion),
    "dinov2_probes": ("recipes/results/dinov2_small_photos.json", dinov2_probes),
    "dinov2_large": ("recipes/results/dinov2_small_photos.json", dinov2_large),
    "fashion_rows": ("recipes/results/fashion_mnist_vit_tiny.json", controls),
    "fashion_control_rows": ("recipes/results/fashion_mnist_controls.json", controls),
    "demo_rows": ("recipes/results/demo_rows.json", controls),
    "dinov2_control_rows": ("recipes/results/dinov2_small_controls.json", controls),
    "dinov2_rows": ("recipes/results/dinov2_small_photos.json", controls),
    "trial_rows": ("recipes/results/trials.json", controls),
    "dinov2_earlier_rows": ("recipes/results/dinov2_small_earlier.json", controls),
    "self_agreement": ("recipes/results/self_agreement.json", self_agreement),
    "throughput": ("recipes/results/throughput.json", throughput),
    "throughput_earlier": ("recipes/results/throughput_earlier.json", throughput),
    "costs": ("recipes/results/costs.json", costs),
    "models": ("kernels/benchmarks/results/models_h200.json", kernel_tables.models),
    "models_regions": ("kernels/benchmarks/results/models_regions_h200.json", kernel_tables.models_regions),
    "sublayers": ("kernels/benchmarks/results/mixer_h200.json", kernel_tables.sublayers),
    "memory": ("kernels/benchmarks/results/mixer_training_h200.json", kernel_tables.memory),
    "scaling": ("kernels/benchmarks/results/scaling_h200.json", kernel_tables.scaling),
    "kernels": ("kernels/benchmarks/results/h200.json", kernel_tables.kernels),
    "onnx_model": ("kernels/benchmarks/results/onnx_model_h100.json", kernel_tables.onnx_model),
    "onnx_cpu": ("kernels/benchmarks/results/onnx_op_cpu.json", kernel_tables.onnx_cpu),
    "onnx_nodes": ("kernels/benchmarks/results/onnx_op_h100.json", kernel_tables.onnx_nodes),
    "onnx_checks": ("kernels/benchmarks/results/onnx_op_h100.json", kernel_tables.onnx_checks),
    "cuda_scan": ("kernels/benchmarks/results/cuda_line_scan_h100.json", kernel_tables.cuda_scan),
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
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is stale")
    only_check = parser.parse_args().check
    for name in PAGES:
        text = (ROOT / name).read_text()
        fresh, missing = render(text, ROOT)
        for path in missing:
            print(f"no {path}: its table is left out", file=sys.stderr)
        if not only_check:
            (ROOT / name).write_text(fresh)
        elif fresh != text:
            sys.exit(f"{name} is stale; mend it with: python recipes/scripts/tables.py")


if __name__ == "__main__":
    main()
