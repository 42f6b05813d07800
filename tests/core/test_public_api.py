"""The names users import, what importing costs, and what it must not do."""

import subprocess
import sys

import pytest

import mmattn


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_mmattn_imports_no_torch_and_no_host_library():
    out = _python(
        "import sys, mmattn\n"
        "print([m for m in ('torch','diffusers','transformers','timm','open_clip','triton') "
        "if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_attaching_to_a_plain_module_loads_no_host_library():
    out = _python(
        "import sys, mmattn, torch\n"
        "class M(torch.nn.Module):\n"
        "    def forward(self, q):\n"
        "        import torch.nn.functional as F\n"
        "        return F.scaled_dot_product_attention(q, q, q)\n"
        "try: mmattn.plan(torch.nn.Linear(2, 2), 'identity').raise_if_empty()\n"
        "except mmattn.NoSiteError as e: print('no site')\n"
        "print([m for m in ('diffusers','transformers','timm','open_clip') if m in sys.modules])"
    )
    assert out.split("\n")[:2] == ["no site", "[]"]


def test_every_exported_name_resolves():
    for name in mmattn.__all__:
        assert getattr(mmattn, name) is not None


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        mmattn.atach


def test_errors_are_one_family():
    names = [
        "NoSiteError",
        "SelectorError",
        "ConflictError",
        "UnsupportedCall",
        "SeamNotReached",
        "DetachConflict",
        "ConfigError",
        "HostVersionError",
        "MissingExtraError",
    ]
    for name in names:
        assert issubclass(getattr(mmattn, name), mmattn.MmattnError)


def test_missing_extra_names_the_extra():
    error = mmattn.MissingExtraError("The demos", "gradio", "demo")
    assert "pip install 'mmattn[demo]'" in str(error)


def test_methods_lists_every_builtin_with_its_paper():
    rows = {row.name: row for row in mmattn.methods()}
    assert {"identity", "vmoba", "hiprune", "vhr", "tome", "agent-attention"} <= set(rows)
    for row in rows.values():
        assert row.seams and row.hosts and row.paper and row.summary
    assert "2506.23858" in rows["vmoba"].paper


def test_methods_stays_a_package_too():
    import mmattn.methods.identity as file

    assert file.Identity is mmattn.Identity
