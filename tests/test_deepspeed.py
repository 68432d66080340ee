"""The engine on DeepSpeed computes what the native engine computes, and reads and writes its checkpoints."""

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import cross_entropy

from modeling_finetune import Size, VisionTransformer
from modeling_pretrain import PretrainVisionTransformer
from optim import create_optimizer
from probes import make_probe
from runs.checkpoints import read_checkpoint, save_checkpoint
from runs.deepspeed_engine import DeepSpeedEngine, import_deepspeed
from runs.engine import Engine
from utils import seed_all

CPU = torch.device("cpu")
SIZE = Size(dim=24, depth=2, heads=2, decoder_dim=16, decoder_heads=2)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (bash scripts/env.sh installs it)"
)
every_stage = pytest.mark.parametrize("stage", [0, 1, 2])


@pytest.fixture(autouse=True)
def leave_process_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def classifier() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(size=SIZE, patch=4, window=(2, 2, 2), num_classes=3, init_scale=1.0)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (12,3,4,8,8) and labels (12,)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, 4, 8, 8, generator=generator), torch.arange(12) % 3


def make_engine(stage: int | None, model: nn.Module | None = None, **settings) -> Engine:
    """An engine on DeepSpeed, or the native one for stage None; no setting is the optimiser's default."""
    model = model or classifier()
    optimizer = create_optimizer(model, lr=0.0, weight_decay=0.1, layer_decay=0.7, betas=(0.8, 0.9), eps=1e-4)
    settings = {"device": CPU, "clip_grad": 0.5, **settings}
    if stage is None:
        return Engine(model, optimizer, **settings)
    return DeepSpeedEngine(model, optimizer, zero_stage=stage, **settings)


def train(engine: Engine, steps: int, *, first: int = 0, rank: int = 0, ranks: int = 1) -> None:
    """Some optimiser steps; a process among several sees its part of each batch."""
    clips, labels = (part.chunk(ranks)[rank] for part in batch())
    for step in range(first, first + steps):
        engine.set_schedule(0.02 / (step + 1), 0.1 + 0.05 * step)
        parts = zip(clips.chunk(engine.update_freq), labels.chunk(engine.update_freq), strict=True)
        for x, y in parts:
            engine.backward(cross_entropy(engine(x).float(), y))
            stepped = engine.step()
        assert stepped


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Equal to float32 rounding; the weights are of order 0.1 and moved by about 0.05."""
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@every_stage
@pytest.mark.parametrize("update_freq", [1, 2])
def test_five_steps_equal_five_native_steps(stage, update_freq):
    start, native = classifier(), make_engine(None, update_freq=update_freq)
    engine = make_engine(stage, update_freq=update_freq)
    train(native, 5)
    train(engine, 5)
    assert_same_weights(engine.module, native.module)
    assert max((a - b).abs().max() for a, b in zip(start.parameters(), engine.module.parameters())) > 0.02
    torch.testing.assert_close(engine.grad_norms, native.grad_norms, rtol=1e-4, atol=0)
    assert engine.grad_norms["rest"] > engine.clip_grad


@every_stage
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_in_mixed_precision_equals_a_native_step(stage, amp):
    """One step: from the second on, 16 bits make much of a difference in the last of 32."""
    native, engine = make_engine(None, amp=amp), make_engine(stage, amp=amp)
    assert engine(batch()[0]).dtype == amp
    train(native, 1)
    train(engine, 1)
    assert_same_weights(engine.module, native.module)


@every_stage
def test_an_overflow_skips_the_step_and_halves_the_scale(stage):
    engine = make_engine(stage, amp=torch.float16)
    train(engine, 1)
    scale, weights = engine.loss_scale, copy.deepcopy(engine.module.state_dict())
    engine.backward(engine(batch()[0]).sum() * 1e30)
    engine.step()
    assert engine.loss_scale == scale / 2
    torch.testing.assert_close(dict(engine.module.state_dict()), dict(weights), rtol=0, atol=0)
    train(engine, 1)
    assert not torch.equal(engine.module.head.weight, weights["head.weight"])


@every_stage
@pytest.mark.parametrize(("amp", "ordinary"), [(torch.float16, 17), (None, 0)], ids=["float16", "float32"])
def test_gradients_that_stay_infinite_count_once_the_scale_is_not_to_blame(stage, amp, ordinary):
    engine, counted = make_engine(stage, amp=amp), []
    for _ in range(ordinary + 3):
        engine.backward(engine(batch()[0]).mul(0).square().sum().sqrt())  # 0, with an infinite slope
        engine.step()
        counted.append(engine.bad_steps.read()[1])
    assert counted == [0] * ordinary + [1, 2, 3]
    train(engine, 1)
    assert engine.bad_steps.read() == (3, 0, 3)


@pytest.mark.parametrize(("before", "after"), [(0, None), (1, None), (2, None), (None, 1), (None, 2), (1, 2), (2, 0)])
def test_a_checkpoint_goes_on_under_another_engine(before, after, tmp_path):
    settings = {"ema_decay": 0.7}
    straight, first = make_engine(None, **settings), make_engine(before, **settings)
    train(straight, 5)
    train(first, 3)
    save_checkpoint(tmp_path / "checkpoint-2.pth", first.state_dict())
    second = make_engine(after, **settings)
    second.load_state_dict(read_checkpoint(tmp_path / "checkpoint-2.pth"))
    train(second, 2, first=3)
    assert_same_weights(second.module, straight.module)
    assert_same_weights(second.ema.module, straight.ema.module)


@pytest.mark.parametrize("stage", [1, 2])
def test_state_of_zero_is_that_of_the_plain_optimiser(stage):
    native, engine = make_engine(None), make_engine(stage)
    assert engine.state_dict()["optimizer"] == native.state_dict()["optimizer"]  # no step taken
    train(native, 2)
    train(engine, 2)
    ours, theirs = engine.state_dict(), native.state_dict()
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    assert list(ours["model"]) == list(theirs["model"])
    torch.testing.assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], rtol=1e-4, atol=1e-8)
    for tensor in ours["model"].values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view of a larger buffer


def test_a_state_of_other_groups_is_refused():
    model = classifier()
    state = Engine(model, create_optimizer(model, lr=0.1, weight_decay=0.1), device=CPU).state_dict()
    with pytest.raises(ValueError, match="groups of"):
        make_engine(1).load_state_dict(state)


@every_stage
def test_the_scale_of_the_loss_is_resumed(stage):
    engine = make_engine(stage, amp=torch.float16)
    engine.backward(engine(batch()[0]).sum() * 1e30)
    engine.step()
    for other in (None, 0, 1):
        resumed = make_engine(other, amp=torch.float16)
        resumed.load_state_dict(engine.state_dict())
        assert resumed.state_dict()["scaler"]["scale"] == engine.loss_scale == 2.0**15


def test_average_and_evaluation_are_those_of_the_native_engine():
    native, engine = make_engine(None, ema_decay=0.5), make_engine(1, ema_decay=0.5, ema_force_cpu=True)
    train(native, 2)
    train(engine, 2)
    for ema in (False, True):
        torch.testing.assert_close(engine.evaluate(batch()[0], ema=ema), native.evaluate(batch()[0], ema=ema))


@every_stage
def test_pretraining_runs_with_its_float32_sampler(stage):
    def weights_and_norms(stage):
        torch.manual_seed(0)
        model = PretrainVisionTransformer(
            size=SIZE, patch=4, window=(2, 4, 4), target_width=96, mask_ratio=0.75, checkpoint_activations=True
        )
        sampler = model.sampler_parameters()
        optimizer = create_optimizer(model, lr=0.01, weight_decay=0.05, eps=1e-4)
        settings = {"device": CPU, "amp": torch.bfloat16, "watch": {"sampler": sampler}}
        engine = (
            Engine(model, optimizer, **settings)
            if stage is None
            else DeepSpeedEngine(model, optimizer, zero_stage=stage, **settings)
        )
        clips = torch.randn(2, 3, 4, 16, 16)
        for step in range(3):
            seed_all(step)
            output = engine(clips)
            engine.backward(output.prediction.float().square().mean() + output.log_probs.square().mean())
            engine.step()
        return model, engine.grad_norms

    (ours, our_norms), (theirs, their_norms) = weights_and_norms(stage), weights_and_norms(None)
    assert_same_weights(ours, theirs)
    assert set(our_norms) == {"sampler", "rest"}
    torch.testing.assert_close(our_norms, their_norms, rtol=1e-3, atol=0)


def test_a_frozen_encoder_stays_as_it_is():
    probe = make_probe(classifier(), kind="linear", batch_norm=True)
    before = copy.deepcopy(probe.state_dict())
    optimizer = create_optimizer(probe, opt="sgd", lr=0.1, weight_decay=0.0)
    engine = DeepSpeedEngine(probe, optimizer, device=CPU, zero_stage=2)
    train(engine, 2)
    after = engine.state_dict()["model"]
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


@pytest.mark.parametrize("others", [(), ("OMPI_COMM_WORLD_LOCAL_RANK",)], ids=["torchrun, srun", "Open MPI"])
def test_deepspeed_takes_the_device_of_the_run(monkeypatch, others):
    """Where srun shows each task its own GPU only, the fourth task of a machine is on cuda:0."""
    names = ("LOCAL_RANK", *others)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in names:
        monkeypatch.setenv(name, "3")
    import_deepspeed(torch.device("cuda", 0))
    assert {os.environ[name] for name in names} == {"0"}
    assert others or "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ
    monkeypatch.setenv("LOCAL_RANK", "3")
    import_deepspeed(CPU)
    assert os.environ["LOCAL_RANK"] == "3"


def test_what_zero_cannot_do_is_said():
    model = classifier()
    lars = create_optimizer(model, opt="lars", lr=0.1, weight_decay=0.0)
    with pytest.raises(ValueError, match="--zero_stage 1 cannot shard Lars: use --zero_stage 0"):
        DeepSpeedEngine(model, lars, device=CPU, zero_stage=1)
    with pytest.raises(ValueError, match="--zero_stage 3: it is 0, 1 or 2"):
        make_engine(3)


def one_of_two(rank: int, folder: Path) -> None:
    """A process of two: trains under each stage, and goes on from the state of the stage before."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    state, steps = None, 0
    for stage in (0, 1, 2):
        engine = make_engine(stage, ema_decay=0.5)
        if state is not None:
            engine.load_state_dict(read_checkpoint(folder / f"{stage - 1}.pth"))
        train(engine, 2, first=steps, rank=rank, ranks=2)
        state, steps = engine.state_dict(), steps + 2
        if rank == 0:
            save_checkpoint(folder / f"{stage}.pth", state)
        dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one_and_their_checkpoints_are_whole(tmp_path):
    mp.spawn(one_of_two, (tmp_path,), nprocs=2)
    straight = make_engine(None, ema_decay=0.5)
    for stage in (0, 1, 2):
        train(straight, 2, first=2 * stage)
        resumed = make_engine(None, ema_decay=0.5)
        resumed.load_state_dict(read_checkpoint(tmp_path / f"{stage}.pth"))
        assert_same_weights(resumed.module, straight.module)
        assert_same_weights(resumed.ema.module, straight.ema.module)
    train(straight, 2, first=6)
    train(resumed, 2, first=6)
    assert_same_weights(resumed.module, straight.module)
