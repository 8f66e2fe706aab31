"""Retention by lineage: versions that something refers to are kept, everything else goes.

    purge.py      deletes what only retired versions name

Which versions are retired is recorded in the table's log (`sealed/retired.py`); how long a file
lives is read from it (`sealed/lifetimes.py`).
"""

from vlm_dagster.retention.purge import PurgeReport, purge

__all__ = ["PurgeReport", "purge"]
