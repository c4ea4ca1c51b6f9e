import json
import logging
import math
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from gspn2convert.errors import UserError
from gspn2convert.teachers import ALIASES, DEMO, load_teacher
from gspn2convert.vit import base_arguments

# timm's own ViT for tests: 6 blocks of width 64, 160 px, patch 16, 1000 classes.
NAME = "test_vit"


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


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network and an empty cache, for the hub's client."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill(cache, repository, *files):
    """Lay files into the hub's cache as its client does."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for file in files:
        shutil.copy(file, snapshot / Path(file).name)


def refusal(name, **options):
    with pytest.raises(UserError) as caught:
        load_teacher(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


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


def test_no_network_and_no_cache(offline):
    for name in (NAME, "hf-hub:me/mine"):
        message = refusal(name)
        assert "no network" in message
        assert "--teacher-weights FILE" in message
        assert "hf download " in message


class Hub(BaseHTTPRequestHandler):
    """Answers like the Hugging Face hub: test_vit has no such file, nobody/nothing is none, the rest breaks off."""

    def do_HEAD(self):  # noqa: N802  the server's name for it
        missing = {"/timm/": "EntryNotFound", "/nobody/": "RepoNotFound"}
        code = next((code for prefix, code in missing.items() if self.path.startswith(prefix)), None)
        self.send_response(404 if code else 200)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"abc"')
        self.send_header("Content-Length", "0" if code else "1000")
        self.end_headers()

    def do_GET(self):  # noqa: N802
        self.send_response(200)
        self.send_header("Content-Length", "10")
        self.end_headers()
        self.wfile.write(bytes(10))

    def log_message(self, *arguments):
        pass


def test_what_a_hub_may_answer(offline, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        message = refusal(NAME)
        assert "timm/test_vit.r160_in1k on the hub has no model.safetensors, and pickles are never loaded" in message
        assert "nobody/nothing is not on the hub, or asks for a login" in refusal("hf-hub:nobody/nothing@main")
        assert "cannot download config.json of me/mine (OSError); give" in refusal("hf-hub:me/mine")
        server.shutdown()


def test_names_without_published_weights():
    assert "publishes no weights for vit_giant_patch14_224" in refusal("vit_giant_patch14_224")
    assert "published as a pickle alone" in refusal("vit_giant_patch16_gap_224.in22k_ijepa")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("vit_bse", "did you mean vit_base"),
        ("dinov2-small", "did you mean dinov2_small"),
        ("vit_small_patch16_225", "did you mean vit_small_patch16_224"),
        ("zzz", "expected a timm ViT, an alias such as vit_small, or an existing folder"),
        ("vit_tiny_patch16_224.augreg_in22k", "did you mean vit_tiny_patch16_224.augreg_in21k"),
        ("resnet50", "resnet50 is a ResNet, not a plain timm VisionTransformer"),
        ("swin_tiny_patch4_window7_224", "is a SwinTransformer"),
        ("vit_small_r26_s32_224", "patches come from a HybridEmbed"),
        ("gspn2_vit", "is what teachers are converted to"),
        ("no/such/folder", "unknown teacher 'no/such/folder'"),
        ("local-dir:no/such/folder", "no/such/folder has no config.json"),
        (__file__, "is a file; name its architecture"),
    ],
)
def test_names_that_are_no_teacher(name, answer):
    assert answer in refusal(name)


def test_aliases_are_default_weights_of_timm():
    for alias, name in ALIASES.items():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.hf_hub_id == f"timm/{name.partition('.')[0]}.{cfg.tag}", alias


def test_old_names_of_timm_are_followed():
    vit = load_teacher("vit_tiny_patch16_224_in21k", pretrained=False)
    assert (vit.num_classes, vit.pretrained_cfg["tag"]) == (21843, "augreg_in21k")


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


def test_the_demo_teacher_is_bundled():
    vit = load_teacher("demo")
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 3e6
    with torch.no_grad():
        logits = vit(torch.zeros(1, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size))
    assert logits.shape == (1, 10)
    assert math.isfinite(logits.sum())
