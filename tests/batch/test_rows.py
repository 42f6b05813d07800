"""Job files in every format: what is read, what is refused, with which line number."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time

import pytest
from PIL import Image

from mmattn.batch.jobs import BadRows, Jobs
from mmattn.batch.rows import LINE_BYTES, read_rows
from mmattn.errors import ConfigError, MissingExtraError


def problems(bench, text, name="jobs.jsonl", **more):
    path = bench.write(text, name)
    with pytest.raises(BadRows) as caught:
        Jobs(path, **more).check()
    return dict(caught.value.problems)


def rows(bench, text, name="jobs.jsonl"):
    return [(row.line, row.cells) for row in read_rows(bench.write(text, name))]


def test_jsonl_with_bom_crlf_and_blank_lines(bench):
    text = '\ufeff{"prompt": "größer"}\r\n\r\n{"prompt": "b", "n": 2}'
    assert rows(bench, text) == [(1, {"prompt": "größer"}), (3, {"prompt": "b", "n": 2})]


def test_txt_is_a_prompt_per_line(bench):
    assert rows(bench, "\ufeffa cat\r\n\n  # a dog \n", "jobs.txt") == [
        (1, {"prompt": "a cat"}),
        (3, {"prompt": "# a dog"}),
    ]


def test_csv_has_types_quotes_and_empty_cells(bench):
    text = (
        "\ufeffid,prompt,steps,guidance,method,seed\r\n"
        'a,"red, ""big""\nand round",4,2.5,,\r\n'
        ",\r\n"
        'b,blue,4.0,,"[{""name"": ""identity""}]",7\r\n'
    )
    path = bench.write(text, "jobs.csv")
    assert [row.line for row in read_rows(path)] == [2, 5]
    jobs = Jobs(path)
    jobs.check()
    first, second = jobs.items({"image": "m"})
    assert first.params == {"steps": 4, "guidance": 2.5, "prompt": 'red, "big"\nand round'}
    assert second.params["steps"] == 4 and second.seed == 7
    assert [m["name"] for m in second.methods] == ["identity"]


def test_parquet_reads_as_jsonl_does(bench):
    pa = pytest.importorskip("pyarrow", reason="parquet needs the extra [batch]")
    import pyarrow.parquet as pq

    table = [
        {"id": "a", "prompt": "x", "steps": 3, "method": None},
        {"id": "b", "prompt": "y", "steps": None, "method": "identity"},
    ]
    path = bench.folder / "jobs.parquet"
    pq.write_table(pa.Table.from_pylist(table), path)
    text = "".join(json.dumps({k: v for k, v in r.items() if v is not None}) + "\n" for r in table)
    same = []
    for file in (path, bench.write(text)):
        jobs = Jobs(file)
        jobs.check()
        same.append([(i.id, i.key, i.file) for i in jobs.items({"image": "m"})])
    assert same[0] == same[1]
    (bench.folder / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match="not a Parquet file"):
        list(read_rows(bench.folder / "bad.parquet"))


def test_without_pyarrow_the_error_names_the_extra(bench, monkeypatch):
    path = bench.write("", "jobs.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"mmattn\[batch\]"):
        list(read_rows(path))


def test_up_to_twenty_bad_rows_with_their_lines(bench):
    good = '{"prompt": "fine"}\n'
    text = good + '{"prompt": 3}\n' * 10 + good + '{"promt": "x"}\n' * 15
    path = bench.write(text)
    with pytest.raises(BadRows) as caught:
        Jobs(path).check()
    assert [line for line, _ in caught.value.problems] == [*range(2, 12), *range(13, 23)]
    message = str(caught.value)
    assert "25 rows cannot be run" in message and "and 5 more" in message
    assert "line 13: unknown key ['promt'], did you mean 'prompt'?" in message


def test_what_is_wrong_is_said(bench):
    Image.new("RGB", (4, 4)).save(bench.folder / "ok.png")
    (bench.folder / "page.png").write_text("<html>")
    wrong = {
        '{"prompt": "a", "steps": 0}': "steps must be a whole number from 1 to 1000, found 0",
        '{"prompt": "a", "steps": true}': "steps must be a whole number",
        '{"prompt": "a", "guidance": "3"}': "guidance must be a number",
        '{"prompt": "  "}': "prompt must be text",
        '{"steps": 3}': "an image needs a prompt",
        '{"prompt": "a\\u0000b"}': "prompt holds a NUL character",
        '{"prompt": "a\\ud800"}': "half of a surrogate pair",
        '{"prompt": NaN}': "NaN is not a JSON number",
        '{"prompt": "a", "prompt": "b"}': "the key 'prompt' is there twice",
        '["prompt"]': "a row is a JSON object, found list",
        '{"prompt": "a"': "not valid JSON",
        '{"prompt": ' + "[" * 40 + "]" * 40 + "}": "nested 41 deep",
        '{"prompt": "a", "kind": "imag"}': "kind must be one of",
        '{"prompt": "a", "kind": ["image"]}': "kind must be one of",
        '{"prompt": "a", "num_frames": 5, "kind": "image"}': "num_frames is for video, not for image",
        '{"prompt": "a", "method": "vmobaa"}': "vmoba",
        '{"prompt": "a", "method": "tome:q=3"}': "q",
        '{"prompt": "a", "method": [3]}': "method must be text",
        '{"prompt": "a", "method": "{"}': "the method '{' is not valid JSON",
        '{"prompt": "a", "method": "tome:r=' + "[" * 5000 + '"}': "ToMe: ",
        '{"prompt": "a", "method": "' + "x" * 300 + '.json"}': "File name too long",
        '{"prompt": "a", "method": {"name": [1]}}': "needs a 'name' key",
        '{"prompt": "a", "method": "' + "tome+" * 3000 + '"}': "15,000 characters",
        '{"prompt": "a", "method": [' + '"tome",' * 256 + '"tome"]}': "a list of 257",
        '{"prompt": "a", "init_image": "~nobody-here/a.png"}': "home directory",
        '{"prompt": "a", "init_image": "' + "x" * 300 + '"}': "File name too long",
        '{"prompt": "a", "width": 8192, "height": 8192, "num_frames": 600}': "are the limits",
        '{"prompt": "a", "init_image": "none.png"}': "there is no picture file",
        '{"prompt": "a", "init_image": "http://127.0.0.1/x.png"}': "must be a local file",
        '{"prompt": "a", "init_image": "page.png"}': "cannot be read as one of",
        '{"prompt": "a", "strength": 0.5}': "strength needs init_image",
        '{"kind": "caption"}': "a caption needs image",
        '{"kind": "imageset", "prompt": "a"}': "an imageset needs panels",
        '{"panels": []}': "must be a list of 1 to 16",
        '{"panels": ["a", {"prompt": "b", "image": "ok.png"}]}': "come first",
        '{"panels": [{"text": "a"}]}': "a panel is a prompt",
        '{"id": "", "prompt": "a"}': "id must be text",
    }
    found = {}
    for first in range(0, len(wrong), 20):  # no more than that are listed
        part = problems(bench, "\n".join(list(wrong)[first : first + 20]))
        found |= {line + first: text for line, text in part.items()}
    assert sorted(found) == list(range(1, len(wrong) + 1))
    for number, part in enumerate(wrong.values(), 1):
        assert part in found[number], (number, found[number])


def test_bytes_that_are_no_text(bench):
    path = bench.folder / "jobs.jsonl"
    long = json.dumps({"prompt": "x" * LINE_BYTES}).encode()
    path.write_bytes(b'{"prompt": "\xff"}\n{"prompt": "a\x00"}\n' + long + b'\n{"prompt": "ok"}\n')
    with pytest.raises(BadRows) as caught:
        Jobs(path).check()
    said = dict(caught.value.problems)
    assert "not UTF-8" in said[1] and "NUL byte" in said[2] and "longer than" in said[3]
    assert 4 not in said
    path.write_bytes('{"prompt": "a"}'.encode("utf-16"))
    with pytest.raises(BadRows, match="UTF-16"):
        Jobs(path).check()


def test_broken_csv(bench):
    assert "cells under" in problems(bench, "prompt\na,b\n", "jobs.csv")[2]
    assert "not valid CSV" in problems(bench, 'prompt\nfine\n"open\nfor ever', "jobs.csv")[3]
    assert "not valid JSON" in problems(bench, 'prompt,method\na,"[1"\n', "jobs.csv")[2]
    for head in ("prompt,prompt\n", "prompt,,\n", "\n", ",".join(map(str, range(201)))):
        with pytest.raises(ConfigError, match="column"):
            Jobs(bench.write(head + "a\n", "jobs.csv")).check()


def test_cells_of_csv_have_bounds(bench):
    long = "x" * (LINE_BYTES - 20)
    assert [
        row.cells["prompt"] for row in read_rows(bench.write(f"prompt\n{long}\nb\n", "a.csv"))
    ] == [
        long,
        "b",
    ]
    # A quote that is never closed, and cells with line breaks, would take in the whole file.
    for text in ('"' + "line\n" * 300_000, "".join('"\n",' for _ in range(600_000))):
        row = next(iter(read_rows(bench.write("prompt\n" + text, "b.csv"))))
        assert row.line == 2 and "longer than" in row.problem
    csv.field_size_limit(100)
    assert len(next(iter(read_rows(bench.folder / "a.csv"))).cells["prompt"]) == len(long)
    deep = bench.write('prompt,method\na,"' + "[" * 5000 + '"\n', "c.csv")
    with pytest.raises(BadRows, match="nested 5000 deep"):
        Jobs(deep).check()


def test_keys_that_come_twice_are_found_quickly(bench):
    # A line of this length took minutes when every key was counted.
    keys = "".join(f'"k{i}": 1, ' for i in range(60_000))
    path = bench.write("{" + keys + '"z": 1, "z": 2}\n')
    start = time.process_time()
    with pytest.raises(BadRows, match="the key 'z' is there twice"):
        Jobs(path).check()
    assert time.process_time() - start < 2


def test_damaged_and_oversized_parquet(bench, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="parquet needs the extra [batch]")
    import pyarrow.parquet as pq

    from mmattn.batch import rows as module

    path = bench.folder / "jobs.parquet"
    table = pa.table({"prompt": [f"prompt {i}" for i in range(600)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=300)
    whole = path.read_bytes()
    place = whole.rindex(b"prompt 400")
    path.write_bytes(whole[: place - 3] + b"\xff" + whole[place - 2 :])
    found = list(read_rows(path))
    assert found[-1].problem.startswith("the table is damaged") and len(found) > 256
    assert all(row.problem is None for row in found[:-1])
    path.write_bytes(whole[: place + 5] + b"\xff" + whole[place + 6 :])
    assert "utf-8" in list(read_rows(path))[-1].problem
    path.write_bytes(whole)
    assert sum(1 for _ in read_rows(path)) == 600
    for limit in ("ROWS", "GROUP_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, 500)
            with pytest.raises(ConfigError, match="smaller row_group_size"):
                list(read_rows(path))
    # Packed, forty megabytes of one prompt are 1.5 kB.
    pq.write_table(pa.table({"prompt": ["a" * 40_000_000]}), path, compression="zstd")
    (row,) = read_rows(path)
    assert "1 rows hold 40,000,0" in row.problem
    times = pa.array([2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": ["a"], "seed": [b"x"], "when": times}), path)
    with pytest.raises(BadRows):
        Jobs(path, allow_extra=True).check()
    pq.write_table(pa.table({"prompt": ["a"], "method": [{"name": "tome", "r": b"x"}]}), path)
    with pytest.raises(BadRows, match="not JSON serializable"):
        Jobs(path).check()


def test_rows_are_checked_as_they_stream(bench):
    """A file of 80 MB, in a process of its own, since the size of this one says nothing."""
    prompt = "a photograph of a red circle " * 140
    with (bench.folder / "jobs.jsonl").open("w") as stream:
        for i in range(20_000):
            stream.write(json.dumps({"id": f"row{i}", "prompt": prompt + str(i)}) + "\n")
    code = (
        "import sys; from pathlib import Path; from mmattn.batch.jobs import Jobs\n"
        "rows = Jobs(Path(sys.argv[1])).check().rows\n"
        "peak = Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]\n"
        "print(rows, int(peak) // 1024, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, bench.folder / "jobs.jsonl"], capture_output=True, text=True
    )
    rows, megabytes, torch = done.stdout.split()
    assert (rows, torch) == ("20000", "False") and int(megabytes) < 80


def test_repeated_rows_are_told_apart_however_many_they_ask_for(bench):
    text = '{"prompt": "a", "n": 2}\n{"prompt": "a", "n": 3}\n{"prompt": "a"}\n{"prompt": "a"}\n'
    jobs = Jobs(bench.write(text))
    assert jobs.check().items == {"image": 7}
    items = list(jobs.items({"image": "m"}))
    assert len({item.id for item in items}) == len({item.seed for item in items}) == 7


def test_ids_are_used_once(bench):
    text = '{"id": "a", "prompt": "x"}\n{"id": 7, "prompt": "x"}\n{"id": "a", "prompt": "y"}\n'
    text += '{"id": "b", "prompt": "x", "n": 2}\n{"id": "b-1", "prompt": "z"}\n'
    found = problems(bench, text + '{"id": "7", "prompt": "q"}\n')
    assert sorted(found) == [3, 5, 6]
    assert "the id 'a' is taken by a row above" in found[3]


def test_extra_keys_can_be_allowed(bench):
    path = bench.write('{"prompt": "a", "note": "mine"}\n')
    with pytest.raises(BadRows, match="note"):
        Jobs(path).check()
    plain = bench.write('{"prompt": "a"}\n', "plain.jsonl")
    items = []
    for file in (path, plain):
        jobs = Jobs(file, allow_extra=True)
        jobs.check()
        items += jobs.items({"image": "m"})
    assert items[0].key == items[1].key


def test_kinds_without_a_model_are_refused(bench):
    found = problems(bench, '{"prompt": "a", "num_frames": 4}\n', kinds={"image": True})
    assert "no model here makes videos" in found[1]


def test_files_that_are_none(bench):
    with pytest.raises(ConfigError, match="no job file"):
        Jobs(bench.folder / "nothing.jsonl").check()
    with pytest.raises(ConfigError, match="ends in one of"):
        Jobs(bench.write("", "jobs.yaml")).check()
    with pytest.raises(ConfigError, match="has no rows"):
        Jobs(bench.write("\n\n")).check()
    with pytest.raises(ConfigError, match="steps must be"):
        Jobs(bench.write(""), {"steps": 10_000})


def test_a_file_that_changes_while_it_is_read_is_noticed(bench):
    path = bench.write('{"prompt": "a"}\n')
    jobs = Jobs(path)
    jobs.check()
    path.write_text('{"promt": "a"}\n')
    with pytest.raises(ConfigError, match="changed while it was read"):
        list(jobs.items({"image": "m"}))
