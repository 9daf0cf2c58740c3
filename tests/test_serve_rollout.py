"""The command that starts a rollout server: what it starts, and what it refuses."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from src import serve_rollout
from src.rollout.engines import vllm_options
from tests.tiny import write_lm


def test_it_becomes_vllms_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that a run relies on; what follows `--` is passed on."""
    called: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: called.append(given))
    monkeypatch.setattr(vllm_options, "find_spec", lambda _: True)
    monkeypatch.setattr(serve_rollout, "refuse_heads", lambda config: None)
    model = write_lm(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", model, "--port", "8001", "--max-tokens", "64", "--", "--max-num-seqs", "9"])
    serve_rollout.main()
    ((program, words, variables),) = called
    assert words[:3] == [program, "-m", "vllm.entrypoints.openai.api_server"]
    given = " ".join(words[3:]) + " "
    for flags in (
        f"--model {model} --host 127.0.0.1 --port 8001 ",
        "--dtype float32 --max-model-len 64 --kv-cache-memory-bytes 1000000000 ",
        "--logprobs-mode processed_logprobs --generation-config vllm ",
        "--worker-extension-cls src.rollout.engines.vllm_worker.PolicyWorker ",
        "--enable-scale-out ",
        "--seed 0 ",
    ):
        assert flags in given
    assert given.endswith("--max-num-seqs 9 ")
    assert variables["VLLM_SERVER_DEV_MODE"] == "1"


@pytest.mark.parametrize(
    ("model", "installed", "said"),
    [("FOLDER", None, "error: vLLM is not installed here"), ("./none", True, "error: no usable model at './none'")],
)
def test_what_cannot_be_started_is_one_sentence(
    model: str, installed: Any, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_options, "find_spec", lambda _: installed)
    monkeypatch.setattr(sys, "argv", ["x", model])
    with pytest.raises(SystemExit) as caught:
        serve_rollout.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(said)
