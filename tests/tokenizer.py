"""A small tokenizer: the nearest of 16 colours to the mean of a token, as an exported program."""

import torch
from einops import reduce
from torch import Tensor, nn


class NearestColour(nn.Module):
    """Clips (B,3,T,H,W) in [0,1] -> ids (B,N) of tokens of 2 frames x 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.register_buffer("colours", torch.rand(16, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        means = reduce(pixels, "b c (t f) (h p) (w q) -> b (t h w) c", "mean", f=2, p=8, q=8)  # (B,N,3)
        return (means[:, :, None] - self.colours).square().sum(3).argmin(2)  # (B,N)


def export(path, *, batch: int | None, side: int = 32) -> NearestColour:
    """Writes a tokenizer of new colours for clips of 8 frames; `batch` clips at a time, None for any number."""
    network = NearestColour()
    sizes = None if batch else ({0: torch.export.Dim("b")},)
    program = torch.export.export(network, (torch.rand(batch or 2, 3, 8, side, side),), dynamic_shapes=sizes)
    torch.export.save(program, path)
    return network
