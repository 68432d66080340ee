"""Runs the tables of the AdaMAE, VideoMAE and MAE-ST papers, and collects what came out beside what was published.

    python tools/reproduce.py --list
    python tools/reproduce.py --table adamae-a --print --path ssv2=/data/ssv2
    python tools/reproduce.py --table adamae-a --submit slurm --seeds 0,1,2 --path ssv2=/data/ssv2 \\
        --slurm "--nodes 8 --partition gpu --time 24:00:00"
    python tools/reproduce.py --table adamae-a --row tube90 --row adaptive95 --scale demo --seeds 0,1,2 --jobs 2 --run
    python tools/reproduce.py --collect --seeds 0,1,2 --into RESULTS.md

A row is a recipe of scripts/ with a few other flags (tools/reproducing/tables.py): pre-training, then fine-tuning from
its checkpoint with the same seed. Rows that share a run share its folder,
--output/<scale>/<recipe and flags>/seed<seed>.

--run        runs what is not finished here; a signal or Ctrl-C saves, and the same command continues. Each run's output
             goes to console.txt in its folder.
--submit     submits it through scripts/slurm.sh: array jobs over seeds, fine-tuning of a seed after its pre-training.
--measure    measures operations, and memory of a step of 16 clips, without running anything; on a GPU the GPU's memory.
--collect    writes tables.md and tables.csv to --output/<scale>, and with --into also into a document.

A --scale other than full carries the rows over to a small world (tools/reproducing/scales.py).
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from tools.reproducing.collecting import collect_row
from tools.reproducing.measuring import Measurements
from tools.reproducing.plan import ROOT, Run, plan
from tools.reproducing.running import Chains, Runner, chains_of, shell_line, submit
from tools.reproducing.scales import SCALES, Scale
from tools.reproducing.tables import TABLES, Row
from tools.reproducing.writing import as_csv, markdown, write_into
from utils import SettingError, UserError, whole_file

COSTS = Path(__file__).resolve().parent / "reproducing/costs.json"
Chosen = dict[str, list[tuple[Row, tuple[Run | None, Run]]]]  # rows and their runs by table


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="list tables and rows, with the published accuracies")
    what.add_argument("--print", action="store_true", help="print the commands")
    what.add_argument("--run", action="store_true", help="run here what is not finished")
    what.add_argument("--submit", choices=["slurm"], help="submit what is not finished")
    what.add_argument("--measure", action="store_true", help="measure operations and memory")
    what.add_argument("--collect", action="store_true", help="write the tables")
    add = parser.add_argument
    add("--table", action="append", choices=list(TABLES), help="a table; may be repeated (default: all)")
    add("--row", action="append", help="a row of it; may be repeated (default: all)")
    add("--scale", default="full", choices=list(SCALES), help="default: %(default)s")
    add("--seeds", default="0", help="seeds of each run, such as 0,1,2 (default: %(default)s)")
    add("--output", type=Path, default=Path("output/reproduce"), help="folder of all runs (default: %(default)s)")
    what_path = (
        "folder of the lists of ssv2, kinetics, ucf101 or a small world, or a file that a row needs; may be repeated"
    )
    add("--path", action="append", default=[], metavar="NAME=PATH", help=what_path)
    add("--jobs", type=int, default=1, help="runs at the same time with --run (default: %(default)s)")
    add("--slurm", default="", metavar="OPTIONS", help="options of scripts/slurm.sh, --dry_run among them")
    add("--into", type=Path, help="document with markers between which --collect writes the tables")
    return parser


def choose_rows(args: argparse.Namespace, paths: dict[str, str]) -> Chosen:
    """The rows that the flags name, with their runs; in a small world those that it has.

    Raises:
        SettingError: there is no such row, or the small world has none of them.
    """
    scale, chosen = SCALES[args.scale], {}
    for name in args.table or TABLES:
        table = TABLES[name]
        rows = [row for row in table.rows if not args.row or row.name in args.row]
        here = [(row, plan(table, row, scale, paths)) for row in rows if row.small or not scale.recipes]
        chosen |= {name: here} if here else {}
    known = {row.name for name in args.table or TABLES for row in TABLES[name].rows}
    if unknown := set(args.row or []) - known:
        raise SettingError(f"--row {min(unknown)}: there is no such row; --list lists them")
    if not chosen:
        raise SettingError(f"--scale {args.scale}: {scale.title} has none of these rows, which differ in model or data")
    return chosen


def named_paths(entries: list[str]) -> dict[str, str]:
    """NAME=PATH, ... -> absolute paths by name.

    Raises:
        SettingError: an entry is not NAME=PATH.
    """
    pairs = [entry.partition("=") for entry in entries]
    if wrong := [entry for entry, (name, _, path) in zip(entries, pairs, strict=True) if not (name and path)]:
        raise SettingError(f"--path {wrong[0]}: it is NAME=PATH, such as ssv2=/data/ssv2")
    return {name: os.path.abspath(path) for name, _, path in pairs}


def environment_of(run: Run, seed: int | str, output: Path, scale: Scale, paths: dict[str, str]) -> dict[str, str]:
    """The variables with which a run is started."""
    name = run.recipe.partition("/")[0]
    data = paths.get(name) or (str(ROOT / scale.data[0]) if scale.data[0] else f"/path/to/{name}")
    return scale.environment | run.environment(seed, output.absolute(), data)


def check_paths(chains: Chains, scale: Scale, paths: dict[str, str]) -> None:
    """Checks that videos and files of the runs are there.

    Raises:
        SettingError: says which is missing and how to name or make it.
    """
    for run in [run for first, followers in chains.items() for run in (first, *followers)]:
        name = run.recipe.partition("/")[0]
        data = Path(environment_of(run, 0, Path(), scale, paths)["DATA_PATH"])
        if not data.exists():
            make = (
                f"make it with `{scale.data[1]}`, or"
                if scale.data[1]
                else "its folder has train.csv, val.csv, test.csv;"
            )
            raise SettingError(f"{data} is not there: {make} name it by --path {name}=FOLDER")
        if missing := [word for word in run.words if word.startswith("/path/to/")]:
            raise SettingError(f"a row needs a file: name it by --path {Path(missing[0]).name}=FILE")


def list_tables(chosen: Chosen) -> None:
    for name, rows in chosen.items():
        print(f"{name}: {TABLES[name].title}")
        for row, _ in rows:
            numbers = [f"{value:g}" for value in (row.published.top1, row.published.top5) if value is not None]
            print(f"    {row.name:24} {row.label:40} {' / '.join(numbers) or '-':14} {row.flags}".rstrip())


def print_commands(chosen: Chosen, seeds: list[int], output: Path, scale: Scale, paths: dict[str, str]) -> None:
    for name, rows in chosen.items():
        for row, runs in rows:
            print(f"# {name}, {row.name}: {row.label}")
            for seed in seeds:
                for run in filter(None, runs):
                    given = {"SEED": str(seed), **environment_of(run, seed, output, scale, paths)}
                    print(shell_line(given, run.script))


def measure_rows(chosen: Chosen, costs: Measurements) -> None:
    for name, rows in chosen.items():
        for row, (before, _) in rows:
            if before and costs.add(before.settings):
                found = costs.of(before.settings)
                print(f"{name}, {row.name}: {found['gflop']:.1f} GFLOP, {found['gib']:.2f} GiB", flush=True)


def write_tables(chosen: Chosen, seeds: list[int], output: Path, costs: Measurements, into: Path | None) -> None:
    found = {
        name: [collect_row(row, runs, seeds, output, costs) for row, runs in rows] for name, rows in chosen.items()
    }
    text = "\n".join(markdown(TABLES[name], rows) for name, rows in found.items())
    output.mkdir(parents=True, exist_ok=True)
    for name, content in (("tables.md", text), ("tables.csv", as_csv(found))):
        with whole_file(output / name, "w") as file:
            file.write(content)
    if into:
        write_into(into, text)
    print(text, end="")


def work(args: argparse.Namespace) -> int:
    """Does what the flags say; returns the exit status."""
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError as error:
        raise SettingError(f"--seeds {args.seeds}: numbers with commas between them, such as 0,1,2") from error
    if args.jobs < 1:
        raise SettingError(f"--jobs {args.jobs} must be at least 1")
    scale, output, paths = SCALES[args.scale], (args.output / args.scale).absolute(), named_paths(args.path)
    chosen = choose_rows(args, paths)
    chains = chains_of([runs for rows in chosen.values() for _, runs in rows])

    def environment(run: Run, seed: int | str) -> dict[str, str]:
        return environment_of(run, seed, output, scale, paths)

    if args.list:
        list_tables(chosen)
    elif args.print:
        print_commands(chosen, seeds, output, scale, paths)
    elif args.measure or args.collect:
        costs = Measurements(
            output / "costs.json" if torch.cuda.is_available() or args.scale != "full" else COSTS, COSTS
        )
        if args.measure:
            measure_rows(chosen, costs)
        else:
            write_tables(chosen, seeds, output, costs, args.into)
    else:
        check_paths(chains, scale, paths)
        if args.submit:
            print("\n".join(submit(chains, seeds, output, environment, shlex.split(args.slurm))))
        else:
            runner = Runner(output, lambda run, seed: {"SEED": str(seed), **environment(run, seed)}, print_line)
            return runner(chains, seeds, args.jobs)
    return 0


def print_line(text: str) -> None:
    print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    try:
        return work(get_args_parser().parse_args(argv))
    except (UserError, OSError) as error:
        raise SystemExit(f"reproduce.py: error: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
