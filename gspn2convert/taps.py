"""Reading what enters and leaves the attention sites or blocks of a ViT while it runs.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gspn2convert.vit import attention_sites


class Taps:
    """Captures the input and output of attention sites, or of whole blocks, during the passes inside a `with` block.

    Works alike on timm's attention and on a mixer: both take the normalised tokens first. Tensors are kept
    as they are, with their autograd history where there is one.

    Args:
        vit: teacher or student.
        sites: block numbers.
        of: `attention_sites`, or `blocks` for what enters and leaves the whole block.

    Attributes:
        inputs: per site, the (B, N, C) tokens that entered it in the last forward pass.
        outputs: per site, the (B, N, C) tokens that left it; attention's are those before LayerScale.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        sites: Iterable[int],
        of: Callable[[VisionTransformer], list[nn.Module]] = attention_sites,
    ) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        modules = of(vit)
        self._modules = {site: modules[site] for site in sites}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Taps:
        """Start to capture."""
        for site, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._keeper(site)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop; what was captured stays readable."""
        while self._handles:
            self._handles.pop().remove()

    def _keeper(self, site: int) -> Any:  # noqa: ANN401 - torch types hooks as bare callables
        def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[site], self.outputs[site] = arguments[0], output

        return keep
