import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from edgebolt.common.random import derive, stream


def test_the_same_names_give_the_same_stream_in_another_process():
    show = "print(stream(7, 'p', 1, 'a').random(3).tolist(), derive(7, 'p'))"
    code = f"from edgebolt.common.random import derive, stream; {show}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"{stream(7, 'p', 1, 'a').random(3).tolist()} {derive(7, 'p')}"


def test_the_streams_are_fixed_for_ever():
    """Results in the papers' tables rest on these numbers; a change of them must be seen."""
    assert stream(0, "failure", 3, 17, "0", 2).bit_generator.random_raw() == 4357776261703613885
    assert derive(0, "a") == 8087258560930306461


def test_arguments_that_look_alike_give_different_streams():
    names = [
        (0, "p"),
        (1, "p"),
        (-1, "p"),
        (0, "p", 1),
        (0, "p", "1"),
        (0, "p", 1, 2),
        (0, "p", 12),
        (0, "p", 2, 1),
        (0, "p1"),
        (0, "p", "1, 2"),
        (0, "p", "1', '2"),
        (0, "p", "1", "2"),
        (0, "p", 2**64),
        (0, "p", 2**65),
    ]
    assert len({stream(*name).random() for name in names}) == len(names)
    assert len({derive(*name) for name in names}) == len(names)


def test_numpy_ints_name_the_stream_of_their_value():
    assert stream(np.int64(3), "p", np.uint8(5)).random() == stream(3, "p", 5).random()


def test_neighbouring_streams_are_uniform_and_uncorrelated():
    draws = np.array([stream(0, "p", round, client).random(2) for round in range(40) for client in range(100)])
    counts, _ = np.histogram(draws[:, 0], bins=20, range=(0, 1))
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert chi_square < 43.8  # 99.9 % point with 19 degrees of freedom
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.05
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.05


def test_global_generators_stay_where_they_are():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    stream(0, "p").random(10)
    derive(0, "p")
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_derive_makes_63_bit_seeds():
    seeds = [derive(0, "p", i) for i in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # the highest bit is in use
    torch.Generator().manual_seed(max(seeds))


@pytest.mark.parametrize("make", [stream, derive])
@pytest.mark.parametrize(
    "arguments", [("0", "p"), (0.5, "p"), (0, 1), (0, "p", 0.5), (0, "p", None), (0, "p", (1, 2))]
)
def test_other_types_are_refused(make, arguments):
    with pytest.raises(TypeError, match="stream"):
        make(*arguments)
