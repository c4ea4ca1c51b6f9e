import json
from functools import partial

import pytest
import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

from gspn2convert import vit as V
from gspn2convert.errors import UserError

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("resnet50", {}, "is a ResNet, not a plain timm VisionTransformer"),
        ("swin_tiny_patch4_window7_224", {}, "is a SwinTransformer"),
        ("beit_base_patch16_224", {"depth": 1}, "is a Beit"),
        ("naflexvit_base_patch16_gap", {"depth": 1}, "is a NaFlexVit"),
        ("vit_small_patch16_18x2_224", {"depth": 1}, "blocks are ParallelThingsBlocks"),
        ("vit_base_patch16_rpn_224", {"depth": 1}, "blocks are ResPostBlocks"),
        ("vit_dlittle_patch16_reg1_gap_256", {"depth": 1}, "attention layers are DiffAttentions"),
        ("vit_tiny_patch16_224", {"depth": 1, "scale_attn_norm": True}, "a gate or a norm"),
        ("vit_small_r26_s32_224", {"depth": 1}, "patches come from a HybridEmbed"),
        ("vit_tiny_patch16_224", {"depth": 1, "patch_drop_rate": 0.5}, "patch_drop_rate is above 0"),
        ("vit_tiny_patch16_224", {"depth": 1, "wings": 2}, "cannot be built as a ViT: .*wings"),
    ],
)
def test_other_models_are_refused_with_the_reason(name, changes, reason):
    with pytest.raises(UserError, match=reason):
        V.probe(name, changes)


def test_a_probe_has_the_shapes_of_the_model_and_no_weights():
    arguments = {**TINY, "drop_rate": 0.1, "features_only": True, "out_indices": (0,), "dtype": torch.float16}
    plain = V.probe("vit_tiny_patch16_224", arguments)
    expected = {
        name: value.shape for name, value in timm.create_model("vit_tiny_patch16_224", **TINY).state_dict().items()
    }
    assert {name: value.shape for name, value in plain.state_dict().items()} == expected
    assert {value.device.type for value in plain.parameters()} == {"meta"}


@pytest.mark.parametrize("changes", [{}, {"pre_norm": True}, {"reg_tokens": 4, "no_embed_class": True}])
def test_embed_and_blocks_make_the_final_tokens(make_teacher, changes):
    vit, images = make_teacher(**changes), torch.randn(2, 3, 32, 48)
    tokens = V.embed(vit, images)
    for block in vit.blocks:
        tokens = block(tokens)
    assert torch.equal(vit.norm(tokens), V.final_tokens(vit, images))
    assert torch.equal(vit.forward_head(V.final_tokens(vit, images)), vit(images))


def test_what_is_read_from_a_model(make_teacher):
    vit = make_teacher(reg_tokens=4, init_values=0.5)
    assert torch.equal(V.layer_scale(vit.blocks[1]), vit.state_dict()["blocks.1.ls1.gamma"])
    assert V.layer_scale(make_teacher().blocks[0]) is None
    assert V.attention_sites(vit) == [vit.blocks[0].attn, vit.blocks[1].attn]
    assert V.num_prefix(vit) == 5
    assert V.num_prefix(make_teacher(class_token=False, global_pool="avg")) == 0
    assert V.num_prefix(make_teacher("deit_tiny_distilled_patch16_224")) == 2
    assert V.has_head(vit)
    assert not V.has_head(make_teacher(num_classes=0))


def test_grid_size_counts_the_patches(make_teacher):
    dynamic = make_teacher()
    for height, width in [(32, 32), (8, 40), (64, 24)]:
        tokens = V.embed(dynamic, torch.zeros(1, 3, height, width)).shape[1] - 1
        rows, columns = V.grid_size(dynamic, height, width)
        assert (rows, columns, rows * columns) == (height // 8, width // 8, tokens)
    assert V.grid_size(make_teacher(dynamic_img_pad=True), 33, 8) == (5, 1)
    assert V.grid_size(make_teacher(patch_size=(8, 16)), 32, 32) == (4, 2)


@pytest.mark.parametrize(
    ("size", "advice"),
    [((33, 33), "use 32 or 40$"), ((33, 47), "use 32 or 40 by 40 or 48$"), ((3, 8), "use 8 by 8 or 16$"), ((0, 8), "")],
)
def test_grid_size_names_the_nearest_sizes(make_teacher, size, advice):
    with pytest.raises(UserError, match=f"image size {size[0]}x{size[1]} is no multiple of the patch 8x8; {advice}"):
        V.grid_size(make_teacher(), *size)


def test_grid_size_of_a_model_of_one_size(make_teacher):
    fixed = make_teacher(dynamic_img_size=False)
    assert V.grid_size(fixed, 32, 48) == (4, 6)
    with pytest.raises(UserError, match="takes 32x48 alone"):
        V.grid_size(fixed, 48, 32)


def rebuilt(vit):
    base, arguments = V.base_arguments(vit)
    again = timm.create_model(base, **json.loads(json.dumps(arguments))).eval()
    again.load_state_dict(vit.state_dict())
    return again


def test_base_arguments_rebuild_the_model(make_teacher):
    for vit in (
        make_teacher(qk_norm=True, init_values=1e-3, drop_path_rate=0.1),
        make_teacher(in_chans=1, act_layer="relu", mlp_ratio=2),
        make_teacher("vit_small_patch14_reg4_dinov2", patch_size=(8, 16)),
        make_teacher("vit_base_patch16_siglip_224"),
        make_teacher("deit_tiny_distilled_patch16_224"),
    ):
        images = torch.randn(2, vit.patch_embed.proj.in_channels, 32, 48)
        assert torch.equal(rebuilt(vit)(images), vit(images))


def test_base_arguments_follow_later_changes(make_teacher):
    vit = make_teacher(drop_path_rate=0.1)
    vit.reset_classifier(3, "avg")
    vit.set_input_size((32, 64))
    images = torch.randn(2, 3, 32, 64)
    assert torch.equal(rebuilt(vit)(images), vit(images))
    base, arguments = V.base_arguments(vit)
    assert base == "vit_tiny_patch16_224"
    assert arguments["num_classes"] == 3
    assert arguments["fc_norm"] is False
    assert "drop_path_rate" not in arguments


def test_a_model_that_does_not_know_its_arguments_is_refused(make_teacher):
    with pytest.raises(UserError, match=r"timm\.create_model or gspn2convert\.load_teacher"):
        V.base_arguments(timm.models.VisionTransformer(**TINY))
    with pytest.raises(UserError, match="norm_layer=.*JSON cannot hold"):
        V.base_arguments(make_teacher(norm_layer=partial(nn.LayerNorm, eps=1e-5)))


def test_public_cfg_fits_the_model_and_tells_no_source(make_teacher):
    vit = make_teacher(in_chans=1)
    vit.pretrained_cfg |= {"file": "/home/me/x.safetensors", "source": "local-dir", "label_names": list("abcde")}
    vit.pretrained_cfg |= {"num_classes": 5, "global_pool": "token", "test_input_size": (3, 64, 64)}
    cfg = V.public_cfg(vit)
    assert json.loads(json.dumps(cfg)) == cfg
    assert PretrainedCfg(**cfg).mean == [0.5, 0.5, 0.5]
    assert cfg["input_size"] == [1, 32, 48]
    assert cfg["label_names"] == list("abcde")
    assert not {"file", "source", "url", "hf_hub_id", "architecture", "global_pool", "test_input_size"} & set(cfg)
    vit.reset_classifier(4)
    assert "label_names" not in V.public_cfg(vit)
    assert V.public_cfg(vit)["num_classes"] == 4


def test_native_shapes_are_those_that_timm_will_load(make_teacher):
    vit = make_teacher("vit_small_patch14_dinov2", num_classes=0)
    own = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    published = {**own, "mask_token": (1, 32), "pos_embed": (1, 1 + 37 * 37, 32)}
    assert V.native_shapes(published, vit) == own
    foreign = {"encoder": (7, 32), "conv1.weight": (8, 3, 3, 3)}
    assert V.native_shapes(foreign, vit) == foreign
