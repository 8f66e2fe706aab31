"""What the command line does, one file a command; `vlm_dagster.cli` only reads the arguments.

Every command returns plain values and prints through the console it is given, so that programs and tests
can call it too.
"""
