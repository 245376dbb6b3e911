"""How saves ended is told to the user and kept with the run."""

from trainer.checkpoint.upload import SaveReport
from trainer.metrics.tracker import Tracker
from trainer.training.tracking import CheckpointReporter


class KeepingTracker(Tracker):
    def __init__(self):
        self.told = {}
        self.checkpoints = {}
        self.points = []

    def tags(self, values):
        self.told.update(values)

    def checkpoint(self, uri, *, images):
        self.checkpoints[images] = uri

    def metrics(self, values, *, images):
        self.points.append((images, dict(values)))


def report(error=None):
    return SaveReport(
        images=1280,
        uri="s3://b/runs/r/checkpoints/000000001280",
        size_bytes=0 if error else 3 * 2**30,
        blocked_s=0.25,
        upload_s=4.0,
        error=error,
    )


def test_a_checkpoint_is_told_tagged_and_measured():
    tracker, told = KeepingTracker(), []
    CheckpointReporter(tracker, told.append)(report())
    uri = report().uri
    assert told == [{"kind": "checkpoint", "images": 1280, "uri": uri}]
    assert tracker.checkpoints == {1280: uri}
    ((images, values),) = tracker.points
    assert images == 1280
    assert values == {
        "speed/checkpoint_blocked_s": 0.25,
        "speed/checkpoint_upload_s": 4.0,
        "speed/checkpoint_size_gib": 3.0,
        "speed/checkpoint_failed": 0.0,
    }


def test_a_failure_is_told_with_its_reason_and_leaves_the_last_checkpoint():
    tracker, told = KeepingTracker(), []
    CheckpointReporter(tracker, told.append)(report("the disk is full"))
    ((_, values),) = tracker.points
    assert values["speed/checkpoint_failed"] == 1.0
    assert tracker.checkpoints == {}
    assert tracker.told == {"checkpoint_failed.000000001280": "the disk is full"}
    assert told == [
        {
            "kind": "checkpoint_failed",
            "images": 1280,
            "uri": report().uri,
            "text": "the disk is full",
        }
    ]
