"""Batches have the dependence asked for, and are the same however an epoch is cut."""

from collections import Counter
from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from renorm.samplers import ClassBatchSampler, MicrobatchSampler, RandomBatchSampler

LABELS = torch.randint(10, (600,), generator=torch.Generator().manual_seed(0))


def random_batches(seed: int = 0) -> RandomBatchSampler:
    return RandomBatchSampler(100, 8, seed=seed)


def class_batches(seed: int = 0) -> ClassBatchSampler:
    return ClassBatchSampler(LABELS, 4, 8, replacement=True, seed=seed)


either = pytest.mark.parametrize("make", [random_batches, class_batches])


@either
def test_the_seed_and_the_epoch_determine_the_batches(make):
    first, second, other = make(), make(), make(seed=1)
    torch.manual_seed(0)
    batches = list(first)
    torch.manual_seed(1)
    assert list(second) == batches
    assert list(other) != batches
    second.set_epoch(1)
    assert list(second) != batches
    second.set_epoch(0)
    assert list(second) == batches


@either
def test_sampling_leaves_the_global_random_state_alone(make):
    before = torch.get_rng_state()
    list(make())
    assert torch.equal(torch.get_rng_state(), before)


@either
def test_an_epoch_resumes_at_any_batch(make):
    sampler = make()
    sampler.set_epoch(3)
    whole = list(sampler)
    for start in (0, 1, 7, len(sampler)):
        sampler.set_epoch(3, start)
        assert list(sampler) == whole[start:]


@either
def test_a_resumed_epoch_is_not_cut_again_when_repeated(make):
    sampler = make()
    sampler.set_epoch(0, start_batch=5)
    assert len(list(sampler)) == len(sampler) - 5
    assert len(list(sampler)) == len(sampler)


@either
@pytest.mark.parametrize("start_batch", [-1, 1_000])
def test_a_start_outside_the_epoch_is_refused(make, start_batch):
    with pytest.raises(ValueError, match=f"start_batch must be between 0 and .* got {start_batch}"):
        make().set_epoch(0, start_batch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_takes_them(num_workers):
    sampler = class_batches()
    loader = DataLoader(TensorDataset(torch.arange(len(LABELS))), batch_sampler=sampler, num_workers=num_workers)
    assert len(loader) == len(sampler)
    assert [indices.tolist() for (indices,) in loader] == list(sampler)


@pytest.mark.parametrize("drop_last", [True, False])
def test_random_batches_cover_every_example_once(drop_last):
    batches = list(RandomBatchSampler(103, 10, drop_last=drop_last))
    drawn = [index for batch in batches for index in batch]
    assert len(set(drawn)) == len(drawn) == (100 if drop_last else 103)
    assert [len(batch) for batch in batches[:10]] == [10] * 10
    assert drawn != sorted(drawn)


@pytest.mark.parametrize(
    ("classes", "examples", "replacement"), [(4, 8, False), (10, 2, False), (4, 8, True), (16, 2, True)]
)
def test_every_class_drawn_gives_its_number_of_different_examples(classes, examples, replacement):
    for batch in ClassBatchSampler(LABELS, classes, examples, replacement=replacement, order="class"):
        draws = torch.tensor(batch).view(classes, examples)
        assert (LABELS[draws] == LABELS[draws[:, :1]]).all()
        assert all(len(set(draw.tolist())) == examples for draw in draws)
        if not replacement:
            assert LABELS[draws[:, 0]].unique().numel() == classes


def test_replacement_draws_a_class_twice_at_times():
    batches = list(ClassBatchSampler(LABELS, 4, 2, replacement=True, order="class"))
    assert any(LABELS[batch].unique().numel() < 4 for batch in batches)


def test_classes_are_drawn_uniformly_whatever_their_size():
    labels = torch.cat([torch.zeros(900), torch.ones(60), torch.full((40,), 7)]).long()
    sampler = ClassBatchSampler(labels, 1, 4, batches_per_epoch=3_000)
    drawn = Counter(int(labels[batch[0]]) for batch in sampler)
    assert set(drawn) == {0, 1, 7}
    assert all(abs(count - 1_000) < 150 for count in drawn.values())  # more than five standard deviations


def test_examples_of_a_class_are_drawn_uniformly():
    sampler = ClassBatchSampler([0] * 10, 1, 3, batches_per_epoch=2_000)
    drawn = Counter(index for batch in sampler for index in batch)
    assert all(abs(drawn[index] - 600) < 110 for index in range(10))


def test_shuffle_mixes_the_classes():
    batches = [LABELS[batch] for batch in ClassBatchSampler(LABELS, 4, 8)]
    runs = [int((batch[1:] != batch[:-1]).sum()) + 1 for batch in batches]
    assert min(runs) > 4


@pytest.mark.parametrize(
    ("classes", "examples", "examples_per_group"),
    [(16, 2, 16), (8, 4, 8), (4, 8, 16), (8, 2, 4), (4, 3, 6), (16, 2, 2)],
)
def test_split_spreads_every_class_over_the_groups(classes, examples, examples_per_group):
    labels = torch.arange(2_000) % 40
    sampler = ClassBatchSampler(labels, classes, examples, order="split", examples_per_group=examples_per_group)
    num_groups = classes * examples // examples_per_group
    for batch in sampler:
        for label in labels[batch].unique():
            groups = (labels[batch] == label).nonzero().flatten() // examples_per_group
            share = torch.bincount(groups, minlength=num_groups)
            assert share.max() - share.min() <= 1


def test_split_shuffles_within_a_group():
    labels = torch.arange(64) // 2
    sampler = ClassBatchSampler(labels, 16, 2, order="split", examples_per_group=16)
    first, second = torch.tensor(next(iter(sampler))).view(2, 16)
    assert labels[first].sort().values.equal(labels[second].sort().values)
    assert not labels[first].equal(labels[second])


def test_an_epoch_has_as_many_batches_as_make_up_the_examples():
    assert len(ClassBatchSampler(LABELS, 4, 8)) == len(LABELS) // 32
    assert len(ClassBatchSampler(torch.arange(4).repeat(8), 4, 8, replacement=True)) == 1
    assert len(list(ClassBatchSampler(LABELS, 4, 8, batches_per_epoch=3))) == 3


def test_microbatches_are_the_batches_in_pieces():
    sampler = MicrobatchSampler(class_batches(), batch_size=32, microbatch_size=8)
    pieces = list(sampler)
    assert len(pieces) == len(sampler) == 4 * len(class_batches())
    assert [list(chain(*pieces[i : i + 4])) for i in range(0, len(pieces), 4)] == list(class_batches())
    sampler.set_epoch(1, start_batch=2)
    resumed = class_batches()
    resumed.set_epoch(1, start_batch=2)
    assert list(chain(*sampler)) == list(chain(*resumed))


def test_microbatches_refuse_a_batch_of_another_size():
    sampler = MicrobatchSampler(RandomBatchSampler(10, 4, drop_last=False), batch_size=4, microbatch_size=2)
    with pytest.raises(ValueError, match="batches of batch_size=4, got 2"):
        list(sampler)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([0.5, 1.0], 1, 1), {}, TypeError, "labels must be integers, got torch.float32"),
        (([[0, 1]], 1, 1), {}, ValueError, r"labels must have shape \(N,\).* got \(1, 2\)"),
        (([0, 1], 0, 1), {}, ValueError, "classes_per_batch must be at least 1, got 0"),
        (([0, 1], 1, 0), {}, ValueError, "examples_per_class must be at least 1, got 0"),
        (([0, 0, 1], 3, 1), {}, ValueError, "classes_per_batch must be at most the 2 classes there are, got 3"),
        (([0, 0, 5], 1, 2), {}, ValueError, "got 2, but class 5 has 1 examples"),
        (([0, 1], 2, 1), {"order": "sorted"}, ValueError, "one of 'shuffle', 'class', 'split', got 'sorted'"),
        (([0, 1], 2, 1), {"order": "split"}, ValueError, "examples_per_group goes with order='split', got None"),
        (([0, 1], 2, 1), {"examples_per_group": 1}, ValueError, "got 1 with order='shuffle'"),
        (([0, 1], 2, 1), {"order": "split", "examples_per_group": 3}, ValueError, "the batch of 2 examples, got 3"),
        (([0, 1], 2, 1), {"batches_per_epoch": 0}, ValueError, "at least 1 batch, got 0"),
    ],
)  # fmt: skip
def test_class_batches_that_cannot_be_drawn_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ClassBatchSampler(*arguments, **options)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(0, 4), (4, 0), (3, 4)])
def test_random_batches_that_cannot_be_drawn_are_refused(num_examples, batch_size):
    with pytest.raises(
        ValueError, match=r"at least 1 batch, got 0|(num_examples|batch_size) must be at least 1, got 0"
    ):
        RandomBatchSampler(num_examples, batch_size)
