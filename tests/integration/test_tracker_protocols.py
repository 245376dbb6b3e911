"""Curves in a real MLflow never have figures of two protocols."""

import pytest

from tests.support.tracked import history, local_client, local_tracker, only_run
from trainer.metrics.journal import Journal
from trainer.metrics.tracker import by_protocol

pytestmark = pytest.mark.slow

FIGURE = "eval/frechet_x"
OURS, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"


def measure(tracker, *measurements):
    """Tell what was measured of checkpoints: images, distance, protocol."""
    for images, distance, protocol in measurements:
        tracker.checkpoint(f"s3://bucket/{images}", images=images)
        told = {FIGURE: distance, "eval/network_evaluations": 20.0, "reference/frechet_x": 0.1}
        tracker.measured(told, images=images, lowest=FIGURE, protocol=protocol)


def curves(home):
    client = local_client(home)
    run = only_run(client)
    return {name: history(client, run.info.run_id, name) for name in run.data.metrics}


def distances(home):
    return {name: points for name, points in curves(home).items() if name.endswith("frechet_x")}


def best(home):
    return local_client(home).get_model_version_by_alias("r", "best").tags["checkpoint"]


def test_figures_of_another_protocol_have_curves_of_their_own_also_after_restarts(
    tmp_path, empty_tracker
):
    tracker = local_tracker(tmp_path, empty_tracker)
    measure(tracker, (10, 3.0, OURS), (20, 0.2, OTHER))
    tracker.close("KILLED")
    again = local_tracker(tmp_path, empty_tracker, launch=2)
    # Older checkpoints are measured again, as beside training.
    measure(again, (10, 0.3, OTHER), (30, 0.1, OTHER))
    again.close("KILLED")
    last = local_tracker(tmp_path, empty_tracker, launch=3)
    measure(last, (40, 2.0, OURS))
    last.close("FINISHED")
    assert curves(tmp_path) == {
        FIGURE: [(10, 3.0), (40, 2.0)],
        "eval/network_evaluations": [(10, 20.0), (40, 20.0)],
        "reference/frechet_x": [(10, 0.1), (40, 0.1)],
        "eval_bbbbbb/frechet_x": [(10, 0.3), (20, 0.2), (30, 0.1)],
        "eval_bbbbbb/network_evaluations": [(10, 20.0), (20, 20.0), (30, 20.0)],
        "reference_bbbbbb/frechet_x": [(10, 0.1), (20, 0.1), (30, 0.1)],
    }
    # Most checkpoints were measured by the other one, and of them this is the lowest.
    assert best(tmp_path) == "s3://bucket/30"
    page = only_run(local_client(tmp_path)).data.tags["mlflow.note.content"]
    assert page.startswith(f"After 40 images **{FIGURE} = 2**")


def test_the_description_names_the_curve_that_a_figure_is_in(tmp_path, empty_tracker):
    tracker = local_tracker(tmp_path, empty_tracker)
    tracker.page("What it is")
    measure(tracker, (10, 3.0, OURS), (20, 0.2, OTHER))
    tracker.close("FINISHED")
    page = only_run(local_client(tmp_path)).data.tags["mlflow.note.content"]
    assert page.startswith("After 20 images **eval_bbbbbb/frechet_x = 0.2**\n\nWhat it is\n")
    assert "| `reference_bbbbbb/frechet_x` | 0.1 |" in page


def test_figures_carry_their_protocol_through_checkpoints(tmp_path, empty_tracker, monkeypatch):
    tracker = local_tracker(tmp_path, empty_tracker)
    measure(tracker, (10, 3.0, OURS))
    tracker.flush()
    # The disk on which the next one was written down is lost; a checkpoint took it along.
    lost = local_tracker(tmp_path, empty_tracker, launch=2)
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "waiting", lambda *_: [])
        measure(lost, (20, 0.2, OTHER))
        (point,) = [each for each in lost.unsent() if each.images == 20]
        lost._has_given_up.set()
        lost._thread.join()
    for path in tmp_path.rglob("*.jsonl"):
        path.unlink()
    assert point.values == by_protocol(
        {FIGURE: 0.2, "eval/network_evaluations": 20.0, "reference/frechet_x": 0.1}, OTHER
    )
    again = local_tracker(tmp_path, empty_tracker, launch=3)
    again.metrics(point.values, images=point.images)
    again.close("FINISHED")
    assert distances(tmp_path) == {
        FIGURE: [(10, 3.0)],
        "reference/frechet_x": [(10, 0.1)],
        "eval_bbbbbb/frechet_x": [(20, 0.2)],
        "reference_bbbbbb/frechet_x": [(20, 0.1)],
    }


@pytest.mark.parametrize("is_ranked", [True, False], ids=["models tell", "nothing tells"])
def test_a_run_of_a_version_that_did_not_note_protocols_goes_on(is_ranked, tmp_path, empty_tracker):
    tracker = local_tracker(tmp_path, empty_tracker)
    if is_ranked:
        measure(tracker, (10, 3.0, OURS))
    else:
        tracker.metrics({FIGURE: 3.0}, images=10)
    tracker.close("KILLED")
    client = local_client(tmp_path)
    run = only_run(client)
    for tag in run.data.tags:
        if ".protocol." in tag:
            client.delete_tag(run.info.run_id, tag)
    again = local_tracker(tmp_path, empty_tracker, launch=2)
    measure(again, (20, 0.2, OTHER), (30, 2.0, OURS))
    again.close("FINISHED")
    found = {name: points for name, points in distances(tmp_path).items() if name[:4] == "eval"}
    if is_ranked:
        expected = {FIGURE: [(10, 3.0), (30, 2.0)], "eval_bbbbbb/frechet_x": [(20, 0.2)]}
    else:
        expected = {
            FIGURE: [(10, 3.0)],
            "eval_bbbbbb/frechet_x": [(20, 0.2)],
            "eval_aaaaaa/frechet_x": [(30, 2.0)],
        }
    assert found == expected


def test_figures_on_the_way_have_a_protocol_of_their_own(tmp_path, empty_tracker):
    tracker = local_tracker(tmp_path, empty_tracker)
    way = "eval_during/frechet_x"
    for images, protocol in ((10, OURS), (20, OURS), (30, OTHER)):
        tracker.measured({way: 1.0}, images=images, lowest=way, protocol=protocol)
    measure(tracker, (40, 2.0, OTHER))
    tracker.close("FINISHED")
    found = {name: points for name, points in distances(tmp_path).items() if name[:4] == "eval"}
    assert found == {
        way: [(10, 1.0), (20, 1.0)],
        "eval_during_bbbbbb/frechet_x": [(30, 1.0)],
        FIGURE: [(40, 2.0)],
    }
