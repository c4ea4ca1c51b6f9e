import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

import gspn2convert
from gspn2convert.artifact import load, save_student, write_atomic
from gspn2convert.errors import UserError
from gspn2convert.model import Gspn2Vit, Gspn2VitDistilled, build_student
from gspn2convert.teachers import load_teacher

CASES = {
    "plain": ("vit_tiny_patch16_224", {}, [0, 1]),
    "hybrid": ("vit_tiny_patch16_224", {}, [1]),
    "registers": ("vit_small_patch14_reg4_dinov2", {"num_classes": 0}, [0, 1]),
    "average pool": ("vit_base_patch16_siglip_gap_224", {}, [0]),
    "map pool": ("vit_base_patch16_siglip_224", {}, [0, 1]),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False}, [0, 1]),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, [1]),
    "one size": ("deit3_small_patch16_224", {"dynamic_img_size": False}, [0, 1]),
}


@pytest.fixture
def student(make_teacher):
    def make(case="plain", **changes):
        name, own, layers = CASES[case]
        teacher = make_teacher(name, **own | changes)
        built = build_student(teacher, layers, {"proxy_dim": 4})
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in built.parameters():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
        return built

    return make


def save(model, folder, **options):
    save_student(model, folder, **{"recipe_text": "name: tiny\n", "metrics": {}, "teacher": "vit_tiny"} | options)
    return folder


def images(height=32, width=48, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(2))


def by_timm(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


@pytest.mark.parametrize("case", CASES)
def test_round_trip(student, tmp_path, case):
    model = student(case)
    folder = save(model, tmp_path / "out")
    expected = model(images())
    again = load(folder)
    assert isinstance(again, Gspn2VitDistilled if case == "distilled" else Gspn2Vit)
    assert not again.training
    assert torch.equal(again(images()), expected)
    assert torch.equal(by_timm(folder)(images()), expected)
    if case != "one size":
        assert torch.equal(again(images(64, 24)), model(images(64, 24)))
    twice = save(again, tmp_path / "twice")
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (twice / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_student_that_reads_regions(make_teacher, tmp_path, run_cli):
    model = build_student(make_teacher(), [1], {"proxy_dim": 4, "regions": 3})
    folder = save(model, tmp_path / "out")
    assert torch.equal(load(folder)(images(64, 24)), model(images(64, 24)))
    assert "1 of 2 blocks: 1. Their patches also attend to the means of 3 x 3 parts of the image." in (
        " ".join((folder / "README.md").read_text().split())
    )
    shown = run_cli("describe", str(folder)).stdout
    assert "attention" in shown
    assert "gspn2, 3 x 3 regions" in shown


def test_what_a_folder_holds(student, tmp_path):
    model = student("hybrid")
    model.pretrained_cfg |= {"label_names": list("abcde"), "file": str(tmp_path), "hf_hub_id": "me/mine"}
    metrics = {"top1": 0.912345, "steps": 3, "layers": [{"error": 0.2}]}
    folder = save(
        model, tmp_path / "out", metrics=metrics, teacher=f"local-dir:{tmp_path}/my_vit", recipe_text="name: x\n"
    )
    names = {"config.json", "model.safetensors", "recipe.yaml", "metrics.json", "README.md"}
    assert {file.name for file in folder.iterdir()} == names
    assert not [file for file in folder.iterdir() if str(tmp_path).encode() in file.read_bytes()]
    config = json.loads((folder / "config.json").read_text())
    version = gspn2convert.__version__
    assert config["gspn2"] == {"version": version, "teacher": "my_vit", "layers": [1], "depth": 2}
    assert config["label_names"] == list("abcde")
    assert config["model_args"]["mixer"] == {"proxy_dim": 4, "has_prefix": True}
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert (folder / "recipe.yaml").read_text() == "name: x\n"
    card = (folder / "README.md").read_text()
    assert "1 of 2 blocks: 1." in card
    assert "| top1 | 0.9123 |\n| steps | 3 |\n" in card
    assert 'timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True)' in card
    assert "license: apache-2.0" in card
    assert by_timm(folder).pretrained_cfg["label_names"] == list("abcde")


def test_the_data_config_of_the_teacher_comes_along(student, tmp_path):
    model = student("registers")
    folder = save(model, tmp_path / "out")
    config = resolve_model_data_config(load(folder))
    assert tuple(config["input_size"]) == (3, 32, 48)
    assert tuple(config["mean"]) == (0.485, 0.456, 0.406)
    assert (config["crop_pct"], config["interpolation"]) == (1.0, "bicubic")


def test_another_number_of_classes(student, tmp_path):
    model = student()
    other = load(save(model, tmp_path / "out"), num_classes=7)
    features = model.forward_features(images())
    assert torch.equal(other.forward_features(images()), features)
    assert other(images()).shape == (2, 7)
    assert torch.equal(load(tmp_path / "out", num_classes=0)(images()), model.forward_head(features, pre_logits=True))


@pytest.mark.parametrize("case", ["plain", "one size"])
def test_another_image_size(student, tmp_path, case):
    model = student(case, img_size=32)  # timm before 1.0.31 resamples square grids alone
    other = load(save(model, tmp_path / "out"), img_size=(48, 40))
    model.set_input_size((48, 40))
    torch.testing.assert_close(other(images(48, 40)), model(images(48, 40)))
    with pytest.raises(UserError, match="no multiple of the patch 8x8; use 32 or 40"):
        load(tmp_path / "out", img_size=33)


def test_one_channel(student, tmp_path):
    model = student()
    other, grey = load(save(model, tmp_path / "out"), in_chans=1), images(channels=1)
    torch.testing.assert_close(other(grey), model(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("case", ["hybrid", "registers", "average pool", "distilled"])
def test_features_only(student, tmp_path, case):
    model = student(case)
    features = load(save(model, tmp_path / "out"), features_only=True, out_indices=(0, 1))
    for size in [(32, 48), (16, 64)]:
        expected = model.forward_intermediates(images(*size), indices=[0, 1], intermediates_only=True)
        for feature, reference in zip(features(images(*size)), expected, strict=True):
            assert torch.equal(feature, reference)
    assert features.feature_info.channels() == [32, 32]
    features.model.set_grad_checkpointing()
    assert torch.equal(features(images())[1], model.forward_intermediates(images(), intermediates_only=True)[1])


def test_what_was_changed_is_saved(student, tmp_path):
    model = load(save(student(), tmp_path / "out"))
    model.pretrained_cfg["label_names"] = list("abcde")
    model.reset_classifier(3, "avg")
    model.set_input_size((48, 40))
    again = load(save(model, tmp_path / "changed"))
    assert torch.equal(again(images(48, 40)), model(images(48, 40)))
    assert again.num_classes == 3
    assert "label_names" not in (tmp_path / "changed" / "config.json").read_text()
    assert json.loads((tmp_path / "changed" / "config.json").read_text())["gspn2"]["layers"] == [0, 1]


def test_timm_can_save_it_too(student, tmp_path):
    model = student("hybrid")
    save_for_hf(model, tmp_path / "timm", model_args=model._model_args, safe_serialization=True)
    assert torch.equal(load(tmp_path / "timm")(images()), model(images()))


def test_half_precision_is_kept_small(student, tmp_path):
    model = student().half()
    folder = save(model, tmp_path / "out")
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert torch.equal(load(folder).head.weight, model.head.weight.float())


def test_equal_tensors_make_equal_bytes(student, tmp_path):
    first, second = student(), student()
    save(first, tmp_path / "first")
    second.load_state_dict(dict(reversed(first.state_dict().items())))
    save(second.to(memory_format=torch.channels_last), tmp_path / "second")
    bytes_of = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert bytes_of[0] == bytes_of[1]
    with torch.no_grad():
        second.head.bias[0] += 1e-3
    save(second, tmp_path / "second")
    assert (tmp_path / "second" / "model.safetensors").read_bytes() != bytes_of[0]


def test_a_converted_folder_is_no_teacher(student, tmp_path):
    with pytest.raises(UserError, match="holds a converted GSPN-2 ViT"):
        load_teacher(save(student(), tmp_path / "out"))


def drop(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def change_weights(folder):
    state = load_file(folder / "model.safetensors")
    state["more"] = torch.zeros(1)
    del state["norm.bias"]
    save_file(state, folder / "model.safetensors")


def break_weights(folder):
    state = load_file(folder / "model.safetensors")
    state["norm.bias"][3] = torch.nan
    save_file(state, folder / "model.safetensors")


def set_value(*keys, value):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        part = config
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_weights, "norm.bias in .*model.safetensors holds NaN or infinity"),
        (set_value("model_args", "gspn_layers", value=5), "describes no model .*; convert the teacher again"),
        (set_value("model_args", "mixer", value=[1]), "describes no model"),
        (set_value("model_args", "mixer", "proxy_dim", value="12"), "describes no model"),
        (set_value("model_args", "mixer", "regions", value=-3), "describes no model"),
        (set_value("model_args", "mixer", "regions", value=99), "describes no model"),
        (set_value("model_args", "mixer", "regions", value="8"), "describes no model"),
        (set_value("model_args", "mixer", "regions", value=True), "describes no model"),
        (set_value("model_args", "mixer", "segment", value=-1), "describes no model .*prefix 'exact', segment -1"),
        (set_value("model_args", "mixer", "prefix", value="foo"), "describes no model .*prefix 'foo'"),
        (set_value("model_args", "base", value=5), "describes no model"),
        (set_value("model_args", "patch_size", value=0), "config.json"),
        (set_value("num_classes", value=12), "two numbers of classes"),
        (drop("config.json"), "has no config.json; give a folder that gspn2convert distill wrote"),
        (drop("model.safetensors"), "has no model.safetensors"),
        (write("config.json", '{"architecture": '), "cannot be read"),
        (write("config.json", '{"pretrained_cfg": {}}'), "cannot be read"),
        (write("config.json", '{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}'), "is not converted"),
        (write("config.json", '{"architecture": "gspn2_vit", "pretrained_cfg": {}}'), "weights of another model"),
        (truncate, "damaged or truncated"),
        (change_weights, "norm.bias is missing, more is unknown"),
    ],
)
def test_damaged_folders(student, tmp_path, damage, message):
    folder = save(student(), tmp_path / "out")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        load(tmp_path / "none")


def test_folders_that_cannot_be_written(student, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot make the folder"):
        save(student(), tmp_path / "file" / "out")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "none" / "a.bin", b"")
    assert (tmp_path / "file").read_text() == "mine"
