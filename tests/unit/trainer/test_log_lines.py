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


def test_what_a_worker_logs_is_told_with_its_level_and_written_by_nobody_else(caplog):
    told, heard = [], []
    before = logging.getLogger("trainer").level
    logger = logging.getLogger("trainer.engine")
    with forward_logs(lambda *line: told.append(line), heard=lambda: heard.append(1)):
        logger.info("building")
        logger.warning("odd\nand http://user:word@host/")
        logger.error("bad")
        logger.debug("detail")
    assert told == [
        ("INFO", "building"),
        ("WARNING", "odd\\nand http://***@host/"),
        ("ERROR", "bad"),
    ]
    assert len(heard) == 3
    assert caplog.text == ""  # it listens at the root
    logger.warning("nobody listens")
    assert len(told) == 3
    assert "nobody listens" in caplog.text
    assert logging.getLogger("trainer").level == before
