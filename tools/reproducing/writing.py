"""Tables of published and own numbers as Markdown and CSV."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

from tools.reproducing.tables import Table
from utils import SettingError, whole_file


def number(value: float | None, form: str = "g", missing: str = "") -> str:
    return missing if value is None else format(value, form)


def pair(found: dict, first: str, second: str, form: str = "g") -> str:
    """Two numbers as `a / b`; "" if there are none."""
    values = [number(found[name], form, "-") for name in (first, second)]
    return "" if values == ["-", "-"] else " / ".join(values)


def with_deviation(found: dict, name: str) -> str:
    if found[name] is None:
        return ""
    return f"{found[name]:.2f}" + (
        f" ± {found[f'{name}_deviation']:.2f}" if found[f"{name}_deviation"] is not None else ""
    )


def state_of(found: dict) -> str:
    """How many seeds are done, unfinished runs, and differences from the recipe."""
    done, wanted = found["seeds"], found["wanted_seeds"]
    parts = [f"{done} of {wanted} seeds"] if 0 < done < wanted else ["finished"] if done == wanted else []
    parts += [*found["unfinished"], *(f"DIFFERS, {one}" for one in found["differs"])]
    return "; ".join(parts) or "not run"


COLUMNS: dict[str, Callable[[dict], str]] = {
    "": lambda r: r["label"],
    "differs from the recipe by": lambda r: f"`{r['flags']}`" if r["flags"] else "",
    "published top-1 / top-5": lambda r: pair(r, "published_top1", "published_top5"),
    "our top-1": lambda r: with_deviation(r, "top1"),
    "our top-5": lambda r: with_deviation(r, "top5"),
    "seeds": lambda r: str(r["seeds"] or ""),
    "difference of top-1": lambda r: number(r["top1_difference"], "+.2f"),
    "GB for 16 clips: published, ours": lambda r: pair(r, "published_gb", "gb", ".1f"),
    "GFLOP: published, ours": lambda r: pair(r, "published_gflop", "gflop", ".0f"),
    "visible tokens": lambda r: number(r["visible"], "d"),
    "clips/s": lambda r: number(r["clips_per_second"], ".1f"),
    "hours without / with loading: published": lambda r: pair(r, "published_hours_without_loading", "published_hours"),
    "hours without / with loading: ours": lambda r: pair(r, "hours_without_loading", "hours", ".2f"),
    "hours of fine-tuning": lambda r: number(r["finetuning_hours"], ".2f"),
    "checkpoint": lambda r: f"`{r['checkpoint']}`" if r["checkpoint"] else "",
    "state": state_of,
}
ALWAYS = list(COLUMNS)[:8]  # the others are left out where no row has them


def markdown(table: Table, rows: list[dict]) -> str:
    """A table as Markdown, with its recipes."""
    cells = {title: [of(row) for row in rows] for title, of in COLUMNS.items()}
    titles = [title for title in COLUMNS if title in ALWAYS or any(cells[title])]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    lines += [f"| {' | '.join(cells[title][k] for title in titles)} |" for k in range(len(rows))]
    recipes = " and ".join(f"`scripts/{recipe}.sh`" for recipe in (table.pretrain, table.finetune) if recipe)
    about = f"Published: {table.source}." + (f" Recipes: {recipes}." if recipes else "")
    return f"### {table.title}\n\n{about}\n\n" + "\n".join(lines) + "\n"


def as_csv(tables: dict[str, list[dict]]) -> str:
    """All rows as CSV, with a column for each number."""
    text = io.StringIO()
    first = next(iter(tables.values()))[0]
    writer = csv.DictWriter(text, ["table", *first], lineterminator="\n")
    writer.writeheader()
    for name, rows in tables.items():
        for row in rows:
            flat = {key: "; ".join(value) if isinstance(value, list) else value for key, value in row.items()}
            writer.writerow({"table": name, **flat})
    return text.getvalue()


BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def write_into(path: Path, text: str) -> None:
    """Replaces what stands between the two markers of a document.

    Raises:
        SettingError: it has no such markers.
    """
    old = path.read_text() if path.is_file() else ""
    if old.count(BEGIN) != 1 or END not in old.partition(BEGIN)[2]:
        raise SettingError(f"--into {path}: it needs a line {BEGIN} and, below it, a line {END}")
    before, _, rest = old.partition(BEGIN)
    with whole_file(path, "w") as file:
        file.write(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
