"""The models that benchmarks compare: a ViT, and a student of it without attention; with random weights."""

from typing import Any

import timm
from timm.models import VisionTransformer

from gspn2convert.model import build_student


def teacher_and_student(name: str, *, regions: int = 0, **changes: Any) -> tuple[VisionTransformer, VisionTransformer]:
    """Build a timm ViT with some arguments, and convert all its layers with the proxy dimension of `default`, C/8."""
    arguments = {"dynamic_img_size": True, **changes}
    teacher = timm.create_model(name, **arguments).eval()
    vars(teacher).setdefault("_model_args", arguments)  # timm records them since 1.0.31
    mixer = {"proxy_dim": teacher.embed_dim // 8, "regions": regions}
    return teacher, build_student(teacher, range(len(teacher.blocks)), mixer)
