"""A ViT's embedding of images by matrix products, for exports and GPUs.

timm resizes the position embedding to the image's grid by bicubic, antialiased interpolation. As an ONNX `Resize` with
antialiasing that is wrong on some execution providers and refused by others. The map is linear and separable, so
one matrix of cubic weights per axis and two matrix products do the same with elementwise operators.

A convolution whose kernel is its stride cuts the image into patches and multiplies each by one matrix. As a product
ONNX Runtime's CUDA provider and PyTorch on a GPU compute it many times as fast as a convolution of three channels.

Shapes: B batch, P prefix tokens, S T old grid, H W new grid, the image's patches, C channels.
"""

from __future__ import annotations

from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# Keys' cubic kernel as PyTorch and Pillow use it when antialiasing.
_A = -0.5


class PatchConv2d(nn.Conv2d):
    """The convolution of a patch embedding, by a product on a GPU: cuDNN takes a millisecond for 2048 px in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, channels, height, width) to patches (B, C, H, W), as `nn.Conv2d` does."""
        if not x.is_cuda or not cuts_patches(self):
            return super().forward(x)
        rows, columns = self.kernel_size
        # What is beyond the last whole patch is left out, as a convolution does.
        return embed_by_product(self, x[..., : x.shape[2] // rows * rows, : x.shape[3] // columns * columns])


def make_embedding_portable(vit: VisionTransformer) -> None:
    """Make this one model embed images by matrix products, which every ONNX runtime computes alike.

    For an export's own copy of a model. timm's method stays what it is, with one name in it bound anew on this
    instance: nothing outside of the copy changes, so other threads may run timm meanwhile.
    """
    method = type(vit)._pos_embed
    names = {**method.__globals__, "resample_abs_pos_embed": resample_position}
    rebound = FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)
    vars(vit)["_pos_embed"] = MethodType(rebound, vit)
    convolution = vit.patch_embed.proj
    vars(convolution)["forward"] = MethodType(embed_by_product, convolution)


def cubic_weights(new: int, old: int, device: torch.device) -> Tensor:
    """Weights (new, old) of antialiased cubic resampling along one axis; the identity where new equals old.

    Pixel centres are aligned as in `interpolate(align_corners=False)`. The sizes may be symbolic.
    """
    centres = torch.arange(new, device=device, dtype=torch.float32) + 0.5
    sources = torch.arange(old, device=device, dtype=torch.float32) + 0.5
    # Counted in a tensor: the quotient of two symbolic sizes would not reach the exported graph.
    ratio = old / torch.ones_like(centres).sum()
    distance = (sources - (ratio * centres).unsqueeze(1)).abs() / ratio.clamp(min=1.0)
    near = ((_A + 2) * distance - (_A + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * _A - 4 * _A
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
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
    prefix, positions = embedding[0, :num_prefix_tokens], embedding[0, num_prefix_tokens:]
    grid = positions.float().unflatten(0, old_size).permute(2, 0, 1)
    rows = cubic_weights(new_size[0], old_size[0], embedding.device)
    columns = cubic_weights(new_size[1], old_size[1], embedding.device)
    resampled = (rows @ grid @ columns.T).flatten(1).T.to(embedding.dtype)
    return torch.cat([prefix, resampled]).unsqueeze(0)


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
    patches = images.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).permute(0, 2, 4, 1, 3, 5)
    return F.linear(patches.flatten(3), convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)


def cuts_patches(convolution: nn.Conv2d) -> bool:
    """Tell whether a convolution cuts images into patches, each pixel in one, and multiplies each by one matrix."""
    found = (getattr(convolution, name) for name in ("kernel_size", "padding", "dilation", "groups"))
    return tuple(found) == (convolution.stride, (0, 0), (1, 1), 1)
