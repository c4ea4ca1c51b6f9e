"""Measure how many of its nearest images a teacher itself keeps when the images change a little.

    python recipes/scripts/self_agreement.py --teacher dinov2_small --data PHOTOS \
        --output recipes/results/self_agreement.json

A student that keeps as many is as near to its teacher as the teacher is to itself. Figures are as `gspn2convert
evaluate` makes them, on the test split; PHOTOS is what make_photos.py wrote.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accuracy import made_by
from timm.models import VisionTransformer
from torch import Tensor

from gspn2convert.artifact import write_atomic
from gspn2convert.data import open_images
from gspn2convert.evaluate import evaluate
from gspn2convert.teachers import load_teacher

NOISE = 0.1  # in deviations of the teacher's normalisation: of DINOv2's about 6 of 255 grey levels


def shifted(images: Tensor, pixels: int) -> Tensor:
    """Move images (B, C, H, W) down and to the right; what leaves the picture is lost, the edge is repeated."""
    return F.pad(images, (pixels, 0, pixels, 0), mode="replicate")[..., : images.shape[-2], : images.shape[-1]]


def resampled(images: Tensor) -> Tensor:
    """Make images (B, C, H, W) a tenth smaller and as large as they were."""
    small = F.interpolate(images, scale_factor=0.9, mode="bicubic", antialias=True)
    return F.interpolate(small, size=images.shape[-2:], mode="bicubic")


def noisy(images: Tensor) -> Tensor:
    """Add noise to images (B, C, H, W), the same to each batch."""
    return images + NOISE * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "a tenth smaller and back": resampled,
    "noise of 6 in 255 grey levels": noisy,
    "moved by one pixel down and to the right": lambda images: shifted(images, 1),
    "moved by four pixels": lambda images: shifted(images, 4),
    "mirrored": lambda images: images.flip(-1),
}


def seeing(teacher: VisionTransformer, change: Callable[[Tensor], Tensor]) -> VisionTransformer:
    """A teacher like this one that sees changed images."""
    other = copy.deepcopy(teacher)
    other.patch_embed.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]),))
    return other


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", required=True, help="as for gspn2convert distill")
    parser.add_argument("--teacher-weights", type=Path, help="as for gspn2convert distill")
    parser.add_argument("--data", required=True, help="as for gspn2convert distill")
    parser.add_argument("--size", type=int, default=224, help="of the images in pixels [%(default)s]")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images [%(default)s]")
    parser.add_argument("--commit", help="of the source, for a copy without its git history; default: ask git")
    parser.add_argument("--output", type=Path, required=True, help="results file to write")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(arguments.teacher, weights=arguments.teacher_weights, img_size=arguments.size)
    images = open_images(arguments.data, "test", in_chans=teacher.patch_embed.proj.in_channels)
    how = {"device": device, "workers": arguments.workers}
    rows = {name: evaluate(seeing(teacher, change), teacher, images, **how) for name, change in CHANGES.items()}
    found = {"teacher": arguments.teacher, "images": len(images), "changes": rows, **made_by(arguments.commit, device)}
    write_atomic(arguments.output, (json.dumps(found, indent=1) + "\n").encode())
    print({name: round(row["neighbour_agreement"], 3) for name, row in rows.items()})


if __name__ == "__main__":
    main()
