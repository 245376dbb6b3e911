"""The command that sends MLflow what it has not taken of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from pipelines.command import Outcome
from pipelines.console import say, visible
from pipelines.domains import Checked
from trainer.cli.command import Subcommand, run_subcommands
from trainer.config import paths
from trainer.config.reading import ConfigError
from trainer.metrics.journal import identities
from trainer.metrics.tracker import TrackingConfig
from trainer.storage.checkpoint_uri import parse_checkpoint_uri
from trainer.storage.lease import hold_lease
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig


@dataclass(frozen=True, kw_only=True)
class ShipConfig(Checked):
    """Of which run, and where to.

    Attributes:
        uri: URI of the run.
        home: Folder of this machine in which the run may have left something; None is
            $LAPFLOW_HOME, or ~/lapflow.
        tracking_uri: MLflow tracking URI; None is the one that the run had.
        experiment: MLflow experiment; None is the one that the run had.
        patience_s: How long to wait for MLflow to take all of it.
        store: How to reach the store.
    """

    uri: str = field(metadata={"place": "run"})
    home: str | None = field(default=None, metadata={"place": "path"})
    tracking_uri: str | None = field(default=None, metadata={"place": "uri"})
    experiment: str | None = None
    patience_s: Annotated[float, Field(ge=0)] = 300.0
    store: StoreConfig = field(default_factory=StoreConfig)


_UNSENT = 1


def ship_journal(config: ShipConfig) -> Outcome:
    """Send what is left of a run's journal, in the store and on this machine.

    Returns:
        What was sent, and the exit code 1 if something is left.

    Raises:
        RunHeld: The run is being trained, and sends it itself.
        ConfigError: There is no run with a checkpoint there, and nothing on this machine.
        CheckpointError: The URI is no run's, or the store fails.
    """
    address = parse_checkpoint_uri(config.uri)
    store = open_store(address.runs, config.store)
    home = paths.home_folder(config.home)
    if not identities(home, store, run=address.run):
        if not store.list(f"{address.run}/checkpoints/"):
            raise ConfigError(
                f"{config.uri} is no run, and nothing of one waits in {home}: list the runs, such "
                f"as by ls of {address.runs}, and give home=FOLDER where the run had another"
            )
        text = f"nothing of {address.run_uri} waits for MLflow, neither there nor in {home}"
        return Outcome(text, {"run": address.run_uri, "sent": []})
    from trainer.training.tracking import ship  # not for those who ask for help

    # Nobody else may send it meanwhile.
    with hold_lease(store, address.run, report=say, on_lost=lambda _: None) as lease:
        shipped = ship(
            store,
            lease,
            place=address.run_uri,
            home=home,
            to=TrackingConfig(uri=config.tracking_uri, flush_timeout_s=config.patience_s),
            experiment=config.experiment,
        )
    lines = [
        f"{each.entries:,} entries are in MLflow at {each.uri}"
        + ("" if each.is_whole else "; the rest waits for the next try")
        for each in shipped
    ]
    values = [
        {"tracking_uri": each.uri, "entries": each.entries, "whole": each.is_whole}
        for each in shipped
    ]
    left = not all(each.is_whole for each in shipped)
    text = "\n".join(visible(line) for line in lines)
    return Outcome(text, {"run": address.run_uri, "sent": values}, _UNSENT if left else 0)


_MODULE = "trainer.track"
_RUN = "~/lapflow/store/runs/digits"
_DESCRIPTION = f"""\
Send MLflow what it has not taken of a run, because it was away until after the run's end.

  python -m {_MODULE} ship {_RUN}
  python -m {_MODULE} ship s3://bucket/runs/NAME tracking_uri=http://HOST:5000

exit codes: 0 all is there, 1 something is left, 2 the settings or the store cannot be used"""
_SHIP = f"""\
Send what processes of a run have left to tell: in the store, and in the home of this machine. What
MLflow has already is not told twice. A run that is being trained does it itself.

  python -m {_MODULE} ship {_RUN}
  python -m {_MODULE} ship {_RUN} tracking_uri=http://HOST:5000 experiment=NAME"""
_COMMANDS: dict[str, Subcommand[Any]] = {
    "ship": Subcommand(
        kind=ShipConfig,
        make=ship_journal,
        summary="what was told of the run while MLflow was away",
        description=_SHIP,
        example=_RUN,
    )
}

main = partial(run_subcommands, _COMMANDS, module=_MODULE, description=_DESCRIPTION)
"""Runs the command, given its words or none for the process's own, and returns its exit code."""
