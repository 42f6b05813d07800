"""MME by hand: the first four characters, pairs, points, and the published files."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from mmattn.errors import ConfigError
from mmattn.evals import mme
from mmattn.evals._protocol import world
from mmattn.evals.harness import score


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("Yes, there is.", "yes"),
        ("no.", "no"),
        # Only the first four characters count.
        ("not sure", "no"),
        ("I know it is", "other"),
        ("It is. Yes", "other"),
        ("Nowhere", "no"),
        ("a no", "no"),
        ("", "other"),
    ],
)
def test_reading_of_answers(text, said):
    assert mme.parse_answer(text) == said


LINES = [
    ("a.png", "Is there a cup?", "Yes"),
    ("a.png", "Is there a dog?", "No"),
    ("b.png", "Is there a star?", "Yes"),
    ("b.png", "Is there a kite?", "No"),
]


def folder(tmp_path, tasks, pictures=True):
    """A folder of question files, and one of pictures."""
    (tmp_path / "questions").mkdir()
    for task, rows in tasks.items():
        text = "".join("\t".join(row) + "\n" for row in rows)
        (tmp_path / "questions" / f"{task}.txt").write_text(text)
    images = tmp_path / "images"
    for task, rows in tasks.items():
        (images / task).mkdir(parents=True)
        for row in rows if pictures else ():
            Image.new("RGB", (8, 8)).save(images / task / row[0])
    return tmp_path / "questions", images


def test_points_by_hand(tmp_path):
    questions, images = folder(tmp_path, {"existence": LINES, "color": LINES})
    protocol = mme.Mme.from_files(questions, images=images)
    assert [item.doc["category"] for item in protocol.items] == ["color"] * 4 + ["existence"] * 4
    assert protocol.items[0].picture == "color/a.png"
    # color: one pair right, 3 of 4 questions; existence: always yes.
    rates = score(protocol, ["yes", "no", "no", "no", *["yes"] * 4])["rates"]
    assert rates["color"] == pytest.approx(75 + 50)
    assert rates["existence"] == pytest.approx(50 + 0)
    assert rates["total"] == rates["hallucination"] == pytest.approx(175)
    assert rates["yes_ratio"] == pytest.approx(5 / 8)
    perfect = score(protocol, ["yes", "no"] * 4)["rates"]
    assert perfect["total"] == pytest.approx(400)


def test_unreadable_answers_are_wrong_and_counted(tmp_path):
    questions, images = folder(tmp_path, {"count": LINES})
    rates = score(mme.Mme.from_files(questions, images=images), ["I see", "no", "yes", "maybe"])
    assert rates["rates"]["other"] == pytest.approx(0.5)
    assert rates["rates"]["count"] == pytest.approx(50)
    assert "hallucination" not in rates["rates"]  # one subtask is no sum


def test_random_guessing_is_75_points():
    """Four equally likely pairs of answers: half of the questions, a quarter of the pairs."""
    names = ("questions", "right", "both", "pictures", "yes", "other")
    totals = dict(zip(names, (8.0, 4.0, 1.0, 4.0, 4.0, 0.0), strict=True))
    rates = mme.rates({f"count/{k}": torch.tensor([v]) for k, v in totals.items()})
    assert float(rates["count"]) == 75


def test_results_round_trip(tmp_path):
    questions, images = folder(tmp_path, {"existence": LINES})
    protocol = mme.Mme.from_files(questions, images=images)
    said = ["yes", "Yes, a\tdog", "no", "no"]
    protocol.write(tmp_path / "out", said)
    text = (tmp_path / "out/results/existence.txt").read_text()
    assert text.splitlines()[1] == "a.png\tIs there a dog?\tNo\tYes, a dog"
    again, found = mme.read_results(tmp_path / "out/results")
    assert score(again, found)["rates"] == score(protocol, said)["rates"]


def test_jsonl_and_the_payload(tmp_path):
    rows = [{"image": i, "category": "OCR", "question": q, "answer": a} for i, q, a in LINES]
    path = tmp_path / "mme.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    protocol = mme.Mme.from_files(path)
    assert protocol.payload(protocol.items[1], "Yes") == {
        "mme_perception_score": {"question_id": "a.png", "category": "OCR", "score": 0.0}
    }


def test_errors_name_the_line(tmp_path):
    questions, images = folder(tmp_path, {"count": LINES}, pictures=False)
    with pytest.raises(ConfigError, match=r"count.txt line 1 asks about a.png, which is not in"):
        mme.Mme.from_files(questions, images=images)
    with pytest.raises(ConfigError, match="line 1 has no answer"):
        mme.read_results(questions)
    (questions / "count.txt").write_text("a.png\tq\tYes\na.png\tq\tperhaps\n")
    with pytest.raises(ConfigError, match="line 2: the answer must be yes or no, found 'perhaps'"):
        mme.Mme.from_files(questions)
    (questions / "count.txt").write_text("a.png\tq\tYes\n")
    with pytest.raises(ConfigError, match=r"1 question\(s\) about a.png; .* exactly two"):
        mme.Mme.from_files(questions)
    (questions / "count.txt").write_text("a.png q Yes\n")
    with pytest.raises(ConfigError, match="separated by tabs, found 1"):
        mme.Mme.from_files(questions)


def test_pairs_about_scenes_are_true():
    drawn = world(20, 3)
    protocol = mme.Mme.from_world(drawn, embedded=False)
    assert {i.doc["category"] for i in protocol.items} == set(mme.HALLUCINATION)
    from mmattn.mini import objects

    for item in protocol.items:
        scene, text = drawn.scenes[int(item.picture)], item.prompt
        words = text.removesuffix(" Please answer yes or no.").rstrip("?").split()
        assert text.endswith(" Please answer yes or no.")
        task = item.doc["category"]
        if task == "existence":
            fact = words[3] in scene.names
        elif task == "count":
            fact = int(words[2]) == len(scene.objects)
        elif task == "position":
            x = next(o.x for o in scene.objects if o.name == words[2])
            fact = (x < objects.SIZE / 2) == ("left" in words)
        else:
            fact = objects.KINDS[words[2]][1] == words[3]
        assert fact == (item.target == "yes")


def test_the_embedded_model_is_asked_in_words_it_knows():
    from mmattn.mini import objects

    protocol = mme.Mme.from_world(world(10))
    words = {word for item in protocol.items for word in item.prompt.lower().rstrip("?").split()}
    assert words <= set(objects.WORDS)
    habit = [i for i in protocol.items if i.doc["category"] == "habit" and i.target == "no"]
    scenes = world(10).scenes
    for item in habit:
        assert item.prompt.split()[3] in objects.absent_partners(scenes[int(item.picture)])
    with pytest.raises(ConfigError, match="unknown subtask 'OCR'"):
        mme.Mme.from_world(world(2), tasks=["OCR"])
