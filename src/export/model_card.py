"""The model card of an exported model: what it is, how it was trained, its results, and what was not measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from omegaconf import OmegaConf
from yaml import YAMLError

from src.runs.find import RunFolder

FOLDERS = re.compile(  # of a path in quotes, which may hold spaces, and of any other
    r"""(?<=')[~.]{0,2}/[^']*/(?=[^'/]+')|(?<=")[~.]{0,2}/[^"]*/(?=[^"/]+")"""
    r"""|(?<![\w.'"])[~.]{0,2}/[^\s'",\[\]{}]*/(?=[^/\s'",\[\]{}]+)"""
)
TEMPLATE = Path(__file__).with_name("model_card.jinja")
KINDS = {
    "sft": "A language model fine-tuned on text.",
    "reward": "A reward model: a sequence classifier with one output, trained on pairs of preferred and other text.",
    "ppo": "A language model trained with PPO against a reward.",
}
TITLES = {"sft": "fine-tuned", "reward": "reward model", "ppo": "trained with PPO"}
LOAD = {
    "text-generation": """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
ids = tokenizer("...", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids)[0]))  # samples as in training: generation_config.json""",
    "text-classification": """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model, tokenizer = AutoModelForSequenceClassification.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
ids = tokenizer("..." + tokenizer.eos_token, return_tensors="pt")  # texts end with the end token
print(model(**ids).logits[0, 0])""",
}


def model_card(run: RunFolder, adapter: bool, iteration: int | None) -> ModelCard:
    """The card of a run's model; `iteration` is that of its checkpoint, None when the run is finished."""
    base, task = run.before, "text-classification" if run.stage == "reward" else "text-generation"
    license = license_of(base)
    on_hub = base is not None and not _is_local(base)
    data = ModelCardData(
        base_model=base if on_hub else None, license=license, library_name="transformers", pipeline_tag=task,
        tags=[run.stage, "lightning-ppo"],
    )  # fmt: skip
    settings = run.config.plain()
    result = run.result()
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=f"{settings['model']['name']}, {TITLES[run.stage]}",
        stage=run.stage,
        summary=KINDS[run.stage] + (f" Exported from the checkpoint of step {iteration} of an unfinished run." if iteration else ""),  # noqa: E501
        data={k: _without_folders(v) for k, v in settings["data"].items() if not (isinstance(v, dict) or k.startswith("_") or "${" in str(v))},  # noqa: E501
        choices={group: option for group, option in settings["choices"].items() if option != "none"},
        command=" ".join([f"python -m src.train stage={run.stage}", *map(_without_folders, _without_stage(run))]),
        seed=run.config.seed,
        commit=result.get("git_revision"),
        rows=rows(result),
        results_note="`improvement` is PPO minus the reference, prompt by prompt." if run.stage == "ppo" and result else
        "the run is not finished." if not result else "Held-out rows; docs/results_format.md says what each figure is.",
        base_note=_base_note(base),
        license_note=f"License of the base model: {license}." if license else
        "License: to be filled in (`license:` at the top of this file) by whoever publishes the model.",
        code=LOAD[task].replace("FOLDER", '"..."'),
        adapter_note="`adapter/` holds the same policy as a LoRA adapter (peft) on " +
        (f"`{base}`." if on_hub else "the model it started from.") + _held_note(run.config.model.quantize)
        if adapter else "",
    )  # fmt: skip


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure of a result with its interval and n."""
    found = []
    for group, figures in result.items():
        if isinstance(figures, dict) and "interval" in figures:
            for name in figures["n"]:
                ends = figures["interval"].get(name)
                interval = "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
                line = {"name": f"{group}.{name}", "value": f"{figures[name]:.3f}", "interval": interval}
                found.append(line | {"n": figures["n"][name]})
    return found


def license_of(base: str | None) -> str | None:
    """The license in the base model's card, which is in its folder or in the hub's cache; None if it cannot be read."""
    if base is None:
        return None
    card = Path(base) / "README.md"
    if not card.is_file():
        cached = None if _is_local(base) else try_to_load_from_cache(base, "README.md")
        if not isinstance(cached, str):
            return None
        card = Path(cached)
    try:
        return ModelCard.load(card).data.license
    except (ValueError, OSError, YAMLError):
        return None


def _base_note(base: str | None) -> str:
    """Where the weights began; paths of this machine are not published."""
    if base is None:
        return "Trained from scratch, on the data named above."
    if not _is_local(base):
        return f"Started from `{base}`."
    config = Path(base).parent / "config.yaml"
    stage = OmegaConf.load(config).get("stage") if config.is_file() else None
    return f"Started from {f'the model of a run of stage={stage}' if stage else f'a folder, `{Path(base).name}`'}."


def _held_note(quantize: str | None) -> str:
    """How the base must be held for the adapter; nothing for plain weights."""
    return "" if quantize is None else f" It was trained on this base in {quantize}; on others it is another model."


def _is_local(path: str) -> bool:
    """Whether a path is a folder, also one that is gone, and not the name of a model on the hub."""
    return Path(path).exists() or Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1


def _without_folders(setting: Any) -> Any:
    """A setting with the last part of each path alone, in lists too."""
    if isinstance(setting, list):
        return [_without_folders(one) for one in setting]
    return FOLDERS.sub("", setting) if isinstance(setting, str) else setting


def _without_stage(run: RunFolder) -> list[str]:
    return [override for override in run.config.overrides if not override.startswith("stage=")]
