"""Write the tables of the READMEs from the JSON files that commands of this repository wrote.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`. Where its JSON is missing, a note takes its place.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"(<!-- table:(\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
PAGES = ("README.md", "recipes/README.md", "kernels/README.md")
STAGES = {"fit": "stage 0", "align": "stage 1", "recover": "stage 2"}
# Of a step; the optimizer was timed without gradients in the run that is kept, so its row is left out.
PARTS = ("views", "teacher", "both models forward", "forward and backward")
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
        ("parameters", f"{teacher['parameters']:,}", f"{student['parameters']:,}"),
        (f"seconds in all, {found['environment']['device']}", "", f"{sum(found['seconds'].values()):.0f}"),
    ]
    return grid((f"{student['images']:,} test images", "teacher", "student"), rows)


def percent(share: float) -> str:
    """A share of 1 as text."""
    return f"{share:.1%}"


def dinov2(found: Document) -> list[str]:
    """What students of DINOv2 keep, on photographs that no stage saw."""
    columns = {
        "no attention left": found["pure-0"],
        f"blocks {', '.join(map(str, found['auto-0']['kept_layers']))} keep it": found["auto-0"],
        "the first, taken on to 518 px": found["hires-0"],
    }
    figures = [one["evaluation"] for one in columns.values()]
    probes = [one.get("fashion", {}) for one in figures]
    rows = [
        *(
            (f"cosine of {name} tokens, mean (5th percentile)", *(mean_and_tail(one[key]) for one in figures))
            for name, key in (("patch", "patch_cosine"), ("class", "prefix_cosine"))
        ),
        ("10 nearest images in common", *(percent(one["neighbour_agreement"]) for one in figures)),
        *(
            (f"{name} on Fashion-MNIST at 224 px (teacher {percent(probes[0][f'teacher_{key}'])})",)
            + tuple(percent(one[key]) if one else "" for one in probes)
            for name, key in (("k-NN", "knn"), ("linear probe", "linear"))
        ),
        (
            f"minutes, {found['pure-0']['environment']['device']}",
            *(f"{one['minutes']:.1f}" for one in columns.values()),
        ),
    ]
    return grid((f"DINOv2 ViT-S/14, {figures[0]['images']} crops of photographs", *columns), rows)


def mean_and_tail(cosine: dict[str, float]) -> str:
    """Mean and 5th percentile as text."""
    return f"{cosine['mean']:.3f} ({cosine['p5']:.3f})"


def fashion(found: Document) -> list[str]:
    """Top-1 of the students of a ViT-Ti; two sentences."""
    top1 = {name: f"{100 * row['evaluation']['top1']:.2f}" for name, row in found.items()}
    pure = [top1[name] for name in found if name.startswith("pure")]
    teacher = found["pure-0"]["evaluation"]["teacher_top1"]
    return [
        f"A ViT-Ti on Fashion-MNIST, top-1 {100 * teacher:.2f} %, keeps {' and '.join(pure)} % ({len(pure)} seeds)"
        f" without attention and {top1['auto-0']} % with three blocks of it;",
        f"attention that starts afresh reaches {top1['attention-0']} % by the same recipe, the paper's mixer"
        f" {top1['paper-0']} %, stage 0 alone {top1['stage0-0']} %.",
    ]


def controls(found: Document) -> list[str]:
    """Every row of a results file."""
    rows = []
    for name, row in found.items():
        figures = row["evaluation"]
        rows.append(
            (
                f"`{name}`: {row['what']}",
                f"{figures['top1']:.2%}" if "top1" in figures else "",
                *(f"{figures[key]['mean']:.3f}" for key in ("prefix_cosine", "patch_cosine")),
                f"{figures['neighbour_agreement']:.3f}",
                f"{row['minutes']:.1f}" + (" (shared)" if row["device_shared"] else ""),
            )
        )
    return grid(("row, seed", "top-1", "class cosine", "patch cosine", "10 neighbours", "minutes"), rows)


def throughput(found: Document) -> list[str]:
    """Speed of stage 2 on one and two GPUs, and the parts of its step."""
    one, two = found["1"], found["2"]
    kinds = ("with the mixer term", "without it")
    rows = [
        (f"images/s, GPUs: {gpus}", *(f"{run[kind]['images_per_second']:.0f}" for kind in kinds))
        for gpus, run in found.items()
    ]
    rows.append(
        (
            "two against one",
            *(f"{two[kind]['images_per_second'] / one[kind]['images_per_second']:.2f}x" for kind in kinds),
        )
    )
    rows += [(f"{part}, ms", *(f"{one[kind]['parts_ms'][part]:.1f}" for kind in kinds)) for part in PARTS]
    return grid(
        (f"`{one['teacher']}`, {one['batch_per_gpu']} images a GPU, {one['environment']['device']}", *kinds), rows
    )


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


def kernels(found: Document) -> list[str]:
    """Time of the fused kernels, and the share of the speed at which a copy would move the same bytes."""
    rows = [one for one in found["rows"] if one["provider"] == "triton"]
    cases = list(dict.fromkeys(f"{shape(one)}, {one['dtype']}" for one in rows))
    head = (f"{found['device']}, BxHxWxC: ms (share of a copy's speed)", *cases)
    names = {"infer": "inference", "train": "forward in training", "backward": "backward"}
    return grid(
        head,
        [
            (name, *(f"{one['ms']:.3g} ({100 * one['share_of_floor']:.0f}%)" for one in rows if one["pass"] == key))
            for key, name in names.items()
        ],
    )


def models(found: Document) -> list[str]:
    """Time of a whole student beside its teacher."""
    sizes = found["sizes"]
    head = f"`{found['model']}`, {found['environment']['device']}, {found['dtype']}: ms"
    columns = [f"{one['height']} px, batch {one['batch_size']}" for one in sizes]
    rows = [(who, *(f"{one[who]['median_ms']:.2f}" for one in sizes)) for who in ("teacher", "student")]
    return grid((head, *columns), [*rows, ("speed", *(f"{one['speedup']:.2f}x" for one in sizes))])


def sublayers(found: Document) -> list[str]:
    """How much faster a mixer's sub-layer is than attention's, and what it keeps for a backward; one sentence."""
    rows = {(one["sublayer"], one["what"], one["height"]): one for one in found["rows"] if not one["compiled"]}
    pairs = [(one, rows["mixer", key[1], key[2]]) for key, one in rows.items() if key[0] == "attention, cuDNN"]
    ratios = [f"{a['ms'] / m['ms']:.1f} times at {a['height']}x{a['width']}" for a, m in pairs if a["what"] == "time"]
    kept = [m["activation_bytes"] / a["activation_bytes"] for a, m in pairs if a["what"] == "memory"]
    case = pairs[0][0]
    return [
        f"The sub-layer alone, from norm to residual, {case['batch']} images of C = {case['channels']}, R ="
        f" {case['proxy']}: {' and '.join(ratios)} patches as fast as",
        f"cuDNN's attention. In training, with C = {pairs[-1][0]['channels']}, it keeps {kept[0]:.0%} of the bytes.",
    ]


def scaling(found: Document) -> list[str]:
    """How straight time grows with the tokens; one sentence."""
    off = {
        what: max(abs(one.get("off_line", 0.0)) for one in found["rows"] if one["what"] == what)
        for what in ("student", "line scan")
    }
    side = max(one["side"] for one in found["rows"])
    return [
        f"One image, 64x64 to {side}x{side} patches: time stays within {off['student']:.1%} of a straight line for the"
        f" student, and within {off['line scan']:.1%} for a scan alone."
    ]


def onnx_model(found: Document) -> list[str]:
    """Time of a student beside its teacher in ONNX Runtime and itself in PyTorch; two sentences."""
    ms = {row["what"]: row["ms"] for row in found["rows"] if "ms" in row}
    case = found["rows"][0]
    best, torch = ms["student, CUDA graph"], ms["student in PyTorch, CUDA graph"]
    return [
        f"ONNX Runtime {found['onnxruntime']}, {found['device']}, `{case['model']}` at {case['images'][2]} px, batch"
        f" {case['images'][0]}, {case['dtype']}: teacher {ms['teacher, CUDA graph']:.1f} ms, student {best:.1f} ms"
        f" ({ms['teacher']:.1f} and {ms['student']:.1f} without CUDA graphs),",
        f"{ms['teacher, CUDA graph'] / best:.1f} times as fast. PyTorch runs this student in {torch:.1f} ms: ONNX"
        f" Runtime takes {best / torch:.2f} times as long.",
    ]


def onnx_nodes(found: Document) -> list[str]:
    """Time of a LineScan node in ONNX Runtime, and the share of a copy's speed."""
    timed = [one for one in found["rows"] if one["part"] == "node" and "what" in one]
    rows: dict[str, list[str]] = {}
    for one in timed:
        name = one["what"].replace("torch op", "Triton in PyTorch").replace("nodes", "one of several nodes")
        rows.setdefault(name, [name]).append(f"{1e3 * one['ms_a_node']:.1f} ({one['share_of_floor']:.1%})")
    head = f"{found['device']}, {timed[0]['dtype']}, BxHxWxC: us a node (share of a copy's speed)"
    return grid((head, *dict.fromkeys(map(shape, timed))), rows.values())


def onnx_checks(found: Document) -> list[str]:
    """What was compared there, and a node against its function body; sentences."""
    parity = [one for one in found["rows"] if one["part"] == "parity"]
    library, body, ratio = (one for one in found["rows"] if one["part"] == "body")
    copies = [one for one in found["rows"] if one["part"] == "memcpy"]
    at_nodes, everywhere = (sum(len(one[key]) for one in copies) for key in ("memcpy_at_line_scans", "memcpy"))
    errors = {one["dtype"]: max(two["error"] for two in parity if two["dtype"] == one["dtype"]) for one in parity}
    return [
        f"{len(parity)} comparisons with the reference at {len(set(map(shape, parity)))} shapes: errors of at most"
        f" {', '.join(f'{error:.1e} ({dtype})' for dtype, error in errors.items())}, and two runs give the same bits.",
        f"At {shape(body)}, {body['dtype']}, a node takes {library['ms']:.2f} ms by the library and {body['ms']:.2f} ms"
        f" by its function body, {ratio['speedup']:.1f} times as long.",
        f"{len(copies)} students of any size copy between host and device {everywhere} times, {at_nodes} at a node.",
    ]


def cuda_scan(found: Document) -> list[str]:
    """How many comparisons the CUDA source passed by itself, and its times; one sentence."""
    times = ", ".join(f"{1e3 * one['ms']:.0f} us at {shape(one)}" for one in found["times"] if "plan" in one)
    passed = f"{found['checks'] - len(found['failed'])} of {found['checks']} comparisons"
    return [f"Without ONNX Runtime the CUDA source passes {passed} and takes, in bf16, {times}."]


def shape(row: Document) -> str:
    """BxHxWxC as text."""
    return "x".join(map(str, row["shape"]))


TABLES: dict[str, tuple[str, Callable[[Document], list[str]]]] = {
    "demo": ("recipes/results/demo.json", demo),
    "dinov2": ("recipes/results/dinov2_small_photos.json", dinov2),
    "fashion": ("recipes/results/fashion_mnist_vit_tiny.json", fashion),
    "fashion_rows": ("recipes/results/fashion_mnist_vit_tiny.json", controls),
    "dinov2_rows": ("recipes/results/dinov2_small_photos.json", controls),
    "throughput": ("recipes/results/throughput.json", throughput),
    "costs": ("recipes/results/costs.json", costs),
    "models": ("kernels/benchmarks/results/models_h100.json", models),
    "sublayers": ("kernels/benchmarks/results/mixer_h100.json", sublayers),
    "scaling": ("kernels/benchmarks/results/scaling_h100.json", scaling),
    "kernels": ("kernels/benchmarks/results/h100.json", kernels),
    "onnx_model": ("kernels/benchmarks/results/onnx_model_h100.json", onnx_model),
    "onnx_nodes": ("kernels/benchmarks/results/onnx_op_h100.json", onnx_nodes),
    "onnx_checks": ("kernels/benchmarks/results/onnx_op_h100.json", onnx_checks),
    "cuda_scan": ("kernels/benchmarks/results/cuda_line_scan_h100.json", cuda_scan),
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
