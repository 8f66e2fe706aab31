"""`vlm-dagster ui`: the Dagster UI, with its daemon, on a home folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vlm_dagster.demo.run import dagster_home
from vlm_dagster.errors import TableError

__all__ = ["serve"]

# The same as the repository's own workspace.yaml, for those who installed the package alone.
_WORKSPACE = """\
load_from:
  - python_module:
      module_name: vlm_dagster.definitions
      location_name: vlm_dagster
"""


def serve(home: Path, host: str, port: int) -> None:
    """Replace this process by `dagster dev` on the demonstration's code location."""
    if not (home / "demo.json").exists():
        raise TableError(str(home), "there is no demonstration here yet", "Run `make demo` first.")
    workspace = home / "workspace.yaml"
    workspace.write_text(_WORKSPACE, "utf-8")
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(dagster_home(home)),
        "VLM_HOME": str(home),
    }
    command = [
        sys.executable, "-m", "dagster", "dev", "-w", str(workspace),
        "--host", host, "--port", str(port),
    ]  # fmt: skip
    os.execve(sys.executable, command, environment)
