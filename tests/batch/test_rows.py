"""Job files in every format: what is read, what is refused, with which line number."""

from __future__ import annotations

import json
import sys

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
    found = problems(bench, "\n".join(list(wrong)[:20]))
    found |= {n + 20: text for n, text in problems(bench, "\n".join(list(wrong)[20:])).items()}
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
