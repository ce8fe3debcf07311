r"""A draw belongs to its name: the same name gives the same numbers, another name gives others."""

import numpy as np
import pytest
import torch

from ddpm.tools.seeding import generator, seed_of


def test_the_seed_of_a_name_never_changes():
    r"""Pictures and runs that people have made must come out again, in every process and on every machine."""
    assert seed_of(0, 3) == 2644259177913605009


def test_ten_thousand_neighbouring_names_have_ten_thousand_seeds():
    names = [(seed, picture) for seed in range(100) for picture in range(100)]
    assert len({seed_of(*name) for name in names}) == len(names)


def test_the_parts_of_a_name_do_not_run_together():
    assert seed_of(1, 23) != seed_of(12, 3) != seed_of(123)
    assert seed_of("1") != seed_of(1)


def test_seeds_fit_into_63_bits_and_use_the_top_one():
    seeds = [seed_of(i) for i in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) >= 2**62  # fails by chance once in 2^200


def test_a_generator_starts_where_its_name_says_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first, again = (torch.randn(5, generator=generator(0, "vae", 1)) for _ in range(2))
    other = torch.randn(5, generator=generator(0, "vae", 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_of_neighbouring_names_are_uncorrelated():
    r"""The correlation of n independent pairs has standard deviation 1 / sqrt(n); five of them are allowed."""
    n = 20_000
    x, y = (torch.randn(n, generator=generator(0, picture)) for picture in (0, 1))
    assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1].item()) < 5 * n**-0.5


def test_equal_whole_numbers_of_any_type_name_one_stream_and_others_are_refused():
    assert seed_of(np.int64(3), "unet") == seed_of(3, "unet") == seed_of(np.uint8(3), "unet")
    with pytest.raises(TypeError):
        seed_of(0.5)
