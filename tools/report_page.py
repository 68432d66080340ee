"""Puts runs on one web page, index.html: results, curves, pictures, settings and commands.

    python tools/report_page.py output/mine output/mine_10 --output output
    python tools/report_page.py output/demo output/demo/adaptive output/demo/random --title "The demo"

RUN is the output folder of a pre-training or fine-tuning, or any folder with pictures of tools/visualize.py. The page
takes what it finds there: log.txt and TensorBoard's events (curves; runs of one program share a chart), test.json,
report.json and finetuning.json (tables), command.txt, args.json or a checkpoint (settings), and pictures. It is written
to --output, by default the first RUN, links pictures by relative paths, and needs neither a network nor a server: open
the file, or move the folder that holds it together with the runs.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from tools.reporting.chart import NUM_COLOURS, Curve, draw_chart
from tools.reporting.folders import Folder, read_folder
from utils import UserError, whole_file

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --back: #fff; --box: #f6f8fa }
:root { --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989; --c5: #57606a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --back: #0d1117; --box: #151b23 }
  :root { --c0: #4493f8; --c1: #f0883e; --c2: #3fb950; --c3: #ab7df8; --c4: #db61a2; --c5: #9198a1 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.25 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
a { color: var(--c0) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left }
pre { padding: .7rem; background: var(--box); white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
figure { margin: 1rem 0 } figcaption { color: var(--soft); font-size: .9rem }
img { display: block; max-width: max(100%, 36rem); height: auto }
.key { white-space: nowrap }
svg { width: 100%; height: auto; font-size: 12px } svg text { fill: var(--soft) }
svg .grid { stroke: var(--line) } polyline { fill: none; stroke-width: 1.8 }
"""
STYLE += "".join(
    f".c{k} polyline {{ stroke: var(--c{k}) }} .c{k} circle, span.c{k} {{ fill: var(--c{k}); color: var(--c{k}) }}\n"
    for k in range(NUM_COLOURS)
)
FRONT = {  # curves shown without asking
    "pre-training": ("loss_reconstruction", "probs_entropy", "probs_max"),
    "fine-tuning": ("loss", "model_top1", "ema_top1"),
}


def number(value: object) -> str:
    """A value in a table: numbers with four digits at most."""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def words(name: str) -> str:
    return name.replace("_", " ")


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table that scrolls where it is wider than the page; the first cell of a row is its heading."""
    cells = "".join(f"<th scope='col'>{escape(text)}</th>" for text in head)
    lines = [f"<div class='wide'><table><thead><tr>{cells}</tr></thead><tbody>"]
    for first, *others in rows:
        cells = "".join(f"<td>{escape(number(value))}</td>" for value in others)
        lines.append(f"<tr><th scope='row'>{escape(str(first))}</th>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def result_table(found: dict[str, dict]) -> str:
    """A table of report.json or finetuning.json: a column per run, a row per number."""
    rows = list(dict.fromkeys(name for values in found.values() for name in values))
    return table(["", *found], [[words(name), *(r.get(name, "-") for r in found.values())] for name in rows])


def summary(folders: dict[str, Folder]) -> str:
    rows = []
    for name, folder in folders.items():
        if not folder.log:
            continue
        last = folder.log[-1]
        loss = last.get("loss_reconstruction", last.get("loss", "-"))
        minutes = sum(entry.get("seconds", 0) for entry in folder.log) / 60
        best = (last.get("best") or {}).get("top1", "-")
        rows.append([name, folder.kind, last["epoch"] + 1, minutes, loss, best, folder.test.get("top1", "-")])
    head = ["run", "program", "epochs", "minutes", "training loss", "best validation top-1, %", "test top-1, %"]
    return table(head, rows) if rows else ""


def charts(folders: dict[str, Folder], kind: str) -> str:
    """One chart per quantity with the curves of all these runs: over steps where all have events, else epochs."""
    by_step = all(folder.steps for folder in folders.values())
    curves = {name: folder.steps if by_step else folder.epochs for name, folder in folders.items()}
    names = list(dict.fromkeys(name for found in curves.values() for name in found))
    drawn = {name: chart(name, {run: c.get(name, []) for run, c in curves.items()}, by_step=by_step) for name in names}
    front = [drawn.pop(name) for name in FRONT[kind] if drawn.get(name)]
    rest = [figure for figure in drawn.values() if figure]
    more = f"<details><summary>More curves</summary><div class='charts'>{''.join(rest)}</div></details>"
    return f"<div class='charts'>{''.join(front)}</div>{more if rest else ''}"


def chart(name: str, curves: dict[str, Curve], *, by_step: bool) -> str:
    """A figure; empty where no curve has two points."""
    if max(map(len, curves.values())) < 2:
        return ""
    key = " ".join(
        f"<span class='key'><span class='c{k % NUM_COLOURS}'>&#9679;</span> {escape(run)}</span>"
        for k, (run, curve) in enumerate(curves.items())
        if curve
    )
    svg = draw_chart(curves, x_label="step" if by_step else "epoch", y_label=words(name))
    return f"<figure><figcaption><b>{escape(words(name))}</b> {key}</figcaption>{svg}</figure>"


def link(path: Path, output: Path) -> str:
    return quote(Path(os.path.relpath(path, output)).as_posix())


def picture(paths: list[Path], folder: Path, output: Path) -> str:
    """The first of these files, with links to the others."""
    shown, *others = paths
    name = shown.relative_to(folder).as_posix()
    more = " ".join(f"<a href='{link(path, output)}'>{escape(path.name)}</a>" for path in others)
    source = link(shown, output)
    image = f"<a href='{source}'><img src='{source}' alt='{escape(name)}'></a>"
    return f"<figure><div class='wide'>{image}</div><figcaption>{escape(name)} {more}</figcaption></figure>"


def section(name: str, folder: Folder, output: Path) -> str:
    """What one folder has of its own."""
    parts = [f"<section><h2>{escape(name)}</h2>"]
    if folder.command:
        parts.append(f"<pre>{escape(folder.command)}</pre>")
    for heading, found in folder.tables.items():
        parts.append(f"<h3>{escape(heading)}</h3>{result_table(found)}")
    parts += [picture(paths, folder.path, output) for paths in folder.pictures]
    if folder.test:
        rows = table(["", ""], [(words(k), v) for k, v in folder.test.items()])
        parts.append(f"<details><summary>Test</summary>{rows}</details>")
    if folder.settings:
        rows = table(["flag", "value"], sorted((f"--{k}", v) for k, v in folder.settings.items()))
        parts.append(f"<details><summary>Settings</summary>{rows}</details>")
    return "\n".join([*parts, "</section>"])


def build_page(folders: dict[str, Folder], output: Path, title: str) -> str:
    """The page of these folders, by the names they get on it, for a file in `output`."""
    sections = {name: section(name, folder, output) for name, folder in folders.items()}
    parts = [f"<h1>{escape(title)}</h1>", summary(folders)]
    parts += [sections.pop(name) for name, folder in folders.items() if not folder.log]  # reports on the runs
    for kind in ("pre-training", "fine-tuning"):
        runs = {name: folder for name, folder in folders.items() if folder.log and folder.kind == kind}
        if runs:
            parts.append(f"<section><h2>Curves of {kind}</h2>{charts(runs, kind)}</section>")
    parts += sections.values()
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    head += f"<link rel='icon' href='data:,'><title>{escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def short_names(paths: list[Path]) -> list[str]:
    """The folders' names below the one that holds them all; that one goes by its own."""
    whole = [Path(os.path.abspath(path)) for path in paths]
    shared = Path(os.path.commonpath(whole))
    return [path.name if path == shared else path.relative_to(shared).as_posix() for path in whole]


def write_page(paths: list[Path], output: Path, title: str | None) -> Path:
    """Writes index.html and returns its path.

    Raises:
        SettingError: as `read_folder`.
    """
    paths = list(dict.fromkeys(paths))
    folders = {name: read_folder(path) for name, path in zip(short_names(paths), paths, strict=True)}
    output.mkdir(parents=True, exist_ok=True)
    with whole_file(output / "index.html", "w") as file:
        file.write(build_page(folders, output, title or ", ".join(folders)))
    return output / "index.html"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of index.html (default: the first RUN)")
    parser.add_argument("--title", help="heading of the page (default: the runs' names)")
    args = parser.parse_args(argv)
    try:
        print(f"wrote {write_page(args.runs, args.output or args.runs[0], args.title)}")
    except (UserError, OSError) as error:
        raise SystemExit(f"report_page.py: error: {error}") from error


if __name__ == "__main__":
    main()
