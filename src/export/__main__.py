"""Export a run's model as a folder that plain transformers loads.

  python -m src.export logs/ppo/default       to logs/ppo/default/export
  python -m src.export logs/pipeline/default out=FOLDER dtype=float32

Of a pipeline it is the PPO stage. The folder holds the merged model
(safetensors), the tokenizer with its chat template, generation_config.json
(samples as in training), README.md (the model card) and, for a LoRA policy,
adapter/ for peft. At the end it is loaded and compared with the run's own
model. An unfinished run is exported from its last checkpoint, and the card
says so; one with your own code, such as a reward function, needs --trust-run.
dtype=float32 merges an adapter in float32 into a base of half precision, whose
rounding would lose a part of the update; model.trust_remote_code=true runs
code that the model's folder brings along.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig

from src.checkpointing.resume import newest_intact, opened
from src.config.schema import PPORun
from src.errors import ConfigError, ModelError
from src.export.model_card import model_card
from src.export.parity import Comparison, base_and_adapter, base_at_hand, compare
from src.models.endings import endings
from src.models.loading import load_config, load_tokenizer
from src.models.quantized import merged
from src.runs.find import RunFolder, find_run, own_settings
from src.runs.folder import make_writable
from src.runs.trust import HELP, REMOTE_CODE, refuse_unknown
from src.stages.builders import stage_of
from src.utils.exits import friendly_errors
from src.utils.output import set_up_output
from src.utils.terminal import say

LARGEST_KL = {torch.float64: 1e-9, torch.float32: 1e-6}  # nats; merging an adapter rounds, far more in half precision
LARGEST_SCORE = {torch.float64: 1e-4, torch.float32: 1e-3}  # difference of scores
HALF_KL, HALF_SCORE = 0.02, 0.5
WORTH_SAYING = 0.01  # share of an update


def export(
    given: str, out: str | None, dtype: str = "null", arguments: Sequence[str] = (), trusted: bool = False
) -> Path:
    """Write the folder, compare, and return its path. Raises `ConfigError` or `ModelError` and then leaves nothing.

    `dtype`: "float32" merges an adapter in it; "null" copies the run's model. `arguments` and `trusted` give consent
    to the folder's code, as in `find_run`.
    """
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
        remote, scores = run.config.model.trust_remote_code, run.stage == "reward"
        load_config(str(source / "model"), trusted=remote)  # refuses code without consent, in a sentence
        working = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(working, ignore_errors=True)
        try:
            adapter = write(run, source, working, iteration, remote)
            if dtype != "null":
                merge(run, source, working, remote)
            say(in_words(compare(source, working, run.before, scores, remote), scores, working))
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
    newest = newest_intact(run.folder / "checkpoints", set_aside=False)
    if newest is None:
        raise ConfigError(f"{run.folder}: the run is unfinished and has no checkpoint yet")
    stage = stage_of(run.config)
    module, _ = stage.build(stage.corpus(), folder)
    state = opened(newest)
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"], strict=False)
    module.save(folder)
    iteration = int(newest.stem.removeprefix("iteration-"))
    say(f"{run.folder}: the run is unfinished; exporting its checkpoint of step {iteration}, without results")
    return iteration


def write(run: RunFolder, source: Path, folder: Path, iteration: int | None, trusted: bool = False) -> bool:
    """Copy the saved model, add generation config and card; returns whether there is an adapter."""
    shutil.copytree(source / "model", folder)
    adapter = (source / "adapter").is_dir()
    if adapter:
        shutil.copytree(source / "adapter", folder / "adapter")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # peft's empty form; the model card replaces it
    if run.stage != "reward":
        generation_config(run, folder, trusted).save_pretrained(folder)
    model_card(run, adapter, iteration).save(folder / "README.md")
    return adapter


def generation_config(run: RunFolder, folder: Path, trusted: bool = False) -> GenerationConfig:
    """Sampling as in training: the whole distribution at the run's temperature (1 for SFT), until a token that ends."""
    tokenizer = load_tokenizer(str(folder), trusted=trusted)
    named = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    ends = sorted(endings(tokenizer, named).ids)
    rollout = run.config.rollout if isinstance(run.config, PPORun) else None
    length = {} if rollout is None else {"max_new_tokens": rollout.max_new_tokens}
    return GenerationConfig(
        do_sample=True, temperature=1.0 if rollout is None else rollout.temperature, top_k=0, top_p=1.0, **length,
        eos_token_id=ends if len(ends) > 1 else ends[0], pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip


def merge(run: RunFolder, source: Path, folder: Path, trusted: bool) -> None:
    """Replace the weights by base + adapter, merged in float32. Raises `ConfigError` without base and adapter."""
    base = base_at_hand(source, run.before)
    if base is None or run.stage == "reward":
        raise ConfigError("dtype=float32 merges a policy's adapter into its base, and this run has not both at hand")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    merged(base_and_adapter(source, base, False, trusted).float()).save_pretrained(folder)


def in_words(found: Comparison, scores: bool, folder: Path) -> str:
    """How far the exported model is from the run's, in words. Raises `ModelError` when it is too far."""
    by_dtype, half = (LARGEST_SCORE, HALF_SCORE) if scores else (LARGEST_KL, HALF_KL)
    what = f"scores differ by up to {found.difference:.2g} from those of {found.original}"
    if not scores:
        what = f"KL({found.original} || export) is {found.difference:.2g} nats per token on a probe"
    if not found.difference <= by_dtype.get(found.dtype, half):
        raise ModelError(f"{folder}: {what}, which is more than rounding: the export is not kept")
    text = f"loaded again: {what}" + (
        "" if scores else f", the top token the same at {found.same_top:.0%} of its places"
    )
    if found.lost is None or found.lost < WORTH_SAYING:
        return text
    return (
        f"{text}; rounding to {str(found.dtype).removeprefix('torch.')} changes the update in the merged weights by "
        f"{found.lost:.0%} of its size: dtype=float32 keeps it, and so does adapter/"
    )


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a run or of a pipeline")
    parser.add_argument(
        "settings", nargs="*", help=f"out=FOLDER (default: RUN/export), dtype=float32, {REMOTE_CODE}=true"
    )
    parser.add_argument("--trust-run", action="store_true", help=HELP)
    arguments = parser.parse_intermixed_args()
    set_up_output()
    with friendly_errors(arguments.settings):
        own, others = own_settings(arguments.settings, {"out": None, "dtype": "null"})
        unknown = [other for other in others if other != f"{REMOTE_CODE}=true"]
        if unknown:
            raise ConfigError(f"{unknown[0]}: the settings of export are out=FOLDER, dtype and {REMOTE_CODE}=true")
        if own["dtype"] not in ("null", "float32"):
            raise ConfigError(f"dtype={own['dtype']}: must be null or float32")
        export(arguments.run, own["out"], own["dtype"], others, arguments.trust_run)


if __name__ == "__main__":
    main()
