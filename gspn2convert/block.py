"""The blocks of a GSPN-2 Vision Transformer: with a mixer, or with the attention that was kept.

timm hands a block one argument, the tokens, and a mixer needs the grid they lie on as well. It is in a cell that the
blocks of a model share.

Shapes: B batch, N = P + H W tokens, P prefix tokens, C channels, H W grid of patches.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gspn2_kernels import layer_norm, norm_and_sum
from gspn2_kernels.operands import autocast_wanted, by_triton, exporting
from gspn2convert.errors import UserError
from gspn2convert.mixer import Gspn2Mixer


class Grid(threading.local):
    """H, W of the forward pass that runs in this thread, or None; one for all blocks of a model.

    Kept by thread, for two threads may push images of different sizes through one model.
    """

    hw: tuple[int, int] | None = None

    def __reduce__(self) -> tuple[type[Grid], tuple[()]]:
        # A copy of a model is at rest; copy and pickle keep the copy shared among the copied blocks.
        return Grid, ()


class StudentBlock(Block):
    """What both kinds of blocks share."""

    grad_checkpointing = False

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add what was mixed to the tokens it was mixed of, then what the MLP makes of the sum: (B, N, C) all."""
        x = x + self.drop_path1(self.ls1(mixed))
        return self._with_mlp(x, self.norm2(x))

    def _with_mlp(self, x: Tensor, normed: Tensor) -> Tensor:
        """Add to tokens what the MLP makes of the normed ones: (B, N, C) all."""
        out: Tensor = x + self.drop_path2(self.ls2(self.mlp(normed)))
        return out

    def _recomputes(self) -> bool:
        """Whether a forward pass is to keep nothing but its input."""
        return self.grad_checkpointing and torch.is_grad_enabled() and not exporting()


class KeptBlock(StudentBlock):
    """A block that keeps its attention, and recomputes itself in backward when told to."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        if self._recomputes():
            return checkpoint(self._attend, x, attn_mask, is_causal, use_reentrant=False)
        return self._attend(x, attn_mask, is_causal)

    def _attend(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        return self.finish(x, self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))


class GspnBlock(StudentBlock):
    """A block whose attention is a `Gspn2Mixer`.

    Args:
        mixer: keyword arguments of `Gspn2Mixer`.
        arguments: of timm's Block, which builds the attention that the mixer takes over.
    """

    grid: Grid | None = None

    def __init__(self, *, mixer: dict[str, Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        assert isinstance(self.attn, Attention)
        self.attn: nn.Module = Gspn2Mixer(self.attn, **mixer)

    def init_weights(self) -> None:
        """Undo what timm's initialisation, which calls this last, has done to the mixer's linear layers."""
        assert isinstance(self.attn, Gspn2Mixer)
        self.attn.reset_parameters()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C).

        Raises:
            UserError: a mask is given, or the block runs outside of its model.
        """
        if attn_mask is not None or is_causal:
            raise UserError("a line scan takes no attn_mask and no is_causal; leave them out")
        grid = None if self.grid is None else self.grid.hw
        if grid is None:
            raise UserError("a GspnBlock was called by itself and knows no grid; call its Gspn2Vit instead")
        if self._recomputes():
            # The grid goes along, for backward may run after another forward pass, or in another thread.
            return checkpoint(self._mix, x, grid, use_reentrant=False)
        return self._mix(x, grid)

    def _mix(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        assert isinstance(self.attn, Gspn2Mixer)
        if self._fuses():
            assert isinstance(self.norm1, nn.LayerNorm)
            assert isinstance(self.norm2, nn.LayerNorm)
            x = self.attn.add_to(x, self.norm1, grid, getattr(self.ls1, "gamma", None))
            if self._fuses_mlp(x):
                assert isinstance(self.mlp, Mlp)
                return add_mlp(x, self.norm2, self.mlp)
            return self._with_mlp(x, layer_norm(x, self.norm2.weight, self.norm2.bias, self.norm2.eps))
        return self.finish(x, self.attn(self.norm1(x), grid))

    def _fuses(self) -> bool:
        """Whether norms, mixer and residual may be ours: nothing is trained, and nobody listens to what is between.

        A mixer whose weights are spread over processes (FSDP) is listened to: its hooks gather them.
        """
        norms = self.norm1, self.norm2
        parts = (*norms, self.ls1, self.drop_path1, self.attn)
        plain = all(isinstance(norm, nn.LayerNorm) for norm in norms)
        return plain and not (torch.is_grad_enabled() or self.training or any(map(_altered, parts)))

    def _fuses_mlp(self, x: Tensor) -> bool:
        """Whether the last product of the MLP may add to x, whose dtype it must have."""
        mlp = self.mlp
        if type(mlp) is not Mlp or type(mlp.fc2) is not nn.Linear or not isinstance(self.ls2, nn.Identity):
            return False
        weight = mlp.fc2.weight
        # A weight of another class, such as a quantised one, may know no product but that of a linear layer.
        plain = type(weight) is nn.Parameter and weight.dtype == x.dtype and not autocast_wanted(x.device.type)
        return plain and by_triton(x) and not any(map(_altered, (self.ls2, self.drop_path2, mlp)))


def add_mlp(x: Tensor, norm: nn.LayerNorm, mlp: Mlp) -> Tensor:
    """Compute x + mlp(norm(x)) with the sum in the last product, for inference.

    Args:
        x: (B, N, C).
        norm: the block's second norm.
        mlp: its last layer has the dtype of x.

    Returns:
        (B, N, C), contiguous.
    """
    # A product of cuBLAS adds a bias, or to a matrix. So the norm, which reads the matrix, adds the bias to it.
    assert isinstance(mlp.fc2, nn.Linear)
    hidden, out = norm_and_sum(x, norm.weight, norm.bias, norm.eps, mlp.fc2.bias)
    hidden = mlp.fc1(hidden)
    hidden = mlp.norm(mlp.act(hidden))
    out.flatten(0, 1).addmm_(hidden.flatten(0, 1), mlp.fc2.weight.t())
    return out


def _altered(part: nn.Module) -> bool:
    """Whether a module, or one in it, does something else than its class does in inference."""
    if part._forward_hooks or part._forward_pre_hooks or part.training or "forward" in vars(part):
        return True
    # Not by `modules()`, which takes a twentieth of the time in which Python launches a student.
    return any(_altered(child) for child in part._modules.values() if child is not None)
