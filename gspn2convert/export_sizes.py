"""Sizes of an export: which of them stay free, at which it is traced, and at which it is compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

from timm.models.vision_transformer import VisionTransformer

from gspn2convert.errors import UserError
from gspn2convert.vit import grid_size, public_cfg


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of an export, height before width.

    Attributes:
        native: of the images to compare at first.
        patch: of a patch.
        channels: of the images.
        dynamic: whether height and width may change.
        padded: whether the model fills images up to whole patches itself.
        batch: images, where their number is fixed, as height and width then are.
    """

    native: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    dynamic: bool
    padded: bool
    batch: int | None = None

    def free(self) -> dict[int, str]:
        """Axes of the input that may change."""
        if self.batch is not None:
            return {}
        return {0: "batch", 2: "height", 3: "width"} if self.dynamic else {0: "batch"}

    def traced(self) -> tuple[int, int, int, int]:
        """Shape of the example; a batch of 1 would be taken for a constant, and H = W for one size."""
        if self.batch is not None:
            return self.batch, self.channels, *self.native
        if not self.dynamic:
            return 2, self.channels, *self.native
        rows = max(self.native[0] // self.patch[0], 2)
        return 2, self.channels, rows * self.patch[0], (rows + 1) * self.patch[1]

    def checked(self) -> list[tuple[int, int, int, int]]:
        """Shapes to compare at: one image, more of them and, where the size may change, wider ones."""
        height, width = self.native
        if self.batch is not None:
            return [self.traced()]
        shapes = [(1, self.channels, height, width), (3, self.channels, height, width)]
        if self.dynamic:
            columns = width // self.patch[1]
            wide = (columns + max(1, 3 * columns // 8)) * self.patch[1]
            shapes.append((2, self.channels, height, wide - (1 if self.padded else 0)))
        return shapes


def free_sizes(model: VisionTransformer, size: tuple[int, int] | None) -> Sizes:
    """Sizes of a file that takes any batch and, if the model does, any height and width.

    Args:
        model: what is exported.
        size: height and width to compare at; the model's own by default.

    Raises:
        UserError: the model does not take this size.
    """
    cfg = public_cfg(model)
    channels, *own = cfg["input_size"]
    height, width = size or own
    grid_size(model, height, width)
    return Sizes(
        native=(height, width),
        patch=model.patch_embed.patch_size,
        channels=channels,
        dynamic=not cfg["fixed_input_size"],
        padded=model.patch_embed.dynamic_img_pad,
    )


def static_sizes(model: VisionTransformer, shape: tuple[int, int, int, int]) -> Sizes:
    """Sizes of a file that takes one shape (batch, channels, height, width) alone.

    Raises:
        UserError: the model does not take this shape.
    """
    batch, channels, height, width = shape
    own = free_sizes(model, (height, width))
    if batch < 1 or channels != own.channels:
        raise UserError(f"shape {shape}: expected one image or more of {own.channels} channels")
    return replace(own, dynamic=False, batch=batch)
