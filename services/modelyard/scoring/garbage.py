"""When Python looks for objects that hold each other in circles, which stops everything for as long as it takes.

Importing scikit-learn makes a hundred thousand objects, none of them garbage; Python's own pace looks through them
again and again, and once more through all of them before the server is ready cost a twelfth of a cold start. So while
models load it looks seldom; what there is then is put aside unseen, and tidied when nobody has called for a while.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

LOADING = 200_000
"""Objects more than before after which it looks while models load. Not never: user code may leave much behind."""
SERVING = 10_000
"""The same later. Calls under way are some hundred, and hold nothing of the kind: with Python's 700 it looked in vain,
for a twentieth of the processor time."""
QUIET_S = 1.0


def loading() -> None:
    """Before the first larger import."""
    gc.set_threshold(LOADING, *gc.get_threshold()[1:])


def loaded(quiet: Callable[[], bool]) -> None:
    """What models are made of lives as long as we do: from now on it is not looked through again, but once, when it is
    ``quiet``, for what loading left behind."""
    gc.freeze()
    gc.set_threshold(SERVING, *gc.get_threshold()[1:])
    asyncio.get_running_loop().call_later(QUIET_S, _tidy, quiet)


def _tidy(quiet: Callable[[], bool]) -> None:
    if not quiet():
        asyncio.get_running_loop().call_later(QUIET_S, _tidy, quiet)
        return
    gc.unfreeze()
    gc.collect()
    gc.freeze()
