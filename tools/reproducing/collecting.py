"""What came out of the runs of a row, beside what was published."""

import json
import statistics
from pathlib import Path

from runs.checkpoints import LAST, epoch_checkpoints, flags_of, glance_at_checkpoint
from runs.flags import common_parser
from tools.reproducing.measuring import Measurements
from tools.reproducing.plan import Run, total_batch_of
from tools.reproducing.running import is_finished
from tools.reproducing.tables import Row

# flags that may differ: where a run is, how it is started, what it shows
NEUTRAL = common_parser("", "").neutral | {"data_path", "labels", "vis_freq", "finetune", "seed"}


def read_log(folder: Path) -> list[dict]:
    """The entries of log.txt; of an epoch that was run twice, the last one."""
    path = folder / "log.txt"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return list({entry["epoch"]: entry for entry in entries}.values())


def differs(words: tuple[str, ...], value: object) -> bool:
    """Whether a flag's words on a command line are not the value that a checkpoint has of it."""
    if isinstance(value, bool) or not words:
        return (words or ("true",))[0].lower() not in (
            ("true", "1", "yes", "on") if value else ("false", "0", "no", "off")
        )
    values = value if isinstance(value, list | tuple) else [value]
    return [as_number(word) for word in words] != [as_number(str(one)) for one in values]


def as_number(word: str) -> float | str:
    """1e-3 and 0.001 are the same value of a flag."""
    try:
        return float(word)
    except ValueError:
        return word


def deviations(run: Run, seed: int, output: Path) -> list[str]:
    """What a run's newest checkpoint was made with that its recipe and row say otherwise, one string each."""
    folder = output / run.folder(seed)
    path = next((path for path in (*epoch_checkpoints(folder), folder / LAST) if path.is_file()), None)
    if path is None:
        return []
    try:
        state = glance_at_checkpoint(path)
    except Exception:  # as `read_checkpoint`: a damaged file can make torch.load raise any exception
        return [f"seed {seed}: {path.name} is damaged"]
    flags, layout = flags_of(state), state.get("layout")
    found = [
        f"--{name} {flags[name]} instead of {' '.join(words) or 'true'}"
        for name, words in run.settings.items()
        if name in flags and name not in NEUTRAL and differs(words, flags[name])
    ]
    if "seed" in flags and flags["seed"] != seed:
        found.append(f"--seed {flags['seed']} instead of {seed}")
    if layout and (total := layout["world_size"] * layout["batch_size"] * layout["update_freq"]):
        wanted = total_batch_of(run.settings)
        found += [f"{total} videos a step instead of {wanted}"] if total != wanted else []
    return [f"seed {seed}: {one}" for one in found]


def progress(run: Run, seed: int, output: Path) -> str:
    """How far a run of a row that is not finished is, "" for one that has not begun."""
    done, name = len(read_log(output / run.folder(seed))), run.place.rpartition("/")[2]
    if done < run.epochs:
        return f"seed {seed}: {name} at epoch {done} of {run.epochs}" if done else ""
    return f"seed {seed}: {name} is {'trained, not tested' if run.start else 'done'}"


def mean_and_deviation(values: list[float]) -> tuple[float | None, float | None]:
    return (statistics.mean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None)


def seconds_of(run: Run, seed: int, output: Path) -> tuple[float, float]:
    """Seconds of training so far, without and with waiting for data."""
    entries = read_log(output / run.folder(seed))
    return (
        sum(entry["seconds"] * (1 - entry["data_wait"]) for entry in entries),
        sum(entry["seconds"] for entry in entries),
    )


def accuracies(row: Row, results: list[dict]) -> dict[str, float | None]:
    """Published accuracies, means and standard deviations of ours over seeds, and the differences."""
    found: dict[str, float | None] = {}
    for name in ("top1", "top5"):
        mean, deviation = mean_and_deviation([result[name] for result in results])
        wanted = getattr(row.published, name)
        found |= {f"published_{name}": wanted, name: mean, f"{name}_deviation": deviation}
        found[f"{name}_difference"] = mean - wanted if None not in (mean, wanted) else None
    return found | {"seeds": len(results)}  # that are done


def costs_of(row: Row, cost: dict[str, float]) -> dict[str, float | None]:
    """Published and measured memory and operations, and the number of visible tokens."""
    gb = cost["gib"] * 2**30 / 1e9 if cost else None
    found = {"published_gb": row.published.gb, "gb": gb, "published_gflop": row.published.gflop}
    return found | {"gflop": cost.get("gflop"), "visible": cost.get("visible")}


def times(row: Row, first: Run, after: Run, trained: list[int], tested: list[int], output: Path) -> dict:
    """Clips a second and hours of the first run of a row, over the seeds it is finished with; hours of fine-tuning."""
    logs = [read_log(output / first.folder(seed)) for seed in trained]
    speeds = [statistics.mean(entry["clips_per_second"] for entry in log) for log in logs if log]
    hours = [[seconds / 3600 for seconds in seconds_of(first, seed, output)] for seed in trained]
    found = {"clips_per_second": mean_and_deviation(speeds)[0]}
    for place, name in enumerate(("hours_without_loading", "hours")):
        found[f"published_{name}"] = row.published.hours[place] if row.published.hours else None
        found[name] = mean_and_deviation([both[place] for both in hours])[0]
    later = [seconds_of(after, seed, output)[1] / 3600 for seed in tested] if after != first else []
    return found | {"finetuning_hours": mean_and_deviation(later)[0]}


def collect_row(
    row: Row, runs: tuple[Run | None, Run], seeds: list[int], output: Path, costs: Measurements
) -> dict[str, object]:
    """Everything that is known about a row: published numbers, ours, state.

    Args:
        seeds: which count.
        output: folder of the scale.
    """
    before, after = runs
    first, both = before or after, [run for run in runs if run]
    trained, tested = ([seed for seed in seeds if is_finished(run, seed, output)] for run in (first, after))
    results = [json.loads((output / after.folder(seed) / "test.json").read_text()) for seed in tested]
    there = [path for seed in seeds for run in both if (output / (path := run.checkpoint(seed))).is_file()]
    return {
        "row": row.name,
        "label": row.label,
        "wanted_seeds": len(seeds),
        "flags": row.flags,
        **accuracies(row, results),
        **costs_of(row, costs.of(before.settings) if before else {}),
        **times(row, first, after, trained, tested, output),
        "checkpoint": str(there[-1]) if there else "",
        "unfinished": [
            text for seed in seeds if seed not in tested for run in both if (text := progress(run, seed, output))
        ],
        "differs": [text for seed in seeds for run in both for text in deviations(run, seed, output)],
    }
