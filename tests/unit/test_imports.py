"""What takes seconds to import is left out where nothing uses it."""

import subprocess
import sys

import pytest

WORKER = """
import torch
import trainer.training.worker
from trainer.engine.optimizer import OptimConfig, adamw
from trainer.engine.zero import import_deepspeed
import_deepspeed()
optimizer = adamw([torch.nn.Parameter(torch.ones(1))], OptimConfig())
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
"""
DATA = """
from pipelines.source import prepare_streaming
prepare_streaming()
from streaming.base.format.mds import MDSWriter
from streaming.base.storage import CloudDownloader
from streaming.base.storage.upload import CloudUploader
"""
DRY_RUN = """
from trainer.cli.launch import main
main(["+exp=imagenet_xl", "dry_run=true"])
"""
REFUSED = """
from trainer.cli.launch import main
main(["+exp=digits", "train.global_batch=7"])
"""

HELP = """
from trainer.cli.lapflow import COMMANDS, main
for name in COMMANDS:
    try:
        main([name, "--help"])
    except SystemExit as left:
        assert not left.code, name
    heavy = {"torch", "ray", "mlflow", "boto3", "streaming"} & {*sys.modules}
    assert not heavy, f"{name} --help imports {heavy}"
"""
LISTS = """
from pathlib import Path
from tempfile import TemporaryDirectory
from trainer.cli.checkpoints import main
with TemporaryDirectory() as folder:
    checkpoint = Path(folder) / "runs" / "a" / "checkpoints" / "000000000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text("{}")
    assert main(["list", f"{folder}/runs/a"]) == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "needed", "unused"),
    [
        (DRY_RUN, "trainer.planning.planner", {"torch", "ray", "mlflow", "boto3"}),
        (REFUSED, "trainer.training.validate", {"torch", "ray", "mlflow", "boto3"}),
        (HELP, "trainer.cli.latents", {"torch", "ray", "mlflow", "boto3"}),
        (LISTS, "trainer.cli.run_handle", {"torch", "ray", "mlflow", "boto3"}),
        ("import cluster.ray_train", "cluster.process_group", {"torch"}),
        (WORKER, "deepspeed", {"mlflow", "scipy", "pandas", "ray", "streaming", "torch._dynamo"}),
        (DATA, "streaming", {"transformers", "sklearn", "torchvision", "scipy", "pandas"}),
    ],
    ids=[
        "who plans a job",
        "who is refused",
        "who asks any command for help",
        "who lists checkpoints",
        "who drives a cluster",
        "a worker",
        "who reads or writes data",
    ],
)
def test_what_nothing_uses_is_not_imported(script, needed, unused):
    found = subprocess.run(
        [sys.executable, "-c", f"import sys\n{script}\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    modules = set(found.stdout.splitlines()[-1].split())
    assert needed in modules
    assert not modules & unused
