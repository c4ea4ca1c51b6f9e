"""A ViT's embedding of images by matrix products, for exports and GPUs.

timm resizes the position embedding to the image's grid by bicubic, antialiased interpolation. As an ONNX `Resize` with
antialiasing that is wrong on some execution providers and refused by others, and on a GPU it takes half a millisecond
for 2048 px. The map is linear and separable, so one matrix of cubic weights per axis and two matrix products do the
same with elementwise operators, and leave the channels last, where timm wants them.

A convolution whose kernel is its stride cuts the image into patches and multiplies each by one matrix. As a product
ONNX Runtime's CUDA provider and PyTorch on a GPU compute it many times as fast as a convolution of three channels.

Shapes: B batch, P prefix tokens, S T old grid, H W new grid, the image's patches, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gspn2_kernels.operands import at_least, by_triton, exporting, no_autocast
from gspn2convert.vit import FinalNorm


class PatchConv2d(nn.Conv2d):
    """The convolution of a patch embedding, by a product on a GPU: cuDNN takes a millisecond for 2048 px in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, channels, height, width) to patches (B, C, H, W), as `nn.Conv2d` does."""
        if not x.is_cuda or not cuts_patches(self):
            return super().forward(x)
        rows, columns = self.kernel_size
        # What is beyond the last whole patch is left out, as a convolution does.
        return embed_by_product(self, x[..., : x.shape[2] // rows * rows, : x.shape[3] // columns * columns])


def embed_and_norm_by_kernels(vit: VisionTransformer) -> None:
    """Make a plain patch convolution a PatchConv2d and timm's last norm a FinalNorm in place; others stay."""
    if type(vit.patch_embed.proj) is nn.Conv2d:
        vit.patch_embed.proj.__class__ = PatchConv2d
    if type(vit.norm) is FinalNorm.__base__:
        vit.norm.__class__ = FinalNorm


def by_products(pos_embed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a `_pos_embed` method of timm's into one that resamples positions by products.

    timm's own stays what it is, for all other models: the result is its code, with one name in it bound anew.
    """
    assert isinstance(pos_embed, FunctionType)
    names = {**pos_embed.__globals__, "resample_abs_pos_embed": resample_position}
    code, name = pos_embed.__code__, pos_embed.__name__
    return FunctionType(code, names, name, pos_embed.__defaults__, pos_embed.__closure__)


def make_embedding_portable(vit: VisionTransformer) -> None:
    """Make this one model embed images by matrix products, which every ONNX runtime computes alike.

    For an export's own copy of a model. A converted model resamples positions so in any case, a plain ViT does not.
    """
    vars(vit)["_pos_embed"] = MethodType(by_products(type(vit)._pos_embed), vit)
    convolution = vit.patch_embed.proj
    vars(convolution)["forward"] = MethodType(embed_by_product, convolution)


def cubic_weights(new: int, old: int, device: torch.device) -> Tensor:
    """Weights (new, old) of antialiased cubic resampling along one axis; the identity where new equals old.

    Pixel centres are aligned as in `interpolate(align_corners=False)`. The sizes may be symbolic.
    """
    if isinstance(new, int) and isinstance(old, int) and not exporting():
        # What PyTorch's own resampling makes of unit vectors: a few launches on a GPU, and not two dozen.
        units = torch.eye(old, device=device, dtype=torch.float32)[None, None]
        return F.interpolate(units, (new, old), mode="bicubic", antialias=True)[0, 0]
    centres = torch.arange(new, device=device, dtype=torch.float32) + 0.5
    sources = torch.arange(old, device=device, dtype=torch.float32) + 0.5
    ratio: Any = old / new
    scale = at_least(ratio, 1.0)
    distance = (sources - (ratio * centres).unsqueeze(1)).abs() / scale
    # Twice Keys' kernel with a = -1/2, which PyTorch and Pillow take when antialiasing: a cubic that ends at a distance
    # of 2 and one that ends at 1. Few operations, for on a GPU each is a launch.
    wide, narrow = F.relu(2 - distance), F.relu(1 - distance)
    weights = wide * wide * (wide - 1) + narrow * narrow * (2 - 4 * narrow)
    return weights / weights.sum(1, keepdim=True)


def resample_position(
    embedding: Tensor, new_size: tuple[int, int], old_size: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """Resample a position embedding to another grid; bit-equal to it where the grids are the same.

    Args:
        embedding: (1, P + S T, C).
        new_size: H, W.
        old_size: S, T.
        num_prefix_tokens: P, rows at the start that belong to no position and stay.

    Returns:
        (1, P + H W, C) in the dtype of the embedding, computed in fp32 as timm does.
    """
    # Symbolic sizes of an export are not compared: that would settle them.
    known = all(isinstance(size, int) for size in (*new_size, *old_size))
    if known and tuple(new_size) == tuple(old_size):
        return embedding
    prefix, positions = embedding[:, :num_prefix_tokens], embedding[:, num_prefix_tokens:]
    grid = positions[0].float().unflatten(0, old_size)
    rows = cubic_weights(new_size[0], old_size[0], embedding.device)
    alike = known and new_size[0] == new_size[1] and old_size[0] == old_size[1]
    columns = rows if alike else cubic_weights(new_size[1], old_size[1], embedding.device)
    with no_autocast(embedding.device.type):
        # Not by `@`, which would copy the grid where that has a gradient.
        widened = torch.bmm(columns.expand(old_size[0], -1, -1), grid)  # (S, W, C)
        resampled = rows @ widened.flatten(1)  # (H, W C)
    resampled = resampled.to(embedding.dtype).view(1, -1, embedding.shape[2])
    return torch.cat([prefix, resampled], 1) if num_prefix_tokens else resampled


def embed_by_product(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    """What a convolution of whole patches gives, by a product.

    Args:
        convolution: its kernel is its stride; without padding, dilation and groups.
        images: (B, channels, H times the patch's rows, W times its columns).

    Returns:
        (B, C, H, W).
    """
    assert cuts_patches(convolution), "patches overlap, leave something out, or are no patches"
    rows, columns = convolution.kernel_size
    numbers = 8 // images.element_size()
    steps = (columns, images.storage_offset(), *images.stride()[:3])
    aligned = images.stride(3) == 1 and all(step % numbers == 0 for step in steps)
    if by_triton(images) and aligned and not torch.is_grad_enabled():
        # The copy takes 8 bytes at once, and a third of the time.
        patches = _cut(images.view(torch.int64), rows, columns // numbers).contiguous().view(images.dtype)
    else:
        patches = _cut(images, rows, columns)
    return F.linear(patches, convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)


def _cut(images: Tensor, rows: int, columns: int) -> Tensor:
    """Cut images (B, channels, height, width) into patches (B, H, W, channels rows columns)."""
    return images.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).permute(0, 2, 4, 1, 3, 5).flatten(3)


def cuts_patches(convolution: nn.Conv2d) -> bool:
    """Tell whether a convolution cuts images into patches, each pixel in one, and multiplies each by one matrix."""
    found = (getattr(convolution, name) for name in ("kernel_size", "padding", "dilation", "groups"))
    return tuple(found) == (convolution.stride, (0, 0), (1, 1), 1)
