import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split

from edgebolt.common.federated.labels import count_samples, find_column, find_labels


class Attributes(Dataset):
    """A dataset whose labels stand in an attribute and whose samples must not be read."""

    def __init__(self, samples=4, **attributes):
        self.samples = samples
        vars(self).update(attributes)

    def __len__(self):
        return self.samples

    def __getitem__(self, number):
        raise AssertionError("a sample was read although the labels stand in an attribute")


class Samples(Dataset):
    """A dataset that shows its labels only in its samples, and counts how often it is read."""

    def __init__(self, samples):
        self.samples = samples
        self.reads = 0

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, number):
        self.reads += 1
        torch.rand(1)  # a random transform
        np.random.rand()
        return self.samples[number]


class Table(Dataset):
    """Columns by name and rows by number, as Hugging Face datasets have them."""

    def __init__(self, **columns):
        self.columns = columns
        self.column_names = list(columns)

    def __len__(self):
        return len(self.columns[self.column_names[0]])

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        raise AssertionError("a row was read although the labels stand in a column")


@pytest.mark.parametrize("name", ["targets", "target", "labels", "label", "y"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_attributes(name, kind):
    labels = find_labels(Attributes(**{name: kind([3, 0, 1, 3])}))
    assert labels.dtype == np.int64
    assert labels.tolist() == [3, 0, 1, 3]


def test_targets_come_before_labels():
    assert find_labels(Attributes(labels=[0, 0, 0, 0], targets=[1, 2, 3, 4])).tolist() == [1, 2, 3, 4]


def test_attribute_without_values_is_passed_over():
    assert find_labels(Attributes(targets=None, target="class", labels=lambda: [], y=[0, 1, 0, 1])).tolist() == [
        0,
        1,
        0,
        1,
    ]


def test_columns():
    table = Table(text=["a", "b", "c"], label=[2, 0, 1])
    assert find_labels(table).tolist() == [2, 0, 1]
    assert find_labels(table, "text").tolist() == [0, 1, 2]


def test_tensor_dataset_of_sklearn_arrays():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    dataset = TensorDataset(torch.from_numpy(digits.data), torch.from_numpy(digits.target))
    assert np.array_equal(find_labels(dataset), digits.target)


def test_column_vector_of_labels():
    assert find_labels(TensorDataset(torch.zeros(3, 2), torch.tensor([[2], [0], [1]]))).tolist() == [2, 0, 1]


def test_subset_and_concat_are_looked_through():
    first, second = Attributes(targets=[0, 1, 2, 3]), TensorDataset(torch.zeros(3), torch.tensor([7, 8, 9]))
    both = ConcatDataset([Subset(first, [3, 1]), second])
    assert find_labels(both).tolist() == [3, 1, 7, 8, 9]
    assert find_labels(Subset(Subset(both, torch.tensor([4, 0, 2])), [2, 0])).tolist() == [7, 9]
    assert find_labels(Subset(both, [])).tolist() == []


def test_random_split():
    part, _ = random_split(Attributes(targets=[5, 6, 7, 8]), [2, 2], generator=torch.Generator().manual_seed(0))
    assert find_labels(part).tolist() == [5 + number for number in part.indices]


def test_concat_with_one_part_without_column_reads_the_samples():
    part = Samples([(0.0, 4), (0.0, 5)])
    assert find_labels(ConcatDataset([part, TensorDataset(torch.zeros(1), torch.tensor([6]))])).tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    "samples",
    [
        [(0.5, 2), (0.5, 0)],
        [[0.5, torch.tensor(2)], [0.5, torch.tensor([0])]],
        [(0.5, np.int32(2)), (0.5, np.array([0]))],
        [{"x": 0.5, "label": 2}, {"x": 0.5, "label": 0}],
        [{"x": 0.5, "labels": torch.tensor(2)}, {"x": 0.5, "labels": torch.tensor(0)}],
    ],
)
def test_samples_are_read_once_and_leave_the_generators_alone(samples):
    dataset = Samples(samples)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert find_labels(dataset).tolist() == [2, 0]
    assert dataset.reads == 2
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_subset_reads_only_its_own_samples():
    dataset = Samples([(0.0, number) for number in range(100)])
    assert find_labels(Subset(dataset, [7, 3])).tolist() == [7, 3]
    assert dataset.reads == 2


def test_graphs():
    data = pytest.importorskip("torch_geometric.data")
    graphs = [data.Data(x=torch.zeros(2, 1), y=torch.tensor([label])) for label in (2, 0, 1)]
    assert find_labels(graphs).tolist() == [2, 0, 1]

    class Graphs(data.InMemoryDataset):
        def __init__(self):
            super().__init__(None)
            self.data, self.slices = self.collate(graphs)

    assert find_labels(Graphs()).tolist() == [2, 0, 1]
    assert find_labels(Graphs()[[2, 0]]).tolist() == [1, 2]
    assert find_labels(Subset(Graphs(), [2, 0])).tolist() == [1, 2]
    with pytest.raises(TypeError, match="Tried"):
        find_labels([data.Data(x=torch.zeros(2, 1))])


def test_named_source():
    assert find_labels(Attributes(targets=[0, 0, 0, 0], speaker=[3, 1, 2, 1]), "speaker").tolist() == [3, 1, 2, 1]
    assert find_labels(Samples([{"y": 0, "mood": "sad"}, {"y": 0, "mood": "merry"}]), "mood").tolist() == [1, 0]
    with pytest.raises(TypeError, match=r"attributes and columns mood.*sample 0 has none.*labels=lambda dataset"):
        find_labels(Samples([(0.5, 2)]), "mood")


def test_callable_gets_the_dataset_itself():
    subset = Subset(Attributes(targets=[0, 1, 2, 3]), [1, 2])
    assert find_labels(subset, lambda dataset: [9] * len(dataset) if dataset is subset else None).tolist() == [9, 9]


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["b", "a", "c", "a"], [1, 0, 2, 0]),
        ([-1, 1, 1, -1], [0, 1, 1, 0]),
        ([True, False, True, True], [1, 0, 1, 1]),
        ([10, 3, 3, 10], [10, 3, 3, 10]),
        (np.array(["b", "a", "c", "a"], dtype=object), [1, 0, 2, 0]),
    ],
)
def test_values_become_class_numbers(values, classes):
    assert find_labels(Attributes(targets=values)).tolist() == classes


def test_strings_are_numbered_over_all_parts_together():
    parts = ConcatDataset([Attributes(2, targets=["b", "c"]), Attributes(2, targets=["a", "c"])])
    assert find_labels(parts).tolist() == [1, 2, 0, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 3], "has 3 values, the dataset has 4 samples"),
        (torch.eye(4), r"shape \(4, 4\).*argmax"),
        ([[1], [1, 2], [1], [1]], "different shapes"),
        ([0.5, 1.5, 2.5, 3.5], "floats.*regression"),
        (np.array([1, "a", None, 2], dtype=object), "different types"),
        (np.array(["a", "b", "c", float("nan")], dtype=object), "floats"),
    ],
)
def test_unusable_values(values, message):
    with pytest.raises(ValueError, match=message):
        find_labels(Attributes(targets=values))
    with pytest.raises(ValueError, match=message):
        find_labels(Attributes(), lambda dataset: values)


@pytest.mark.parametrize(
    ("sample", "seen"),
    [
        (torch.zeros(2), "has none of them"),
        ((torch.zeros(2),), "has none of them"),
        ((torch.zeros(2), 0.5), "has a float there"),
        ((torch.zeros(2), torch.zeros(3)), r"has a Tensor of shape \(3,\) there"),
        ((torch.zeros(2), "a sentence"), "has a str there"),
        ({"x": 1}, "has none of them"),
    ],
)
def test_no_labels(sample, seen):
    dataset = Samples([sample] * 3)
    with pytest.raises(TypeError, match=f"No labels found in Samples.*targets, target.*{seen}.*labels=lambda dataset"):
        find_labels(dataset)
    assert dataset.reads == 1


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(3)


class Unsized(Dataset):
    def __getitem__(self, number):
        return number, 0


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), r"not a map-style dataset.*list\(dataset\)"),
        (iter([1, 2]), "not a map-style dataset"),
        (Unsized(), "__len__"),
        (DataLoader(Attributes()), "loader.dataset"),
    ],
)
def test_datasets_without_numbered_samples(dataset, message):
    for function in (count_samples, find_labels):
        with pytest.raises(TypeError, match=message):
            function(dataset)


def test_column_of_any_values():
    dataset = Samples([{"user": "eve"}, {"user": "bob"}])
    assert find_column(dataset, "user").tolist() == ["eve", "bob"]
    assert find_column(dataset, ["x", "y"]).tolist() == ["x", "y"]
    with pytest.raises(ValueError, match="the given sequence has 3 values"):
        find_column(dataset, [1, 2, 3])
