"""What the two commands of this package share: the process they run in, and how they end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from vlm_dagster.errors import VlmError

__all__ = ["run_command"]


def run_command(body: Callable[[], int]) -> int:
    """Run the body of a command, which imports torch only inside.

    Returns:
        Its exit status: what `body` returns; 1 after an error told on stderr; 130 when interrupted.
    """
    # Torch's threads spin while they wait for each other. Beside anything else that runs (the
    # loader's threads, Dagster) that burns the very cores they wait for: on 2 cores with one busy
    # neighbour, training ran 8 times as fast with waiting threads asleep. OpenMP reads this once,
    # when torch is imported, so it is set here, by the command, and by nothing that is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return body()
    except VlmError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted at once; the checkpoint, if any, is the one from before\n")
        return 128 + signal.SIGINT
