"""What ops ask of the program around them."""

import torch
from torch import Tensor, nn

from gspn2_kernels.operands import exporting


class Answer(nn.Module):
    """Adds 1 where it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (1 if exporting() else 0)


def test_an_export_is_no_compilation() -> None:
    """In an export kernels give way to standard operators, which torch.compile would have no use for."""
    x = torch.zeros(3)
    assert torch.equal(Answer()(x), x)
    assert torch.equal(torch.compile(Answer(), fullgraph=True, backend="eager")(x), x)
    for strict in (False, True):
        assert torch.equal(torch.export.export(Answer(), (x,), strict=strict).module()(x), x + 1)
