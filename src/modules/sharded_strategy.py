"""Lightning's strategy of `trainer=fsdp`: as `SummedGradients`, with the weights of the trained model sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from src.models.sharding import collect, is_sharded, shard, without_weights
from src.utils.distributed import rank, sharded_like, whole, world_size
from src.utils.launch import SummedGradients


class ShardedLayers(SummedGradients):
    """Each rank keeps a shard of base, adapters, gradients and optimizer states (`src.models.sharding`).

    Lightning restores the weights of a checkpoint before they are sharded. Checkpoints hold whole tensors, so another
    number of ranks, or one process, can resume from them.
    """

    shell: nn.Module | None = None  # of the model, for `collected`

    def setup(self, trainer: Trainer) -> None:
        """Shard once, then make the optimizers of the shards; the first rank's weights are sent while sharding."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        if world_size() > 1 and not is_sharded(self._net):
            self.shell = shard(self._net, self.root_device)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Within the block the module of rank 0 has its whole model, on the CPU, and the others must not use theirs."""
        module, net = self.lightning_module, self._net
        assert module is not None
        if self.shell is None:  # one process
            yield
            return
        collect(net, self.shell)
        setattr(module, self._name, self.shell)
        try:
            yield
        finally:
            setattr(module, self._name, net)
            self.shell = without_weights(self.shell)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained tensors, whole, on rank 0."""
        assert self.lightning_module is not None
        named = self.lightning_module.named_parameters()
        return {name: kept for name, p in named if p.requires_grad and (kept := _on_first_rank(p.detach())) is not None}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer with whole tensors, on rank 0."""
        content = super().optimizer_state(optimizer)
        state = {i: {k: _on_first_rank(v) for k, v in own.items()} for i, own in content["state"].items()}
        return content | {"state": state}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its shard of the whole tensors."""
        for optimizer, content in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                i: {k: sharded_like(v, parameters[i]) if v.shape == parameters[i].shape else v for k, v in own.items()}
                for i, own in content["state"].items()
            }
            optimizer.load_state_dict(content | {"state": state})

    def teardown(self) -> None:
        """Leave the shards where they are: `Strategy.teardown` would move them to the CPU."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    @property
    def _name(self) -> str:
        """The attribute of the module that holds what is trained."""
        return "roles" if hasattr(self.lightning_module, "roles") else "net"

    @property
    def _net(self) -> nn.Module:
        net: nn.Module = getattr(self.lightning_module, self._name)
        return net


def _on_first_rank(x: Tensor) -> Tensor | None:
    """A tensor gathered on rank 0, on the CPU; None on the others."""
    full = whole(x)
    return full.cpu() if rank() == 0 else None
