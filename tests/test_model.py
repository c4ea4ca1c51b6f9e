import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Attention
from torch import nn

from gspn2convert.block import GspnBlock, KeptBlock
from gspn2convert.embedding import resample_position
from gspn2convert.errors import UserError
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.model import Gspn2Vit, build_student
from gspn2convert.vit import embed

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
BASES = {
    "class token": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "average pool": ("vit_base_patch16_siglip_gap_224", {}),
    "map pool": ("vit_base_patch16_siglip_224", {}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "no qkv bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "norm before": ("vit_base_patch32_clip_224", {}),
    "embedding without class": ("deit3_small_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
}


@pytest.fixture
def teacher(make_teacher):
    def make(base="class token", **changes):
        architecture, own = BASES[base]
        return make_teacher(architecture, **own | changes)

    return make


@pytest.fixture
def student(teacher):
    def make(base="class token", layers=(0, 1)):
        return stirred(build_student(teacher(base), layers, {"proxy_dim": 4}))

    return make


def stirred(model):
    """Move every weight off its start, so that no branch of a mixer is silent."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def images(*size, batch=2, channels=3):
    return torch.randn(batch, channels, *(size or (32, 48)), generator=torch.Generator().manual_seed(2))


def by_hand(model, x):
    """The tokens after each block, the grid given openly; the reference for what the model does with its cell."""
    grid = (x.shape[-2] // 8, x.shape[-1] // 8)
    tokens, after = embed(model, x), []
    for block in model.blocks:
        normed = block.norm1(tokens)
        mixed = block.attn(normed, grid) if isinstance(block.attn, Gspn2Mixer) else block.attn(normed)
        tokens = tokens + block.ls1(mixed)
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        after.append(tokens)
    return after


@pytest.mark.parametrize("base", BASES)
def test_a_student_holds_every_weight_of_its_teacher(teacher, base):
    vit = teacher(base)
    built = build_student(vit, [1], {"proxy_dim": 4})
    old, new = vit.state_dict(), built.state_dict()
    has_prefix = vit.num_prefix_tokens > 0
    for name, value in old.items():
        if not name.startswith("blocks.1.attn."):
            assert torch.equal(new.pop(name), value)
        elif has_prefix:
            assert torch.equal(new.pop(name.replace(".attn.", ".attn.prefix.")), value)
    assert all(name.startswith("blocks.1.attn.") for name in new)
    assert isinstance(built.blocks[0].attn, Attention)
    assert built.blocks[1].attn.prefix is not None if has_prefix else built.blocks[1].attn.prefix is None
    assert not built.training


@pytest.mark.parametrize("base", BASES)
def test_without_mixers_a_student_is_its_teacher(teacher, base):
    vit = teacher(base)
    assert torch.equal(build_student(vit, [], {"proxy_dim": 4})(images()), vit(images()))


@pytest.mark.parametrize("base", [name for name in BASES if name not in ("average pool", "map pool")])
def test_prefix_tokens_read_as_in_the_teacher(teacher, base):
    vit = teacher(base)
    built = build_student(vit, [0, 1], {"proxy_dim": 4})
    normed, prefix = vit.blocks[0].norm1(embed(vit, images())), vit.num_prefix_tokens
    read, expected = built.blocks[0].attn(normed, (4, 6))[:, :prefix], vit.blocks[0].attn(normed)[:, :prefix]
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-5)


def test_a_student_follows_its_teacher_as_it_is_now(teacher):
    vit = teacher(in_chans=1).double()
    vit.reset_classifier(3, "avg")
    vit.set_input_size((32, 56))
    built = build_student(vit, [0], {"proxy_dim": 4})
    assert built(images(32, 56, channels=1).double()).shape == (2, 3)
    assert torch.equal(built.head.weight, vit.head.weight)
    assert {value.dtype for value in built.parameters()} == {torch.float64}
    assert built.pretrained_cfg["input_size"] == [1, 32, 56]
    assert built.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    assert vit.blocks[0].attn.__class__ is Attention, "the teacher is not changed"


@pytest.mark.parametrize("base", BASES)
def test_blocks_get_the_grid_of_the_image(student, base):
    model = student(base, layers=[1])
    for size in [(32, 32), (16, 40), (40, 16)]:
        x = images(*size)
        after = by_hand(model, x)
        torch.testing.assert_close(model.forward_features(x), model.norm(after[-1]))
        torch.testing.assert_close(model(x), model.forward_head(model.norm(after[-1])))
        final, between = model.forward_intermediates(x, indices=[0, 1], output_fmt="NLC", return_prefix_tokens=False)
        torch.testing.assert_close(final, model.norm(after[-1]))
        for tokens, expected in zip(between, after, strict=True):
            torch.testing.assert_close(tokens, expected[:, model.num_prefix_tokens :])
    assert model.grid.hw is None
    assert not torch.allclose(by_hand(model, images(16, 40))[-1], by_hand(model, images(40, 16))[-1])


@pytest.mark.parametrize("base", ["class token", "registers", "distilled"])
@pytest.mark.parametrize("size", [(32, 56), (48, 40)])
def test_a_dynamic_model_equals_one_of_that_size(student, base, size):
    model, x = student(base), images(*size)
    arguments = {**model._model_args, "img_size": size, "dynamic_img_size": False}
    fixed = timm.create_model("gspn2_vit", **arguments).eval()
    state = model.state_dict()
    grids = {"new_size": [edge // 8 for edge in size], "old_size": [4, 6]}
    grids["num_prefix_tokens"] = 0 if model.no_embed_class else model.num_prefix_tokens
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], **grids)
    fixed.load_state_dict(state)
    torch.testing.assert_close(fixed(x), model(x))
    moved = copy.deepcopy(model)
    moved.set_input_size(size)
    torch.testing.assert_close(moved(x), model(x))
    fixed.pos_embed.data = resample_position(model.pos_embed.data, **grids)
    assert torch.equal(embed(fixed, x), embed(model, x)), "by products, not as timm interpolates"


def test_reset_classifier_leaves_the_features(student):
    model, x = student("distilled"), images()
    features = model.forward_features(x)
    model.reset_classifier(7)
    assert torch.equal(model.forward_features(x), features)
    expected = (model.head(features[:, 0]) + model.head_dist(features[:, 1])) / 2
    torch.testing.assert_close(model(x), expected)


def gradients(model, *inputs):
    model.zero_grad()
    losses = [model(x).square().sum() for x in inputs]  # all forward passes before any backward
    for loss in losses:
        loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(("base", "layers"), [("class token", (0, 1)), ("registers", (1,)), ("map pool", (0,))])
def test_checkpointing_gives_the_same_gradients(student, base, layers):
    model = student(base, layers).train()
    inputs = images(32, 32), images(16, 40)
    expected = gradients(model, *inputs)
    model.set_grad_checkpointing()
    assert not model.grad_checkpointing, "timm's own checkpointing would read the grid in backward"
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        model(inputs[0])
    kept = sum(saved)
    result = gradients(model, *inputs)
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, msg=lambda text, name=name: f"{name}: {text}")
    model.set_grad_checkpointing(False)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        model(inputs[0])
    assert kept < sum(saved) / 2, "every block recomputes, those with attention too"


@pytest.mark.parametrize("strict", [False, True])
def test_export_leaves_checkpointing_out(student, strict):
    model, x = student(layers=[0]), images()
    model.set_grad_checkpointing()
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_as_one_graph(student, checkpointing):
    model = student("registers", layers=[1])
    model.set_grad_checkpointing(checkpointing)
    # aot_eager traces as inductor does, and spares the C++ compiler.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, result = gradients(model, images()), gradients(compiled, images())
    torch.testing.assert_close(compiled(images()), model(images()))
    torch.testing.assert_close(compiled(images(16, 40)), model(images(16, 40)))
    for name, value in expected.items():
        torch.testing.assert_close(result[f"_orig_mod.{name}"], value)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(student, again):
    model, x = student("class token", layers=[0, 1]), images(16, 40)
    twin = again(model)
    assert type(twin) is Gspn2Vit
    assert torch.equal(twin(x), model(x))
    assert twin.blocks[0].grid is twin.blocks[1].grid is twin.grid
    assert twin.grid is not model.grid
    before = model(x)
    stirred(twin)
    assert torch.equal(model(x), before)


def test_threads_do_not_mix_up_their_grids(student):
    model = student("class token")
    sizes = [(16, 64), (64, 16), (32, 32), (8, 128), (128, 8), (24, 40), (40, 24), (16, 16)]
    inputs = [images(*size, batch=1) for size in sizes]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        with ThreadPoolExecutor(8) as pool:
            results = list(
                pool.map(lambda i: torch.allclose(model(inputs[i % 8]), expected[i % 8], atol=1e-5), range(80))
            )
    assert results.count(False) == 0


def test_an_error_on_the_way_leaves_no_grid_behind(student):
    model = student()
    with pytest.raises(AssertionError, match="divisible"):
        model(images(32, 33))
    with pytest.raises(UserError, match="takes no attn_mask"):
        model(images(), attn_mask=torch.zeros(17, 17))
    with pytest.raises(UserError, match="takes no attn_mask"):
        model.forward_intermediates(images(), is_causal=True)
    assert model.grid.hw is None
    with pytest.raises(UserError, match="knows no grid"):
        model.blocks[0](torch.zeros(1, 17, 32))
    with pytest.raises(UserError, match="knows no grid"):
        GspnBlock(mixer={"proxy_dim": 4, "has_prefix": True}, dim=32, num_heads=2)(torch.zeros(1, 17, 32))


def test_a_fresh_model_starts_where_mixers_start():
    torch.manual_seed(0)
    model = timm.create_model("gspn2_vit", base="vit_small_patch14_dinov2", gspn_layers=[1], **TINY)
    assert [type(block) for block in model.blocks] == [KeptBlock, GspnBlock]
    mixer = model.blocks[1].attn
    reference = Gspn2Mixer(Attention(32, 2), has_prefix=True, proxy_dim=4)
    assert torch.equal(mixer.control.weight, reference.control.weight), "timm's initialisation does not stay"
    assert torch.equal(mixer.control.bias, reference.control.bias)
    assert model._model_args["mixer"] == {"proxy_dim": 4, "has_prefix": True}
    assert model._model_args["gspn_layers"] == [1]
    without = timm.create_model("gspn2_vit", base="vit_base_patch16_siglip_224", **TINY)
    assert [block.attn.prefix for block in without.blocks] == [None, None]
    assert without._model_args["gspn_layers"] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "vit_tinny"}, "base='vit_tinny' is no timm ViT"),
        ({"base": "gspn2_vit"}, "base='gspn2_vit' is no timm ViT"),
        ({"base": "resnet18"}, "resnet18"),
        ({"pretrained": True}, "no weights of its own"),
        ({"block_fn": nn.Identity}, "neither block_fn nor fix_init"),
        ({"fix_init": True}, "neither block_fn nor fix_init"),
        ({"gspn_layers": [0, 2]}, "has block 2, but the model has blocks 0 to 1"),
        ({"gspn_layers": [-1]}, "has block -1"),
        ({"img_size": 33}, "image size 33x33 is no multiple of the patch 8x8; use 32 or 40"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate is above 0"),
        ({"features_only": True, "feature_cls": "list"}, "hide the grid"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        timm.create_model("gspn2_vit", **{**TINY, **arguments})


def test_a_student_is_no_teacher(student):
    with pytest.raises(UserError, match="converted GSPN-2 ViT already"):
        build_student(student(), [0], {"proxy_dim": 4})


def test_a_trace_gives_the_same(teacher) -> None:
    model, x = build_student(teacher(), [0, 1], {"proxy_dim": 6}), images(32, 32, batch=1)
    torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), model(x))
