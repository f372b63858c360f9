"""The Triton kernels of the softmax: on a GPU, or as Triton interprets them, against PyTorch in float64."""

import pytest
import torch

CASES = [(torch.float32, 1, 7), (torch.float32, 5, 5000), (torch.bfloat16, 4, 9001), (torch.float16, 3, 4096)]


def test_log_softmax_its_agreement_and_its_gradient():
    pytest.importorskip("triton")
    from bpo.policy import kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    for dtype, rows, vocabulary in CASES:
        logits = 5 * torch.randn(rows, vocabulary, generator=generator)
        logits[-1, 3] = 80.0  # one token has it all
        if rows > 2:
            logits[1, ::2] = float("-inf")
            logits[2] -= 3e4
        targets = torch.randint(0, vocabulary, (rows,), generator=generator) | 1
        upstream = torch.randn(rows, generator=generator)
        # Rows of a wider matrix, as a slice of logits has them.
        given = torch.zeros(rows, vocabulary + 5).to(device, dtype)[:, :vocabulary].copy_(logits.to(dtype))
        exact = given.cpu().double()
        pi = exact.softmax(dim=1)
        logps, normalizers, agreements = (tensor.cpu().double() for tensor in kernels.score(given, targets.to(device)))
        torch.testing.assert_close(normalizers, exact.logsumexp(dim=1), rtol=1e-6, atol=1e-5)
        wanted = exact.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(logps, wanted, rtol=1e-6, atol=4e-3 if rows > 2 else 1e-5)
        torch.testing.assert_close(agreements, pi.square().sum(dim=1).log(), rtol=1e-5, atol=1e-5)
        found = kernels.differentiate(given, targets.to(device), normalizers.float().to(device), upstream.to(device))
        assert found.dtype == dtype
        beyond = torch.full_like(targets, vocabulary)
        assert kernels.score(given, beyond.to(device))[0].isnan().all()
        one_hot = torch.zeros_like(pi).scatter_(1, targets[:, None], 1.0)
        step = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
        wanted = (one_hot - pi) * upstream[:, None].double()
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=step, atol=4e-3 if rows > 2 else 1e-6)
