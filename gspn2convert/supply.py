"""Images of one size for the stages of a run: those of training, and those that no stage sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from gspn2convert.cache import ImageCache
from gspn2convert.data import ImageSet, batches, own_share, train_batches
from gspn2convert.mixing import mix_batches
from gspn2convert.recipe import Align, Recipe, Recover


class Supply:
    """Images of one size.

    Args:
        images: the set.
        train: indices of the images to train on.
        data_config: of the teacher, see `vit.data_config`; its input size is the size of all images.
        recipe: decides views and order.
        accelerator: decides the device, and this process's share.
        workers: processes that read images.
        cached: whether training images are decoded once and stay on the device, see `cache.ImageCache`.
    """

    def __init__(
        self,
        images: ImageSet,
        train: Sequence[int],
        data_config: dict[str, Any],
        recipe: Recipe,
        accelerator: Accelerator,
        *,
        workers: int,
        cached: bool,
    ) -> None:
        self.images, self.train, self.data_config, self.recipe = images, train, data_config, recipe
        self.accelerator, self.workers, self.cached = accelerator, workers, cached
        self._cache: ImageCache | None = None

    def plain(self, indices: Sequence[int], batch_size: int = 32) -> Iterator[Tensor]:
        """Images as evaluation sees them."""
        pairs = batches(
            self.images,
            self.data_config,
            indices=indices,
            batch_size=batch_size,
            augment=None,
            seed=self.recipe.seed,
            workers=self.workers,
        )
        return (pixels for pixels, _ in pairs)

    def prepare(self) -> None:
        """Decode images for the cache, where there is to be one."""
        if self.cached:
            self._cached()

    def shape(self, spec: Align | Recover) -> tuple[int, ...]:
        """Shape (B, channels, height, width) of this process's share of a batch of a stage."""
        return spec.batch_size // self.accelerator.num_processes, *self.data_config["input_size"]

    def training(self, spec: Align | Recover, seed: int, first_step: int) -> Iterator[Tensor]:
        """This process's share of a stage's batches from a step on, as training sees them."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if self.cached:
            views = self._cached().batches(spec.batch_size, seed, first_step, spec.steps, rank=rank, world=world)
        else:
            views = train_batches(
                self.images,
                self.data_config,
                indices=self.train,
                batch_size=spec.batch_size,
                augment=self.recipe.augment,
                seed=seed,
                first_step=first_step,
                steps=spec.steps,
                rank=rank,
                world=world,
                workers=self.workers,
            )
        there = (each.to(self.accelerator.device, non_blocking=True) for each in views)
        own, share = own_share(spec.batch_size, rank, world), self.recipe.augment.mix
        return mix_batches(there, share, spec.batch_size, own, seed, first_step) if share else there

    def _cached(self) -> ImageCache:
        if self._cache is None:
            self._cache = ImageCache(
                self.images,
                self.train,
                self.data_config,
                self.recipe.augment,
                device=self.accelerator.device,
                workers=self.workers,
            )
        return self._cache
