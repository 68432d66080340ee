"""The running statistics of a model's batch norms, the same in all processes."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """Averages the running means and variances of batch norms over the processes, after every optimiser step.

    In training each process normalises its own batch, as in MAE, and so moves its own statistics. Averaged, they
    stand for the whole batch, and all processes evaluate and save the same model. A skipped step leaves them as
    they were.
    """

    def __init__(self, model: nn.Module):
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.keep()

    @property
    def buffers(self) -> list[Tensor]:
        return [buffer for norm in self.norms for buffer in (norm.running_mean, norm.running_var)]

    def keep(self) -> None:
        """Makes the present statistics those that a skipped step returns to."""
        self.kept = [buffer.clone() for buffer in self.buffers]

    def agree(self, skipped: Tensor) -> None:
        """After an optimiser step; `skipped` is 1 if it was skipped. All processes call it together."""
        if not self.norms:
            return
        new = torch.cat(self.buffers)
        if dist.is_initialized() and dist.get_world_size() > 1:
            new = new.double()  # so that what is equal everywhere remains as it is
            dist.all_reduce(new)
            new = new / dist.get_world_size()
        for buffer, ours, before in zip(self.buffers, new.split([len(k) for k in self.kept]), self.kept, strict=True):
            buffer.copy_(torch.where(skipped > 0, before, ours))
        self.keep()
