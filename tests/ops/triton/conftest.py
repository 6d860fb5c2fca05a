"""Shared by the kernels' tests."""

import pytest
import torch


@pytest.fixture
def nan_memory(monkeypatch):
    """Fresh memory holds NaN, so that whatever a kernel leaves out shows."""
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", filled)
