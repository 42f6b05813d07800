"""``mmattn batch``, ``inspect`` and ``rerun``: streams, exit codes, options, on the embedded models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from mmattn.cli import main

ROWS = [
    {"id": "red", "prompt": "a red circle on a white background"},
    {"id": "blue", "prompt": "a blue square", "method": "agent-attention:agents=16", "n": 2},
]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def write(rows, name="jobs.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_a_batch_resumes_tells_its_numbers_and_can_be_made_again(run):
    jobs = write(ROWS)
    code, out, err = run("batch", jobs, "--out", "o", "--steps", "2", "--json")
    told = json.loads(out)
    assert code == 0 and (told["ok"], told["failed"], told["planned"]) == (3, 0, 3)
    assert "3 made, 0 failed, 0 were there" in err
    files = sorted(Path("o").rglob("*.png"))
    assert [f.name for f in files if f.stem == "red"] == ["red.png"]
    assert {f.stem for f in files} == {"red", "blue-0", "blue-1"}
    record = json.loads(Path("o/run.json").read_text())["runs"][0]
    assert record["items"] == {"image": 3} and record["defaults"] == {"steps": 2}
    assert len(record["models"]["image"]["files"]["transformer/config.json"]) == 64
    for name in ("manifest.jsonl", "failures.jsonl", "results.csv", "index.html"):
        assert Path("o", name).is_file()

    code, out, err = run("batch", jobs, "--out", "o", "--steps", "2", "--quiet")
    assert (code, out, err) == (0, "", "")
    code, out, err = run("batch", jobs, "--out", "o", "--steps", "2", "--dry-run")
    assert code == 0 and out.count("done") == 3

    blue = next(f for f in files if f.stem == "blue-0")
    code, out, _ = run("inspect", str(blue))
    meta = json.loads(out)["mmattn"]
    assert code == 0 and meta["id"] == "blue-0" and meta["methods"][0]["agents"] == 16
    code, out, err = run("rerun", str(blue), "--out", "again")
    assert code == 0 and "identical" in err
    assert Path(out.strip()).read_bytes() == blue.read_bytes()
    Path("taken").write_text("a file where a folder should be")
    code, out, err = run("rerun", str(blue), "--out", "taken")
    assert (code, out) == (4, "") and "cannot be written" in err


def test_files_are_made_again_and_options_win(run):
    Image.new("RGB", (64, 64), (200, 30, 30)).save("photo.png")
    rows = [*ROWS, {"id": "words", "image": "photo.png", "max_new_tokens": 4}]
    assert run("batch", write(rows), "--out", "first", "--steps", "2")[0] == 0
    first = {
        p.name: p for p in Path("first").rglob("*.*") if p.parent.parent.parent.name == "first"
    }
    assert sorted(first) == ["blue-0.png", "blue-1.png", "red.png", "words.json"]

    code, _, err = run("batch", "first", "--out", "same")
    assert code == 0 and "first: 4 files, " in err and "other weights" not in err
    for path in first.values():
        assert Path("same", *path.parts[1:]).read_bytes() == path.read_bytes()

    changes = ("--steps", "1", "-m", "identity", "--seed", "5")
    code, out, _ = run("batch", "first/images", "--out", "other", *changes, "--dry-run", "--json")
    planned = {entry["id"]: entry for entry in json.loads(out)}
    assert code == 0 and sorted(planned) == ["blue-0", "blue-1", "red"]
    for name, entry in planned.items():
        meta = json.loads(run("inspect", str(first[f"{name}.png"]))[1])["mmattn"]
        assert (entry["seed"], entry["method"]) == (meta["seed"], "identity")
    assert run("batch", "first/images", "--out", "other", *changes)[0] == 0
    meta = json.loads(run("inspect", str(Path("other", *first["red.png"].parts[1:])))[1])["mmattn"]
    assert (meta["steps"], meta["methods"][0]["name"]) == (1, "identity")
    code, _, err = run("batch", "first/images", "--out", "other", *changes)
    assert code == 0 and "0 made, 0 failed, 3 were there" in err
    code, out, _ = run("batch", "first/images", "--out", "none", "-m", "dense", "--dry-run")
    assert code == 0 and out.count("dense") == 3


def test_files_of_others_are_listed_and_nothing_is_made(run):
    Image.new("RGB", (4, 4)).save("holiday.png")
    Path("in").mkdir()
    for name in ("b", "a"):
        Image.new("RGB", (4, 4)).save(f"in/{name}.png")
    code, out, err = run("batch", "in", "holiday.png", "--out", "o")
    assert code == 2 and not out and not Path("o").exists()
    assert err.splitlines() == [
        "mmattn: in, holiday.png: 3 files cannot be run",
        *(
            f"{name}: it carries no metadata of mmattn batch"
            for name in ("in/a.png", "in/b.png", "holiday.png")
        ),
    ]
    code, _, err = run("batch", "in", "--out", "in/new")
    assert code == 2 and "one lies in the other" in err and err.count("\n") == 1
    code, _, err = run("batch", write(ROWS), "--set", "agents=8", "--out", "o")
    assert code == 2 and "no -m is given" in err


def test_the_printed_configuration_can_be_given_again(run, monkeypatch):
    jobs = write(ROWS)
    given = ("--steps", "3", "-m", "tome:r=2", "--seed", "0", "--no-metadata", "--batch", "2")
    code, out, err = run("batch", jobs, *given, "--out", "o", "--print-config")
    settings = json.loads(out)["batch"]
    assert code == 0 and not err and not Path("o").exists()
    assert (settings["steps"], settings["seed"], settings["metadata"]) == (3, 0, False)
    assert (settings["batch"], settings["json"], settings["jobs"]) == (2, False, [jobs])
    Path("c.json").write_text(out)
    assert json.loads(run("batch", "--config", "c.json", "--print-config")[1])["batch"] == settings
    monkeypatch.setenv("MMATTN_STEPS", "7")
    for more, steps in (((), 7), (("--steps", "9"), 9)):
        code, out, _ = run("batch", "--config", "c.json", *more, "--print-config")
        assert json.loads(out)["batch"] == {**settings, "steps": steps}


def test_bad_rows_are_listed_before_anything_is_made(run):
    jobs = write([{"prompt": "fine"}, {"promt": "a"}, {"prompt": "b", "steps": -1}])
    code, out, err = run("batch", jobs, "--out", "o")
    assert code == 2 and not out and not Path("o").exists()
    lines = err.splitlines()
    assert lines[0].startswith("mmattn: jobs.jsonl: 2 rows cannot be run")
    assert lines[1].startswith("line 2: unknown key ['promt'], did you mean 'prompt'?")
    assert lines[2].startswith("line 3: steps must be")


def test_bad_rows_are_found_without_loading_torch():
    write([{"prompt": 3}])
    Path("in").mkdir()
    Image.new("RGB", (4, 4)).save("in/a.png")
    code = (
        "import sys\nfrom mmattn.cli import main\n"
        "assert main(['batch', 'jobs.jsonl']) == 2\n"
        "assert main(['batch', 'in']) == 2\n"
        "assert main(['batch', '--help']) == 0\n"
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--shard", "3/3"), "i/n"),
        (("--max-failures", "lots"), "--max-failures"),
        (("--verify", "maybe"), "--verify is one of"),
        (("--dtype", "int8"), "--dtype is one of"),
        (("--model", "vit"), "of kind vit"),
        (("-m", "vmobaa"), "vmoba"),
        (("--steps", "5000"), "steps must be"),
    ],
)
def test_wrong_options_are_one_sentence(run, arguments, part):
    code, out, err = run("batch", write(ROWS), "--out", "o", *arguments)
    assert code == 2 and not out and part in err and err.count("\n") == 1
    assert not Path("o").exists()


def test_failed_items_give_exit_code_three(run):
    jobs = write([ROWS[0], {"id": "bad", "prompt": "a circle", "method": "hiprune"}])
    code, _, err = run("batch", jobs, "--out", "o", "--steps", "1")
    assert code == 3 and "1 made, 1 failed" in err and "failures.jsonl" in err
    (failure,) = Path("o/failures.jsonl").read_text().splitlines()
    assert json.loads(failure)["error"]["class"] == "NoSiteError"


def test_a_folder_in_use_and_one_that_cannot_be_written(run):
    from mmattn.batch.ledger import Ledger

    jobs = write(ROWS[:1])
    with Ledger(Path("o")):
        code, _, err = run("batch", jobs, "--out", "o", "--quiet")
    assert code == 2 and "in use by process" in err and err.count("\n") == 1
    Path("file").write_text("")
    code, _, err = run("batch", jobs, "--out", "file", "--quiet")
    assert code == 4 and "cannot be written" in err and err.count("\n") == 1


def test_inspect_and_rerun_of_other_files(run):
    Image.new("RGB", (4, 4)).save("plain.png")
    code, out, _ = run("inspect", "plain.png", "plain.png")
    assert code == 0 and [found["format"] for found in json.loads(out)] == ["png", "png"]
    for arguments in (("rerun", "plain.png"), ("inspect", "none.png")):
        code, out, err = run(*arguments)
        assert code == 2 and not out and err.count("\n") == 1


def test_sigterm_ends_after_the_running_item_with_143():
    jobs = write([{"prompt": "a red circle", "n": 500}])
    with Path("log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "mmattn.cli", "batch", jobs, "--out", "o", "--steps", "2"],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    manifest, deadline = Path("o/manifest.jsonl"), time.monotonic() + 120
    while not (manifest.exists() and manifest.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 143
    said = Path("log").read_text()
    assert "stopped: SIGTERM; the same command goes on from here" in said
    assert "Traceback" not in said
    done = [json.loads(entry) for entry in manifest.read_text().splitlines()]
    assert 1 <= len(done) < 500 and all(entry["status"] == "ok" for entry in done)
    assert len(list(Path("o").rglob("*.png"))) == len(done)
