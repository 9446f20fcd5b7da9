"""The figures and the HTML page of a report, for one run and for several, in a real browser."""

import json
import os
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser

import pytest

from pretrain.commands.after_run import report
from pretrain.config import config_from_dict, save_config
from pretrain.report import figures
from pretrain.report.figures import draw_loss, smoothed
from pretrain.report.page import differences, story, write_page
from pretrain.report.runs import read_run
from xlstm_io.errors import UserError

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
START = {"event": "start", "time": "2026-01-02T03:04:05+00:00", "processes": 4}
HISTORY = [
    START | {"life": 1, "step": 0, "checkpoint": None, "changes": [], "notes": []},
    {"event": "skipped", "time": "2026-01-02T04:00:00+00:00", "step": 1234, "loss": 9.5},
    {"event": "stopped", "time": "2026-01-02T05:00:00+00:00", "step": 1300, "reason": "SIGTERM"},
    START
    | {
        "life": 2,
        "step": 1000,
        "checkpoint": "runs/x/checkpoints/step-00001000-ab",
        "changes": [{"key": "optimizer.lr", "before": 1e-3, "now": 5e-4}],
        "notes": ["the curve goes on"],
    },
]


@pytest.fixture
def make_run(tmp_path):
    def make(name, lr=1e-3, records=40, history=HISTORY, sources=False, **model):
        folder = tmp_path / name
        config = {
            "run": {"dir": str(folder), "steps": 400},
            "model": {"pattern": "MM", "hidden_size": 64, "num_heads": 2, "vocab_size": 64},
            "data": {"path": "d", "seq_len": 8, "global_batch": 4, "micro_batch": 2},
            "optimizer": {"lr": lr},
        }
        config["model"] |= model
        save_config(config_from_dict(config), folder / "config.yaml")
        with open(folder / "metrics.jsonl", "w") as file:
            for step in range(10, 10 * records + 1, 10):
                record = {"step": step, "tokens": step * 30, "loss": 2 + 40 / step, "lr": lr}
                record |= {"grad_norm": None if step == 30 else 1.0, "tokens_per_second": 900.0}
                record |= {"loss/web": 2 + 30 / step, "loss/code": 2 + 50 / step} if sources else {}
                if step % 100 == 0:
                    record |= {"valid_loss": 2.5, "valid_loss/web": 2.0, "valid_loss/code": 3.0}
                file.write(json.dumps(record) + "\n")
        if history:
            (folder / "history.jsonl").write_text("".join(json.dumps(h) + "\n" for h in history))
        return read_run(folder)

    return make


def test_every_validation_set_is_drawn(tmp_path, make_run, monkeypatch):
    folder = make_run("run").folder
    sets = {f"valid_loss/{name}": 2.0 for name in "abcdef"}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "valid_loss": 2.0, **sets}))
    drawn = []
    monkeypatch.setattr(figures, "figure_as_png", lambda figure: drawn.append(figure) or b"")
    figures.loss_figure([read_run(folder)], "step")
    assert len(drawn[0].axes[0].lines) == 7


class Page(HTMLParser):
    """The text of a page, the descriptions of its images, and what it would load from elsewhere."""

    def __init__(self, html):
        super().__init__()
        self.text, self.images, self.foreign, self.tags = "", [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(given["alt"])
        source = given.get("src") or given.get("href") or ""
        if source and not source.startswith("data:"):
            self.foreign.append(source)

    def handle_data(self, data):
        self.text += data


def test_a_page_shows_curves_story_and_configuration(make_run):
    page = Page(write_page([make_run("first")]))
    assert page.images == [
        "Loss by step",
        "Loss by tokens",
        "Learning rate",
        "Gradient norm",
        "Speed",
    ]
    assert not page.foreign, "the file alone is the page"
    for words in (
        "400 of 400",
        "life 1 starts with 4 processes; from nothing",
        "optimizer.lr 0.001 -> 0.0005; the curve goes on",
        "skipped: loss 9.5",
        "stopped: SIGTERM",
        '"pattern": "MM"',
    ):
        assert words in page.text, words
    assert "What differs" not in page.text


def test_a_page_shows_where_the_weights_come_from(make_run):
    run = make_run("first")
    assert "Not recorded" in Page(write_page([run])).text
    for life, commit in ((1, "0ld"), (2, "c0ffee")):
        start = run.folder / "starts" / f"{life:06d}"
        start.mkdir(parents=True)
        (start / "provenance.json").write_text(json.dumps({"code": {"commit": commit}}))
    text = Page(write_page([read_run(run.folder)])).text
    assert "c0ffee" in text and "0ld" not in text


def test_losses_by_source_are_drawn_where_they_were_recorded(make_run):
    plain, apart = make_run("first"), make_run("second", sources=True)
    assert apart.keys_under("loss") == ["loss/web", "loss/code"]
    name = "Loss by source, smoothed"
    for runs in ([apart], [plain, apart]):
        assert name in Page(write_page(runs)).images
    assert name not in Page(write_page([plain])).images


def test_looks_into_the_layers_are_drawn(make_run):
    run = make_run("first")
    assert "Layers" not in Page(write_page([run])).text
    lines = [
        {"step": step, "layer": layer, "letter": "M", "igate_p50": -3.0, "grad_norm": 0.5}
        | {"update_norm": 0.0, "weight_norm": 2.0, "fgate_p50": None}
        for step in (100, 200)
        for layer in (0, 1, "embedding")
    ]
    (run.folder / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_page([read_run(run.folder)]))
    drawn = ["Input gate, median pre-activation", "Gradient norm, log10"]
    assert page.images[-2:] == drawn and "Layers" in page.text


def test_runs_are_compared_by_what_differs(make_run):
    runs = [make_run("first"), make_run("second", lr=3e-3, num_heads=4)]
    assert differences(runs) == [
        ("model.num_heads", ["2", "4"]),
        ("optimizer.lr", ["0.001", "0.003"]),
    ]
    page = Page(write_page(runs))
    assert "What differs between the configurations" in page.text
    assert page.text.count("first") > 2 and page.text.count("second") > 2
    same = [make_run("third"), make_run("fourth")]
    assert "Nothing but their folders." in Page(write_page(same)).text


def test_a_run_that_has_not_begun_has_a_page(make_run):
    page = Page(write_page([make_run("new", records=0, history=[])]))
    assert "No step has been logged yet." in page.text and "kept none" in page.text
    assert not page.images


def test_text_of_a_run_is_never_markup(make_run):
    bad = {"event": "<script>alert(1)</script>", "time": "now", "step": 1, "about": "<img src=x>"}
    run = make_run("a<b>&c", history=[bad])
    page = Page(write_page([run]))
    assert "script" not in page.tags and page.tags.count("img") == 5
    assert "<script>alert(1)</script>: about <img src=x>" in page.text
    assert "a<b>&c" in page.text


def test_a_damaged_line_of_the_history_is_left_out(make_run):
    run = make_run("first")
    (run.folder / "history.jsonl").write_text('{"event": "sta\n' + json.dumps(HISTORY[1]) + "\n")
    assert [step for _, step, _ in story(read_run(run.folder))] == ["1,234"]


def test_the_mean_of_the_first_points_is_not_pulled_to_zero():
    assert smoothed([]) == []
    assert smoothed([3.0] * 500) == pytest.approx([3.0] * 500)
    noisy = [5.0 + (-1) ** n for n in range(1000)]
    assert max(abs(value - 5.0) for value in smoothed(noisy)[100:]) < 0.1


def test_the_command_writes_a_page_and_a_comparison(make_run, capsys):
    first, second = make_run("first"), make_run("second")
    assert report.main([first.folder]) == 0
    assert f"page              {first.folder / 'report.html'}" in capsys.readouterr().out
    assert report.main([first.folder, second.folder]) == 0
    out = capsys.readouterr().out
    assert f"compared with {second.folder}: {first.folder / 'comparison.html'}" in out
    assert (first.folder / "comparison.html").stat().st_size > 10_000


def test_the_loss_is_drawn_among_baselines(make_run):
    run = make_run("first")
    draw_loss(run, run.folder / "bare.png")
    draw_loss(read_run(run.folder, {"unigram": 6.4, "bigram": 5.3}), run.folder / "loss.png")
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run.folder / "loss.png").read_bytes() != (run.folder / "bare.png").read_bytes()
    with pytest.raises(UserError, match="has no loss to draw"):
        draw_loss(make_run("new", records=0), run.folder / "none.png")


@pytest.mark.skipif(
    BROWSER is None and not os.environ.get("XLSTM_REQUIRE_BROWSER"),
    reason="no chromium on this machine (apt-get install chromium)",
)
def test_a_browser_draws_the_page(make_run, tmp_path):
    assert BROWSER is not None, "XLSTM_REQUIRE_BROWSER is set, and there is no chromium"
    page, image = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(write_page([make_run("first"), make_run("second", lr=3e-3)]))
    offline = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync"
    ).split()
    subprocess.run(
        [
            BROWSER,
            *offline,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1200,2400",
            f"--screenshot={image}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    rows = png_rows(image.read_bytes())
    assert len(rows) == 2400
    # The figures are where the page has colours; white paper alone has one.
    coloured = sum(len(set(row)) > 20 for row in rows)
    assert coloured > 600, coloured


def png_rows(data):
    """The compressed rows of a PNG without filters undone: enough to tell paper from figures."""
    width, height, _, kind = struct.unpack(">IIBB", data[16:26])
    packed, at = b"", 8
    while at < len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        packed += data[at + 8 : at + 8 + size] if name == b"IDAT" else b""
        at += size + 12
    raw = zlib.decompress(packed)
    step = width * {2: 3, 6: 4}[kind] + 1
    return [raw[n * step : (n + 1) * step] for n in range(height)]
