"""Tables and sentences of the READMEs that come from kernels/benchmarks/results; see tables.py."""

from markdown_grid import Document, grid, series


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
    """Time of a whole student beside its teacher, as CUDA graphs and launched kernel by kernel."""
    sizes = found["sizes"]
    head = f"`{found['model']}`, {found['environment']['device']}, {found['dtype']}: ms"
    columns = [f"{one['height']} px, batch {one['batch_size']}" for one in sizes]
    rows = [(who, *(f"{one[who]['median_ms']:.2f}" for one in sizes)) for who in ("teacher", "student")]
    launched = [" and ".join(f"{one[who]['launched_ms']:.1f}" for who in ("teacher", "student")) for one in sizes]
    speed = ("speed", *(f"{one['speedup']:.2f}x" for one in sizes))
    return grid((head, *columns), [*rows, speed, ("both launched from Python", *launched)])


def summary_speed(found: Document) -> list[str]:
    """How many times as fast a student is as its teacher; one sentence."""
    figures = series([f"{one['speedup']:.2f} ({one['height']} px)" for one in found["sizes"]])
    return [
        f"**Speed.** A ViT-B/16 whose blocks all use scans is {figures} times as fast as its"
        f" teacher, in PyTorch and {found['dtype']} on one {found['environment']['device']}, both as CUDA graphs."
    ]


def models_regions(found: Document) -> list[str]:
    """The same of a student whose mixers read regions; two sentences."""
    sizes = found["sizes"]
    launched = sorted(one["student"]["launched_ms"] for one in sizes)
    figures = [
        f"{one['student']['median_ms']:.2f} ms at {one['height']} px ({one['speedup']:.2f}x the teacher's speed)"
        for one in sizes
    ]
    return [
        f"The same student with `regions: {found['regions']}` (measured with commit"
        f" {found['environment']['commit'][:7]}) takes {', '.join(figures)}. Launched from Python it takes"
        f" {launched[0]:.0f} to {launched[-1]:.0f} ms."
    ]


def sublayers(found: Document) -> list[str]:
    """How much faster a mixer's sub-layer is than attention's; one sentence."""
    pairs = _pairs(found, "time")
    ratios = [f"{a['ms'] / m['ms']:.1f} times at {a['height']}x{a['width']}" for a, m in pairs]
    mixer = pairs[0][1]
    return [
        f"The mixer's sub-layer alone, from norm to residual, is {' and '.join(ratios)} patches as fast as that of"
        f" cuDNN's attention ({mixer['batch']} images, C = {mixer['channels']}, R = {mixer['proxy']},"
        f" {found['device']}). Both run as CUDA graphs; launched from Python, the mixer takes"
        f" {mixer['eager_ms']:.2f} ms instead of {mixer['ms']:.2f} at {mixer['height']}x{mixer['width']}.",
    ]


def memory(found: Document) -> list[str]:
    """What a mixer's sub-layer keeps for a backward, beside attention's; one sentence."""
    ((attention, mixer),) = _pairs(found, "memory")
    share = mixer["activation_bytes"] / attention["activation_bytes"]
    case = f"{mixer['batch']} images of {mixer['height']}x{mixer['width']} patches and C = {mixer['channels']}"
    return [f"In training this sub-layer stores {share:.0%} of the bytes that attention's stores ({case})."]


def _pairs(found: Document, what: str) -> list[tuple[Document, Document]]:
    """The rows of cuDNN's attention, each with the mixer's."""
    rows = {
        (one["sublayer"], one["height"]): one for one in found["rows"] if one["what"] == what and not one["compiled"]
    }
    return [(one, rows["mixer", height]) for (name, height), one in rows.items() if name == "attention, cuDNN"]


def scaling(found: Document) -> list[str]:
    """How straight time grows with the tokens; one sentence."""
    off = {
        what: max(abs(one.get("off_line", 0.0)) for one in found["rows"] if one["what"] == what)
        for what in ("student", "line scan")
    }
    side = max(one["side"] for one in found["rows"])
    return [
        f"Time grows almost linearly from 64x64 to {side}x{side} patches (one image): it stays within"
        f" {off['student']:.1%} of a straight line for the student, and within {off['line scan']:.1%} for a scan alone."
    ]


def onnx_model(found: Document) -> list[str]:
    """Time of a student beside its teacher in ONNX Runtime and itself in PyTorch; two sentences."""
    ms = {row["what"]: row["ms"] for row in found["rows"] if row["part"] == "model" and "ms" in row}
    case = found["rows"][0]
    best, torch = ms["student, CUDA graph"], ms["student in PyTorch, CUDA graph"]
    return [
        f"ONNX Runtime {found['onnxruntime']}, {found['device']}, `{case['model']}` at {case['images'][2]} px, batch"
        f" {case['images'][0]}, {case['dtype']}: teacher {ms['teacher, CUDA graph']:.1f} ms, student {best:.1f} ms"
        f" ({ms['teacher']:.1f} and {ms['student']:.1f} without CUDA graphs),"
        f" {ms['teacher, CUDA graph'] / best:.1f} times as fast. PyTorch runs this student in {torch:.1f} ms: ONNX"
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
    assert all(one["same_bits"] for one in parity)
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


def onnx_cpu(found: Document) -> list[str]:
    """Times in ONNX Runtime on a CPU: a node alone, and a whole model with body, library and attention."""
    rows = []
    for one in found["rows"]:
        library = one["library"]["ms"]
        times = (one[other]["ms"] if other in one else None for other in ("body", "attention"))
        figures = (f"{ms:.2f} ({ms / library:.2f}x)" if ms else "" for ms in times)
        name = "a LineScan node" if one["what"] == "op" else "the whole model"
        rows.append((f"{name}, {one['size']} px", f"{library:.2f}", *figures))
    head = f"`{found['model']}`, {found['device']}, {found['threads']} thread: ms"
    return grid((head, "library", "function body", "attention"), rows)
