"""Missing SFT and reward models of a run: trained once, kept in `logs/artifacts`."""

from __future__ import annotations

import ast
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from src.checkpointing.checksum import damaged_models
from src.config.compose import compose, settings_hash, with_value
from src.config.files import key_of, leaves
from src.config.schema import PPORun, Run
from src.errors import ConfigError
from src.runs.folder import make_folder, set_aside_damaged

log = logging.getLogger(__name__)

Train = Callable[[Run], dict[str, Any]]

ROOT = Path(__file__).parents[2]
# modules that determine the results of a stage, with the modules of its `_target_` keys
SOURCES = {
    "sft": ("src.modules.sft", "src.data.modules"),
    "reward": ("src.modules.reward", "src.data.modules", "src.callbacks.normalize"),
}
TRAINED = {"sft": "SFT model", "reward": "reward model"}
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "lightning", "vaderSentiment")


def train_missing(run: Run, train: Train) -> dict[str, str]:
    """The folders `model` and `reward` that `run` does not set; models that do not exist yet are trained.

    A model without `path` is made from scratch by the SFT stage, with the experiment, data and model of the run. A
    learned reward without `path` is the experiment's small reward model, which reads text and so suits any policy; an
    adapter without `path` is trained on the run's model. Nothing else is trained implicitly.
    """
    return dict(_needed(run, lambda overrides: _trained(overrides, train)))


def find_trained(run: Run) -> dict[str, str]:
    """Those of these folders that are there already; nothing is trained, and nothing is written."""
    found: dict[str, str] = {}
    try:
        for name, folder in _needed(run, _existing):
            found[name] = folder
    except FileNotFoundError:
        return found
    return found


def _needed(run: Run, folder_of: Callable[[list[str]], str]) -> Iterator[tuple[str, str]]:
    """The names and folders of the models that `run` does not set; `folder_of` gives that of a configuration."""
    found: dict[str, str] = {}
    shared = [o for o in run.overrides if key_of(o).split(".")[0] in ("experiment", "data", "gold_reward", "log_dir")]
    of_ppo = ("model.lora.critic_layers",)  # changes no model that is trained before
    model = [o for o in run.overrides if key_of(o).split(".")[0] == "model" and key_of(o) not in of_ppo]
    if run.stage != "sft" and run.model.path is None:
        found["model"] = folder_of(["stage=sft", *shared, *model])
        yield "model", found["model"]
    if isinstance(run, PPORun) and getattr(run.reward, "path", "given") is None:
        if run.choices["reward"] == "adapter":
            own, base = ["reward_net=adapter", *model], found.get("model", run.model.path or "")
        else:
            same = "" if model else found.get("model", "")  # the experiment's own model
            own, base = [], same or folder_of(["stage=sft", *shared])
        yield "reward", folder_of(["stage=reward", *shared, *own, with_value("model.path", base)])


def keep(run: Run, folder: Path) -> None:
    """Link the model that the pipeline's stage `run` has trained in `folder`, so that later runs find it."""
    final = _place(run)
    with _turn(final, TRAINED[run.stage]):
        set_aside_damaged(final, f"{folder} takes its place")
        if not final.exists():
            final.symlink_to(folder.resolve())


def _place(run: Run) -> Path:
    """The folder that keeps the model of `run`. Raises `ConfigError` if it is not writable."""
    final = _final(run)
    try:
        make_folder(final.parent)
    except OSError as error:
        raise ConfigError(f"log_dir={run.log_dir}: cannot write to {final.parent} ({error.strerror})") from error
    return final


def _final(run: Run) -> Path:
    """The same, whether it can be written to or not."""
    return Path(run.log_dir) / "artifacts" / f"{run.stage}-{_key(run)}"


def _existing(overrides: list[str]) -> str:
    """The folder of the model that `overrides` describe. Raises `FileNotFoundError` if it is not there, or damaged."""
    run = compose(overrides)
    final = _final(run)
    if not final.exists() or damaged_models(final):
        raise FileNotFoundError(final)
    return _folder_for_use(run, final)


def _folder_for_use(run: Run, final: Path) -> str:
    """What other runs are given: of a reward model its run's folder, of a language model the model's."""
    return str((final if run.stage == "reward" else final / "model").resolve())


def _trained(overrides: list[str], train: Train) -> str:
    """The folder of the model that `overrides` describe, trained if it does not exist yet; for a reward its run's."""
    run = compose(overrides)
    final = _place(run)
    with _turn(final, TRAINED[run.stage]):  # a parallel job that needs the same model waits for it
        set_aside_damaged(final, "the model is trained again")
        if not final.exists():
            log.info("no %s yet for these settings: it is trained first, and kept in %s", TRAINED[run.stage], final)
            working = final.with_name(f"{final.name}.tmp")  # an interrupted one is resumed
            train(run.model_copy(update={"run_dir": str(working)}))
            working.rename(final)
    return _folder_for_use(run, final)


@contextmanager
def _turn(final: Path, what: str) -> Iterator[None]:
    """Hold the lock of a stored model; say so if another command has it."""
    lock = FileLock(f"{final}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another command, which trains or checks the same %s: %s", what, final)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _key(run: Run) -> str:
    """A hash of the configuration, of the code that makes the model, and of the libraries' versions."""
    digest = hashlib.sha256(settings_hash(run, "logger", "callbacks").encode())
    targets = {str(value).rpartition(".")[0] for key, value in leaves(run.plain()) if key.endswith("_target_")}
    own = {target for target in targets if target.startswith("src.")}
    builder = ROOT / "src" / "stages" / f"{run.stage}.py"  # without its imports, which do not change results
    for path in [builder, *imported_files({*SOURCES[run.stage], *own})]:
        digest.update(path.read_bytes())
    digest.update(" ".join(f"{name}={version(name)}" for name in LIBRARIES).encode())
    return digest.hexdigest()[:12]


def imported_files(modules: set[str]) -> list[Path]:
    """The files of modules of this project and of their imports from it, direct and indirect."""
    todo, found = set(modules), set()
    while todo:
        name = todo.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        path = path if path.is_file() else ROOT / name.replace(".", "/") / "__init__.py"
        if not path.is_file() or path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("src."):
                todo |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return sorted(found)
