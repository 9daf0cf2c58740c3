"""`python -m src.chat` in a real terminal: what is typed is typed, and Ctrl-C and Ctrl-D are the keys."""

from __future__ import annotations

import os
import re
import signal
import sys
from functools import partial
from pathlib import Path

import pexpect
import pytest
import torch
from transformers import AutoTokenizer

from src.chat.__main__ import open_talk
from src.chat.conversation import Conversation, valid
from src.errors import ConfigError
from tests.tiny import EOS, FOREIGN_WARNINGS, tokenizer, write_lm

pytestmark = FOREIGN_WARNINGS
ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} . {% endfor %}"
    "{% if add_generation_prompt %}the plot{% endif %}"
)


def chat(*arguments):
    """The program in a terminal of 100 columns."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb", "PYTHONUTF8": "1"}
    command = [str(a) for a in ("-W", "ignore", "-m", "src.chat", *arguments)]
    return pexpect.spawn(
        sys.executable, command, cwd=ROOT, env=environment, timeout=120, dimensions=(50, 100), encoding="utf-8",
        codec_errors="replace", preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ours may ignore it
    )  # fmt: skip


def endless(folder):
    """A model that never ends an answer: the end token's score is as low as can be."""
    from transformers import GPT2LMHeadModel

    path = write_lm(folder, n_positions=2048, tie_word_embeddings=False)
    model = GPT2LMHeadModel.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.lm_head.weight[3:].mean(0) * 50)
    model.save_pretrained(path)
    return path


@pytest.mark.slow
def test_a_runs_policy_answers_is_compared_and_scored_and_nothing_typed_ends_it(tiny_run):
    terminal = chat(tiny_run[0], "temperature=0")
    terminal.expect("> ")
    terminal.sendline("/score")
    terminal.expect("there is no answer yet")
    terminal.sendline("the film")
    terminal.expect("\r\n> ")
    terminal.sendline("/compare")
    terminal.expect("policy")
    terminal.expect(r"reference \(before PPO\)")
    terminal.sendline("/score")
    terminal.expect(r"score: -?\d\.\d{3}")
    terminal.expect(r"gold: -?\d\.\d{3}")
    for odd in ("", "   ", "/nope", "/", "[bold]x[/nope]", "\x00\x01", "naïve 夜 🎬", "the " * 300):
        terminal.sendline(odd)
    terminal.expect("there is no command /nope")
    terminal.expect(r"only the last 42 of \d+ tokens fit")  # 48 positions less 6 new tokens
    terminal.send(b"\xff\xfe the film\n".decode("latin-1"))
    os.write(terminal.child_fd, b"\xff\xed\xa0\x80 film\n")  # no UTF-8, and half of a surrogate pair
    terminal.sendline("/system be kind")
    terminal.expect("no chat template, so it cannot read a system message")
    terminal.sendline("/help")
    terminal.expect("/clear")
    terminal.sendline("/clear")
    terminal.expect("cleared")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert "Traceback" not in terminal.before


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    terminal = chat(endless(tmp_path / "lm"), "max_new_tokens=2000")
    terminal.expect("> ")
    terminal.sendline("the film")
    terminal.expect(r"([\w.,]+ +){20}")  # it streams: 20 words are there long before 2000
    terminal.sendintr()
    terminal.expect("stopped; /exit or Ctrl-D quits")
    terminal.expect("> ")
    terminal.sendintr()  # at the prompt as well
    terminal.expect("stopped; /exit or Ctrl-D quits")
    terminal.sendline("/compare")
    terminal.expect("this model has no reference")
    terminal.sendline("/score")
    terminal.expect("this model has no reward")
    terminal.sendline("/exit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert (terminal.exitstatus, terminal.signalstatus) == (0, None)


def talk_on(folder, template, *arguments):
    """A conversation with a model whose folder has a chat template."""
    words = AutoTokenizer.from_pretrained(folder)
    words.chat_template = template
    words.save_pretrained(folder)
    return open_talk(str(folder), ["temperature=0", "max_new_tokens=4", *arguments])


def test_a_model_with_a_template_hears_the_whole_conversation(tmp_path):
    talk = talk_on(write_lm(tmp_path / "lm", n_positions=64), TEMPLATE)
    talk.handle("/system great")
    talk.handle("the film")
    first = talk.conversation.messages[-1]["content"]
    talk.handle("a bad end")
    said = f"system : great . user : the film . assistant : {first} . user : a bad end . the plot"
    assert talk.asked[1] == tokenizer()(said)["input_ids"]
    with torch.no_grad():  # the answer is the model's own, token by token
        lm, ids = talk.roles.models["policy"], list(talk.asked[1])
        for token in talk.last:
            assert lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)
    assert 1 <= len(talk.last) <= 4


def test_the_oldest_turns_go_when_the_context_is_full():
    words = tokenizer()
    words.chat_template = TEMPLATE
    talk = Conversation(words, room=20)
    for turn in range(6):
        ids, note = talk.ask("the film was great")
        assert len(ids) <= 20
        assert (note is None) == (turn < 1), note
        talk.answered("we liked it")
    ids, note = talk.ask("dull " * 40)
    assert len(ids) == 20
    assert re.fullmatch(r"only the last 20 of \d+ tokens fit into the model's context", note)
    assert talk.messages[0]["role"] == "user"


def test_what_was_said_before_ctrl_c_is_kept(tmp_path, monkeypatch):
    talk = talk_on(write_lm(tmp_path / "lm", n_positions=64), TEMPLATE)
    steps = talk.sampler.steps

    def interrupted(*arguments):
        for number, step in enumerate(steps(*arguments)):
            if number == 2:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(type(talk.sampler), "steps", lambda self, *arguments: interrupted(*arguments))
    with pytest.raises(KeyboardInterrupt):
        talk.handle("the film")
    assert len(talk.last) == 2
    assert talk.conversation.messages[-1]["role"] == "assistant"


def test_halves_of_surrogate_pairs_become_question_marks():
    assert valid("a\udce4b\ud83c") == "a?b?"
    assert valid("naïve 夜 🎬") == "naïve 夜 🎬"


def test_what_it_refuses(tiny_run):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ConfigError, match="temperature=warm: must be a number"):
        open_talk(str(tiny_run[0]), ["temperature=warm"])
    with pytest.raises(ConfigError, match="reads at most 48"):
        open_talk(str(tiny_run[0]), ["max_new_tokens=48"])
    with pytest.raises(ConfigError, match="there is no such folder"):
        open_talk("/no/such", [])
    assert signal.getsignal(signal.SIGINT) is before
