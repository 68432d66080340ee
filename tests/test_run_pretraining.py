"""The pre-training program, started as a person starts it, on real video files."""

import json
import re
import shlex

import pytest
import torch
from golden import ROOT
from programs import Done, start, start_process
from videos import write_list, write_videos

import run_class_finetuning
from masking_generator import RULES
from modeling_pretrain import create_pretrain_model
from run_mae_pretraining import check_settings, get_args_parser, main
from runs.assembly import build_engine, build_schedule
from utils import World

PROGRAM = "run_mae_pretraining.py"
TINY = ["--model", "pretrain_videomae_tiny_patch8_64", "--input_size", "32", "--mask_ratio", "0.9"]
SMALL_RUN = [
    *TINY,
    *("--batch_size", "4", "--epochs", "2", "--warmup_epochs", "0", "--lr", "0.05", "--sampling_rate", "1"),
    *("--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder", "pyav", "--decoder_depth", "1"),
    *("--save_ckpt_freq", "1", "--log_freq", "1", "--vis_freq", "0"),
]

HALF_DECODED = ["--decoder_mask_ratio", "0.5", "--decoder_mask_type", "running_cell"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A list of eight small videos."""
    folder = tmp_path_factory.mktemp("data")
    names = write_videos(folder, range(20, 28), size=(40, 48))
    write_list(folder / "list.csv", *(f"{name} {i % 2}" for i, name in enumerate(names)))
    return folder


def pretrain(data, output, *flags, processes: int = 0) -> Done:
    """A run that must succeed; `processes` of its own, or with 0 in this one."""
    flags = (*SMALL_RUN, "--data_path", data / "list.csv", "--output_dir", output, *flags)
    done = start_process(PROGRAM, *flags, processes=processes) if processes else start(main, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def weights(output, epoch: int) -> dict[str, torch.Tensor]:
    return torch.load(output / f"checkpoint-{epoch}.pth", weights_only=True)["model"]


def log(output) -> list[dict]:
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A run of two epochs that nothing interrupted."""
    output = tmp_path_factory.mktemp("straight")
    return output, pretrain(data, output, processes=1).stdout


def test_a_run_leaves_checkpoints_log_and_scalars(straight):
    output, console = straight
    assert {p.name for p in output.glob("*.pth")} == {"checkpoint-0.pth", "checkpoint-1.pth"}
    assert [entry["epoch"] for entry in log(output)] == [0, 1]
    expected = {"loss_reconstruction", "loss_sampling", "probs_entropy", "probs_max", "data_wait", "bad_videos"}
    assert expected | {"clips_per_second", "lr"} <= set(log(output)[0])
    assert any(output.glob("events.out.tfevents.*"))
    (command,) = (output / "command.txt").read_text().splitlines()
    assert shlex.split(command)[:2] == ["python", "run_mae_pretraining.py"]
    assert vars(get_args_parser().parse_args(shlex.split(command)[2:]))["output_dir"] == str(output)
    assert "12 of 128 tokens visible" in console
    assert re.search(r"epoch 1  step 4/4  loss \d.*  left 0:00:00", console)


def test_checkpoints_have_the_published_keys(straight):
    state = torch.load(straight[0] / "checkpoint-1.pth", weights_only=True)
    assert {"model", "optimizer", "scaler", "epoch", "args"} <= set(state)
    assert state["epoch"] == 1 and state["args"]["mask_ratio"] == 0.9
    assert "encoder.get_token_probs.0.attn.qkv.weight" in state["model"]


def test_workers_follow_slurm_unless_their_number_is_given(straight, data, tmp_path, monkeypatch):
    assert ", 0 data workers a process" in straight[1]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    start_of_flag = SMALL_RUN.index("--num_workers")
    flags = SMALL_RUN[:start_of_flag] + SMALL_RUN[start_of_flag + 2 :]
    done = start(main, *flags, "--data_path", data / "list.csv", "--output_dir", tmp_path)
    assert done.returncode == 0 and ", 1 data worker a process" in done.stdout, done.stdout + done.stderr
    assert all(torch.equal(value, weights(straight[0], 1)[name]) for name, value in weights(tmp_path, 1).items())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_resumed_run_equals_a_straight_one(straight, data, tmp_path, workers):
    pretrain(data, tmp_path, "--num_workers", workers)
    (tmp_path / "checkpoint-1.pth").unlink()
    resumed = pretrain(data, tmp_path, "--num_workers", workers)
    assert "checkpoint-0.pth: 1 of 2 epochs are done" in resumed.stdout
    ours, theirs = weights(tmp_path, 1), weights(straight[0], 1)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_run_with_decoder_masking_resumes_exactly_and_may_go_on_without(straight, data, tmp_path):
    for folder in (tmp_path / "straight", tmp_path / "resumed"):
        pretrain(data, folder, *HALF_DECODED)
    (tmp_path / "resumed" / "checkpoint-1.pth").unlink()
    pretrain(data, tmp_path / "resumed", *HALF_DECODED)
    ours, theirs = weights(tmp_path / "resumed", 1), weights(tmp_path / "straight", 1)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert any(not torch.equal(theirs[k], value) for k, value in weights(straight[0], 1).items())
    (tmp_path / "resumed" / "checkpoint-1.pth").unlink()
    resumed = pretrain(data, tmp_path / "resumed")
    assert "--decoder_mask_ratio 0.5 -> 0" in resumed.stdout + resumed.stderr


def test_a_damaged_checkpoint_is_passed_over(straight, data, tmp_path):
    pretrain(data, tmp_path)
    newest = tmp_path / "checkpoint-1.pth"
    newest.write_bytes(newest.read_bytes()[:5000])
    resumed = pretrain(data, tmp_path)
    assert re.search(r"checkpoint-1\.pth: not a readable checkpoint .* trying an older one", resumed.stderr)
    assert "checkpoint-0.pth: 1 of 2 epochs are done" in resumed.stdout
    ours, theirs = weights(tmp_path, 1), weights(straight[0], 1)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


MAE_ST = ["--model", "pretrain_mae_st_tiny_patch8_64"]


@pytest.mark.parametrize(
    "flags",
    [
        *(["--mask_type", mask, "--mask_ratio", "0.75"] for mask in RULES),
        *([*MAE_ST, "--mask_type", mask] for mask in ("agnostic", "adaptive")),
        [*HALF_DECODED, "--sampling_loss", "score_function", "--sampler", "attention"],
    ],
    ids=" ".join,
)
def test_twenty_steps_lower_the_loss(data, tmp_path, flags):
    pretrain(data, tmp_path, "--epochs", "10", "--save_ckpt_freq", "10", "--lr", "0.1", *flags)
    losses = [entry["loss_reconstruction"] for entry in log(tmp_path)]
    assert len(losses) == 10 and losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--mask_type", "tube", "--mask_ratio", "0.75", "--vis_freq", "1"],
        ["--mask_type", "learnable", "--amp", "bf16", "--vis_freq", "1"],
        ["--use_checkpoint", "--drop_path", "0.1", "--clip_grad", "0.5", "--opt", "sgd"],
        ["--update_freq", "2", "--num_sample", "2", "--crop", "random_resized", "--color_jitter", "0.4"],
        ["--sampler", "attention", "--sampling_loss", "score_function", "--sampling_entropy_weight", "0.1"],
        ["--sampler", "mlp", "--loss", "l1", "--normalize_target", "false", "--sampling_loss", "linear"],
        ["--mask_type", "frame", *HALF_DECODED, "--vis_freq", "1"],
        ["--weight_decay_end", "0.2", "--warmup_steps", "1", "--opt_betas", "0.9", "0.95"],
    ],
)
def test_variants_run(data, tmp_path, flags):
    pretrain(data, tmp_path, "--epochs", "1", *flags)
    assert log(tmp_path)[0]["loss_reconstruction"] > 0
    pictures = list((tmp_path / "pictures").glob("*.png"))
    assert len(pictures) == (1 if "--vis_freq" in flags else 0)


def test_two_processes(data, tmp_path):
    """torchrun with two gloo ranks trains, and only one of them writes."""
    done = pretrain(data, tmp_path, "--epochs", "1", "--batch_size", "2", processes=2)
    assert "2 processes x 2 videos x 1 batch a step = 4" in done.stdout
    assert len(log(tmp_path)) == 1


def test_an_unreadable_video_is_reported_counted_and_replaced(data, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes((data / "0.mp4").read_bytes()[:200])
    lines = [f"{data}/{i}.mp4 0\n" for i in range(7)] + [f"{broken} 1\n"]
    (tmp_path / "list.csv").write_text("".join(lines))
    done = start(
        main, *SMALL_RUN, "--epochs", "1", "--data_path", tmp_path / "list.csv", "--output_dir", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    assert f"unreadable video, replaced by another: {broken}" in done.stderr
    entry = log(tmp_path / "out")[0]
    assert entry["bad_videos"] == 1 and entry["replaced"] >= 1
    header, row = (tmp_path / "out" / "bad_videos.csv").read_text().splitlines()
    assert header == "path,reason" and row.startswith(f"{broken},")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_too_many_unreadable_videos_stop_the_run_and_are_all_written_down(data, tmp_path, workers):
    """Two epochs over 8 videos of which 3 are broken; each is met, and recorded once."""
    lines = [f"{data}/{i}.mp4 0\n" for i in range(5)] + [f"missing/{i}.mp4 1\n" for i in range(3)]
    (tmp_path / "list.csv").write_text("".join(lines))
    flags = [*SMALL_RUN, "--data_path", tmp_path / "list.csv", "--num_workers", workers]
    allowed = start(main, *flags, "--output_dir", tmp_path / "some", "--max_bad_videos", "0.4")
    assert allowed.returncode == 0, allowed.stderr
    assert len((tmp_path / "some" / "bad_videos.csv").read_text().splitlines()) == 1 + 3
    assert [entry["bad_videos"] for entry in log(tmp_path / "some")] == [3, 3]
    stopped = start(main, *flags, "--output_dir", tmp_path / "few")
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert re.search(r"\d of 8 videos cannot be read, and --max_bad_videos 0.01 allows 1\.", stopped.stderr)
    assert len((tmp_path / "few" / "bad_videos.csv").read_text().splitlines()) >= 1 + 2


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mask_ratio", "1.2"], "--mask_ratio 1.2 must lie between"),
        (["--mask_ratio", "0.999"], "shows 0 of 128 tokens"),
        (["--input_size", "30"], "--input_size 30 is not a multiple of the patch size 8"),
        (["--num_frames", "5"], "--num_frames 5 is not a multiple"),
        (["--model", "vit_base"], "--model vit_base: no such model"),
        (["--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["--batch_size", "64"], "--batch_size"),
        (["--warmup_epochs", "9"], "--warmup_epochs 9 is more than --epochs 2"),
        (["--sampler_dim", "20"], "--sampler_dim 20 must be a multiple"),
        (["--data_path", "missing.csv"], "missing.csv does not exist"),
        (["--data_path", ""], "--data_path is missing"),
        (["--resume", "missing.pth"], "missing.pth: no such checkpoint"),
        (["--world_size", "4"], "--world_size 4, but 1 processes were started"),
        (["--opt", "adamwish"], "--opt adamwish"),
    ],
)
def test_wrong_settings_are_one_line_that_says_what_to_change(data, tmp_path, flags, words):
    done = start(main, *SMALL_RUN, "--data_path", data / "list.csv", "--output_dir", tmp_path / "out", *flags)
    assert done.returncode != 0
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*.pth"))


def test_losses_that_stay_not_finite_end_the_run(data, tmp_path):
    """Its steps are skipped, its videos written down, and the checkpoints of before are left alone."""
    pretrain(data, tmp_path, "--epochs", "1")
    before = (tmp_path / "checkpoint-0.pth").read_bytes()
    flags = ["--lr", "1e30", "--epochs", "4", "--max_bad_steps", "3", "--save_ckpt_freq", "9"]
    done = start(main, *SMALL_RUN, "--data_path", data / "list.csv", "--output_dir", tmp_path, *flags)
    assert done.returncode != 0
    assert re.search(r"not finite in 3 steps in a row of epoch \d .*bad_batches\.csv.* lower --lr", done.stderr)
    rows = (tmp_path / "bad_batches.csv").read_text().splitlines()
    assert rows[0] == "step,rank,loss,path" and len(rows) == 1 + 3 * 4
    assert all(re.fullmatch(r"\d+,0,(nan|inf),.*/\d\.mp4", row) for row in rows[1:])
    assert [p.name for p in tmp_path.glob("*.pth")] == ["checkpoint-0.pth"]
    assert (tmp_path / "checkpoint-0.pth").read_bytes() == before


def test_another_model_does_not_resume(straight, data):
    done = start(
        main, *SMALL_RUN, "--data_path", data / "list.csv", "--output_dir", straight[0], "--decoder_depth", "2"
    )
    assert done.returncode != 0
    assert "decoder_depth = 1, this run has decoder_depth = 2" in done.stderr


def test_lists_without_a_readable_video_or_with_a_bad_line(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    lists = {"empty.mp4 0\n": "empty.mp4", "a.mp4 0\nb.mp4 1 one\n": "line 2: the label '1 one'", "": "is empty"}
    for text, words in lists.items():
        (tmp_path / "list.csv").write_text(text)
        done = start(main, *SMALL_RUN, "--data_path", tmp_path / "list.csv")
        assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr


def test_every_flag_is_read():
    """Each flag's name stands in the program or in what it shares; resuming reads its own by name."""
    files = (PROGRAM, "runs/flags.py", "runs/assembly.py", "runs/resuming.py")
    source = "".join((ROOT / name).read_text() for name in files)
    for action in get_args_parser()._actions:
        if action.dest != "help":
            assert f"args.{action.dest}" in source or f'flags["{action.dest}"]' in source, action.dest


def test_flags_reach_model_engine_and_schedule(data):
    flags = "--drop_path 0.3 --use_checkpoint --clip_grad 0.5 --weight_decay_end 0.2 --warmup_steps 3 --compile"
    args = get_args_parser().parse_args([*SMALL_RUN, *flags.split(), "--data_path", str(data / "list.csv")])
    model = create_pretrain_model(**check_settings(args).model)
    assert model.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.encoder.blocks.checkpoint_activations and model.decoder.blocks.checkpoint_activations
    engine = build_engine(args, model, World(torch.device("cpu"), 0, 1))
    assert engine.clip_grad == 0.5
    assert all(block._compiled_call_impl is not None for block in [*model.encoder.blocks, *model.decoder.blocks])
    args.batch_size = 256
    schedule = build_schedule(args, World(torch.device("cpu"), 0, 1), 50)
    assert schedule(0)[0] == 0 and schedule(2)[0] == args.lr > schedule(4)[0]
    assert schedule(0)[1] == pytest.approx(args.weight_decay) and schedule(99)[1] == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(
    ("parser", "flags", "warmup"),
    [
        (get_args_parser, "", 40),
        (get_args_parser, "--epochs 2400", 40),
        (get_args_parser, "--epochs 100", 5),
        (get_args_parser, "--epochs 10", 0.5),
        (get_args_parser, "--epochs 100 --warmup_epochs 40", 40),
        (run_class_finetuning.get_args_parser, "", 5),
        (run_class_finetuning.get_args_parser, "--epochs 100", 5),
        (run_class_finetuning.get_args_parser, "--epochs 12", 2),
        (run_class_finetuning.get_args_parser, "--epochs 12 --warmup_epochs 5", 5),
    ],
)
def test_the_default_warmup_is_the_published_one_and_its_share_of_a_short_run(parser, flags, warmup):
    args = parser().parse_args(flags.split())
    assert args.warmup_epochs == pytest.approx(warmup)
    args.batch_size, args.schedule = 256, "steps"
    schedule = build_schedule(args, World(torch.device("cpu"), 0, 1), 60)
    rates = [schedule(step)[0] for step in range(60 * args.epochs)]
    assert rates.index(max(rates)) == round(60 * warmup) - 1 and max(rates) == pytest.approx(args.lr)


def test_a_resumed_run_keeps_its_warmup_unless_a_flag_says_otherwise(data, tmp_path):
    place = SMALL_RUN.index("--warmup_epochs")
    flags = [*SMALL_RUN[:place], *SMALL_RUN[place + 2 :], "--data_path", data / "list.csv", "--output_dir", tmp_path]

    def warmup(*more) -> tuple[float, str]:
        done = start(main, *flags, *more)
        assert done.returncode == 0, done.stderr
        newest = max(tmp_path.glob("checkpoint-[0-9]*.pth"), key=lambda path: path.stat().st_mtime_ns)
        return torch.load(newest, weights_only=True)["args"]["warmup_epochs"], done.stdout

    assert warmup("--epochs", "1")[0] == pytest.approx(1 / 20)
    value, out = warmup("--epochs", "2")
    assert value == pytest.approx(1 / 20) and "--warmup_epochs" not in out
    assert "--warmup_epochs 0.05 -> 1" in warmup("--epochs", "3", "--warmup_epochs", "1")[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "1.5e-4"], ["peak learning rate of 2.3e-06", "--update_freq", "total batch is 4", "raise --lr"]),
        (["--lr", "2.5e-3"], ["peak learning rate of 3.9e-05"]),
        (["--lr", "3e-3"], []),
        (["--lr", "1.5e-4", "--opt", "sgd"], []),
    ],
)
def test_a_peak_rate_that_learns_nothing_is_a_warning_in_one_line(data, tmp_path, flags, words):
    done = pretrain(data, tmp_path, "--epochs", "1", *flags)
    assert len(done.stderr.splitlines()) == bool(words)
    assert all(word in done.stderr for word in words), done.stderr


def test_the_first_step_is_told_at_once(data, tmp_path):
    done = pretrain(data, tmp_path, "--epochs", "1", "--log_freq", "20")
    lines = done.stdout.splitlines()
    (first,) = [k for k, line in enumerate(lines) if re.match(r"step 1/2 done after [\d.]+ s$", line)]
    assert re.match("epoch 0  step 2/2", lines[first + 1])


def test_published_flags_and_defaults():
    args = get_args_parser().parse_args([])
    expected = {
        "batch_size": 64,
        "epochs": 800,
        "save_ckpt_freq": 50,
        "model": "pretrain_videomae_base_patch16_224",
        "decoder_depth": 4,
        "mask_ratio": 0.95,
        "drop_path": 0.0,
        "normalize_target": True,
        "opt": "adamw",
        "opt_eps": 1e-8,
        "clip_grad": None,
        "momentum": 0.9,
        "weight_decay": 0.05,
        "weight_decay_end": None,
        "lr": 1.5e-4,
        "min_lr": 1e-5,
        "warmup_epochs": 40,
        "warmup_steps": -1,
        "num_frames": 16,
        "sampling_rate": 4,
        "seed": 0,
        "num_workers": None,
        "sampling_loss_weight": 1e-4,
    }
    assert {name: getattr(args, name) for name in expected} == expected
    old = "--normlize_target false --mask_type learnable --opt_betas 0.9 0.95 --no_auto_resume --no_pin_mem"
    args = get_args_parser().parse_args(old.split())
    assert (args.normalize_target, args.auto_resume, args.pin_mem) == (False, False, False)
