"""The policy's weights as a Hugging Face folder, which is what an engine of others reads."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path

from src.errors import ConfigError, EngineError
from src.models.roles import Roles
from src.models.sharding import is_sharded


class PolicyFolder:
    """One folder at a time, in `parent` (None: a temporary folder of this machine).

    A plain folder of merged weights is the one form that serves every architecture: some have no LoRA in vLLM, and
    of others transformers keeps the weights under other names in memory than in a file.
    """

    def __init__(self, parent: str | None) -> None:
        self.parent = parent
        self.name = ""  # of the weights; no two are the same, whatever run wrote them
        self._own: Path | None = None

    @property
    def path(self) -> str:
        """The folder of the present weights. Empty before the first."""
        return "" if self._own is None else str(self._own / self.name)

    def write(self, roles: Roles, policy_version: int) -> str:
        """Write the policy with its tokenizer, remove nothing yet; returns the path.

        Raises `ConfigError` for weights that lie on all ranks, and `EngineError` where nothing can be written.
        """
        if is_sharded(roles):
            raise ConfigError("trainer=fsdp keeps no whole policy on any rank for vLLM to read: use engine=local")
        try:
            if self._own is None:
                parent = None if self.parent is None else Path(self.parent).expanduser()
                if parent is not None:
                    parent.mkdir(parents=True, exist_ok=True)
                self._own = Path(tempfile.mkdtemp(prefix="rollout-", dir=parent)).resolve()
            self.name = f"{policy_version}-{uuid.uuid4().hex}"
            roles.merged_policy().save_pretrained(self.path)
            roles.tokenizer.save_pretrained(self.path)
        except OSError as error:
            raise EngineError(f"the policy's weights cannot be written for the rollout engine: {error}") from error
        return self.path

    def keep_only_this(self) -> None:
        """Remove the folders of earlier weights."""
        for old in self._own.iterdir() if self._own is not None else ():
            if old.name != self.name:
                shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """Remove all of it."""
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
        self._own = None
