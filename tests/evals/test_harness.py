"""The harness: answers on disk, continuing after a kill, files of the published formats, samples."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from PIL import Image

from mmattn.errors import ConfigError
from mmattn.evals import chair, harness, pope
from mmattn.evals._asking import Asker
from mmattn.evals._protocol import world
from mmattn.loading import Loaded, resolve
from mmattn.mini import vlm
from mmattn.variants import DENSE, parse


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("mmattn.measuring._settle", lambda: None)  # half a second per column


@pytest.fixture(scope="module")
def loaded():
    return resolve("vlm")


@pytest.fixture(scope="module")
def untrained():
    model, processor = vlm.build(layers=1)
    return Loaded("vlm", model.eval(), processor, "untrained")


@pytest.fixture(scope="module")
def drawn():
    return world(3, 5)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- asking and continuing ---------------------------------------------------------------------------


def test_answers_are_those_of_a_plain_call(loaded, drawn, tmp_path):
    protocol = chair.Chair.from_world(drawn, limit=12)
    (result,) = harness.run(protocol, loaded, [], tmp_path, batch=2)
    plain = vlm.reply(
        loaded.target,
        loaded.processor,
        drawn.images,
        [protocol.items[0].prompt] * 3,
        max_new_tokens=12,
    )
    rows = lines(tmp_path / "chair/dense/answers.jsonl")
    assert [row["response"] for row in rows[1:4]] == [text.strip() for text in plain]
    assert all(row["tokens"] == 12 for row in rows[1:4])
    assert all(row["prefill_ms"] > 0 and row["decode_ms"] > 0 for row in rows[1:4])
    told = [protocol.find(text) for text in plain]
    right = chair.score(told, [scene.names for scene in drawn.scenes])
    assert result["rates"]["chair_i"] == pytest.approx(right.chair_i)
    assert result["rates"]["chair_s"] == pytest.approx(right.chair_s)
    assert result["rates"]["coverage"] == pytest.approx(right.coverage)
    assert result["rates"]["words"] == pytest.approx(sum(len(t.split()) for t in plain) / 3, abs=4)


def test_a_killed_run_goes_on_and_ends_the_same(loaded, tmp_path, monkeypatch):
    protocol = pope.Pope.from_world(world(2, 5), parse="strict")
    columns = [parse("random-prune:keep=6"), parse("vhr")]
    whole = harness.run(protocol, loaded, columns, tmp_path / "whole", batch=8)

    asked: list[str] = []
    answer = Asker.__call__

    def counting(self, items):
        if len(asked) >= stop_at:
            raise KeyboardInterrupt
        asked.extend(item.id for item in items)
        return answer(self, items)

    monkeypatch.setattr(Asker, "__call__", counting)
    stop_at = 30
    with pytest.raises(KeyboardInterrupt):
        harness.run(protocol, loaded, columns, tmp_path / "cut", batch=8)
    path = tmp_path / "cut/pope/random-prune-keep=6/answers.jsonl"
    before = len(lines(path)) - 1
    assert 0 < before < len(harness.asks(protocol))
    with path.open("a") as stream:
        stream.write('{"id": "popular/3", "resp')  # a line that the kill cut
    stop_at = 10_000
    again = harness.run(protocol, loaded, columns, tmp_path / "cut", batch=8)
    distinct = len(set(harness.asks(protocol).values()))
    assert len(asked) == 3 * distinct  # nothing was asked twice
    for one, other in zip(whole, again, strict=True):
        assert one["status"] == other["status"] == "ok"
        assert one["tallies"] == other["tallies"]
    for name in ("dense", "random-prune-keep=6", "vhr"):
        files = [tmp_path / side / "pope" / name / "answers.jsonl" for side in ("whole", "cut")]
        said = [{r["id"]: r["response"] for r in lines(f) if "id" in r} for f in files]
        assert said[0] == said[1] and len(said[0]) == distinct
    assert harness.run(protocol, loaded, columns, tmp_path / "cut", batch=8)[0] == again[0]
    assert len(asked) == 3 * distinct


def test_every_batch_draws_its_own_tokens(loaded, drawn, tmp_path):
    """The draw of a batch depends on its number: batches of one picture each are pruned differently."""
    from mmattn.attaching import attach

    protocol = chair.Chair.from_world(drawn, limit=24)
    asker = Asker(loaded, protocol.picture)
    with attach(loaded.target, parse("random-prune:keep=6").methods) as session:
        said = [
            harness._one_batch(asker, session, [protocol.items[0]], seed)[0] for seed in (0, 1, 0)
        ]
    assert said[0]["response"] == said[2]["response"] != said[1]["response"]
    assert said[0]["tokens_kept"] == 6 and said[0]["tokens_in"] == 64


def test_equal_questions_of_several_splits_are_asked_once(drawn):
    protocol = pope.Pope.from_world(drawn)
    groups = harness.batches(protocol, 7)
    asked = [(item.picture, item.prompt) for group in groups for item in group]
    assert len(asked) == len(set(asked)) == len({(i.picture, i.prompt) for i in protocol.items})
    assert len(asked) < len(protocol.items)
    places = [int(picture) for picture, _ in asked]
    assert places == sorted(places)  # questions about one picture are together
    assert all(len({item.limit for item in group}) == 1 for group in groups)


def test_settings_do_not_mix(untrained, drawn, tmp_path):
    protocol = pope.Pope.from_world(drawn)
    harness.run(protocol, untrained, [], tmp_path)
    with pytest.raises(ConfigError, match="other settings: batch was 64 and is now 8"):
        harness.run(protocol, untrained, [], tmp_path, batch=8)
    with pytest.raises(ConfigError, match=r"generation was .*num_beams"):
        harness.run(protocol, untrained, [], tmp_path, generation={"num_beams": 2})
    with pytest.raises(ConfigError, match="items was"):
        harness.run(pope.Pope.from_world(drawn, suffix=" ?"), untrained, [], tmp_path)
    other, processor = vlm.build(layers=1, seed=1)
    with pytest.raises(ConfigError, match="weights was"):
        harness.run(protocol, Loaded("vlm", other.eval(), processor, "untrained"), [], tmp_path)
    # How answers are read is no setting of theirs.
    harness.run(pope.Pope.from_world(drawn, parse="xor"), untrained, [], tmp_path)
    path = tmp_path / "pope/dense/answers.jsonl"
    path.write_text(path.read_text().replace('"tokens"', "tokens", 1))
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        harness.run(protocol, untrained, [], tmp_path)


def test_a_column_that_fails_leaves_the_others(untrained, drawn, tmp_path):
    protocol = chair.Chair.from_world(drawn, limit=3)
    columns = [parse("tome:r=2"), parse("vhr"), parse("hiprune:keep=8")]
    dense, misfit, vhr, hiprune = harness.run(protocol, untrained, columns, tmp_path)
    assert dense["status"] == vhr["status"] == hiprune["status"] == "ok"
    assert misfit["status"] != "ok" and misfit["error"]
    assert hiprune["cost"]["tokens_kept"] == 8 and hiprune["cost"]["tokens_in"] == 64
    assert json.loads((tmp_path / "chair/vhr/result.json").read_text()) == vhr
    with pytest.raises(ConfigError, match="'vhr' is there twice"):
        harness.run(protocol, untrained, [parse("vhr"), parse("vhr")], tmp_path)


def test_beams_and_sampling_are_asked_for(untrained, drawn, tmp_path):
    protocol = chair.Chair.from_world(drawn, limit=4)
    beams = harness.run(protocol, untrained, [], tmp_path / "b", generation={"num_beams": 3})
    assert beams[0]["status"] == "ok"
    rolls = [
        harness.run(
            protocol,
            untrained,
            [],
            tmp_path / f"s{n}{seed}",
            seed=seed,
            generation={"do_sample": True},
        )
        for n, seed in ((0, 0), (1, 0), (2, 1))
    ]
    said = [
        [r["response"] for r in lines(tmp_path / f"s{n}/chair/dense/answers.jsonl") if "id" in r]
        for n in ("00", "10", "21")
    ]
    assert rolls[0][0]["status"] == "ok" and said[0] == said[1] != said[2]


def test_cached_inputs_equal_the_processors(untrained, drawn):
    protocol = pope.Pope.from_world(drawn)
    items = [protocol.items[i] for i in (0, 1, 7, 8)]
    items[1] = type(items[1])(**{**vars(items[1]), "prompt": "describe the picture ."})
    fast = Asker(untrained, protocol.picture)
    slow = Asker(untrained, protocol.picture)
    assert fast.fixed
    slow.fixed = False
    one, other = fast._inputs(items), slow._inputs(items)
    assert set(one) == set(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not one["attention_mask"].all()  # one prompt is shorter: padded on the left
    assert [r["response"] for r in fast(items)] == [r["response"] for r in slow(items)]
    fast.cache_bytes = 0
    assert (
        torch.equal(fast._inputs(items)["pixel_values"], one["pixel_values"]) and not fast._pixels
    )


# -- files -------------------------------------------------------------------------------------------


def test_samples_have_the_fields_of_lmms_eval(untrained, drawn, tmp_path):
    protocol = pope.Pope.from_world(drawn, parse="xor")
    harness.run(protocol, untrained, [], tmp_path)
    rows = lines(tmp_path / "pope/dense/samples_pope.jsonl")
    assert [row["doc_id"] for row in rows] == list(range(len(protocol.items)))
    row, item = rows[-1], protocol.items[-1]
    assert set(row) == {
        *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts"),
        *("doc_hash", "input_media", "pope_accuracy", "pope_precision", "pope_recall"),
        *("pope_f1_score", "pope_yes_ratio"),
    }
    assert set(row["doc"]) >= {"question_id", "question", "answer", "image"}
    assert row["target"] == item.target and row["arguments"][0] == item.prompt
    assert row["arguments"][1] == {"do_sample": False, "max_new_tokens": 2}
    assert isinstance(row["resps"][0][0], str) and isinstance(row["filtered_resps"][0], str)
    text = json.dumps(row["doc"], indent=2, ensure_ascii=False)
    assert row["doc_hash"] == hashlib.sha256(text.encode()).hexdigest()
    assert set(row["pope_accuracy"]) == {"question_id", "score", "prediction", "ground_truth"}


QUESTIONS = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a cup in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "no"},
    {"question_id": 3, "image": "b.jpg", "text": "Is there a star in the image?", "label": "yes"},
    {"question_id": 4, "image": "b.jpg", "text": "Is there a kite in the image?", "label": "no"},
]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pope_files_round_trip(tmp_path):
    path = write_lines(tmp_path / "coco_pope_popular.json", QUESTIONS)
    protocol = pope.Pope.from_files([path])
    said = ["Yes, there is.", "There is no dog.", "I cannot tell", "yes and no"]
    protocol.write(tmp_path, said)
    assert lines(tmp_path / "questions_popular.jsonl") == QUESTIONS
    answers = [tmp_path / "answers_popular.jsonl"]
    assert lines(answers[0])[1] == {"question": QUESTIONS[1]["text"], "answer": "There is no dog."}
    assert protocol.read_answers(answers) == said
    with pytest.raises(ConfigError, match="found 4 answers to 8 questions"):
        more = write_lines(tmp_path / "coco_pope_random.json", QUESTIONS)
        pope.Pope.from_files([path, more]).read_answers(answers)
    write_lines(answers[0], [{"question": q["text"], "answer": "x"} for q in QUESTIONS[::-1]])
    with pytest.raises(ConfigError, match=r"line 1 answers .*kite.* but popular/1 asks"):
        protocol.read_answers(answers)


def test_the_three_ways_to_read_answers(tmp_path):
    path = write_lines(tmp_path / "popular.jsonl", QUESTIONS)
    said = ["Yes, there is.", "There is no dog.", "I cannot tell", "yes and no"]
    rates = {
        how: harness.score(pope.Pope.from_files([path], parse=how), said)["rates"]
        for how in ("official", "strict", "xor")
    }
    # Official: all that is not no is yes, so "I cannot tell" is a right yes.
    assert rates["official"]["accuracy"] == 1 and rates["official"]["yes_ratio"] == 0.5
    assert rates["official"]["unparsed"] == 0
    assert rates["strict"]["accuracy"] == 0 and rates["strict"]["unparsed"] == 1
    assert rates["xor"]["accuracy"] == 0.5 and rates["xor"]["unparsed"] == 0.5
    assert (
        rates["xor"]["yes_ratio"] == 0.25
    )  # of the predictions, although half of the truth is yes
    assert rates["xor"]["recall"] == 0.5  # what could not be read was not found


def test_pope_rates_are_those_of_score(drawn):
    protocol = pope.Pope.from_world(drawn, parse="strict")
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(3, (len(protocol.items),), generator=generator).tolist()
    said = [("yes", "no", "hm")[i] for i in choice]
    rates = harness.score(protocol, said)["rates"]
    for split in pope.SPLITS:
        pairs = [
            (i, t) for i, t in zip(protocol.items, said, strict=True) if i.doc["category"] == split
        ]
        right = pope.score(
            [pope.parse_answer(text, "strict") for _, text in pairs],
            [item.target == "yes" for item, _ in pairs],
        )
        for name in ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed"):
            assert rates[f"{name}_{split}"] == pytest.approx(getattr(right, name))
    assert rates["f1"] == pytest.approx(sum(rates[f"f1_{s}"] for s in pope.SPLITS) / 3)


def test_pope_file_errors_name_the_line(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "a.jpg")
    path = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    with pytest.raises(ConfigError, match=r"q.jsonl line 3 asks about b.jpg, which is not in"):
        pope.Pope.from_files([path], images=images)
    write_lines(path, [QUESTIONS[0], {**QUESTIONS[1], "label": "maybe"}])
    with pytest.raises(ConfigError, match="line 2: the label must be yes or no, found 'maybe'"):
        pope.Pope.from_files([path])
    write_lines(path, [QUESTIONS[0], QUESTIONS[0]])
    with pytest.raises(ConfigError, match="line 2: q/1 is there twice"):
        pope.Pope.from_files([path])
    path.write_text(json.dumps(QUESTIONS[0]) + "\n{\n")
    with pytest.raises(ConfigError, match="line 2 is not valid JSON"):
        pope.Pope.from_files([path])
    write_lines(path, [{"question_id": 1, "image": "a.jpg", "label": "yes"}])
    with pytest.raises(ConfigError, match="line 1 has no 'text'"):
        pope.Pope.from_files([path])
    path.write_text("")
    with pytest.raises(ConfigError, match="nothing to ask"):
        pope.Pope.from_files([path])
    (images / "a.jpg").write_bytes(b"no picture")
    protocol = pope.Pope.from_files([write_lines(path, QUESTIONS[:2])], images=images)
    with pytest.raises(ConfigError, match="cannot be read as a picture"):
        protocol.picture("a.jpg")


SYNONYMS = "person, girl, baby\nbird\njet, plane\ntoilet\nchair, seat\ntie\ndining table, table\nwine glass\n"


def test_captions_of_the_original_vocabulary(tmp_path):
    words = tmp_path / "synonyms.txt"
    words.write_text(SYNONYMS)
    truth = write_lines(
        tmp_path / "truth.jsonl",
        [
            {"image_id": 42, "gt_object": ["bird"], "captions": ["A girl at a table."]},
            {"image_id": 7, "gt_object": ["toilet"]},
        ],
    )
    protocol = chair.Chair.from_files(truth, synonyms=words)
    assert protocol.items[0].doc["gt_object"] == ["bird", "dining table", "person"]
    # A baby bird is a bird, a train track nothing, "seat" nothing beside a toilet; plurals are known.
    assert protocol.find("Baby birds on a train track.") == ["bird"]
    assert protocol.find("The toilet seat and a seat") == ["toilet"]
    assert protocol.find("A seat, passenger jets, a bow tie, two wine glasses") == [
        *("chair", "jet", "tie", "wine glass"),
    ]
    said = ["A baby, a bird, a bird and a chair.", ""]
    rates = harness.score(protocol, said)["rates"]
    assert rates["chair_i"] == pytest.approx(1 / 4)  # repeats count as mentions
    assert rates["chair_s"] == pytest.approx(1 / 2)
    assert rates["coverage"] == pytest.approx(2 / 4)
    assert rates["words"] == pytest.approx(9 / 2)
    protocol.write(tmp_path, said)
    assert chair.read_captions(tmp_path / "captions.jsonl") == {"42": said[0], "7": ""}
    (tmp_path / "list.json").write_text(json.dumps(lines(tmp_path / "captions.jsonl")))
    assert chair.read_captions(tmp_path / "list.json") == {"42": said[0], "7": ""}


def test_caption_pictures_are_found_by_their_number(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8), (9, 0, 0)).save(images / "COCO_val2014_000000000042.png")
    rows = [{"image_id": 42, "gt_object": ["cup"]}, {"image_id": 7, "gt_object": ["cup"]}]
    truth = write_lines(tmp_path / "truth.jsonl", rows[:1])
    protocol = chair.Chair.from_files(truth, images=images)
    assert protocol.picture(protocol.items[0].picture).size == (8, 8)
    with pytest.raises(ConfigError, match="line 2 asks about a picture whose name ends in 7"):
        chair.Chair.from_files(write_lines(truth, rows), images=images)
    with pytest.raises(ConfigError, match="line 1 has no list 'gt_object'"):
        chair.Chair.from_files(write_lines(truth, [{"image_id": 1}]))


def test_own_pictures_are_asked_about(untrained, tmp_path):
    for name in "ab":
        Image.new("RGB", (90, 70), (200, 30, 30)).save(tmp_path / f"{name}.jpg")
    path = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    protocol = pope.Pope.from_files([path], images=tmp_path, limit=2)
    results = harness.run(protocol, untrained, [parse("hiprune:keep=8")], tmp_path / "out", batch=3)
    assert [result["label"] for result in results] == [DENSE.label, "hiprune keep=8"]
    assert all(result["status"] == "ok" and result["items"] == 4 for result in results)
    assert results[0]["pictures"] == ["a.jpg", "b.jpg"]
