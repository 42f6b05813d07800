"""Host libraries that are too old are refused by name; missing ones name their extra."""

import importlib

import pytest
import timm

import mmattn
from mmattn import hosts
from mmattn.loading import resolve


def test_an_old_host_library_is_refused(monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2)
    monkeypatch.setattr(hosts, "version", lambda package: "0.9.16")
    with pytest.raises(mmattn.HostVersionError, match=r"timm 0\.9\.16 is installed.*>= 1\.0\.20"):
        mmattn.plan(model, "identity")


@pytest.mark.parametrize("found", ["1.0.20", "1.0.31.dev0", "1.1.0a1", "2.0"])
def test_recent_versions_pass(monkeypatch, found):
    monkeypatch.setattr(hosts, "version", lambda package: found)
    hosts.check_version("timm")


def test_open_clip_models_by_architecture():
    made = mmattn.plan(resolve("open_clip:RN50-quickgelu").target, "identity")
    assert made.host.name == "open_clip" and made.planned > 0
    with pytest.raises(mmattn.MmattnError, match="did you mean 'ViT-B-32'"):
        resolve("open_clip:ViT-B-3")


def test_a_missing_extra_is_named(monkeypatch):
    real = importlib.import_module

    def without(name, *args):
        if name == "open_clip":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(mmattn.MissingExtraError, match=r"pip install 'mmattn\[clip\]'"):
        resolve("open_clip:ViT-B-32")
