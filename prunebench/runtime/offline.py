"""Stages never use the network.

Everything they need is fetched before (`prunebench assets fetch`). Libraries that would fetch for
themselves (pretrained weights, telemetry) must fail at once and by name: compute nodes often have
no way out, and a download that nobody verified would end up in a result.
"""

import ipaddress
import os
import sys

from prunebench.errors import UserError

VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def forbid_network() -> None:
    """From now on, a connection from Python to another machine raises UserError.

    Cannot be undone in this process. Connections within the machine, and those that torch's
    distributed training makes in its own C++ code, are not concerned.
    """
    os.environ.update(VARIABLES)
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple) -> None:
    if event == "socket.connect" and _remote(arguments[1]):
        raise UserError(
            f"something tried to connect to {arguments[1][0]}: stages never use the network; what "
            "they need is fetched before, with `prunebench assets fetch` or `snakemake assets`"
        )
    if event == "socket.getaddrinfo" and arguments[0] and _foreign(arguments[0]):
        raise UserError(
            f"something looked up the address of {_text(arguments[0])}: stages never use the "
            "network; what they need is fetched before, with `prunebench assets fetch`"
        )


def _remote(address: object) -> bool:
    return isinstance(address, tuple) and _foreign(address[0])


def _foreign(host: str | bytes) -> bool:
    name = _text(host).partition("%")[0]
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name not in ("localhost", "", os.uname().nodename)
    return not (address.is_loopback or address.is_unspecified)


def _text(host: str | bytes) -> str:
    return host.decode(errors="replace") if isinstance(host, bytes) else host
