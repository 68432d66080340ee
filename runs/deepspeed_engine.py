"""The engine on DeepSpeed: ZeRO shards the optimiser's state and the gradients across processes.

It has the interface of `Engine`, computes the same numbers, and reads and writes the same checkpoints: a run can
resume with or without it, at another stage, on another number of processes.
"""

import logging
import os
from types import ModuleType

import timm.optim
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from runs.engine import Engine
from utils import SettingError

# ZeRO shards flattened weights, so an optimiser must be element-wise. Others, such as LARS, LAMB, Adafactor or
# Muon, need whole tensors: they would run, but compute something else.
ELEMENTWISE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.SGD,
    timm.optim.Lion,
)


class DeepSpeedEngine(Engine):
    """A model with its optimiser under DeepSpeed, in one process or in many.

    Weights and gradients stay float32 and autocast computes in `amp`, as in `Engine`: what a model does in float32
    (AdaMAE's sampler) remains so, and a checkpoint holds the true weights. One process needs no launcher.

    Args:
        zero_stage: 0 shards nothing, 1 the optimiser's state, 2 the gradients too.
        settings: of `Engine`, all but `distributed`.

    Raises:
        SettingError: there is no such stage, ZeRO can't shard this optimiser, or DeepSpeed is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        zero_stage: int = 1,
        compress: bool = False,
        **settings,
    ):
        if zero_stage not in (0, 1, 2):
            raise SettingError(f"--zero_stage {zero_stage}: it is 0, 1 or 2")
        if zero_stage and not isinstance(optimizer, ELEMENTWISE):
            name = type(optimizer).__name__
            raise SettingError(f"--zero_stage {zero_stage} cannot shard {name}: use --zero_stage 0 or --opt adamw")
        deepspeed = import_deepspeed(device)
        super().__init__(model, optimizer, device=device, **settings)
        self.groups = [group["params"] for group in optimizer.param_groups]  # ZeRO replaces them by flat ones
        join_alone(device, deepspeed)
        self.forward_model, *_ = deepspeed.initialize(
            model=Autocast(model, device.type, self.amp), optimizer=optimizer, config=self._config(zero_stage, compress)
        )
        self.zero = self.forward_model.optimizer if zero_stage else None
        self.full_gradient = deepspeed.utils.safe_get_full_grad
        if self.scaler.is_enabled():
            self._scale_loss(deepspeed)

    def _config(self, zero_stage: int, compress: bool) -> dict:
        return {
            "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own reports of speed depend on it
            "gradient_accumulation_steps": self.update_freq,
            "gradient_clipping": self.clip_grad or 0.0,
            **({"communication_data_type": "bf16"} if compress else {}),
            "zero_optimization": {
                "stage": zero_stage,
                "reduce_bucket_size": 50_000_000,  # 200 MB
                "overlap_comm": True,  # with the backward pass; releases before the pinned one had races in it
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            "timers": {"throughput": {"enabled": False}},  # it would synchronise the device in every step
        }

    def _scale_loss(self, deepspeed: ModuleType) -> None:
        """Dynamic scaling of the loss for float16 autocast; DeepSpeed sets it up for float16 weights only."""
        if self.zero is None:
            self.forward_model.torch_autocast_z0_gradscaler = self.scaler
            return
        self.zero.loss_scaler = deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler(
            init_scale=self.scaler.get_scale(),
            scale_window=self.scaler.get_growth_interval(),
            min_scale=2.0**-14,
            delayed_shift=1,
            consecutive_hysteresis=False,
            raise_error_at_min_scale=False,
        )

    @property
    def loss_scale(self) -> Tensor:
        return super().loss_scale if self.zero is None else torch.full((), self.zero.loss_scale, device=self.device)

    def __call__(self, *inputs: Tensor, **named: Tensor):
        return self.forward_model(*inputs, **named)

    def backward(self, loss: Tensor) -> None:
        self.bad_steps.watch(loss)
        self.forward_model.backward(loss)

    def step(self) -> bool:
        """As `Engine.step`; DeepSpeed counts the batches too, and sees every one of them."""
        if not self._last_of_step():
            self.forward_model.step()
        return super().step()

    def _update(self) -> None:
        groups = {n: p for n, p in self.groups_to_watch.items() if n != "rest" or self.zero is None}
        scale = self.loss_scale
        norms = {name: self._norm(params, scale) for name, params in groups.items()}
        if self.zero is None:
            self.bad_steps.agree(self._judged(torch.stack(list(norms.values())).square().sum().sqrt(), scale))
        else:
            self.bad_steps.agree()
        self.forward_model.step()
        if self.zero is not None:  # it computes the whole norm anyway, and gathering all gradients is expensive
            total = torch.as_tensor(self.forward_model.get_global_grad_norm(), device=self.device)
            self.bad_steps.watch(self._judged(total, scale))  # the same on all processes; ZeRO has skipped the step
            squares = [norm.square() for norm in norms.values()]
            norms["rest"] = (total.square() - sum(squares)).clamp(min=0).sqrt()
        self.grad_norms = norms

    def _norm(self, params: list[nn.Parameter], scale: Tensor) -> Tensor:
        gradients = [self.full_gradient(p) for p in params]
        return get_total_norm([g for g in gradients if g is not None]) / scale

    def state_dict(self) -> dict:
        """As `Engine.state_dict`, with the optimiser's state gathered from all processes."""
        state = super().state_dict()
        # the weights are views of DeepSpeed's flat buffers, and saving a view saves the whole buffer
        state["model"] = {name: value.to("cpu", copy=True) for name, value in state["model"].items()}
        if self.zero is not None:
            state["optimizer"] = gather_optimizer_state(state["optimizer"], self.groups)
        if state["scaler"]:
            state["scaler"]["scale"] = self.loss_scale.item()
        return state

    def load_state_dict(self, state: dict) -> None:
        if self.zero is None:
            super().load_state_dict(state)
            return
        flat = [group["params"][0] for group in self.optimizer.param_groups]
        super().load_state_dict({**state, "optimizer": shard_optimizer_state(state["optimizer"], self.groups, flat)})
        self.zero.refresh_fp32_params()
        if state["scaler"]:
            self.zero.loss_scale = self.scaler.get_scale()


class Autocast(nn.Module):
    """A model that runs in autocast; DeepSpeed switches off an autocast around its own forward pass."""

    def __init__(self, model: nn.Module, device_type: str, dtype: torch.dtype | None):
        super().__init__()
        self.model, self.device_type, self.dtype = model, device_type, dtype

    def forward(self, *inputs: Tensor, **named: Tensor):
        with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.model(*inputs, **named)


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, set up for this device. It reads its environment on import, so not earlier."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # required even for a single process
    if device.type == "cuda":  # it takes them for the number of the device: always 0 where srun shows one GPU per task
        names = {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys()
        os.environ.update(dict.fromkeys(names, str(device.index or 0)))
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise SettingError(f"--enable_deepspeed: {error}; bash scripts/env.sh installs it") from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # A C++ op for inference, which DeepSpeed would otherwise compile in every process that runs on the CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join_alone(device: torch.device, deepspeed: ModuleType) -> None:
    """A process group of one, which DeepSpeed can't do without, unless there is a group already."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.utils.groups._WORLD_GROUP = None  # what an earlier run in this process may have left


def gather_optimizer_state(shard: dict, groups: list[list[nn.Parameter]]) -> dict:
    """This process's share of an optimiser's state -> the state dict of the optimiser without ZeRO.

    Every process must call it; the tensors are on the CPU of rank 0 and nowhere else.

    Args:
        shard: state dict of an optimiser whose groups have one parameter each, this process's flat piece.
        groups: the model's parameters in those groups.
    """
    state, described = {}, []
    for params, group in zip(groups, shard["param_groups"], strict=True):
        first = len(state)
        pieces = shard["state"].get(group["params"][0], {})  # empty before the first step
        for p in params:
            state[len(state)] = {
                key: _gather(piece, p) if piece.ndim else piece.to("cpu", copy=True)  # each its own step
                for key, piece in pieces.items()
            }
        described.append({**group, "params": list(range(first, len(state)))})
    return {"state": {i: entry for i, entry in state.items() if entry}, "param_groups": described}


def shard_optimizer_state(whole: dict, groups: list[list[nn.Parameter]], flat: list[Tensor]) -> dict:
    """The inverse of `gather_optimizer_state`: what of an optimiser's state belongs to this process.

    Args:
        flat: this process's piece of each group.

    Raises:
        SettingError: the state is that of other groups.
    """
    sizes = [len(group["params"]) for group in whole["param_groups"]]
    if sizes != [len(params) for params in groups]:
        raise SettingError(
            f"the checkpoint's optimiser has groups of {sizes} parameters, this run's has groups of "
            f"{[len(params) for params in groups]}: use the same flags, or start without its optimiser"
        )
    state, described = {}, []
    for i, (params, piece, group) in enumerate(zip(groups, flat, whole["param_groups"], strict=True)):
        entries = [whole["state"].get(index, {}) for index in group["params"]]
        state[i] = {
            key: _shard([entry[key] for entry in entries], params, piece) if value.ndim else value
            for key, value in entries[0].items()
        }
        described.append({**group, "params": [i]})
    return {"state": {i: entry for i, entry in state.items() if entry}, "param_groups": described}


def _gather(piece: Tensor, p: nn.Parameter) -> Tensor | None:
    whole = piece.new_zeros(p.numel())
    of_param, of_piece = _overlap(p)
    whole[of_param] = piece[of_piece]
    dist.all_reduce(whole)
    return whole.view_as(p).cpu() if dist.get_rank() == 0 else None


def _shard(values: list[Tensor], params: list[nn.Parameter], like: Tensor) -> Tensor:
    piece = torch.zeros_like(like, requires_grad=False)
    for value, p in zip(values, params, strict=True):
        of_param, of_piece = _overlap(p)
        piece[of_piece] = value.flatten()[of_param].to(piece)
    return piece


def _overlap(p: nn.Parameter) -> tuple[slice, slice]:
    """Where a parameter and this process's piece of its group overlap: in the parameter and in the piece."""
    if p._hp_mapping is None:
        return slice(0), slice(0)
    addresses = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
    return tuple(slice(a.start, a.start + a.numel) for a in addresses)
