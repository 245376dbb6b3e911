"""What the server that ranks are forked from is told first: they run on the CPU.

A rank says so itself when it begins, but the server has imported DeepSpeed by then.
"""

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# A fork does not look for garbage among what the server has imported.
os.register_at_fork(after_in_child=gc.freeze)
