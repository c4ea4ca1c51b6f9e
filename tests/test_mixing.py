"""Mixed training images, against mixing by hand."""

from dataclasses import replace

import pytest
import torch

from gspn2convert.data import open_images, own_share
from gspn2convert.distill import Options, distill
from gspn2convert.errors import UserError
from gspn2convert.mixing import check_pairs, mix, mix_batches
from gspn2convert.recipe import Recover, load_recipe
from gspn2convert.supply import Supply
from gspn2convert.teachers import load_teacher
from gspn2convert.train import make_accelerator
from gspn2convert.vit import data_config

IMAGES = torch.randn(6, 3, 10, 20, generator=torch.Generator().manual_seed(0)) + 0.5


def draws(*rows):
    return torch.tensor(rows)


def test_blends_and_pastes_are_those_made_by_hand():
    # 0 and 1: not mixed; 2 and 3: a blend with 30 % and one with 90 %; 4 and 5: a quarter of the area, top left and
    # in the middle.
    mixed = mix(
        IMAGES,
        draws(
            *([0.9, 0.2, 0.7, 0.1, 0.1], [0.9, 0.7, 0.7, 0.1, 0.1]),
            *([0.1, 0.2, 0.3, 0.5, 0.5], [0.1, 0.4, 0.9, 0.5, 0.5]),
            *([0.1, 0.6, 0.25, 0.0, 0.0], [0.1, 0.8, 0.25, 0.4, 0.4]),
        ),
        0.5,
    )
    assert torch.equal(mixed[:2], IMAGES[:2])
    torch.testing.assert_close(mixed[2], 0.7 * IMAGES[2] + 0.3 * IMAGES[3])
    torch.testing.assert_close(mixed[3], 0.1 * IMAGES[3] + 0.9 * IMAGES[2])
    corner, middle = IMAGES[4].clone(), IMAGES[5].clone()
    corner[:, :5, :10] = IMAGES[5][:, :5, :10]
    middle[:, 2:7, 4:14] = IMAGES[4][:, 2:7, 4:14]
    assert torch.equal(mixed[4], corner)
    assert torch.equal(mixed[5], middle)


def test_so_many_are_mixed_and_half_of_them_pasted():
    images = torch.arange(4000.0).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    mixed = mix(images, torch.rand(4000, 5, generator=torch.Generator().manual_seed(1)), 0.3)
    other = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    changed = (mixed != images).flatten(1).any(1)
    pasted = changed & ((mixed == images) | (mixed == other)).flatten(1).all(1)
    # Of so many draws the shares are within 0.03; a paste of less than a pixel changes nothing.
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert pasted.sum().item() / changed.sum().item() == pytest.approx(0.5, abs=0.04)
    assert (mixed >= torch.minimum(images, other)).all()
    assert (mixed <= torch.maximum(images, other)).all()


def batches(steps, own):
    for step in steps:
        images = torch.randn(8, 3, 6, 4, generator=torch.Generator().manual_seed(step))
        yield images[own.start : own.stop]


def mixed(steps, rank=0, world=1, seed=3):
    own = own_share(8, rank, world)
    return list(mix_batches(batches(steps, own), 0.8, 8, own, seed, steps.start))


def test_a_step_is_mixed_alike_by_any_number_of_processes_and_after_any_start():
    whole = mixed(range(4))
    for step, (first, second) in enumerate(zip(mixed(range(4), 0, 2), mixed(range(4), 1, 2), strict=True)):
        assert torch.equal(torch.cat([first, second]), whole[step])
    assert all(torch.equal(a, b) for a, b in zip(mixed(range(2, 4)), whole[2:], strict=True))
    assert not torch.equal(mixed(range(1), seed=4)[0], whole[0])


def test_pairs_stay_with_a_process():
    check_pairs("recipe.align", 8, 2)
    with pytest.raises(
        UserError, match="align.batch_size 6: .* each of 2 processes .* a multiple of 4, or augment.mix 0"
    ):
        check_pairs("recipe.align", 6, 2)


@pytest.mark.parametrize("cached", [False, True])
def test_training_sees_mixed_images(cached):
    recipe, spec = load_recipe("demo"), Recover(steps=3, batch_size=8)
    images, config = open_images("demo", "train", in_chans=1), data_config(load_teacher("demo"))

    def training(share, first_step):
        asked = replace(recipe, augment=replace(recipe.augment, mix=share))
        supply = Supply(images, range(40), config, asked, make_accelerator("cpu"), workers=0, cached=cached)
        return list(supply.training(spec, 5, first_step))

    plain = training(0.0, 0)
    expected = list(mix_batches(iter(plain), 0.6, 8, range(8), 5, 0))
    assert not any(torch.equal(a, b) for a, b in zip(plain, expected, strict=True))
    for start in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(training(0.6, start), expected[start:], strict=True))


def test_an_odd_batch_is_refused_before_anything_runs(tmp_path):
    recipe = load_recipe("demo")
    recipe = replace(
        recipe, align=replace(recipe.align, batch_size=7), augment=replace(recipe.augment, mix=0.5), keep="none"
    )
    with pytest.raises(UserError, match="align.batch_size 7: .* a multiple of 2"):
        distill("demo", recipe, "demo", Options(output=tmp_path / "out", device="cpu", quiet=True))
    assert not (tmp_path / "out").exists()
