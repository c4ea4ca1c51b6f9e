"""Names of teachers: what timm and the hub know, and what a hub may answer."""

import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
import timm
import torch

from gspn2convert.teachers import ALIASES, DEMO, load_teacher
from helpers.teachers import NAME, refusal


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


def test_the_demo_teacher_is_bundled():
    vit = load_teacher("demo")
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 3e6
    with torch.no_grad():
        logits = vit(torch.zeros(1, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size))
    assert logits.shape == (1, 10)
    assert math.isfinite(logits.sum())
