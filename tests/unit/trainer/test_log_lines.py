"""What is logged becomes lines: of this process on standard error, of workers at the driver."""

import logging
import re
import subprocess
import sys

from trainer.log_lines import forward_logs

SCRIPT = """
import logging
from trainer.log_lines import show_logs
@show_logs()
def main():
    logging.getLogger("pipelines.loading.loader").info("waiting for %s", "data")
    logging.getLogger("trainer.training.step").warning("odd")
    logging.getLogger("elsewhere").info("chatter")
main()
logging.getLogger("trainer.training.step").info("after it")
"""


def test_a_command_says_what_it_is_at_and_after_how_long():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    news, warning = run.stderr.splitlines()
    assert re.fullmatch(r"\[\d+s\] waiting for data", news)
    assert warning == "WARNING trainer.training.step: odd"


def test_workers_tell_warnings_and_the_first_one_what_it_is_at():
    told = []
    before = logging.getLogger("trainer").level
    logger = logging.getLogger("trainer.engine")
    for rank in (0, 1):
        with forward_logs(told.append, rank=rank):
            logger.info("building")
            logger.warning("odd")
    logger.warning("nobody listens")
    assert told == [
        {"kind": "phase", "text": "building"},
        {"kind": "warning", "rank": 0, "text": "odd"},
        {"kind": "warning", "rank": 1, "text": "odd"},
    ]
    assert logging.getLogger("trainer").level == before
