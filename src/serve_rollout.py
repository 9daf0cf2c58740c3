"""Serve rollouts by vLLM, for `engine=vllm_server`.

python -m src.serve_rollout MODEL
python -m src.serve_rollout MODEL --port 8001 --dtype bfloat16 --max-tokens 2048 -- --tensor-parallel-size 2

MODEL is the folder, or the name on the hub, of the model that the run trains: a run gives its weights to the server
before it asks for the first response. The server listens on this machine only. Whoever reaches its port can load
weights into it: open it with --host in a network of your own alone. What follows `--` goes to vLLM's server as it is.
GET /health answers while it is up; Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import os
import sys

from src.models.loading import load_decoder_config
from src.rollout.engines.vllm_options import arguments, environment, refuse_heads, require_vllm
from src.utils.exits import friendly_errors
from src.utils.output import set_up_output


def command(model: str, host: str, port: int, dtype: str, longest: int | None, cache_gb: float) -> list[str]:
    """The command of vLLM's own server."""
    given = arguments(dtype, longest, cache_gb) | {"model": model, "host": host, "port": port}
    words = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--enable-scale-out",
        "--disable-uvicorn-access-log",
    ]
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [] if value is None or value is False else [flag, str(value)]
    return words


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.serve_rollout", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder, or name on the hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="as model.dtype")
    parser.add_argument("--max-tokens", type=int, help="longest prompt and response together (default: the model's)")
    parser.add_argument("--cache-gb", type=float, default=1.0, help="memory for keys and values in GB (default: 1)")
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    given, others = parser.parse_args(own), sys.argv[len(own) + 2 :]
    set_up_output()
    with friendly_errors(own):
        require_vllm()
        refuse_heads(load_decoder_config(given.model))  # one sentence, also where there is no such model
        words = command(given.model, given.host, given.port, given.dtype, given.max_tokens, given.cache_gb)
        os.execve(words[0], [*words, *others], os.environ | environment() | {"VLLM_SERVER_DEV_MODE": "1"})


if __name__ == "__main__":
    main()
