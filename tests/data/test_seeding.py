import torch

from fastroute.data.seeding import derived_seed, generator, seeded


def test_seeds_depend_on_every_number_and_their_order():
    seeds = {derived_seed(*numbers) for numbers in ((0, 1), (1, 0), (0, 1, 0), (0, 2), (1, 1), (0, 1, 1))}
    assert len(seeds) == 6 and derived_seed(0, 1) == derived_seed(0, 1)
    assert torch.rand(2, generator=generator(3, 4)).tolist() == torch.rand(2, generator=generator(3, 4)).tolist()


def test_seeded_restores_the_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with seeded(5, 6):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(5, 6):
        assert torch.equal(torch.rand(3), inside)
