"""What runs inside vLLM: loading the policy's weights, and saying what is served. vLLM mixes it into its worker.

Nothing here is imported where vLLM is missing but `fault` and the names.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from src.models.fingerprint import joint
from src.models.loading import load_tokenizer

TESTED = "0.32.0"  # the version of vLLM that `make vllm-check` installs
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
OF_THE_FILE = ("name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
OF_TRAINING = ("_token_id", "dropout", "pdrop", "initializer_range")  # parts of names of what changes no probability


class PolicyWorker:
    """Methods that vLLM adds to its worker, for `collective_rpc`; arguments and results are plain JSON."""

    _serves: str | None = None  # the name of the weights that were loaded last; None: those of the start
    vllm_config: Any
    model_runner: Any

    def take_policy(self, folder: str, name: str) -> None:
        """Load the weights in a Hugging Face folder, unless those of that name are served already.

        vLLM keeps a packed copy of a tied output head, which a reload leaves as it was: it is packed again.
        """
        if name == self._serves:
            return
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        self._serves = None  # what a failed load leaves behind has no name
        self.model_runner.reload_weights(weights_path=folder)
        for module in self.model_runner.get_model().modules():
            if isinstance(module, VocabParallelEmbedding):
                module.quant_method.process_weights_after_loading(module)
        self._serves = name

    def describe(self) -> dict[str, Any]:
        """What is served, by which code."""
        import vllm

        model = self.vllm_config.model_config
        served = description(model.hf_config, str(model.dtype), load_tokenizer(model.tokenizer or model.model))
        context = {"context": model.max_model_len, "logprobs": model.logprobs_mode}
        return served | context | {"vllm": vllm.__version__, "code": CODE, "serves": self._serves}


def description(config: PretrainedConfig, dtype: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What both sides must have in common: architecture, dtype and the ids of all tokens."""
    plain = json.loads(json.dumps(config.to_dict(), default=str))
    structure = {
        key: value
        for key, value in plain.items()
        if not key.startswith("_") and key not in OF_THE_FILE and not any(part in key for part in OF_TRAINING)
    }
    vocabulary = joint(*sorted(tokenizer.get_vocab().items()))
    return {"architecture": structure, "dtype": dtype.removeprefix("torch."), "tokenizer": vocabulary}


def difference(own: dict[str, Any], served: dict[str, Any], longest: int) -> str | None:
    """The first thing in which a server differs from what a run needs, in words; None if there is none.

    Of the architecture, keys that only one side's version of transformers knows are left out.
    """
    wanted = {"vllm": TESTED, "code": CODE, "logprobs": "processed_logprobs"} | own
    names = {"vllm": "version of vLLM", "code": "version of this repository", "logprobs": "kind of log-probabilities"}
    for key in ("vllm", "code", "logprobs", "dtype"):
        if served.get(key) != wanted[key]:
            return f"its {names.get(key, key)} is {_short(served.get(key))}, that of this run {_short(wanted[key])}"
    mine, theirs = own["architecture"], served["architecture"]
    for key in sorted(mine.keys() & theirs.keys()):
        if mine[key] != theirs[key]:
            return f"its model has {key}={theirs[key]}, that of this run {mine[key]}"
    if served["tokenizer"] != own["tokenizer"]:
        return "its tokenizer gives other ids to tokens than that of this run"
    if served["context"] < longest:
        return f"it reads {served['context']} tokens, and this run needs {longest}"
    return None


def _short(value: object) -> str:
    return str(value)[:12]
