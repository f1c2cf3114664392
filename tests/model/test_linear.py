"""The fused operators against the plain ones, and what happens where they are not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from embedq.model import linear
from embedq.model.linear import LinearWeights, OneDnnLinear, PlainLinear, onednn_agrees

#: Largest difference relative to the largest output.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _fresh_trial() -> Iterator[None]:
    onednn_agrees.cache_clear()
    yield
    onednn_agrees.cache_clear()


@needs_onednn
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 64, 257])
def test_fused_is_plain(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias, residual = (torch.randn(shape).to(dtype) for shape in ((rows, 96), (56, 96), (56,), (rows, 56)))
    weights = LinearWeights(weight, bias)
    fused, plain = OneDnnLinear(weights), PlainLinear(weights)
    kept = residual.clone()
    for ours, expected in (
        (fused(x), plain(x)),
        (fused.gelu(x), plain.gelu(x)),
        (fused.add(x, residual), plain.add(x, residual)),
    ):
        assert (ours - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    assert torch.equal(residual, kept)


@needs_onednn
def test_bfloat16_is_fused_and_float32_is_not() -> None:
    assert onednn_agrees(torch.bfloat16)
    assert not onednn_agrees(torch.float32)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_a_torch_without_the_operators_does_without(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def gone() -> None:
        raise error("no such operator")

    monkeypatch.setattr(linear, "_operators", gone)
    assert not onednn_agrees(torch.bfloat16)


@needs_onednn
def test_operators_that_mean_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OneDnnLinear, "gelu", lambda self, x: self(x))
    assert not onednn_agrees(torch.bfloat16)
