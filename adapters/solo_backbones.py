"""Backbones of the CLIMB paper that solo-learn lacks; imports timm, and that when called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Stem(nn.Conv2d):
    """A first convolution whose stride travels in the checkpoint.

    So ``main_linear.py``, which builds the backbone by itself and knows nothing of the stride,
    gets the one that was trained.
    """

    def get_extra_state(self) -> Tensor:
        """The stride."""
        return torch.tensor(self.stride)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the stride of the checkpoint."""
        self.stride = tuple(state.tolist())


def efficientnet_b0(method: str, **kwargs: Any) -> Any:
    """EfficientNet-B0 of timm without its classifier, for solo-learn's table of backbones.

    Args:
        method: Name of the method, which makes no difference here.
        **kwargs: Passed on to timm, such as ``drop_path_rate``.
    """
    import timm

    backbone: Any = timm.create_model("efficientnet_b0", num_classes=0, **kwargs)
    plain = backbone.conv_stem
    stem = nn.utils.skip_init(
        Stem,
        plain.in_channels,
        plain.out_channels,
        kernel_size=plain.kernel_size,
        stride=plain.stride,
        padding=plain.padding,
        bias=plain.bias is not None,
    )
    stem.load_state_dict(plain.state_dict(), strict=False)
    backbone.conv_stem = stem
    return backbone


def adapt_to_cifar(model: nn.Module) -> None:
    """Stride 1 in the stems, as solo-learn does for ResNet on CIFAR; draws nothing at random."""
    for module in model.modules():
        if isinstance(module, Stem):
            module.stride = (1, 1)
