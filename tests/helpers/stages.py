"""Images and losses of the tests of stages, and the stage of recovery."""

import torch

from gspn2convert.losses import token_deviations
from gspn2convert.recipe import RecoverLosses
from gspn2convert.recover import RecoverStage

LOSSES = RecoverLosses(prefix=1.0, patch=0.9, smooth_l1=0.1, mixer=0.5, logits=0.7, temperature=2.0, mixer_until=0.6)
IMAGES = torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def make_recover(student, teacher, losses=LOSSES):
    return RecoverStage(student, teacher, losses, deviations(teacher, IMAGES))


@torch.no_grad()
def deviations(teacher, *batches):
    return token_deviations([teacher.forward_features(images) for images in batches], teacher.num_prefix_tokens)
