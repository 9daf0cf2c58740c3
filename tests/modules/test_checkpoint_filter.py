"""What of a module goes into a checkpoint, and what must be in one that is read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from src.errors import ModelError
from src.modules.checkpoint_filter import keep_trainable, require_trainable, trainable_names


def module() -> nn.Module:
    """A frozen layer below one that is trained but for its bias."""
    made = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
    made[1].bias.requires_grad_(False)
    return made


def test_trained_tensors_alone_are_kept() -> None:
    made = module()
    checkpoint = {"state_dict": made.state_dict(), "epoch": 3}
    keep_trainable(made, checkpoint)
    assert trainable_names(made) == set(checkpoint["state_dict"]) == {"1.weight"}
    assert checkpoint["epoch"] == 3
    require_trainable(made, checkpoint)


def test_tensors_of_another_shape_are_refused() -> None:
    with pytest.raises(ModelError, match=r"1\.weight is \(1, 3\) in it and \(1, 2\) here"):
        require_trainable(module(), {"state_dict": {"1.weight": torch.zeros(1, 3)}})


@pytest.mark.parametrize(("names", "said"), [
    ([], r"missing \['1.weight'\], unexpected \[\]"),
    (["1.weight", "2.weight"], r"missing \[\], unexpected \['2.weight'\]"),
])  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(names: list[str], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        require_trainable(module(), {"state_dict": dict.fromkeys(names)})
