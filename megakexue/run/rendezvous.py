"""How the ranks find one another and make sure that they belong to one run, before anything is built.

The first rank serves a store at MASTER_ADDR:MASTER_PORT (under torchrun, its agent does). Each rank writes there what
must be equal (megakexue/facts.py). The first rank waits for all of them, names those that do not come within
`engine.rendezvous_s`, compares, and answers each one: go on with so many threads, or why nobody does. The answer has a
key that its rank has made up, so that a process of another run on the same port gets none.

What must stay true: no rank goes on if one of them is missing or differs.
"""

import fcntl
import json
import os
import secrets
import socket
import struct
import sys
import time
from datetime import timedelta
from typing import Any

import torch

from megakexue import facts, launcher
from megakexue.config import EngineConfig, UserError, require
from megakexue.dist import Ranks

KEY = "megakexue/rendezvous"
QUIET_S = 10.0
"""After which the first rank says for whom it waits."""


class NotAllHere(Exception):
    """Ranks are missing, or the first one cannot be reached. One line; exit code 1, since another try may succeed."""


def join(ranks: Ranks, own: dict[str, str], backend: str, config: EngineConfig) -> None:
    """Make the process group of all ranks, once they are known to be equal. CPU threads are those of the first rank.

    Args:
        own: what must be equal, from `facts.host_facts`; empty: only versions and arithmetic are compared.

    Raises:
        UserError: ranks differ, or the launcher's address cannot be used; on the first rank of each host.
        NotAllHere: likewise, for ranks that do not come in time.
        SystemExit: on the others, with the same exit code.
    """
    group: dict[str, Any] = dict(rank=ranks.rank, world_size=ranks.world_size)
    group["timeout"] = timedelta(seconds=config.timeout_s)
    if ranks.world_size == 1:
        # without a port, since another process that starts at the same moment may take the one that was free
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), **group)
        return
    end = time.monotonic() + config.rendezvous_s
    try:
        store = _connect(ranks, end, config.rendezvous_s)
        entry = {"host": socket.gethostname(), "threads": torch.get_num_threads(), "error": _interface_error()}
        entry |= _device(own, ranks)
        answer = _answer(store, ranks, entry, own, end, config.rendezvous_s)
        if answer["error"]:
            raise (NotAllHere if answer["code"] == 1 else UserError)(answer["error"])
    except (NotAllHere, UserError) as error:
        if not ranks.is_first:
            time.sleep(launcher.PATIENCE_S)  # the launcher ends all when one has ended: let the first one speak
        if ranks.local_rank:
            sys.exit(1 if isinstance(error, NotAllHere) else 2)
        raise
    torch.set_num_threads(answer["threads"])
    store.set_timeout(group["timeout"])  # by it, ranks make later groups too, and one of them may still be compiling
    torch.distributed.init_process_group(backend, store=store, **group)


# --- the store -------------------------------------------------------------------------------------------------------


def _connect(ranks: Ranks, end: float, patience_s: float) -> Any:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = ranks.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves:
        require(
            _is_own(address),
            f"MASTER_ADDR={address} is no address of {socket.gethostname()}, where rank 0 runs: set it to this host, "
            "or start rank 0 there",
        )
    own = address if serves else _own_address(address, port, end)
    if own is None:
        raise NotAllHere(
            f"rank {ranks.rank} on {socket.gethostname()} could not reach rank 0 at {address}:{port} within "
            f"engine.rendezvous_s={patience_s:g}: look whether rank 0 runs there, and whether a firewall closes "
            "the port"
        )
    if ranks.local_world_size < ranks.world_size:
        _use_interface(own)
    try:
        store = torch.distributed.TCPStore(
            address, port, ranks.world_size, is_master=serves, wait_for_workers=False, multi_tenant=True,
            timeout=timedelta(seconds=patience_s),
        )  # fmt: skip
        # torchrun's agent may keep its store from one start of the ranks to the next
        n_restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return torch.distributed.PrefixStore(f"restart {n_restarts}", store) if n_restarts != "0" else store
    except RuntimeError as error:
        require(
            "EADDRINUSE" not in str(error) and "in use" not in str(error),
            f"MASTER_PORT={port} is in use on {socket.gethostname()}: another run may have it; choose another one, "
            "with deepspeed or torchrun by --master_port",
        )
        raise NotAllHere(f"what answers at {address}:{port} is not rank 0 of this run: {error}") from error


def _is_own(address: str) -> bool:
    """Whether a name or an address is of this host, as far as it can be resolved."""
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError:
        return True  # a name that is not known yet, which the other ranks may know
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as s:
                s.bind(where)
            return True
        except OSError:
            continue
    return False


def _own_address(address: str, port: int, end: float) -> str | None:
    """Wait until the first rank serves; return the address of this host that leads there. None: it was not in time."""
    while True:
        try:
            with socket.create_connection((address, port), timeout=2) as s:
                return s.getsockname()[0]
        except OSError:
            if time.monotonic() > end:
                return None
            time.sleep(0.1)


def _use_interface(own: str) -> None:
    """Let gloo use the network by which the ranks have met, where the user names none. `own`: the address there.

    It would take the address of the host's name, and /etc/hosts often says 127.0.1.1 for it.
    """
    try:
        address = socket.gethostbyname(own)
    except OSError:
        return
    if address.startswith("127."):
        return  # no other host gets there
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            try:
                reply = fcntl.ioctl(s.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:
                continue  # it has no IPv4 address
        if socket.inet_ntoa(reply[20:24]) == address:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _interface_error() -> str | None:
    known = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in known:
            return f"GLOO_SOCKET_IFNAME={name} is no network interface: choose of {', '.join(known)}, or unset it"
    return None


# --- the comparison --------------------------------------------------------------------------------------------------


def _device(own: dict[str, str], ranks: Ranks) -> dict[str, Any]:
    """Add to the facts what torch knows; return what must differ between ranks of a host."""
    own["version torch, built"] = f"{torch.__version__}, CUDA {torch.version.cuda}"
    own["place world size"] = str(ranks.world_size)
    if not torch.cuda.is_available():
        own["device CPU kernels"] = torch.backends.cpu.get_cpu_capability()
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    own["device GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return {"gpu": str(getattr(properties, "uuid", f"{ranks.local_rank} of {socket.gethostname()}"))}


def _answer(
    store: Any, ranks: Ranks, entry: dict[str, Any], own: dict[str, str], end: float, patience_s: float
) -> dict[str, Any]:
    """Say what this rank is, and return what the first rank answers: `error`, `code` and `threads`."""
    digest, nonce = facts.digest(own), secrets.token_hex(8)
    try:
        if not store.check([f"{KEY}/facts/{digest}"]):
            store.set(f"{KEY}/facts/{digest}", json.dumps(own))
        store.set(f"{KEY}/rank/{ranks.rank}", json.dumps(entry | {"digest": digest, "nonce": nonce}))
        if ranks.is_first:
            return _judge(store, ranks, end, patience_s)
        store.wait([f"{KEY}/answer/{nonce}"], timedelta(seconds=max(1.0, end + launcher.PATIENCE_S - time.monotonic())))
        answer = json.loads(store.get(f"{KEY}/answer/{nonce}"))
        store.add(f"{KEY}/read", 1)
        return answer
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise NotAllHere(
            f"rank 0 at {address} gave rank {ranks.rank} on {entry['host']} no answer within "
            f"engine.rendezvous_s={patience_s:g}: it has ended, or another run has this port or this rank"
        ) from error


def _judge(store: Any, ranks: Ranks, end: float, patience_s: float) -> dict[str, Any]:
    """Wait for all ranks, compare them, and answer each."""
    missing = _wait_for_all(store, ranks.world_size, end)
    entries = {
        rank: json.loads(store.get(f"{KEY}/rank/{rank}")) for rank in range(ranks.world_size) if rank not in missing
    }
    answer = {"error": None, "code": 1, "threads": entries[0]["threads"]}
    if missing:
        come = f"{_names(missing)} did not come within engine.rendezvous_s={patience_s:g}"
        answer["error"] = f"{come}: look whether the start failed there, and whether this host can be reached"
    elif error := _first_error(entries) or _difference(store, entries):
        answer |= {"error": error, "code": 2}
    for entry in entries.values():
        store.set(f"{KEY}/answer/{entry['nonce']}", json.dumps(answer))
    if answer["error"]:
        # the store may be in this process, which stays until the others have read it
        until = time.monotonic() + launcher.PATIENCE_S
        while store.add(f"{KEY}/read", 0) < len(entries) - 1 and time.monotonic() < until:
            time.sleep(0.05)
    return answer


def _wait_for_all(store: Any, world_size: int, end: float) -> list[int]:
    """Return the ranks that are not there at the end; say after a while for whom this one waits."""
    keys = [f"{KEY}/rank/{rank}" for rank in range(world_size)]
    for limit in (min(time.monotonic() + QUIET_S, end), end):
        try:
            store.wait(keys, timedelta(seconds=max(0.1, limit - time.monotonic())))
            return []
        except RuntimeError:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if limit < end and missing:
            print(f"waiting for {_names(missing)}", flush=True)
    return missing


def _names(missing: list[int], shown: int = 4) -> str:
    """Ranks by their hosts, as far as the launcher has said them."""
    hosts = launcher.host_of_each_rank()
    by_host: dict[str, list[int]] = {}
    for rank in missing:
        by_host.setdefault(hosts[rank] if rank < len(hosts) else "", []).append(rank)
    parts = [f"{_numbers(numbers)}{f' on {host}' if host else ''}" for host, numbers in by_host.items()]
    more = f" and those of {len(parts) - shown} more hosts" if len(parts) > shown else ""
    return f"rank{'s' if len(missing) > 1 else ''} {', '.join(parts[:shown])}{more}"


def _numbers(ranks: list[int]) -> str:
    is_range = len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1
    return f"{ranks[0]} to {ranks[-1]}" if is_range else ", ".join(map(str, ranks[:8])) + ", ..." * (len(ranks) > 8)


def _first_error(entries: dict[int, dict[str, Any]]) -> str | None:
    """What a rank cannot start with, or that two of them would share a GPU."""
    gpus: dict[str, int] = {}
    for rank, entry in entries.items():
        if entry["error"]:
            return f"rank {rank} on {entry['host']}: {entry['error']}"
        other = gpus.setdefault(entry["gpu"], rank) if "gpu" in entry else rank
        if other != rank:
            return (
                f"ranks {other} and {rank} use one GPU of {entry['host']}: start one process for each GPU, each with a "
                "LOCAL_RANK of its own"
            )
    return None


def _difference(store: Any, entries: dict[int, dict[str, Any]]) -> str | None:
    of_hosts: dict[str, list[str]] = {}
    for entry in entries.values():
        of_hosts.setdefault(entry["host"], []).append(entry["digest"])
    if len({entry["digest"] for entry in entries.values()}) == 1:
        return None
    named = {}
    for rank, entry in entries.items():
        is_one = len(set(of_hosts[entry["host"]])) == 1
        named[entry["host"] if is_one else f"{entry['host']} rank {rank}"] = entry["digest"]
    contents = {key: json.loads(store.get(f"{KEY}/facts/{key}")) for key in set(named.values())}
    return facts.compare({name: contents[key] for name, key in named.items()})
