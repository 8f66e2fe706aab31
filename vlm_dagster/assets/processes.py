"""Running training and evaluation as processes of their own, reported through Dagster Pipes.

The code location never imports torch; these processes do.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

__all__ = [
    "module_command",
    "run_module",
    "steps_of",
    "storage_environment",
    "torchrun_command",
]

# A cancelled run finishes its step and writes its checkpoint before it goes.
_TERMINATION_TIMEOUT_S = 120.0


def torchrun_command(module: str, num_processes: int, arguments: Sequence[str]) -> list[str]:
    """`torchrun` on this machine, with the interpreter that runs Dagster."""
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    ranks = ["--nproc-per-node", str(num_processes)]
    return [sys.executable, *launcher, *ranks, "-m", module, *arguments]


def module_command(module: str, arguments: Sequence[str]) -> list[str]:
    """One plain process of a module."""
    return [sys.executable, "-m", module, *arguments]


def run_module(
    context: dg.AssetExecutionContext,
    command: Sequence[str],
    *,
    what: str,
    config_path: Path,
    environment: Mapping[str, str],
) -> dg.PipesClientCompletedInvocation:
    """Run a command and wait. Its log lines, figures and errors arrive as they come.

    Args:
        what: the process in words, for the error.
        environment: what the process gets beside our own environment: the place for credentials,
            which belong in no file.

    Raises:
        dg.Failure: it ended with an error.
    """
    from dagster._core.errors import DagsterPipesExecutionError  # not exported

    client = dg.PipesSubprocessClient(
        env=dict(environment), termination_timeout_seconds=_TERMINATION_TIMEOUT_S
    )
    context.log.info(f"starting {what}: {' '.join(command)}")
    try:
        with warnings.catch_warnings():
            # Dagster's Pipes use previews and deprecated names of Dagster's own.
            warnings.simplefilter("ignore", dg.PreviewWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return client.run(context=context, command=list(command))
    except DagsterPipesExecutionError as error:
        raise dg.Failure(
            description=(
                f"{what} failed ({error}). Its own error is in this run's events, and in full under "
                f"the step's stderr. To see it again outside of Dagster, run the command below."
            ),
            metadata={
                "command": dg.MetadataValue.md(f"`{' '.join(command)}`"),
                "config": dg.MetadataValue.path(str(config_path)),
            },
            allow_retries=True,
        ) from error


def storage_environment(options: Mapping[str, str] | None) -> dict[str, str]:
    """Storage options as the environment variables that object-store clients read
    (`aws_access_key_id` becomes `AWS_ACCESS_KEY_ID`)."""
    return {name.upper(): str(value) for name, value in (options or {}).items()}


def steps_of(messages: Sequence[Any]) -> list[tuple[int, float]]:
    """(step, next-item loss) of each progress message."""
    return [
        (int(message["step"]), float(message["next_item_loss"]))
        for message in messages
        if isinstance(message, Mapping) and message.get("vlm") == "progress"
    ]
