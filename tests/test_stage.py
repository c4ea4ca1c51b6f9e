"""What the two stages compute, against the same quantities put together by hand."""

import pytest
import torch
import torch.nn.functional as F

from gspn2convert.recipe import Align, Recover, RecoverLosses
from gspn2convert.recover import RecoverStage, tapped_tokens
from gspn2convert.stage import AlignStage, frozen_tokens
from helpers.stages import IMAGES, LOSSES, deviations, make_recover

ALIGN = Align(steps=4, batch_size=4, lr=2e-3, control_lr=1e-2, weight_decay=0.1)
RECOVER = Recover(steps=4, batch_size=4, mixer_lr=5e-4, lr=1e-4, final_lr_ratio=0.01, weight_decay=0.02)


@pytest.fixture
def pair(make_pair):
    return make_pair()


@torch.no_grad()
def test_align_is_the_mean_relative_error_behind_layer_scale(pair):
    student, teacher = pair
    terms = AlignStage(student, teacher)(IMAGES, 0.0)
    x, errors = teacher._pos_embed(teacher.patch_embed(IMAGES)), []
    for theirs, ours in zip(teacher.blocks, student.blocks, strict=True):
        normed, gamma = theirs.norm1(x), ours.ls1.gamma.double()
        target = gamma * theirs.attn(normed)[:, 3:].double()
        output = gamma * ours.attn(normed, (4, 6))[:, 3:].double()
        errors.append((output - target).square().sum() / (target - target.mean((0, 1))).square().sum())
        x = theirs(x)
    for site, error in enumerate(errors):
        assert terms[f"layer.{site}"].item() == pytest.approx(error.item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx((errors[0] + errors[1]).item() / 2, rel=1e-5)


@torch.no_grad()
def test_align_covers_converted_layers_only(make_pair):
    student, teacher = make_pair(layers=[1])
    assert sorted(AlignStage(student, teacher)(IMAGES, 0.0)) == ["layer.1", "loss"]


def test_align_trains_mixers_except_what_they_inherited(pair):
    student, teacher = pair
    stage = AlignStage(student, teacher)
    stage(IMAGES, 0.0)["loss"].backward()
    trained = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    own = ("down.weight", "control.weight", "control.bias", "lpu.weight", "shared.weight", "proj.weight", "proj.bias")
    own += ("prefix.log_sum.weight", "prefix.log_sum.bias")
    assert trained == {f"blocks.{site}.attn.{name}" for site in (0, 1) for name in own}
    assert trained == {name for name, p in student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", [AlignStage, make_recover])
def test_the_teacher_is_no_part_of_the_stage(pair, make):
    student, teacher = pair
    stage = make(student, teacher)
    theirs = {id(p) for p in teacher.parameters()}
    assert not theirs & {id(p) for p in stage.parameters()}
    assert teacher not in set(stage.modules())
    assert not any("teacher" in name for name in stage.state_dict())
    stage(IMAGES, 0.0)["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())


@torch.no_grad()
def test_recover_terms_by_hand(pair):
    student, teacher = pair
    stage = make_recover(student, teacher)
    terms = stage(IMAGES, 0.3)
    ours, theirs = student.forward_features(IMAGES).double(), teacher.forward_features(IMAGES).double()
    cosine = 1 - F.cosine_similarity(ours, theirs, dim=-1)
    patches = theirs[:, 3:]
    std = patches.flatten(0, 1).std(0, correction=0)
    expected = {
        "prefix": cosine[:, :3].mean(),
        "patch": cosine[:, 3:].mean(),
        "smooth_l1": F.smooth_l1_loss(ours[:, 3:] / std, patches / std),
        "prefix_smooth_l1": F.smooth_l1_loss(
            *(each[:, :3] / torch.maximum(theirs[:, :3].std(0, correction=0), 0.1 * std) for each in (ours, theirs))
        ),
        "logits": 4
        * F.kl_div(
            F.log_softmax(student(IMAGES).double() / 2, -1),
            F.softmax(teacher(IMAGES).double() / 2, -1),
            reduction="batchmean",
        ),
        "mixer": by_hand_mixer_term(student, teacher, tapped_tokens(0.3, 3 + 4 * 6)),
    }
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-7), name
    weights = {"prefix": 1.0, "patch": 0.9, "smooth_l1": 0.1, "prefix_smooth_l1": 0.1, "logits": 0.7, "mixer": 0.25}
    total = sum(weights[name] * expected[name].item() for name in weights)
    assert terms["loss"].item() == pytest.approx(total, rel=1e-4)


def by_hand_mixer_term(student, teacher, tokens):
    """Mean over layers of the LayerNorm'd difference, each model on its own stream; some tokens."""
    x = teacher._pos_embed(teacher.patch_embed(IMAGES))
    y, values = student._pos_embed(student.patch_embed(IMAGES)), []
    for theirs, ours in zip(teacher.blocks, student.blocks, strict=True):
        target = theirs.attn(theirs.norm1(x))
        mixed = ours.attn(ours.norm1(y), (4, 6))
        pair = (F.layer_norm(each, (32,))[:, tokens] for each in (mixed, target))
        values.append(F.mse_loss(*pair))
        x = theirs(x)
        y = y + ours.ls1(mixed)
        y = y + ours.ls2(ours.mlp(ours.norm2(y)))
    return torch.stack(values).mean()


@pytest.mark.parametrize("count", [1, 3, 4, 27])
def test_every_token_is_tapped_in_its_turn(count):
    steps = [tapped_tokens(step / 1000, count).tolist() for step in range(1000)]
    share = torch.bincount(torch.tensor([token for tokens in steps for token in tokens]), minlength=count) / 1000
    assert all(len(set(tokens)) == max(1, count // 4) for tokens in steps)
    assert share.tolist() == pytest.approx([1 / min(4, count)] * count, abs=0.06)


def test_mixer_term_fades_linearly_and_is_left_out_then(pair):
    stage = make_recover(*pair)
    weights = [stage.weights(progress).get("mixer") for progress in (0.0, 0.15, 0.3, 0.59, 0.6, 1.0)]
    assert weights == [pytest.approx(w) if w else None for w in (0.5, 0.375, 0.25, 0.5 / 60, None, None)]
    terms = stage(IMAGES, 0.6)
    assert "mixer" not in terms
    terms["loss"].backward()
    assert all(p.grad is None for p in stage.adapters.parameters())
    assert all(p.grad is not None for p in stage.student.parameters())
    stage(IMAGES, 0.5)["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in stage.adapters.parameters())


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        ({"class_token": False, "reg_tokens": 0, "global_pool": "avg"}, {"prefix", "prefix_smooth_l1"}),
        ({"num_classes": 0}, {"logits"}),
        ({"num_classes": 0, "global_pool": "avg", "init_values": None}, {"logits"}),
    ],
)
def test_terms_that_do_not_apply_are_left_out(make_pair, arguments, absent):
    student, teacher = make_pair(**arguments)
    terms = make_recover(student, teacher)(IMAGES, 0.0)
    everything = {"loss", "prefix", "prefix_smooth_l1", "patch", "smooth_l1", "logits", "mixer"}
    assert set(terms) == everything - absent
    terms["loss"].backward()
    assert set(AlignStage(student, teacher)(IMAGES, 0.0)) == {"loss", "layer.0", "layer.1"}


def test_losses_of_weight_zero_cost_nothing(pair):
    student, teacher = pair
    stage = make_recover(student, teacher, RecoverLosses(mixer=0.0, logits=0.0))
    assert not list(stage.adapters.parameters())
    assert set(stage(IMAGES, 0.0)) == {"loss", "prefix", "prefix_smooth_l1", "patch", "smooth_l1"}


def test_recover_groups(make_pair):
    student, teacher = make_pair(layers=[1])
    stage = make_recover(student, teacher)
    names = {id(p): name for name, p in stage.named_parameters()}
    rates = {
        names[id(p)]: (g["peak"], g["final"], g["weight_decay"]) for g in stage.groups(RECOVER) for p in g["params"]
    }
    assert set(rates) == set(names.values())
    for name, (peak, final, decay) in rates.items():
        parameter = stage.get_parameter(name)
        inherited = name.startswith("student.") and ".attn." not in name or ".prefix.qkv." in name
        inherited |= ".prefix.proj." in name or "blocks.0." in name
        assert peak == (1e-4 if inherited else 5e-4), name
        assert final == pytest.approx(0.01 * peak)
        token = name in {"student.pos_embed", "student.cls_token", "student.reg_token"}
        assert decay == (0.0 if parameter.ndim < 2 or token else 0.02), name


def test_align_groups(pair):
    stage = AlignStage(*pair)
    names = {id(p): name for name, p in stage.named_parameters() if p.requires_grad}
    found = {names[id(p)]: g for g in stage.groups(ALIGN) for p in g["params"]}
    assert set(found) == set(names.values())
    for name, group in found.items():
        peak = 1e-2 if name.endswith(".control.weight") else 2e-3
        assert (group["lr"], group["peak"], group["final"]) == (peak, peak, 1e-5), name
        assert group["weight_decay"] == (0.0 if stage.get_parameter(name).ndim < 2 else 0.1), name


def test_token_deviations_over_several_batches(pair):
    _, teacher = pair
    found = deviations(teacher, IMAGES[:1], IMAGES[1:])
    with torch.no_grad():
        tokens = teacher.forward_features(IMAGES).double()
    patches = tokens[:, 3:].flatten(0, 1).std(0, correction=0)
    expected = torch.cat([torch.maximum(tokens[:, :3].std(0, correction=0), 0.1 * patches), patches[None]])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_channel_that_never_varies_does_not_divide_by_zero(pair):
    student, teacher = pair
    with torch.no_grad():
        teacher.norm.weight[5] = 0
        found = deviations(teacher, IMAGES)
        patches = found[-1]
        assert patches[5].item() == pytest.approx(torch.cat([patches[:5], patches[6:]]).sum().item() / 32, rel=1e-4)
        terms = RecoverStage(student, teacher, LOSSES, found)(IMAGES, 0.0)
    assert torch.isfinite(terms["smooth_l1"] + terms["prefix_smooth_l1"])


def test_prefix_tokens_of_one_image_count_in_tenths_of_the_patches_deviations(pair):
    """They do not vary at all."""
    found = deviations(pair[1], IMAGES[:1])
    torch.testing.assert_close(found[:-1], (0.1 * found[-1]).expand(3, -1))


def test_stages_run_the_student_without_dropout(pair):
    student, teacher = pair
    student.blocks[0].mlp.drop1.p = student.blocks[1].mlp.drop2.p = 0.5
    stage = make_recover(student.train(), teacher)
    with torch.no_grad():
        first, second = stage(IMAGES, 0.0), stage(IMAGES, 0.0)
    assert torch.equal(first["loss"], second["loss"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_teacher_runs_in_its_own_dtype_under_autocast(make_pair, dtype):
    """Its norms, too: autocast would give float32 tokens of a model in bfloat16."""
    _, teacher = make_pair()
    teacher.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = frozen_tokens(teacher, IMAGES)
        with torch.autocast("cpu", enabled=False):
            expected = teacher.forward_features(IMAGES.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0.0 if dtype == torch.bfloat16 else 0.1)
