"""Retention by lineage: versions that something refers to are kept, everything else goes.

    pins.py       named pins                          referrers.py  who refers to a table
    references.py from both to versions               proof.py      does a version hold a pin's content?
    collect.py    what is kept and why; retire the rest
    purge.py      deletes what only retired versions name
    erasing.py    users, for good                     protection.py against others' housekeeping

Which versions are retired is recorded in the table's log (`sealed/retired.py`); how long a file
lives is read from it (`sealed/lifetimes.py`).
"""

from vlm_dagster.retention.collect import GcReport, Holding, KeptVersion, gc
from vlm_dagster.retention.pins import NamedPin
from vlm_dagster.retention.purge import PurgeReport, purge
from vlm_dagster.retention.references import Hold, Vanished
from vlm_dagster.retention.referrers import Referrer, register

__all__ = [
    "GcReport",
    "Hold",
    "Holding",
    "KeptVersion",
    "NamedPin",
    "PurgeReport",
    "Referrer",
    "Vanished",
    "gc",
    "purge",
    "register",
]
