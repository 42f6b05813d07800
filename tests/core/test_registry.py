"""Registering one's own method; configs and recipes that round-trip; unknown keys that raise."""

import json
from dataclasses import dataclass

import pytest
import torch

import mmattn
from mmattn import registry


@pytest.fixture
def clean_registry():
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


def test_register_makes_a_method_available_by_name(clean_registry):
    @mmattn.register("half-value")
    @dataclass(frozen=True)
    class HalfValue(mmattn.Method):
        """Halves the values. For this test."""

        factor: float = 0.5

        def attend(self, q, k, v, *, mask, scale, site, dense):
            return dense(q, k, v * self.factor)

    assert registry.method_from("half-value") == HalfValue(0.5)
    assert registry.method_from({"name": "half-value", "factor": 0.25}).factor == 0.25
    assert "half-value" in [row.name for row in mmattn.methods()]


def test_a_taken_name_raises(clean_registry):
    with pytest.raises(mmattn.ConfigError, match="already taken"):

        @mmattn.register("vmoba")
        @dataclass(frozen=True)
        class Other(mmattn.Method):
            """Another."""


def test_registering_something_else_raises(clean_registry):
    with pytest.raises(mmattn.ConfigError, match=r"subclass of mmattn\.Method"):
        mmattn.register("x")(int)


def test_entry_points_are_found(monkeypatch, clean_registry):
    class Point:
        name = "from-plugin"

        @staticmethod
        def load():
            return type(
                "FromPlugin", (mmattn.Method,), {"__doc__": "From a plug-in.", "paper": "-"}
            )

    real = registry.entry_points
    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda group: [Point] if group == "mmattn.methods" else real(group=group),
    )
    assert "from-plugin" in registry.names()
    assert registry.method_from("from-plugin").name == "from-plugin"


def test_unknown_method_and_unknown_key_suggest_the_nearest():
    with pytest.raises(mmattn.ConfigError, match="did you mean 'vmoba'"):
        registry.method_from("vmobba")
    with pytest.raises(mmattn.ConfigError, match="did you mean 'threshold'"):
        mmattn.VMoBA.from_dict({"treshold": 0.3})


def test_every_method_round_trips_through_json():
    for row in mmattn.methods():
        method = row.cls()
        again = registry.method_from(json.loads(json.dumps(method.to_dict())))
        assert again == method
        assert hash(again) == hash(method)


def test_recipe_from_toml(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        'sites = "transformer_blocks.*"\nunsupported = "dense"\nseed = 7\n'
        '[[method]]\nname = "vmoba"\nthreshold = 0.3\n'
    )
    recipe = mmattn.load(path)
    assert recipe.methods == (mmattn.VMoBA(threshold=0.3),)
    assert (recipe.sites, recipe.unsupported, recipe.seed) == ("transformer_blocks.*", "dense", 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[methd]]\nname='vmoba'", "did you mean 'method'"),
        ("sites = 3\n[[method]]\nname='vmoba'", "sites must be a glob"),
        ("seed = 'x'\n[[method]]\nname='vmoba'", "seed must be an integer"),
        ("unsupported = 'ignore'\n[[method]]\nname='vmoba'", "unsupported must be"),
        ("sites = '*'", "at least one"),
        ("= nonsense", "not valid TOML"),
    ],
)
def test_bad_recipes_say_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(mmattn.ConfigError, match=message):
        mmattn.load(path)


def test_missing_recipe_file(tmp_path):
    with pytest.raises(mmattn.ConfigError, match="no recipe file"):
        mmattn.load(tmp_path / "nothing.toml")


def test_a_saved_session_loads_as_a_recipe(tmp_path):
    model = _Attention()
    with mmattn.attach(model, "identity", sites="a*", seed=3) as session:
        model(torch.randn(1, 4, 8))
        path = session.save(tmp_path / "run.json")
    record = json.loads(path.read_text())
    assert record["stats"]["calls"] == 1 and record["versions"]["torch"]
    recipe = mmattn.load(path)
    assert recipe.methods == (mmattn.Identity(),) and recipe.sites == "a*" and recipe.seed == 3
    with mmattn.attach(model, recipe) as again:
        model(torch.randn(1, 4, 8))
        assert again.stats.calls == 1
    with pytest.raises(mmattn.ConfigError, match=r"\.json"):
        session.save(tmp_path / "run.yaml")


class _Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


class _Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = _Inner()

    def forward(self, x):
        return self.a(x)
