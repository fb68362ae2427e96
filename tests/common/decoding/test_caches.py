import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")

from edgebolt.common.decoding import cache_bytes, cache_length, crop, keep, new_cache  # noqa: E402


def filled(length, layers=3, dtype=torch.float32):
    """A cache of random rows, and the rows."""
    generator = torch.Generator().manual_seed(length)
    rows = torch.randn(layers, 2, 1, 2, length, 4, generator=generator).to(dtype)
    cache = new_cache()
    for layer, (keys, values) in enumerate(rows):
        cache.update(keys, values, layer)
    return cache, rows


def held(cache):
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])


class FakeLayer:
    """A cache layer whose ``crop`` means what it meant in one version of transformers."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def get_seq_length(self):
        return self.keys.shape[2]

    def cut(self, end):
        self.keys, self.values = self.keys[:, :, :end], self.values[:, :, :end]


class LayerOf513(FakeLayer):
    """5.0 to 5.13: a number below 0 is how many go, any other how many stay; 0 deletes all."""

    def crop(self, number):
        self.cut(self.get_seq_length() + number if number < 0 else number)


class LayerOf517(FakeLayer):
    """5.17: 0 does nothing, and more than there are go at most."""

    def crop(self, number):
        if number > 0:
            self.cut(number)
        elif number < 0:
            self.cut(max(self.get_seq_length() + number, 0))


class LayerOf523(LayerOf517):
    """5.23: what stays is no longer taken."""

    def crop(self, number):
        if number > 0:
            raise ValueError(f"Calling `crop` with a positive value (`{number}`) is not supported.")
        super().crop(number)


class FakeCache:
    def __init__(self, kind, rows):
        self.layers, self.asked = [kind(*each) for each in rows], []

    def get_seq_length(self):
        return self.layers[0].get_seq_length()

    def crop(self, number):
        self.asked.append(number)
        for layer in self.layers:
            layer.crop(number)


@pytest.mark.parametrize("length", range(8))
def test_crop_keeps_the_first_positions_of_every_layer(length):
    cache, rows = filled(7)
    crop(cache, length)
    assert cache_length(cache) == length
    assert torch.equal(held(cache), rows[..., :length, :])


@pytest.mark.parametrize("kind", [LayerOf513, LayerOf517, LayerOf523])
@pytest.mark.parametrize("length", range(6))
def test_crop_is_right_in_every_version_of_transformers(kind, length):
    _, rows = filled(5)
    cache = FakeCache(kind, rows)
    crop(cache, length)
    assert torch.equal(held(cache), rows[..., :length, :])
    assert all(number < 0 for number in cache.asked)


@pytest.mark.parametrize("kind", [LayerOf513, LayerOf517, LayerOf523])
def test_the_fakes_differ_where_the_versions_do(kind):
    _, rows = filled(5)
    nothing, kept = FakeCache(kind, rows), FakeCache(kind, rows)
    nothing.crop(0)
    assert nothing.get_seq_length() == (0 if kind is LayerOf513 else 5)
    if kind is LayerOf523:
        with pytest.raises(ValueError, match="positive value"):
            kept.crop(2)
    else:
        kept.crop(2)
        assert kept.get_seq_length() == 2


def test_the_installed_version_is_like_one_of_the_fakes():
    cache, rows = filled(5)
    cache.crop(-2)
    assert torch.equal(held(cache), rows[..., :3, :])


def test_an_empty_cache_can_be_cut_to_nothing():
    cache = new_cache()
    crop(cache, 0)
    keep(cache, torch.tensor([], dtype=torch.long))
    assert cache_length(cache) == 0 and cache_bytes(cache) == 0


@pytest.mark.parametrize("length", [-1, -7, 6, 70])
def test_what_is_not_there_cannot_stay(length):
    cache, rows = filled(5)
    with pytest.raises(ValueError, match=rf"length={length}: the cache has 5 positions"):
        crop(cache, length)
    assert torch.equal(held(cache), rows)


@pytest.mark.parametrize("cut", [lambda cache: crop(cache, 2), lambda cache: keep(cache, torch.tensor([0, 1]))])
def test_a_cut_cache_goes_on_as_if_nothing_had_been_cut(cut):
    cache, rows = filled(5)
    cut(cache)
    _, more = filled(4)
    for layer, (keys, values) in enumerate(more):
        cache.update(keys, values, layer)
    assert torch.equal(held(cache), torch.cat([rows[..., :2, :], more], -2))


def test_a_cache_goes_on_after_it_was_emptied():
    for empty in (lambda cache: crop(cache, 0), lambda cache: keep(cache, torch.tensor([], dtype=torch.long))):
        cache, _ = filled(5)
        empty(cache)
        assert cache_length(cache) == 0
        _, more = filled(4)
        for layer, (keys, values) in enumerate(more):
            cache.update(keys, values, layer)
        assert torch.equal(held(cache), more)


@pytest.mark.parametrize("seed", range(5))
def test_keep_takes_positions_of_every_layer_in_the_order_given(seed):
    cache, rows = filled(9)
    chosen = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[: seed + 2]
    keep(cache, chosen)
    assert cache_length(cache) == seed + 2
    assert torch.equal(held(cache), rows[..., chosen.tolist(), :])


@pytest.mark.parametrize("positions", [[5], [0, -1], [0, 1, 17]])
def test_keep_refuses_positions_that_are_not_there(positions):
    cache, rows = filled(5)
    with pytest.raises(ValueError, match="the cache has 5 positions, 0 to 4"):
        keep(cache, torch.tensor(positions))
    assert torch.equal(held(cache), rows)


def test_layers_without_rows_stay_without():
    cache = new_cache()
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    cache.layers.append(type(cache.layers[0])())  # one that no row has reached yet
    keep(cache, torch.tensor([1]))
    assert cache_length(cache) == 1 and cache_bytes(cache) == 2 * 2 * 4


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 8), (torch.bfloat16, 2)])
def test_bytes_are_those_of_keys_and_values_in_all_layers(dtype, size):
    cache, rows = filled(6, dtype=dtype)
    assert cache_bytes(cache) == rows.numel() * size


@pytest.mark.parametrize("length", [0, 2])
def test_crop_holds_the_memory_until_the_next_row_and_keep_lets_it_go(length):
    cache, rows = filled(6)
    crop(cache, length)
    assert cache_bytes(cache) == rows.numel() * 4
    cache, _ = filled(6)
    keep(cache, torch.arange(length))
    assert cache_bytes(cache) == rows.numel() * 4 * length // 6
    cache, _ = filled(6)
    crop(cache, length)
    for layer, (keys, values) in enumerate(rows[..., :1, :]):
        cache.update(keys, values, layer)
    assert cache_bytes(cache) == rows.numel() * 4 * (length + 1) // 6


def test_a_new_cache_forgets_nothing_beyond_a_window(decoder):
    model, text = decoder("mistral", sliding_window=4), torch.arange(12)[None]
    kept, windowed = new_cache(), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        for cache in (kept, windowed):
            model(text, past_key_values=cache)
    assert kept.layers[0].keys.shape[2] == 12 > windowed.layers[0].keys.shape[2]
    crop(kept, 5)
    assert {layer.keys.shape[2] for layer in kept.layers} == {5}
