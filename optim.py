"""The optimiser: parameter groups with layer decay, the schedule, and skipping steps with a non-finite loss."""

import math

import torch
import torch.distributed as dist
from timm.optim import Lars, create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor, nn

from utils import SettingError


def parameter_groups(
    model: nn.Module, *, weight_decay: float, layer_decay: float | None = None, lr: float = 1.0
) -> list[dict]:
    """Groups the trained parameters by layer and by whether they are decayed; frozen ones are left out.

    One-dimensional parameters, biases and the names in the model's `no_weight_decay()` are not decayed. With
    layer-wise decay (BEiT, appendix) a group's `lr_scale` is layer_decay^(last layer - its layer), by the model's
    `layer_ids()`; otherwise, and for layer_decay 1, it is 1. (timm's `param_groups_layer_decay` orders groups from
    another list of layers, so checkpoints of the optimiser would not carry over.) A grid of probes has its own rates,
    as multiples of the whole's `lr`, and its own decays, which stay constant (`constant_decay`).

    Returns:
        Dicts with `params`, `weight_decay` and `lr_scale`, in the order of their first parameters.

    Raises:
        SettingError: `layer_decay` is not positive, or every parameter is frozen.
    """
    if layer_decay is not None and layer_decay <= 0:
        raise SettingError(f"--layer_decay {layer_decay} must be positive; 1 gives all layers the same rate")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise SettingError("there is nothing to optimise: every parameter of the model is frozen")
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    by_layer = layer_decay is not None and layer_decay < 1
    layers = model.layer_ids() if by_layer else dict.fromkeys(trained, 0)
    last = max(layers.values())
    own = model.group_settings() if hasattr(model, "group_settings") else {}
    groups: dict[tuple, dict] = {}
    for name, p in trained.items():
        decays = p.ndim > 1 and not name.endswith(".bias") and name not in skip
        rate, decay = own.get(name, (lr, weight_decay))
        new = {
            "params": [],
            "weight_decay": decay if decays else 0.0,
            "lr_scale": (layer_decay ** (last - layers[name]) if by_layer else 1.0) * (rate / lr if own else 1.0),
            "constant_decay": bool(own),
        }
        groups.setdefault((layers[name], decays, rate, decay), new)["params"].append(p)
    return list(groups.values())


def create_optimizer(
    model: nn.Module,
    *,
    opt: str = "adamw",
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    eps: float | None = 1e-8,
    betas: tuple[float, ...] | None = None,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Creates any optimiser of timm by name, over the model's `parameter_groups`.

    AdamW runs fused: one kernel for all parameters, and no host synchronisation in mixed precision. LARS
    adapts the rate of every matrix and of no bias, also without weight decay, as in MAE's linear probing
    (timm's default skips the adaptation where there is no decay).

    Args:
        eps, momentum: used by the optimisers that have them.
        betas: None takes the optimiser's default.

    Raises:
        SettingError: timm has no such optimiser, it does not take these values, it would clip the gradients of a grid
            of probes together, or `parameter_groups` raises.
    """
    opt = opt.lower()
    if opt not in list_optimizers():
        raise SettingError(f"--opt {opt}: timm has no such optimiser; try adamw, sgd, lamb, lars or lion")
    info = get_optimizer_info(opt)
    settings: dict = {"eps": eps} if eps is not None else {}
    if betas is not None:
        expected = info.num_betas if info.has_betas else 0
        if len(betas) != expected:
            given = " ".join(map(str, betas))
            raise SettingError(f"--opt_betas {given}: {opt} takes {expected or 'no'} betas; change or drop them")
        settings["betas"] = tuple(betas)
    if opt in ("adam", "adamw"):
        settings["fused"] = True
    groups = parameter_groups(model, weight_decay=weight_decay, layer_decay=layer_decay, lr=lr)
    if info.opt_class is Lars:
        for group in groups:
            group["always_adapt"] = all(p.ndim > 1 for p in group["params"])
    settings |= {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
    try:
        optimizer = create_optimizer_v2(groups, opt=opt, **settings)
    except ValueError as error:
        raise SettingError(f"--opt {opt} refuses its settings: {error}") from error
    if hasattr(model, "group_settings") and optimizer.defaults.get("max_grad_norm"):
        raise SettingError(f"--opt {opt} clips the gradients of all probes together; use another, e.g. adamw")
    return optimizer


def cosine_schedule(
    step: int,
    *,
    start: float = 0.0,
    peak: float,
    final: float,
    total_steps: int,
    warmup_steps: int = 0,
    kind: str = "steps",
) -> float:
    """The value at optimiser step `step` (from 0): linear warm-up from `start`, then half a cosine.

    Past `total_steps` the value stays where the cosine ends.

    Args:
        kind: "steps", AdaMAE and VideoMAE: the warm-up reaches `peak` at its last step; "epochs", MAE-ST, which counts
            fractional epochs: at the step after it.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / (warmup_steps if kind == "epochs" else max(1, warmup_steps - 1))
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))


class BadSteps:
    """Skips the optimiser's step where the loss of any process is not finite, and counts such steps.

    Everything stays on the device and nothing waits for it: a fused optimiser skips a step by itself when its
    attribute `found_inf` is set, as under a GradScaler. Other optimisers have no such switch, and whoever calls
    `optimizer.step` (GradScaler, DeepSpeed) knows nothing of bad steps; so their `step` is replaced by one that
    reads a number from the device and then steps or not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.optimizer = optimizer
        self.bad = torch.zeros((), device=device)  # 1 if a batch of this step was bad
        self.last = self.bad  # 1 if the last step was skipped
        self.total, self.in_row, self.longest = (torch.zeros((), device=device) for _ in range(3))
        self.fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if not self.fused:
            self.optimizer_step = optimizer.step
            optimizer.step = self._step_if_good

    def watch(self, loss: Tensor) -> None:
        """Notes whether the loss of one batch is finite."""
        self.bad = torch.maximum(self.bad, (~loss.detach().isfinite()).float())

    def agree(self, norm: Tensor | None = None) -> None:
        """Before the optimiser's step: bad on one process is bad on all.

        Args:
            norm: gradient norm, where a non-finite one makes the step bad too.
        """
        if norm is not None:
            self.bad = torch.maximum(self.bad, (~norm.isfinite()).float())
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.bad, dist.ReduceOp.MAX)
        if self.fused:
            self.optimizer.found_inf = self.bad

    def _step_if_good(self, *args, **settings):
        return None if self.bad.item() else self.optimizer_step(*args, **settings)

    def count(self) -> None:
        """After the optimiser's step."""
        self.last, self.bad = self.bad, torch.zeros_like(self.bad)
        self.total = self.total + self.last
        self.in_row = (self.in_row + 1) * self.last
        self.longest = torch.maximum(self.longest, self.in_row)

    def read(self) -> tuple[int, int, int]:
        """Skipped steps in all, in a row until now, in the longest row since the last call; waits for the device."""
        total, in_row, longest = torch.stack([self.total, self.in_row, self.longest]).tolist()
        self.longest = self.in_row
        return int(total), int(in_row), int(longest)
