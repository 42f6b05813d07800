"""attach(): match, verify, then change, with everything undone if anything fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmattn.errors import ConflictError
from mmattn.planning import plan
from mmattn.rebind import SLOT
from mmattn.session import Session
from mmattn.sites import Selector


def attach(
    target: Any,
    methods: Any,
    *,
    sites: Selector | None = None,
    unsupported: str = "error",
    seed: int = 0,
    probe: bool | int | Sequence[int] = False,
    dry_run: bool = False,
) -> Session:
    """Attach `methods` to `target` and return the live `Session`.

    Same arguments as `mmattn.plan`. Use it as a context manager, or call ``session.detach()``:

    ```python
    with mmattn.attach(pipe, VMoBA(topk=3)) as session:
        video = pipe(prompt).frames[0]
    print(session.report())
    ```

    Raises:
        NoSiteError: no site fits some method, or the target is not a model.
        SelectorError, ConfigError: a selector that matches nothing; a bad method or setting.
        ConflictError: methods that exclude each other, or a model or scheduler that already is
            attached.
    """
    made = plan(
        target,
        methods,
        sites=sites,
        unsupported=unsupported,
        seed=seed,
        probe=probe,
        dry_run=dry_run,
    )
    made.raise_if_empty()
    for root in made.roots:
        for site in root.sites:
            holder = getattr(site.module, "processor", None)
            for place in (site.module, site.token_module, holder):
                owner = getattr(place, "__dict__", {}).get(SLOT)
                if owner is not None and owner.run.installed:
                    raise ConflictError(
                        f"{site.path} already belongs to an mmattn session; detach it first, or pass "
                        "all methods to one attach call: attach(model, [a, b])"
                    )
    session = Session(made)
    session.raise_if_clock_taken()
    session._open()
    return session
