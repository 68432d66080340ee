"""Probes that are trained together: each as if alone, the best is kept, and the published head."""

import copy
import json
import signal

import pytest
import torch
from programs import Done, start
from transformers import VJEPA2Config
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2AttentivePooler
from videos import write_list, write_videos

from engine_for_finetuning import soft_cross_entropy
from modeling_finetune import create_classifier
from modeling_pretrain import create_pretrain_model
from optim import create_optimizer
from probes import attentive_pool, make_probe
from run_class_finetuning import main
from runs.engine import Engine
from runs.signals import SAVED
from tools.predict import main as predict
from utils import SettingError

CPU = torch.device("cpu")
TINY = {"name": "vit_tiny_patch8_64", "num_classes": 3, "num_frames": 4, "input_size": 16}
GRID = [(2e-3, 0.3), (1e-3, 0.0), (3e-4, 0.8)]
KINDS = [{"kind": "linear", "batch_norm": True}, {"kind": "attentive", "blocks": 4}, {"kind": "attentive"}]


def trained(probe, *, opt="adamw", lr=1e-3, weight_decay=0.05, steps=3) -> Engine:
    """A probe or grid after some steps of a falling rate and a changing decay, on two batches a step."""
    optimizer = create_optimizer(probe, opt=opt, lr=lr, weight_decay=weight_decay, layer_decay=0.75)
    engine = Engine(probe, optimizer, device=CPU, update_freq=2)
    probe.train()
    for batch in range(2 * steps):
        generator = torch.Generator().manual_seed(batch)
        clips = torch.randn(6, 3, 4, 16, 16, generator=generator)
        targets = torch.eye(3)[torch.randint(3, (6,), generator=generator)]
        engine.set_schedule(lr * (1 - 0.1 * (batch // 2)), weight_decay)
        engine.backward(soft_cross_entropy(engine(clips), targets).sum())
        engine.step()
    return engine


def probe_of(grid=(), **settings):
    torch.manual_seed(0)
    return make_probe(create_classifier(**TINY), grid=grid, **settings)


# --- together as alone ---


@pytest.mark.parametrize(("settings", "opt"), [*((kind, "adamw") for kind in KINDS), (KINDS[0], "lars")])
def test_probes_trained_together_are_those_trained_alone(settings, opt):
    grid = trained(probe_of(GRID, **settings), opt=opt).module
    for name, (lr, decay) in zip(grid.names, GRID, strict=True):
        alone = trained(probe_of(**settings), opt=opt, lr=lr, weight_decay=decay).module.state_dict()
        ours = grid.select(grid.state_dict(), name)
        assert ours.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_rates_and_decays_make_the_probes_differ():
    grid = trained(probe_of(GRID, **KINDS[1])).module
    heads = [probe.head.weight for probe in grid.probes]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])


def test_a_grid_encodes_once_and_gives_the_logits_of_each_of_its_probes():
    grid = trained(probe_of(GRID, **KINDS[1])).module.eval()
    calls, encode = [], grid.encoder.forward_tokens
    grid.encoder.forward_tokens = lambda clip: calls.append(1) or encode(clip)
    clips = torch.randn(2, 3, 4, 16, 16)
    logits = grid(clips)
    assert len(calls) == 1 and logits.shape == (3, 2, 3)
    for name, expected in zip(grid.names, logits, strict=True):
        assert torch.equal(grid.probe(name).eval()(clips), expected)


@pytest.mark.parametrize("settings", KINDS)
def test_a_probe_that_diverges_leaves_the_others_as_they_would_be(settings):
    broken = probe_of(GRID, **settings)
    with torch.no_grad():
        broken.probes[1].head.weight[0, 0] = float("nan")
    others, whole = trained(broken).module, trained(probe_of(GRID, **settings)).module
    for k in (0, 2):
        for ours, theirs in zip(others.probes[k].parameters(), whole.probes[k].parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_step_is_skipped_where_no_probe_is_finite():
    grid = probe_of(GRID, kind="linear")
    engine = trained(grid, steps=1)
    before = copy.deepcopy(grid.state_dict())
    clips = torch.full((2, 3, 4, 16, 16), float("inf"))
    for _ in range(2):
        engine.backward(soft_cross_entropy(engine(clips), torch.eye(3)[:2]).sum())
        engine.step()
    assert engine.bad_steps.read() == (1, 1, 1)
    assert all(torch.equal(value, before[key]) for key, value in grid.state_dict().items())


def test_an_optimiser_that_couples_the_probes_is_refused():
    with pytest.raises(SettingError, match="--opt lamb clips the gradients of all probes together"):
        trained(probe_of(GRID, kind="linear"), opt="lamb")


# --- the published head ---


def test_four_blocks_are_the_pooler_of_vjepa_2():
    """transformers' pooler, whose weights are put under our names, gives the same."""
    torch.manual_seed(0)
    config = VJEPA2Config(hidden_size=64, num_attention_heads=16, num_pooler_layers=3, mlp_ratio=4, layer_norm_eps=1e-6)
    theirs, ours = VJEPA2AttentivePooler(config).eval(), attentive_pool(dim=64, heads=16, blocks=4).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = {}
    for k, layer in enumerate(theirs.self_attention_layers):
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        attention.k_proj.bias.data.zero_()  # softmax cancels it
        parts = {"norm1": layer.layer_norm1, "norm2": layer.layer_norm2, "attn.proj": attention.out_proj}
        parts |= {"mlp.fc1": layer.mlp.fc1, "mlp.fc2": layer.mlp.fc2}
        state |= {f"{k}.{n}.{kind}": v for n, part in parts.items() for kind, v in part.state_dict().items()}
        state[f"{k}.attn.qkv.weight"] = torch.cat([p.weight for p in projections])
        state[f"{k}.attn.q_bias"], state[f"{k}.attn.v_bias"] = attention.q_proj.bias, attention.v_proj.bias
    last = theirs.cross_attention_layer
    query, key, value = last.cross_attn.q_proj, last.cross_attn.k_proj, last.cross_attn.v_proj
    parts = {"3": last.layer_norm1, "4.q": query, "4.norm": last.layer_norm2}
    parts |= {"4.mlp.fc1": last.mlp.fc1, "4.mlp.fc2": last.mlp.fc2}
    state |= {f"{n}.{kind}": v for n, part in parts.items() for kind, v in part.state_dict().items()}
    state["4.kv.weight"] = torch.cat([key.weight, value.weight])
    state["4.kv.bias"] = torch.cat([key.bias, value.bias])
    state["4.latent"] = theirs.query_tokens
    state["4.proj.weight"], state["4.proj.bias"] = torch.eye(64), theirs.query_tokens[0, 0]
    ours.load_state_dict(state, strict=False)
    assert state.keys() | {n for n in ours.state_dict() if "k_bias" in n} == ours.state_dict().keys()
    tokens = torch.randn(2, 10, 64)
    torch.testing.assert_close(ours(tokens), theirs(tokens))


def test_sixteen_heads_where_there_are_several_blocks():
    assert probe_of(kind="attentive").pool[-1].num_heads == 4
    pool = probe_of(kind="attentive", blocks=4).pool
    assert [block.attn.heads for block in pool[:3]] == [16] * 3 and pool[-1].num_heads == 16


# --- the program ---

RUN = [
    *("--model", "vit_tiny_patch8_64", "--input_size", "16", "--num_frames", "4", "--data_set", "custom"),
    *("--nb_classes", "3", "--batch_size", "2", "--epochs", "2", "--warmup_epochs", "0", "--min_lr", "0"),
    *("--sampling_rate", "1", "--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder", "pyav"),
    *("--num_sample", "1", "--save_ckpt_freq", "1", "--test_num_segment", "1", "--test_num_crop", "1"),
    *(
        "--layer_decay",
        "1",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--aa",
        "none",
        "--attentive_probe",
        "--probe_blocks",
        "2",
    ),
]
GRID_FLAGS = ["--probe_lrs", "1", "0.1", "--probe_weight_decays", "0.1", "0.3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    names = write_videos(folder, 6 * [6], size=(24, 24))
    for split in ("train", "val", "test"):
        write_list(folder / f"{split}.csv", *(f"{name} {i % 3}" for i, name in enumerate(names)))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint-799.pth"
    torch.manual_seed(0)
    model = create_pretrain_model("pretrain_videomae_tiny_patch8_64", input_size=16, num_frames=4, mask_ratio=0.5)
    torch.save({"model": model.state_dict()}, path)
    return path


def run(data, output, encoder, *flags) -> Done:
    return start(main, *RUN, "--data_path", data, "--output_dir", output, "--finetune", encoder, *flags)


@pytest.fixture(scope="module")
def straight(data, encoder, tmp_path_factory):
    output = tmp_path_factory.mktemp("grid")
    done = run(data, output, encoder, *GRID_FLAGS, "--model_ema", "--model_ema_decay", "0.5")
    assert done.returncode == 0, done.stderr
    return output, done


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def test_the_best_probe_is_kept_tested_and_named(straight, data, encoder, tmp_path):
    output, done = straight
    entries = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    names = [f"lr {lr}, weight decay {decay}" for lr in ("1", "0.1") for decay in ("0.1", "0.3")]
    assert list(entries[0]["validation"]) == [f"{source} {name}" for source in ("model", "ema") for name in names]
    best = load(output / "checkpoint-best.pth")
    results = {(e["epoch"], name): v["top1"] for e in entries for name, v in e["validation"].items()}
    assert best["best"]["top1"] == max(results.values()) == results[best["best"]["epoch"], best["best"]["source"]]
    which, _, name = best["best"]["source"].partition(" ")
    lr, decay = best["model_settings"]["probe"]["lr"], best["model_settings"]["probe"]["weight_decay"]
    assert name == f"lr {lr:g}, weight decay {decay:g}" and "grid" not in best["model_settings"]["probe"]
    whole = load(output / f"checkpoint-{best['best']['epoch']}.pth")
    weights, number = whole["model_ema" if which == "ema" else "model"], names.index(name)
    assert torch.equal(best["model"]["head.weight"], weights[f"probes.{number}.head.weight"])
    tested = json.loads((output / "test.json").read_text())
    assert tested["tested"] == f"{output / 'checkpoint-best.pth'} ({name})" and "4 probes" in done.stdout
    again = run(data, tmp_path, output / "checkpoint-best.pth", "--eval", *GRID_FLAGS)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "scores.npz").read_bytes() == (output / "scores.npz").read_bytes()


def test_a_grid_in_the_program_trains_the_probe_that_a_single_run_does(straight, data, encoder, tmp_path):
    output, _ = straight
    done = run(data, tmp_path, encoder, "--lr", "0.1", "--weight_decay", "0.3")
    assert done.returncode == 0, done.stderr
    ours, theirs = (load(folder / "checkpoint-1.pth")["model"] for folder in (output, tmp_path))
    for name, value in theirs.items():
        found = ours[name if name.startswith("encoder.") else f"probes.3.{name}"]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def test_a_grid_resumes_exactly(straight, data, encoder, tmp_path, monkeypatch):
    output, _ = straight
    steps, set_schedule = [], Engine.set_schedule

    def stop_in_the_second_epoch(engine, *args):
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGTERM)
        set_schedule(engine, *args)

    flags = [*GRID_FLAGS, "--model_ema", "--model_ema_decay", "0.5"]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "set_schedule", stop_in_the_second_epoch)
        assert run(data, tmp_path, encoder, *flags).returncode == SAVED
    other = run(data, tmp_path, encoder, *flags, "--probe_lrs", "1")
    assert other.returncode == 1 and "was made with probe" in other.stderr
    assert run(data, tmp_path, encoder, *flags).returncode == 0
    ours, theirs = (load(folder / "checkpoint-1.pth") for folder in (tmp_path, output))
    for part in ("model", "model_ema"):
        assert all(torch.equal(ours[part][name], value) for name, value in theirs[part].items())
    assert ours["best"] == theirs["best"]
    assert (tmp_path / "scores.npz").read_bytes() == (output / "scores.npz").read_bytes()


def test_the_whole_grid_is_no_model_to_test_or_predict_with(straight, data, tmp_path):
    output, _ = straight
    path = output / "checkpoint-1.pth"
    done = run(data, tmp_path, path, "--eval")
    assert done.returncode == 1 and "holds 4 probes: use checkpoint-best.pth" in done.stderr
    done = start(predict, "--model", path, "--device", "cpu", data)
    assert done.returncode == 1 and "holds 4 probes: use checkpoint-best.pth" in done.stderr
    best = start(predict, "--model", output / "checkpoint-best.pth", "--device", "cpu", "--num_workers", 0, data)
    assert best.returncode == 0, best.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--probe_lrs", "0.1", "--test_last"], "exclude --test_last"),
        (["--probe_lrs", "0.1", "--clip_grad", "1"], "exclude --clip_grad"),
        (["--probe_lrs", "0.1", "--no_save_ckpt"], "need validation and --output_dir"),
        (["--probe_lrs", "0.1", "0.1"], "must name no value twice"),
        (["--probe_lrs", "0"], "--probe_lrs must be positive"),
        (["--probe_lrs", "nan"], "--probe_lrs must be positive"),
        (["--probe_weight_decays", "-1"], "--probe_weight_decays must be at least 0"),
        (["--probe_weight_decays", "0.1", "--weight_decay_end", "0.3"], "drop --weight_decay_end"),
        (["--probe_lrs", "0.1", "--opt", "lamb"], "--opt lamb clips the gradients of all probes together"),
    ],
)
def test_what_does_not_go_with_several_probes_is_one_line(data, encoder, tmp_path, flags, words):
    done = run(data, tmp_path, encoder, *flags)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and words in done.stderr, done.stderr


def test_several_probes_need_a_kind(data, encoder, tmp_path):
    flags = [flag for flag in RUN if flag not in ("--attentive_probe", "--probe_blocks")][:-1]
    done = start(main, *flags, "--data_path", data, "--output_dir", tmp_path, "--finetune", encoder, "--probe_lrs", "1")
    assert done.returncode == 1 and "need --linear_probe or --attentive_probe" in done.stderr
