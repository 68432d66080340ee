"""Submitting to SLURM, with stand-ins for its programs: what is submitted, what a job runs, its requeueing."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from golden import ROOT

SLURM = ROOT / "scripts/slurm.sh"
ADAMAE = "scripts/ssv2/pretrain_adamae_base_800e.sh"
VIDEOMAE = "scripts/ssv2/pretrain_videomae_base_800e.sh"
FINETUNE = "scripts/ssv2/finetune_adamae_base_800e_50e.sh"

# Each stand-in writes its arguments to a file, one a line. srun starts its tasks, and its status is their highest.
STUBS = {
    "sbatch": 'printf "%s\\n" "$@" >"$CALLS/sbatch"',
    "scontrol": 'printf "%s\\n" "$@" >"$CALLS/scontrol $1"',
    "srun": """
        printf "%s\\n" "$@" >"$CALLS/srun"
        highest=0 tasks=0
        while [[ $1 == --* ]]; do
            if [[ $1 == --ntasks=* ]]; then tasks=${1#*=}; fi
            shift
        done
        for ((task = 0; task < tasks; task++)); do
            status=0
            SLURM_STEP_ID=0 SLURM_PROCID=$task "$@" || status=$?
            if ((status > highest)); then highest=$status; fi
        done
        exit "$highest"
    """,
    "python": """
        printf "%s\\n" "$@" >"$CALLS/program of task $SLURM_PROCID of $SLURM_NTASKS"
        statuses=($STATUSES)
        exit "${statuses[SLURM_PROCID]:-0}"
    """,
}


class Cluster:
    """A folder of stand-ins in front of PATH, and what they were called with."""

    def __init__(self, folder: Path):
        self.bin, self.calls, self.spool = folder / "bin", folder / "calls", folder / "spool"
        self.folder, self.data = folder, folder / "the data.csv"
        for path in (self.bin, self.calls, self.spool):
            path.mkdir()
        self.data.touch()
        for name, body in STUBS.items():
            (self.bin / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (self.bin / name).chmod(0o755)

    def run(self, *command: str | Path, cwd: Path = ROOT, **environment) -> subprocess.CompletedProcess:
        env = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "PYTHON": str(self.bin / "python"),
            "DATA_PATH": str(self.data),
            **{name: str(value) for name, value in environment.items()},
        }
        command = ["bash", *map(str, command)]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)

    def calls_of(self, name: str) -> list[str] | None:
        path = self.calls / name
        return path.read_text().splitlines() if path.exists() else None

    def submit(self, *arguments: str, **environment) -> tuple[dict[str, str], list[str]]:
        """What sbatch is called with: its options, and the script with its arguments."""
        done = self.run(SLURM, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        words = self.calls_of("sbatch")
        first = next(i for i, word in enumerate(words) if not word.startswith("--"))
        return dict(word.split("=", 1) for word in words[:first]), words[first:]

    def start_job(self, script: list[str], *, task: int | None = None, **environment):
        """Runs a submitted script as SLURM does: a copy of it, with the job's variables, and for a task its log."""
        copy = shutil.copy(script[0], self.spool / "slurm_script")
        job = {"SLURM_JOB_ID": 70, "SLURM_NTASKS": 2, "SLURM_CPUS_PER_TASK": 12, "STATUSES": ""}
        if task is not None:
            job |= {"SLURM_ARRAY_JOB_ID": 70, "SLURM_ARRAY_TASK_ID": task, "SLURM_JOB_NAME": "video-mae"}
        return self.run(copy, *script[1:], **(job | environment))


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


def value_of(flag: str, words: list[str]) -> str:
    return words[words.index(flag) + 1]


def test_options_reach_sbatch(cluster):
    flags = "--nodes 4 --gpus=4 --cpus 6 --partition gpu --account lab --time 24:00:00 --constraint=a100"
    options, script = cluster.submit(*flags.split(), ADAMAE, "--epochs", "3")
    assert options == {
        "--job-name": "ssv2-pretrain_adamae_base_800e",
        "--nodes": "4",
        "--ntasks-per-node": "4",
        "--gpus-per-node": "4",
        "--cpus-per-task": "6",
        "--partition": "gpu",
        "--account": "lab",
        "--time": "24:00:00",
        "--constraint": "a100",
    }
    assert script == [str(SLURM), ADAMAE, "--epochs", "3"]


def test_script_asks_for_requeueing_and_for_a_signal_to_the_processes(cluster):
    """Without "B:" the signal goes to the steps, where the program is, not to the script."""
    header = [line.split()[1] for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=USR1@120", "--open-mode=append"} <= set(header)
    options, _ = cluster.submit(ADAMAE)
    sizes = {f"{name}={value}" for name, value in options.items() if name != "--job-name"}
    assert sizes < set(header)


def test_dry_run_shows_what_would_be_submitted_and_submits_nothing(cluster):
    arguments = ("--nodes", "2", "--array", ADAMAE, VIDEOMAE, "--num_workers", "3")
    done = cluster.run(SLURM, "--dry_run", *arguments)
    assert done.returncode == 0 and cluster.calls_of("sbatch") is None
    cluster.submit(*arguments)
    lines = done.stdout.splitlines()
    assert shlex.split(lines[0]) == ["sbatch", *cluster.calls_of("sbatch")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@120", '        scontrol requeue "$job"'} <= set(lines)
    tasks = [shlex.split(line) for line in lines[lines.index("# What its tasks run:") + 1 :]]
    assert [value_of("--mask_type", task) for task in tasks] == ["adaptive", "tube"]
    assert all(task[:2] == ["srun", "--ntasks=16"] for task in tasks)
    assert all(value_of("--num_workers", task) == "3" for task in tasks)


def test_job_starts_one_program_per_task(cluster):
    _, script = cluster.submit(ADAMAE, "--epochs", "3")
    done = cluster.start_job(script)
    assert done.returncode == 0, done.stderr
    programs = [cluster.calls_of(f"program of task {task} of 2") for task in (0, 1)]
    assert programs[0] == programs[1]
    assert programs[0][0] == str(ROOT / "run_mae_pretraining.py")
    assert value_of("--data_path", programs[0]) == str(cluster.data)
    assert value_of("--output_dir", programs[0]) == str(ROOT / "output/ssv2/pretrain_adamae_base_800e")
    assert value_of("--update_freq", programs[0]) == str(2048 // (2 * 32))
    assert programs[0][-2:] == ["--epochs", "3"]
    # The first process that leaves after saving must not take the others with it.
    assert "--kill-on-bad-exit=0" in cluster.calls_of("srun")


def test_script_submitted_by_sbatch_itself_is_the_same_job(cluster):
    _, script = cluster.submit(ADAMAE, "--epochs", "3")
    assert script == [str(SLURM), ADAMAE, "--epochs", "3"]
    direct = cluster.run(SLURM, *script[1:], DRY_RUN=1, SLURM_JOB_ID=7, SLURM_NNODES=2, SLURM_NTASKS_PER_NODE=8)
    assert shlex.split(direct.stdout)[:2] == ["srun", "--ntasks=16"]


@pytest.mark.parametrize(
    ("statuses", "status", "requeued"),
    [
        *(("75 75", 75, True), ("0 0", 0, False), ("1 75", 75, True), ("1 0", 1, False), ("75 137", 137, False)),
        ("75 138", 138, True),  # SIGUSR1 came before the program could take it
    ],
)
def test_only_a_job_that_saved_after_a_signal_is_requeued(cluster, statuses, status, requeued):
    _, script = cluster.submit(ADAMAE)
    assert cluster.start_job(script, STATUSES=statuses).returncode == status
    assert cluster.calls_of("scontrol requeue") == (["requeue", "70"] if requeued else None)


def test_a_job_that_the_signal_ends_again_and_again_is_given_up(cluster):
    _, script = cluster.submit(ADAMAE)
    assert cluster.start_job(script, STATUSES="138 138", SLURM_RESTART_COUNT=20).returncode == 138
    assert cluster.calls_of("scontrol requeue") is None
    assert cluster.start_job(script, STATUSES="75 75", SLURM_RESTART_COUNT=20).returncode == 75
    assert cluster.calls_of("scontrol requeue")


def test_array_takes_its_recipe_and_requeues_only_itself(cluster):
    options, script = cluster.submit("--array", "--at_once", "1", ADAMAE, VIDEOMAE, "--epochs", "3")
    assert (options["--array"], options["--output"]) == ("0-1%1", "%x-%A_%a.log")
    for task, (recipe, masking) in enumerate([(ADAMAE, "adaptive"), (VIDEOMAE, "tube")]):
        assert cluster.start_job(script, task=task, STATUSES="75 75").returncode == 75
        program = cluster.calls_of("program of task 0 of 2")
        assert value_of("--mask_type", program) == masking
        assert Path(value_of("--output_dir", program)).name == Path(recipe).stem
        assert program[-2:] == ["--epochs", "3"]
        assert cluster.calls_of("scontrol requeue") == ["requeue", f"70_{task}"]
    beyond = cluster.start_job(script, task=2)
    assert beyond.returncode == 1 and "no recipe for task 2" in beyond.stderr


def test_array_over_seeds_keeps_runs_apart(cluster):
    options, script = cluster.submit("--array", "--seeds", "0,5,7", ADAMAE, VIDEOMAE)
    assert options["--array"] == "0-5"
    runs = []
    for task in range(6):
        assert cluster.start_job(script, task=task).returncode == 0
        recipe = Path((ADAMAE, VIDEOMAE)[task // 3]).stem
        name = f"jobname=ssv2-{recipe}-seed{(0, 5, 7)[task % 3]}"
        assert cluster.calls_of("scontrol update") == ["update", f"jobid=70_{task}", name]
        program = cluster.calls_of("program of task 0 of 2")
        runs.append((value_of("--seed", program), Path(value_of("--output_dir", program)).name))
    assert runs == [(s, f"{Path(r).stem}-seed{s}") for r in (ADAMAE, VIDEOMAE) for s in ("0", "5", "7")]


def test_a_task_of_an_array_renames_its_log_once(cluster):
    """After a requeue the job has its new name, and SLURM appends to the renamed log."""
    _, script = cluster.submit("--array", ADAMAE, VIDEOMAE)
    log, name = cluster.folder / "video-mae-70_1.log", f"ssv2-{Path(VIDEOMAE).stem}"
    log.write_text("what SLURM has written")
    script = [script[0], *(str(ROOT / recipe) for recipe in script[1:])]
    for job_name in ("video-mae", name):
        assert cluster.start_job(script, task=1, cwd=cluster.folder, SLURM_JOB_NAME=job_name).returncode == 0
        assert [path.name for path in cluster.folder.glob("*.log")] == [f"{name}-70_1.log"]


def test_a_checkpoint_may_come_into_being_while_a_job_waits(cluster):
    given = {"MODEL": "later.pth", "DATA_PATH": cluster.folder}
    waiting = cluster.run(SLURM, "--dependency=afterok:7", FINETUNE, **given)
    assert waiting.returncode == 0 and cluster.calls_of("sbatch"), waiting.stderr
    started = cluster.start_job([str(SLURM), FINETUNE], **given)
    assert started.returncode == 1 and "MODEL=later.pth does not exist" in started.stderr


def test_submitting_where_there_is_no_slurm(cluster):
    (cluster.bin / "sbatch").unlink()
    for name in ("bash", "dirname", "basename", "grep"):
        (cluster.bin / name).symlink_to(shutil.which(name))
    done = cluster.run(SLURM, ADAMAE, PATH=cluster.bin)
    assert done.returncode == 1 and done.stderr.startswith("slurm.sh: there is no sbatch: ")
    assert cluster.run(SLURM, "--dry_run", ADAMAE).returncode == 0


def test_the_trial_under_a_real_slurm_refuses_without_root(cluster):
    (cluster.bin / "id").write_text("#!/bin/sh\necho 1000\n")
    (cluster.bin / "id").chmod(0o755)
    done = cluster.run(ROOT / "benchmarks/slurm_test.sh")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "need root" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "name the recipe to run"),
        (["--nodes", "2"], {}, "name the recipe to run"),
        (["scripts/ssv2/none.sh"], {}, "no such recipe: scripts/ssv2/none.sh"),
        (["--nodes", "two", ADAMAE], {}, "--nodes two: it is a number"),
        (["--time"], {}, "--time needs a value"),
        (["--node", "2", ADAMAE], {}, "unknown option --node"),
        (["--array=0-1", ADAMAE], {}, "--array=0-1 is worked out here"),
        ([ADAMAE, VIDEOMAE], {}, "2 recipes: --array makes them tasks of one job"),
        (["--seeds", "0,,1", ADAMAE], {}, "--seeds 0,,1: write whole numbers with commas between"),
        (["--seeds", "0 1", ADAMAE], {}, "--seeds 0 1: write whole numbers with commas between"),
        (["--seeds", "0,1", ADAMAE], {"OUTPUT_DIR": "out"}, "one folder for 2 runs"),
        ([ADAMAE], {"DATA_PATH": ""}, "DATA_PATH is not set"),
        ([ADAMAE], {"DATA_PATH": "no such list"}, "DATA_PATH=no such list does not exist"),
        ([FINETUNE], {"MODEL": "no.pth"}, "MODEL=no.pth does not exist"),
        (["-p", "gpu", ADAMAE], {}, "unknown option -p; write other sbatch options as --name=value"),
        ([ADAMAE, "-p", "gpu"], {}, "-p is no flag of the programs; options of slurm.sh and sbatch stand before"),
        ([ADAMAE, "--lr", "-1e-3", "--nodes=2"], {}, "--nodes=2 is no flag of the programs"),
        (["--nodes", "3", ADAMAE], {}, "24 GPUs cannot share a total batch of 2048"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_submitted(cluster, arguments, environment, message):
    done = cluster.run(SLURM, *arguments, **environment)
    assert done.returncode == 1 and cluster.calls_of("sbatch") is None
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
