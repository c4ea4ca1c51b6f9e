"""The pictures of a conversion: their views, their labels, and those that cannot be read."""

import pytest

from gspn2convert.data import split_held_out, train_batches
from gspn2convert.errors import UserError
from gspn2convert.images import ImageSet
from gspn2convert.recipe import parse_recipe
from helpers.conversions import FILES, RECIPE, Pictures

pytestmark = pytest.mark.usefixtures("one_thread")


def test_augmented_views_are_those_of_each_stage_and_step(teacher, run):
    """Which pictures a stage sees depends on the seed and on the stage, and no held-out picture is among them."""
    pictures = Pictures()
    run(pictures=pictures)
    train, unseen = split_held_out(70, 12, 0)
    align, recover = pictures.read_in_order[-48:-24], pictures.read_in_order[-24:]
    assert align != recover
    assert not {*align, *recover} & set(unseen)
    recipe = parse_recipe(RECIPE, "test")
    config = {key: teacher.pretrained_cfg[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    for seed, seen in enumerate((align, recover)):
        again = Pictures()
        views = train_batches(
            ImageSet("again", again),
            {**config, "input_size": (3, 32, 48)},
            indices=train,
            batch_size=4,
            augment=recipe.augment,
            seed=seed,
            first_step=0,
            steps=6,
        )
        assert len(list(views)) == 6
        assert again.read_in_order == seen


def test_pictures_without_labels_or_with_those_of_others_give_no_top1(run, tmp_path):
    for name, labels in (("none", None), ("others", ("one", "two"))):
        metrics = run(stages=(0,), test=Pictures(20, labels=labels), output=tmp_path / name)
        assert metrics["stages"][0]["top1"] is None
        assert metrics["teacher_top1"] is None
        assert 0 <= metrics["stages"][0]["agreement"] <= 1


def test_a_broken_picture_in_a_hundred_is_put_up_with(run, tmp_path, caplog):
    most = RECIPE.replace("images: 32", "images: 150")
    metrics = run(most, stages=(0,), pictures=Pictures(200, broken=(17,)))
    assert metrics["fit_error"] < 0.5
    assert "unreadable image, another one stands in for it: picture 17: image file is truncated" in caplog.text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    many = {"pictures": Pictures(200, broken=range(0, 200, 9)), "output": tmp_path / "many"}
    with pytest.raises(UserError, match="images are unreadable, more than the 1 %.*the first is picture"):
        run(most, **many)
    assert not (tmp_path / "many").exists()


def test_pictures_none_of_which_can_be_read(run, tmp_path):
    with pytest.raises(UserError, match="images are unreadable, more than the 1 %.*the first is picture"):
        run(pictures=Pictures(broken=range(70)))
    assert not (tmp_path / "out").exists()
