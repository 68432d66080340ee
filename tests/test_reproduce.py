"""The papers' tables as commands: what would run, what runs, what is submitted, and what is collected."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from golden import ROOT
from programs import start
from test_launch import Cluster
from videos import write_videos

from modeling_finetune import SIZES
from modeling_pretrain import create_pretrain_model
from runs.checkpoints import save_checkpoint
from tools import reproduce
from tools.reproducing.collecting import differs
from tools.reproducing.measuring import Measurements, forward_flop, measure, model_settings
from tools.reproducing.plan import parse_flags, plan, recipe_flags, total_batch_of
from tools.reproducing.running import chains_of
from tools.reproducing.scales import SCALES, Recipe, Scale
from tools.reproducing.tables import TABLES
from tools.reproducing.writing import BEGIN, END

FULL = SCALES["full"]
FEW_STEPS = "--num_workers 0 --decoder pyav --decode_timeout 0 --log_freq 1"
SMALLEST = Scale(
    title="eight videos",
    recipes={
        "pretrain_adamae": Recipe("demo/pretrain", f"--epochs 8 --decoder_depth 1 {FEW_STEPS}", 4),
        "finetune_adamae": Recipe("demo/finetune", f"--epochs 1 {FEW_STEPS}", 4),
    },
    environment={"LAUNCHER": "none", "OMP_NUM_THREADS": "1"},
)


def every_row():
    return [pytest.param(table, row, id=f"{name}/{row.name}") for name, table in TABLES.items() for row in table.rows]


def row_of(table: str, name: str):
    return next(row for row in TABLES[table].rows if row.name == name)


def run_tool(*flags):
    return start(reproduce.main, *flags)


@pytest.fixture
def smallest(monkeypatch):
    monkeypatch.setitem(SCALES, "smallest", SMALLEST)


# --- tables and plans ---------------------------------------------------------------------------------------


def test_names_of_rows_are_unique_and_every_recipe_is_there():
    for table in TABLES.values():
        assert len({row.name for row in table.rows}) == len(table.rows)
        for row in table.rows:
            before, after = plan(table, row, FULL, {})
            assert all((ROOT / f"scripts/{run.recipe}.sh").is_file() for run in (before, after) if run)
            assert (before is None) == bool(row.start)


def test_every_pretraining_recipe_but_those_without_a_number_is_a_row():
    recipes = {f"{path.parent.name}/{path.stem}" for path in ROOT.glob("scripts/*/pretrain_*.sh")}
    runs = [plan(table, row, FULL, {})[0] for table in TABLES.values() for row in table.rows]
    published = {name for name in recipes if "# To reproduce: " in (ROOT / f"scripts/{name}.sh").read_text()}
    assert published <= {run.recipe for run in runs if run}


@pytest.mark.parametrize("scale", [name for name in SCALES if name != "full"])
def test_a_small_world_has_every_row_that_says_so(scale):
    """Its command lines have each flag once, as many steps as its recipe, and the recipe's peak rate."""
    for table in TABLES.values():
        for row in table.rows:
            if row.small:
                before, after = plan(table, row, SCALES[scale], {})
                assert after.recipe.startswith(f"{scale}/") and after.epochs >= 1
                assert before is None or model_settings(before.settings)


def test_what_is_relative_keeps_its_proportion_in_a_small_world():
    demo = SCALES["demo"]
    once, _ = plan(TABLES["mae-st-repeated"], row_of("mae-st-repeated", "1"), demo, {})
    four, _ = plan(TABLES["mae-st-repeated"], row_of("mae-st-repeated", "4"), demo, {})
    for run in (once, four):
        clips = total_batch_of(run.settings) * int(run.settings["num_sample"][0])
        rate = total_batch_of(run.settings) * float(run.settings["lr"][0])
        assert (clips, rate) == (16, pytest.approx(0.256))
        assert run.epochs / total_batch_of(run.settings) == 3 / 4
    widths = [
        plan(TABLES["mae-st-width"], row, demo, {})[0].settings.get("decoder_dim")
        for row in TABLES["mae-st-width"].rows
    ]
    assert widths == [("16",), ("32",), None, ("128",)]
    sampler, _ = plan(TABLES["adamae-f"], row_of("adamae-f", "mha-1-384"), demo, {})
    assert int(sampler.settings["sampler_dim"][0]) == SIZES["tiny"].dim / 2


def test_rows_with_the_same_run_share_it():
    best = [
        ("adamae-a", "adaptive95"),
        ("adamae-b", "95"),
        ("adamae-c", "4"),
        ("adamae-d", "mse"),
        ("adamae-f", "mha-1-768"),
    ]
    for scale in ("full", "demo"):
        runs = [plan(TABLES[table], row_of(table, name), SCALES[scale], {}) for table, name in best]
        assert len(set(runs)) == 1 and len(chains_of(runs)) == 1
    tables = [plan(table, row, FULL, {}) for table in TABLES.values() for row in table.rows]
    places = {run.folder(0): run for runs in tables for run in runs if run}
    assert set(places.values()) == {run for runs in tables for run in runs if run}


def test_printed_commands_are_the_recipes_with_the_rows_flags():
    done = run_tool(
        "--print",
        "--table",
        "adamae-a",
        "--row",
        "tube75",
        "--seeds",
        "3",
        "--path",
        "ssv2=/data/ssv2",
        "--output",
        "/o",
    )
    title, pretrain, finetune = done.stdout.splitlines()
    place = "/o/full/ssv2/pretrain_adamae_base_800e,mask_type=tube,mask_ratio=0.75/seed3"
    assert title == "# adamae-a, tube75: tube, .75"
    assert pretrain == (
        f"SEED=3 DATA_PATH=/data/ssv2/train.csv OUTPUT_DIR={place} bash scripts/ssv2/pretrain_adamae_base_800e.sh "
        "--mask_type tube --mask_ratio 0.75"
    )
    assert finetune == (
        f"SEED=3 DATA_PATH=/data/ssv2 OUTPUT_DIR={place}/finetune_adamae_base_800e_50e "
        f"MODEL={place}/checkpoint-799.pth bash scripts/ssv2/finetune_adamae_base_800e_50e.sh"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "--row", "none"], "--row none: there is no such row"),
        (["--run", "--table", "videomae", "--scale", "demo"], "has none of these rows"),
        (["--run", "--table", "adamae-a"], "name it by --path ssv2=FOLDER"),
        (["--submit", "slurm", "--table", "adamae-a", "--path", "ssv2"], "--path ssv2: it is NAME=PATH"),
        (["--run", "--seeds", "0;1"], "--seeds 0;1: numbers with commas"),
        (["--run", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--collect", "--table", "adamae-d", "--into", "no.md", "--output", "{tmp}"], "--into no.md: it needs a line"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(flags, message, tmp_path):
    done = run_tool(*(flag.format(tmp=tmp_path) for flag in flags))
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_last_one_of_a_repeated_flag_counts():
    words = ["--device", "cuda", "--amp", "off", "--device", "auto", "--opt_betas", "0.9", "0.95", "--lr=1"]
    expected = {"device": ("auto",), "amp": ("off",), "opt_betas": ("0.9", "0.95"), "lr": ("1",)}
    assert parse_flags(words) == expected


# --- SLURM --------------------------------------------------------------------------------------------------

COUNTING = """
    n=$(ls "$CALLS" | wc -l)
    printf "%s\\n" "$@" "MODEL=$MODEL" "OUTPUT_DIR=$OUTPUT_DIR" >"$CALLS/$n"
    echo "Submitted batch job 10$n"
"""  # a stand-in for sbatch that keeps every call


def test_finetuning_is_submitted_to_wait_for_its_own_pretraining(tmp_path, monkeypatch):
    """Seed 0 is pre-trained already, seed 1 fine-tuned too."""
    cluster = Cluster(tmp_path)
    (cluster.bin / "sbatch").write_text(f"#!/usr/bin/env bash\n{COUNTING}\n")
    for name, value in {"PATH": f"{cluster.bin}:{os.environ['PATH']}", "CALLS": str(cluster.calls)}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.csv").touch()
    output = tmp_path / "an output"
    before, after = plan(TABLES["adamae-a"], row_of("adamae-a", "tube75"), FULL, {})
    for path in (before.checkpoint(0), before.checkpoint(1), after.folder(1) / "test.json"):
        (output / "full" / path).parent.mkdir(parents=True, exist_ok=True)
        (output / "full" / path).touch()
    flags = ("--submit", "slurm", "--table", "adamae-a", "--row", "tube75", "--seeds", "0,1,2,3", "--output", output)
    done = run_tool(*flags, "--path", f"ssv2={tmp_path}/data", "--slurm", "--nodes 8 --time 24:00:00")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"Submitted batch job 10{n}" for n in range(3)]
    pretrain, ready, later = ((cluster.calls / str(n)).read_text().splitlines() for n in range(3))
    folder = f"{output}/full/ssv2/pretrain_adamae_base_800e,mask_type=tube,mask_ratio=0.75/seed{{seed}}"
    for job, seeds, recipe in ((pretrain, "2,3", before), (ready, "0", after), (later, "2,3", after)):
        script = job.index("scripts/slurm.sh")
        assert job[script + 1 : script + 3] == ["--seeds", seeds]
        assert job[script + 3] == f"scripts/{recipe.recipe}.sh"
        assert "--time=24:00:00" in job and "--nodes=8" in job
        assert f"--array=0-{len(seeds) // 2}" in job
    assert pretrain[-6:-2] == ["--mask_type", "tube", "--mask_ratio", "0.75"]
    assert pretrain[-1] == f"OUTPUT_DIR={folder}"
    for job in (ready, later):
        assert job[-2:] == [f"MODEL={folder}/checkpoint-799.pth", f"OUTPUT_DIR={folder}/finetune_adamae_base_800e_50e"]
    dependencies = [[word for word in job if word.startswith("--dependency")] for job in (pretrain, ready, later)]
    assert dependencies == [[], [], ["--dependency=aftercorr:100"]] and "--kill-on-invalid-dep=yes" in later


# --- running and collecting ---------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    names = write_videos(folder, range(20, 28), size=(40, 48))
    for split, part in (("train", names), ("val", names[:4]), ("test", names[:4])):
        (folder / f"{split}.csv").write_text("".join(f"{name} {k % 2}\n" for k, name in enumerate(part)))
    return folder


def stop_after_an_epoch(folder: Path) -> None:
    """Sends SIGTERM to this process, and so to the tool, when a run below the folder has finished an epoch."""
    while not any(path.stat().st_size for path in folder.rglob("log.txt")):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


def test_two_rows_are_run_interrupted_continued_and_collected(smallest, data, tmp_path):
    rows = ("--table", "adamae-a", "--row", "random90", "--row", "adaptive95")
    where = ("--scale", "smallest", "--output", tmp_path / "out", "--path", f"demo={data}")
    output, runs = (
        tmp_path / "out/smallest",
        [plan(TABLES["adamae-a"], row_of("adamae-a", name), SMALLEST, {}) for name in rows[3::2]],
    )
    thread = threading.Thread(target=stop_after_an_epoch, args=(output,), daemon=True)
    thread.start()
    stopped = run_tool("--run", *rows, *where)
    assert stopped.returncode == 128 + signal.SIGTERM and "rerun the same command to continue" in stopped.stdout
    begun = output / runs[0][0].folder(0)
    assert (begun / "checkpoint-last.pth").is_file() and not (output / runs[1][0].folder(0)).exists()
    unfinished = run_tool("--collect", *rows, *where).stdout
    assert (
        "seed 0: pretrain_adamae,mask_type=random,mask_ratio=0.9 at epoch " in unfinished
        and "| not run |" in unfinished
    )

    done = run_tool("--run", *rows, *where, "--jobs", "2")
    assert done.returncode == 0, done.stdout
    assert "resumed " in (begun / "console.txt").read_text()
    again = run_tool("--run", *rows, *where)
    assert (again.returncode, again.stdout) == (0, "")

    collected = run_tool("--collect", *rows, *where).stdout
    assert collected.count("| finished |") == 2 and "DIFFERS" not in collected
    for before, after in runs:
        top1 = json.loads((output / after.folder(0) / "test.json").read_text())["top1"]
        (line,) = [line for line in collected.splitlines() if f"{after.checkpoint(0)}`" in line]
        assert f"| {top1:.2f} |" in line
        assert (output / before.checkpoint(0)).is_file()
    assert (output / "tables.md").read_text() == collected
    assert len((output / "tables.csv").read_text().splitlines()) == 3


def test_a_run_that_fails_is_told_with_its_last_line(smallest, data, tmp_path):
    flags = ("--run", "--table", "adamae-a", "--row", "random90", "--scale", "smallest", "--output", tmp_path / "out")
    SCALES["smallest"] = dataclasses.replace(SMALLEST, environment={"LAUNCHER": "mpirun"})
    done = run_tool(*flags, "--path", f"demo={data}")
    assert done.returncode == 1 and "exit status 1: demo/pretrain: LAUNCHER=mpirun: it is" in done.stdout


def store(run, seed: int, output: Path, *, top1: float | None = None, epochs: int | None = None, **changed) -> None:
    """Leaves behind what a run does, with the flags of its recipe except those changed."""
    folder, epochs = output / run.folder(seed), epochs or run.epochs
    state = {
        "epoch": epochs - 1,
        "model": {"weight": torch.ones(3)},
        "args": {"seed": seed, **run_args(run), **changed},
    }
    state["layout"] = {"world_size": 1, "batch_size": total_batch_of(run.settings), "update_freq": 1}
    save_checkpoint(folder / f"checkpoint-{epochs - 1}.pth", state)
    times = {"seconds": 3600.0, "clips_per_second": 40.0 + seed, "data_wait": 0.25}
    (folder / "log.txt").write_text("".join(json.dumps({"epoch": epoch, **times}) + "\n" for epoch in range(epochs)))
    if top1 is not None:
        (folder / "test.json").write_text(json.dumps({"top1": top1, "top5": top1 + 20}))


def run_args(run) -> dict:
    """The program's flags as a checkpoint has them, as far as the recipe gives them."""

    def typed(words):
        values = [
            float(word) if word.replace(".", "").replace("-", "").replace("e", "").isdigit() else word for word in words
        ]
        return True if not values else values[0] if len(values) == 1 else values

    return {name: typed(words) for name, words in run.settings.items()}


def test_collected_tables_equal_the_stored_ones(tmp_path, monkeypatch):
    """One row done; one unfinished, with a seed that is not fine-tuned; one with other flags; one not begun."""
    costs, output = tmp_path / "costs.json", tmp_path / "full"
    monkeypatch.setattr(reproduce, "COSTS", costs)
    table = TABLES["adamae-c"]
    (one, one_tuned), (two, _), (four, four_tuned), _ = (plan(table, row, FULL, {}) for row in table.rows)
    for seed, top1 in enumerate((68.0, 69.0)):
        store(one, seed, output)
        store(one_tuned, seed, output, top1=top1)
    store(two, 0, output, epochs=50)
    store(two, 1, output)
    store(four, 0, output, mask_ratio=0.9)
    store(four_tuned, 0, output, top1=70.5, view_fusion="softmax")
    known = Measurements(costs)
    costs.write_text(
        json.dumps({known._key(one.settings): {"gib": 5.0, "gflop": 58.05, "visible": 78, "tokens": 1568}})
    )
    into = tmp_path / "RESULTS.md"
    into.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    done = run_tool("--collect", "--table", "adamae-c", "--seeds", "0,1", "--output", tmp_path, "--into", into)
    assert done.returncode == 0, done.stderr
    stored = (ROOT / "tests/files/reproduced.md").read_text()
    assert done.stdout == (output / "tables.md").read_text() == stored
    assert into.read_text() == f"above\n{BEGIN}\n\n{stored}\n{END}\nbelow\n"


@pytest.mark.parametrize(
    ("words", "value", "expected"),
    [
        *((("0.9",), 0.9, False), (("0.9",), 0.95, True), (("1e-3",), 0.001, False), (("8",), 8, False)),
        *(((), True, False), (("false",), False, False), (("false",), True, True), (("tube",), "tube", False)),
        *((("0.9", "0.95"), [0.9, 0.95], False), (("0.9", "0.95"), None, True), (("6",), 6.0, False)),
    ],
)
def test_flags_are_compared_as_the_program_reads_them(words, value, expected):
    assert differs(words, value) == expected


def test_results_have_every_row_with_its_published_numbers():
    document = (ROOT / "RESULTS.md").read_text().partition(BEGIN)[2].partition(END)[0]
    for table in TABLES.values():
        part = document.partition(f"### {table.title}\n")[2].partition("###")[0]
        lines = [line for line in part.splitlines() if line.startswith("| ")][1:]
        assert len(lines) == len(table.rows)
        for line, row in zip(lines, table.rows, strict=True):
            numbers = [row.published.top1, row.published.top5]
            assert line.startswith(f"| {row.label} |")
            assert all(f"{value:g}" in line for value in numbers if value is not None)


# --- costs --------------------------------------------------------------------------------------------------


def block_flop(tokens: int, width: int) -> int:
    """Products of a transformer block: q, k, v, output and MLP (12 width^2 weights), and attention's two."""
    return 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width


@pytest.mark.parametrize("name", ["adaptive", "tube"])
def test_operations_equal_a_formula(name):
    size, frames, side, patch, depth = SIZES["tiny"], 16, 32, 8, 2
    settings = {"name": "pretrain_videomae_tiny_patch8_64", "input_size": side, "mask_type": name, "mask_ratio": 0.75}
    model = create_pretrain_model(**settings, decoder_depth=depth)
    found = forward_flop(model, torch.zeros(1, 3, frames, side, side))
    tokens, pixels = frames // 2 * (side // patch) ** 2, 2 * 3 * patch**2
    visible = tokens // 4
    expected = 2 * tokens * pixels * size.dim + size.depth * block_flop(visible, size.dim)  # embedding, encoder
    expected += 2 * visible * size.dim * size.decoder_dim + depth * block_flop(tokens, size.decoder_dim)
    expected += 2 * (tokens - visible) * size.decoder_dim * pixels  # prediction
    if name == "adaptive":
        expected += block_flop(tokens, size.dim) + 2 * tokens * size.dim  # sampler
    assert found == expected


def test_memory_without_data_is_that_of_a_real_step():
    settings = {"name": "pretrain_videomae_tiny_patch8_64", "input_size": 32, "mask_ratio": 0.9, "decoder_depth": 1}
    assert measure(settings, 1) == measure(settings, 1, data=True)


def test_documented_operations_are_the_measured_ones():
    """PRETRAIN.md names the forward pass of each recipe; reproducing/costs.json has what was measured."""
    costs, text = Measurements(reproduce.COSTS), (ROOT / "PRETRAIN.md").read_text()
    named = {
        "ssv2/pretrain_adamae_base_800e": "ViT-B adaptive .95: {}",
        "ssv2/pretrain_videomae_base_800e": "tube .9: {}",
        "ucf101/pretrain_videomae_base_3200e": "tube .75: {}",
        "ssv2/pretrain_videomae_small_2400e": "ViT-S tube .9: {}",
        "kinetics/pretrain_videomae_large_1600e": "ViT-L: {}",
        "kinetics/pretrain_videomae_huge_1600e": "ViT-H: {}",
        "kinetics/pretrain_mae_st_large_100e": "MAE-ST's ViT-L: {}",
    }
    for recipe, words in named.items():
        assert words.format(round(costs.of(recipe_flags(recipe))["gflop"])) in text.replace("\n", " "), recipe
