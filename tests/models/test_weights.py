"""Numbers of parameters, put aside and put back."""

from __future__ import annotations

import torch
from torch import nn

from src.models.weights import restore, snapshot


def test_what_was_put_aside_is_untouched_and_comes_back_in_place() -> None:
    layer = nn.Linear(3, 2)
    parameters, places = list(layer.parameters()), [p.data_ptr() for p in layer.parameters()]
    before = snapshot(parameters)
    assert not any(copy.requires_grad for copy in before)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 1
        assert not any(torch.equal(copy, p) for copy, p in zip(before, parameters, strict=True))
        restore(before, parameters)
    assert all(torch.equal(copy, p) for copy, p in zip(before, parameters, strict=True))
    assert [p.data_ptr() for p in layer.parameters()] == places
