"""`python -m vlm_dagster` is the command line."""

from vlm_dagster.cli import main

main()
