"""A moving average of a model's weights that stays in the host's memory."""

import copy

import torch
from timm.utils import ModelEmaV3
from torch import nn


class HostAverage:
    """timm's moving average of weights and buffers, in the host's memory.

    The weights of a step travel while the device computes on, and enter the average when the next ones are sent: so
    an update waits for a transfer that began a step ago, not for the device to finish its queue.
    """

    def __init__(self, model: nn.Module, *, decay: float):
        self.device = next(model.parameters()).device
        self.sent = copy.deepcopy(model).cpu()
        self.arrived = None
        if self.device.type == "cuda":
            self.sent._apply(torch.Tensor.pin_memory)  # only transfers to pinned memory run beside the host
            self.arrived = torch.cuda.Event()
        self.average = ModelEmaV3(self.sent, decay=decay)
        self.is_pending = False  # whether the average lacks what was sent last
        self.copied: nn.Module | None = None

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self._take_in()
        for ours, theirs in zip(self.sent.state_dict().values(), model.state_dict().values(), strict=True):
            ours.copy_(theirs, non_blocking=self.arrived is not None)
        if self.arrived is not None:
            self.arrived.record()
        self.is_pending, self.copied = True, None

    def _take_in(self) -> None:
        if self.is_pending and self.arrived is not None:
            self.arrived.synchronize()
        if self.is_pending:
            self.average.update(self.sent)
        self.is_pending = False

    @property
    def module(self) -> nn.Module:
        """The average, in the host's memory."""
        self._take_in()
        self.copied = None  # the caller may load other weights
        return self.average.module

    def on_device(self) -> nn.Module:
        """A copy of the average on the model's device, the same one until the next update."""
        self._take_in()
        if self.copied is None:
            self.copied = copy.deepcopy(self.average.module).to(self.device)
        return self.copied
