"""The command that writes what Kubernetes, Slurm or AWS need to run a job."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from os.path import normpath
from pathlib import Path

from cluster.manifests import aws, kuberay, slurm
from cluster.manifests.deployment import Deployment, ManifestError, container_file
from pipelines.command import CommandParser, Outcome, add_answer_options, command_parser
from trainer.cli.command import TO_LEAVE_S, parse_settings, run_logged

_DESCRIPTION = """\
Write what Kubernetes, Slurm or AWS need to run a job: number of nodes, GPUs, cores, memory, and the
time that a last checkpoint gets follow from the job's settings.

  python -m cluster.manifests container > Containerfile
  python -m cluster.manifests kuberay --image IMAGE +exp=imagenet_xl cluster=h100_8x8 \\
      store.uri=s3://BUCKET/PREFIX tracking.uri=http://HOST:5000 > job.yaml
  python -m cluster.manifests raycluster --image IMAGE … > cluster.yaml
  python -m cluster.manifests slurm --partition gpu … > job.sh
  python -m cluster.manifests aws --image IMAGE --region us-east-1 --instance p5.48xlarge \\
      --ami ami-0123 --profile lapflow … > cluster.yaml"""

_EPILOG = "exit codes: 0 written, 2 the job cannot run there"
_MEMORY_SHARE = 0.9
_SHARED_FOLDER = "a folder that all nodes mount, or s3://…"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    return run_logged(partial(parse_settings, parser), _write, arguments)


def _write(options: argparse.Namespace) -> Outcome:
    text: str = options.make(options)
    return Outcome(text.rstrip("\n"), {"manifest": text}, verbatim=True)


def _container(options: argparse.Namespace) -> str:
    if options.overrides:
        raise ManifestError(
            f"container takes no settings, {' '.join(options.overrides)}: one image is for all jobs"
        )
    return container_file()


def _kuberay(options: argparse.Namespace) -> str:
    scheduler, _, queue = (options.queue or "").partition(":")
    if options.queue and (scheduler not in ("kueue", "volcano") or not queue):
        raise ManifestError(f"--queue is {options.queue!r}; write kueue:NAME or volcano:NAME")
    place = kuberay.Kubernetes(
        image=options.image,
        secret=options.secret,
        claim=options.claim,
        claim_path=options.claim_path,
        redis=options.redis,
        redis_secret=options.redis_secret,
        scheduler=scheduler or None,  # type: ignore[arg-type]
        queue=queue or None,
    )
    mounted = options.claim_path if options.claim else None
    job = _deployment(options, mounted=mounted)
    return (kuberay.ray_job if options.name == "kuberay" else kuberay.ray_cluster)(job, place)


def _slurm(options: argparse.Namespace) -> str:
    place = slurm.Slurm(
        time=options.time,
        partition=options.partition,
        account=options.account,
        activate=options.activate,
        requeue=not options.no_requeue,
        exclusive=not options.shared,
    )
    return slurm.batch_script(_deployment(options, mounted="/"), place)


def _aws(options: argparse.Namespace) -> str:
    place = aws.Aws(
        image=options.image,
        region=options.region,
        instance=options.instance,
        head_instance=options.head_instance,
        ami=options.ami,
        profile=options.profile,
        spot=options.spot,
    )
    return aws.cluster_yaml(_deployment(options, mounted=None), place)


def _deployment(options: argparse.Namespace, *, mounted: str | None) -> Deployment:
    """What the job asks for.

    Args:
        options: The command's.
        mounted: Folder that all nodes share; None if they share none.

    Raises:
        ConfigError: The settings cannot be.
        ManifestError: They cannot be run there.
    """
    from trainer.config.composition import compose_job

    job = compose_job(options.overrides)
    settings = job.cluster
    per_node = settings.hardware.ranks_per_node(settings.workers)
    _check_places(job.store.uri, job.tracking.uri, mounted)
    memory = options.memory
    if memory is None and settings.hardware.host_memory_gib is not None:
        memory = _MEMORY_SHARE * settings.hardware.host_memory_gib
    return Deployment(
        run=job.run,
        command=("python", "-m", "trainer.launch", *options.overrides),
        nodes=math.ceil(settings.workers / per_node),
        workers=settings.workers,
        cpus_per_worker=settings.cpus_per_worker,
        gpus_per_worker=0 if settings.gpus_per_worker == 0 else 1,
        memory_gib=memory,
        stop_grace_s=math.ceil(job.checkpoint.grace_s + TO_LEAVE_S),
        ray=version("ray"),
    )


def _check_places(store: str | None, tracker: str | None, mounted: str | None) -> None:
    """Refuse a store or tracker on the disk of a node, which ends with it."""
    places = (("store.uri", store, _SHARED_FOLDER), ("tracking.uri", tracker, "http://HOST:5000"))
    for key, uri, example in places:
        if uri is not None and "://" in uri and not uri.startswith(("file://", "sqlite://")):
            continue
        path = (uri or "").removeprefix("file://").removeprefix("sqlite:///")
        if mounted is not None and Path(normpath(path)).is_relative_to(normpath(mounted)):
            continue
        raise ManifestError(
            f"{key} is {uri}, which lies on one node and ends with it; set {key} to {example}"
        )


def _parser() -> CommandParser:
    parser = command_parser("cluster.manifests", description=_DESCRIPTION, epilog=_EPILOG)
    parsers = parser.add_subparsers(dest="name", required=True, metavar="KIND")
    add = partial(_subparser, parsers)
    add("container", "the file of an image with this project", _container)
    for name, summary in (
        ("kuberay", "a RayJob: a cluster for this job, started anew if it fails"),
        ("raycluster", "a RayCluster, which takes one job after the other"),
    ):
        _add_kubernetes(add(name, summary, _kuberay))
    _add_slurm(add("slurm", "a script for sbatch", _slurm))
    _add_aws(add("aws", "a file for `ray up`", _aws))
    return parser


def _subparser(
    parsers: argparse._SubParsersAction[CommandParser],
    name: str,
    summary: str,
    make: Callable[[argparse.Namespace], str],
) -> argparse.ArgumentParser:
    parser = parsers.add_parser(name, help=summary, description=summary)
    parser.add_argument("overrides", nargs="*", metavar="+exp=NAME | key=value")
    parser.set_defaults(make=make)
    if name != "container":
        parser.add_argument(
            "--memory",
            type=_gibibytes,
            metavar="GIB",
            help="of a node, for the job; else nine tenths of cluster.hardware.host_memory_gib",
        )
    add_answer_options(parser, default=argparse.SUPPRESS)
    return parser


def _add_kubernetes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, help="container image with this project")
    parser.add_argument("--secret", help="Secret whose keys become variables, for credentials")
    parser.add_argument("--claim", help="PersistentVolumeClaim (ReadWriteMany) that all pods mount")
    parser.add_argument("--claim-path", default="/shared", help="where they do; /shared")
    parser.add_argument("--queue", help="kueue:NAME or volcano:NAME")
    parser.add_argument("--redis", metavar="HOST:PORT", help="keeps what Ray's head knows")
    parser.add_argument("--redis-secret", help="Secret with its password, by the key password")


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--time", default=slurm.Slurm.time, help="limit of a job; 1-00:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument(
        "--activate",
        default=slurm.Slurm.activate,
        help="shell that makes python and ray those of the project; source .venv/bin/activate",
    )
    parser.add_argument("--no-requeue", action="store_true", help="end for good at the limit")
    parser.add_argument("--shared", action="store_true", help="do not take nodes whole")


def _add_aws(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, help="container image with this project")
    parser.add_argument("--region", required=True)
    parser.add_argument("--instance", required=True, help="type of nodes with workers")
    parser.add_argument("--head-instance", default=aws.Aws.head_instance, help="type of the head")
    parser.add_argument(
        "--ami", required=True, help="machine image with Docker and NVIDIA's driver"
    )
    parser.add_argument("--profile", required=True, help="instance profile of all nodes")
    parser.add_argument("--spot", action="store_true", help="nodes with workers are spot instances")


def _gibibytes(word: str) -> float:
    value = float(word)
    if not 1 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{word} is no memory of a node in GiB")
    return value
