"""Train one stage: `python -m src.train stage=sft|reward|ppo` (default ppo).

    python -m src.train                                     the embedded default
    python -m src.train model=gpt2 ppo.clip=0.2             another model, another knob
    python -m src.train -m ppo.clip=0.1,0.2 seed=1,2        a sweep
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src.artefacts import ensure
from src.callbacks.checkpoint import checkpoints
from src.report import friendly_errors, quiet_libraries, report, write_result
from src.utils.config import compose, instantiate
from src.preflight import preflight
from src.utils.run_folder import run_folder


def train(config: DictConfig) -> dict[str, Any]:
    """Run the stage that `config` describes in `config.run_dir`; returns what `result.json` holds."""
    started = time.perf_counter()
    folder = Path(config.run_dir)
    preflight(config)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "config.yaml")
    corpus = instantiate(config.data)
    tokenizer = instantiate(config.tokenizer)(corpus=corpus)
    datamodule = instantiate(config.datamodule)(corpus=corpus, tokenizer=tokenizer)
    module = instantiate(config.module)(tokenizer=tokenizer)
    trainer = instantiate(config.trainer)(
        callbacks=list(instantiate(config.callbacks).values()), logger=list(instantiate(config.logger).values())
    )
    saved = checkpoints(folder / "checkpoints") if config.resume == "auto" else []
    trainer.fit(module, datamodule=datamodule, ckpt_path=saved[-1] if saved else None, weights_only=True)
    module.save(folder)
    trainer.test(module, datamodule=datamodule, verbose=False)
    result = write_result(folder, config, module.result(), time.perf_counter() - started)
    report(folder, module)
    return result


def run(overrides: list[str]) -> dict[str, Any]:
    """Compose, make what is missing, and train."""
    config = compose(overrides)
    config.run_dir = str(run_folder(Path(config.log_dir) / config.stage, config.name, overrides, config.resume))
    preflight(config)
    ensure(config, train)
    return train(config)


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(config: DictConfig) -> float:
    """Entry of the command line; returns the figure that sweepers maximise (`sweep_metric`)."""
    quiet_libraries()
    with friendly_errors():
        result = run(list(HydraConfig.get().overrides.task))
    group, name = config.sweep_metric.split(".")
    return float(result[group][name])


if __name__ == "__main__":
    main()
