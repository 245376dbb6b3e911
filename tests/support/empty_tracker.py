"""An MLflow database without a run: making one takes seconds, copying one does not."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empty_tracker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for the whole test session; give every home or server a copy."""
    from trainer.metrics.mlflow_backend import make_file

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    make_file(file)
    return file
