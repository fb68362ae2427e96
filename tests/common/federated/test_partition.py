import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from edgebolt.common.federated.client_index import ClientIndex
from edgebolt.common.federated.labels import find_labels
from edgebolt.common.federated.partition import IID, ByKey, Dirichlet, Partition, Shards, Sizes

SPLITS = ("train", "val", "test")


def dataset_of(samples, classes=10):
    return TensorDataset(torch.arange(samples), torch.arange(samples) % classes)


def same(one, other):
    return np.array_equal(one.index, other.index) and np.array_equal(one.offsets, other.offsets)


class Given(Partition):
    """Assigns as it is told, to see what the base class does with it."""

    def __init__(self, owner, clients, **arguments):
        super().__init__(clients, **arguments)
        self.owner = np.asarray(owner)

    def assign(self, dataset):
        return self.owner


def partitions(clients, seed=0, **arguments):
    return [
        IID(clients, seed=seed, **arguments),
        Dirichlet(clients, alpha=0.3, seed=seed, **arguments),
        Shards(clients, shards_per_client=2, seed=seed, **arguments),
        Sizes([1 / clients] * clients, seed=seed, **arguments),
    ]


@settings(max_examples=60, deadline=None)
@given(
    clients=st.integers(1, 12),
    per_client=st.integers(2, 9),
    more=st.integers(0, 11),
    classes=st.integers(1, 6),
    alpha=st.floats(1e-3, 100),
    seed=st.integers(0, 2**32),
    val=st.sampled_from([0, 0.1, 0.29, 0.4]),
    test=st.sampled_from([0, 0.2, 0.3, 0.5]),
    min_samples=st.integers(0, 2),
)
def test_every_sample_in_exactly_one_part(clients, per_client, more, classes, alpha, seed, val, test, min_samples):
    samples = clients * per_client + more
    dataset = dataset_of(samples, classes)
    arguments = {"seed": seed, "val": val, "test": test, "min_samples": min_samples}
    for partition in [*partitions(clients, **arguments), Dirichlet(clients, alpha, **arguments)]:
        try:
            index = partition.split(dataset)
        except ValueError as error:  # only a real shortage may be refused
            sizes = np.arange(samples // clients + 1)
            left = sizes - np.floor(sizes * val + 1e-9) - np.floor(sizes * test + 1e-9)
            assert "min_samples" in str(error) and left.max() < min_samples
            continue
        parts = [index.indices(client, split) for client in range(clients) for split in SPLITS]
        assert len(index) == len(partition) == clients
        assert sorted(np.concatenate(parts).tolist()) == list(range(samples))
        assert all((np.diff(part) > 0).all() for part in parts)
        assert index.sizes().min() >= min_samples
        sizes = index.sizes("all")
        assert np.array_equal(index.sizes("test"), np.floor(sizes * test + 1e-9))
        assert np.array_equal(
            index.sizes("val"), np.minimum(np.floor(sizes * val + 1e-9), sizes - index.sizes("test") - min_samples)
        )
        assert np.array_equal(index.sizes(), sizes - index.sizes("val") - index.sizes("test"))


@pytest.mark.parametrize("number", range(4))
def test_same_seed_same_partition_whatever_was_drawn_before(number):
    dataset = dataset_of(500)
    partition = partitions(20, seed=3, val=0.2, test=0.1)[number]
    first = partition.split(dataset)
    np.random.seed(1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert same(first, partition.split(dataset))
    assert same(first, partitions(20, seed=3, val=0.2, test=0.1)[number].split(dataset))
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(first, partitions(20, seed=4, val=0.2, test=0.1)[number].split(dataset))


def one_at_a_time(sizes, least):
    """What the docstring promises, as slowly as it says it."""
    sizes = np.array(sizes)
    while sizes.min() < least:
        sizes[sizes.argmax()] -= 1
        sizes[np.flatnonzero(sizes < least)[0]] += 1
    return sizes


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12), min_samples=st.integers(0, 8), seed=st.integers(0, 9)
)
def test_minimum_takes_from_the_largest_only(sizes, min_samples, seed):
    owner = np.repeat(np.arange(len(sizes)), sizes)
    owner = np.random.default_rng(seed).permutation(owner)
    partition = Given(owner, len(sizes), min_samples=min_samples, seed=seed)
    dataset = dataset_of(len(owner))
    if sum(sizes) < min_samples * len(sizes):
        with pytest.raises(ValueError, match="min_samples"):
            partition.split(dataset)
        return
    index = partition.split(dataset)
    after = index.sizes()
    assert after.tolist() == one_at_a_time(sizes, min_samples).tolist()
    for client, size in enumerate(sizes):
        before, now = set(np.flatnonzero(owner == client)), set(index.indices(client).tolist())
        assert now <= before or before <= now
        if after[client] < size:
            assert after[client] >= max(after) - 1  # a giver stays among the largest


def test_minimum_counts_training_samples():
    owner = np.repeat(np.arange(4), [1, 2, 3, 94])
    index = Given(owner, 4, min_samples=8, val=0.1, test=0.1).split(dataset_of(100))
    assert index.sizes().min() >= 8
    assert index.sizes("all").sum() == 100
    assert index.sizes("all")[:3].tolist() == [8, 8, 8]


def test_minimum_where_two_floors_tick_together():
    # with val = test = 0.3 three samples leave 3 for training, but four leave 2: validation gives way
    for size, parts in {3: [3, 0, 0], 4: [3, 0, 1], 5: [3, 1, 1], 6: [4, 1, 1], 7: [3, 2, 2]}.items():
        owner = np.repeat([0, 1], [size, 100 - size])
        index = Given(owner, 2, min_samples=3, val=0.3, test=0.3).split(dataset_of(100))
        assert [index.sizes(split)[0] for split in SPLITS] == parts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clients": 11}, r"11 clients with min_samples=1 need 11 samples.*are 10.*or at most 10 clients\."),
        (
            {"clients": 3, "min_samples": 4},
            "3 clients with min_samples=4 need 12 samples.*3 a client.*at most 2 clients",
        ),
        ({"clients": 1, "min_samples": 11}, r"are 10, 10 a client: take a smaller min_samples\.$"),
        ({"clients": 2, "min_samples": 5, "val": 0.2}, r"6 in all, with val=0\.2.*need 12 samples"),
    ],
)
def test_impossible_minimum(arguments, message):
    with pytest.raises(ValueError, match=message):
        IID(**arguments).split(dataset_of(10))


def test_empty_clients_when_allowed():
    assert sorted(IID(12, min_samples=0).split(dataset_of(10)).sizes().tolist()) == [0, 0] + [1] * 10
    assert IID(3, min_samples=0, val=0.5).split(dataset_of(0)).sizes("all").tolist() == [0, 0, 0]
    assert Dirichlet(3, min_samples=0).split(dataset_of(0)).sizes().tolist() == [0, 0, 0]


def test_held_out_draw_depends_on_the_clients_own_samples_only():
    dataset = dataset_of(90)
    owner = np.random.default_rng(0).integers(0, 3, 90)
    others = np.where(owner == 1, 1, 2 - owner)  # clients 0 and 2 exchanged
    one = Given(owner, 3, val=0.2, test=0.2).split(dataset)
    two = Given(others, 3, val=0.2, test=0.2).split(dataset)
    for split in SPLITS:
        assert np.array_equal(one.indices(1, split), two.indices(1, split))
        assert np.array_equal(one.indices(0, split), two.indices(2, split))
    alone = Given(np.where(owner == 1, 0, -1), 1, val=0.2, test=0.2).split(dataset)  # the others left out
    assert all(np.array_equal(one.indices(1, split), alone.indices(0, split)) for split in SPLITS)
    assert not same(one, Given(owner, 3, val=0.2, test=0.2, seed=1).split(dataset))
    for client in range(3):  # more for validation leaves the test part as it is
        less = Given(owner, 3, val=0.0, test=0.2).split(dataset)
        assert np.array_equal(one.indices(client, "test"), less.indices(client, "test"))


def test_held_out_samples_are_drawn_without_regard_to_order():
    index = IID(1, test=0.5, val=0.25).split(dataset_of(4000, classes=4000))
    assert index.sizes("test")[0] == 2000 and index.sizes("val")[0] == 1000
    for split in SPLITS:  # uniform numbers 0 ... 3999: mean 2000, deviation of the mean at most 1155 / sqrt(1000) = 37
        assert abs(index.indices(0, split).mean() - 1999.5) < 150


def test_held_out_sizes_are_floors_of_the_exact_product():
    index = IID(1, val=0.29).split(dataset_of(100))  # 0.29 * 100 is 28.999999999999996 in floats
    assert index.sizes("val").tolist() == [29]
    assert IID(1, val=0.29).split(dataset_of(99)).sizes("val").tolist() == [28]


def mean_entropy(partition, dataset):
    counts = partition.split(dataset).label_counts(find_labels(dataset))
    shares = counts / counts.sum(axis=1, keepdims=True)
    return -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=1).mean()


def test_small_alpha_is_more_skewed():
    dataset = dataset_of(20_000)
    entropies = [mean_entropy(Dirichlet(20, alpha=alpha, seed=0), dataset) for alpha in (0.05, 0.5, 5.0, 500.0)]
    assert entropies == sorted(entropies)
    assert entropies[0] < 1.0 < 0.99 * np.log(10) < entropies[-1]


def test_dirichlet_deals_each_class_out_in_dirichlet_shares():
    # Share of a client in a class: mean 1/N, variance (1/N)(1 - 1/N) / (N alpha + 1).
    clients, classes, alpha = 10, 300, 0.5
    dataset = dataset_of(classes * 400, classes)
    counts = Dirichlet(clients, alpha, seed=1, min_samples=0).split(dataset).label_counts(find_labels(dataset))
    assert (counts.sum(axis=0) == 400).all()
    shares = counts / 400
    assert np.allclose(shares.mean(axis=1), 1 / clients, atol=0.03)
    assert shares.var() == pytest.approx(0.1 * 0.9 / (clients * alpha + 1), rel=0.15)


def test_dirichlet_draws_the_samples_of_a_class_at_random():
    index = Dirichlet(2, alpha=100.0, seed=0).split(dataset_of(1000, classes=1))
    for client in range(2):  # not the first or the last half: the mean of some 500 of 0 ... 999 deviates by about 9
        assert abs(index.indices(client).mean() - 499.5) < 60


@pytest.mark.parametrize("alpha", [1e-12, 1e-4, 1e6])
def test_extreme_alpha(alpha):
    index = Dirichlet(50, alpha, min_samples=0).split(dataset_of(1000))
    assert index.sizes().sum() == 1000
    assert ((index.sizes() > 0).sum() <= 10) == (alpha < 1e-3)  # one client a class, or everybody


@settings(max_examples=30, deadline=None)
@given(clients=st.integers(1, 20), shards=st.integers(1, 4), classes=st.integers(1, 10), seed=st.integers(0, 99))
def test_shards_bound_the_labels_of_a_client(clients, shards, classes, seed):
    samples = clients * shards * 5 + 3
    dataset = dataset_of(samples, classes)
    index = Shards(clients, shards_per_client=shards, seed=seed).split(dataset)
    longest, smallest_class = -(-samples // (clients * shards)), samples // classes
    labels_in_a_shard = 2 if longest <= smallest_class else classes
    assert ((index.label_counts(find_labels(dataset)) > 0).sum(axis=1) <= shards * labels_in_a_shard).all()
    assert np.ptp(index.sizes()) <= shards


def test_shards_are_dealt_out_at_random():
    dataset = dataset_of(2000, classes=20)  # a shard holds exactly one label
    owned = []
    for seed in range(5):
        counts = Shards(10, shards_per_client=2, seed=seed).split(dataset).label_counts(find_labels(dataset))
        owned.append({tuple(np.flatnonzero(row)) for row in counts})
    assert all(owned[0] != other for other in owned[1:])
    distances = {high - low for pairs in owned for low, high in pairs}
    assert len(distances) > 5  # dealing in turn would give every client two labels at one distance


def test_too_many_shards():
    with pytest.raises(ValueError, match="60 shards of 50 samples"):
        Shards(20, shards_per_client=3).split(dataset_of(50))


USERS = ["u10", "u2", "u10", "u3", "u2", "u10"]


@pytest.mark.parametrize("key", ["user", USERS, lambda dataset: [sample["user"] for sample in dataset]])
def test_by_key(key):
    dataset = [{"user": user, "label": 0} for user in USERS]
    partition = ByKey(key=key)
    with pytest.raises(RuntimeError, match="known after split"):
        len(partition)
    index = partition.split(dataset)
    assert [index.indices(client).tolist() for client in range(len(partition))] == [[0, 2, 5], [1, 4], [3]]


def test_by_key_leaves_small_clients_out():
    index = ByKey(USERS, min_samples=2).split(dataset_of(6))
    assert [index.indices(client).tolist() for client in range(len(index))] == [[0, 2, 5], [1, 4]]
    with pytest.raises(ValueError, match=r"None of the 3 keys has the 4 samples.*largest has 3"):
        ByKey(USERS, min_samples=4).split(dataset_of(6))


def test_by_key_draws_max_clients():
    keys = np.arange(1000) // 10
    partition = ByKey(keys, max_clients=7, seed=0, test=0.2)
    index = partition.split(dataset_of(1000))
    assert len(partition) == len(index) == 7
    users = [set(keys[index.indices(client, "all")]) for client in range(7)]
    assert all(len(user) == 1 for user in users) and len(set.union(*users)) == 7
    assert index.sizes("all").tolist() == [10] * 7 and index.sizes("test").tolist() == [2] * 7
    assert not same(index, ByKey(keys, max_clients=7, seed=1, test=0.2).split(dataset_of(1000)))
    assert len(ByKey(keys, max_clients=200).split(dataset_of(1000))) == 100


def test_by_key_orders_numbers_as_text():
    index = ByKey([10, 2, 10]).split(dataset_of(3))
    assert index.indices(0).tolist() == [0, 2]


def test_sizes():
    index = Sizes([5, 1, 3], seed=0).split(dataset_of(20))
    assert index.sizes().tolist() == [5, 1, 3]
    assert len(set(index.index.tolist())) == 9
    assert Sizes([0.5, 0.25, 0.25]).split(dataset_of(10)).sizes().tolist() == [
        5,
        3,
        2,
    ]  # largest remainder, first of equals
    assert Sizes(np.full(3, 1 / 3)).split(dataset_of(10)).sizes().tolist() == [4, 3, 3]
    assert Sizes([0.999, 0.001], min_samples=2).split(dataset_of(10)).sizes().tolist() == [8, 2]
    assert Sizes([0, 4], min_samples=0).split(dataset_of(10)).sizes().tolist() == [0, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: IID(0), "clients must be at least 1, got 0"),
        (lambda: IID(2, min_samples=-1), "min_samples must be 0"),
        (lambda: IID(2, val=1.0), "got val=1.0"),
        (lambda: IID(2, val=0.5, test=0.5), "leave some for training"),
        (lambda: IID(2, test=-0.1), "got val=0.0, test=-0.1"),
        (lambda: Dirichlet(2, alpha=0), "alpha must be positive and finite, got 0"),
        (lambda: Dirichlet(2, alpha=float("nan")), "alpha must be positive"),
        (lambda: Dirichlet(2, alpha=float("inf")), "use IID"),
        (lambda: Shards(2, shards_per_client=0), "shards_per_client must be at least 1"),
        (lambda: ByKey("user", max_clients=0), "max_clients must be at least 1"),
        (lambda: Sizes([]), "clients must be at least 1"),
        (lambda: Sizes([0.5, 0.4]), "sum to 1, these sum to 0.9"),
        (lambda: Sizes([3, -1]), "numbers >= 0"),
        (lambda: Sizes([[1, 2], [3, 4]]), "flat list"),
        (lambda: Sizes([5, 0]), "0 samples can not keep min_samples=1"),
        (lambda: Sizes([5, 6]).split(dataset_of(10)), "sum to 11, but the dataset has 10 samples"),
        (lambda: Given([0, 1, 2], 2).split(dataset_of(3)), "assign must return clients"),
        (lambda: Given([0, 1], 2).split(dataset_of(3)), "assign must return clients"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Stream(IterableDataset):
    def __iter__(self):
        yield 0, 0


@pytest.mark.parametrize("dataset", [Stream(), DataLoader(dataset_of(4)), iter([1])])
@pytest.mark.parametrize("partition", [*partitions(2), ByKey([0, 1])])
def test_datasets_without_numbered_samples(partition, dataset):
    with pytest.raises(TypeError, match=r"map-style|loader\.dataset"):
        partition.split(dataset)


def test_labels_argument():
    with pytest.raises(TypeError, match="labels=lambda"):
        IID(2, labels=[0, 1])
    dataset = dataset_of(100, classes=2)
    quarters = Shards(4, 1, labels=lambda data: np.arange(len(data)) // 25).split(dataset)
    assert {tuple(quarters.indices(client) // 25) for client in range(4)} == {(quarter,) * 25 for quarter in range(4)}
    with pytest.raises(TypeError, match="No labels found"):
        Dirichlet(2).split([torch.zeros(2)] * 4)


def test_index_serves_a_data_loader():
    dataset = dataset_of(40)
    index = IID(4, test=0.25).split(dataset)
    batches = DataLoader(Subset(dataset, index.indices(2, "test")), batch_size=2)
    assert torch.cat([x for x, _ in batches]).tolist() == index.indices(2, "test").tolist()


def test_index_is_read_only():
    index = IID(2).split(dataset_of(10))
    with pytest.raises(ValueError, match="read-only"):
        index.indices(0)[0] = 3
    with pytest.raises(AttributeError):
        index.index = np.zeros(3)


def test_label_counts():
    labels = np.array([0, 2, 2, 0, 1, 2])
    index = ClientIndex(index=np.array([0, 1, 2, 5, 4, 3]), offsets=np.array([0, 2, 3, 3, 4, 4, 6]))
    assert index.label_counts(labels).tolist() == [[1, 0, 1], [0, 0, 1]]
    assert index.label_counts(labels, "val").tolist() == [[0, 0, 1], [0, 0, 0]]
    assert index.label_counts(labels, "test").tolist() == [[0, 0, 0], [1, 1, 0]]
    assert index.label_counts(labels, "all").tolist() == [[1, 0, 2], [1, 1, 1]]
    with pytest.raises(ValueError, match="There are 5 labels, but the clients hold sample 5"):
        index.label_counts(labels[:5])
    for bad in (labels - 1, labels * 1.0, labels[:, None]):
        with pytest.raises(ValueError, match="class numbers from 0 on"):
            index.label_counts(bad)


@pytest.mark.parametrize(
    ("index", "offsets", "message"),
    [
        ([0, 1], [0, 1, 2], "3 \\* clients"),
        ([[0, 1]], [0, 1, 1, 2], "must be \\[samples\\]"),
        ([0, 1], [0, 2, 1, 2], "must rise"),
        ([0, 1], [1, 1, 1, 2], "must rise"),
        ([0, 1], [0, 1, 1, 1], "must rise"),
        ([1, 1], [0, 1, 1, 2], "at most once"),
        ([-1, 1], [0, 1, 1, 2], "from 0 on"),
    ],
)
def test_index_checks(index, offsets, message):
    with pytest.raises(ValueError, match=message):
        ClientIndex(np.array(index), np.array(offsets))


def test_index_bounds():
    index = IID(2).split(dataset_of(10))
    for client in (-1, 2):
        with pytest.raises(IndexError, match=f"0 ... 1, got {client}"):
            index.indices(client)
    with pytest.raises(ValueError, match="got 'dev'"):
        index.sizes("dev")


@pytest.mark.parametrize("partition", [Dirichlet(100_000, 0.3, min_samples=3, val=0.1), Shards(100_000, 2, test=0.1)])
def test_hundred_thousand_clients(partition):
    dataset = TensorDataset(torch.zeros(1_000_000, 1), torch.arange(1_000_000) % 10)
    index = partition.split(dataset)
    assert len(index) == 100_000 and index.sizes("all").sum() == 1_000_000
    assert index.sizes().min() >= partition.min_samples
    assert index.label_counts(find_labels(dataset), "all").sum() == 1_000_000


@pytest.mark.parametrize(("clients", "classes"), [(20, 10), (40, 15), (200, 10), (30, 100)])
def test_plot_writes_a_picture(tmp_path, clients, classes):
    pytest.importorskip("matplotlib")
    path = tmp_path / "partition.png"
    figure, ax = Dirichlet(clients, alpha=0.5, seed=0).plot(dataset_of(5000, classes), path=path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert ax.get_xlabel() == "client" and ax.get_figure() is figure
    if clients <= 40 and classes <= 20:
        assert ax.get_ylabel() == "samples"
        assert sum(bar.get_height() for bar in ax.patches) == 5000
    else:
        assert ax.get_ylabel() == "label"
        assert ax.images[0].get_array().shape == (classes, clients)


def test_plot_of_many_clients_shows_some_of_them_at_their_numbers():
    pytest.importorskip("matplotlib")
    dataset = dataset_of(10_000)
    partition = Shards(1000, 2)
    _, ax = partition.plot(dataset)
    image = ax.images[0]
    counts = partition.split(dataset).label_counts(find_labels(dataset))
    assert ax.get_xlabel() == "client (one in 3 shown)"
    assert np.array_equal(image.get_array(), counts[::3].T)
    left, right, _, _ = image.get_extent()
    assert (left, right) == (-1.5, 1000.5)  # columns are centred on clients 0, 3 ... 999


def test_plot_on_given_axes_and_without_pyplot():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots(1, 2)
    drawn, ax = IID(3).plot(dataset_of(30), ax=axes[1])
    assert drawn is figure and ax is axes[1]
    assert len(axes[1].patches) == 30 and not axes[0].patches


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"edgebolt-common\[plot\]"):
        IID(3).plot(dataset_of(30))


def test_command_line():
    parser = pytest.importorskip("jsonargparse").ArgumentParser()
    parser.add_subclass_arguments(Partition, "clients")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in 4.49
    module = "edgebolt.common.federated.partition"
    for name, arguments, kind in (
        ("Dirichlet", ["clients=8", "alpha=0.1", "labels=label", "val=0.1"], Dirichlet),
        ("IID", ["clients=8", "seed=3"], IID),
        ("Shards", ["clients=8", "shards_per_client=3"], Shards),
        ("ByKey", ["key=user", "max_clients=3"], ByKey),
        ("Sizes", ["sizes=[0.5, 0.5]"], Sizes),
    ):
        parsed = parser.parse_args(
            [f"--clients={module}.{name}", *(f"--clients.{argument}" for argument in arguments)]
        )
        partition = instantiate(parsed).clients
        assert type(partition) is kind
        for argument in arguments:
            key, value = argument.split("=")
            assert str(getattr(partition, key)) == value


def test_repr_names_the_arguments():
    assert "alpha=0.3" in repr(Dirichlet(4, alpha=0.3)) and "clients=4" in repr(Dirichlet(4))
    assert len(repr(Sizes([1] * 10_000))) < 200
