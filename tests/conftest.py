"""What every test can use: markers, a tiny teacher, the command line."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

# Without a GPU Triton interprets its kernels. It reads this when it is first imported, and timm imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import timm  # noqa: E402
from timm.models import VisionTransformer  # noqa: E402

MakeTeacher = Callable[..., VisionTransformer]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


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
def run_cli() -> Callable[..., Result]:
    """Runs a command: `run_cli("recipes", "list").output`."""
    from gspn2convert.cli import main

    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])
