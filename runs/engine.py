"""Everything between the loss and the next forward pass, behind `engine(x)`, `engine.backward(loss)`, `engine.step()`.

Precision, gradient accumulation, clipping, the moving average of the weights and the distributed wrapper.
"""

import gc

import torch
from timm.models.beit import Block
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from optim import BadSteps
from runs.host_average import HostAverage
from runs.running_statistics import RunningStatistics
from utils import SettingError


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
        compress: sum the gradients of the processes in bfloat16, which halves what they send.
        watch: parameters whose gradient norm is computed apart from that of the rest, by name.
        compile_model: compile the transformer blocks, each kind of block and shape once (`torch.compile`).
        ema_decay: keep a moving average of weights and buffers with this decay per step, or None.
        ema_force_cpu: keep it in the host's memory, and a copy on the device while it is evaluated.

    After each step `grad_norms` holds the norms before clipping, by the names of `watch` and "rest". A step
    with a non-finite loss or gradient on any process is skipped on all of them; `bad_steps` counts these, but
    not the overflows by which float16 finds its scale.
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
        compress: bool = False,
        watch: dict[str, list[nn.Parameter]] | None = None,
        compile_model: bool = False,
        ema_decay: float | None = None,
        ema_force_cpu: bool = False,
    ):
        self.module, self.optimizer, self.device = model, optimizer, device
        self.amp, self.update_freq, self.clip_grad = amp, update_freq, clip_grad
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.groups_to_watch = _watched(model, watch or {})
        self.grad_norms: dict[str, Tensor] = {}
        self.batches = 0
        self.ema = None
        if ema_decay is not None:
            self.ema = (HostAverage if ema_force_cpu else ModelEmaV3)(model, decay=ema_decay)
        if compile_model:
            compile_blocks(model)
        self.forward_model = model
        if distributed:
            ids = [device.index] if device.type == "cuda" else None
            self.forward_model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
            self.forward_model.broadcast_buffers = False  # they are constant tables, or see RunningStatistics
            if compress:
                self.forward_model.register_comm_hook(None, bf16_compress_hook)
        self.bad_steps = BadSteps(optimizer, device)
        self.running_statistics = RunningStatistics(model)
        for group in optimizer.param_groups:
            group.setdefault("lr_scale", 1.0)

    def __call__(self, *inputs: Tensor, **named: Tensor):
        if isinstance(self.forward_model, DistributedDataParallel):
            self.forward_model.require_backward_grad_sync = self._last_of_step()
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            return self.forward_model(*inputs, **named)

    @torch.no_grad()
    def evaluate(self, *inputs: Tensor, ema: bool = False) -> Tensor:
        """The forward pass in evaluation mode, of the weights or of their moving average.

        It puts that model into evaluation mode. It communicates with no other process, so ranks may call it
        unequally often.
        """
        model = self.module
        if ema:
            model = self.ema.on_device() if isinstance(self.ema, HostAverage) else self.ema.module
        model.eval()
        eager = torch.compiler.set_stance("force_eager")  # else evaluation, or its last batch, compiles once more
        with eager, torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            return model(*inputs)

    def end_validation(self) -> None:
        """Frees the copy that `evaluate` keeps on the device of an average in the host's memory."""
        if isinstance(self.ema, HostAverage):
            self.ema.copied = None

    def set_schedule(self, lr: float, weight_decay: float | None = None) -> None:
        """Sets the learning rate (times each group's lr_scale), and the weight decay where any follows the schedule."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if weight_decay is not None and group["weight_decay"] > 0 and not group.get("constant_decay"):
                group["weight_decay"] = weight_decay

    def backward(self, loss: Tensor) -> None:
        self.bad_steps.watch(loss)
        loss = loss * (1 + 0 * loss.detach())  # if not finite, all gradients become NaN: float16's scaler notices
        self.scaler.scale(loss / self.update_freq).backward()

    def _last_of_step(self) -> bool:
        return (self.batches + 1) % self.update_freq == 0

    def step(self) -> bool:
        """Updates the weights after every `update_freq` batches; returns whether it did."""
        is_last = self._last_of_step()
        self.batches += 1
        if is_last:
            self._update()
            self.bad_steps.count()
            self.running_statistics.agree(self.bad_steps.last)
            if self.ema is not None:
                self.ema.update(self.module)
        return is_last

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        self.grad_norms = {
            name: get_total_norm([p.grad for p in params if p.grad is not None])
            for name, params in self.groups_to_watch.items()
        }
        norm = torch.stack(list(self.grad_norms.values())).square().sum().sqrt()
        if self.clip_grad:
            clip_grads_with_norm_(self.module.parameters(), self.clip_grad, norm)
        self.bad_steps.agree(self._judged(norm, self.loss_scale))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def loss_scale(self) -> Tensor:
        """Of float16, on the device; 1 in other precisions."""
        return self.scaler.scale(torch.ones((), device=self.device))  # unlike get_scale(), this waits for nothing

    def _judged(self, norm: Tensor, scale: Tensor) -> Tensor:
        """The gradient norm, or 0 where a non-finite one is ordinary: float16 overflows now and then.

        Each overflow halves the scale, so below 1 it is not the scale that makes them.
        """
        return torch.where(scale < 1, norm, 0.0) if self.scaler.is_enabled() else norm

    def close(self) -> None:
        """Drops the distributed wrapper; to be called before the process group is destroyed.

        Otherwise the wrapper holds the last reference to the group, and the destructor of gloo's group, which
        runs with the GIL held, can wait forever for a thread that needs the GIL.
        """
        self.forward_model = self.module
        gc.collect()  # DistributedDataParallel is part of reference cycles

    def state_dict(self) -> dict:
        """Weights, optimiser, scaler and moving average, under the keys of the published checkpoints.

        Every process must call it; what rank 0 gets is complete.
        """
        state = {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.ema is not None:
            state["model_ema"] = self.ema.module.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Loads a state of this engine or the other one.

        A missing moving average starts from the state's weights; a missing loss scale (the state was made in
        another precision) starts afresh.

        Raises:
            SettingError: the state is of another optimiser.
        """
        was, now = state.get("optimizer_name"), type(self.optimizer).__name__
        if was not in (None, now):
            raise SettingError(f"it was made with the optimiser {was}, --opt {now.lower()} is another")
        self.module.load_state_dict(state["model"])
        self.running_statistics.keep()
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, ours in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(ours)  # this run's betas and so on, not those of the run before
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state.get("model_ema", state["model"]))


def compile_blocks(model: nn.Module) -> None:
    """Compiles each transformer block by itself: seconds instead of minutes, and no trouble with what is around them.

    Blocks share the compiled code where they have the same widths and rates of stochastic depth.
    """
    torch._dynamo.config.recompile_limit = 128  # by default 8; a ViT-H has 32 rates
    for block in model.modules():
        if isinstance(block, Block):
            block.compile()


def _watched(model: nn.Module, watch: dict[str, list[nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """The watched groups that are not empty, and `rest` for all other trained parameters."""
    named = {name: params for name, params in watch.items() if params}
    taken = {id(p) for params in named.values() for p in params}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return {**named, "rest": rest}
