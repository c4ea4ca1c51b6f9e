"""What is compiled and recorded of the stages, against the passes and steps that it stands for."""

import copy
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from gspn2convert.graphs import RecordedSteps
from gspn2convert.optim import make_optimizer, set_rates
from gspn2convert.recipe import Recover
from gspn2convert.recover import RecoverStage, tapped_tokens
from gspn2convert.stage import COMPILED, AlignStage
from helpers.stages import IMAGES, LOSSES, deviations, make_recover

REGIONS = pytest.mark.parametrize("regions", [0, 3], ids=["plain", "regions"])


@REGIONS
@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("kept", [(), (2,)], ids=["pure", "hybrid"])
def test_compiled_parts_give_what_the_pass_gives(make_pair, monkeypatch, kept, cast, regions):
    """And are compiled once for all blocks alike, whatever taps listen to."""
    pytest.importorskip("triton")
    counter, compile_ = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **how: compile_(call, backend=counter, fullgraph=True, **how))
    stage = make_recover(*make_pair(depth=4, regions=regions, layers=[i for i in range(4) if i not in kept]))
    tapped = tapped_tokens(0.0, 27)

    def run():
        stage.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            terms = stage.terms(IMAGES, tapped)
        torch.stack(list(terms.values())).sum().backward()
        return [*terms.values(), *(p.grad.clone() for p in stage.parameters() if p.grad is not None)]

    plain = run()
    with stage.compiled(COMPILED):
        ours = run()
    assert counter.frame_count == 3 + len(kept)  # norm, mixer, and what follows it; or what follows attention
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    parts = [part for block in stage.student.blocks for part in (block, block.norm1, block.attn)]

    def changed():
        return [part for part in parts if {"forward", "finish"} & set(vars(part))]

    with stage.compiled(COMPILED - 1):
        assert not changed()

    def fail():
        with stage.compiled(COMPILED):
            assert len(changed()) == len(parts) - len(kept)
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert not changed()


# In bfloat16 what is compiled rounds elsewhere: the last test is of that.
HOW = pytest.mark.parametrize(
    ("dtype", "steps"),
    [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, COMPILED)],
    ids=["fp32", "bf16", "fp32, compiled"],
)


@pytest.mark.gpu
@REGIONS
@HOW
def test_cuda_graphs_give_what_the_pass_gives(make_pair, dtype, steps, regions):
    student, teacher = (model.cuda() for model in make_pair(regions=regions))
    spread = deviations(teacher, IMAGES.cuda())
    stage = RecoverStage(student, teacher.to(dtype), LOSSES, spread).cuda()

    def gradients(terms):
        stage.zero_grad()
        torch.stack([term for name, term in terms.items() if name != "loss"]).sum().backward()
        return {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}

    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        stage.record(IMAGES.cuda(), steps)
    for progress in (0.0, 0.1, 0.7, 0.8, 0.2):  # with the mixer term, and without it
        images = torch.randn(4, 3, 32, 48, device="cuda") + 0.5
        tapped = tapped_tokens(progress, 27).cuda() if progress < 0.6 else None
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            replayed, plain = stage(images, progress), stage.terms(images, tapped)
        assert set(replayed) == {"loss", *plain}
        for name, value in plain.items():
            assert replayed[name].item() == pytest.approx(value.item(), rel=1e-4), name
        ours, theirs = gradients(replayed), gradients(plain)
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3 * value.abs().max().item(), msg=name)
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter += 0.01 * torch.randn_like(parameter)  # what a replay must see


@pytest.mark.gpu
@REGIONS
@HOW
def test_the_graph_of_align_gives_what_the_pass_gives(make_pair, dtype, steps, regions):
    student, teacher = (model.cuda() for model in make_pair(regions=regions))
    stage = AlignStage(student, teacher.to(dtype))
    autocast = {"device_type": "cuda", "dtype": torch.bfloat16, "enabled": dtype == torch.bfloat16}
    with torch.autocast(**autocast):
        stage.record(IMAGES.cuda(), steps)
    for _ in range(3):
        images = torch.randn(4, 3, 32, 48, device="cuda") + 0.5
        gradients = []
        for run in (stage, lambda images, _: {"loss": torch.stack(list(stage.terms(images).values())).mean()}):
            stage.zero_grad()
            with torch.autocast(**autocast):
                loss = run(images, 0.0)["loss"]
            loss.backward()
            gradients.append(
                [loss.detach().clone(), *(p.grad.clone() for p in stage.parameters() if p.grad is not None)]
            )
        assert len(gradients[0]) == len(gradients[1]) > 1
        for ours, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter += 0.01 * torch.randn_like(parameter)  # what a replay must see


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_recorded_steps_are_those_of_the_optimizer(make_pair, kind):
    """With rates that change, of the passes with the mixer term and without it, by the same gradients."""
    student, teacher = (model.cuda() for model in make_pair())
    recorded = RecoverStage(student, teacher, LOSSES, deviations(teacher, IMAGES.cuda())).cuda()
    plain = copy.deepcopy(recorded)
    spec = Recover(steps=12, batch_size=4, optimizer=kind, lr=1e-3, mixer_lr=1e-2)
    optimizers = [
        make_optimizer(kind, each.groups(spec), fused=True, capturable=each is recorded) for each in (recorded, plain)
    ]
    take_step = RecordedSteps(optimizers[0])
    recorded.record(IMAGES.cuda(), spec.steps)
    for step in range(spec.steps):
        recorded(torch.randn(4, 3, 32, 48, device="cuda") + 0.5, step / spec.steps)["loss"].backward()
        for one, other in zip(recorded.parameters(), plain.parameters(), strict=True):
            other.grad = None if one.grad is None else one.grad.clone()
        for optimizer, take in zip(optimizers, (take_step, optimizers[1].step), strict=True):
            set_rates(optimizer, step, spec.steps, 0.2)
            take()
            optimizer.zero_grad()
        for (name, one), other in zip(recorded.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=f"{name}, step {step}")
    assert sum(graph is not None for graph in take_step._graphs.values()) == 2  # so steps of either pass were replayed


@pytest.mark.gpu
@REGIONS
def test_compiled_graphs_in_bf16_are_as_exact_as_the_pass(make_pair, regions):
    """By their distances from the same pass in fp32."""
    student, teacher = (model.cuda() for model in make_pair(depth=4, layers=(0, 1, 3), regions=regions))
    stage = RecoverStage(student, teacher, LOSSES, deviations(teacher, IMAGES.cuda())).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        stage.record(IMAGES.cuda(), COMPILED)
    tapped = tapped_tokens(0.0, 27).cuda()

    def run(terms, cast):
        stage.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            found = terms()
        torch.stack([term for name, term in found.items() if name != "loss"]).sum().backward()
        values = [found[name].detach() for name in sorted(found) if name != "loss"]
        gradients = [p.grad for p in stage.parameters() if p.grad is not None]
        return torch.cat([each.flatten() for each in (*values, *gradients)])

    runs = []  # of several batches, since the error of one is a matter of luck
    for seed in range(8):
        images = torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(seed)).cuda() + 0.5
        exact, plain = (run(partial(stage.terms, images, tapped), cast) for cast in (False, True))
        runs.append((exact, plain, run(partial(stage, images, 0.0), cast=True)))
    exact, plain, ours = (torch.cat(each) for each in zip(*runs, strict=True))
    assert (ours - exact).norm() < 1.2 * (plain - exact).norm() < 0.1 * exact.norm()
