"""The models that benchmarks compare: a ViT, and a student of it without attention; with random weights."""

import timm
from timm.models import VisionTransformer

from gspn2convert.model import build_student


def teacher_and_student(name: str) -> tuple[VisionTransformer, VisionTransformer]:
    """Build a timm ViT, and convert all its layers with the proxy dimension of recipe `default`, C/8."""
    teacher = timm.create_model(name, dynamic_img_size=True).eval()
    vars(teacher).setdefault("_model_args", {"dynamic_img_size": True})  # timm records them since 1.0.31
    return teacher, build_student(teacher, range(len(teacher.blocks)), {"proxy_dim": teacher.embed_dim // 8})
