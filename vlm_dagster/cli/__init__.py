"""The command line. It reads arguments and prints; the work is in `vlm_dagster.commands`.

run.py   demo, generate, ui            look.py     inspect, lineage, verify
keep.py  compact, gc, pin, sweep, ...  change.py   erase, drop, correct
"""

from vlm_dagster.cli.app import app, main

# In the order in which the help lists them.
from vlm_dagster.cli import run, look, keep, change  # isort: skip

__all__ = ["app", "change", "keep", "look", "main", "run"]
