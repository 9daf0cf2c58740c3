"""Two ranks, each with a shard of every layer, learn what one process with the whole model learns.

Models are in float64, so that what remains is rounding.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, get_constant_schedule

from src.checkpointing.checkpoint import IterationCheckpoint
from src.core.value_losses import ClippedSquaredError
from src.errors import ModelError
from src.models.fingerprint import fingerprint
from src.models.reward_choices import Pretrained, SharedBaseAdapter
from src.models.sharding import is_sharded, shard
from src.modules.reward import RewardModule
from src.modules.sft import SFTModule
from src.modules.sharded_strategy import ShardedLayers
from src.types import Experience
from src.utils.distributed import rank, whole, world_size
from src.utils.nonfinite import FiniteGuard
from tests.modules import test_reward, test_sft
from tests.ranks import WORLD, Ranks
from tests.tiny import (
    EOS,
    FOREIGN_WARNINGS,
    LORA,
    PAD,
    Inject,
    Recorder,
    fit,
    make_maker,
    make_module,
    make_roles,
    model_settings,
    ragged_experience,
    ragged_rollout,
    seeded,
    tokenizer,
    write_lm,
)

pytestmark = [pytest.mark.slow, *FOREIGN_WARNINGS]
close = partial(assert_close, rtol=1e-9, atol=1e-9)
KINDS = {"lora": LORA, "full": None}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pair = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pair
    pair.close()


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2, whose head is its embedding, or a Llama, whose head is a matrix of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tied":
        return write_lm(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=48, tie_word_embeddings=False, initializer_range=0.3,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=EOS,
    )  # fmt: skip
    seeded(lambda: LlamaForCausalLM(config), 0).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def together() -> dict[str, Any]:
    """The Trainer's options for as many processes as there are."""
    return {"devices": world_size(), "strategy": ShardedLayers()} if world_size() > 1 else {"devices": 1}


def roles_at(base: str, lora: Any, **changes: Any) -> Any:
    return make_roles(base, lora, spread=0.1, dtype="float64", fast_cpu=False, **changes)


def wholes(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [whole(parameter.detach()).clone() for parameter in parameters]


class Gradients(Callback):
    """The gradients that every step of every optimizer uses, and whether they are shards."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []
        self.sharded: set[bool] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda o, a, k: self.seen.append(self.of(o.param_groups[0]["params"])))

    def of(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        self.sharded |= {isinstance(parameter, DTensor) for parameter in parameters}
        return wholes([parameter.grad for parameter in parameters if parameter.grad is not None])


def assert_alike(alone: Any, both: list[Any]) -> None:
    """Both ranks say what one process says."""
    assert len(both) == WORLD
    assert [one.pop("sharded", {True}) for one in both] == [{True}] * WORLD
    alone.pop("sharded", None)
    for one in both:
        close(one, alone)
    assert_close(both[0], both[1], rtol=0, atol=0)


def learn(folder: Path, base: str, lora: Any, checkpointing: bool, max_grad_norm: float) -> dict[str, Any]:
    """Gradients of every step, logged means and final weights of one iteration on a ragged batch of 7 rows.

    Minibatches of 3, 3 and 1 rows in micro-batches of 2: ranks have unequally many, and in the last one has none.
    """
    roles = roles_at(base, lora, gradient_checkpointing=checkpointing)
    rollout = ragged_rollout(rows=7)
    with torch.no_grad():
        logprobs, values = roles.distribution(rollout, 1.0).logprobs(), roles.values(rollout)
    noise = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1), dtype=logprobs.dtype)
    experience = ragged_experience(rollout, logprobs + 0.2 * noise, values + 0.2 * noise)
    rows = ragged_rollout(rows=7, seed=4)
    text = {"ids": rows.response_ids, "mask": rows.response_mask}
    gradients = Gradients()
    module = make_module(
        roles, minibatch_size=3, micro_batch_size=2, entropy_coef=0.1, ptx_coef=0.3, batch_size=7,
        max_grad_norm=max_grad_norm, value_loss=ClippedSquaredError(5.0),
    )  # fmt: skip
    recorder, _ = fit(module, folder, iterations=1, callbacks=(Inject(experience, text), gradients), **together())
    weights = wholes([*roles.policy_parameters(), *roles.critic_parameters()])
    return {
        "gradients": gradients.seen, "logged": recorder.by_step(), "weights": weights, "sharded": gradients.sharded,
        "frozen": [fingerprint(roles, frozen_only=True)] == [module.frozen_fingerprint],
    }  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_shards_are_those_of_the_whole(
    ranks: Ranks, base: str, tmp_path: Path, kind: str, checkpointing: bool
) -> None:
    """Checklist 48. Policy, entropy, language-model and value loss; the norm that clips is over all shards."""
    arguments = tmp_path, base, KINDS[kind], checkpointing, 0.5
    alone = learn(*arguments)
    assert len(alone["gradients"]) == 12  # 2 epochs of 3 minibatches, 2 optimizers
    assert alone["logged"][1]["policy/grad_norm"] > 0.5  # some are clipped
    assert all(any(gradient.abs().max() > 1e-4 for gradient in step) for step in alone["gradients"])
    assert_alike(alone, ranks(learn, *arguments))


def sft(folder: Path, base: str, lora: Any) -> dict[str, Any]:
    """Two steps on texts of several lengths, and the held-out nats: 6 texts, 4 at a time."""
    module = SFTModule(
        model_settings(base, fast_cpu=False), lora, tokenizer(), optimizer=partial(torch.optim.SGD, lr=0.1),
        lr_schedule=get_constant_schedule, max_grad_norm=0.5, seed=1,
    ).double()  # fmt: skip
    logged = test_sft.run(module, folder, steps=2, **together()).by_step()
    test_sft.run(module, folder, "test", **together())
    return {"logged": logged, "weights": wholes(list(module.net.parameters())), "nats": module.test_rows}


@pytest.mark.parametrize("kind", KINDS)
def test_sft_of_shards_is_that_of_the_whole(ranks: Ranks, base: str, tmp_path: Path, kind: str) -> None:
    """Checklist 48. SGD: the weights after two steps hold both gradients."""
    arguments = tmp_path, base, KINDS[kind]
    alone = sft(*arguments)
    assert len(alone["nats"]) == 6
    assert_alike(alone, ranks(sft, *arguments))


def reward_model(folder: Path, base: str, kind: str) -> dict[str, Any]:
    """A step with every term of the loss, and what is measured on held-out pairs."""
    choice = Pretrained(base, None, False)
    if kind == "lora":
        choice = SharedBaseAdapter(model_settings(base, fast_cpu=False), LORA)
    module = RewardModule(
        choice, tokenizer(), min_gap=0.5, gap_edges=[0.0, 0.5, 1.0], margin_coef=0.5, center_coef=0.1, lm_coef=0.3,
        optimizer=partial(torch.optim.SGD, lr=0.1), lr_schedule=get_constant_schedule, max_grad_norm=0.5, seed=1,
    ).double()  # fmt: skip
    recorder, data = Recorder(), test_reward.data(4, lm_coef=0.3)
    trainer = test_reward.trainer(folder, recorder, **together())
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    figures = {name: figure.value for name, figure in module.result()["reward_model"].items()}
    return {"logged": recorder.by_step(), "weights": wholes(list(module.net.parameters())), "figures": figures}


@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_stage_of_shards_is_that_of_the_whole(ranks: Ranks, base: str, tmp_path: Path, kind: str) -> None:
    """Checklist 48. Pairs and the language-model loss through the head that the classifier lacks."""
    arguments = tmp_path, base, kind
    alone = reward_model(*arguments)
    assert alone["logged"][1]["reward/lm_loss"] > 0
    assert_alike(alone, ranks(reward_model, *arguments))


def whole_run(folder: Path, base: str, lora: Any) -> dict[str, Any]:
    """Two iterations with rollouts, a checkpoint of each, the model saved, and the final comparison."""
    roles = roles_at(base, lora)
    module = make_module(roles)
    own = folder / str(world_size())
    recorder, trainer = fit(
        module, own, maker=make_maker(), callbacks=(IterationCheckpoint(str(own), 1, 2),), **together()
    )
    if world_size() > 1:
        with trainer.strategy.collected():
            if rank() == 0:
                module.save(own)
    else:
        module.save(own)
    trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    figures = {role: {n: f.value for n, f in of.items()} for role, of in module.result().items()}
    logged = {k: {n: x for n, x in row.items() if "seconds" not in n} for k, row in recorder.by_step().items()}
    return {"logged": logged, "figures": figures, "sharded": {is_sharded(roles)} if world_size() > 1 else None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_shards_is_that_of_the_whole(ranks: Ranks, base: str, tmp_path: Path, kind: str) -> None:
    """Checklist 40, 48. Its checkpoints and its model too: whole tensors, of what is trained."""
    arguments = tmp_path, base, KINDS[kind]
    alone = whole_run(*arguments)
    assert_alike(alone, ranks(whole_run, *arguments))
    one, two = tmp_path / "1", tmp_path / str(WORLD)
    kept = [torch.load(path / "iteration-2.ckpt", weights_only=True) for path in (one, two)]
    for part in ("state_dict", "optimizer_states"):
        close(kept[1][part], kept[0][part])
        assert len(kept[0][part]) > 1
    assert kept[0]["frozen"] == kept[1]["frozen"]
    names = {path.relative_to(one) for path in one.rglob("*.safetensors")}
    assert len(names) == (2 if kind == "lora" else 1)
    for name in names:
        close(load_file(two / name), load_file(one / name))


def faulty(folder: Path, base: str) -> dict[str, Any]:
    """A row whose loss is NaN, on the rank that has it: the step is left out on both, and its samples are written."""
    roles, guard = roles_at(base, LORA), FiniteGuard(9, str(folder / f"nonfinite-{world_size()}"))
    rollout = ragged_rollout(rows=8)
    with torch.no_grad():
        experience = ragged_experience(rollout, roles.distribution(rollout, 1.0).logprobs(), roles.values(rollout))
    module = make_module(roles, batch_size=8, micro_batch_size=2)
    module.nonfinite, loss = guard, module.objective.loss

    def poisoned(micro: Experience, weights: Tensor, averages: Any) -> Tensor:
        return loss(micro, weights, averages) * (torch.nan if "p0" in micro.rollout.prompts else 1.0)

    module.objective.loss = poisoned
    with warnings.catch_warnings(action="ignore"):
        recorder, _ = fit(module, folder, iterations=1, callbacks=(Inject(experience),), **together())
    return {"logged": recorder.by_step(), "guard": guard.state_dict()}


def test_a_step_that_is_not_finite_is_left_out_on_every_rank(ranks: Ranks, base: str, tmp_path: Path) -> None:
    """Checklist 48."""
    alone = faulty(tmp_path, base)
    assert alone["guard"]["skipped"] == 2
    assert_alike(alone, ranks(faulty, tmp_path, base))
    one, two = (sorted(path.name for path in (tmp_path / f"nonfinite-{n}").glob("*")) for n in (1, WORLD))
    assert one == two != []


def refused(base: str, kind: str) -> str:
    net: nn.Module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if kind == "shared":
        net[1].weight = net[0].weight
    if kind == "parts":
        net.register_parameter("own", nn.Parameter(torch.zeros(2)))
    if kind == "fast":
        net = make_roles(base, fast_cpu=True)
    with pytest.raises(ModelError) as error:
        shard(net, torch.device("cpu"))
    return str(error.value)


@pytest.mark.parametrize(("kind", "words"), [
    ("fast", "model.fast_cpu=false"), ("shared", "shares weights"), ("parts", r"has weights (own) and parts"),
])  # fmt: skip
def test_weights_that_would_be_read_as_shards_or_untied_are_refused(
    ranks: Ranks, base: str, kind: str, words: str
) -> None:
    """In one sentence, on every rank."""
    assert all(words in said for said in ranks(refused, base, kind))
