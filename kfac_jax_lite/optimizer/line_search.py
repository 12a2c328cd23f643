"""Line searches behind K-FAC in an ``optax.chain``.

A chain hands every further argument of ``update`` to all of its members. Optax's line
searches hand them on to ``value_fn``, and refuse what that does not take: K-FAC's
statistics. There is no public way for a member to keep an argument, so K-FAC, which has
come first and read them, takes them out of the arguments of the chains that called it.
Nothing is done unless the call had to fail otherwise.
"""

import inspect
from collections.abc import Mapping
from typing import Any

CHAINS = frozenset(f"{name}.<locals>.update_fn" for name in ("chain", "named_chain"))
OURS = ("statistics", "model")


def keep_from_searches(arguments: Mapping[str, Any]) -> None:
    """Takes K-FAC's own arguments away from what follows it in a chain."""
    function = arguments.get("value_fn")
    if function is None:
        return
    try:
        taken = inspect.signature(function).parameters
    except (TypeError, ValueError):  # it cannot be told: optax has to say so
        return
    own = {k: arguments[k] for k in OURS if k in arguments and k not in taken}
    frame = inspect.currentframe()
    while own and frame is not None:
        if frame.f_code.co_qualname in CHAINS:
            handed = frame.f_locals.get("extra_args", {})
            for name, value in own.items():
                if handed.get(name) is value:
                    del handed[name]
        frame = frame.f_back
