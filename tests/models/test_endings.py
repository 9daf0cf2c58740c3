"""What ends a response, in rollout, texts, rewards and export; read off templates, not off names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from src.callbacks.normalize import NormalizeScores
from src.data.modules import PairData, PromptData, TextData
from src.export.__main__ import generation_config
from src.models.endings import endings
from src.models.roles import Roles, build_roles
from src.models.text import decode, encode_completions, encode_prompts, encode_with_end
from src.rewards.adapter import token_rows
from src.rollout.sampling import Sampler
from src.types import PreferencePair, PromptRow, Prompts
from tests.chats import GEMMA, START, TURN, chat_tokenizer, write_chat_lm
from tests.tiny import EOS, FOREIGN_WARNINGS, PROMPTS, TinyCorpus, make_maker, model_settings, tokenizer, write_lm

pytestmark = FOREIGN_WARNINGS
NO_USER_END = (  # as EXAONE's: only an answer has an end
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ '<turn|>' if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PHI = (
    "{% for m in messages %}<|turn>{{ m.content }}<turn|>\n{% endfor %}{{ '' if add_generation_prompt else eos_token }}"
)
LLAMA_2 = "{% for m in messages %}[INST] {{ m.content }} {{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
SPELLED = "{% for m in messages %}{{ m.content }}<end>\n{% endfor %}"  # no token of the vocabulary
BROKEN = "{{ raise_exception('system first') }}"


def closing_tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    """One that puts a token before every text and its end token after it, as with `add_eos_token`."""
    made = chat_tokenizer(template)
    special = [("<|turn>", START), ("<eos>", EOS)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<|turn> $A <eos>", special_tokens=special)
    return made


def roles_of(path: str) -> Roles:
    return build_roles(model_settings(path), AutoTokenizer.from_pretrained(path), seed=5, critic=False)


def chat_of(words: PreTrainedTokenizerBase, *turns: str, opens: bool = True) -> str:
    chat = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return str(words.apply_chat_template(chat, tokenize=False, add_generation_prompt=opens))


# ------------------------------------------------------------------------------------------------ what is found


@pytest.mark.parametrize(
    ("template", "turn"),
    [(None, None), (GEMMA, TURN), (NO_USER_END, TURN), (PHI, TURN), (LLAMA_2, EOS), (SPELLED, None), (BROKEN, None)],
)
def test_the_turns_end_is_the_first_special_token_after_a_rendered_answer(
    template: str | None, turn: int | None
) -> None:
    found = endings(chat_tokenizer(template))
    assert (found.eos, found.turn) == (EOS, turn)
    assert found.ids == {EOS, *([] if turn is None else [turn])}


def test_the_models_list_of_end_tokens_counts_in_full() -> None:
    for named, ids in ((None, {EOS, TURN}), (7, {EOS, TURN, 7}), ([EOS, 7, 9], {EOS, TURN, 7, 9})):
        assert endings(chat_tokenizer(), GenerationConfig(eos_token_id=named)).ids == ids


# --------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("template", [GEMMA, NO_USER_END, PHI, LLAMA_2])
def test_sft_writes_after_an_answer_what_the_template_writes(template: str) -> None:
    """And after plain text the tokenizer's end token, template or not."""
    words = chat_tokenizer(template)
    whole = chat_of(words, "the film", "was great .", opens=False).partition("was great .")[2]
    written = next(token for token in words(whole, add_special_tokens=False)["input_ids"] if token in (EOS, TURN))
    texts = [chat_of(words, "the film") + "was great .", "the film was great ."]

    class Texts(TinyCorpus):
        def texts(self, split: str) -> list[str]:
            return texts

    data = TextData(Texts(), words, batch_size=2, steps=1, eval_rows=2, max_tokens=40, seed=1)
    chat, plain = (row[-1] for row in next(iter(data.test_dataloader()))["ids"].tolist())
    assert (chat, plain) == (written, EOS)


def test_a_tokenizer_without_a_template_closes_texts_as_ever() -> None:
    plain = tokenizer()
    for text in ("the film", "", "great .", "the film<eos>"):
        row = plain(text)["input_ids"]
        assert encode_with_end(plain, [text]) == [row if row[-1:] == [EOS] else [*row, EOS]]


def test_a_reward_model_with_a_template_reads_up_to_the_end_of_the_answers_turn() -> None:
    words = chat_tokenizer()
    rows = encode_completions(words, ["the film"], ["was great ."], chat_template=True)
    rendered = words(chat_of(words, "the film", "was great .", opens=False), add_special_tokens=False)["input_ids"]
    assert rows == [rendered[: len(rendered) - rendered[::-1].index(TURN)]]
    assert rows[0].count(TURN) == 2


@pytest.mark.parametrize("template", [None, GEMMA])
def test_a_tokenizer_that_appends_its_end_token_leaves_prompts_open(template: str | None) -> None:
    words = closing_tokenizer(template)
    assert words("the film")["input_ids"][-1] == EOS
    bare = words("the film", add_special_tokens=False)["input_ids"]
    assert encode_prompts(words, ["the film", ""]) == [[START, *bare], [START]]
    assert encode_with_end(words, ["the film"]) == [[START, *bare, EOS]]
    data = PromptData(TinyCorpus(), words, batch_size=8, iterations=1)
    batch = next(iter(data.test_dataloader()))["prompts"]
    assert not (batch["ids"][batch["mask"]] == EOS).any()
    if template is not None:
        chat = chat_of(words, "the film")
        assert encode_with_end(words, [f"{chat}great ."])[0][-1] == TURN


def test_prompts_of_other_tokenizers_are_encoded_as_ever() -> None:
    for words in (tokenizer(), chat_tokenizer()):
        assert encode_prompts(words, PROMPTS) == words(PROMPTS)["input_ids"]


# ------------------------------------------------------------------------------------------------------- rollout


def prompts_of(words: PreTrainedTokenizerBase, texts: list[str]) -> Prompts:
    rows = [PromptRow(text, {}) for text in texts]
    batch = PromptData(TinyCorpus(), words, batch_size=8, max_prompt_tokens=30).collate(rows, list(range(len(rows))))
    return Prompts(**{k: tuple(v) if isinstance(v, list) else v for k, v in batch.items()})


def test_a_rollout_ends_with_any_of_the_end_tokens(tmp_path: Path) -> None:
    """The model's list, the template's turn and the tokenizer's own; the text leaves out whichever it was."""
    named = [EOS, 4, 5, 6, 7]
    roles = roles_of(write_chat_lm(tmp_path, eos_token_id=named))
    prompts = prompts_of(roles.tokenizer, [chat_of(roles.tokenizer, text) for text in PROMPTS * 4])
    maker = make_maker(sampler=Sampler(max_new_tokens=12, temperature=1.0))
    rollout = maker.sample(roles, "policy", prompts, 0, torch.Generator().manual_seed(1))
    seen = set()
    for ids, mask, done, text in zip(
        rollout.response_ids.tolist(), rollout.response_mask, rollout.finished, rollout.responses, strict=True
    ):
        row = ids[: int(mask.sum())]
        ends = [token in {*named, TURN} for token in row]
        assert not any(ends[:-1])
        assert bool(done) is ends[-1]
        assert len(row) == 12 or ends[-1]
        assert text == decode(roles.tokenizer, torch.tensor(row[:-1] if ends[-1] else row, dtype=torch.int64))
        seen |= {row[-1]} if ends[-1] else set()
    assert len(seen) > 3  # the tokenizer's end token is one in twenty words


def test_an_adapter_reward_reads_one_end_token_whichever_ended_the_response(tmp_path: Path) -> None:
    """The one of the pairs that it was trained on: the turn's in a chat, the tokenizer's after plain text."""
    roles = roles_of(write_chat_lm(tmp_path, eos_token_id=[EOS, 4, 5, 6, 7, 8]))
    for write in (lambda text: chat_of(roles.tokenizer, text), str):
        prompts = prompts_of(roles.tokenizer, [write(text) for text in PROMPTS])
        rollout = make_maker().sample(roles, "policy", prompts, 0, torch.Generator().manual_seed(1))
        assert rollout.finished.any()

        class Pairs(TinyCorpus):
            def pairs(self, split: str, prompts: tuple[str, ...] = prompts.texts) -> list[PreferencePair]:
                return [PreferencePair(prompt=prompts[0], chosen="great .", rejected="dull .", gap=None)]

        data = PairData(
            Pairs(), roles.tokenizer, chat_template=False, lm_coef=0, batch_size=1, steps=1, max_tokens=40, seed=1
        )
        [trained] = {row[-1] for row in next(iter(data.test_dataloader()))["ids"].tolist()}
        rows = token_rows(rollout, roles.endings)
        assert {row[-1] for row in rows} == {trained} == {EOS if write is str else TURN}
        assert [row.count(trained) for row in rows] == [1 if write is str else 2] * len(rows)


def test_normalization_samples_end_like_a_rollout(tmp_path: Path) -> None:
    path = write_chat_lm(tmp_path, eos_token_id=[EOS, *range(3, 12)])
    callback = NormalizeScores(model_settings(path, None), Sampler(12, 1.0), samples=8, seed=4)
    _, responses = callback._sft_samples(TinyCorpus(), 8)
    words = [chat_tokenizer()(response)["input_ids"] for response in responses]
    assert all(not {EOS, *range(3, 12)} & set(row) for row in words)
    assert min(map(len, words)) < 6


# -------------------------------------------------------------------------------------------------------- export


def test_an_export_keeps_the_whole_list(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(config=None)
    path = write_chat_lm(tmp_path / "several", eos_token_id=[EOS, 7, 9])
    assert generation_config(run, Path(path)).eos_token_id == [EOS, 7, 9, TURN]
    assert generation_config(run, Path(write_lm(tmp_path / "one"))).eos_token_id == EOS
