"""Published techniques, one file each; import them from `mmattn`.

The package is callable: ``mmattn.methods()`` lists what is registered, while ``mmattn.methods.vmoba`` is
the file. Importing it loads none of them.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmattn.registry import MethodInfo


class _Methods(ModuleType):
    def __call__(self) -> list[MethodInfo]:
        """Every known method: name, seams, kinds, hosts, paper, training-free or not."""
        from mmattn.registry import methods

        return methods()


sys.modules[__name__].__class__ = _Methods
