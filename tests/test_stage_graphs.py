"""CUDA graphs of the stages, against the pass that they stand for."""

import pytest
import torch

from gspn2convert.recover import RecoverStage, tapped_tokens
from gspn2convert.stage import AlignStage
from helpers.stages import IMAGES, LOSSES, deviations


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graphs_give_what_the_pass_gives(make_pair, dtype):
    student, teacher = (model.cuda() for model in make_pair())
    spread = deviations(teacher, IMAGES.cuda())
    stage = RecoverStage(student, teacher.to(dtype), LOSSES, spread).cuda()

    def gradients(terms):
        stage.zero_grad()
        torch.stack([term for name, term in terms.items() if name != "loss"]).sum().backward()
        return {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}

    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        stage.record(IMAGES.cuda())
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_graph_of_align_gives_what_the_pass_gives(make_pair, dtype):
    student, teacher = (model.cuda() for model in make_pair())
    stage = AlignStage(student, teacher.to(dtype))
    autocast = {"device_type": "cuda", "dtype": torch.bfloat16, "enabled": dtype == torch.bfloat16}
    with torch.autocast(**autocast):
        stage.record(IMAGES.cuda())
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
