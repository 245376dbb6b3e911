"""One undisturbed run through every real component, shared by the tests that look at it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.support.job import SMALL, final_state, job
from tests.support.mlflow_server import mlflow_server
from tests.support.s3_server import S3Server
from trainer.storage.open import open_store
from trainer.storage.store import Store, StoreConfig


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What the run left.

    Attributes:
        output: What the command printed.
        uri: Its store, in S3.
        store: The store's runs, opened.
        state: Weights, moments, EMA and counters of the last checkpoint.
        client: Speaks to the MLflow server.
        record: The MLflow run.
        credentials: The AWS variables it ran with.
        home: Its local folder.
    """

    output: str
    uri: str
    store: Store
    state: Mapping[str, Tensor]
    client: Any
    record: Any
    credentials: Mapping[str, str]
    home: Path


@pytest.fixture(scope="session")
def finished(
    s3: S3Server, empty_tracker: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FinishedRun]:
    """Run the job on Ray with its store in S3 and its metrics on an MLflow server."""
    import mlflow

    home = tmp_path_factory.mktemp("job")
    uri = f"{s3.make_bucket('job')}/lapflow"
    config = StoreConfig(endpoint_url=s3.endpoint_url)
    credentials = {
        "AWS_ACCESS_KEY_ID": s3.access_key,
        "AWS_SECRET_ACCESS_KEY": s3.secret_key,
    }
    with mlflow_server(tmp_path_factory.mktemp("mlflow"), empty_tracker) as server:
        arguments = [
            *SMALL,
            f"store.uri={uri}",
            f"store.endpoint_url={s3.endpoint_url}",
            f"tracking.uri={server.uri}",
            "runtime.profile=3:2",
        ]
        with job(*arguments, home=home, environment=credentials) as running:
            assert running.wait() == 0, running.output
        with pytest.MonkeyPatch.context() as patch:
            for name, value in credentials.items():
                patch.setenv(name, value)
            store = open_store(f"{uri}/runs", config)
            state = final_state(uri, "digits", config)
        client = mlflow.MlflowClient(server.uri)
        (experiment,) = client.search_experiments(filter_string="name = 'lapflow'")
        (record,) = client.search_runs([experiment.experiment_id])
        yield FinishedRun(
            output=running.output,
            uri=uri,
            store=store,
            state=state,
            client=client,
            record=record,
            credentials=credentials,
            home=home,
        )
