"""A training run as a process.

    python -m vlm_dagster.training.run --config FILE
    torchrun --nproc-per-node N -m vlm_dagster.training.run --config FILE

It counts the items of the training windows, trains, writes a checkpoint, evaluates it if the
config names eval pointers, and reports to Dagster when Dagster Pipes launched it. On SIGINT or
SIGTERM it finishes the step, writes the checkpoint and exits with 128 + the signal's number.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vlm_dagster.training.config import TrainingConfig
from vlm_dagster.training.entry import run_command
from vlm_dagster.training.interrupt import StopRequest

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0; 1 after an error told on stderr; 128 + signal."""
    parser = argparse.ArgumentParser(prog="python -m vlm_dagster.training.run")
    parser.add_argument("--config", required=True, help="JSON file of a TrainingConfig")
    args = parser.parse_args(argv)

    def body() -> int:
        config = TrainingConfig.load(args.config)
        with StopRequest() as stop:
            from vlm_dagster.training.reporting import open_reporter
            from vlm_dagster.training.session import run
            from vlm_dagster.training.world import open_world

            with (
                open_world(config.device, num_threads=config.num_threads) as world,
                open_reporter(world) as reporter,
            ):
                stopped = run(config, world, stop, reporter)
        return 128 + stopped if stopped else 0

    return run_command(body)


if __name__ == "__main__":
    raise SystemExit(main())
