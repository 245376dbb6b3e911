"""The folder in which workers of one node meet goes when the last of them has left."""

import threading
from pathlib import Path

from cluster import ray_worker


def test_the_folder_of_a_rendezvous_stays_until_the_last_worker_has_left(tmp_path: Path) -> None:
    folder = tmp_path / "meeting"
    folder.mkdir()
    file = folder / "rendezvous"
    file.touch()
    ray_worker._folders.append(folder)
    removing = threading.Thread(
        target=ray_worker.remove_rendezvous_folder, kwargs={"patience_s": 60}
    )
    removing.start()
    removing.join(0.1)
    assert removing.is_alive()
    assert file.exists()
    file.unlink()
    removing.join(60)
    assert not removing.is_alive()
    assert not folder.exists()


def test_it_goes_at_once_where_some_may_never_leave(tmp_path: Path) -> None:
    (tmp_path / "meeting").mkdir()
    (tmp_path / "meeting" / "rendezvous").touch()
    ray_worker._folders.append(tmp_path / "meeting")
    ray_worker.remove_rendezvous_folder(patience_s=0)
    assert not (tmp_path / "meeting").exists()
