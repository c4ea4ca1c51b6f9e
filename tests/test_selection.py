"""Which blocks keep attention, against a brute force that builds every hybrid."""

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.nn.functional import cosine_similarity, log_softmax

from gspn2convert import selection
from gspn2convert.checkpoint import CheckpointStore
from gspn2convert.convert import convert
from gspn2convert.data import batches, open_images
from gspn2convert.held_out import HeldOut
from gspn2convert.interrupt import Interrupted
from gspn2convert.keep import Auto
from gspn2convert.model import build_student
from gspn2convert.progress import Progress
from gspn2convert.recipe import parse_recipe
from gspn2convert.selection import Selector, build_hybrid, evenly_spaced, greedy, measure, restored
from gspn2convert.teachers import load_teacher
from gspn2convert.train import make_accelerator
from gspn2convert.vit import data_config
from helpers.processes import environment

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = parse_recipe(
    """
name: short
mixer: {proxy_dim: C/4}
align: {steps: 1, batch_size: 1}
recover: {steps: 1, batch_size: 1}
""",
    "test",
)


@pytest.fixture(scope="module", params=["head", "no head"])
def trio(request):
    """The bundled teacher of six blocks, its all-GSPN student after the fit, and 24 other images."""
    teacher = load_teacher("demo")
    if request.param == "no head":
        teacher.reset_classifier(0)
    wanted = {"augment": None, "seed": 0, "workers": 0, "batch_size": 16}
    images = open_images("demo", "train", in_chans=1)
    few, others = (
        [pixels for pixels, _ in batches(images, data_config(teacher), indices=indices, **wanted)]
        for indices in (range(32), range(100, 124))
    )
    student, _ = convert(teacher, RECIPE, few, few[:1])
    return teacher, student, torch.cat(others)


@pytest.fixture
def select(tmp_path):
    """Runs one pass; the checkpoint's notes and what was said."""

    def go(auto, teacher, student, images, after="fit", store=None):
        store = store or CheckpointStore(tmp_path, {})
        selector = Selector(teacher, auto, make_accelerator("cpu"), store, Progress(quiet=True))
        kept = selector.run(after, student, HeldOut(teacher, images.split(10)))
        assert kept == store.notes["selection"]["kept"] == store.notes["selection"]["passes"][-1]["chosen"]
        return store

    return go


def hybrid_of(teacher, student, kept):
    """Built anew, with the weights of the student's mixers copied one by one."""
    layers = [i for i in range(len(teacher.blocks)) if i not in kept]
    hybrid = build_student(teacher, layers, RECIPE.mixer.resolve(teacher.embed_dim))
    with torch.no_grad():
        for i in layers:
            for ours, theirs in zip(hybrid.blocks[i].parameters(), student.blocks[i].parameters(), strict=True):
                ours.copy_(theirs)
    return hybrid


@torch.no_grad()
def brute_force(teacher, student, images):
    """Figures of any set of blocks, each computed over all images at once by a model of its own."""
    first, target = teacher.num_prefix_tokens, teacher.forward_features(images)

    def figures(kept):
        hybrid = hybrid_of(teacher, student, kept)
        with torch.no_grad():
            tokens = hybrid.forward_features(images)
            cosines = cosine_similarity(tokens.double(), target.double(), dim=-1)
            cosine = 0.5 * (cosines[:, :first].mean() + cosines[:, first:].mean()).item()
            found = {"divergence": 1 - cosine, "retention": cosine}
            if teacher.num_classes:
                p, q = (log_softmax(vit(images).double(), -1) for vit in (teacher, hybrid))
                found["retention"] = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
                found["kl"] = (p.exp() * (p - q)).sum(-1).mean().item()
        return found

    return figures


def brute_greedy(figures, rank, rounds):
    chosen = ()
    for _ in range(rounds):
        tried = [(figures((*chosen, i))[rank], i) for i in range(6) if i not in chosen]
        chosen += (min(tried)[1],)
    return list(chosen)


def test_a_pass_is_the_greedy_choice_by_brute_force(trio, select):
    teacher, _, _ = trio
    figures, rank = brute_force(*trio), "kl" if teacher.num_classes else "divergence"
    (found,) = select(Auto(count=3), *trio).notes["selection"]["passes"]
    assert (found["after"], found["ranked_by"], found["images"]) == ("fit", rank, 24)
    assert found["order"] == brute_greedy(figures, rank, 3)
    assert found["chosen"] == sorted(found["order"])
    for layer in range(6):
        assert found["layers"][layer] == pytest.approx({"layer": layer, **figures((layer,))}, abs=2e-6)
    named = {"none": [], "chosen": found["chosen"], "evenly spaced": [1, 3, 5], "last": [3, 4, 5]}
    assert {one["set"]: one["layers"] for one in found["sets"]} == named
    for one in found["sets"]:
        expected = figures(one["layers"])
        assert {key: one[key] for key in expected} == pytest.approx(expected, abs=2e-6)
    assert found["sets"][1][rank] < found["sets"][0][rank]


def test_a_budget_takes_as_few_as_reach_it(trio, select):
    teacher, _, _ = trio
    figures, rank = brute_force(*trio), "kl" if teacher.num_classes else "divergence"
    order = brute_greedy(figures, rank, 5)
    retained = [figures(order[:count])["retention"] for count in range(6)]
    for count in range(1, 5):
        if max(retained[:count]) < retained[count] - 1e-4:
            # Between what this set retains and the best of the smaller ones.
            budget = (max(retained[:count]) + retained[count]) / 2
            (found,) = select(Auto(budget=budget), *trio).notes["selection"]["passes"]
            assert found["order"] == order[:count]
            assert found["sets"][1]["retention"] >= budget > found["sets"][0]["retention"]
            break
    else:
        pytest.fail("no block that is added retains more")
    (found,) = select(Auto(budget=retained[0] - 1e-3), *trio).notes["selection"]["passes"]
    assert found["order"] == []
    assert [one["set"] for one in found["sets"]] == ["none", "chosen"]


def test_a_budget_that_cannot_be_reached_leaves_one_block(trio, select, caplog):
    caplog.set_level(logging.WARNING)
    teacher, student, images = trio
    with torch.no_grad():
        # Not the teacher's any longer: nothing that is restored brings the student near.
        broken = hybrid_of(teacher, student, ())
        broken.patch_embed.proj.weight.neg_()
    (found,) = select(Auto(budget=0.9999), teacher, broken, images).notes["selection"]["passes"]
    assert len(found["order"]) == 5
    assert "keep auto:budget=0.9999: retention is" in caplog.text
    assert "5 of 6 keep attention" in caplog.text


def test_restored_blocks_are_those_of_a_hybrid_to_the_bit(trio):
    teacher, student, images = trio
    own = list(student.blocks)
    with torch.no_grad():
        before = student.forward_features(images)
        for kept in ((2,), (0, 5), (1, 2, 3)):
            built = build_hybrid(student, teacher, kept, RECIPE.mixer.resolve(teacher.embed_dim))
            with restored(student, teacher, kept):
                now = student.forward_features(images)
            assert torch.equal(now, built.forward_features(images))
            assert torch.equal(now, hybrid_of(teacher, student, kept).forward_features(images))
            assert not torch.equal(now, before)
        assert torch.equal(student.forward_features(images), before)
    assert all(ours is theirs for ours, theirs in zip(student.blocks, own, strict=True))


def test_all_blocks_restored_are_the_teacher(trio):
    teacher, student, images = trio
    figures = measure(student, teacher, HeldOut(teacher, [images]), range(6))
    assert abs(figures.pop("divergence")) < 1e-6
    assert figures.pop("retention") == pytest.approx(1, abs=1e-6)
    assert abs(figures.pop("kl", 0.0)) < 1e-6
    assert not figures


def test_blocks_go_back_after_a_mistake(trio):
    teacher, student, _ = trio
    own = list(student.blocks)
    # Images of three channels, which this teacher does not take.
    with pytest.raises(RuntimeError, match="channels"), restored(student, teacher, (1, 4)):
        student(torch.zeros(1, 3, 28, 28))
    assert all(ours is theirs for ours, theirs in zip(student.blocks, own, strict=True))


def test_a_pass_that_is_noted_is_not_run_again(trio, select):
    teacher, student, images = trio
    store = select(Auto(count=1), *trio)
    before = store.notes["selection"]["passes"][0]
    seconds = dict(store.seconds_spent)
    select(Auto(count=1), teacher, student, images[:3], store=store)
    assert store.notes["selection"]["passes"] == [before]
    assert store.seconds_spent == seconds
    select(Auto(count=1), *trio, after="align", store=store)
    first, second = store.notes["selection"]["passes"]
    assert (first, second) == (before, {**before, "after": "align"})
    assert store.seconds_spent["select"] > seconds["select"]


def test_of_equals_the_first_block_is_taken():
    assert greedy(4, Auto(count=2), "kl", lambda blocks: {"kl": 1.0, "retention": 0.0}) == [0, 1]


@pytest.mark.parametrize(
    ("depth", "count", "blocks"),
    [(12, 3, [3, 7, 11]), (12, 1, [11]), (12, 5, [1, 3, 6, 8, 11]), (6, 2, [2, 5]), (27, 3, [8, 17, 26])],
)
def test_evenly_spaced_blocks(depth, count, blocks):
    assert evenly_spaced(depth, count) == blocks


def test_a_sample_of_held_out_images_is_from_all_over_them(tiny_teacher):
    images = torch.randn(13, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    whole = HeldOut(tiny_teacher, images.split(5))
    assert whole.sample(13) is whole
    part = whole.sample(4)
    chosen = [0, 3, 6, 9]
    assert torch.equal(torch.cat(part.images), images[chosen])
    for name in ("tokens", "logits"):
        assert torch.equal(torch.cat(getattr(part, name)), torch.cat(getattr(whole, name))[chosen])
    assert len(torch.cat(whole.images)) == 13
    assert [len(batch) for batch in whole.sample(7).images] == [5, 2]


def in_two_processes(folder, what):
    """What each process of `choose_with_others` wrote."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, folder, what)
    done = subprocess.run([sys.executable, *launch], env=environment(), timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


def test_all_processes_take_the_choice_of_the_first(tmp_path):
    """The second measures the opposite of what is so."""
    first, second = in_two_processes(tmp_path, "choose")
    assert first == second
    assert first["passes"][0]["sets"][1]["kl"] > 0


def test_all_processes_stop_when_one_is_asked_to(tmp_path):
    assert in_two_processes(tmp_path, "stop") == ["stopped after 3 of 10"] * 2


def choose_with_others(folder, what, rank):
    """What each process of these tests does."""
    torch.manual_seed(0)
    shape = {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
    teacher = timm.create_model("vit_tiny_patch16_224", **shape).eval()
    student = build_student(teacher, range(4), {"proxy_dim": 8})
    for parameter in student.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    calls = itertools.count(1)

    def disturbed(*given):
        if what == "stop" and next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return {key: -value for key, value in measure(*given).items()}

    if rank:
        selection.measure = disturbed
    store, accelerator = CheckpointStore(folder, {}), make_accelerator("cpu")
    selector = Selector(teacher, Auto(count=2), accelerator, store, Progress(quiet=True))
    try:
        selector.run("fit", student, HeldOut(teacher, [torch.randn(6, 3, 32, 32)]))
        found = store.notes["selection"]
    except Interrupted as stopped:
        found = f"stopped after {stopped.step} of {stopped.steps}"
    (folder / str(rank)).write_text(json.dumps(found))
    accelerator.end_training()  # threads of a process group that is left to the end of a process may abort it


if __name__ == "__main__":
    choose_with_others(Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"]))
