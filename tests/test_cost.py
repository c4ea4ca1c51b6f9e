"""Counted cost against counting by hand."""

import pytest
import timm
import torch

from gspn2convert.cost import cost, training_bytes
from gspn2convert.errors import UserError
from gspn2convert.model import build_student

C, PROXY, MLP, CLASSES, PATCH, IMAGE = 32, 4, 128, 10, 8, 32
SCAN_MACS_PER_ELEMENT = 5  # three neighbours, lam * x and u * h


@pytest.fixture(scope="module")
def teacher():
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=IMAGE,
        patch_size=PATCH,
        depth=2,
        embed_dim=C,
        num_heads=2,
        num_classes=CLASSES,
        dynamic_img_size=True,
    ).eval()


def embed_macs(patches):
    return patches * 3 * PATCH * PATCH * C


def mlp_macs(tokens):
    return tokens * 2 * C * MLP


def attention_macs(tokens):
    return tokens * 4 * C * C + 2 * tokens * tokens * C


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 40)])
def test_teacher_costs_what_counting_by_hand_says(teacher, height, width):
    patches = (height // PATCH) * (width // PATCH)
    tokens = patches + 1
    counted = cost(teacher, height, width)
    assert [site.macs for site in counted.sites] == [attention_macs(tokens)] * 2
    assert counted.macs == embed_macs(patches) + 2 * (attention_macs(tokens) + mlp_macs(tokens)) + C * CLASSES
    assert counted.parameters == sum(parameter.numel() for parameter in teacher.parameters())
    assert [site.parameters for site in counted.sites] == [4 * C * C + 4 * C] * 2
    assert counted.scan_macs == 0
    assert counted.grid == (height // PATCH, width // PATCH)


def test_mixer_costs_what_counting_by_hand_says(teacher):
    bare = {"proxy_dim": PROXY, "lpu": False, "global_branch": False, "prefix": "pool", "prefix_gate": False}
    counted = cost(build_student(teacher, [1], bare), IMAGE, IMAGE)
    patches, tokens = 16, 17
    scan = SCAN_MACS_PER_ELEMENT * patches * 4 * PROXY
    # The class token goes through the projections along with the patches, and four logits are made for every three.
    projections = tokens * (C * PROXY + PROXY * (8 * PROXY + 16)) + patches * 4 * PROXY * C
    kept, mixer = counted.sites
    assert (kept.kind, kept.macs) == ("attention", attention_macs(tokens))
    assert mixer.kind == "gspn2"
    assert counted.scan_macs == scan
    # The class token reads the mean of all tokens through the value and output projections that it inherits.
    assert mixer.macs == scan + projections + 2 * C * C
    assert counted.macs == embed_macs(patches) + kept.macs + mixer.macs + 2 * mlp_macs(tokens) + C * CLASSES


def test_counting_leaves_the_model_as_it_was(teacher):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    cost(teacher, IMAGE, IMAGE)
    training_bytes(teacher, IMAGE, IMAGE)
    after = teacher.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].device.type == "cpu" for name, tensor in before.items())


def test_training_bytes_equal_those_a_real_forward_pass_keeps(teacher):
    student = build_student(teacher, [0, 1], {"proxy_dim": PROXY})
    own = {tensor.untyped_storage().data_ptr() for tensor in [*student.parameters(), *student.buffers()]}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student(torch.zeros(1, 3, IMAGE, IMAGE))
    real = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    assert training_bytes(student, IMAGE, IMAGE) == real


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(teacher):
    with pytest.raises(UserError, match="33x32"):
        cost(teacher, 33, 32)
