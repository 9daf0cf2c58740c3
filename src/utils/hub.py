"""The hub without a network: its cache at once, instead of half a minute of retries."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that git has not fetched
LFS_PULL = "run `git lfs pull` in its folder, or fetch it by `hf download`"
ASKED = constants.HF_HUB_OFFLINE  # by the user's environment


def for_hub(name: str) -> str:
    """The same name of a model or data set; before one of the hub is looked for, without a network, only its cache is.

    The network is absent while the hub's own name has no address; behind a proxy, nothing is assumed.
    """
    proxied = {"http", "https", "all"} & set(getproxies())
    if not os.path.exists(os.path.expanduser(name)) and not proxied:
        constants.HF_HUB_OFFLINE = ASKED or not _has_address(constants.ENDPOINT)
    return name


def _has_address(url: str) -> bool:
    try:
        return bool(socket.getaddrinfo(urlsplit(url).hostname, None))
    except OSError:
        return False
