"""The demonstration: the main job, end to end, on an embedded default or on real events.

settings.py  what to run on, kept in VLM_HOME/demo.json, which `vlm_dagster.definitions` reads
run.py       materializes the code location's assets through Dagster, with progress
fat_rows.py  what copying histories into examples would have stored
summary.py   the figures at the end, for a person and as JSON
"""
