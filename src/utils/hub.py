"""The hub without a network: its cache at once, instead of half a minute of retries."""

from __future__ import annotations

import os
import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants


def for_hub(name: str) -> str:
    """The same name of a model or data set; before one of the hub is looked for, without a network, only its cache is.

    The network is taken as absent when the hub's own name has no address; behind a proxy, nothing is assumed.
    """
    if not os.path.exists(os.path.expanduser(name)) and not getproxies() and not _reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
    return name


@cache
def _reachable(address: str) -> bool:
    try:
        return bool(socket.getaddrinfo(urlsplit(address).hostname, None))
    except OSError:
        return False
