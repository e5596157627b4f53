"""Batches have the dependence asked for, and are the same however an epoch is cut."""

import pickle
from collections import Counter
from itertools import chain

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from renorm.samplers import ClassBatchSampler, MicrobatchSampler, RandomBatchSampler

LABELS = torch.randint(10, (600,), generator=torch.Generator().manual_seed(0))


def random_batches(seed=0):
    return RandomBatchSampler(100, 8, seed=seed)


def class_batches(seed=0):
    return ClassBatchSampler(LABELS, 4, 8, replacement=True, seed=seed)


def microbatches(seed=0):
    return MicrobatchSampler(class_batches(seed), 8)


whole_batches = pytest.mark.parametrize("make", [random_batches, class_batches])
every_sampler = pytest.mark.parametrize("make", [random_batches, class_batches, microbatches])


def epoch_of(sampler, epoch, start_batch=0):
    sampler.set_epoch(epoch, start_batch)
    return list(sampler)


@every_sampler
def test_the_seed_and_the_epoch_determine_the_batches(make):
    torch.manual_seed(0)
    batches = list(make())
    torch.manual_seed(1)
    assert list(make()) == batches
    assert list(make(seed=1)) != batches
    sampler = make()
    assert epoch_of(sampler, 1) != batches
    assert epoch_of(sampler, 0) == batches


@every_sampler
def test_neighbouring_seeds_do_not_share_epochs(make):
    assert epoch_of(make(seed=0), 1) != epoch_of(make(seed=1), 0)


@every_sampler
def test_every_pass_is_the_same_until_the_epoch_is_set(make):
    sampler = make()
    assert list(sampler) == list(sampler) == epoch_of(make(), 0)


@every_sampler
def test_sampling_leaves_the_global_random_state_alone(make):
    before = torch.get_rng_state()
    assert list(make())
    assert torch.equal(torch.get_rng_state(), before)


@every_sampler
def test_two_passes_at_once_do_not_disturb_each_other(make):
    sampler = make()
    first, second = zip(*zip(sampler, sampler, strict=True), strict=True)
    assert first == second == tuple(make())


@every_sampler
def test_the_length_is_that_of_a_whole_epoch_also_when_resumed(make):
    sampler = make()
    assert len(sampler) == len(list(sampler)) > 5
    sampler.set_epoch(1, start_batch=5)
    assert len(sampler) == len(list(make()))


@whole_batches
@pytest.mark.parametrize("start_batch", [0, 1, 7, -1])
def test_a_resumed_epoch_is_the_tail_of_the_whole_one(make, start_batch):
    whole = epoch_of(make(), 3)
    start_batch %= len(whole) + 1  # -1 stands for the end of the epoch
    assert epoch_of(make(), 3, start_batch) == whole[start_batch:]


@whole_batches
def test_only_the_pass_after_set_epoch_starts_late(make):
    sampler = make()
    assert len(epoch_of(sampler, 0, start_batch=5)) == len(sampler) - 5
    assert list(sampler) == list(make())
    sampler.set_epoch(0, start_batch=5)
    assert epoch_of(sampler, 1) == epoch_of(make(), 1)


def test_resuming_late_in_an_epoch_does_not_draw_what_it_skips(monkeypatch):
    sampler = ClassBatchSampler(LABELS, 4, 8, batches_per_epoch=1_000)
    drawn = []
    original = sampler._batch
    monkeypatch.setattr(sampler, "_batch", lambda generator: drawn.append(1) or original(generator))
    assert len(epoch_of(sampler, 0, start_batch=998)) == len(drawn) == 2


@every_sampler
@pytest.mark.parametrize("start_batch", [-1, 1_000, 0.5])
def test_a_start_outside_the_epoch_is_refused(make, start_batch):
    with pytest.raises(ValueError, match=f"start_batch must be from 0 to .* got {start_batch}"):
        make().set_epoch(0, start_batch)


@every_sampler
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_yields_the_batches_of_every_epoch(make, num_workers):
    sampler = make()
    loader = DataLoader(
        TensorDataset(torch.arange(len(LABELS))),
        batch_sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    assert len(loader) == len(sampler)
    for epoch, start_batch in [(0, 0), (1, 3), (2, 0)]:
        sampler.set_epoch(epoch, start_batch)
        assert [indices.tolist() for (indices,) in loader] == epoch_of(make(), epoch, start_batch)


@every_sampler
def test_a_pickled_sampler_goes_on_where_it_was_set(make):
    sampler = make()
    sampler.set_epoch(2, start_batch=4)
    assert list(pickle.loads(pickle.dumps(sampler))) == epoch_of(make(), 2, start_batch=4)


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [10] * 10), (False, [10] * 10 + [3])])
def test_random_batches_cover_every_example_once(drop_last, sizes):
    sampler = RandomBatchSampler(103, 10, drop_last=drop_last)
    batches = list(sampler)
    drawn = list(chain(*batches))
    assert [len(batch) for batch in batches] == sizes
    assert len(sampler) == len(sizes)
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(range(103))
    assert drawn != sorted(drawn)


def test_the_examples_left_out_by_drop_last_differ_between_epochs():
    sampler = RandomBatchSampler(11, 10)
    assert len({frozenset(epoch_of(sampler, epoch)[0]) for epoch in range(20)}) > 5


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(("classes", "examples"), [(4, 8), (10, 2), (1, 40), (10, 1)])
def test_every_class_drawn_gives_its_number_of_different_examples(classes, examples, replacement):
    batches = list(ClassBatchSampler(LABELS, classes, examples, replacement=replacement, order="class"))
    assert batches
    for batch in batches:
        draws = torch.tensor(batch).view(classes, examples)
        assert (LABELS[draws] == LABELS[draws[:, :1]]).all()
        assert all(len(set(draw.tolist())) == examples for draw in draws)
        assert replacement or LABELS[draws[:, 0]].unique().numel() == classes


def test_a_class_of_exactly_the_number_asked_for_is_drawn_whole():
    (batch,) = ClassBatchSampler([3, 7, 3, 7, 3, 7], 2, 3)
    assert sorted(batch) == [0, 1, 2, 3, 4, 5]


def test_more_classes_than_there_are_can_be_drawn_with_replacement():
    batch = next(iter(ClassBatchSampler([0, 0, 1, 1], 16, 2, replacement=True)))
    assert len(batch) == 32
    assert set(batch) == {0, 1, 2, 3}


def test_replacement_draws_a_class_twice_as_often_as_chance_has_it():
    batches = ClassBatchSampler(LABELS, 2, 1, replacement=True, batches_per_epoch=2_000)
    repeated = sum(LABELS[batch].unique().numel() == 1 for batch in batches)
    assert abs(repeated - 200) < 67  # one in 10 classes; five standard deviations


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("sizes", [(500, 500, 500), (900, 60, 40)])
def test_classes_are_drawn_uniformly_whatever_their_size(sizes, replacement):
    labels = torch.tensor([0, 1, 7]).repeat_interleave(torch.tensor(sizes))
    sampler = ClassBatchSampler(labels, 1, 4, replacement=replacement, batches_per_epoch=3_000)
    drawn = Counter(int(labels[batch[0]]) for batch in sampler)
    assert set(drawn) == {0, 1, 7}
    assert all(abs(count - 1_000) < 130 for count in drawn.values())  # five standard deviations


@pytest.mark.parametrize("examples_per_class", [1, 3, 9])
def test_examples_of_a_class_are_drawn_uniformly_at_every_place(examples_per_class):
    sampler = ClassBatchSampler([0] * 10, 1, examples_per_class, order="class", batches_per_epoch=2_000)
    for place in zip(*sampler, strict=True):
        drawn = Counter(place)
        assert all(abs(drawn[index] - 200) < 67 for index in range(10))  # five standard deviations


def test_pairs_of_examples_are_drawn_uniformly():
    sampler = ClassBatchSampler([0] * 5, 1, 2, order="class", batches_per_epoch=4_000)
    drawn = Counter(map(tuple, sampler))
    assert len(drawn) == 20
    assert all(abs(count - 200) < 69 for count in drawn.values())  # five standard deviations


def test_shuffle_mixes_the_classes_and_class_does_not():
    def least_runs(order):
        batches = [LABELS[batch] for batch in ClassBatchSampler(LABELS, 4, 8, order=order)]
        return min(int((batch[1:] != batch[:-1]).sum()) + 1 for batch in batches)

    assert least_runs("class") == 4
    assert least_runs("shuffle") > 8


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(
    ("classes", "examples", "examples_per_group"),
    [(16, 2, 16), (8, 2, 4), (16, 2, 2), (3, 2, 3), (8, 4, 8), (4, 8, 16), (4, 3, 6), (5, 3, 5), (7, 1, 1)],
)
def test_split_spreads_every_class_over_the_groups(classes, examples, examples_per_group, replacement):
    labels = torch.arange(2_000) % 40
    batches = list(
        ClassBatchSampler(
            labels, classes, examples, replacement=replacement, order="split", examples_per_group=examples_per_group
        )
    )
    assert batches
    num_groups = classes * examples // examples_per_group
    for batch in batches:
        in_class_order, counts = labels[batch].unique(return_counts=True)
        for label, count in zip(in_class_order, counts, strict=True):
            groups = (labels[batch] == label).nonzero().flatten() // examples_per_group
            share = torch.bincount(groups, minlength=num_groups)
            draws = count // examples
            assert share.max() - share.min() <= draws  # every draw is as even as it can be


def test_split_shuffles_within_a_group():
    labels = torch.arange(64) // 2
    sampler = ClassBatchSampler(labels, 16, 2, order="split", examples_per_group=16)
    first, second = labels[next(iter(sampler))].view(2, 16)
    assert first.sort().values.equal(second.sort().values)
    assert not first.equal(second)


def test_an_epoch_has_as_many_batches_as_the_examples_fill():
    assert len(ClassBatchSampler(LABELS, 4, 8)) == len(LABELS) // 32
    assert len(ClassBatchSampler([0, 1], 8, 1, replacement=True)) == 1
    assert len(list(ClassBatchSampler(LABELS, 4, 8, batches_per_epoch=3))) == 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_the_integer_type_of_the_labels_does_not_matter(dtype):
    assert list(ClassBatchSampler(LABELS.to(dtype), 4, 8)) == list(ClassBatchSampler(LABELS, 4, 8))


def test_labels_may_be_a_sequence_or_an_array():
    array = LABELS.numpy().copy()
    array.flags.writeable = False  # as pandas and memory maps give them
    batches = list(ClassBatchSampler(LABELS, 4, 8))
    assert list(ClassBatchSampler(array, 4, 8)) == batches
    assert list(ClassBatchSampler(LABELS.tolist(), 4, 8)) == batches
    assert list(ClassBatchSampler(tuple(LABELS.tolist()), 4, 8)) == batches


def test_only_which_labels_are_equal_and_their_order_matter():
    assert list(ClassBatchSampler(LABELS * 1_000 - 5, 4, 8)) == list(ClassBatchSampler(LABELS, 4, 8))


@pytest.mark.parametrize(("size", "pieces"), [(8, [8, 8, 8, 8]), (12, [12, 12, 8]), (32, [32]), (100, [32])])
def test_microbatches_are_the_batches_in_pieces(size, pieces):
    sampler = MicrobatchSampler(class_batches(), size)
    drawn = list(sampler)
    assert [len(piece) for piece in drawn] == pieces * len(class_batches())
    assert len(sampler) == len(drawn)
    assert list(chain(*drawn)) == list(chain(*class_batches()))


def test_microbatches_count_a_smaller_last_batch():
    sampler = MicrobatchSampler(RandomBatchSampler(25, 10, drop_last=False), 4)
    assert [len(piece) for piece in sampler] == [4, 4, 2, 4, 4, 2, 4, 1]
    assert len(sampler) == 8


def test_microbatches_resume_at_a_whole_batch():
    resumed = epoch_of(microbatches(), 1, start_batch=2)
    assert list(chain(*resumed)) == list(chain(*epoch_of(class_batches(), 1, start_batch=2)))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0.5, 1.0], TypeError, r"labels must be integers .* got \[0\.5, 1\.0\]"),
        (torch.tensor([0.0]), TypeError, r"labels must be integers .* got tensor"),
        ([True, False], TypeError, r"labels must be integers .* got \[True, False\]"),
        (["cat", "dog"], TypeError, r"labels must be integers .* got \['cat', 'dog'\]"),
        ([[0], [1, 2]], TypeError, r"labels must be integers .* got \[\[0\], \[1, 2\]\]"),
        ({0, 1}, TypeError, r"labels must be integers .* got \{0, 1\}"),
        (None, TypeError, r"labels must be integers .* got None"),
        ([[0, 1]], ValueError, r"labels must have shape \(N,\).* got \(1, 2\)"),
        (3, ValueError, r"labels must have shape \(N,\).* got \(\)"),
        (torch.empty(0, dtype=torch.int64), ValueError, r"labels must have shape \(N,\).* got \(0,\)"),
    ],
)
def test_labels_that_are_not_a_row_of_integers_are_refused(labels, error, message):
    with pytest.raises(error, match=message):
        ClassBatchSampler(labels, 1, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classes_per_batch": 0}, ValueError, "classes_per_batch must be at least 1, got 0"),
        ({"classes_per_batch": 2.0}, TypeError, r"classes_per_batch must be an integer .* got 2\.0"),
        ({"classes_per_batch": 3}, ValueError, "classes_per_batch must be at most 2 without replacement, got 3"),
        ({"examples_per_class": 0}, ValueError, "examples_per_class must be at least 1, got 0"),
        ({"examples_per_class": True}, TypeError, "examples_per_class must be an integer .* got True"),
        ({"examples_per_class": 3}, ValueError, "class 5 has 2 examples, got examples_per_class=3"),
        ({"order": "sorted"}, ValueError, "order must be one of 'shuffle', 'class', 'split', got 'sorted'"),
        ({"order": "split"}, ValueError, "examples_per_group goes with order='split', got None"),
        ({"examples_per_group": 1}, ValueError, "examples_per_group goes .* got 1 with order='shuffle'"),
        ({"order": "split", "examples_per_group": 0}, ValueError, "examples_per_group must be at least 1, got 0"),
        ({"order": "split", "examples_per_group": 3}, ValueError, "must divide the batch of 4 examples, got 3"),
        ({"order": "split", "examples_per_group": "2"}, TypeError, "examples_per_group must be an integer .* got '2'"),
        ({"batches_per_epoch": 0}, ValueError, "batches_per_epoch must be at least 1, got 0"),
        ({"batches_per_epoch": 1.5}, TypeError, r"batches_per_epoch must be an integer .* got 1\.5"),
    ],
)
def test_class_batches_that_cannot_be_drawn_are_refused(options, error, message):
    accepted = {"labels": [0, 5, 0, 5, 0], "classes_per_batch": 2, "examples_per_class": 2}
    assert len(ClassBatchSampler(**accepted)) == 1
    with pytest.raises(error, match=message):
        ClassBatchSampler(**accepted | options)


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "drop_last", "error", "message"),
    [
        (3, 4, True, ValueError, "num_examples must be at least 4, got 3"),
        (0, 4, False, ValueError, "num_examples must be at least 1, got 0"),
        (4, 0, True, ValueError, "batch_size must be at least 1, got 0"),
        (4.0, 2, True, TypeError, r"num_examples must be an integer of at least 2, got 4\.0"),
        (4, "2", True, TypeError, "batch_size must be an integer of at least 1, got '2'"),
    ],
)
def test_random_batches_that_cannot_be_drawn_are_refused(num_examples, batch_size, drop_last, error, message):
    with pytest.raises(error, match=message):
        RandomBatchSampler(num_examples, batch_size, drop_last=drop_last)


@pytest.mark.parametrize(
    ("batch_sampler", "size", "error", "message"),
    [
        (random_batches(), 0, ValueError, "microbatch_size must be at least 1, got 0"),
        (random_batches(), 2.0, TypeError, r"microbatch_size must be an integer .* got 2\.0"),
        (BatchSampler(SequentialSampler(LABELS), 4, True), 2, TypeError, "batch_sampler must be .* got .*BatchSampler"),
    ],
)
def test_microbatches_that_cannot_be_cut_are_refused(batch_sampler, size, error, message):
    with pytest.raises(error, match=message):
        MicrobatchSampler(batch_sampler, size)
