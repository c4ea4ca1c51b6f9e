"""Teachers from files, folders and the hub's cache, and files and folders that hold none."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from gspn2convert.errors import UserError
from gspn2convert.teachers import load_teacher
from gspn2convert.vit import base_arguments
from helpers.teachers import NAME, refusal


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(NAME).eval()


@pytest.fixture
def weights(model, tmp_path):
    """Writes a weights file of NAME, with changes to its tensors; None drops one."""

    def write(name="weights.safetensors", **changes):
        state = {**model.state_dict(), **{key.replace("__", "."): value for key, value in changes.items()}}
        path = tmp_path / name
        save_file({key: value for key, value in state.items() if value is not None}, path)
        return path

    return write


@pytest.fixture
def saved(make_teacher, tmp_path):
    """A folder that timm saved, and the model in it."""
    vit = make_teacher(qk_norm=True)
    arguments = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": (32, 48), "patch_size": 8, "qk_norm": True}
    save_for_hf(vit, tmp_path / "saved", model_args=arguments, safe_serialization=True)
    return vit, tmp_path / "saved"


def fill(cache, repository, *files):
    """Lay files into the hub's cache as its client does."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for file in files:
        shutil.copy(file, snapshot / Path(file).name)


def test_weights_from_a_file(model, weights):
    vit = load_teacher(NAME, weights=weights())
    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(vit(images), model(images))
    assert not vit.training
    assert vit(torch.randn(1, 3, 96, 128)).shape == (1, 1000)
    assert base_arguments(vit)[0] == NAME
    assert "file" not in vit.pretrained_cfg


def test_half_precision_weights_are_widened(model, weights):
    half = {key.replace(".", "__"): value.half() for key, value in model.state_dict().items()}
    vit = load_teacher(NAME, weights=weights(**half))
    assert {value.dtype for value in vit.parameters()} == {torch.float32}
    assert torch.equal(vit.head.weight, model.head.weight.half().float())


def test_another_image_size_resamples_the_position_embedding(model, weights):
    vit = load_teacher(NAME, weights=weights(), img_size=(96, 128))
    images = torch.randn(2, 3, 96, 128)
    dynamic = load_teacher(NAME, weights=weights())
    torch.testing.assert_close(vit(images), dynamic(images))
    assert tuple(vit.pretrained_cfg["input_size"]) == (3, 96, 128)
    grown = weights("grown.safetensors", pos_embed=vit.state_dict()["pos_embed"][:, :37])  # a 6 x 6 grid
    assert load_teacher(NAME, weights=grown).pos_embed.shape == model.pos_embed.shape


def test_the_head_is_that_of_the_file(weights, caplog):
    head = {"head__weight": torch.randn(10, 64), "head__bias": torch.randn(10)}
    with caplog.at_level(logging.WARNING):
        vit = load_teacher(NAME, weights=weights(**head))
    assert "has a head for 10 classes, test_vit one for 1000: the teacher has 10" in caplog.text
    assert torch.equal(vit.head.weight, head["head__weight"])
    assert base_arguments(vit)[1]["num_classes"] == 10
    bare = load_teacher(NAME, weights=weights(head__weight=None, head__bias=None))
    assert bare.num_classes == 0
    assert bare(torch.randn(1, 3, 160, 160)).shape == (1, 64)


def test_dinov2_as_published_fits(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch14_dinov2", depth=1, num_classes=0)
    file = tmp_path / "published.safetensors"
    save_file({**vit.state_dict(), "mask_token": torch.zeros(1, 384)}, file)
    with pytest.raises(UserError, match=r"blocks\.1\.norm1\.weight is missing"):
        load_teacher("dinov2_small", weights=file)
    folder = tmp_path / "shallow"
    save_for_hf(vit, folder, model_args={"depth": 1, "img_size": 518}, safe_serialization=True)
    loaded = load_teacher(folder, weights=file, img_size=28)
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    assert loaded.pos_embed.shape == (1, 5, 384)


def test_folders_that_timm_saved(saved):
    vit, folder = saved
    images = torch.randn(2, 3, 32, 48)
    for name in (folder, str(folder), f"local-dir:{folder}"):
        loaded = load_teacher(name)
        assert torch.equal(loaded(images), vit(images))
        assert loaded(torch.randn(1, 3, 64, 16)).shape == (1, 5)
    base, arguments = base_arguments(load_teacher(folder))
    assert base == "vit_tiny_patch16_224"
    assert arguments["qk_norm"] is True
    assert str(folder) not in json.dumps(load_teacher(folder).pretrained_cfg)


def test_without_weights_nothing_is_read(offline):
    vit = load_teacher("vit_tiny", pretrained=False, img_size=64)
    assert base_arguments(vit) == (
        "vit_tiny_patch16_224",
        {
            "img_size": [64, 64],
            "patch_size": 16,
            "in_chans": 3,
            "num_classes": 1000,
            "global_pool": "token",
            "fc_norm": False,
            "dynamic_img_size": True,
        },
    )


def test_names_load_from_the_cache_without_a_network(model, weights, saved, offline):
    images = torch.randn(2, 3, 160, 160)
    fill(offline, "timm/test_vit.r160_in1k", weights("model.safetensors"))
    assert torch.equal(load_teacher(NAME)(images), model(images))
    assert torch.equal(load_teacher("test_vit.r160_in1k")(images), model(images))
    vit, folder = saved
    fill(offline, "me/mine", folder / "config.json", folder / "model.safetensors")
    images = torch.randn(2, 3, 32, 48)
    assert torch.equal(load_teacher("hf-hub:me/mine")(images), vit(images))


@pytest.mark.parametrize(("size", "use"), [(100, "use 96 or 112"), ((160, 17), "use 160 or 176 by 16 or 32")])
def test_image_sizes_that_are_no_multiple_of_the_patch(weights, size, use):
    message = refusal(NAME, weights=weights(), img_size=size)
    assert "is no multiple of the patch 16x16; " + use in message


def test_weights_of_another_model(model, weights):
    message = refusal("test_vit2", weights=weights())
    assert "holds weights of another model: " in message
    assert message.count(" is ") == 3
    assert " more; " in message
    message = refusal(NAME, weights=weights(norm__weight=None, pos_embed=torch.zeros(1, 8, 64), extra=torch.zeros(1)))
    assert "norm.weight is missing, pos_embed is 1x8x64, expected 1x101x64, extra is unknown;" in message


def damaged(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))
    return path


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (lambda data: data[: len(data) // 2], "damaged or truncated"),
        (lambda data: data[:5], "damaged or truncated"),
        (lambda data: b"", "damaged or truncated"),
        (lambda data: bytes(range(7, 256)) * 100, "damaged or truncated"),
        (lambda data: data[:-4000] + b"\xff" * 4000, "holds NaN or infinity"),
    ],
)
def test_damaged_weights(weights, change, answer):
    path = damaged(weights(), change)
    message = refusal(NAME, weights=path)
    assert answer in message
    assert str(path) in message


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["weights.pth", "pytorch_model.bin", "weights.safetensors", "weights"])
def test_pickles_are_never_loaded(tmp_path, name, zipped):
    mark = tmp_path / "unpickled"
    torch.save({"head.weight": Trap(mark)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    message = refusal(NAME, weights=tmp_path / name)
    assert "is a pickled checkpoint" in message
    assert "safetensors.torch.save_file" in message
    assert not mark.exists()


def test_weights_under_a_wrong_name(weights, tmp_path):
    assert "is no .safetensors file" in refusal(NAME, weights=weights("weights.dat"))
    assert "no weights file at" in refusal(NAME, weights=tmp_path / "none.safetensors")
    assert "no weights file at" in refusal(NAME, weights=tmp_path)


@pytest.mark.parametrize(
    ("config", "answer"),
    [
        ("{", "is no config of a timm model"),
        ("[]", "is no config of a timm model"),
        ('{"architectures": ["ViTModel"]}', "is no config of a timm model"),
        ('{"architecture": "vit_next", "pretrained_cfg": {}}', "holds a vit_next, which this timm does not know"),
        ('{"architecture": "gspn2_vit", "pretrained_cfg": {}}', "holds a converted GSPN-2 ViT"),
        ('{"architecture": "resnet18", "pretrained_cfg": {}}', "resnet18 is a ResNet"),
        ('{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"wings": 2}}', "unexpected keyword"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"wings": 2}}', "unexpected keyword"),
    ],
)
def test_folders_that_hold_no_teacher(saved, config, answer):
    _, folder = saved
    (folder / "config.json").write_text(config)
    assert answer in refusal(folder)


def test_folders_without_safetensors(saved):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(folder)
    mark = folder / "unpickled"
    torch.save(Trap(mark), folder / "pytorch_model.bin")
    assert "has pytorch_model.bin, a pickle that is never loaded" in refusal(folder)
    assert not mark.exists()


def test_folder_weights_that_do_not_fit_its_config(saved):
    _, folder = saved
    state = load_file(folder / "model.safetensors")
    state["blocks.1.mlp.fc1.weight"] = state["blocks.1.mlp.fc1.weight"][:-1].contiguous()
    save_file(state, folder / "model.safetensors")
    assert "blocks.1.mlp.fc1.weight is 127x32, expected 128x32" in refusal(folder)
