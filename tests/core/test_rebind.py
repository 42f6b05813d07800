"""Rebinding a global name: decorators, closures, defaults and keyword defaults survive."""

import copy
import functools
import pickle

import torch
import torch.nn.functional as F

from mmattn.rebind import SLOT, Proxy, names_used, rebind, subclass


def helper(x):
    return x + 1


def plain(x, y=2, *, z=3):
    """Doc."""
    return helper(x) + y + z


def decorated_by(fn):
    @functools.wraps(fn)
    def inner(*args, **kwargs):
        return fn(*args, **kwargs) * 10

    return inner


@decorated_by
@decorated_by
def twice(x):
    return helper(x)


def test_plain_function():
    new = rebind(plain, helper=lambda x: x + 100)
    assert new(0) == 105 and plain(0) == 6
    assert new(0, 1, z=1) == 102
    assert new.__doc__ == "Doc." and new.__name__ == "plain"


def test_decorators_are_kept_and_the_original_is_untouched():
    assert "helper" in names_used(twice)
    new = rebind(twice, helper=lambda x: x + 5)
    assert new(0) == 500 and twice(0) == 100


def test_proxy_replaces_one_attribute():
    proxy = Proxy(F, relu=lambda x: "mine")
    assert proxy.relu(None) == "mine"
    assert proxy.gelu is F.gelu


class Thing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.lin(x)


def test_copies_and_pickles_of_a_swapped_module_are_stock():
    thing = Thing()
    cls = subclass(Thing, forward=lambda self, x: x * 0)
    thing.__dict__[SLOT] = object()
    thing.__class__ = cls
    x = torch.ones(1, 2)
    assert thing(x).abs().sum() == 0 and type(thing).__name__ == "Thing"
    for twin in (copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))):
        assert type(twin) is Thing and SLOT not in twin.__dict__
        assert torch.equal(twin(x), twin.lin(x))
        assert list(twin.state_dict()) == ["lin.weight", "lin.bias"]
