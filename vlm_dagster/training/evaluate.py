"""The evaluation of a checkpoint as a process.

    python -m vlm_dagster.training.evaluate --checkpoint DIR --config FILE

It writes `evaluation.json` beside the checkpoint, and reports to Dagster when Dagster Pipes
launched it. It runs under torchrun too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm_dagster.training.config import TrainingConfig
from vlm_dagster.training.entry import run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0; 1 after an error told on stderr; 130."""
    parser = argparse.ArgumentParser(prog="python -m vlm_dagster.training.evaluate")
    parser.add_argument("--checkpoint", required=True, help="folder of the checkpoint")
    parser.add_argument("--config", required=True, help="JSON file of a TrainingConfig")
    args = parser.parse_args(argv)

    def body() -> int:
        config = TrainingConfig.load(args.config)
        from vlm_dagster.training.checkpoint import load_checkpoint, write_json
        from vlm_dagster.training.evaluation import EVALUATION, evaluate_checkpoint
        from vlm_dagster.training.reporting import open_reporter
        from vlm_dagster.training.world import open_world

        with (
            open_world(config.device, num_threads=config.num_threads) as world,
            open_reporter(world) as reporter,
        ):
            result = evaluate_checkpoint(
                load_checkpoint(args.checkpoint), config, world, on_batch=reporter.evaluating
            )
            if world.rank == 0:
                path = Path(args.checkpoint) / EVALUATION
                write_json(path, result)
                reporter.evaluated(result, path)
        return 0

    return run_command(body)


if __name__ == "__main__":
    raise SystemExit(main())
