"""--compile: each kind of block is compiled once, evaluation not at all, and the numbers stay the same."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from modeling_finetune import create_classifier
from modeling_pretrain import create_pretrain_model
from optim import create_optimizer
from runs.engine import Engine
from utils import seed_all


@pytest.fixture
def graphs(monkeypatch):
    """Counts the compiled graphs; they run as they are, for compiling them would take a minute."""
    torch._dynamo.reset()
    counter, plain = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend=counter))
    yield counter
    torch._dynamo.reset()


def classifier():
    return create_classifier("vit_tiny_patch8_64", input_size=32, num_classes=3, drop_path=0.2, init_scale=1.0)


def reconstructor():
    return create_pretrain_model("pretrain_videomae_tiny_patch8_64", input_size=32, decoder_depth=3, mask_ratio=0.8)


def train(build, compiled: bool) -> tuple[Engine, list[float]]:
    seed_all(0)
    model = build()
    optimizer = create_optimizer(model, lr=1e-3, weight_decay=0.05)
    engine = Engine(model, optimizer, device=torch.device("cpu"), compile_model=compiled, ema_decay=0.9)
    losses = []
    for step in range(3):
        seed_all(1, step)
        out = engine(torch.randn(3, 3, 16, 32, 32))
        loss = out.square().mean() if torch.is_tensor(out) else out.prediction.square().mean() - out.log_probs.mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return engine, losses


# encoder, decoder and sampler; each rate of stochastic depth
@pytest.mark.parametrize(("build", "kinds"), [(reconstructor, 3), (classifier, 4)])
def test_each_kind_of_block_is_compiled_once_and_computes_the_same(build, kinds, graphs):
    _, expected = train(build, compiled=False)
    engine, losses = train(build, compiled=True)
    assert losses == expected
    assert graphs.frame_count == kinds
    assert not any("_orig_mod" in name for name in engine.state_dict()["model"])


def test_evaluation_compiles_nothing(graphs):
    engine, _ = train(classifier, compiled=True)
    before = graphs.frame_count
    clip = torch.randn(1, 3, 16, 32, 32)  # an odd last batch
    plain = classifier().eval()
    for ema in (False, True):
        plain.load_state_dict(engine.state_dict()["model_ema" if ema else "model"])
        torch.testing.assert_close(engine.evaluate(clip, ema=ema), plain(clip), rtol=0, atol=0)
    assert graphs.frame_count == before
