"""The command: predict what each placement of a job's experts costs, and say which is best."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from functools import partial

from cluster.hardware import HardwareError
from pipelines.command import CommandParser, Outcome, command_parser, run
from pipelines.formats import format_bytes
from trainer.cli.command import parse_settings
from trainer.cli.settings_page import ExplainAction
from trainer.config.composition import compose_job
from trainer.config.groups import members
from trainer.config.job import JobConfig
from trainer.config.reading import ConfigError
from trainer.errors import is_user_error
from trainer.planning.placing import (
    changed_jobs,
    choices,
    one_scale_job,
    predict_configured,
    stage_words,
    workload,
    zero_stage,
)
from trainer.planning.planner import Candidate, best, candidates
from trainer.planning.report import as_json, assumptions, explain, placement_table, simulated_ms

_DESCRIPTION = """\
Plan where the experts of each scale go: memory of a rank and time of a step for every placement
and ZeRO stage, best first, and what binds the choice. Nothing is started, and no data is read.

  python -m trainer.plan +exp=imagenet_xl cluster=h100_8
  python -m trainer.plan +exp=imagenet_xl cluster=h100_8x8 flow=three_scales train.global_batch=384
  python -m trainer.plan +exp=imagenet_xl cluster=eight_24gb model=xxl_2 data.image_size=512
  python -m trainer.plan +exp=imagenet_xl cluster=eight_gpus cluster.hardware.gpu_memory_gib=40

A placement {2:8,1:2} shards scale 2 over groups of 8 ranks and scale 1 over groups of 2; take one
over with "engine.placement={2:8,1:2}", or let the job choose: engine.placement=auto keeps
engine.zero_stage and takes the fastest that fits, engine.memory=least what takes the least memory.
Where engine.regather_tokens and engine.activation_checkpointing are null, they are chosen too, and
with ZeRO-3 whether gathered weights are kept, unless its limits are set."""

_EPILOG = """\
The figures are predictions: FLOPs and bytes over the rates under cluster.hardware, which can be set
like any other key (cluster.hardware.node_link_gb_per_s=100).

exit codes: 0 something fits, 1 nothing fits, 2 the configuration cannot be used"""

_NOTHING_FITS = 1
_ROWS = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    parse = partial(parse_settings, parser)
    return run(parse, _plan, arguments, is_refusal=is_user_error)


def _plan(options: argparse.Namespace) -> Outcome:
    job = compose_job(options.overrides)
    found = _candidates(job)
    own = predict_configured(job)
    words = _words(job, found, own)
    chosen = best(found, job.engine.memory)
    shown = found if options.all else _select(found)
    table = placement_table(shown, chosen=chosen, left_out=len(found) - len(shown))
    text = "\n".join(
        textwrap.fill(line, 100, subsequent_indent="  ", break_long_words=False) for line in words
    )
    values = {
        "chosen": as_json(chosen) if chosen else None,
        "configured": as_json(own) if own else None,
        "candidates": [as_json(one) for one in found],
        "words": words,
    }
    return Outcome(f"{table}\n\n{text}", values, 0 if chosen else _NOTHING_FITS)


def _stages(job: JobConfig) -> Sequence[int]:
    return (1, 2, 3) if zero_stage(job) else (0,)


def _candidates(job: JobConfig) -> list[Candidate]:
    try:
        return candidates(workload(job), job.cluster.hardware, choices(job, _stages(job)))
    except HardwareError as error:
        raise ConfigError(str(error)) from error


def _select(found: list[Candidate]) -> list[Candidate]:
    """The best, and what replicating everything would cost."""
    replicated = [one for one in found[_ROWS:] if not one.placement.sharded]
    return found[:_ROWS] + replicated


def _words(job: JobConfig, found: Sequence[Candidate], own: Candidate | None) -> list[str]:
    words = explain(
        found,
        workload(job),
        job.cluster.hardware,
        choices(job, _stages(job)),
        one_scale=workload(one_scale_job(job)) if job.flow.scales > 1 else None,
        changes={
            change: (workload(changed), changed.cluster.hardware, _stages(changed))
            for change, changed in changed_jobs(job).items()
        },
    )
    settings = f"engine.placement={_format_placement(job)} {stage_words(zero_stage(job))}"
    if own is None:
        words.append(f"As configured ({settings}) nothing fits.")
    else:
        fits = "" if own.fits else ", which does not fit"
        words.append(
            f"As configured ({settings}): {own}, {1000 * own.time.total:,.1f} ms and "
            f"{format_bytes(own.memory.total)}{fits}; its queues, simulated block by block, take "
            f"{simulated_ms(own):,.1f} ms."
        )
    words.append(assumptions(workload(job), job.cluster.hardware, zero_stage=zero_stage(job)))
    return words


def _format_placement(job: JobConfig) -> str:
    return str(job.engine.placement).replace(" ", "")


def _parser() -> CommandParser:
    clusters = textwrap.fill(f"clusters: {', '.join(members('cluster'))}", width=100)
    parser = command_parser(
        "trainer.plan", description=_DESCRIPTION, epilog=f"{clusters}\n\n{_EPILOG}"
    )
    parser.add_argument("overrides", nargs="*", metavar="+exp=NAME | key=value")
    parser.add_argument("--explain", action=ExplainAction, kind=lambda: JobConfig)
    parser.add_argument("--all", action="store_true", help="print all candidates")
    return parser
