"""The simulator of a GPU's queues, on work small enough to follow by hand."""

import pytest

from trainer.planning.queues import GPU, LINK, NETWORK, Piece, run, simulate
from trainer.planning.step_time import pass_seconds
from trainer.planning.streams import Pass, Stream, Transfer, Travel

NONE = Travel()


def test_the_first_queue_has_the_gpu_first_and_the_other_what_is_left():
    coarse = [Piece(GPU, 2), Piece(LINK, 3), Piece(GPU, 1)]
    # 3 of 5 seconds beside the exchange, and 2 when all else is done.
    assert run([coarse, [Piece(GPU, 5)]]) == pytest.approx(2 + 3 + 1 + 2)
    # In the other order the exchange begins late.
    assert run([[Piece(GPU, 5)], coarse]) == pytest.approx(5 + 2 + 3 + 1)


def test_what_is_on_the_link_shares_it_but_starts_and_the_network_do_not():
    assert run([[Piece(LINK, 2)], [Piece(LINK, 3)]]) == pytest.approx(5)
    # The shorter of two ends when each has had as much.
    ends = [[Piece(LINK, 2), Piece(GPU, 10)], [Piece(LINK, 3)]]
    assert run(ends) == pytest.approx(2 * 2 + 10)
    assert run([[Piece(LINK, 2, start=3)], [Piece(LINK, 3)]]) == pytest.approx(5)
    assert run([[Piece(NETWORK, 2)], [Piece(LINK, 3)]]) == pytest.approx(3)


def test_work_waits_for_what_it_needs():
    event = ("keys", 0, 0)
    first = [Piece(GPU, 2), Piece(LINK, 1, tells=event), Piece(GPU, 4)]
    second = [Piece(GPU, 1), Piece(GPU, 1, needs=(event,))]
    assert run([first, second]) == pytest.approx(2 + 1 + 4 + 1)
    with pytest.raises(AssertionError, match="wait for one another"):
        run([[Piece(GPU, 1, needs=(event,))]])


COARSE = Stream(
    compute=(1, 1, 1),
    forward=(Travel(1), Travel(1), Travel(1), Travel(1)),
    backward=(Travel(2), Travel(1), Travel(2), Travel(1)),
)


def test_a_block_of_one_queue_takes_the_sum_of_its_parts():
    work = Pass(depth=3, coarse=None, finest=COARSE)
    assert simulate(work) == pytest.approx((3 * 3 + 2 * 4, 3 * 6 + 2 * 6))
    assert pass_seconds(work) == pytest.approx(simulate(work))


def test_a_finest_scale_that_computes_longer_hides_the_exchange():
    work = Pass(depth=10, coarse=COARSE, finest=Stream(compute=(2, 3, 3)))
    assert simulate(work) == pytest.approx((10 * (3 + 8), 10 * (6 + 16)))
    # One that computes less does not, but is hidden itself; at last it has its last block left, and
    # of the first one, in the backward pass, what coarse scales wait for.
    slow = Pass(depth=10, coarse=COARSE, finest=Stream(compute=(0.1, 0.1, 0.3)))
    assert simulate(slow) == pytest.approx((10 * 3 + 9 * 4, 10 * 6 + 9 * 6))
    for each in (work, slow):
        assert pass_seconds(each) == pytest.approx(simulate(each))


def test_reductions_begin_with_their_block_and_share_the_link():
    stream = Stream(compute=(1, 1, 1))
    three = Pass(
        depth=3,
        coarse=None,
        finest=stream,
        reductions=(Transfer(2, 4, 0), Transfer(1, 9, 2), Transfer(-1, 1, 0)),
    )
    # 6 seconds a block; the second begins at 12, and the last after all.
    assert simulate(three)[1] == pytest.approx(12 + 9 + 2 + 1)
    exchanging = Pass(depth=2, coarse=None, finest=COARSE, reductions=(Transfer(1, 3, 0),))
    # The block with exchanges is over at 12; nothing is on the link beside the first block.
    assert simulate(exchanging)[1] == pytest.approx(12 + 6)
    early = Pass(depth=3, coarse=None, finest=COARSE, reductions=(Transfer(2, 3, 0),))
    # Block 1 exchanges 2, computes 2, exchanges 1: half of the first 4 seconds, then one more.
    assert simulate(early)[1] == pytest.approx(12 + 12 + 2 + 6)
    for each in (three, exchanging, early):
        assert pass_seconds(each) == pytest.approx(simulate(each))


def test_weights_are_gathered_while_the_block_before_computes():
    stream = Stream(compute=(1, 1, 1))
    weights = tuple(Transfer(block, link, 0) for block, link in enumerate((5, 2, 4)))
    work = Pass(depth=3, coarse=None, finest=stream, weights=weights)
    # 5 for the first, then 3 hide 2, and 3 of 4.
    assert simulate(work)[0] == pytest.approx(5 + 3 + 3 + 1 + 3)
    assert pass_seconds(work) == pytest.approx(simulate(work))
