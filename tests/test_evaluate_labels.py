"""Images whose class is not told, with the label -1 beside others or alone, as in the test split of ImageNet."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from gspn2convert.errors import UserError
from gspn2convert.evaluate import evaluate, image_features
from gspn2convert.images import ImageSet, open_images
from gspn2convert.probes import knn_accuracy, linear_accuracy
from helpers.pictures import add, encode

LABELS = [0, -1, 1, 2, -1, 0, 1, 2, 2, -1]


class Noise:
    """Images of noise; the same for the same seed."""

    def __init__(self, labels, seed):
        self.labels, self.seed, self.label_names = labels, seed, ["ant", "bee", "cat"]

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        noise = np.random.default_rng([self.seed, index]).integers(0, 256, (32, 48, 3))
        return Image.fromarray(noise.astype(np.uint8)), self.labels[index]

    def where(self, index):
        return f"image {index}"


def image_set(labels, seed=0):
    return ImageSet("noise", Noise(labels, seed))


@pytest.fixture
def model(make_teacher):
    return make_teacher(num_classes=3)


@pytest.mark.parametrize("always", [0, 2])
def test_top1_is_of_the_images_whose_class_is_told(model, always):
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.eye(3)[always])
    told = [label for label in LABELS if label >= 0]
    assert evaluate(model, None, image_set(LABELS))["top1"] == pytest.approx(told.count(always) / len(told))
    assert "top1" not in evaluate(model, None, image_set([-1] * 4))


def test_classes_of_shards_are_their_numbers(model, tmp_path, caplog):
    """The train split has a class more than the test split, whose labels must not move."""
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": None}
    sets = {"test": Noise([1, 0, 2, -1, 1], 0), "train": Noise([*LABELS, 3, 3], 1)}
    for split, noise in sets.items():
        with tarfile.open(tmp_path / f"noise-{split}.tar", "w") as tar:
            for index, label in enumerate(noise.labels):
                add(tar, f"{index}.png", encode(noise.read(index)[0]))
                add(tar, f"{index}.cls", str(label).encode())
    test, train = (open_images(f"wds/noise:{tmp_path}", split) for split in ("test", "train"))
    sets["train"].label_names = [*sets["test"].label_names, "dog"]
    plain = {split: ImageSet("noise", noise) for split, noise in sets.items()}
    found, expected = (
        evaluate(model, None, images, knn_images=training, linear_images=training)
        for images, training in ((test, train), (plain["test"], plain["train"]))
    )
    assert [found[key] for key in ("top1", "knn", "linear")] == [expected[key] for key in ("top1", "knn", "linear")]
    assert "top1" not in evaluate(model, None, train)
    assert "no top-1: the data's 4 labels (0, ...) are not the model's 3 classes" in caplog.text


def test_probes_learn_from_and_ask_about_those_alone(model):
    images, training = image_set(LABELS), image_set(LABELS * 3, seed=1)
    found = evaluate(model, None, images, knn_images=training, linear_images=training)
    learnt = []
    for one in (training, images):
        pixels = torch.stack([pixels_of(model, one, i) for i in range(len(one))])
        labels = torch.tensor(one._source.labels)
        with torch.inference_mode():
            features = image_features(model, model.forward_features(pixels))
        learnt += [features[labels >= 0], labels[labels >= 0]]
    assert [len(each) for each in learnt] == [21, 21, 7, 7]
    assert found["knn"] == pytest.approx(knn_accuracy(*learnt), abs=1e-6)
    assert found["linear"] == pytest.approx(linear_accuracy(*learnt), abs=1e-6)


def pixels_of(model, images, index):
    config = resolve_model_data_config(model) | {"input_size": (3, *model.patch_embed.img_size)}
    return create_transform(**config)(images.image(index)[0])


def test_probes_of_no_label_at_all_are_refused(model):
    with pytest.raises(UserError, match="data 'noise': all labels are -1, so leave --knn and --linear out"):
        evaluate(model, None, image_set([-1] * 4), knn_images=image_set(LABELS, seed=1))
