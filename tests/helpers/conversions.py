"""A small conversion: its recipe, its pictures, and what to compare of its end."""

import signal

import numpy as np
import timm
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

RECIPE = """
name: tiny
mixer: {proxy_dim: 8}
fit: {images: 32, held_out: 8, batch_size: 8}
align: {steps: 6, batch_size: 4}
recover: {steps: 6, batch_size: 4, ema: 0.5}
eval_every: 4
held_out: 12
"""
FILES = ["README.md", "config.json", "metrics.json", "model.safetensors", "recipe.yaml"]
SIZE = (48, 32)  # of PIL: width first
LABELS = ("ant", "bee", "cat", "dog", "elk")


class Pictures:
    """Soft random pictures in memory, class after class, that note which of them are read."""

    def __init__(self, count=70, *, seed=0, labels=LABELS, broken=(), terminate_at_read=None):
        noise = np.random.default_rng(seed)
        small = [Image.fromarray(noise.integers(0, 256, (4, 6, 3), dtype=np.uint8)) for _ in range(count)]
        self.images = [image.resize(SIZE, Image.Resampling.BICUBIC) for image in small]
        self.label_names, self.broken, self.terminate_at_read = labels, broken, terminate_at_read
        self.read_in_order = []

    def __len__(self):
        return len(self.images)

    def read(self, index):
        self.read_in_order.append(index)
        if len(self.read_in_order) == self.terminate_at_read:
            signal.raise_signal(signal.SIGTERM)
        if index in self.broken:
            raise OSError("image file is truncated")
        return self.images[index], index * len(LABELS) // len(self.images)

    def where(self, index):
        return f"picture {index}"

    def pixels(self, indices, teacher):
        """The pictures as the teacher wants to see them, without the help of the toolkit."""
        cfg = teacher.pretrained_cfg
        values = torch.tensor(np.stack([np.asarray(self.images[i]) for i in indices])).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        return (values - mean) / std


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def create(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@torch.no_grad()
def compare(student, teacher, images):
    """Cosines of the final tokens and agreement, computed at once."""
    ours, theirs = (vit.forward_features(images) for vit in (student, teacher))
    cosines, prefix = cosine_similarity(ours.double(), theirs.double(), dim=-1), teacher.num_prefix_tokens
    figures = {"prefix_cosine": cosines[:, :prefix].mean().item(), "patch_cosine": cosines[:, prefix:].mean().item()}
    guesses = [vit(images).argmax(-1) for vit in (student, teacher)]
    agreement = (guesses[0] == guesses[1]).double().mean().item()
    return {**figures, "cosine": sum(figures.values()) / 2, "agreement": agreement}


def top1(model, images, labels):
    with torch.no_grad():
        guesses = torch.cat([model(part).argmax(-1) for part in images.split(100)])
    return (guesses == labels).double().mean().item()
