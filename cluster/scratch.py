"""The temporary folder of a run, which only its user can enter."""

import tempfile
from pathlib import Path

from cluster.contract import ClusterConfigError


def make_scratch(parent: str | None) -> Path:
    """Makes a folder of mode 0700; the caller removes it.

    Args:
        parent: Where, `cluster.scratch_dir`; None is the system's place for temporary files.

    Raises:
        ClusterConfigError: It cannot be made there.
    """
    try:
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="lapflow-", dir=parent))
    except OSError as error:
        raise ClusterConfigError(
            f"cluster.scratch_dir={parent} cannot be written: {error}. Choose another folder."
        ) from error
