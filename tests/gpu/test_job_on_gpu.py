"""The whole job on a GPU: NCCL, bf16, DALI's mixed decoder, through Ray and DeepSpeed."""

import sqlite3

import pytest
import torch

from tests.support.job import SMALL, job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize(
    ("kind", "precision"), [("plain", "fp32"), ("plain", "bf16"), ("zero", "bf16")]
)
def test_the_job_runs_on_one_gpu_and_resumes(kind, precision, tmp_path):
    engine = [f"engine.kind={kind}", f"engine.precision={precision}"]
    settings = [*SMALL, "cluster.workers=1", *engine]
    with job(*settings, home=tmp_path) as first:
        assert first.wait() == 0, first.output
    longer = [*settings, "train.total_images=7680"]
    with job(*longer, home=tmp_path) as second:
        assert second.wait() == 0, second.output
        assert "resumed after 6,400 images" in second.output
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        query = "SELECT max(value) FROM metrics WHERE key = 'system/memory_device_gib'"
        ((peak_gib,),) = database.execute(query)
    assert peak_gib > 0
