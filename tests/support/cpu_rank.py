"""What the server that ranks are forked from is told first: they run on the CPU.

A rank says so itself when it begins, but the server has imported DeepSpeed by then.
"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
