"""Memory runs out: passes are halved, and gradients, averages and experience stay what they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.testing import assert_close

from src.errors import ModelError
from src.models.roles import Roles
from src.rollout.oom_retry import OomRetry
from src.types import Experience
from src.utils.exits import JobFailedError, friendly_errors
from src.utils.out_of_memory import out_of_memory
from tests.tiny import (
    FOREIGN_WARNINGS,
    PROMPTS,
    Inject,
    ScriptedReward,
    fit,
    make_maker,
    make_module,
    make_prompts,
    make_roles,
    ragged_experience,
    ragged_rollout,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS
close = dict(rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


def no_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand a page more")


class Failing:
    """A function that runs out of memory in its calls of these numbers, and remembers how many rows each had."""

    def __init__(self, function: Callable[..., Any], *calls: int) -> None:
        self.function, self.calls, self.rows = function, calls, []

    def __call__(self, rollout: Any, *args: Any, **kwargs: Any) -> Any:
        self.rows.append(len(rollout.prompts))
        found = self.function(rollout, *args, **kwargs)
        if len(self.rows) in self.calls:
            raise no_memory()
        return found


class Gradients(Callback):
    """What each step of policy and critic uses."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda o, a, k: self.seen.append(self.of(o.param_groups[0]["params"])))

    def of(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


def experience_of(roles: Roles) -> tuple[Experience, dict[str, Tensor]]:
    rollout, rows = ragged_rollout(rows=8), ragged_rollout(rows=8, seed=4)
    with torch.no_grad():
        logprobs, values = roles.distribution(rollout, 1.0).logprobs(), roles.values(rollout)
    noise = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1), dtype=logprobs.dtype)
    made = ragged_experience(rollout, logprobs + 0.2 * noise, values + 0.2 * noise)
    return made, {"ids": rows.response_ids, "mask": rows.response_mask}


def learn(base: str, folder: Path, change: Callable[[Any], None] | None = None, **options: Any) -> tuple[Any, ...]:
    """Gradients and averages of two steps of each role in float64, with every term of the loss; and the module."""
    roles, gradients = make_roles(base, spread=0.1, dtype="float64", **options), Gradients()
    experience, text = experience_of(roles)
    module = make_module(roles, epochs=1, micro_batch_size=4, minibatch_size=8, ptx_coef=0.3, entropy_coef=0.1)
    if change is not None:
        change(module)
    recorder, _ = fit(module, folder, iterations=1, callbacks=(Inject(experience, text), gradients))
    assert len(gradients.seen) == 2
    return gradients.seen, recorder.by_step(), module


@pytest.mark.parametrize(("calls", "rows"), [((2,), [4, 4, 2, 2, 2, 2]), ((1,), [4, 2, 2, 2, 2]),
                                             ((2, 4), [4, 4, 2, 2] + [1] * 8)])  # fmt: skip
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_the_gradient_is_that_of_a_run_with_memory_enough(
    base: str, tmp_path: Path, role: str, calls: tuple[int, ...], rows: list[int]
) -> None:
    """Checklist 47. Out of memory in the second micro-batch, in the first, and again after halving."""
    expected, logged, _ = learn(base, tmp_path)
    name, counting = {"policy": "distribution", "critic": "values"}[role], []

    def change(module: Any) -> None:
        counting.append(Failing(getattr(module.roles, name), *calls))
        setattr(module.roles, name, counting[0])

    with pytest.warns(UserWarning, match="out of memory: passes now take") as warned:
        found, said, module = learn(base, tmp_path, change)
    assert counting[0].rows == rows
    lines = [str(w.message) for w in warned if "out of memory" in str(w.message)]
    assert len(lines) == len(calls)
    assert f"ppo.micro_batch_size={rows[-1]} avoids this" in lines[-1]
    assert module.fitting.size == rows[-1]
    assert_close(found, expected, **close)
    assert_close(said, logged, **close)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_pass_that_ends_half_way_leaves_nothing_behind(
    base: str, tmp_path: Path, checkpointing: bool
) -> None:
    """In the second micro-batch's: the last layer's gradients were added already, the first layer's were not."""
    expected, logged, _ = learn(base, tmp_path, gradient_checkpointing=checkpointing)
    half_way: list[list[bool]] = []

    def change(module: Any) -> None:
        first, *_, last = module.roles.policy_parameters()
        after_one: list[Tensor] = []

        def note(parameter: Tensor) -> None:
            if not after_one:
                after_one.extend(p.grad.clone() for p in (first, last))

        def fail(gradient: Tensor) -> None:
            if after_one and not half_way:
                half_way.append([torch.equal(p.grad, old) for p, old in zip((first, last), after_one, strict=True)])
                raise no_memory()

        first.register_post_accumulate_grad_hook(note)  # the last to be accumulated: the first pass is over
        first.register_hook(fail)

    with pytest.warns(UserWarning, match="passes now take 2 sequences instead of 4"):
        found, said, _ = learn(base, tmp_path, change, gradient_checkpointing=checkpointing)
    assert half_way == [[True, False]]
    assert_close(found, expected, **close)
    assert_close(said, logged, **close)


def test_memory_that_runs_out_on_the_texts(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third loss belongs to the same gradient: all of it is done again."""
    from src.modules import objective

    expected, logged, _ = learn(base, tmp_path)
    plain, rows = objective.next_token_logprobs, []

    def failing(lm: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        rows.append(len(ids))
        if len(rows) == 2:
            raise no_memory()
        return plain(lm, ids, mask, **options)

    monkeypatch.setattr(objective, "next_token_logprobs", failing)
    with pytest.warns(UserWarning, match="out of memory"):
        found, said, _ = learn(base, tmp_path)
    assert rows == [4, 4, 2, 2, 2, 2]
    assert_close(found, expected, **close)
    assert_close(said, logged, **close)


@pytest.mark.parametrize("name", ["distribution", "values"])
def test_experience_is_made_in_smaller_pieces(base: str, name: str) -> None:
    """Logprobs of policy and reference, values: of the same rows, in the same places."""

    def made(*calls: int) -> tuple[dict[str, Tensor], Any]:
        roles, maker = make_roles(base, spread=0.1, dtype="float64"), make_maker(batch_size=4)
        setattr(roles, name, Failing(getattr(roles, name), *calls))
        draws = torch.Generator().manual_seed(1)
        experience, _ = maker.make(roles, ScriptedReward(), make_prompts(PROMPTS), 0, draws)
        fields = {f.name: getattr(experience, f.name) for f in dataclasses.fields(experience)}
        return {n: x for n, x in fields.items() if isinstance(x, Tensor)}, maker.fitting

    expected, _ = made()
    said = "passes now take 2 sequences instead of 4.*rollout.scoring_batch_size=2 avoids this"
    with pytest.warns(UserWarning, match=said):
        found, fitting = made(2)
    assert fitting.size == 2
    assert_close(found, expected, **close)


def test_one_row_that_does_not_fit_ends_the_run_with_one_sentence(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(module: Any) -> None:
        module.roles.distribution = Failing(module.roles.distribution, *range(1, 99))

    with (
        pytest.raises(SystemExit) as ended,
        friendly_errors([]),
        pytest.warns(UserWarning, match="out of memory"),
    ):
        learn(base, tmp_path, change)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: memory does not suffice for a single sequence: model.gradient_checkpointing=true")
    assert said.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB)")


def test_a_minibatch_smaller_than_a_pass_is_halved_itself() -> None:
    """Pieces of 16 where there are 32 to a pass but 16 rows would fail as before."""
    fitting, sizes = OomRetry(32, "key"), []

    def work() -> int:
        sizes.append(fitting.size)
        if fitting.size > 3:
            raise no_memory()
        return 7

    with pytest.warns(UserWarning, match=r"key=\d"):
        assert fitting.attempt(work, rows=12) == 7
    assert sizes == [32, 6, 3]
    assert [len(index) for index, _ in fitting.micro_batches(ragged_rollout(rows=7))] == [3, 3, 1]
    with pytest.raises(ModelError, match="single sequence"):
        OomRetry(1, "key").attempt(lambda: (_ for _ in ()).throw(no_memory()), rows=8)


def test_what_is_no_lack_of_memory_goes_through() -> None:
    """Also one that the machine itself raises when it has no memory left."""
    with pytest.raises(RuntimeError) as lacking:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert out_of_memory(lacking.value)
    with pytest.raises(RuntimeError) as shapes:
        torch.zeros(2) + torch.zeros(3)
    assert not out_of_memory(shapes.value)
    with pytest.raises(RuntimeError, match="must match"):
        OomRetry(8, "key").attempt(lambda: torch.zeros(2) + torch.zeros(3), rows=8)


@pytest.mark.parametrize("job_of_sweep", [False, True])
def test_memory_that_runs_out_anywhere_is_one_sentence(job_of_sweep: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing can be halved; the other jobs of a sweep go on."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    stop = JobFailedError if job_of_sweep else SystemExit
    with pytest.raises(stop), friendly_errors(["seed=1"], job_of_sweep):
        raise error
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB." in said
    assert "rollout.scoring_batch_size" in said


def test_other_faults_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"), friendly_errors([]):
        raise RuntimeError("shapes do not fit")


def test_a_rank_does_not_repeat_a_pass_that_others_make_with_it() -> None:
    """Checklist 47. With sharded layers it would wait for ranks that go on."""
    fitting = OomRetry(8, "ppo.micro_batch_size")
    fitting.alone = False
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        raise no_memory()

    with pytest.raises(ModelError, match=r"trainer=fsdp .* set ppo\.micro_batch_size below 6; the last checkpoint"):
        fitting.attempt(work, 6)
    assert calls == [1]
    assert fitting.size == 8
