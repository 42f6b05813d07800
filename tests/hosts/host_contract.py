"""What every host must guarantee on every model: identity bitwise, executed, undone, copies detached.

`check_contract(model, call)` is loaded by the host tests of this folder (see conftest.py).
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

import mmattn

ALL_KINDS = ("self", "joint", "cross", "window", "channel", "text")
ALL_HOSTS = ("diffusers", "timm", "transformers", "open_clip", "torch")


@dataclass(frozen=True)
class _Any(mmattn.Method):
    """Base of the test methods: accepts every site and honours every call."""

    kinds: ClassVar[tuple[str, ...]] = ALL_KINDS
    hosts: ClassVar[tuple[str, ...]] = ALL_HOSTS
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True


@dataclass(frozen=True)
class Zeroed(_Any):
    """Attention output is zero everywhere."""

    name: ClassVar[str] = "zeroed"

    def attend(self, q, k, v, *, mask, scale, site, dense):
        return q.new_zeros(*q.shape[:-1], v.shape[-1])


@dataclass(frozen=True)
class Calls(_Any):
    """Runs `dense`, so the output is the stock one up to rounding, and notes what it saw."""

    name: ClassVar[str] = "calls"

    def attend(self, q, k, v, *, mask, scale, site, dense):
        site.note("queries", q.shape[2])
        site.note("keys", k.shape[2])
        site.note("head_count", q.shape[1])
        return dense(q, k, v)


@dataclass(frozen=True)
class NoMasks(_Any):
    """Like `Calls`, but honours no mask."""

    name: ClassVar[str] = "no-masks"
    masks: ClassVar[bool] = False

    def attend(self, q, k, v, *, mask, scale, site, dense):
        return dense(q, k, v)


@dataclass(frozen=True)
class ZeroHeads(_Any):
    """Per-head outputs are zero, through the heads seam."""

    name: ClassVar[str] = "zero-heads"
    seams: ClassVar[tuple[str, ...]] = ("heads",)

    def heads(self, out, *, site):
        return out * 0


@dataclass(frozen=True)
class ShiftTokens(_Any):
    """Adds `by` to the hidden states on the way into each block."""

    name: ClassVar[str] = "shift-tokens"
    seams: ClassVar[tuple[str, ...]] = ("tokens",)
    by: float = 1.0

    def enter(self, x, *, site):
        site.note("kept", x.shape[1])
        return x + self.by * torch.linspace(0, 1, x.shape[-1])


@dataclass(frozen=True)
class Raises(_Any):
    """Raises `error` from inside the model's forward."""

    name: ClassVar[str] = "raises"
    error: type[BaseException] = RuntimeError

    def attend(self, q, k, v, *, mask, scale, site, dense):
        raise self.error("from a test")


def modules_of(target):
    """``{path: module}`` of a model, or of all components of a pipeline."""
    if isinstance(target, torch.nn.Module):
        return dict(target.named_modules())
    found = {}
    for name, part in target.components.items():
        if isinstance(part, torch.nn.Module):
            found.update({f"{name}.{path}": m for path, m in part.named_modules()})
    return found


def snapshot(target):
    """Class, attribute names, simple values, hooks and processor of every module."""
    rows = {}
    for path, module in modules_of(target).items():
        values = {
            k: v
            for k, v in module.__dict__.items()
            if isinstance(v, bool | int | float | str | tuple | type(None)) and k != "processor"
        }
        hooks = {k: list(v) for k, v in module.__dict__.items() if k.endswith("_hooks")}
        flags = {
            k: v if isinstance(v, bool) else list(v)
            for k, v in module.__dict__.items()
            if "_hooks_" in k and "call" not in k
        }
        processor = module.__dict__.get("processor")
        inside = sorted(getattr(processor, "__dict__", {}))
        names = sorted(
            set(module.__dict__) - {"_is_torch_compile"}
        )  # torch.compile leaves that one
        values.pop("_is_torch_compile", None)
        rows[path] = (
            *(type(module), names, values, hooks, flags),
            *(processor if processor is None else id(processor), type(processor), inside),
        )
    scheduler = getattr(target, "scheduler", None)
    if scheduler is not None:
        rows["scheduler"] = (type(scheduler), sorted(scheduler.__dict__))
    return rows


def leaves(out):
    """Tensors (or arrays) inside any output: nested containers, dataclasses, images."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for v in out.values() for t in leaves(v)]
    if isinstance(out, list | tuple):
        return [t for v in out for t in leaves(v)]
    if dataclasses.is_dataclass(out):
        return [t for f in dataclasses.fields(out) for t in leaves(getattr(out, f.name))]
    if out is None or isinstance(out, bool | int | float | str):
        return []
    return [torch.from_numpy(np.array(out))]


def same(a, b):
    """Bitwise equality of two outputs; NaN equals NaN."""
    a, b = leaves(a), leaves(b)
    assert a and len(a) == len(b), "outputs have a different structure"
    return all(
        x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())
        for x, y in zip(a, b, strict=True)
    )


def distance(a, b):
    """Largest absolute difference between two outputs."""
    pairs = zip(leaves(a), leaves(b), strict=True)
    return max(float((x.float() - y.float()).abs().max()) for x, y in pairs)


def check_contract(
    model,
    call,
    *,
    methods=("identity",),
    expect_sites=None,
    deep_copy=True,
    interrupt=True,
    compiled=False,
    **attach,
):
    """Run the whole host contract on `model`; ``call(model)`` is one deterministic forward.

    Args:
        methods: settings that must leave the output bitwise equal.
        expect_sites: number of sites that must be planned; None asks for at least one.
        deep_copy: also check that copies of an attached model are detached (needs a copyable model).
        interrupt: also check undoing after an exception and after Ctrl-C.
        compiled: also check `torch.compile` with ``fullgraph=True``.
        attach: passed on to `mmattn.attach` (``sites=``).
    """
    methods = list(methods)
    with torch.no_grad():
        before, stock = snapshot(model), call(model)
        assert same(call(model), stock), "the call itself is not deterministic"
        after_call = snapshot(model)
        keys = {p: list(m.state_dict()) for p, m in modules_of(model).items()}

        plan = mmattn.plan(model, methods, **attach)
        assert plan.planned > 0
        if expect_sites is not None:
            assert plan.planned == expect_sites, str(plan)
        assert snapshot(model) == after_call, "planning changed something"

        twin = copy.deepcopy(model) if deep_copy else None
        rng = torch.get_rng_state()
        with mmattn.attach(model, methods, **attach) as session:
            random_before = torch.get_rng_state()
            assert torch.equal(random_before, rng), "attaching consumed the global RNG"
            assert same(call(model), stock), "identity is not bitwise equal"
            stats = session.stats
            assert stats.planned == plan.planned
            assert stats.executed == stats.planned
            assert all(row.calls > 0 for row in stats.sites), session.report()
            assert {p: list(m.state_dict()) for p, m in modules_of(model).items()} == keys
            with session.disabled():
                assert same(call(model), stock)
            assert session.stats.calls == stats.calls, "calls were counted while disabled"
            if deep_copy:
                _check_copies(model, twin, call, stock, session, methods, attach)
        _check_undone(model, after_call, call, stock)

        if interrupt:
            for error in (RuntimeError, KeyboardInterrupt):
                _check_interrupted(model, error, call, attach)
                _check_undone(model, after_call, call, stock)
        if compiled:
            _check_compiled(model, call, methods, attach)
            _check_undone(model, after_call, call, stock)
        del before


def _check_undone(model, rows, call, stock):
    now = snapshot(model)
    changed = [path for path in rows if now.get(path) != rows[path]]
    first = [(a, b) for p in changed[:1] for a, b in zip(now[p], rows[p], strict=True) if a != b]
    assert not changed and now.keys() == rows.keys(), f"not restored: {changed[:4]} {first}"
    assert same(call(model), stock), "the detached model is not bitwise the stock model"


def _check_copies(model, twin, call, stock, session, methods, attach):
    calls = session.stats.calls
    copied = copy.deepcopy(model)
    types = {path: type(m) for path, m in modules_of(copied).items()}
    assert types == {path: type(m) for path, m in modules_of(twin).items()}, "a copy is attached"
    assert not [m for m in modules_of(copied).values() if "_mmattn_site" in m.__dict__]
    assert same(call(copied), stock)
    assert session.stats.calls == calls, "a copy counted on the original's session"
    with mmattn.attach(twin, methods, **attach) as other:
        call(twin)
        assert session.stats.calls == calls, "two models share counters"
        assert other.stats.executed == other.stats.planned == session.stats.planned
        assert same(call(model), stock)
        assert session.stats.calls > calls
    assert same(call(model), stock) and session.stats.calls > 2 * calls - 1


def _check_interrupted(model, error, call, attach):
    try:
        with mmattn.attach(model, Raises(error), **attach):
            call(model)
    except error as raised:
        assert "from a test" in str(raised)
    else:
        raise AssertionError(f"{error.__name__} was swallowed")


def _check_compiled(model, call, methods, attach):
    """Attached before compiling, and after; a graph break raises because of ``fullgraph``."""
    torch._dynamo.reset()
    with mmattn.attach(model, methods, **attach) as session:
        optimised = torch.compile(model, fullgraph=True, backend="eager")
        inside = call(optimised)
        stats = session.stats
        assert stats.executed == stats.planned and all(row.calls == 1 for row in stats.sites)
        call(optimised)
        assert all(row.calls == 2 for row in session.stats.sites)
    torch._dynamo.reset()
    optimised = torch.compile(model, fullgraph=True, backend="eager")
    plain = call(optimised)
    assert same(plain, inside), "identity changed the compiled model"
    with mmattn.attach(model, methods, **attach) as session:
        assert same(call(optimised), plain)
        stats = session.stats
        assert stats.executed == stats.planned and all(row.calls == 1 for row in stats.sites)
    assert same(call(optimised), plain)
    torch._dynamo.reset()
