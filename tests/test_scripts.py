"""The launch scripts and requirements: what would run is what they say, and the program understands it."""

import ast
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run_class_finetuning
import run_mae_pretraining
from datasets import DATA_SETS
from modeling_finetune import CLASSIFIERS
from modeling_pretrain import PRETRAIN_MODELS
from runs.assembly import build_schedule
from utils import World

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("benchmarks/*.sh")])
OWN = sorted(ROOT.glob("scripts/own/*.sh"))
PRETRAINING = sorted({*ROOT.glob("scripts/*/pretrain_*.sh")} - {*OWN})
FINETUNING = sorted({*ROOT.glob("scripts/*/finetune_*.sh")} - {*OWN})
SCRATCH = sorted(ROOT.glob("scripts/*/scratch_*.sh"))
PROBES = sorted(ROOT.glob("scripts/*/probe_*.sh"))
EVALUATIONS = sorted(ROOT.glob("scripts/*/evaluate.sh"))
PARSERS = {
    "run_mae_pretraining.py": run_mae_pretraining.get_args_parser,
    "run_class_finetuning.py": run_class_finetuning.get_args_parser,
}
SETS = {"ssv2": "SSV2", "kinetics": "Kinetics-400", "ucf101": "UCF101"}
BATCH_COMMENT = re.compile(r"^# (\d+) GPUs x (\d+) = (\d+) (?:clips|videos) a step\.$", re.MULTILINE)
ADAMAE = ROOT / "scripts/ssv2/pretrain_adamae_base_800e.sh"
FINETUNE_ADAMAE = ROOT / "scripts/ssv2/finetune_adamae_base_800e_50e.sh"
EVALUATE = ROOT / "scripts/ssv2/evaluate.sh"


def of_every(*recipes: Path):
    return pytest.mark.parametrize("recipe", recipes, ids=lambda path: f"{path.parent.name}/{path.stem}")


def run(script: Path, *arguments: str, cwd: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    """Runs a script with nothing of this process's environment but PATH and HOME."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env = kept | {"PYTHON": sys.executable} | {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        ["bash", str(script), *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def command_of(recipe: Path, *arguments: str, **environment) -> list[str]:
    """The command that a recipe would run, on one machine with one GPU unless `environment` says more."""
    defaults = {"DRY_RUN": 1, "DATA_PATH": os.devnull, "MODEL": os.devnull, "NPROC_PER_NODE": 1}
    done = run(recipe, *arguments, **(defaults | environment))
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def split_command(command: list[str]) -> tuple[str, list[str]]:
    """The program's name and its flags."""
    (program,) = [i for i, word in enumerate(command) if Path(word).name in PARSERS]
    return Path(command[program]).name, command[program + 1 :]


def parsed(recipe: Path, *arguments: str, **environment):
    program, flags = split_command(command_of(recipe, *arguments, **environment))
    return PARSERS[program]().parse_args(flags)


def flags_of(*programs: str) -> set[str]:
    """All flags that these programs take."""
    return {option for p in programs for a in PARSERS[p]()._actions for option in a.option_strings}


def documented_row(recipe: Path, document: str) -> str:
    """The one line of a table in a document that names the recipe."""
    name = f"`scripts/{recipe.parent.name}/{recipe.name}`"
    rows = [line for line in (ROOT / document).read_text().splitlines() if line.startswith(f"| {name} |")]
    assert len(rows) == 1, rows
    return rows[0]


def counterpart(recipe: Path) -> Path:
    """The pre-training recipe that a fine-tuning recipe starts from."""
    return recipe.parent / f"pretrain_{recipe.stem.removeprefix('finetune_').rpartition('_')[0]}.sh"


def views(args) -> str:
    """Temporal x spatial views of a recipe's test."""
    data_set = DATA_SETS[args.data_set]
    return f"{args.test_num_segment or data_set.test_segments} x {args.test_num_crop or data_set.test_crops}"


def number_to_reproduce(recipe: Path) -> str:
    found = re.search(r"^# To reproduce: ([\d./ ]+) top-1", recipe.read_text(), re.MULTILINE)
    return found[1] if found else "-"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_every_script(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0


# --- recipes ------------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_published_experiment():
    def names(recipes):
        return {f"{path.parent.name}/{path.stem.partition('_')[2]}" for path in recipes}

    assert names(PRETRAINING) == {
        *("ssv2/adamae_base_800e", "kinetics/adamae_base_800e", "ucf101/videomae_base_3200e"),
        *("ssv2/videomae_small_2400e", "ssv2/videomae_base_800e", "ssv2/videomae_base_2400e"),
        *("kinetics/videomae_small_1600e", "kinetics/videomae_base_800e", "kinetics/videomae_base_1600e"),
        *("kinetics/videomae_large_1600e", "kinetics/videomae_huge_1600e"),
        *("kinetics/mae_st_large_100e", "kinetics/mae_st_huge_100e"),
    }
    starts = {name.rpartition("_")[0] for name in names(FINETUNING)}
    assert starts == names(PRETRAINING) and len(FINETUNING) == len(starts)
    assert {path.parent.name for path in EVALUATIONS} == set(SETS)


@of_every(*PRETRAINING, *FINETUNING, *SCRATCH, *PROBES, *EVALUATIONS)
def test_recipe_has_only_flags_of_the_program(recipe):
    program, words = split_command(command_of(recipe))
    flags = [word for word in words if word.startswith("--")]
    assert set(flags) <= flags_of(program)
    assert len(flags) == len(set(flags))
    assert parsed(recipe).model in (*PRETRAIN_MODELS, *CLASSIFIERS)


@of_every(*PRETRAINING)
def test_pretraining_recipe_does_what_its_name_and_head_say(recipe):
    args, text = parsed(recipe), recipe.read_text()
    method, size, epochs = re.fullmatch(r"pretrain_(\w+)_(\w+)_(\w+)", recipe.stem).groups()
    assert f"{args.epochs}e" == epochs
    family = "mae_st" if method == "mae_st" else "videomae"
    assert args.model.startswith(f"pretrain_{family}_{size}_patch") and args.model.endswith("_224")
    assert args.mask_type == {"adamae": "adaptive", "videomae": "tube", "mae_st": "agnostic"}[method]
    assert args.sampling_rate == (2 if recipe.parent.name == "ssv2" else 4)
    assert args.opt_betas == [0.9, 0.95]
    assert f"{args.mask_type} masking at {args.mask_ratio}, {args.epochs} epochs" in text
    assert (f"{args.num_sample} clips a video" in text) == (args.num_sample > 1)


@of_every(*FINETUNING)
def test_finetuning_recipe_does_what_its_name_and_head_say(recipe):
    args, text = parsed(recipe), recipe.read_text()
    method, size, epochs = re.fullmatch(r"finetune_(\w+)_(\w+)_\w+_(\w+)", recipe.stem).groups()
    assert f": {args.epochs} epochs from the checkpoint of {counterpart(recipe).name}." in text
    assert f"{args.epochs}e" == epochs
    assert args.model.startswith(f"vit_{size}{'_mae_st' * (method == 'mae_st')}_patch")
    assert args.data_set == SETS[recipe.parent.name]
    assert f" {views(args)} views (" in text
    assert ("2 augmented copies of each video" in text) == (args.num_sample == 2)
    assert args.view_fusion == ("logits" if method == "adamae" else "softmax")
    assert args.finetune == os.devnull
    assert args.test_last and not parsed(recipe, "--test_last", "false").test_last
    assert not args.eval


@of_every(*PRETRAINING, *FINETUNING, *SCRATCH, *PROBES)
def test_batch_arithmetic_of_a_recipe_is_true(recipe):
    gpus, batch, total = map(int, BATCH_COMMENT.search(recipe.read_text()).groups())
    assert gpus * batch == total
    cluster = {"NNODES": gpus // 8, "NODE_RANK": 0, "MASTER_ADDR": "first", "NPROC_PER_NODE": 8}
    published = parsed(recipe, **cluster)
    assert (published.batch_size, published.update_freq) == (batch, 1)
    for few in (1, 2, 8):
        args = parsed(recipe, NPROC_PER_NODE=few)
        assert few * args.batch_size * args.update_freq == total


@of_every(*PRETRAINING, *FINETUNING, *SCRATCH)
def test_document_lists_recipe_with_its_numbers(recipe):
    gpus, batch, total = BATCH_COMMENT.search(recipe.read_text()).groups()
    row = documented_row(recipe, "PRETRAIN.md" if recipe in PRETRAINING else "FINETUNE.md")
    assert f"| {gpus} x {batch} = {total} |" in row
    assert f"| {number_to_reproduce(recipe)} " in row


@of_every(*OWN)
def test_recipe_for_own_videos_does_what_its_head_says(recipe):
    classes = ["--nb_classes", "7"] if "finetune" in recipe.name else []
    args, text = parsed(recipe, *classes), recipe.read_text()
    batch, freq, total = map(int, re.search(r"# 1 GPU x (\d+) x (\d+) accumulated = (\d+) ", text).groups())
    assert (args.batch_size, args.update_freq, batch * freq) == (batch, freq, total)
    assert f"{args.epochs} epochs" in text and f"_{args.epochs}e.sh" in recipe.name
    assert args.lr * total / 256 in (pytest.approx(2.25e-4), pytest.approx(2.5e-4))  # VideoMAE's UCF101
    assert recipe.name in (ROOT / "docs/own_videos.md").read_text()
    for epochs in (100, args.epochs):  # the warm-up stays a share of the run
        short = parsed(recipe, *classes, "--epochs", str(epochs))
        assert 0 < short.warmup_epochs <= epochs / 20
    if classes:
        assert counterpart(recipe) in OWN
        assert (args.data_set, args.nb_classes, args.test_last) == ("custom", 7, False)


@of_every(*PRETRAINING)
def test_the_warmup_of_a_published_recipe_is_the_published_one(recipe):
    args = parsed(recipe)
    assert args.warmup_epochs == (5 if "mae_st" in recipe.name else 40)


@of_every(*FINETUNING)
def test_the_warmup_of_a_published_finetuning_is_5_epochs(recipe):
    assert parsed(recipe).warmup_epochs == 5


@of_every(*FINETUNING, *SCRATCH)
def test_document_lists_settings_of_a_finetuning_recipe(recipe):
    args, row = parsed(recipe), documented_row(recipe, "FINETUNE.md")
    _, epochs, lr, copies, _, one_gpu, tested, *_ = (cell.strip() for cell in row.strip("|").split("|"))
    assert (int(epochs), float(lr), int(copies)) == (args.epochs, args.lr, args.num_sample)
    assert one_gpu == f"1 x {args.batch_size} x {args.update_freq}"
    assert tested == views(args)


@of_every(*(recipe for recipe in FINETUNING if counterpart(recipe).is_file()))
def test_finetuning_is_to_reach_what_pretraining_promises(recipe):
    assert number_to_reproduce(recipe) == number_to_reproduce(counterpart(recipe))


@of_every(*(recipe for recipe in FINETUNING if counterpart(recipe).is_file()))
def test_finetuning_starts_by_default_from_the_end_of_its_own_pretraining(recipe):
    before = parsed(counterpart(recipe))
    expected = Path(before.output_dir) / f"checkpoint-{before.epochs - 1}.pth"
    assert parsed(recipe, MODEL="", MODEL_MAY_COME=1).finetune == str(expected)


def test_mae_sts_recipe_has_its_published_rates_and_arithmetic():
    """Its base rate counts copies and its final rate does not scale; float32, frames of 256 pixels."""
    args = parsed(ROOT / "scripts/kinetics/finetune_mae_st_large_100e_50e.sh", NPROC_PER_NODE=2)
    schedule = build_schedule(args, World(torch.device("cpu"), 0, 2), 100 * args.update_freq)
    steps, clips = 100 * args.epochs, 2 * args.batch_size * args.update_freq * args.num_sample
    rates = [schedule(step)[0] for step in range(steps)]
    assert max(rates) == pytest.approx(2.4e-3 * clips / 256)
    assert rates[-1] == pytest.approx(1e-6, rel=0.01)
    assert (args.amp, args.train_short_side, args.sampling) == ("off", 256, "mae_st")


@of_every(*PROBES)
def test_probe_freezes_the_encoder_it_is_given(recipe):
    args = parsed(recipe)
    assert (args.linear_probe, args.attentive_probe) == ("linear" in recipe.stem, "attentive" in recipe.stem)
    assert f"`scripts/ssv2/{recipe.name}`" in (ROOT / "docs/probes.md").read_text()
    assert args.finetune == os.devnull
    assert (args.mixup, args.cutmix, args.smoothing, args.drop_path) == (0, 0, 0, 0)


@of_every(*EVALUATIONS)
def test_evaluation_only_tests(recipe):
    args = parsed(recipe, "--model", "vit_large_patch16_224", NPROC_PER_NODE=3)
    assert (args.eval, args.finetune, args.update_freq) == (True, os.devnull, 1)
    assert (args.model, args.data_set) == ("vit_large_patch16_224", SETS[recipe.parent.name])


def test_another_data_set_of_the_environment_has_its_own_folder():
    for recipe in (*FINETUNING, *SCRATCH):
        args = parsed(recipe, DATA_SET="Kinetics-600")
        assert args.data_set == "Kinetics-600" and args.output_dir.endswith(f"/{recipe.stem}-Kinetics-600")
    assert parsed(ADAMAE, DATA_SET="Kinetics-700", SEED=1).output_dir.endswith(f"/{ADAMAE.stem}-Kinetics-700-seed1")
    start = parsed(FINETUNE_ADAMAE, DATA_SET="Kinetics-700", MODEL="", MODEL_MAY_COME=1).finetune
    assert start.endswith(f"/{ADAMAE.stem}-Kinetics-700/checkpoint-799.pth")


def test_a_model_may_be_on_the_hub():
    assert parsed(FINETUNE_ADAMAE, MODEL="some-one/videomae-base.v2").finetune == "some-one/videomae-base.v2"
    done = run(FINETUNE_ADAMAE, DRY_RUN=1, DATA_PATH=os.devnull, NPROC_PER_NODE=1, MODEL="output/none.pth")
    assert done.returncode and "output/none.pth does not exist" in done.stderr


def test_finetuning_from_scratch_loads_nothing_and_from_timm_no_file():
    assert all(parsed(recipe).finetune == "" for recipe in SCRATCH)
    assert parsed(FINETUNE_ADAMAE, MODEL="scratch").finetune == ""
    assert parsed(FINETUNE_ADAMAE, MODEL="timm:vit_any").finetune == "timm:vit_any"


def test_documents_name_only_flags_of_the_programs():
    programs = [*ROOT.glob("tools/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    tools = set(re.findall(r'"(--[a-z_]+)"', "".join(p.read_text() for p in programs)))
    declared = {
        "PRETRAIN.md": flags_of("run_mae_pretraining.py") | tools,
        "FINETUNE.md": flags_of("run_class_finetuning.py") | tools,
        "DATASET.md": flags_of(*PARSERS) | tools,
        "MODELS.md": flags_of("run_class_finetuning.py") | tools,
        **{f"docs/{name}.md": flags_of(*PARSERS) for name in ("own_videos", "cluster", "paper_and_code", "terms")},
        "docs/probes.md": flags_of("run_class_finetuning.py") | tools,
    }
    launchers = "".join((ROOT / "scripts" / name).read_text() for name in ("slurm.sh", "launch.sh"))
    theirs = set(re.findall(r"--[a-z][a-z_]*", launchers)) | {"--help"}
    for name, known in declared.items():
        named = set(re.findall(r"--[a-z][a-z_]*", (ROOT / name).read_text()))
        assert named - theirs <= known, name


# --- how a recipe is started --------------------------------------------------------------------------------


def test_arguments_and_environment_override_the_recipe(tmp_path):
    out, data = tmp_path / "a folder", tmp_path / "a list.csv"
    data.touch()
    args = parsed(ADAMAE, "--epochs", "3", "--decoder", "decord", BATCH_SIZE=16, DATA_PATH=data, OUTPUT_DIR=out)
    assert (args.epochs, args.decoder, args.batch_size, args.update_freq) == (3, "decord", 16, 128)
    assert (args.data_path, args.output_dir, args.log_dir) == (str(data), str(out), str(out))


@of_every(*PRETRAINING, *FINETUNING, *SCRATCH, *PROBES, *EVALUATIONS, *OWN)
def test_recipe_needs_a_gpu_unless_told_otherwise(recipe):
    assert parsed(recipe).device == "cuda"
    assert parsed(recipe, "--device", "cpu").device == "cpu"


def test_the_batch_of_videomaes_paper_for_its_small_model():
    recipe = ROOT / "scripts/ssv2/pretrain_videomae_small_2400e.sh"
    batches = [parsed(recipe, NPROC_PER_NODE=8, **total) for total in ({}, {"TOTAL_BATCH": 1024})]
    assert [8 * args.batch_size * args.update_freq for args in batches] == [2048, 1024]


def test_seed_of_the_environment_has_its_own_folder():
    args = parsed(ADAMAE, SEED=3)
    assert (args.seed, Path(args.output_dir).name) == (3, "pretrain_adamae_base_800e-seed3")
    assert Path(parsed(ADAMAE).output_dir).name == "pretrain_adamae_base_800e"
    assert Path(parsed(ADAMAE, SEED=3, OUTPUT_DIR="out").output_dir).name == "out"


def test_restarts_of_torchrun():
    assert "--max_restarts=3" in command_of(ADAMAE, MAX_RESTARTS=3)
    assert "--max_restarts=0" in command_of(ADAMAE, NPROC_PER_NODE=2)


def test_one_process_starts_without_torchrun_and_keeps_its_message_and_status(tmp_path):
    assert "torch.distributed.run" not in command_of(ADAMAE)
    assert "torch.distributed.run" in command_of(ADAMAE, LAUNCHER="torchrun", SLURM_JOB_ID=7)  # not a task of it
    done = run(ADAMAE, "--device", "cpu", DATA_PATH=os.devnull, OUTPUT_DIR=tmp_path, NPROC_PER_NODE=1)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("run_mae_pretraining.py: error: ")


def test_torchrun_on_several_machines():
    where = {"NNODES": 4, "NODE_RANK": 2, "MASTER_ADDR": "first", "MASTER_PORT": 1234, "NPROC_PER_NODE": 4}
    command = command_of(ADAMAE, **where)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    for flag in ("--nnodes=4", "--node_rank=2", "--master_addr=first", "--master_port=1234"):
        assert flag in command
    assert parsed(ADAMAE, **where).update_freq == 2048 // (16 * 32)


def test_slurm_job_starts_one_task_per_gpu():
    job = {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 16, "SLURM_CPUS_PER_TASK": 12}
    command = command_of(ADAMAE, **job)
    assert command[0] == "srun"
    assert {"--ntasks=16", "--cpus-per-task=12", "--kill-on-bad-exit=0"} <= set(command)
    assert "torch.distributed.run" not in command
    assert parsed(ADAMAE, **job).update_freq == 2048 // (16 * 32)
    assert command_of(ADAMAE, SLURM_STEP_ID=0, **job)[0] == sys.executable
    assert command_of(ADAMAE, LAUNCHER="torchrun", **job)[0] == sys.executable


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DATA_PATH": ""}, "DATA_PATH is not set"),
        ({"DATA_PATH": "no.csv"}, "DATA_PATH=no.csv does not exist"),
        ({"DATA_PATH": "tests"}, "DATA_PATH=tests is a folder: set it to the list of pre-training videos"),
        ({"NPROC_PER_NODE": 6}, "6 GPUs cannot share a total batch of 2048"),
        ({"BATCH_SIZE": 48}, "set BATCH_SIZE to a divisor of 2048"),
        ({"NPROC_PER_NODE": 8, "BATCH_SIZE": 512}, "set BATCH_SIZE to a divisor of 256"),
        ({"NNODES": 2}, "set MASTER_ADDR"),
        ({"NNODES": 2, "MASTER_ADDR": "first"}, "set NODE_RANK to this machine's number, 0 to 1"),
        ({"SLURM_JOB_ID": 7}, "--ntasks-per-node"),
        ({"LAUNCHER": "mpirun"}, "it is torchrun, srun or none"),
    ],
)
def test_wrong_setting_is_one_line_that_says_what_to_change(environment, message):
    done = run(ADAMAE, **({"DRY_RUN": 1, "DATA_PATH": os.devnull, "NPROC_PER_NODE": 1} | environment))
    assert done.returncode == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("recipe", "environment", "message"),
    [
        (FINETUNE_ADAMAE, {}, "_base_800e/checkpoint-799.pth does not exist: the pre-trained checkpoint to start from"),
        (FINETUNE_ADAMAE, {"MODEL": "no.pth"}, "MODEL=no.pth does not exist"),
        (PROBES[0], {"MODEL": "scratch"}, "MODEL=scratch does not exist: the pre-trained checkpoint to probe"),
        (EVALUATE, {}, "MODEL is not set: the fine-tuned checkpoint to test"),
        (EVALUATE, {"MODEL": os.devnull, "DATA_PATH": ""}, "folder of train.csv, val.csv and test.csv"),
        (EVALUATE, {"MODEL": os.devnull, "DATA_PATH": "README.md"}, "is a file: set it to a folder of train.csv"),
    ],
)
def test_missing_checkpoint_or_folder_is_one_line_that_says_so(recipe, environment, message):
    done = run(recipe, **({"DRY_RUN": 1, "DATA_PATH": os.devnull, "NPROC_PER_NODE": 1} | environment))
    assert done.returncode == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_launch_starts_the_processes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, pathlib\n"
        "rank, size = os.environ['RANK'], os.environ['WORLD_SIZE']\n"
        "pathlib.Path(__file__).with_name(f'{rank} of {size}').write_text(' '.join(sys.argv[1:]))\n"
    )
    recipe = tmp_path / "recipe.sh"
    launch, program = ROOT / "scripts/launch.sh", os.path.relpath(program, ROOT)
    recipe.write_text(
        f'source {shlex.quote(str(launch))}\nTOTAL_BATCH=8 BATCH_SIZE=2\nlaunch {shlex.quote(program)} "$@"\n'
    )
    (tmp_path / "train.csv").touch()
    done = run(recipe, "--more", DATA_PATH="train.csv", OUTPUT_DIR="out", NPROC_PER_NODE=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = (
        "--data_path train.csv --output_dir out --log_dir out --device cuda --batch_size 2 --update_freq 2 --more"
    )
    assert {path.name: path.read_text() for path in tmp_path.glob("* of *")} == {"0 of 2": expected, "1 of 2": expected}


# --- environment and requirements ---------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what env.sh works on, so that nothing of it can touch the environment these tests run in."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/env.sh", tmp_path / "scripts")
    for name in ("requirements.txt", "requirements-test.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def fake_python(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("argument", "body", "message"),
    [
        ("", "exit 1", "no Python 3.10 to 3.13 found"),
        ("", '[[ "$2" != venv ]]', "python3-venv"),
        ("everything", "exit 0", "unknown argument 'everything'"),
    ],
    ids=["wrong version", "no ensurepip", "unknown argument"],
)
def test_env_says_what_is_missing(checkout, argument, body, message):
    python = fake_python(checkout / "fake python", body)
    done = run(checkout / "scripts/env.sh", *argument.split(), cwd=checkout.parent, PYTHON=python)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize(("version", "accepted"), [((3, 9), False), ((3, 10), True), ((3, 13), True), ((3, 14), False)])
def test_env_takes_python_3_10_to_3_13(checkout, version, accepted):
    text = (ROOT / "scripts/env.sh").read_text()
    condition = re.search(r"sys\.exit\(not (.+)\)'", text)[1].replace("sys.version_info", "version")
    assert eval(condition, {"version": version}) == accepted
    assert (f"python{version[0]}.{version[1]}" in text.partition("candidates=")[2].splitlines()[0]) == accepted


def test_env_installs_only_after_a_change_and_starts_anew_after_an_interruption(checkout):
    log = checkout / "log"
    fake_python(checkout / "bin/uv", f'echo "uv $*" >>{shlex.quote(str(log))}; exit "${{UV_FAILS:-0}}"')
    made = "mkdir -p .venv/bin && cp fake .venv/bin/python && echo venv >>log"
    python = fake_python(checkout / "fake", f'if [[ "$2" == venv ]]; then {made}; fi')

    def env(*arguments: str, **environment) -> tuple[int, list[str]]:
        log.write_text("")
        path = f"{checkout / 'bin'}:{os.environ['PATH']}"
        done = run(checkout / "scripts/env.sh", *arguments, PYTHON=python, PATH=path, **environment)
        return done.returncode, log.read_text().splitlines()

    install = "uv pip install --python .venv/bin/python --requirement=requirements.txt"
    install_all = f"{install} --requirement=requirements-test.txt"
    assert env("runtime") == (0, ["venv", install])
    assert env("runtime") == (0, [])
    assert env() == (0, [install_all])
    assert env() == env("runtime") == (0, [])
    with open(checkout / "requirements-test.txt", "a") as file:
        file.write("# changed\n")
    assert env(UV_FAILS=2) == (1, [install_all])
    assert env() == (0, ["venv", install_all])
    assert env() == (0, [])


@pytest.mark.skipif(sys.platform != "linux", reason="PyAV's wheels for other systems are built otherwise")
def test_torchcodec_loads_with_the_libraries_that_env_links(checkout):
    fake_python(checkout / "bin/uv", "exit 0")
    link = f"mkdir -p .venv/bin && cp fake .venv/bin/python && ln -s {shlex.quote(sys.prefix)}/lib .venv"
    body = f'if [[ "$2" == venv ]]; then {link}; else exec {shlex.quote(sys.executable)} "$@"; fi'
    python = fake_python(checkout / "fake", body)
    done = run(checkout / "scripts/env.sh", PYTHON=python, PATH=f"{checkout / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-c", "import torchcodec; print(torchcodec.ffmpeg_major_version)"]
    paths = {"LD_LIBRARY_PATH": str(checkout / ".venv/ffmpeg")}
    loaded = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=120)
    assert loaded.stdout.strip() in map(str, range(4, 10)), loaded.stderr


def requirement_names(*files: str) -> set[str]:
    lines = [line.split(";")[0].strip() for f in files for line in (ROOT / f).read_text().splitlines()]
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), pins
    return {pin.split("==")[0].lower() for pin in pins}


def imported_packages(*patterns: str) -> set[str]:
    """Distributions that the files import from: neither the standard library nor the project's own."""
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    own = {path.stem for path in (*files, *ROOT.glob("*.py"))} | {path.parent.name for path in ROOT.glob("*/*.py")}
    modules = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.split(".")[0])
    owners = importlib.metadata.packages_distributions()
    third_party = modules - own - set(sys.stdlib_module_names) - {"tools", "benchmarks"}
    return {owners.get(module, [module])[0].lower() for module in third_party}


def test_every_direct_dependency_is_pinned():
    product = ("*.py", *(f"{room}/**/*.py" for room in ("clips", "pictures", "runs", "tools", "weights")))
    assert imported_packages(*product) <= requirement_names("requirements.txt")
    optional = "benchmarks/requirements-manipulation.txt"
    everything = requirement_names("requirements.txt", "requirements-test.txt", optional)
    assert imported_packages(*product, "tests/*.py", "benchmarks/*.py") <= everything
