"""The command line: cheap help, clean streams, exit codes, precedence, one sentence per error."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from mmattn.batch.writers import read_metadata
from mmattn.cli import main
from mmattn.mini import manifest

VERBS = (
    *("methods", "plan", "compare", "generate", "caption", "classify"),
    *("attnmap", "bench", "eval", "mini", "doctor", "demo", "batch", "train"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Untrained embedded models: these tests are about the command, not about quality."""
    from mmattn.mini import train_t2i, train_vit, vlm

    folder = tmp_path_factory.mktemp("weights")
    (folder / "vit").mkdir()
    train_vit.save(train_vit.build(), folder / "vit")
    pipe = train_t2i.build_pipeline()
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.2)
    pipe.save_pretrained(folder / "t2i")
    vlm.save(*vlm.build(layers=2), folder / "vlm")
    manifest.write(folder)
    return folder


@pytest.fixture(autouse=True)
def weights(root, monkeypatch, tmp_path):
    monkeypatch.setenv("MMATTN_WEIGHTS", str(root))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (80, 64), (200, 30, 30)).save(path)
    return str(path)


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def one_sentence(err: str) -> None:
    assert err.count("\n") == 1 and err.startswith("mmattn: ")
    assert "Traceback" not in err


def test_help_is_cheap_and_imports_no_torch():
    code = (
        "import resource, sys\n"
        "from mmattn.cli import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'timm', 'numpy', 'PIL'} & set(sys.modules)\n"
        "use = resource.getrusage(resource.RUSAGE_SELF)\n"
        "sys.stderr.write(f'{use.ru_utime} {sorted(heavy)}')\n"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        spent, _, heavy = done.stderr.partition(" ")
        assert heavy == "[]"
        assert all(verb in done.stdout for verb in VERBS)
        seconds.append(float(spent))
    assert min(seconds) < 0.7


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(run, verb):
    code, out, err = run(verb, "--help")
    assert code == 0 and "Usage: mmattn " + verb in out and err == ""


def test_methods_as_json_and_as_table(run):
    code, out, _ = run("methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["vmoba"]["training_free"] and "diffusers" in rows["vmoba"]["hosts"]
    code, out, _ = run("methods")
    assert code == 0 and all(name in out for name in rows)


def test_plan_shows_sites(run):
    code, out, err = run("plan", "vit", "-m", "identity", "--json")
    plan = json.loads(out)
    assert code == 0 and err == "" and plan["planned"] == 6 == len(plan["rows"])
    code, out, _ = run("plan", "vit", "-m", "identity", "--sites", "blocks.[01].attn")
    assert code == 0 and "2 of 2 sites" in out


def test_a_plan_without_a_site_shows_why_and_exits_2(run):
    code, out, err = run("plan", "vit", "-m", "hiprune")
    assert code == 2 and "0 of 6 sites" in out and "fits none of the 6 sites" in err
    one_sentence(err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "vit", "-m", "vmobba"), "did you mean 'vmoba'"),
        (("plan", "vit", "-m", "tome:ratioo=0.5"), "did you mean 'ratio'"),
        (("plan", "vit", "-m", "tome", "--set", "tome.ratioo=1"), "did you mean 'ratio'"),
        (("plan", "vit", "-m", "tome:r"), "key=value"),
        (("plan", "vit"), "at least one method"),
        (("plan", "vitt", "-m", "identity"), "did you mean 'vit'"),
        (("plan", "vit", "-m", "identity", "--sites", "blcks.*"), "matches none"),
        (("compare", "--only", "t3i"), "unknown model 't3i'"),
        (("compare", "--device", "cuda:7x"), "unknown device"),
        (("generate", "--model", "t2i"), "--prompt"),
        (("generate", "--model", "vit", "--prompt", "x"), "of kind vit"),
        (("classify",), "--image"),
        (("caption", "--image", "nothing.png"), "no picture at"),
        (("mini", "train", "vitt"), "did you mean 'vit'"),
        (("eval", "./folder"), "unknown model"),
        (("classify", "--config", "absent.toml"), "no configuration file"),
    ],
)
def test_user_errors_are_one_sentence_and_exit_2(run, arguments, said):
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert said in err
    one_sentence(err)


def test_a_broken_picture_is_a_user_error(run, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    code, _, err = run("classify", "--image", "bad.png")
    assert code == 2 and "cannot be read as a picture" in err
    one_sentence(err)


def test_unknown_flags_exit_2(run):
    code, out, err = run("compare", "--stepps", "3")
    assert code == 2 and out == "" and "--stepps" in err and "Traceback" not in err


def top(run, photo: str, *flags: str) -> int:
    code, out, _ = run("classify", "--image", photo, "--json", *flags)
    assert code == 0
    return len(json.loads(out)["pictures"][0]["classes"])


def test_flags_beat_environment_beats_file_beats_default(run, photo, tmp_path, monkeypatch):
    assert top(run, photo) == 3
    config = tmp_path / "settings.toml"
    config.write_text("top = 9\nseed = 4\n[classify]\ntop = 5\n[compare]\nsteps = 7\n")
    assert top(run, photo, "--config", str(config)) == 5
    monkeypatch.setenv("MMATTN_TOP", "2")
    assert top(run, photo, "--config", str(config)) == 2
    assert top(run, photo, "--config", str(config), "--top", "4") == 4


def test_methods_from_a_file(run, photo, tmp_path):
    config = tmp_path / "settings.json"
    config.write_text(json.dumps({"method": [{"name": "tome", "r": 8}]}))
    code, out, err = run("classify", "--image", photo, "--json", "--config", str(config), "-q")
    session = json.loads(out)["session"]
    assert code == 0 and err == ""
    assert session["method"][0]["r"] == 8 and session["stats"]["calls"] == 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("toop = 1\n", "did you mean 'top'"),
        ("[classify]\ntoop = 1\n", "[classify] has the unknown key 'toop', did you mean 'top'"),
        ("top = = 1\n", "not valid toml"),
    ],
)
def test_a_bad_file_is_a_user_error(run, photo, tmp_path, text, said):
    config = tmp_path / "settings.toml"
    config.write_text(text)
    code, out, err = run("classify", "--image", photo, "--config", str(config))
    assert code == 2 and out == "" and said in err
    one_sentence(err)


def test_classify_with_a_method_reports_its_work(run, photo):
    code, out, err = run(
        "classify", "-i", photo, "-m", "tome:r=4", "--set", "tome.r=8", "--json", "--top", "64"
    )
    data = json.loads(out)
    assert code == 0 and "planned sites executed" in err
    chances = [entry["probability"] for entry in data["pictures"][0]["classes"]]
    assert chances == sorted(chances, reverse=True) and abs(sum(chances) - 1) < 0.01
    sites = data["session"]["stats"]["sites"]
    assert len(sites) == 6 and min(s["tokens_kept"] for s in sites) < 65


def test_generate_writes_reproducible_pictures(run, tmp_path):
    common = ("generate", "--prompt", "a red circle", "-p", "two blue rings", "--steps", "2", "-q")
    code, out, err = run(*common, "--out", "a", "--seed", "5")
    files = out.split()
    assert code == 0 and files == ["a/0000.png", "a/0001.png"] and err == ""
    meta = read_metadata(tmp_path / files[1])
    assert meta["prompt"] == "two blue rings" and meta["seed"] == 6 and meta["method"] is None
    # The second prompt alone, under its own seed, is the same picture: noise belongs to items.
    run("generate", "-p", "two blue rings", "--steps", "2", "-q", "--out", "b", "--seed", "6")
    with Image.open(tmp_path / files[1]) as one, Image.open(tmp_path / "b/0000.png") as two:
        near = [abs(x - y) for x, y in zip(one.tobytes(), two.tobytes(), strict=True)]
    assert max(near) <= 1
    code, out, _ = run(*common, "--out", "c", "--seed", "5", "-m", "identity", "--json")
    assert code == 0 and json.loads(out)["session"]["stats"]["calls"] > 0
    assert (tmp_path / "c/session.json").is_file()
    for name in ("0000.png", "0001.png"):
        with Image.open(tmp_path / "a" / name) as one, Image.open(tmp_path / "c" / name) as two:
            assert one.tobytes() == two.tobytes()


def test_generate_without_metadata_and_with_words_it_never_learned(run, tmp_path):
    code, out, err = run(
        *("generate", "-p", "a photo of a dachshund", "--steps", "1"), "--no-metadata"
    )
    assert code == 0 and "photo, dachshund" in err
    assert read_metadata(tmp_path / out.strip()) == {}


def test_caption_answers(run, photo):
    code, out, _ = run(
        "caption", "-i", photo, "-i", photo, "--json", "--max-new-tokens", "4", "-m", "identity"
    )
    data = json.loads(out)
    assert code == 0 and len(data["answers"]) == 2
    assert data["answers"][0]["answer"] == data["answers"][1]["answer"]
    assert data["session"]["stats"]["calls"] > 0


def test_attnmap_writes_one_picture_per_site_and_deletes_nothing(run, photo, tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "keep.txt").write_text("mine")
    code, out, _ = run("attnmap", "--model", "vit", "-i", photo, "--out", "maps", "--json")
    files = json.loads(out)
    assert code == 0 and len(files) == 6 and (tmp_path / "maps" / "keep.txt").is_file()
    with Image.open(files[0]) as picture:
        assert len(set(picture.convert("RGB").getdata())) > 4


def test_doctor_names_what_is_missing(run):
    code, out, _ = run("doctor", "--json")
    data = json.loads(out)
    models = {entry["name"]: entry for entry in data["embedded"]}
    assert code == 3 and models["vit"]["ok"] and not models["t2v"]["present"]
    assert data["versions"]["torch"] and data["devices"][0].startswith("cpu")
    op = data["backends"]["block_sparse_attention"]
    assert op["auto"] == "torch" and op["reasons"]["torch"] is None
    code, out, _ = run("doctor")
    assert code == 3 and "model t2v" in out and "no files in" in out
    line = next(line for line in out.splitlines() if "neighborhood_attention" in line)
    assert "natten" in out and len(line.split("  ")) > 2


def test_doctor_says_why_a_back_end_cannot_run(monkeypatch):
    from mmattn.cli import doctor

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = doctor.backends()
    assert len(found) >= 8
    for op in found.values():
        assert "not on a CUDA device" in op["reasons"]["triton"] and op["auto"] == "torch"


def test_mini_list_and_verify(run, root, tmp_path, monkeypatch):
    code, out, _ = run("mini", "list", "--json")
    assert code == 0 and [r["verified"] for r in json.loads(out)] == [True, False, True, True]
    assert run("mini", "verify")[0] == 3
    monkeypatch.setenv("MMATTN_WEIGHTS", str(tmp_path / "none"))
    assert run("mini", "verify")[0] == 4


def test_compare_end_to_end(run, tmp_path):
    code, out, err = run(
        *("compare", "--only", "vit", "--out", "cmp", "--samples", "20", "--json"),
        *("-m", "tome:r=8", "-m", "identity"),
    )
    report = json.loads(out)
    assert code == 0 == report["exit_code"]
    assert [o["label"] for o in report["sections"][0]["outcomes"]] == [
        "dense",
        "tome r=8",
        "identity",
    ]
    assert "[3/3] vit identity" in err and err.splitlines()[-1].startswith(
        "report: cmp/report.html"
    )
    assert (tmp_path / "cmp/report.html").is_file() and (tmp_path / "cmp/vit/grid.png").is_file()


def test_compare_reports_failures_and_nothing_done(run, tmp_path):
    code, _, err = run("compare", "--only", "vit", "--only", "t2v", "--samples", "4", "-q")
    assert code == 3 and "t2v: The embedded model 't2v' has no weights" in err
    assert run("compare", "--only", "t2v", "-q")[0] == 4


def test_ctrl_c_exits_130_and_keeps_the_report(run, tmp_path, monkeypatch):
    from mmattn.compare.classes import Classes

    calls = []

    def stop(self, value, dense):
        calls.append(value)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"top1": 0.5}

    monkeypatch.setattr(Classes, "score", stop)
    code, _, err = run("compare", "--only", "vit", "--samples", "4", "-q")
    assert code == 130 and "report holds what was done" in err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [o["label"] for o in report["sections"][0]["outcomes"]] == ["dense"]


def test_eval_prints_quality(run):
    code, out, _ = run("eval", "vit", "-m", "tome:r=8", "--samples", "20", "--json", "-q")
    rows = json.loads(out)["rows"]
    assert code == 0 and [row["label"] for row in rows] == ["dense", "tome r=8"]
    assert 0 <= rows[0]["top1"] <= 1 and "agreement" in rows[1]


def test_bench_times_a_pipeline(run):
    code, out, _ = run(
        *("bench", "t2i", "-m", "identity", "--repeats", "1", "--warmup", "0", "--steps", "1"),
        *("--json", "-q"),
    )
    assert code == 0
    assert all(row["median_ms"] > 0 for row in json.loads(out)["timings"])


def test_bench_prints_dense_beside_the_method(run):
    code, out, _ = run(
        *("bench", "vit", "-m", "tome:r=8", "--repeats", "2", "--warmup", "0", "--json", "-q")
    )
    dense, tome = json.loads(out)["timings"]
    assert code == 0 and dense["label"] == "dense"
    assert dense["median_ms"] > 0 and tome["median_ms"] > 0 and tome["ratio"] > 0
    assert tome["sites"] == 6 and "every site executed" in tome["checks"]


# -- tune -------------------------------------------------------------------------------------------


def test_tune_writes_a_recipe_that_other_verbs_take(run, tmp_path):
    code, out, err = run(
        "tune",
        "t2i",
        *("-p", "a red circle on a white background", "-m", "neighborhood:window=0.5"),
        *("--min-recall", "0.2", "--steps", "3", "-o", "my.toml", "--quiet", "--json"),
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["recipe"] == "my.toml" and found["density"] < 1
    assert {entry["dense_steps"] for entry in found["sites"].values()} <= {0, 1, 2}
    assert (tmp_path / "my.tune.json").is_file()
    code, out, err = run(
        "generate",
        *("-p", "a red circle on a white background", "-m", "my.toml", "--steps", "3"),
        *("-o", "pictures"),
    )
    assert code == 0 and "neighborhood on" in err, err
    assert list((tmp_path / "pictures").rglob("*.png"))


def test_tune_says_what_is_missing(run):
    for arguments, says in (
        ((), "give a budget"),
        (("--min-recall", "0.9", "-m", "identity"), "cannot be tuned"),
        (("--min-recall", "0.9", "-m", "vmoba+neighborhood"), "one candidate"),
        (("--min-recall", "0.9", "-m", "there.toml"), "no recipe file"),
        (("--min-recall", "0.9", "-m", "neighborhood", "-o", "x.json"), ".toml"),
    ):
        code, _, err = run("tune", "t2i", "-p", "x", *arguments, "--quiet")
        assert code == 2 and says in err, err
        one_sentence(err)
    code, _, err = run("tune", "t2i", "-m", "neighborhood", "--min-recall", "1", "--steps", "2")
    assert code == 2 and "best recall" in err, err


def test_attnmap_analytics_draws_two_profiles(run, photo, tmp_path):
    code, out, err = run("attnmap", "--model", "vit", "--analytics", "-i", photo, "--json")
    assert code == 0, err
    files = json.loads(out)
    assert [name.rsplit("/", 1)[-1] for name in files] == [
        "head_importance.png",
        "attention_distance.png",
    ]
    for name in files:
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300 and len(picture.convert("L").getcolors()) > 20
    code, _, err = run("attnmap", "--model", "t2i", "--analytics", "-p", "x")
    assert code == 2 and "takes a model of kind vit" in err
