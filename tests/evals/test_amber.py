"""AMBER by hand: nouns, associations, the class "No", and the published files."""

from __future__ import annotations

import json

import pytest
import torch

from mmattn.errors import ConfigError
from mmattn.evals import amber, chair
from mmattn.evals._protocol import world
from mmattn.evals.harness import score

NOTES = [
    {"id": 1, "type": "generative", "truth": ["tree", "grass"], "hallu": ["dog", "bird"]},
    {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 3, "type": "discriminative-hallucination", "truth": "yes"},
    {"id": 4, "type": "discriminative-attribute-state", "truth": "no"},
    {"id": 5, "type": "discriminative-relation", "truth": "no"},
    {"id": 6, "type": "relation", "truth": "yes"},
]
RELATION = {
    "tree": ["plant", "branch"],
    "grass": ["plant", "lawn"],
    "dog": ["puppy"],
    "bird": [],
    "sky": [],
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "annotations.json").write_text(json.dumps(NOTES))
    (tmp_path / "relation.json").write_text(json.dumps(RELATION))
    (tmp_path / "safe_words.txt").write_text("sky\n")
    return tmp_path


def load(files, **more):
    return amber.Amber.from_files(
        files / "annotations.json",
        relation=files / "relation.json",
        safe_words=files / "safe_words.txt",
        **more,
    )


def test_nouns_are_words_of_the_vocabulary_repeats_included():
    lemma = chair.singular({"tree", "dog", "bus"})
    text = "Trees, a dog; two dogs and a Bus near walls."
    assert amber.nouns(text, {"tree", "dog", "bus"}, lemma) == ["tree", "dog", "dog", "bus"]


def test_a_description_by_hand(files):
    protocol = load(files, answered={"1"})
    counts = protocol.tally(protocol.items, ["A puppy, a puppy and a tree under the sky."])
    # The safe word counts as mentioned, the imagined one as wrong twice but fallen for once.
    assert counts["g.mentioned"] == 4 and counts["g.wrong"] == 2
    assert counts["g.covered"] == 1 and counts["g.fell"] == 1 and not counts["g.clean"]
    rates = score(protocol, ["A puppy, a puppy and a tree under the sky."])["rates"]
    assert rates["chair"] == pytest.approx(2 / 4.001)
    assert rates["cover"] == pytest.approx(1 / 2.001)
    assert rates["cog"] == pytest.approx(1 / 2.001)
    assert rates["hal"] == 1


def test_a_shared_word_covers_the_first_object_only():
    grade = amber.grade(["plant", "lawn"], ["tree", "grass"], [], association=RELATION)
    assert grade["g.covered"] == 2
    assert amber.grade(["plant"], ["tree", "grass"], [], association=RELATION)["g.covered"] == 1


def test_alike_words_excuse_a_noun_and_can_do_both():
    alike = {("puppy", "pup"), ("shrub", "tree"), ("dog", "tree")}

    def similar(a, b):
        return a == b or (a, b) in alike

    assert amber.grade(["shrub"], ["tree"], [], similar=similar)["g.wrong"] == 0
    assert amber.grade(["shrub"], ["tree"], [])["g.wrong"] == 1
    both = amber.grade(["dog"], ["tree"], ["dog"], similar=similar)
    assert (both["g.fell"], both["g.covered"], both["g.wrong"]) == (1, 1, 0)


def test_silence_has_no_chair_and_covers_nothing(files):
    rates = score(load(files, answered={"1"}), [""])["rates"]
    assert (rates["chair"], rates["cover"], rates["cog"]) == (0, 0, 0)
    assert rates["hal"] == pytest.approx(1 - 1 / 1.001)  # one clean answer, denominator 1.001


def test_no_is_the_positive_class(files):
    protocol = load(files, answered={"2", "3", "4", "5", "6"}, parse="official")
    rates = score(protocol, ["No", "No", "no", "Yes", "Yes"])["rates"]
    # Two answers are No, one of them rightly; three truths are no; "no" scores nothing at all.
    precision, recall = 1 / 2.001, 1 / 3.001
    assert rates["precision"] == pytest.approx(precision)
    assert rates["recall"] == pytest.approx(recall)
    assert rates["f1"] == pytest.approx(2 * precision * recall / (precision + recall + 1e-4))
    assert rates["accuracy"] == pytest.approx(2 / 5.001)
    assert rates["unparsed"] == pytest.approx(1 / 5.001)
    assert rates["accuracy_existence"] == pytest.approx(1 / 2.001)
    assert rates["accuracy_attribute"] == 0
    assert rates["accuracy_relation"] == pytest.approx(1 / 2.001)  # both type strings
    strict = score(
        load(files, answered={"2", "3", "4", "5", "6"}), ["No", "No", "no", "Yes", "Yes"]
    )
    assert strict["rates"]["accuracy"] == pytest.approx(3 / 5.001)


def test_always_yes_has_no_precision_at_all():
    counts = [amber.judge("Yes", truth, "relation") for truth in ("yes", "no")]
    totals = {k: torch.tensor([sum(c[k] for c in counts)]) for k in counts[0]}
    rates = amber.rates(totals)
    assert float(rates["f1"]) == 0 and float(rates["accuracy"]) == pytest.approx(1 / 2.001)


def test_the_score_is_the_mean_of_both_halves(files):
    answers = ["A tree and grass.", "No", "Yes", "No", "No", "Yes"]
    rates = score(load(files), answers)["rates"]
    assert rates["amber"] == pytest.approx((1 - rates["chair"] + rates["f1"]) / 2)
    assert rates["amber"] > 0.99


def test_responses_round_trip(files):
    protocol = load(files)
    said = ["A dog.", "no.", "yes", "No", "what?", "Yes"]
    protocol.write(files / "out", said)
    found = amber.read_responses(files / "out/responses.json")
    assert found["2"] == "No" and found["5"] == "what?" and found["1"] == "A dog."
    again = load(files, answered=found, parse="official")
    assert (
        score(again, [found[i.id] for i in again.items])["rates"] == score(protocol, said)["rates"]
    )


def test_errors_say_where(files):
    queries = files / "query.json"
    queries.write_text(json.dumps([{"id": 1, "image": "x.jpg", "query": "Describe this image."}]))
    (files / "images").mkdir()
    with pytest.raises(ConfigError, match=r"entry 1 asks about x.jpg, which is not in"):
        load(files, queries=queries, images=files / "images")
    queries.write_text(json.dumps([{"id": 99, "image": "x.jpg", "query": "Describe this image."}]))
    with pytest.raises(ConfigError, match="no annotation for id 99"):
        load(files, queries=queries)
    with pytest.raises(ConfigError, match=r"id 7 is answered, but .* has no such id"):
        load(files, answered=["1", "7"])
    (files / "annotations.json").write_text(
        json.dumps([{"id": 2, "type": "relation", "truth": "No"}])
    )
    with pytest.raises(ConfigError, match="entry 1: truth must be yes or no, found 'No'"):
        load(files)


def test_scenes_ask_about_what_habit_expects():
    from mmattn.mini import objects

    drawn = world(12, 1)
    protocol = amber.Amber.from_world(drawn)
    assert len(protocol.items) == 12 * 5
    assert [item.doc["id"] for item in protocol.items] == list(range(1, 61))
    for item in protocol.items:
        scene = drawn.scenes[int(item.picture)]
        if item.doc["type"] == "generative":
            assert item.doc["hallu"] == list(objects.absent_partners(scene))
            assert item.doc["truth"] == list(scene.names)
        else:
            assert (item.prompt.rstrip("?").split()[3] in scene.names) == (item.target == "yes")
    truth = [objects.caption(drawn.scenes[int(i.picture)]) for i in protocol.items]
    answers = [
        text if i.doc["type"] == "generative" else i.target
        for i, text in zip(protocol.items, truth, strict=True)
    ]
    rates = score(protocol, answers)["rates"]
    assert rates["chair"] == 0 and rates["cover"] > 0.99 and rates["f1"] > 0.99
