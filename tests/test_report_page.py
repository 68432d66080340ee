"""The page of runs: what it says, that it stands alone, and how a browser shows it."""

import json
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from chromium import Browser
from PIL import Image

from runs.checkpoints import save_checkpoint
from runs.logs import RunLog
from runs.reporters import TensorBoard
from tools import report_page
from tools.reporting.chart import draw_chart, ticks
from utils import SettingError

VOID = {"meta", "link", "img", "path", "circle", "polyline", "br"}


class Page(HTMLParser):
    """A page's links, text and unclosed elements; an element that closes another's is an error."""

    def __init__(self, path):
        super().__init__()
        self.stack, self.links, self.text = [], [], []
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def write_run(folder, entries: list[dict], *, flags: dict, events: bool = True, command: str = ""):
    """A folder as the programs leave it; `entries` are the lines of log.txt without their epochs."""
    log = RunLog(output_dir=str(folder), reporters=[TensorBoard(str(folder))] if events else [])
    folder.mkdir(parents=True)
    log.command(command.split() or ["python"], processes=1)
    for epoch, entry in enumerate(entries):
        log.epoch({"epoch": epoch, "seconds": 60.0, **entry})
        log.scalars(10 * epoch + 10, {name: value for name, value in entry.items() if isinstance(value, float)})
    log.close()
    save_checkpoint(folder / "checkpoint-0.pth", {"epoch": 0, "args": flags})
    return folder


def write_picture(path, frames: int = 1, size: tuple[int, int] = (900, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = [Image.new("RGB", size, (80 * k, 90, 200)) for k in range(frames)]
    first.save(path, save_all=frames > 1, append_images=others) if frames > 1 else first.save(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pre-training, a fine-tuning and a report on both, in a folder whose name a link must escape."""
    root = tmp_path_factory.mktemp("page") / "all runs #1 <b>"
    losses = [{"loss_reconstruction": 1.0 / (k + 1), "loss": 2.0 / (k + 1), "lr": 0.1} for k in range(4)]
    words = "python run_mae_pretraining.py --data_path <train>&.csv"
    adaptive = write_run(root / "adaptive", losses, flags={"mask_ratio": 0.95}, command=words)
    for epoch in (1, 3):
        write_picture(adaptive / "pictures" / f"epoch-{epoch:04d}.png")
    tuned = [
        {"loss": 2.0 - k, "validation": {"model": {"top1": 50.0 + k}}, "best": {"top1": 50.0 + k}} for k in range(2)
    ]
    finetuned = write_run(root / "fine-tuned", tuned, flags={"lr": 1e-3})
    (finetuned / "test.json").write_text(json.dumps({"top1": 61.25, "videos": 80}))
    report = {"adaptive": {"loss": 0.41392, "entropy": 0.97}, "random": {"loss": 0.4112}}
    (root / "report.json").write_text(json.dumps(report))
    write_picture(root / "report.png")
    write_picture(root / "pictures" / "a clip.gif", frames=3)
    for name in ("a clip.png", "a clip_masks.png"):
        write_picture(root / "pictures" / name)
    report_page.main([*map(str, (root, adaptive, finetuned)), "--title", "Runs & results"])
    return root


def test_the_page_is_complete_and_stands_alone(runs):
    page = Page(runs / "index.html")
    assert page.stack == []
    local = [link for link in page.links if link != "data:,"]
    assert local and not [link for link in local if ":" in link or link.startswith("/")]
    assert [link for link in local if not (runs / unquote(link)).is_file()] == []
    source = (runs / "index.html").read_text()
    assert not [word for word in ("http:", "https:", "@import", "url(", "<script") if word in source]


def test_the_page_says_what_the_folders_hold(runs):
    page = Page(runs / "index.html")
    text = " ".join(page.text)
    for words in ("Runs & results", "python run_mae_pretraining.py --data_path '<train>&.csv'", "--mask_ratio", "0.95"):
        assert words in text
    for value in ("0.4139", "0.4112", "61.25", "51"):
        assert value in text
    assert text.index("Pre-trained, on held-out videos") < text.index("Curves of pre-training") < text.index("0.95")


def test_a_clip_has_one_picture_with_links_to_the_others_and_epochs_only_the_last(runs):
    source = (runs / "index.html").read_text()
    assert "<img src='pictures/a%20clip.gif'" in source
    assert "<a href='pictures/a%20clip_masks.png'" in source and "<img src='pictures/a%20clip_masks" not in source
    assert "epoch-0003.png" in source and "epoch-0001" not in source


def test_a_run_that_was_moved_or_cleaned_keeps_its_page(tmp_path):
    """Without events and checkpoints the curves come from log.txt; an epoch that was run twice counts once."""
    folder = write_run(tmp_path / "run", [{"loss": 3.0}, {"loss": 2.0}], flags={}, events=False)
    with (folder / "log.txt").open("a") as log:
        log.write(json.dumps({"epoch": 1, "loss": 1.5, "seconds": 60.0, "best": {"top1": 7.0}}) + "\n")
    (folder / "checkpoint-0.pth").unlink()
    report_page.main([str(folder)])
    source = (folder / "index.html").read_text()
    assert source.count("<polyline") == 1 and ">epoch</text>" in source
    assert "<td>2</td><td>2</td><td>1.5</td><td>7</td>" in source  # epochs, minutes, loss, best


def test_what_is_no_run_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*nowhere: no such folder"):
        report_page.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"no log\.txt, report\.json, finetuning\.json or pictures"):
        report_page.main([str(tmp_path)])
    (tmp_path / "log.txt").write_text('{"loss": 1}\n')
    with pytest.raises(SystemExit, match=r"log\.txt: not the log\.txt of a run: a line has no epoch"):
        report_page.main([str(tmp_path)])
    (tmp_path / "log.txt").unlink()
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(SettingError, match=r"report\.json: not a JSON object"):
        report_page.read_folder(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 41, [0, 10, 20, 30, 40]), (0.97, 0.99, [0.97, 0.975, 0.98, 0.985, 0.99])],
)
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    np.testing.assert_allclose(ticks(low, high), expected, atol=1e-12)


def test_a_chart_leaves_out_what_is_not_finite():
    drawn = draw_chart({"a": [(1, 2.0), (2, float("nan")), (3, 4.0)], "b": []}, x_label="step", y_label="<loss>")
    assert drawn.count("<polyline") == 1 and "nan" not in drawn and "&lt;loss&gt;" in drawn
    points = drawn.split('points="')[1].split('"')[0].split()
    assert len(points) == 2


def test_a_browser_shows_all_pictures_without_complaint_on_a_desk_and_on_a_phone(runs, tmp_path):
    browser = Browser(tmp_path)
    try:
        for width, dark in ((1280, False), (390, False), (390, True)):
            browser.open(runs / "index.html", width=width, dark=dark)
            assert browser.problems == []
            assert browser.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)") == []
            assert browser.evaluate("document.images.length") == 3
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, "scrolls sideways"
            colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (colour == "rgb(255, 255, 255)") is not dark
    finally:
        browser.close()
