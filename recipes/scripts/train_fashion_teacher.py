r"""Train a teacher on the whole of Fashion-MNIST: the demo's ViT of 0.7 M parameters, or a ViT-Ti of patch 2.

The data are the four .gz files that Debian's package `dataset-fashion-mnist` installs. Nothing is
selected on the test set: the averaged weights at the last step are measured on it once.
Run from the repository's root, on one GPU or, by torchrun, on several that share each batch:

    python recipes/scripts/train_fashion_teacher.py --output OUT
    torchrun --nproc-per-node 2 recipes/scripts/train_fashion_teacher.py --model vit_tiny --epochs 90 \
        --batch-size 1024 --lr 1.5e-3 --output OUT
"""

import argparse
import copy
import json
import logging
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from make_demo_data import read_split
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from gspn2convert.processes import average_gradients

log = logging.getLogger("train_fashion_teacher")

ARCHITECTURE = "vit_tiny_patch16_224"
SHAPES = {
    "demo": {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3},
    "vit_tiny": {"patch_size": 2, "embed_dim": 192, "depth": 12, "num_heads": 3},
}
MEAN, STD = 0.2860, 0.3530  # of the training pixels, scaled to 0..1
LABELS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def model_arguments(model: str) -> dict[str, Any]:
    """Return what timm's entry point takes."""
    return {"img_size": 28, "in_chans": 1, "num_classes": 10, "dynamic_img_size": True, **SHAPES[model]}


def config(model: str) -> dict[str, Any]:
    """Return the config.json that timm reads."""
    arguments = model_arguments(model)
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 10,
        "num_features": arguments["embed_dim"],
        "global_pool": "token",
        "label_names": LABELS,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "fashion_mnist", "input_size": [1, 28, 28], "fixed_input_size": False, "interpolation": "bicubic",
            "crop_pct": 1.0, "crop_mode": "center", "mean": [MEAN], "std": [STD], "num_classes": 10,
            "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0",
        },
    }  # fmt: skip


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 images (B, 28, 28) into normalised float images (B, 1, 28, 28)."""
    return (images[:, None].float() / 255 - MEAN) / STD


def augment(images: Tensor) -> Tensor:
    """Flip, shift by up to two pixels, zoom half of the images, and erase a box in every fourth.

    Args:
        images: Normalised images (B, 1, 28, 28).

    Returns:
        New images of the same shape.
    """
    count, device = len(images), images.device
    uniform = torch.rand(10, count, device=device)
    zoom = 1 - (uniform[0] < 0.5).float() * (0.35 * uniform[1])  # the share of the side that is seen
    flip = 1 - 2 * (uniform[2] < 0.5).float()
    # Whole pixels, so that images that are not zoomed stay as sharp as those of the test set.
    shift = (5 * uniform[3:5] - 2.5).round() * (2 / 28)
    zero = torch.zeros_like(zoom)
    affine = torch.stack([zoom * flip, zero, shift[0], zero, zoom, shift[1]], dim=1).view(count, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    background = -MEAN / STD
    images = F.grid_sample(images - background, grid, align_corners=False) + background
    half = (uniform[5] < 0.25).float() * (2 + 4 * uniform[6:8])  # half the sides of the erased box
    pixels = torch.arange(28, device=device) + 0.5
    rows, columns = ((pixels - 28 * uniform[8 + i, :, None]).abs() < half[i, :, None] for i in (0, 1))
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


@torch.no_grad()
def start_as_if_trained(model: VisionTransformer) -> None:
    """Start attention as trained ViTs have it: tokens look at their like, and values are subtracted.

    "Mimetic initialization" (Trockman and Kolter, 2023): per head Wq' Wk is about 0.7 (Z + I), and Wv' Wo about
    0.4 (Z - I), with Z of random numbers. It counts for much where images are few and small.
    """
    side = model.patch_embed.grid_size
    model.pos_embed[0, model.num_prefix_tokens :] = timm.layers.build_sincos2d_pos_embed(list(side), model.embed_dim)
    for block in model.blocks:
        attention, dim = block.attn, model.embed_dim
        each = dim // attention.num_heads
        query, key, value = attention.qkv.weight.view(3, attention.num_heads, each, dim)
        for head in range(attention.num_heads):
            left, size, right = torch.linalg.svd(0.7 * (torch.randn(dim, dim) / each**0.5 + torch.eye(dim)))
            query[head] = (left[:, :each] * size[:each].sqrt()).T
            key[head] = right[:each] * size[:each, None].sqrt()
        left, size, right = torch.linalg.svd(0.4 * (torch.randn(dim, dim) / dim**0.5 - torch.eye(dim)))
        value.view(dim, dim).copy_((left * size.sqrt()).T)
        attention.proj.weight.copy_(right.T * size.sqrt())


def mixed_loss(model: nn.Module, images: Tensor, labels: Tensor, share: Tensor, smoothing: float) -> Tensor:
    """Return the mean cross entropy of images (B, 1, 28, 28) mixed with those of the batch in reverse order."""
    logits = model(torch.lerp(images.flip(0), images, share)).float()
    first = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return share * first + (1 - share) * F.cross_entropy(logits, labels.flip(0), label_smoothing=smoothing)


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of the step: launching its kernels one by one takes far longer than they do."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # lets the libraries allocate what they need before recording
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def train(model: nn.Module, images: Tensor, labels: Tensor, arguments: argparse.Namespace) -> nn.Module:
    """Train the model and return a copy of it with the running average of its weights."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    size, per_epoch = arguments.batch_size, len(images) // arguments.batch_size
    steps = min(arguments.epochs * per_epoch, arguments.max_steps or sys.maxsize)
    average = copy.deepcopy(model).requires_grad_(False)
    batch_images, batch_labels = images[: size // world].clone(), labels[: size // world].clone()
    lr, share, last = (torch.zeros((), device=images.device) for _ in range(3))
    how = {"betas": (0.9, 0.98), "weight_decay": 0.05, "fused": True, "capturable": images.is_cuda}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **how)
    assert optimizer.param_groups[0]["lr"] is lr

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        views = augment(normalise(batch_images))
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            loss = mixed_loss(model, views, batch_labels, share, arguments.smoothing)
        last.copy_(loss.detach())
        loss.backward()
        if world > 1:
            average_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in model.parameters()], 1 - 0.999)

    run = recorded(step) if images.is_cuda else step
    start = time.monotonic()
    order = torch.empty(0, dtype=torch.long)
    for number in range(steps):
        if number % per_epoch == 0:
            order = torch.randperm(len(images)).to(images.device)  # the same in all processes
            log.info("epoch %d: loss %.3f, %.1f s", number // per_epoch, last.item(), time.monotonic() - start)
        chosen = order[(number % per_epoch) * size :][:size][rank::world]
        batch_images.copy_(images[chosen])
        batch_labels.copy_(labels[chosen])
        # A linear warm-up over 5 % of the steps, and a cosine down to zero.
        lr.fill_(arguments.lr * min((number + 1) * 20 / steps, 0.5 + 0.5 * math.cos(math.pi * number / steps)))
        share.fill_(random.betavariate(0.2, 0.2))  # mixup
        run()
    return average


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers in percent, in fp32."""
    model.eval()
    parts = zip(images.split(1000), labels.split(1000), strict=True)
    right = [(model(normalise(x)).argmax(1) == y).sum() for x, y in parts]
    return 100 * torch.stack(right).sum().item() / len(labels)


def save(model: nn.Module, name: str, folder: Path) -> nn.Module:
    """Write the folder that timm's `local-dir:` loads, and return the model loaded back from it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.cpu().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(name), indent=2) + "\n")
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def tensors(folder: Path, split: str, device: str) -> tuple[Tensor, Tensor]:
    """Read a split as uint8 images (count, 28, 28) and int64 labels (count,) on the device."""
    images, labels = read_split(folder, split)
    return torch.from_numpy(images.copy()).to(device), torch.from_numpy(labels.astype(np.int64)).to(device)


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for config.json and model.safetensors")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="[%(default)s]")
    for name, default in (("epochs", 150), ("batch-size", 512), ("lr", 2e-3), ("smoothing", 0.05), ("seed", 0)):
        parser.add_argument(f"--{name}", type=type(default), default=default, help="[%(default)s]")
    parser.add_argument("--model", choices=SHAPES, default="demo", help="[%(default)s]")
    parser.add_argument("--max-steps", type=int, help="stop early, for a trial")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    return parser.parse_args()


def join(device: str) -> tuple[int, int]:
    """Join the processes that torchrun started; the number of this one, and how many there are."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if device == "cuda":
        torch.cuda.set_device(rank)
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return rank, world


def main() -> None:
    """Train, save, measure the saved model and write metrics.json."""
    arguments = read_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(arguments.seed)
    random.seed(arguments.seed)
    rank, world = join(arguments.device)
    start = time.monotonic()
    data = {split: tensors(arguments.data, split, arguments.device) for split in ("train", "t10k")}
    model = timm.create_model(ARCHITECTURE, drop_path_rate=0.05, **model_arguments(arguments.model))
    if arguments.model != "demo":  # whose published weights were trained from timm's own start
        start_as_if_trained(model)
    if arguments.device == "cuda":
        torch.cuda.manual_seed(arguments.seed + rank)  # views of its own for each process
    average = train(model.to(arguments.device).train(), *data["train"], arguments)
    if rank:
        return
    saved = save(average, arguments.model, arguments.output).to(arguments.device)
    asked = ("model", "epochs", "batch_size", "lr", "smoothing", "seed", "max_steps")
    metrics = {
        "data": "Fashion-MNIST: 60000 training images, 10000 test images",
        "test_top1": accuracy(saved, *data["t10k"]),
        "parameters": sum(p.numel() for p in saved.parameters()),
        "minutes": round((time.monotonic() - start) / 60, 2),
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU",
        "processes": world,
        **{key: getattr(arguments, key) for key in asked},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }
    (arguments.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    log.info("%s", metrics)


if __name__ == "__main__":
    main()
