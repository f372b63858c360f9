"""Fingerprints of gradients."""

import torch

from bpo.sketching.fingerprint import fingerprint


def test_fingerprints_are_linear_and_as_long_as_gradients():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 64, 65, 1 << 16, 200_000):
        one, other = torch.randn(2, 3, size, generator=generator)
        torch.testing.assert_close(
            fingerprint(one + 2 * other), fingerprint(one) + 2 * fingerprint(other), rtol=1e-4, atol=1e-2
        )
        ratio = fingerprint(one).norm(dim=1) / one.norm(dim=1)
        assert (ratio - 1).abs().max() < (1e-5 if size <= 64 else 0.35)
    # Blocks that cancel one another where they lie over one another do not here.
    block = torch.randn(1, 1 << 16, generator=generator)
    assert fingerprint(torch.cat([block, -block], dim=1)).norm() > 0.5 * block.norm()
