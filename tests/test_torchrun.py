"""Two machines, as two agents of torchrun that meet on this machine's loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from tests.test_ddp_runs import PPO, ROOT, SHORT, TINY, assert_same_run, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_machines_train_as_one_process(tmp_path: Path, trainer: str) -> None:
    """Checklist 48. Each agent starts one process; the first writes the files."""
    sft = run(tmp_path, "sft")
    given = [*PPO, f"model.path={sft / 'model'}"]
    one = run(tmp_path / "one", "ppo", *given)
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{find_free_network_port()}"]
    agent += ["--local-addr", "127.0.0.1", "-m", "src.train", *TINY, *given, *[o for o in SHORT if o[:4] == "ppo."]]
    agent += [f"trainer={trainer}", "trainer.devices=1", "trainer.num_nodes=2", "name=x", f"log_dir={tmp_path / 'two'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    agents = [
        subprocess.Popen(agent, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=600) for process in agents]
    assert [process.returncode for process in agents] == [0, 0], said
    assert "".join(out for out, _ in said).count("result.json") == 1
    assert_same_run(one, tmp_path / "two/ppo/x", "adapter/adapter_model.safetensors")
