"""From rows of tables to runs: which recipe with which flags, in which folder, after which pre-training."""

import functools
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from modeling_finetune import parse_model_name
from modeling_pretrain import PRETRAIN_MODELS
from tools.reproducing.scales import RELATIVE, Scale
from tools.reproducing.tables import Row, Table
from utils import SettingError

ROOT = Path(__file__).resolve().parent.parent.parent
Flags = dict[str, tuple[str, ...]]  # a flag's name without dashes -> the words after it


@dataclass(frozen=True)
class Run:
    """A run of a recipe. Rows with the same run share it, and its folder, which is named after what defines it.

    Args:
        place: name of its folder: the recipe and what differs from it.
        recipe: path below scripts/ without .sh.
        words: flags after it.
        total_batch: videos a step, if not the recipe's.
        start: of fine-tuning: its pre-training, or a MODEL as in scripts/launch.sh.
    """

    place: str
    recipe: str
    words: tuple[str, ...] = ()
    total_batch: int | None = None
    start: "Run | str | None" = None

    def folder(self, seed: int | str) -> Path:
        """Its output folder below that of the scale; fine-tuning's is inside that of its pre-training."""
        if isinstance(self.start, Run):
            return self.start.folder(seed) / self.place.rpartition("/")[2]
        return Path(self.place) / f"seed{seed}"

    @functools.cached_property
    def settings(self) -> Flags:
        """Every flag that recipe and row give to the program."""
        return recipe_flags(self.recipe, self.total_batch) | parse_flags(self.words)

    @property
    def epochs(self) -> int:
        return int(self.settings["epochs"][0])

    def checkpoint(self, seed: int | str) -> Path:
        """Its last checkpoint, below the folder of the scale."""
        return self.folder(seed) / f"checkpoint-{self.epochs - 1}.pth"

    def environment(self, seed: int | str, output: Path, data: str) -> dict[str, str]:
        """The variables of scripts/launch.sh: `output` is the scale's folder, `data` that of the lists of videos."""
        found = {
            "DATA_PATH": data if self.start else f"{data}/train.csv",
            "OUTPUT_DIR": str(output / self.folder(seed)),
        }
        if self.start:
            is_run = isinstance(self.start, Run)
            found["MODEL"] = str(output / self.start.checkpoint(seed)) if is_run else self.start
        return found | ({"TOTAL_BATCH": str(self.total_batch)} if self.total_batch else {})

    @property
    def script(self) -> list[str]:
        """The recipe and its flags, to be run by bash in the repository."""
        return [f"scripts/{self.recipe}.sh", *self.words]


def parse_flags(words: tuple[str, ...] | list[str]) -> Flags:
    """Words of a command line -> its flags; the last one of each name counts."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            values = found[name] = [value] if value else []
        else:
            values.append(word)
    return {name: tuple(values) for name, values in found.items()}


def to_words(flags: Flags) -> tuple[str, ...]:
    return tuple(word for name, values in flags.items() for word in (f"--{name}", *values))


@functools.cache
def recipe_flags(recipe: str, total_batch: int | None = None) -> Flags:
    """The flags that a recipe gives to its program, as one process gets them.

    Raises:
        SettingError: there is no such recipe, or it refuses to run.
    """
    script = ROOT / f"scripts/{recipe}.sh"
    if not script.is_file():
        raise SettingError(f"there is no recipe scripts/{recipe}.sh")
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    given = {"DRY_RUN": "1", "LAUNCHER": "none", "PYTHON": sys.executable, "DATA_PATH": os.devnull, "MODEL": "scratch"}
    given |= {"TOTAL_BATCH": str(total_batch)} if total_batch else {}
    done = subprocess.run(["bash", str(script)], cwd=ROOT, env=kept | given, capture_output=True, text=True)
    if done.returncode:
        raise SettingError(done.stderr.strip())
    words = shlex.split(done.stdout)
    return parse_flags(words[next(i for i, word in enumerate(words) if word.startswith("--")) :])


def total_batch_of(flags: Flags) -> int:
    """Videos a step of one process with these flags."""
    return int(flags["batch_size"][0]) * int(flags["update_freq"][0])


def published_value(name: str, flags: Flags) -> float:
    """The value of a flag of `RELATIVE` in a published recipe, given or the model's."""
    if name in flags:
        return float(flags[name][0])
    model = flags["model"][0]
    size = parse_model_name(model, PRETRAIN_MODELS)[0]
    decoder = PRETRAIN_MODELS[model].decoder or (size.decoder_dim,)
    return {"sampler_dim": size.dim, "decoder_dim": decoder[0]}[name]


def place_of(recipe: str, differences: Flags, total_batch: int | None, start: str = "") -> str:
    """The name of a run's folder."""
    parts = [f"{name}={'_'.join(Path(word).name for word in words)}" for name, words in differences.items()]
    parts += [f"{name}={value}" for name, value in (("total_batch", total_batch), ("start", start)) if value]
    return re.sub(r"[^\w.,=+/-]", "-", ",".join([recipe, *parts]))


def carry_over(scale: Scale, recipe: str, flags: Flags, total_batch: int | None, start: Run | str | None = None) -> Run:
    """A published recipe with a row's differences, in a scale.

    Raises:
        SettingError: the scale has no recipe in its place.
    """
    named = start if isinstance(start, str) else ""
    if not scale.recipes:
        return Run(place_of(recipe, flags, total_batch, named), recipe, to_words(flags), total_batch, start)
    stem = recipe.partition("/")[2]
    kind = next((kind for kind in scale.recipes if stem.startswith(kind)), None)
    if kind is None:
        raise SettingError(f"there is nothing in the place of scripts/{recipe}.sh in {scale.title}")
    small = scale.recipes[kind]
    theirs, base = recipe_flags(recipe), parse_flags(shlex.split(small.flags))
    ours = recipe_flags(small.path, small.total_batch) | base
    for name in flags.keys() & set(RELATIVE):
        value = published_value(name, ours) * float(flags[name][0]) / published_value(name, theirs)
        flags = flags | {name: (f"{value:g}" if name == "lr" else str(max(1, round(value))),)}
    if total_batch:
        total_batch = round(total_batch_of(ours) * total_batch / total_batch_of(theirs))
    place = place_of(kind, flags, total_batch, named)
    return Run(place, small.path, to_words(base | flags), total_batch or small.total_batch, start)


def plan(table: Table, row: Row, scale: Scale, paths: dict[str, str]) -> tuple[Run | None, Run]:
    """The pre-training of a row, if it has any, and its fine-tuning.

    Args:
        paths: of files that flags name in braces.
    """
    pretrain, finetune = (getattr(table, k) if getattr(row, k) is None else getattr(row, k) for k in KINDS)
    flags = {name: tuple(fill(word, paths) for word in words) for name, words in row_flags(row.flags).items()}
    before = carry_over(scale, pretrain, flags, row.total_batch) if pretrain else None
    return before, carry_over(scale, finetune, row_flags(row.finetune_flags), None, before or row.start)


KINDS = ("pretrain", "finetune")


def row_flags(text: str) -> Flags:
    return parse_flags(shlex.split(text))


def fill(word: str, paths: dict[str, str]) -> str:
    """A word with the file whose name it has in braces; one that is not known becomes /path/to/NAME."""
    name = word[1:-1]
    return paths.get(name, f"/path/to/{name}") if word == f"{{{name}}}" else word
