"""What a job file promises: shares, names, seeds, defaults, and sentences about rows that cannot be run."""

from __future__ import annotations

import hashlib
import itertools
import json
import os

import pytest

from mmattn.batch.jobs import BadRows, Found, Jobs, Shard
from mmattn.batch.rows import LINE_BYTES, read_rows
from mmattn.errors import ConfigError

PRINTS = {"image": "m", "video": "v", "imageset": "s", "caption": "c"}


def made(bench, rows, name="jobs.jsonl", shard=None, **more):
    """The items of checked rows."""
    jobs = Jobs(bench.write(rows, name), **more)
    jobs.check()
    return list(jobs.items(PRINTS, shard))


# -- shares ---------------------------------------------------------------------------------------------


def test_shards_are_written_from_zero():
    assert Shard.parse("0/1") == Shard(0, 1)
    assert Shard.parse(" 2 / 3 ") == Shard(2, 3)
    for text in ("3/3", "4/3", "0/0", "1", "1/", "/2", "-1/2", "a/b", "1/2/3", "1.0/2", ""):
        with pytest.raises(ConfigError) as caught:
            Shard.parse(text)
        assert str(caught.value) == (
            f"a shard is written i/n with i from 0 to n-1, such as 0/3; got {text!r}"
        )


def test_every_item_is_in_one_shard_and_they_are_even(bench):
    rows = [{"id": str(i), "prompt": "p", "width": 64 if i % 4 else 256} for i in range(25)]
    for count in (1, 2, 3, 7):
        shares = [[i.id for i in made(bench, rows, shard=Shard(k, count))] for k in range(count)]
        assert sorted(itertools.chain(*shares)) == sorted(row["id"] for row in rows)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 2, "at most one more of each cost"
        assert all(share == sorted(share, key=int) for share in shares), "in the order of the file"


def test_shards_start_at_different_places_for_different_costs(bench):
    """One item of each cost: they must not all go to the first shard."""
    rows = [{"id": str(i), "prompt": "p", "steps": 2**i} for i in range(9)]
    shares = [made(bench, rows, shard=Shard(k, 3)) for k in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]


# -- what checking finds --------------------------------------------------------------------------------


def test_checking_counts_rows_and_items_by_kind(bench):
    rows = [
        {"prompt": "a", "n": 3},
        {"prompt": "b"},
        {"prompt": "c", "num_frames": 4},
        {"panels": ["d"], "n": 2},
    ]
    path = bench.write(rows)
    found = Jobs(path).check()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.rows, found.items) == (4, {"image": 4, "video": 1, "imageset": 2})
    assert found.sha256 == digest
    assert Found() == Found(0) and Found().items == {}


@pytest.mark.parametrize(("count", "head"), [(1, "1 row cannot be run"), (2, "2 rows cannot")])
def test_bad_rows_are_counted(bench, count, head):
    path = bench.write([{"prompt": "fine"}] + [{"prompt": 3}] * count)
    with pytest.raises(BadRows) as caught:
        Jobs(path).check()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{path}: {head}") and len(lines) == 1 + count
    assert lines[1] == "line 2: prompt must be text, found 3"


def test_twenty_bad_rows_are_all_shown_and_more_are_counted(bench):
    for count, last in ((20, "line 20: prompt"), (21, "and 1 more")):
        with pytest.raises(BadRows) as caught:
            Jobs(bench.write([{"prompt": 3}] * count)).check()
        lines = str(caught.value).splitlines()
        assert len(lines) == 1 + count and lines[-1].startswith(last)
        assert len(caught.value.problems) == 20


def test_methods_are_checked_before_anything_runs(bench):
    for row in ({"prompt": "a"}, {"prompt": "a", "id": "a"}):
        with pytest.raises(BadRows, match="vmobaa"):
            Jobs(bench.write([{**row, "method": ["identity", "vmobaa"]}])).check()


# -- defaults -------------------------------------------------------------------------------------------


def test_defaults_hold_where_a_row_says_nothing_and_its_kind_reads_them(bench):
    rows = [
        {"prompt": "a", "steps": 3},
        {"prompt": "b", "steps": None},
        {"prompt": "c", "num_frames": 4},
    ]
    items = made(bench, rows, defaults={"steps": 5, "fps": 12, "num_frames": 9})
    assert [item.params["steps"] for item in items] == [3, 5, 5]
    assert items[2].params["fps"] == 12 and items[2].params["num_frames"] == 4
    assert all("fps" not in item.params for item in items[:2])
    (plain,) = made(bench, [{"prompt": "c", "kind": "video"}])
    assert plain.params == {"steps": 20, "fps": 8, "prompt": "c"}


def test_defaults_are_checked_at_once(bench):
    path = bench.folder / "not there yet.jsonl"
    with pytest.raises(ConfigError, match=r"^guidance must be a number from 0 to 100, found 101$"):
        Jobs(path, {"guidance": 101})


def test_the_question_of_a_caption_depends_on_the_model(bench):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(bench.folder / "a.png")
    rows = [{"image": "a.png"}, {"image": "a.png", "prompt": "what is it ?"}]
    asked = []
    for embedded in (True, False):
        items = made(bench, rows, kinds={"caption": embedded})
        assert all(item.kind == "caption" for item in items)
        asked += [item.params["prompt"] for item in items]
    assert made(bench, rows[:1])[0].params["prompt"] == "describe the picture .", "embedded"
    own = "what is it ?"
    assert asked == ["describe the picture .", own, "Describe the picture.", own]
    (given,) = made(bench, rows[:1], kinds={"caption": False}, defaults={"prompt": "and this ?"})
    assert given.params["prompt"] == "and this ?"


def test_the_kind_of_a_row_that_does_not_tell(bench):
    rows = [{"prompt": "a"}, {"prompt": "a", "num_frames": 3}, {"prompt": "a", "kind": "image"}]
    assert [i.kind for i in made(bench, rows)] == ["image", "video", "image"]
    assert [i.kind for i in made(bench, rows, default_kind="video")] == ["video", "video", "image"]
    with pytest.raises(BadRows, match="kind must be one of") as caught:
        Jobs(bench.write([{"kind": "films", "prompt": "a"}])).check()
    assert "kind kind" not in str(caught.value) and "line 1: kind must" in str(caught.value)
    with pytest.raises(BadRows, match="no model here makes videos; name one with --model"):
        Jobs(bench.write(rows), kinds={"image": False}).check()


# -- names and seeds ------------------------------------------------------------------------------------


def test_rows_that_say_the_same_are_different_items_in_any_order(bench):
    same = {"prompt": "a", "steps": 2}
    rows = [same, {"prompt": "b"}, same, {"prompt": "c"}, same]
    items = made(bench, rows)
    assert len({item.id for item in items}) == 5
    assert len({item.seed for item in items}) == 5
    mixed = made(bench, [rows[3], same, same, rows[1], same])
    assert {item.id for item in mixed} == {item.id for item in items}
    # One more of them is one more item, and nothing else changes.
    more = made(bench, [*rows, same])
    assert [item.id for item in more[:5]] == [item.id for item in items]


def test_ids_stay_what_they_were(bench):
    """A folder is resumed by them, also with a later version."""
    first, second, third = made(bench, [{"prompt": "a", "steps": 2}] * 3)
    assert (first.id, first.seed) == ("553c0f43cd2d27c9", 781130571)
    assert [second.id, third.id] == ["e2b3dcb538585820", "c968649208a1599f"]
    assert first.key == "8e8829d9a3072055"
    assert [i.id for i in made(bench, [{"prompt": "a", "steps": 2}])] == [first.id]


def test_what_tells_rows_without_an_id_apart(bench):
    rows = [
        {"prompt": "a"},
        {"prompt": "a", "seed": 1},
        {"prompt": "b", "n": 2},
        {"prompt": "a", "method": "identity"},
        {"prompt": "a", "steps": 7},
        {"prompt": "a", "kind": "video"},
    ]
    items = made(bench, rows)
    alone = [made(bench, [row]) for row in rows]
    assert [item.id for item in items] == [item.id for part in alone for item in part]
    assert len({item.id for item in items}) == 7


def test_a_file_is_read_the_same_way_twice(bench):
    jobs = Jobs(bench.write([{"prompt": "a"}, {"prompt": "a"}, {"prompt": "a"}]))
    jobs.check()
    first, second = ([item.id for item in jobs.items(PRINTS)] for _ in range(2))
    assert first == second and len(set(first)) == 3
    jobs.check()
    assert [item.id for item in jobs.items(PRINTS)] == first


def test_ids_that_would_share_a_file_are_refused(bench):
    def problem(*rows):
        with pytest.raises(BadRows) as caught:
            Jobs(bench.write(list(rows))).check()
        return dict(caught.value.problems)

    a = {"id": "a", "prompt": "x"}
    assert problem(a, a) == {2: "the id 'a' is taken by a row above"}
    assert problem({**a, "n": 2}, {"id": "a-1", "prompt": "x"}) == {
        2: "the id 'a-1' is taken by a row above"
    }
    assert problem({"id": "a-0", "prompt": "x"}, {**a, "n": 2}) == {
        2: "the id 'a-0' is taken by a row above"
    }
    assert list(problem(a, {**a, "kind": "video"})) == [2], "the manifest knows ids, not kinds"
    items = made(bench, [{**a, "n": 2}, {"id": "a", "prompt": "y"}, {"id": "A", "prompt": "y"}])
    assert [item.id for item in items] == ["a-0", "a-1", "a", "A"]


def test_seeds_count_up_within_a_row(bench):
    items = made(bench, [{"id": "a", "prompt": "x", "n": 3, "seed": 7}, {"prompt": "y", "seed": 0}])
    assert [item.seed for item in items] == [7, 8, 9, 0]
    assert [item.row for item in items] == [1, 1, 1, 2]
    assert [item.model for item in items] == ["m"] * 4


# -- CSV has no types -----------------------------------------------------------------------------------


def test_cells_of_csv_get_the_types_of_their_columns(bench):
    text = (
        "id,prompt,steps,guidance,seed,method,strength\n"
        "7,8,9,2,10,identity,\n"
        'x,1.5,4.0,2.5,11, ["identity"],\n'
    )
    first, second = made(bench, text, "jobs.csv")
    assert (first.id, first.params["prompt"]) == ("7", "8")
    assert first.params["steps"] == 9 and first.params["guidance"] == 2.0 and first.seed == 10
    assert (second.id, second.params["prompt"], second.params["steps"]) == ("x", "1.5", 4)
    assert second.params["guidance"] == 2.5
    assert [m["name"] for m in first.methods] == [m["name"] for m in second.methods] == ["identity"]


def test_every_number_of_csv_is_a_number(bench):
    names = "width,height,num_frames,fps,steps,n,seed,guidance"
    (item,) = made(bench, f"prompt,id,{names}\na,x,16,24,5,6,7,1,8,1.5\n", "jobs.csv")
    assert item.params == {
        "prompt": "a",
        "width": 16,
        "height": 24,
        "num_frames": 5,
        "fps": 6,
        "steps": 7,
        "guidance": 1.5,
    }
    assert item.seed == 8


def test_cells_of_csv_that_are_no_numbers_are_said_as_written(bench):
    with pytest.raises(BadRows) as caught:
        Jobs(bench.write("prompt,steps\na,many\nb,1e2\nc,0x10\n", "jobs.csv")).check()
    said = dict(caught.value.problems)
    assert said[2] == "steps must be a whole number from 1 to 1000, found 'many'"
    assert sorted(said) == [2, 4], "1e2 is a hundred"


def test_tables_in_csv_are_json(bench):
    quoted = json.dumps(["a", "b"]).replace('"', '""')
    table = json.dumps({"name": "identity"}).replace('"', '""')
    (item,) = made(bench, f'prompt,method\na,"{table}"\n', "jobs.csv")
    assert [method["name"] for method in item.methods] == ["identity"]
    (item,) = made(bench, f'panels,prompt\n" {quoted}",on white\n', "jobs.csv")
    assert item.kind == "imageset"
    assert [panel["prompt"] for panel in item.params["panels"]] == ["a", "b"]
    with pytest.raises(BadRows, match="line 2: panels is not valid JSON"):
        Jobs(bench.write("panels,prompt\n[a,b\n", "jobs.csv"), allow_extra=True).check()


# -- the file changes -----------------------------------------------------------------------------------


def test_a_file_that_changes_after_it_was_checked(bench):
    jobs = Jobs(bench.write([{"prompt": "a"}, {"prompt": "b"}]))
    jobs.check()
    bench.write([{"prompt": "a"}, {"prompt": 3}])
    items = jobs.items(PRINTS)
    assert next(items).params["prompt"] == "a"
    with pytest.raises(ConfigError) as caught:
        next(items)
    assert str(caught.value) == (
        f"{jobs.path} changed while it was read (line 2: prompt must be text, found 3); start again"
    )


# -- reading --------------------------------------------------------------------------------------------


def read(bench, data, name="jobs.jsonl"):
    path = bench.folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return [(row.line, row.problem or row.cells) for row in read_rows(path)]


def test_files_are_told_by_their_ending_in_any_case(bench):
    assert read(bench, '{"prompt": "a"}', "JOBS.JSONL") == [(1, {"prompt": "a"})]
    assert read(bench, "prompt\na\n", "jobs.CSV") == [(2, {"prompt": "a"})]
    assert read(bench, "a\n", "jobs.Txt") == [(1, {"prompt": "a"})]
    kinds = "['.jsonl', '.csv', '.parquet', '.txt']"
    with pytest.raises(ConfigError) as caught:
        read(bench, "a\n", "jobs")
    assert str(caught.value) == f"a job file ends in one of {kinds}, found jobs"
    (bench.folder / "folder.txt").mkdir()
    with pytest.raises(ConfigError, match=r"^there is no job file at .*folder\.txt$"):
        read_rows(bench.folder / "folder.txt")
    assert [row.typed for row in read_rows(bench.write("prompt\na\n", "a.csv"))] == [False]
    assert [row.typed for row in read_rows(bench.write("a\n", "a.txt"))] == [True]


@pytest.mark.parametrize("name", ["jobs.jsonl", "jobs.txt", "jobs.csv"])
def test_a_bad_line_does_not_hide_the_next(bench, name):
    lines = {b"a\x00b": "the line holds a NUL byte", b"ab\xffc": "the line is not UTF-8 (byte 2)"}
    lines[b"x" * (LINE_BYTES + 1)] = f"the line is longer than {LINE_BYTES:,} bytes"
    lines[b"x" * (3 * LINE_BYTES)] = f"the line is longer than {LINE_BYTES:,} bytes"
    head = b"prompt\n" if name.endswith("csv") else b""
    good = b'{"prompt": "good"}' if name.endswith("jsonl") else b"good"
    first = 1 + head.count(b"\n")
    text = head + b"".join(bad + b"\n" + good + b"\n" for bad in lines)
    want = []
    for i, problem in enumerate(lines.values()):
        want += [(first + 2 * i, problem), (first + 2 * i + 1, {"prompt": "good"})]
    assert read(bench, text, name) == want
    used = [row.cells for row in read_rows(bench.folder / name) if row.problem]
    assert len(used) == 4 and all(cells in ({}, {"prompt": ""}) for cells in used)
    assert read(bench, head + b"ab\xffc", name) == [(first, "the line is not UTF-8 (byte 2)")]


def test_the_longest_line_that_is_read(bench):
    text = json.dumps({"prompt": ""})
    for length, fits in ((LINE_BYTES - 1, True), (LINE_BYTES, False)):
        line = text.replace('""', '"' + "x" * (length - len(text)) + '"')
        assert len(line) == length
        ((number, found),) = read(bench, line + "\n")
        assert number == 1 and isinstance(found, dict) == fits
    # Without the end of a line there is room for one more.
    ((_, found),) = read(bench, line)
    assert isinstance(found, dict)


def test_marks_at_the_start_of_a_file(bench):
    for code in ("utf-16", "utf-16-be"):
        data = "\ufeff".encode("utf-16-be") * (code != "utf-16") + '{"a": 1}\n{"a": 2}'.encode(code)
        assert read(bench, data) == [(1, "the file is UTF-16; save it as UTF-8")]
    mark = b"\xef\xbb\xbf"
    assert read(bench, mark + b"\n" + b'{"a": 1}') == [(2, {"a": 1})]
    ((line, problem),) = read(bench, b"\n" + mark + b'{"a": 1}')
    assert line == 2 and problem.startswith("not valid JSON: "), "only there it is no text"
    assert read(bench, b"\n\xff\xfe\n") == [(2, "the line is not UTF-8 (byte 0)")]


def test_rows_of_csv_start_where_they_start(bench):
    text = 'id,prompt,steps\n\n"a","two\nlines"\nb\n , ,\nc,x,1,2\nd,"x"\n'
    assert read(bench, text, "jobs.csv") == [
        (3, {"id": "a", "prompt": "two\nlines"}),
        (5, {"id": "b"}),
        (7, "4 cells under 3 columns"),
        (8, {"id": "d", "prompt": "x"}),
    ]
    assert read(bench, "prompt", "jobs.csv") == []
    half = "x" * (
        LINE_BYTES // 2 - 2
    )  # with two quotes and the ends of lines, to the last character
    ((line, cells),) = read(bench, f'prompt\n"{half}\n{half}"\n', "jobs.csv")
    assert line == 2 and len(cells["prompt"]) == LINE_BYTES - 3
    ((line, problem),) = read(bench, f'prompt\n"{half}\nx{half}"\n', "jobs.csv")
    assert line == 2 and problem.endswith(f"the row is longer than {LINE_BYTES:,} characters")


def test_after_a_stray_quote_no_row_is_guessed(bench):
    ((line, problem),) = read(bench, 'prompt\n"a"b\nc\n', "jobs.csv")
    assert line == 2 and problem.startswith("not valid CSV: ")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("", "must name up to 200 columns: 0 columns"),
        (" , ", "must name up to 200 columns: 2 columns"),
        (",".join(f"c{i}" for i in range(201)), "must name up to 200 columns: 201 columns"),
        ("a\x00b", "up to 200 columns: the line holds a NUL byte"),
        ('a,"b"c', "the head of the table is not valid CSV: "),
        ("a, a", "every column needs a name of its own, found ['a', 'a']"),
        ("a,", "every column needs a name of its own, found ['a', '']"),
    ],
)
def test_heads_that_are_none(bench, head, said):
    with pytest.raises(ConfigError) as caught:
        read(bench, f"{head}\nx\n", "jobs.csv")
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{bench.folder / 'jobs.csv'}: ")


def test_two_hundred_columns_are_read(bench):
    head = ",".join(f" c{i} " for i in range(200))
    ((_, cells),) = read(bench, f"{head}\nx\n", "jobs.csv")
    assert cells == {"c0": "x"}


def test_columns_of_parquet_have_limits_too(bench):
    pa = pytest.importorskip("pyarrow", reason="parquet needs the extra [batch]")
    import pyarrow.parquet as pq

    path = bench.folder / "jobs.parquet"
    for names, fits in (
        ([f"c{i}" for i in range(200)], True),
        ([f"c{i}" for i in range(201)], False),
        (["a", "a"], False),
    ):
        arrays = [pa.array(["x", None])] * len(names)
        pq.write_table(pa.Table.from_arrays(arrays, names), path)
        if fits:
            first, second = read_rows(path)
            assert (first.line, second.line) == (1, 2)
            assert (len(first.cells), second.cells) == (200, {})
        else:
            with pytest.raises(ConfigError, match=f"up to 200 columns .*found {len(names)}"):
                list(read_rows(path))
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(300)]}), path)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert [row.line for row in read_rows(path)] == [*range(1, 301)]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    pq.ParquetWriter(path, pa.schema([("prompt", pa.string())])).close()
    assert list(read_rows(path)) == [], "not one group of rows"
    with pytest.raises(ConfigError, match="has no rows"):
        Jobs(path).check()
