"""The network of ct-lung-unet: a small U-Net in PyTorch, and its export to plain ONNX operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

CHANNELS = (8, 16, 32, 64, 64)
"""Width of each level; each level halves the resolution, so sides are multiples of 16."""


class _Block(nn.Sequential):
    """Two 3 x 3 convolutions, each with batch normalisation and ReLU."""

    def __init__(self, inward: int, outward: int) -> None:
        layers: list[nn.Module] = []
        for source in (inward, outward):
            layers += [
                nn.Conv2d(source, outward, 3, padding=1, bias=False),
                nn.BatchNorm2d(outward),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class LungUNet(nn.Module):
    """slab float32 (n, 3, rows, columns), 0..1 -> logits (n, 3, rows, columns): background, right, left."""

    def __init__(self, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        self.down = nn.ModuleList(_Block(a, b) for a, b in zip((3, *channels), channels, strict=False))
        up = list(zip(channels[1:], channels, strict=False))[::-1]
        self.up = nn.ModuleList(_Block(low + skip, skip) for low, skip in up)
        self.last = nn.Conv2d(channels[0], 3, 1)

    def forward(self, slab: torch.Tensor) -> torch.Tensor:
        skips = []
        value = slab
        for index, block in enumerate(self.down):
            value = block(value if index == 0 else nn.functional.max_pool2d(value, 2))
            skips.append(value)
        skips.pop()
        for block in self.up:
            value = nn.functional.interpolate(value, scale_factor=2.0, mode="nearest")
            value = block(torch.cat([skips.pop(), value], dim=1))
        return self.last(value)  # type: ignore[no-any-return]


def folded(net: LungUNet) -> dict[str, npt.NDArray[np.float32]]:
    """Weights with the batch normalisation folded in: ``<block>.<conv>.w`` and ``.b`` in the order of the graph.

    Blocks are ``down0`` ... and ``up0`` ...; the last convolution is ``last.0``.
    """
    out: dict[str, npt.NDArray[np.float32]] = {}
    blocks = [(f"down{i}", b) for i, b in enumerate(net.down)] + [(f"up{i}", b) for i, b in enumerate(net.up)]
    for name, block in blocks:
        for number in (0, 1):
            conv: Any = block[number * 3]
            norm: Any = block[number * 3 + 1]
            scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
            weight = conv.weight.double() * scale[:, None, None, None]
            bias = norm.bias.double() - norm.running_mean.double() * scale
            out[f"{name}.{number}.w"] = weight.detach().numpy().astype(np.float32)
            out[f"{name}.{number}.b"] = bias.detach().numpy().astype(np.float32)
    assert net.last.bias is not None
    out["last.0.w"] = net.last.weight.detach().numpy().copy()
    out["last.0.b"] = net.last.bias.detach().numpy().copy()
    return out
