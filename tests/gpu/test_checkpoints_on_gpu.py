"""Saves from a GPU: a snapshot of that very moment, in page-locked memory, restored to the bit."""

import math

import pytest
import torch

from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.saver import CheckpointSaver
from trainer.host_group import HostGroup
from trainer.host_memory import host_buffer
from trainer.state import Fragment
from trainer.storage.local import LocalStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = {"embed": (1000, 300), "gain": (), "output": (7, 5, 3), "wide": (4000, 2500)}
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def state(fill):
    return [
        Fragment(
            name=name,
            start=0,
            shape=shape,
            tensors={kind: fill(math.prod(shape)) for kind in KINDS},
        )
        for name, shape in SHAPES.items()
    ]


def test_a_save_takes_the_state_as_the_queued_work_leaves_it_and_before_any_later_work(tmp_path):
    store = LocalStore(tmp_path)
    saver = CheckpointSaver(
        store,
        index=CheckpointIndex(store, run="run"),
        config=CheckpointConfig(keep_last=1),
        ranks=HostGroup(alone=True),
        aside=HostGroup(alone=True),
    )
    live = state(lambda numel: torch.zeros(numel, device="cuda"))
    work = torch.randn(4096, 4096, device="cuda")
    saver.prepare(live, science={})
    for turn in range(1, 9):
        for _ in range(20):
            work = torch.nn.functional.normalize(work @ work)
        for each in live:
            for values in each.tensors.values():
                values.copy_(torch.arange(values.numel(), device="cuda") + turn)
        assert saver.save(
            images=turn, fragments=live, train_state={}, science={}, config_fingerprint="x"
        )
        for each in live:
            for values in each.tensors.values():
                values.fill_(-1)
        saver.finish()
        assert saver.is_saved(turn)
        loaded = state(lambda numel: torch.zeros(numel, device="cuda"))
        reader = CheckpointReader(store, run="run")
        reader.restore(reader.newest_valid(), loaded)
        for each in loaded:
            for values in each.tensors.values():
                expected = torch.arange(values.numel(), device="cuda") + float(turn)
                assert torch.equal(values, expected)


def test_page_locked_memory_is_not_rounded_up():
    size = 3 * 2**20 + 40
    buffer = host_buffer(size, page_locked=True)
    assert buffer.is_pinned()
    assert buffer.untyped_storage().nbytes() == size
    assert not host_buffer(size, page_locked=False).is_pinned()


def test_memory_that_cannot_be_locked_does_not_fail_the_next_kernel(monkeypatch, caplog):
    runtime = torch.cuda.cudart()

    class RegisteringTwice:
        """The second time fails, and CUDA keeps the error for the next launch."""

        def cudaHostRegister(self, *arguments):  # noqa: N802
            assert int(runtime.cudaHostRegister(*arguments)) == 0
            return runtime.cudaHostRegister(*arguments)

    monkeypatch.setattr(torch.cuda, "cudart", RegisteringTwice)
    buffer = host_buffer(4096, page_locked=True)
    assert "cannot be page-locked" in caplog.text
    assert torch.ones(1000, device="cuda").sum().item() == 1000
    runtime.cudaHostUnregister(buffer.data_ptr())
