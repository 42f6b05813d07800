"""Identity, seed, key and file name of an item."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from mmattn.batch.items import Item, digest, seed_of
from mmattn.batch.jobs import BadRows, Shard
from mmattn.batch.limits import safe_stem
from mmattn.errors import ConfigError


def test_identity_depends_on_content_alone(bench):
    rows = [{"prompt": f"p{i}", "steps": 2 + i % 3} for i in range(30)]
    plain = {i.params["prompt"]: i for i in bench.items(bench.write(rows))}
    random.Random(0).shuffle(rows)
    mixed = {i.params["prompt"]: i for i in bench.items(bench.write(rows))}
    for prompt, item in plain.items():
        other = mixed[prompt]
        assert (item.id, item.seed, item.key, item.file) == (
            other.id,
            other.seed,
            other.key,
            other.file,
        )
    assert len({i.id for i in plain.values()}) == len({i.seed for i in plain.values()}) == 30


def test_seeds_come_from_ids_and_are_the_same_everywhere():
    assert seed_of("item-0") == int(hashlib.sha256(b"item-0").hexdigest()[:8], 16)
    code = "from mmattn.batch.items import seed_of, digest; print(seed_of('a'), digest({'b': 1, 'a': 2}))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert said == {f"{seed_of('a')} {digest({'a': 2, 'b': 1})}\n"}


def test_n_items_have_a_seed_each(bench):
    path = bench.write(
        [{"id": "a", "prompt": "x", "n": 3}, {"id": "b", "prompt": "x", "n": 2, "seed": 10}]
    )
    items = bench.items(path)
    assert [i.id for i in items] == ["a-0", "a-1", "a-2", "b-0", "b-1"]
    assert [i.seed for i in items] == [*(seed_of(f"a-{k}") for k in range(3)), 10, 11]


def test_the_same_row_twice_is_two_items(bench):
    items = bench.items(bench.write("a cat\na dog\na cat\na cat\n", "jobs.txt"))
    assert len({i.id for i in items}) == 4
    again = bench.items(bench.write("a cat\na cat\na dog\na cat\n", "jobs.txt"))
    assert {i.id for i in items} == {i.id for i in again}
    shares = [bench.items(bench.folder / "jobs.txt", Shard(k, 2)) for k in (0, 1)]
    assert {i.id for share in shares for i in share} == {i.id for i in items}


def test_an_id_is_used_once_whatever_the_kind(bench):
    # The manifest knows items by their ids alone.
    path = bench.write([{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "x", "num_frames": 2}])
    with pytest.raises(BadRows, match="line 2: the id 'a' is taken by a row above"):
        bench.items(path)


def test_what_changes_the_key(bench):
    base = {"id": "a", "prompt": "x"}

    def key(row, fingerprint="m"):
        jobs = bench.jobs(bench.write([row]))
        return next(iter(jobs.items({"image": fingerprint}))).key

    same = key(base)
    assert key({**base, "kind": "image"}) == same
    assert key(base, "other model") != same
    for change in (
        {"steps": 3},
        {"seed": 5},
        {"prompt": "y"},
        {"method": "identity"},
        {"width": 32},
    ):
        assert key({**base, **change}) != same
    # The spelling of a method does not count, its settings do.
    spelled = key({**base, "method": "tome:r=4"})
    assert key({**base, "method": {"name": "tome", "r": 4}}) == spelled
    assert key({**base, "method": [{"name": "tome", "r": 4}]}) == spelled
    assert key({**base, "method": "tome:r=5"}) != spelled


def test_a_picture_counts_by_content_and_not_by_place(bench):
    first, second = bench.folder / "a.png", bench.folder / "deep" / "b.png"
    second.parent.mkdir()
    Image.new("RGB", (8, 8), "red").save(first)
    shutil.copy(first, second)
    rows = [
        {"id": str(i), "prompt": "x", "init_image": p}
        for i, p in enumerate(("a.png", "deep/b.png"))
    ]
    one, two = bench.items(bench.write([{**row, "seed": 1} for row in rows]))
    assert one.key == two.key and one.params["init_image"] != two.params["init_image"]
    Image.new("RGB", (8, 8), "blue").save(first)
    changed, _ = bench.items(bench.write([{**row, "seed": 1} for row in rows]))
    assert changed.key != two.key
    # Without ids, copies of one picture are two items still.
    shutil.copy(first, second)
    copies = bench.items(
        bench.write([{"prompt": "x", "init_image": r["init_image"]} for r in rows])
    )
    assert len({item.id for item in copies}) == 2


@pytest.mark.parametrize(
    ("name", "plain"),
    [("a", True), ("A-b_c.1", True), ("x" * 80, True), ("x" * 81, False), (".hidden", False)]
    + [("..", False), ("a/b", False), ("../../etc", False), ("CON", False), ("nul.txt", False)]
    + [("a b", False), ("größe", False), ("a.", False), ("<script>", False), ("a\n", False)],
)
def test_file_names_are_plain_or_hashed(name, plain):
    stem = safe_stem(name)
    assert (stem == name) == plain
    assert plain or (len(stem) == 16 and set(stem) <= set("0123456789abcdef"))
    item = Item(name, "image", 0, {}, (), "dense", "m")
    folder, shelf, file = item.file.split("/")
    assert (folder, file) == ("images", stem + ".png") and len(shelf) == 2


def test_items_that_can_share_a_call(bench):
    rows = [{"prompt": "a"}, {"prompt": "b", "seed": 3}, {"prompt": "c", "steps": 3}]
    rows += [{"prompt": "d", "method": "identity"}, {"prompt": "e", "num_frames": 2}]
    items = bench.items(bench.write(rows))
    assert items[0].group == items[1].group
    assert len({item.group for item in items}) == 4


def test_shards_are_written_as_i_of_n():
    assert Shard.parse("0/3") == Shard(0, 3)
    for wrong in ("3/3", "-1/3", "1", "a/b", "1/0", "/2"):
        with pytest.raises(ConfigError, match="i/n"):
            Shard.parse(wrong)
