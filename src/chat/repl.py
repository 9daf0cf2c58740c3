"""The chat loop of the terminal: lines in, streamed answers out, and commands that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from src.chat.conversation import Conversation, valid
from src.errors import RewardError
from src.models.inference_roles import InferenceRoles
from src.models.roles import Role
from src.models.text import decode, response_text
from src.rollout.sampling import Sampler
from src.rollout.scoring import Scorer
from src.types import AnyReward, Rollout
from src.utils.seeding import generator
from src.utils.terminal import shown


class Stream(TextStreamer):
    """Prints an answer word by word, each as soon as no later token can change it."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=False, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print as written; a new line only at the end."""
        self.console.print(Text(shown(text)), end="\n" if stream_end else "", soft_wrap=True)


class Talk:
    """The loop and its commands. Only /exit and Ctrl-D end it."""

    def __init__(
        self,
        roles: InferenceRoles,
        conversation: Conversation,
        rewards: dict[str, AnyReward],
        scorer: Scorer,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        self.roles, self.conversation, self.rewards, self.scorer = roles, conversation, rewards, scorer
        self.sampler, self.greedy = Sampler(max_new_tokens, temperature or 1.0), temperature == 0
        self.seed, self.turn, self.console = seed, 0, Console()
        self.asked: tuple[str, list[int]] | None = None  # the last prompt, as text and as ids
        self.last: list[int] = []  # the ids of the last answer
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": self.help,
            "/compare": self.compare,
            "/score": self.score,
            "/system": self.system,
            "/clear": self.clear,
        }

    def loop(self) -> None:
        """Read lines until /exit or the end of the input."""
        self.console.print("/help lists the commands, Ctrl-D quits" + self._kind(), markup=False, highlight=False)
        while True:
            try:
                line = valid(input("> ")).strip()
                if line == "/exit":
                    return
                if line:
                    self.handle(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                self._print("\nstopped; /exit or Ctrl-D quits")

    def handle(self, line: str) -> None:
        """Run a command, or answer a text."""
        name, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self.answer(line)
        elif name in self.commands:
            self.commands[name](rest.strip())
        else:
            self._print(f"there is no command {name}; /help lists them")

    def answer(self, text: str) -> None:
        """Stream the policy's answer; Ctrl-C stops it and keeps what is printed."""
        ids, note = self.conversation.ask(text)
        if note:
            self._print(note)
        if not ids:
            self._print("this text has no tokens, so there is nothing to answer")
            return
        tokenizer = self.roles.tokenizer
        self.turn, self.last = self.turn + 1, []
        self.asked = decode(tokenizer, torch.tensor(ids)), ids
        stream = Stream(tokenizer, self.console)
        try:
            self.last = self._sample("policy", stream, self.last)
        finally:
            stream.end()
            self.conversation.answered(self._text(self.last))

    def help(self, _: str) -> None:
        """List the commands."""
        for name, text in {
            "/compare": "the last answer and the reference's answer to the same prompt",
            "/score": "the reward (and gold reward) of the last answer",
            "/system TEXT": "set the system message, for models with a chat template; without TEXT: none",
            "/clear": "clear the conversation",
            "/exit": "quit, like Ctrl-D; Ctrl-C stops an answer",
        }.items():
            self._print(f"{name:14} {text}")

    def compare(self, _: str) -> None:
        """Two columns: policy and reference, drawing from the same random stream."""
        if "reference" not in self.roles.models:
            self._print("this model has no reference: /compare needs the folder of a PPO run")
        elif self._answered():
            table = Table("policy", "reference (before PPO)", show_lines=True)
            other = self._sample("reference", None, [])
            table.add_row(*(Text(shown(self._text(ids).strip())) for ids in (self.last, other)))
            self.console.print(table)

    def score(self, _: str) -> None:
        """Reward and gold of the last answer."""
        if not self.rewards:
            self._print("this model has no reward: start with reward=vader, or give the folder of a PPO run")
        elif self._answered():
            for name, reward in self.rewards.items():
                try:
                    found = replace(self.scorer, drop_failed=False).score(reward, self._rollout()).scores.item()
                    self._print(f"{name}: {found:.3f}")
                except RewardError as error:
                    self._print(f"{name}: {error}")

    def system(self, text: str) -> None:
        """Set the system message and clear the conversation."""
        if not self.conversation.has_template:
            self._print("this model has no chat template, so it cannot read a system message")
            return
        self.conversation.system = text or None
        self.clear("")

    def clear(self, _: str) -> None:
        """Clear the conversation."""
        self.conversation.clear()
        self.asked, self.last = None, []
        self._print("cleared")

    def _answered(self) -> bool:
        if self.asked is None or not self.last:
            self._print("there is no answer yet")
        return bool(self.asked and self.last)

    def _sample(self, role: Role, stream: Stream | None, ids: list[int]) -> list[int]:
        """Append the answer of a role to `ids`, token by token, and return them."""
        assert self.asked is not None
        ends = self.roles.endings.ids
        with self.roles.acting(role) as lm:
            prompt = torch.tensor([self.asked[1]], device=lm.device)
            draws = None if self.greedy else generator(self.seed, "chat", self.turn, device=lm.device)
            steps = self.sampler.steps(
                lm, prompt, torch.ones_like(prompt).bool(), torch.tensor(sorted(ends), device=lm.device),
                self.roles.tokenizer.pad_token_id, draws,
            )  # fmt: skip
            for token, _ in steps:
                ids.append(int(token))
                if stream is not None and ids[-1] not in ends:
                    stream.put(token.cpu())
        return ids

    def _text(self, answer: list[int]) -> str:
        return decode(self.roles.tokenizer, torch.tensor(self.roles.endings.without_end(answer), dtype=torch.int64))

    def _rollout(self) -> Rollout:
        """The last prompt and answer as a rollout, which rewards score."""
        assert self.asked is not None
        prompt, answer = torch.tensor([self.asked[1]]), torch.tensor([self.last])
        one, ended = torch.zeros(1, dtype=torch.int64), torch.tensor([self.last[-1] in self.roles.endings.ids])
        text = response_text(self.roles.tokenizer, prompt[0], answer[0], self.roles.endings)
        return Rollout(
            prompt_ids=prompt,
            prompt_mask=torch.ones_like(prompt).bool(),
            response_ids=answer,
            response_mask=torch.ones_like(answer).bool(),
            behavior_logprobs=torch.zeros(answer.shape),
            finished=ended,
            prompt_index=one,
            group_ids=one,
            prompts=(self.asked[0],),
            responses=(text,),
            metadata=({},),
            policy_version=0,
        )

    def _kind(self) -> str:
        return "" if self.conversation.has_template else "; this model has no chat template and continues each line"

    def _print(self, text: str) -> None:
        self.console.print(Text(shown(text)), style="dim", soft_wrap=True)
