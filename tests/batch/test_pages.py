"""Contact sheet, table and failures: prompts are text there, whatever is in them."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser

import pytest

from mmattn.batch import pages
from mmattn.batch.ledger import Ledger, Record
from mmattn.batch.local import Summary
from mmattn.batch.progress import Progress, line

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.events = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.events += [name for name, _ in attrs if name.startswith("on")]
        self.sources = [*getattr(self, "sources", []), *(v for k, v in attrs if k == "src")]

    def handle_data(self, data):
        self.text += data


def read(folder):
    tags = Tags()
    tags.feed((folder / "index.html").read_text())
    return tags


def test_markup_in_prompts_stays_text(bench):
    rows = [
        {"id": "a", "prompt": EVIL},
        {"id": EVIL, "prompt": "poison " + EVIL},
        {"id": "v", "prompt": EVIL, "num_frames": 2},
    ]
    bench.run(bench.write(rows))
    tags = read(bench.folder / "out")
    assert "script" not in tags.tags and not tags.events
    assert tags.tags.count("img") == 1 and tags.tags.count("video") == 1
    assert tags.text.count(EVIL) >= 3
    assert all((bench.folder / "out" / source).is_file() for source in tags.sources)


def test_the_table_holds_no_formulas(bench):
    starts = ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\t=1", "plain"]
    rows = [{"id": f"{s}{i}", "prompt": s + "x"} for i, s in enumerate(starts)]
    bench.run(bench.write(rows))
    with (bench.folder / "out" / "results.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == 6
    assert {row["prompt"] for row in table[:5]} == {"'" + s + "x" for s in starts[:5]}
    assert table[5]["prompt"] == "plainx" and table[5]["status"] == "ok"
    assert not any(cell[:1] in "=+-@\t" for row in table for cell in row.values() if cell)


def test_failures_are_those_that_stand(bench):
    rows = [{"id": "a", "prompt": "poison"}, {"id": "b", "prompt": "poison"}]
    bench.run(bench.write(rows))
    bench.run(bench.write([rows[0], {"id": "b", "prompt": "mended"}]))
    lines = (bench.folder / "out" / "failures.jsonl").read_text().splitlines()
    assert [json.loads(entry)["id"] for entry in lines] == ["a"]
    assert "poisoned prompt" in (bench.folder / "out" / "index.html").read_text()


def test_the_sheet_is_cut_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "SHOWN", 5)
    with Ledger(tmp_path) as ledger:
        ledger.append([Record(str(i), "failed", "k", params={"prompt": "p"}) for i in range(8)])
    assert pages.finish(tmp_path) == 8
    tags = read(tmp_path)
    assert tags.tags.count("figure") == 5 and "and 3 more" in tags.text


def test_progress_is_a_line_every_ten_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mmattn.batch.progress.time.monotonic", lambda: now[0])
    said = []
    watch = Progress(said.append, terminal=False)
    for second in range(1, 31):
        now[0] = float(second)
        watch(Summary(planned=100, before=10, ok=second, failed=1))
    assert said == [
        "[11/90] 1 failed, 10 done before, 1.10 items/s, 0:01:12 left",
        "[21/90] 1 failed, 10 done before, 1.05 items/s, 0:01:06 left",
        "[31/90] 1 failed, 10 done before, 1.03 items/s, 0:00:57 left",
    ]
    assert line(Summary(planned=3), 0.0) == "[0/3] 0 failed, 0 done before, 0.00 items/s"


def test_on_a_terminal_it_is_a_bar(capsys):
    watch = Progress(print, terminal=True)
    watch(Summary(planned=4, before=1))
    watch(Summary(planned=4, before=1, ok=2, failed=1))
    watch.close()
    out, err = capsys.readouterr()
    assert not out and "3/3" in err and "failed=1" in err


@pytest.mark.parametrize("text", ["", "a=b", "1-1"])
def test_other_text_stays_as_it_is(text):
    assert pages.neutral(text) == text
