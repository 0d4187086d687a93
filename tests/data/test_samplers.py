"""Every image once, in an order that depends only on seed and epoch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from data.samplers import Draw, EvalSampler, TrainSampler


def samplers(length: int, batch_size: int, world_size: int, **options: Any) -> list[TrainSampler]:
    options = {"seed": 3, **options}
    return [
        TrainSampler(length, batch_size=batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def micro_batches(ranks: list[TrainSampler], batch_size: int, epoch: int, start: int = 0) -> list[list[int]]:
    """Return the images of every micro-batch, those of rank 0 first."""
    parts = []
    for sampler in ranks:
        sampler.set_position(epoch, start)
        draws = list(sampler)
        assert all(draw.epoch == epoch for draw in draws)
        assert len(sampler) == len(draws)
        parts.append([[d.index for d in draws[i : i + batch_size]] for i in range(0, len(draws), batch_size)])
    return [list(itertools.chain(*part)) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize(
    ("length", "batch_size", "world_size", "accumulation_steps"),
    [(24, 4, 1, 1), (101, 4, 1, 1), (101, 4, 3, 1), (101, 2, 2, 3), (7, 1, 7, 1), (97, 5, 4, 2)],
)
def test_ranks_share_whole_updates_without_overlap(
    length: int, batch_size: int, world_size: int, accumulation_steps: int
) -> None:
    ranks = samplers(length, batch_size, world_size, accumulation_steps=accumulation_steps)
    update = batch_size * world_size * accumulation_steps
    seen = list(itertools.chain(*micro_batches(ranks, batch_size, epoch=2)))
    assert len(seen) == len(set(seen)) == length // update * update
    assert set(seen) <= set(range(length))
    assert [sampler.updates_per_epoch for sampler in ranks] == [length // update] * world_size


def test_one_and_several_processes_see_the_same_micro_batches() -> None:
    one = micro_batches(samplers(103, 12, 1), 12, epoch=5)
    assert micro_batches(samplers(103, 6, 2), 6, epoch=5) == one
    assert micro_batches(samplers(103, 3, 4), 3, epoch=5) == one


def test_epochs_and_seeds_have_their_own_orders() -> None:
    orders = [micro_batches(samplers(40, 4, 1, seed=seed), 4, epoch) for seed in (3, 4) for epoch in (0, 1)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    assert orders[0] == micro_batches(samplers(40, 4, 1), 4, epoch=0)
    assert orders[0] != [list(range(first, first + 4)) for first in range(0, 40, 4)]


@pytest.mark.parametrize("updates", [0, 1, 3, 4])
def test_resuming_continues_after_the_finished_updates(updates: int) -> None:
    ranks = samplers(101, 4, 2, accumulation_steps=3)
    whole = micro_batches(ranks, 4, epoch=1)
    assert len(whole) == 4 * 3
    assert micro_batches(ranks, 4, epoch=1, start=updates * 24) == whole[updates * 3 :]


def test_resuming_with_another_number_of_ranks_repeats_and_skips_nothing() -> None:
    before = micro_batches(samplers(100, 5, 2), 5, epoch=0)[:3]
    after = micro_batches(samplers(100, 4, 3), 4, epoch=0, start=30)
    assert sorted(itertools.chain(*before, *after)) == sorted(
        itertools.chain(*micro_batches(samplers(100, 1, 1), 1, epoch=0)[: 30 + 70 // 12 * 12])
    )


def test_position_holds_for_the_iteration_it_was_set_for() -> None:
    (sampler,) = samplers(20, 2, 1)
    iterator = iter(sampler)
    sampler.set_position(1, 10)
    assert [draw.epoch for draw in iterator] == [0] * 20


def test_position_beyond_the_end_is_rejected() -> None:
    (sampler,) = samplers(20, 2, 1)
    with pytest.raises(ValueError, match="after image 21 of an epoch, but there are 20 training images"):
        sampler.set_position(0, 21)


def test_data_set_smaller_than_an_update_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"needs 24 training images, batch size 4 x 2 processes x 3 .*, and there are 23; reduce --batch",
    ):
        samplers(23, 4, 2, accumulation_steps=3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 13])
def test_evaluation_takes_each_image_once(world_size: int) -> None:
    shards = [list(EvalSampler(10, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sorted(itertools.chain(*shards)) == [Draw(index, 0) for index in range(10)]
    assert [len(EvalSampler(10, rank=r, world_size=world_size)) for r in range(world_size)] == [*map(len, shards)]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_repeated_augmentation() -> None:
    sampler = TrainSampler(20, batch_size=6, rank=0, world_size=1, seed=0, repeats=3)
    draws = list(sampler)
    assert len(draws) == len(sampler) == 18
    assert len(set(draws)) == 18
    assert len({draw.index for draw in draws}) == 6  # a third of the images that an epoch has draws
    assert {draw.repeat for draw in draws} == {0, 1, 2}
    ranks = [TrainSampler(20, batch_size=3, rank=rank, world_size=2, seed=0, repeats=3) for rank in (0, 1)]
    halves = [list(rank) for rank in ranks]
    assert [draw for first in (0, 3, 6) for half in halves for draw in half[first : first + 3]] == draws


LABELS = np.repeat([0, 1, 2, 4], [60, 31, 8, 3])  # class 3 has no images


def test_balanced_epochs_take_as_many_images_of_each_class() -> None:
    (sampler,) = samplers(len(LABELS), 1, 1, balanced=LABELS)
    draws = list(sampler)
    assert sorted(np.bincount(LABELS[[draw.index for draw in draws]])) == [0, 25, 25, 26, 26]
    assert len(set(draws)) == len(draws)  # the second time, an image is augmented otherwise
    times = np.bincount([draw.index for draw in draws], minlength=len(LABELS))
    for label in (0, 1, 2, 4):
        assert np.ptp(times[label == LABELS]) <= 1


def test_balanced_epochs_are_the_same_for_any_number_of_processes_and_resume() -> None:
    one = micro_batches(samplers(len(LABELS), 12, 1, balanced=LABELS), 12, epoch=5)
    assert micro_batches(samplers(len(LABELS), 4, 3, balanced=LABELS), 4, epoch=5) == one
    assert micro_batches(samplers(len(LABELS), 4, 3, balanced=LABELS), 4, epoch=5, start=36) == one[3:]
    assert micro_batches(samplers(len(LABELS), 12, 1, balanced=LABELS), 12, epoch=6) != one
