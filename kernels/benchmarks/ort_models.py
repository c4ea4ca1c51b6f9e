"""A converted ViT in ONNX Runtime against itself, and against the ViT; parts of onnx_op_cuda.py."""

from collections.abc import Iterator
from pathlib import Path

import torch
from conditions import DTYPES
from onnx_files import awake_pair, write_model
from ort_bound import Bound, Row, Setting, attempted, memcpy_nodes
from timing import synchronize
from torch import Tensor, nn

from gspn2_kernels.testing import relative_rms

DTYPE, TOLERANCE = "fp16", 5e-3  # against PyTorch in fp32; ONNX has no Einsum in bf16
MODEL, IMAGES = "vit_base_patch16_224", (4, 3, 1024, 1024)
SMALL_MODEL, SMALL_IMAGES = "vit_tiny_patch16_224", (2, 3, 96, 64)
SMALL_DEPTH, SMALL_DTYPES = 2, ("fp32", "fp16")


def export(setting: Setting) -> tuple[Path, Path]:
    """Write the files of student and teacher, for one shape of images, unless they are there."""
    paths = [setting.files / f"{name}.onnx" for name in ("student", "teacher")]
    if not all(path.exists() for path in paths):
        teacher, student = pair(setting)
        for path, model in zip(paths, (student, teacher), strict=True):
            write_model(model, path.with_suffix(".part"), DTYPE, images_shape(setting)).rename(path)
    return paths[0], paths[1]


def pair(setting: Setting) -> tuple[nn.Module, nn.Module]:
    """Build ViT and student."""
    return awake_pair(SMALL_MODEL, SMALL_DEPTH) if setting.dry else awake_pair(MODEL)


def images_shape(setting: Setting) -> tuple[int, int, int, int]:
    """Tell (B, 3, H, W)."""
    return SMALL_IMAGES if setting.dry else IMAGES


def title(setting: Setting) -> Row:
    """Tell what runs."""
    return {"model": SMALL_MODEL if setting.dry else MODEL, "images": images_shape(setting), "dtype": DTYPE}


def export_small(setting: Setting, dtype: str) -> Path:
    """Write the file of a small student, for images of any shape, unless it is there."""
    path = setting.files / f"small_{dtype}.onnx"
    if not path.exists():
        _, student = awake_pair(SMALL_MODEL, SMALL_DEPTH)
        write_model(student, path.with_suffix(".part"), dtype).rename(path)
    return path


def memcpy(setting: Setting) -> Iterator[Row]:
    """Count copies between host and device in a small student, of images of any shape."""
    for dtype in SMALL_DTYPES:
        yield attempted({"model": SMALL_MODEL, "depth": SMALL_DEPTH, "dtype": dtype}, copies, setting, dtype)


def copies(setting: Setting, dtype: str) -> Row:
    """Run the student and read the graph that ran."""
    _, student = awake_pair(SMALL_MODEL, SMALL_DEPTH)
    path = export_small(setting, dtype)
    images = torch.randn(SMALL_IMAGES).to(setting.device, DTYPES[dtype])
    logits = torch.empty(len(images), 1000, dtype=images.dtype, device=setting.device)
    optimized = optimized_file(path)
    session = Bound(path, {"image": images}, {"logits": logits}, library=True, optimized=optimized)
    session()
    synchronize(setting.device)
    with torch.inference_mode():
        want = student.to(setting.device)(images.float())
    return {"error": relative_rms(want, logits), **memcpy_nodes(optimized)}


class Models:
    """Student and teacher: their files, images, and what PyTorch makes of these."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.student_file, self.teacher_file = export(setting)
        teacher, student = pair(setting)
        self.student = student.to(setting.device).eval()
        images = torch.randn(images_shape(setting), generator=torch.Generator().manual_seed(0)).to(setting.device)
        with torch.inference_mode():
            self.want = {"student": self.student(images), "teacher": teacher.to(setting.device).eval()(images)}
        self.student.to(DTYPES[DTYPE])
        self.images = images.to(DTYPES[DTYPE])
        self.logits = torch.empty(self.want["student"].shape, dtype=DTYPES[DTYPE], device=setting.device)

    def open(self, which: str, *, graph: bool = False) -> Bound:
        """Open a session on one of the files."""
        path = self.student_file if which == "student" else self.teacher_file
        bound = {"image": self.images}, {"logits": self.logits}
        library = which == "student"
        return Bound(path, *bound, library=library, static=True, graph=graph, optimized=optimized_file(path))

    def run(self, session: Bound) -> Tensor:
        """Run, and copy the result."""
        self.logits.fill_(torch.nan)
        session()
        return self.logits.clone()

    def check(self, which: str, logits: Tensor) -> Row:
        """Compare with PyTorch in fp32.

        Raises:
            AssertionError: They differ too much.
        """
        error = relative_rms(self.want[which], logits)
        if not error <= TOLERANCE:
            raise AssertionError(f"relative RMS error {error:.2e}, expected at most {TOLERANCE:.0e}")
        return {"error": error, "tolerance": TOLERANCE}


def optimized_file(path: Path) -> Path:
    """Where the graph goes that runs."""
    return path.with_suffix(".optimized.onnx")


def model(setting: Setting) -> Iterator[Row]:
    """Time student and teacher in ONNX Runtime, and the student in PyTorch; compare the bits of a replay."""
    models = Models(setting)
    shown = title(setting)
    times: dict[str, float] = {}
    for which in ("student", "teacher"):
        for graph in (False, True):
            what = f"{which}{', CUDA graph' if graph else ''}"
            row = attempted({**shown, "what": what}, session_figures, models, which, graph=graph)
            times[what] = row.get("ms", 0.0)
            yield row
    yield attempted({**shown, "what": "copies"}, lambda: memcpy_nodes(optimized_file(models.student_file)))
    yield attempted({**shown, "what": "replay"}, replayed, models)
    row = attempted({**shown, "what": "student in PyTorch, CUDA graph"}, torch_figures, models)
    times["torch"] = row.get("ms", 0.0)
    yield row
    if setting.compiled:
        models.student.compile(dynamic=False)
        yield attempted({**shown, "what": "student in PyTorch, torch.compile"}, torch_figures, models)
    if best := min((ms for name, ms in times.items() if name.startswith("student") and ms), default=0.0):
        yield {**shown, "speedups": {name: round(ms / best, 3) for name, ms in times.items()}, "best_ms": best}


def session_figures(models: Models, which: str, *, graph: bool) -> Row:
    """Compare and time a session."""
    session = models.open(which, graph=graph)
    return {**models.check(which, models.run(session)), **models.setting.measured(session)}


def replayed(models: Models) -> Row:
    """Compare bits of a first run, of a replay after one with other images, and of a session without a CUDA graph.

    Raises:
        AssertionError: The graph does not read the images anew.
    """
    without = models.open("student")  # kept until the comparisons have waited, see `Bound`
    plain = models.run(without)
    session = models.open("student", graph=True)
    first = models.run(session)
    images = models.images.clone()
    models.images.copy_(images.flip(0))
    other = models.run(session)
    models.images.copy_(images)
    replay = models.run(session)
    if torch.equal(first, other):
        raise AssertionError("other images, the same logits")
    return {
        "replay_is_first_run": torch.equal(replay, first),
        "replay_is_session_without_graph": torch.equal(replay, plain),
        "relative_rms_to_session_without_graph": relative_rms(plain, replay),
    }


@torch.inference_mode()
def torch_figures(models: Models) -> Row:
    """Time the student in PyTorch; `eager_ms` without a graph."""
    found = models.check("student", models.student(models.images))
    return {**found, **models.setting.measured(lambda: models.student(models.images), capture=True)}
