"""Owners of matrices: all ranks agree, and the largest load is near the mean."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from megakexue.core.muon import newton_schulz
from megakexue.core.owners import assign_owners, largest_flops, newton_schulz_flops


def test_flops_are_torchs() -> None:
    for shape in ((20, 50), (50, 20), (30, 30)):
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.ones(shape))
        assert counter.get_total_flops() == newton_schulz_flops(shape)


def test_the_largest_goes_first_to_who_has_least() -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (4, 4), "b": (8, 4), "c": (4, 8), "d": (9, 9), "e": (4, 4), "f": (4, 4)}
    # costs 64, 128, 128, 729, 64, 64: d alone, then b and c, and the rest where less is
    assert assign_owners(shapes, 3) == {"d": 0, "b": 1, "c": 2, "a": 1, "e": 2, "f": 1}
    assert set(assign_owners(shapes, 1).values()) == {0}
    assert set(assign_owners(shapes, 100).values()) == set(range(6))
    assert assign_owners({}, 2) == {} and largest_flops({}, 2) == 0


def test_layers_are_shared_out_evenly() -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(32):
        shapes |= {f"{i}.wq": (4096, 4096), f"{i}.wk": (1024, 4096), f"{i}.wv": (1024, 4096), f"{i}.wo": (4096, 4096)}
        shapes |= {f"{i}.w_gate": (11008, 4096), f"{i}.w_up": (11008, 4096), f"{i}.w_down": (4096, 11008)}
    total = largest_flops(shapes, 1)
    for n_ranks in (2, 3, 8, 24, 64):
        assert 1 <= largest_flops(shapes, n_ranks) * n_ranks / total < 1.06, n_ranks
