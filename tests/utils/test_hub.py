"""The hub without a network: whether names are looked for in the cache alone."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, is_offline_mode

from src.utils import hub
from src.utils.hub import for_hub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names whose addresses were asked for; the one with `gone` has none."""
    names: list[str] = []

    def address(name: str, port: Any) -> list[str]:
        names.append(name)
        if "gone" in name:
            raise socket.gaierror(-2, "Name or service not known")
        return [name]

    monkeypatch.setattr(socket, "getaddrinfo", address)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ASKED", False)
    return names


@pytest.mark.parametrize(("endpoint", "offline"), [("https://hub.gone", True), ("https://mirror.there:8443/x", False)])
def test_without_an_address_only_the_cache_is_read(
    endpoint: str, offline: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert for_hub("openai-community/gpt2") == "openai-community/gpt2"
    assert is_offline_mode() == offline
    assert len(asked) == 1


def test_a_network_that_comes_back_is_used(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user's environment asks for the cache alone."""
    for endpoint, offline in (("https://hub.gone", True), ("https://hub.there", False)):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        for_hub("openai-community/gpt2")
        assert is_offline_mode() == offline
    monkeypatch.setattr(hub, "ASKED", True)
    for_hub("openai-community/gpt2")
    assert is_offline_mode()


def test_neither_a_local_folder_nor_a_proxy_asks(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.gone")
    assert for_hub(str(tmp_path)) == str(tmp_path)
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    for_hub("openai-community/gpt2")
    assert asked == []
    assert not is_offline_mode()
