"""Exported files on images: the pixels and guesses of PyTorch, folders, embeddings, and what is refused."""

import json

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from gspn2convert.errors import UserError
from gspn2convert.image_files import open_files
from gspn2convert.infer import data_config, infer, label_names, top_classes
from gspn2convert.session import onnx_session


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three colour images in a folder and one inside of it, beside files that are no images."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    noise = np.random.default_rng(0)
    for index, name in enumerate(("b.png", "a.PNG", "c.webp", "more/d.bmp")):
        pixels = noise.integers(0, 256, (30 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, lossless=True)
    (folder / "notes.txt").write_text("not an image")
    (folder / "._a.png").write_bytes(b"what macOS leaves behind")
    return folder


def pixels_of(student, files):
    """Images as timm makes them for a student."""
    config = resolve_model_data_config(student) | {"input_size": (3, 16, 24)}
    transform = create_transform(**{**config, "input_size": config["input_size"][1:]})
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])


def files_of(photos):
    return [photos / name for name in ("a.PNG", "b.png", "c.webp", "more/d.bmp")]


def the_error(result, code=2):
    assert result.exit_code == code, result.output
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    return line


def test_guesses_are_those_of_pytorch(classifier, photos, run_cli):
    result = run_cli("run", classifier.path, "--images", photos, "--batch-size", 3, "--no-library", "--json")
    document = json.loads(result.stdout)
    with torch.no_grad():
        shares = classifier.student(pixels_of(classifier.student, files_of(photos))).softmax(1)
    assert [one["image"] for one in document["results"]] == [str(file) for file in files_of(photos)]
    for one, wanted in zip(document["results"], shares, strict=True):
        assert [guess["class"] for guess in one["guesses"]] == wanted.argsort(descending=True).tolist()
        assert [guess["label"] for guess in one["guesses"]] == [
            ["ant", "bee", "cat", "dog", "eel"][guess["class"]] for guess in one["guesses"]
        ]
        given = [guess["probability"] for guess in one["guesses"]]
        assert given == pytest.approx(wanted.sort(descending=True).values.tolist(), abs=1e-5)
    assert document["session"]["file"] == str(classifier.path)
    assert document["preprocessing"]["input_size"] == [3, 16, 24]
    assert document["output"] is None


def test_table_shows_the_first_guesses(classifier, photos, run_cli):
    line = ("run", classifier.path, "--images", photos / "a.PNG", photos / "b.png", "--no-library")
    first = json.loads(run_cli(*line, "--json").stdout)["results"][0]["guesses"]
    session, titles, *rows = run_cli(*line, "--top", 2).stdout.splitlines()
    assert session.endswith("CPUExecutionProvider; fp32; LineScan: function body in the file")
    assert titles.split() == ["image", "label", "probability"]
    assert len(rows) == 4
    assert rows[0].split() == [str(photos / "a.PNG"), first[0]["label"], f"{100 * first[0]['probability']:.2f}", "%"]
    assert rows[1].split() == [first[1]["label"], f"{100 * first[1]['probability']:.2f}", "%"]


def test_features_are_written(feature_model, photos, run_cli, tmp_path):
    line = ("run", feature_model.path, "--no-library", "--output", tmp_path / "new.npz", "--images")
    result = run_cli(*line, *files_of(photos)[:3])  # the last batch is not full
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"wrote {tmp_path}/new.npz: features (3x32) and images, the names"
    with torch.no_grad():
        wanted = feature_model.student(pixels_of(feature_model.student, files_of(photos)[:3])).numpy()
    with np.load(tmp_path / "new.npz", allow_pickle=False) as written:
        assert written["images"].tolist() == [str(file) for file in files_of(photos)[:3]]
        assert np.abs(written["features"] - wanted).max() < 0.02 * np.abs(wanted).max()
    assert f"{tmp_path}/new.npz exists" in the_error(run_cli(*line, photos))


def test_images_of_one_size_can_be_made_in_another(classifier, photos):
    session = onnx_session(classifier.path, library=False)
    config = data_config(session, size=(32, 40), mean=(0.1,), std=(0.2, 0.3, 0.4))
    assert config["input_size"] == (3, 32, 40)
    assert (config["mean"], config["std"]) == ((0.1, 0.1, 0.1), (0.2, 0.3, 0.4))
    counts = []
    images = open_files([str(photos)], in_chans=3)
    outputs = infer(session, images, config, batch_size=2, limit=3, done=counts.append)
    assert outputs.shape == (3, 5)
    assert counts == [2, 3]
    assert infer(session, images, config, batch_size=2)[:3] == pytest.approx(outputs, abs=1e-5)


@pytest.fixture
def silent(classifier, tmp_path):
    """The classifier without what export says about its images and labels."""
    model = onnx.load(classifier.path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "silent.onnx")
    return tmp_path / "silent.onnx"


def test_file_that_says_nothing_needs_flags(classifier, photos, silent, run_cli):
    flags = ["--no-library", "--images", photos / "a.PNG", "--json"]
    assert "which image size it is for; give --size HxW" in json.loads(run_cli("run", silent, *flags).stdout)["error"]
    flags += ["--size", "16x24"]
    assert "normalised; give --mean and --std" in json.loads(run_cli("run", silent, *flags).stdout)["error"]
    own = json.loads(run_cli("run", classifier.path, *flags).stdout)
    flags += [f"--{key}={','.join(map(str, own['preprocessing'][key]))}" for key in ("mean", "std")]
    found = json.loads(run_cli("run", silent, *flags).stdout)
    assert found["preprocessing"] == own["preprocessing"] | {"crop_pct": 1.0}
    assert {guess["label"] for guess in found["results"][0]["guesses"]} == set("01234")


def test_bad_normalisation_is_told(classifier, photos, run_cli, tmp_path):
    line = ["--no-library", "--images", photos / "a.PNG", "--json"]
    told = json.loads(run_cli("run", classifier.path, *line, "--std", "0").stdout)["error"]
    assert told == "--std has a standard deviation of 0.0; give one above 0"
    assert "'nan': expected numbers such as 0.5" in run_cli("run", classifier.path, *line, "--std", "nan").output
    model = onnx.load(classifier.path)
    next(entry for entry in model.metadata_props if entry.key == "mean").value = "[0.5,"
    onnx.save(model, tmp_path / "damaged.onnx")
    told = json.loads(run_cli("run", tmp_path / "damaged.onnx", *line).stdout)["error"]
    assert "its metadata 'mean' is damaged" in told
    assert told.endswith("export the model again")


def test_demo_images_need_no_files(classifier, run_cli):
    result = run_cli("run", classifier.path, "--images", "demo", "--limit", 2, "--top", 1, "--json")
    assert [one["image"] for one in json.loads(result.stdout)["results"]] == ["demo image 0", "demo image 1"]


def test_images_come_in_the_order_that_was_given(photos):
    images = open_files([str(photos / "more"), str(photos / "b.png")], in_chans=1)
    assert [images.where(index) for index in range(len(images))] == [str(photos / "more/d.bmp"), str(photos / "b.png")]
    assert images.image(0)[0].mode == "L"
    with pytest.raises(UserError, match="takes 4 input channels; images can be read with 1 or 3"):
        open_files([str(photos)], in_chans=4)


def test_most_likely_classes_come_first():
    logits = np.log(np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], np.float16))
    assert [[index for index, _ in row] for row in top_classes(logits, 2)] == [[1, 2], [2, 0]]
    assert [share for _, share in top_classes(logits, 9)[0]] == pytest.approx([0.5, 0.3, 0.2], abs=1e-3)
    large = np.array([[60000, 1]], np.float16)
    assert top_classes(large, 1) == [[(0, 1.0)]]


def test_labels_that_are_not_the_classes_are_left_out(classifier):
    session = onnx_session(classifier.path, library=False)
    assert label_names(session, 5) == ["ant", "bee", "cat", "dog", "eel"]
    assert label_names(session, 3) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{classifier}", "Missing option '--images' (see gspn2convert run -h)"),
        ("{photos}/none.onnx --images {photos}", "none.onnx' does not exist"),
        ("{photos}/a.PNG --images {photos}", "a.PNG: no ONNX file, or not all of it"),
        ("{classifier} --images {photos}/none", "no such file or folder"),
        ("{classifier} --images {photos}/none {photos}", "none': no such file or folder"),
        ("{classifier} --images {photos}/notes.txt", "unreadable image {photos}/notes.txt: cannot identify"),
        ("{classifier} --images {empty}", "no .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp file in it"),
        ("{classifier} --images {photos} --providers nope", "provider 'nope': this ONNX Runtime has"),
        ("{classifier} --images {photos} --size 30", "image size 30x30: classifier.onnx takes multiples of 8x8"),
        (
            "{classifier} --images {photos} --mean 1,2",
            "--mean with 2 values: classifier.onnx takes images of 3 channels",
        ),
        ("{classifier} --images {photos} --std x", "'x': expected numbers such as 0.5"),
        ("{classifier} --images {photos} --output {empty}/x.txt", "x.txt': expected a name that ends in .npz"),
        ("{classifier} --images {photos} --output {empty}/none/x.npz", "none does not exist; create it"),
        ("{features} --images {photos}", "features.onnx is no classifier; name a file for its features: --output"),
        (
            "{features} --images {photos} --batch-size 3 --output {empty}/x.npz",
            "features.onnx takes 2 images at a time",
        ),
        ("{features} --images {photos} --size 32 --output {empty}/x.npz", "features.onnx takes 16x24 alone"),
    ],
)
def test_wrong_use_is_one_line(classifier, feature_model, photos, run_cli, tmp_path, line, message):
    places = {"classifier": classifier.path, "features": feature_model.path, "photos": photos, "empty": tmp_path}
    arguments = line.format(**places).split()
    assert message.format(**places) in the_error(run_cli("run", *arguments, "--no-library"))
    assert not list(tmp_path.iterdir())
