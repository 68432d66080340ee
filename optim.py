"""Everything between the loss and the next forward pass.

Parameter groups, schedule, precision, gradient accumulation, clipping and the distributed wrapper, behind
three verbs: `engine(x)`, `engine.backward(loss)`, `engine.step()`.
"""

import math

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def create_optimizer(
    model: nn.Module,
    *,
    opt: str = "adamw",
    lr: float,
    weight_decay: float,
    eps: float | None = 1e-8,
    betas: tuple[float, float] | None = None,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Any optimiser that timm knows by name, in two groups: with and without weight decay.

    Not decayed are one-dimensional parameters, biases, and the names in the model's `no_weight_decay()`.
    AdamW runs fused: one kernel for all parameters, and no host synchronisation in mixed precision.

    Raises:
        ValueError: timm knows no optimiser of that name.
    """
    if opt.lower() not in list_optimizers():
        raise ValueError(f"--opt {opt}: timm has no such optimiser; try adamw, sgd, lamb, lars or lion")
    settings: dict = {"eps": eps} if eps is not None else {}
    if betas is not None:
        settings["betas"] = tuple(betas)
    if opt.lower() in ("adam", "adamw"):
        settings["fused"] = True
    return create_optimizer_v2(
        model, opt=opt, lr=lr, weight_decay=weight_decay, momentum=momentum, **settings
    )


def cosine_schedule(
    step: int, *, start: float = 0.0, peak: float, final: float, total_steps: int, warmup_steps: int = 0
) -> float:
    """The value at optimiser step `step` (from 0): linear warm-up from `start`, then half a cosine.

    The warm-up reaches `peak` at its last step. Past `total_steps` the value stays where the cosine ends.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / max(1, warmup_steps - 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))


def resolve_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision, or None for float32.

    "auto" takes bfloat16 where the device computes in it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX),
    float16 on older CUDA devices, and float32 elsewhere.
    """
    if amp == "auto":
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        else:
            amp = "bf16" if torch.cpu._is_avx512_bf16_supported() else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


class Engine:
    """A model with its optimiser, in one process or in many (DDP), in float32 or mixed precision.

    Args:
        amp: type of autocast, or None. float16 scales the loss; the scaler is a no-op otherwise.
        update_freq: batches whose gradients are averaged into one optimiser step.
        clip_grad: largest norm of the gradient, or None.
        watch: parameters whose gradient norm is told apart from that of the rest, by name.
        compile_model: run the forward pass through `torch.compile`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        distributed: bool = False,
        amp: torch.dtype | None = None,
        update_freq: int = 1,
        clip_grad: float | None = None,
        watch: dict[str, list[nn.Parameter]] | None = None,
        compile_model: bool = False,
    ):
        self.module, self.optimizer, self.device = model, optimizer, device
        self.amp, self.update_freq, self.clip_grad = amp, update_freq, clip_grad
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.groups_to_watch = _watched(model, watch or {})
        self.grad_norms: dict[str, Tensor] = {}
        self.batches = 0
        if compile_model:
            model.compile()
        self.forward_model = model
        if distributed:
            ids = [device.index] if device.type == "cuda" else None
            self.forward_model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        for group in optimizer.param_groups:
            group.setdefault("lr_scale", 1.0)

    def __call__(self, *inputs: Tensor):
        if isinstance(self.forward_model, DistributedDataParallel):
            self.forward_model.require_backward_grad_sync = self._last_of_step()
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            return self.forward_model(*inputs)

    def set_schedule(self, lr: float, weight_decay: float | None = None) -> None:
        """Sets the learning rate (times each group's lr_scale), and the weight decay where there is any."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if weight_decay is not None and group["weight_decay"] > 0:
                group["weight_decay"] = weight_decay

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.update_freq).backward()

    def _last_of_step(self) -> bool:
        return (self.batches + 1) % self.update_freq == 0

    def step(self) -> bool:
        """Updates the weights after every `update_freq` batches; tells whether it did."""
        is_last = self._last_of_step()
        self.batches += 1
        if not is_last:
            return False
        self.scaler.unscale_(self.optimizer)
        self.grad_norms = {
            name: get_total_norm([p.grad for p in params if p.grad is not None])
            for name, params in self.groups_to_watch.items()
        }
        if self.clip_grad:
            norm = torch.stack(list(self.grad_norms.values())).square().sum().sqrt()
            clip_grads_with_norm_(self.module.parameters(), self.clip_grad, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def state_dict(self) -> dict:
        """Weights, optimiser and scaler, under the published checkpoints' keys."""
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def _watched(model: nn.Module, watch: dict[str, list[nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """The watched groups that are not empty, and `rest` for all other trained parameters."""
    named = {name: params for name, params in watch.items() if params}
    taken = {id(p) for params in named.values() for p in params}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return {**named, "rest": rest}
