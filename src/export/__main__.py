"""Export a run's model as a folder that plain transformers loads.

  python -m src.export logs/ppo/default       to logs/ppo/default/export
  python -m src.export logs/pipeline/default out=FOLDER

Of a pipeline it is the PPO stage. The folder holds the merged model
(safetensors), the tokenizer with its chat template, generation_config.json
(samples as in training), README.md (the model card) and, for a LoRA policy,
adapter/ for peft. At the end it is loaded and compared with the run's own
model. An unfinished run is exported from its last checkpoint, and the card
says so; one with your own code, such as a reward function, needs --trust-run.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig

from src.checkpointing.checkpoint import checkpoints
from src.config.schema import PPORun
from src.errors import ConfigError, ModelError
from src.export.model_card import model_card
from src.export.parity import largest_difference
from src.models.loading import load_tokenizer
from src.runs.find import RunFolder, find_run, own_settings
from src.runs.folder import make_writable
from src.runs.trust import HELP, REMOTE_CODE, refuse_unknown
from src.stages.builders import stage_of
from src.utils.exits import friendly_errors
from src.utils.output import set_up_output
from src.utils.terminal import say

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # nats; merging an adapter rounds, far more in half precision
HALF_TOLERANCE = 0.5


def export(given: str, out: str | None, arguments: Sequence[str] = (), trusted: bool = False) -> Path:
    """Write the folder, compare, and return its path. Raises `ConfigError` or `ModelError` and then leaves nothing."""
    run = find_run(given, arguments, trusted)
    if run is None:
        raise ConfigError(f"{given}: this is already a model folder; give the folder of a run")
    target = Path(out).expanduser() if out else run.folder / "export"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty: remove it, or choose another folder with out=FOLDER")
    make_writable(target.parent)
    with tempfile.TemporaryDirectory() as scratch:
        source, iteration = (
            (run.folder, None) if run.finished else (Path(scratch), restore(run, Path(scratch), trusted))
        )
        working = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(working, ignore_errors=True)
        try:
            adapter = write(run, source, working, iteration)
            say(compare(run, source, working))
        except BaseException:
            shutil.rmtree(working, ignore_errors=True)
            raise
    if target.exists():
        target.rmdir()
    working.replace(target)
    say(f"{target}: " + ", ".join(sorted(path.name for path in target.iterdir())))
    if adapter and run.before is not None and Path(run.before).exists():
        say(f"adapter/ needs its base, which is {run.before}; the merged model needs nothing else")
    return target


def restore(run: RunFolder, folder: Path, trusted: bool) -> int:
    """Write the last checkpoint of an unfinished run as the run writes its model; returns its iteration."""
    if not trusted:
        refuse_unknown(run.config, str(run.folder), ())
    saved = checkpoints(run.folder / "checkpoints")
    if not saved:
        raise ConfigError(f"{run.folder}: the run is unfinished and has no checkpoint yet")
    stage = stage_of(run.config)
    module, _ = stage.build(stage.corpus(), folder)
    state = torch.load(saved[-1], map_location="cpu", weights_only=True)
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"], strict=False)
    module.save(folder)
    iteration = int(saved[-1].stem.removeprefix("iteration-"))
    say(f"{run.folder}: the run is unfinished; exporting its checkpoint of step {iteration}, without results")
    return iteration


def write(run: RunFolder, source: Path, folder: Path, iteration: int | None) -> bool:
    """Copy the saved model, add generation config and card; returns whether there is an adapter."""
    shutil.copytree(source / "model", folder)
    adapter = (source / "adapter").is_dir()
    if adapter:
        shutil.copytree(source / "adapter", folder / "adapter")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # peft's empty form; the model card replaces it
    if run.stage != "reward":
        generation_config(run, folder).save_pretrained(folder)
    model_card(run, adapter, iteration).save(folder / "README.md")
    return adapter


def generation_config(run: RunFolder, folder: Path) -> GenerationConfig:
    """Sampling as in training: the whole distribution at the run's temperature (1 for SFT), until the end token."""
    tokenizer = load_tokenizer(str(folder))
    rollout = run.config.rollout if isinstance(run.config, PPORun) else None
    length = {} if rollout is None else {"max_new_tokens": rollout.max_new_tokens}
    return GenerationConfig(
        do_sample=True, temperature=1.0 if rollout is None else rollout.temperature, top_k=0, top_p=1.0, **length,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip


def compare(run: RunFolder, source: Path, folder: Path) -> str:
    """One sentence on how far the exported model is from the run's. Raises `ModelError` when it is too far."""
    found = largest_difference(source, folder, run.before, run.stage == "reward")
    allowed = TOLERANCE.get(found.dtype, HALF_TOLERANCE)
    if found.difference > allowed:
        raise ModelError(f"{folder}: its outputs differ by up to {found.difference:.2g} from those of {found.original}")
    return f"loaded again: outputs differ by at most {found.difference:.2g} from those of {found.original} on a probe"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a run or of a pipeline")
    parser.add_argument("settings", nargs="*", help="out=FOLDER (default: RUN/export), model.trust_remote_code=true")
    parser.add_argument("--trust-run", action="store_true", help=HELP)
    arguments = parser.parse_intermixed_args()
    set_up_output()
    with friendly_errors(arguments.settings):
        own, others = own_settings(arguments.settings, {"out": None})
        unknown = [other for other in others if other != f"{REMOTE_CODE}=true"]
        if unknown:
            raise ConfigError(f"{unknown[0]}: the settings of export are out=FOLDER and {REMOTE_CODE}=true")
        export(arguments.run, own["out"], others, arguments.trust_run)


if __name__ == "__main__":
    main()
