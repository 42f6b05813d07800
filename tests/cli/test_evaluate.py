"""``mmattn eval``: oracles, protocols on scenes, and protocols on files in the published formats."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from mmattn.cli import main
from mmattn.mini import manifest


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An untrained embedded model: these tests are about the command."""
    from mmattn.mini import vlm

    folder = tmp_path_factory.mktemp("weights")
    vlm.save(*vlm.build(layers=1), folder / "vlm")
    manifest.write(folder)
    return folder


@pytest.fixture(autouse=True)
def place(root, monkeypatch, tmp_path):
    monkeypatch.setattr("mmattn.measuring._settle", lambda: None)  # half a second per column
    monkeypatch.setenv("MMATTN_WEIGHTS", str(root))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


QUESTIONS = [
    {"question_id": 1, "image": "a.png", "text": "Is there a cup in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.png", "text": "Is there a dog in the image?", "label": "no"},
]


@pytest.mark.parametrize("protocol", ["pope", "chair", "mme", "amber"])
def test_a_protocol_on_scenes(run, tmp_path, protocol):
    arguments = (*("eval", protocol, "-m", "hiprune:keep=8", "--samples", "2", "--json"),)
    arguments += ("--max-new-tokens", "3", "--out", "here", "-q")
    code, out, err = run(*arguments)
    data = json.loads(out)
    assert code == 0 and data["protocol"] == protocol and data["model"] == "vlm"
    assert [column["label"] for column in data["columns"]] == ["dense", "hiprune keep=8"]
    dense, pruned = data["columns"]
    assert pruned["cost"]["tokens_kept"] == 8 and not dense["differences"]
    assert set(pruned["differences"]) == set(pruned["rates"])
    assert all(r["low"] <= r["value"] <= r["high"] for r in dense["rates"].values())
    folder = tmp_path / "here" / protocol / "hiprune-keep=8"
    assert {"answers.jsonl", "result.json", f"samples_{protocol}.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    assert (
        run(*arguments)[1] == out
    )  # everything is answered: times included, nothing was asked again
    code, _, err = run("eval", protocol, "--samples", "3", "--out", "here", "-m", "vhr", "-q")
    assert code == 2 and "answers of other settings" in err and "--out" in err


def test_the_table_is_text_and_defaults_are_compared(run):
    code, out, err = run("eval", "pope", "--samples", "2")
    assert code == 0
    rows = out.splitlines()
    assert rows[0].split()[:2] == ["F1", "F1"] and "yes" in rows[0] and "unparsed" in rows[0]
    assert [row.split()[0] for row in rows[1:]] == ["dense", "hiprune", "random-prune", "vhr"]
    assert "out/eval/pope" in err and "bootstrap" in err and "] dense" in err


def test_the_model_alone_names_its_oracle(run):
    code, out, _ = run("eval", "--model", "vlm", "-m", "vhr", "--samples", "2", "--json", "-q")
    both = json.loads(out)
    assert code == 0 and [row["label"] for row in both["rows"]] == ["dense", "vhr"]
    code, out, _ = run("eval", "vlm", "-m", "vhr", "--samples", "2", "--json", "-q")
    again = json.loads(out)
    for data in (both, again):
        for row in data["rows"]:
            row.pop("seconds")
    assert again == both


def test_a_folder_is_asked_about_own_pictures(run, root, tmp_path):
    Image.new("RGB", (90, 70), (200, 30, 30)).save(tmp_path / "a.png")
    path = write_lines(tmp_path / "popular.jsonl", QUESTIONS)
    code, out, err = run(
        *("eval", "pope", "--model", str(root / "vlm"), "--questions", path, "--images", "."),
        *("--json", "-q", "--generate", "num_beams=2", "--suffix", " yes or no ?"),
    )
    data = json.loads(out)
    assert code == 0, err
    assert [c["label"] for c in data["columns"]] == ["dense"] and data["columns"][0]["items"] == 2
    lines = (tmp_path / "out/eval/pope/dense/samples_pope.jsonl").read_text().splitlines()
    sample = json.loads(lines[0])
    assert sample["arguments"][0].endswith("image? yes or no ?")
    assert sample["arguments"][1]["num_beams"] == 2 and sample["input_media"] == ["a.png"]


def test_finished_answers_are_graded_without_a_model(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MMATTN_WEIGHTS", str(tmp_path / "nothing"))
    questions = write_lines(tmp_path / "popular.jsonl", QUESTIONS)
    said = ("Yes.", "There is no dog")
    rows = [{"question": q["text"], "answer": a} for q, a in zip(QUESTIONS, said, strict=True)]
    answers = write_lines(tmp_path / "answers.jsonl", rows)

    def rates(*arguments):
        code, out, err = run("eval", *arguments, "--json", "-q")
        assert code == 0, err
        return {k: v["value"] for k, v in json.loads(out)["columns"][0]["rates"].items()}

    given = ("pope", "--questions", questions, "--answers", answers)
    assert rates(*given)["accuracy"] == 1
    strict = rates(*given, "--parse", "strict")
    assert strict["accuracy"] == 0.5 and strict["unparsed"] == 0.5
    truth = write_lines(tmp_path / "t.jsonl", [{"image_id": i, "gt_object": ["cup"]} for i in "12"])
    write_lines(tmp_path / "w.jsonl", [{"image_id": 1, "gt_object": ["dog", "cup"]}])
    captions = write_lines(tmp_path / "c.jsonl", [{"image_id": 1, "caption": "A cup."}])
    assert rates("chair", "--truth", truth, "--answers", captions)["coverage"] == 1
    results = tmp_path / "results"
    results.mkdir()
    (results / "color.txt").write_text("a\tq?\tYes\tyes\na\tr?\tNo\tYes\n")
    assert rates("mme", "--answers", str(results))["color"] == 50
    notes = [{"id": 1, "type": "relation", "truth": "no"}]
    (tmp_path / "n.json").write_text(json.dumps(notes))
    (tmp_path / "r.json").write_text(json.dumps([{"id": 1, "response": "No"}]))
    graded = rates("amber", "--truth", "n.json", "--answers", "r.json", "--parse", "official")
    assert graded["accuracy"] == pytest.approx(1 / 1.001)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("eval", "popee"), "did you mean 'pope'"),
        (("eval", "vit", "--model", "./x"), "name a protocol"),
        (("eval", "vlm", "--questions", "q"), "--questions is for the protocols"),
        (("eval", "pope", "--parse", "loose"), "--parse is one of"),
        (("eval", "pope", "--model", "./nothing"), "no model folder at ./nothing"),
        (("eval", "pope", "--images", "."), "needs --questions"),
        (("eval", "pope", "--questions", "q.jsonl"), "--images FOLDER"),
        (
            ("eval", "pope", "--questions", "q.jsonl", "--images", "no"),
            "no folder of pictures at no",
        ),
        (
            ("eval", "pope", "--questions", "no.jsonl", "--images", "."),
            "there is no file at no.jsonl",
        ),
        (("eval", "pope", "--questions", "q.jsonl", "--images", "."), "line 2 asks about b.png"),
        (("eval", "chair", "--answers", "q.jsonl"), "needs --truth"),
        (
            ("eval", "chair", "--truth", "t.jsonl", "--answers", "c.jsonl"),
            "nothing about image_id 2",
        ),
        (("eval", "amber", "--truth", "t.jsonl"), "--questions query_all.json or --answers"),
        (("eval", "pope", "--samples", "2", "--generate", "beams"), "key=value"),
        (("eval", "mme", "--answers", "r", "-m", "vhr"), "leave out -m"),
    ],
)
def test_user_errors_are_one_sentence(run, tmp_path, arguments, said):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    write_lines(tmp_path / "q.jsonl", [QUESTIONS[0], {**QUESTIONS[1], "image": "b.png"}])
    write_lines(tmp_path / "t.jsonl", [{"image_id": 1, "gt_object": ["cup"]}])
    write_lines(tmp_path / "c.jsonl", [{"image_id": 2, "caption": "A cup."}])
    (tmp_path / "r").mkdir()
    (tmp_path / "r/color.txt").write_text("a\tq?\tYes\tyes\na\tr?\tNo\tYes\n")
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert said in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_column_that_does_not_fit_exits_3(run):
    code, out, err = run("eval", "mme", "-m", "vmoba", "--samples", "2", "--json", "-q")
    dense, misfit = json.loads(out)["columns"]
    assert code == 3 and dense["status"] == "ok" and misfit["status"] != "ok"
    assert misfit["error"] and "mme vmoba" in err


def test_ctrl_c_keeps_the_answers(run, tmp_path, monkeypatch):
    from mmattn.evals._asking import Asker

    answer, calls = Asker.__call__, []

    def stop(self, items):
        calls.append(len(items))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, items)

    monkeypatch.setattr(Asker, "__call__", stop)
    arguments = ("eval", "mme", "-m", "vhr", "--samples", "4", "--batch", "3", "-q")
    code, _, err = run(*arguments)
    assert code == 130 and "goes on from there" in err
    path = tmp_path / "out/eval/mme/dense/answers.jsonl"
    assert len(path.read_text().splitlines()) == 1 + 3
    assert run(*arguments)[0] == 0
    assert sum(calls) - 3 == 2 * len(
        [line for line in path.read_text().splitlines() if '"response"' in line]
    )
