"""What every test can use: markers, tiny models, folders of pictures, files of a student, the command line."""

import contextlib
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import pytest
import torch
from click.testing import CliRunner, Result

# Without a GPU Triton interprets its kernels. It reads this when it is first imported, and timm imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell's background job ignores Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("helpers")

import timm  # noqa: E402
from timm.models import VisionTransformer  # noqa: E402

MakeTeacher = Callable[..., VisionTransformer]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)  # or what a test draws would depend on which ones ran before it


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """Finds ports for processes to meet at, below those that the kernel hands out to anybody who asks for one."""

    def find(count: int) -> list[int]:
        dice, ports = random.SystemRandom(), set[int]()
        while len(ports) < count:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", dice.randrange(20_000, 32_000)))
                ports.add(probe.getsockname()[1])
        return list(ports)

    return find


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and two test processes would fight for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_teacher() -> MakeTeacher:
    """Makes small real ViTs: 2 blocks of width 32 on 4 x 6 patches; no weight is left at 0 or 1."""

    def make(architecture: str = "vit_tiny_patch16_224", *, seed: int = 0, **changes: Any) -> VisionTransformer:
        size = dict(depth=2, embed_dim=32, num_heads=2, img_size=(32, 48), patch_size=8, num_classes=5)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            arguments = size | {"dynamic_img_size": True} | changes
            teacher = timm.create_model(architecture, **arguments)
            vars(teacher).setdefault("_model_args", arguments)  # timm records them since 1.0.31
            for parameter in teacher.parameters():
                # As built, biases are 0 and scales 1 or 1e-5: a mistake in carrying them over would not show.
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        return teacher.eval()

    return make


@pytest.fixture
def tiny_teacher(make_teacher: MakeTeacher) -> VisionTransformer:
    """The plain case: one class token, a head of 5 classes."""
    return make_teacher()


@pytest.fixture
def make_pair(make_teacher: MakeTeacher) -> Callable[..., tuple[VisionTransformer, VisionTransformer]]:
    """Makes a student whose every weight is off, and its teacher."""

    from gspn2convert.model import build_student
    from gspn2convert.recipe import Mixer

    def make(layers=(0, 1), regions=0, **changes):
        teacher = make_teacher(**{"reg_tokens": 2, "init_values": 0.5} | changes)
        student = build_student(teacher, list(layers), Mixer(proxy_dim=6, regions=regions).resolve(32))
        generator = torch.Generator().manual_seed(2)
        for parameter in student.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        return student, teacher

    return make


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of pictures: 0.png, 1.png, ... or any given names; those in `broken` are cut short."""

    from helpers.pictures import png

    def make(count: int = 10, *, names: list[str] | None = None, broken: tuple[int, ...] = ()) -> Path:
        folder = tmp_path / "pictures"
        for number, name in enumerate(names or [f"{number}.png" for number in range(count)]):
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            content = png(number)
            file.write_bytes(content[: len(content) // 2] if number in broken else content)
        return folder

    return make


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network and an empty cache, for the hub's client."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


class Exported(NamedTuple):
    """A student and a file of it."""

    student: VisionTransformer
    path: Path


LABELS = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="session")
def export_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Exports a student of one block, 16 x 24 pixels in patches of 8, to `NAME.onnx`."""
    from gspn2convert.export import export_onnx
    from gspn2convert.model import build_student

    folder = tmp_path_factory.mktemp("exported")

    def export(name: str, *, num_classes: int = len(LABELS), **arguments: Any) -> Exported:
        size = dict(depth=1, embed_dim=32, num_heads=2, img_size=(16, 24), patch_size=8, dynamic_img_size=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            teacher = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **size)
            vars(teacher).setdefault("_model_args", size | {"num_classes": num_classes})
            student = build_student(teacher, (0,), {"proxy_dim": 8}).eval()
            for parameter in student.parameters():
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        if num_classes:
            student.pretrained_cfg["label_names"] = LABELS
        export_onnx(student, folder / f"{name}.onnx", **arguments)
        return Exported(student, folder / f"{name}.onnx")

    return export


@pytest.fixture(scope="session")
def classifier(export_tiny: Callable[..., Exported]) -> Exported:
    """Classes with names; any batch, height and width."""
    return export_tiny("classifier")


@pytest.fixture(scope="session")
def feature_model(export_tiny: Callable[..., Exported]) -> Exported:
    """No head, fp16, and no shape but 2 x 3 x 16 x 24."""
    return export_tiny("features", num_classes=0, dtype="fp16", static=(2, 3, 16, 24))


@pytest.fixture
def run_cli() -> Callable[..., Result]:
    """Runs a command: `run_cli("recipes", "list").output`."""
    from gspn2convert.cli import main

    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])
