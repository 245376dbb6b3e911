"""The command that looks at an installation: `python -m trainer.doctor`, or `make doctor`.

It imports what the project and its documentation use, each package in a process of its own, and
says of each which version is there, what is wrong, and what to do.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from packaging.requirements import Requirement

from pipelines.command import Outcome, command_parser, run
from pipelines.console import say, visible, write

_PROJECT = "lapflow-trainer"
_PATIENCE_S = 300
_AGAIN = "make clean-venv setup"

IMPORTS = {
    "torch": "import torch",
    "torchvision": "import torchvision.transforms.functional",
    "einops": "import einops",
    "jaxtyping": "import jaxtyping",
    "numpy": "import numpy",
    "pillow": "import PIL.Image",
    "safetensors": "import safetensors.torch",
    "deepspeed": "import deepspeed",
    "diffusers": "from diffusers import AutoencoderKL",
    "huggingface-hub": "import huggingface_hub",
    "torchdiffeq": "import torchdiffeq",
    "matplotlib": "import matplotlib.figure",
    "packaging": "import packaging.requirements",
    "ray": "import ray.train.torch, ray.job_submission",
    "mosaicml-streaming": "from streaming.base.format.mds import MDSWriter",
    "hydra-core": "import hydra",
    "pydantic": "import pydantic",
    "mlflow": "import mlflow",
    "boto3": "import boto3",
    "filelock": "import filelock",
    "tenacity": "import tenacity",
    "psutil": "import psutil",
    "requests": "import requests",
    "rich": "import rich.progress",
    "xxhash": "import xxhash",
    "scikit-learn": "import sklearn.datasets",
    "nvidia-dali-cuda130": "import nvidia.dali",
    _PROJECT: "import trainer.launch, trainer.export.diffusers_pipeline",
}
"""What must work, by the package that it is from."""

_GPU = """
import torch
assert torch.version.cuda, "it is the CPU build, and there is an NVIDIA GPU"
assert torch.cuda.is_available(), f"built for CUDA {torch.version.cuda}, it cannot use the GPU"
print(torch.cuda.device_count(), "x", torch.cuda.get_device_name(0), end="")
"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of one part of the installation.

    Attributes:
        name: The part.
        found: Its version, or what there is of it.
        wrong: What is wrong with it; None if nothing is.
        fix: What to do then.
    """

    name: str
    found: str
    wrong: str | None = None
    fix: str = _AGAIN

    def text(self) -> str:
        """Return a line, and two more if something is wrong."""
        line = f"{'WRONG' if self.wrong else 'ok':<6} {self.name:<22} {visible(self.found)}"
        if not self.wrong:
            return line
        return f"{line}\n       {visible(self.wrong)}\n       fix: {self.fix}"


def examine() -> Iterator[Finding]:
    """Look at one part of the installation after the other."""
    yield _python()
    wanted = _read_requirements()
    with ThreadPoolExecutor(2) as pool:  # each waits for a process
        yield from pool.map(lambda name: _package(name, wanted.get(name)), IMPORTS)
    if shutil.which("nvidia-smi") and _run(["nvidia-smi", "-L"]).returncode == 0:
        yield _gpu()


def _python() -> Finding:
    allowed = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding(
        name="python",
        found=platform.python_version(),
        wrong=None if allowed else "Python 3.11 to 3.13 can be used",
        fix=f"make PYTHON=python3.11 {_AGAIN.removeprefix('make ')}",
    )


def _read_requirements() -> dict[str, Requirement]:
    try:
        parsed = map(Requirement, importlib.metadata.requires(_PROJECT) or [])
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {each.name: each for each in parsed if not each.marker or each.marker.evaluate()}


def _package(name: str, wanted: Requirement | None) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, found="-", wrong="it is not installed")
    if wanted is not None and not wanted.specifier.contains(version, prereleases=True):
        return Finding(name=name, found=version, wrong=f"the project needs {wanted}")
    statement = IMPORTS[name]
    try:
        done = _run([sys.executable, "-c", statement])
    except subprocess.TimeoutExpired:
        wrong = f"`{statement}` was not done after {_PATIENCE_S} s"
        return Finding(name=name, found=version, wrong=wrong)
    if done.returncode:
        return Finding(name=name, found=version, wrong=f"`{statement}` fails: {_last(done.stderr)}")
    return Finding(name=name, found=version)


def _gpu() -> Finding:
    done = _run([sys.executable, "-c", _GPU])
    if done.returncode:
        fix = f"TORCH_BUILD=gpu {_AGAIN}; if that does not help, a driver for this CUDA"
        return Finding(name="GPU", found="-", wrong=f"torch: {_last(done.stderr)}", fix=fix)
    return Finding(name="GPU", found=done.stdout)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].removeprefix("AssertionError: ") if lines else "it says nothing"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser(
        "trainer.doctor",
        description="Look at the installation: versions, what is wrong with them, what to do.\n\n"
        "exit codes: 0 all is well, 1 something is wrong",
    )
    return run(parser.parse_args, _examine_all, arguments, is_refusal=lambda _: False)


def _examine_all(_: argparse.Namespace) -> Outcome:
    findings = []
    for finding in examine():
        if finding.wrong:
            write(finding.text(), sys.stdout)  # also where no news are wanted
        else:
            say(finding.text())
        findings.append(finding)
    wrong = [finding for finding in findings if finding.wrong]
    text = f"{len(wrong)} of {len(findings)} wrong" if wrong else f"all {len(findings)} well"
    return Outcome(text, {"findings": findings, "wrong": len(wrong)}, 1 if wrong else 0)
