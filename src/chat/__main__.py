"""Chat with a model in the terminal.

  python -m src.chat logs/ppo/default
  python -m src.chat logs/ppo/default temperature=0.7 max_new_tokens=40
  python -m src.chat FOLDER reward=vader

The policy of a run (of a pipeline: its PPO stage), or a plain model with a
reward for /score. A model with a chat template reads the whole conversation;
any other model continues each line alone. temperature=0 picks the most
probable token. Ctrl-C stops an answer, Ctrl-D quits. /help lists the commands.
Other key=value overrides are those of python -m src.train; they change the
run's own settings. A run with your own code, such as a reward function, needs
--trust-run.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from src.chat.conversation import Conversation
from src.chat.repl import Talk
from src.config.files import key_of
from src.config.schema import PPORun
from src.errors import ConfigError, require
from src.evaluate.prompts import load_rewards
from src.models.inference_roles import load_inference_roles
from src.models.loading import context_length, load_config, load_tokenizer
from src.runs.find import find_run, own_settings, settings_of
from src.runs.trust import HELP, REMOTE_CODE
from src.stages.ppo import PPOStage
from src.utils.device import device
from src.utils.exits import friendly_errors
from src.utils.output import set_up_output

with contextlib.suppress(ImportError):  # line editing and history for input(); not on Windows
    import readline  # noqa: F401

LONGEST = 128  # default length of an answer in tokens; at most half of the context


def open_talk(given: str, arguments: list[str], trusted: bool = False) -> Talk:
    """Load what the folder holds, and its own code if it is `trusted`. Raises `ConfigError` or `ModelError`."""
    run = find_run(given, arguments, trusted)
    if run is not None and run.stage == "reward":
        raise ConfigError(f"{given}: a reward model writes no text; give the folder of an SFT or PPO run")
    if run is not None and not run.model.is_dir():
        raise ConfigError(f"{given}: the run is unfinished and has no model yet: use python -m src.export")
    policy = str(run.model if run is not None else Path(given).expanduser())
    trained = run is not None and run.stage == "ppo"
    remote_code = f"{REMOTE_CODE}=true" in arguments if run is None else run.config.model.trust_remote_code
    limit = context_length(load_config(policy, trusted=remote_code))
    defaults = {"temperature": 1.0, "max_new_tokens": LONGEST if limit is None else min(LONGEST, limit // 2)}
    if run is not None and isinstance(run.config, PPORun):
        defaults = {key: type(value)(getattr(run.config.rollout, key)) for key, value in defaults.items()}
    own, overrides = own_settings(arguments, defaults)
    require(own["temperature"] >= 0, "temperature", own["temperature"], "at least 0")
    lengths = [f"rollout.max_new_tokens={own['max_new_tokens']}", "rollout.max_prompt_tokens=1"]
    config = settings_of(run, given, [*overrides, *lengths], trusted)
    stage = PPOStage(config)
    stage.check()
    scored = trained or any(key_of(override).split(".")[0] == "reward" for override in overrides)
    if scored and stage.reward is None:
        raise ConfigError(f"{given}: the reward model's path is missing: add reward.path=FOLDER, or reward=vader")
    tokenizer = load_tokenizer(policy, trusted=remote_code)
    before = run.before if run is not None and trained else None
    roles = load_inference_roles(stage.model, tokenizer, policy, before).to(device())
    return Talk(
        roles,
        Conversation(
            tokenizer,
            None if limit is None else limit - own["max_new_tokens"],
            *written_by(run.config.data if run else None),
        ),
        load_rewards(stage) if scored else {},
        stage.maker.scorer,
        own["max_new_tokens"],
        own["temperature"],
        config.seed,
    )


def written_by(data: Any) -> tuple[str | None, dict[str, Any]]:
    """System message and further variables of the chat template in a run's data set; none for any other."""
    return getattr(data, "system", None), dict(getattr(data, "chat_template_kwargs", None) or {})


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a run, of a pipeline or of a model")
    parser.add_argument("settings", nargs="*", help="temperature=T max_new_tokens=N, and key=value")
    parser.add_argument("--trust-run", action="store_true", help=HELP)
    arguments = parser.parse_intermixed_args()
    set_up_output()
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    with friendly_errors(arguments.settings):
        open_talk(arguments.model, arguments.settings, arguments.trust_run).loop()


if __name__ == "__main__":
    main()
