"""What can be wrong with a host before a run: one short function for each check. Imports no torch.

tools/doctor.py calls these on every host, compares what hosts must have in common, and prints. A check changes nothing
that stays, and returns `Check`. `run_checks` gives each of them a time limit, since a mount that hangs would hang it.
"""

import fcntl
import os
import resource
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from getpass import getuser
from pathlib import Path
from typing import NamedTuple

from megakexue.config import Config, UserError
from megakexue.files import WITHOUT_LOCKS, lock, writing

LIMIT_S = 20.0
"""In which a check must answer."""
SHM_BYTES = 2**30
"""What NCCL may need in /dev/shm, some 10 MiB for each pair of GPUs and channel."""
GPU_FIELDS = (
    "name", "driver_version", "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown", "clocks_throttle_reasons.hw_power_brake_slowdown",
)  # fmt: skip
"""Of nvidia-smi --query-gpu."""


class Check(NamedTuple):
    """What one check found."""

    ok: bool | None
    """None: there was nothing to look at, and `text` says why."""
    text: str
    fix: str = ""
    """What to do if it is not ok."""


def run_checks(checks: Mapping[str, Callable[[], Check]], limit_s: float = LIMIT_S) -> dict[str, Check]:
    """Run all checks at once; one that fails or hangs is a finding of its own, and leaves the others alone."""
    found: dict[str, Check] = {}

    def run(name: str, check: Callable[[], Check]) -> None:
        try:
            found[name] = check()
        except (OSError, UserError) as error:
            found[name] = Check(False, str(error), "have there what the message names, as on a host where this is ok")
        except Exception as error:  # the other checks are wanted all the same
            found[name] = Check(False, f"the check itself failed: {error!r}", "report it, with this line")

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    end = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = Check(False, f"no answer within {limit_s:g} s", "look for a mount, a name server or a driver that hangs")
    return {name: found.get(name, late) for name in checks}


def standing(path: str | Path) -> Path:
    """The folder itself, or the nearest one above it that exists: the file system on which it would be made."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


# --- files -----------------------------------------------------------------------------------------------------------


def run_folder(config: Config) -> Check:
    """Whether train.run can be written, and no run is in it."""
    run, folder = Path(config.train.run), standing(config.train.run)
    try:
        with writing(f"train.run={run}", folder), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"\0" * 4096)
            os.fsync(file.fileno())
    except UserError as error:
        text, _, remedy = str(error).rpartition(": ")
        return Check(False, text, remedy)
    if (run / "lock").exists() and is_locked(run / "lock"):
        holder = (run / "lock").read_text(errors="replace").strip()
        return Check(False, f"{run} is in use by {holder}", "end that run first, or choose another train.run")
    return Check(True, f"{run} can be written" + ("" if folder == run.absolute() else f", in {folder}"))


def file_locks(config: Config) -> Check:
    """Whether the file systems of the run folder and of the cache of shards have locks."""
    places = {"train.run": config.train.run} | ({"data.cache": config.data.cache} if config.data.cache else {})
    for key, place in places.items():
        try:
            with tempfile.TemporaryFile(dir=standing(place)) as file:
                has_lock = lock(file)
        except OSError as error:
            return Check(None, f"no file can be made for {key}={place}: {error.strerror}")
        if not has_lock:
            fix = "mount it with flock (Lustre: -o flock), or choose another place"
            return Check(False, f"{key}={place} {WITHOUT_LOCKS.format('run')}", fix)
    return Check(True, f"flock works for {' and '.join(places)}")


def disk(config: Config, checkpoint_bytes: int) -> Check:
    """Whether there is room for two checkpoints: an old one is removed only when a new one is whole."""
    free = shutil.disk_usage(standing(config.train.run)).free
    text = f"{_size(free)} free for train.run, two checkpoints take {_size(2 * checkpoint_bytes)}"
    fix = f"make room in {standing(config.train.run)}, or choose another train.run"
    return Check(free >= 2 * checkpoint_bytes, text, fix)


def hold(held: ExitStack, run: str, token: str) -> str:
    """Write and lock a file where the run folder is or will be, for the other hosts to `seek`; return its path."""
    path = standing(run) / f".doctor-{token}"
    file = held.enter_context(open(path, "x+b", buffering=0))
    held.callback(path.unlink)
    file.write(token.encode())
    os.fsync(file.fileno())
    lock(file)
    return str(path)


def seek(path: str, token: str, first: str) -> Check:
    """Look for the file that host `first` holds."""
    folder = Path(path).parent
    if not Path(path).exists() or Path(path).read_text() != token:
        fix = f"mount the file system of {first} there, or put train.run on one that all hosts share"
        return Check(False, f"{folder} is not the same folder as on {first}", fix)
    fix = "mount it with locks that all hosts see (Lustre: -o flock; NFS: version 4, without local_lock)"
    if not is_locked(Path(path)):
        return Check(False, f"a lock (flock) of {first} in {folder} is not seen here", fix)
    return Check(True, f"{folder} and its locks are those of {first}")


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of a file, as far as this host can see."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: NFS wants no right to write for it
        except BlockingIOError:
            return True
        except OSError:
            return False  # there are no locks
    return False


def extension_locks() -> Check:
    """Whether a build of a compiled extension has left its lock, for which every later start would wait for ever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    locks = sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])
    if not locks:
        return Check(True, f"no lock of a compiled extension in {root}")
    minutes = (time.time() - locks[0].stat().st_mtime) / 60
    fix = f"if nothing is being compiled there: rm {' '.join(map(str, locks))}"
    return Check(False, f"{locks[0]} has been there for {minutes:.0f} min, and a start waits until it is gone", fix)


def compile_cache() -> Check:
    """Whether torch.compile can keep what it compiles."""
    default = Path(tempfile.gettempdir(), f"torchinductor_{getuser()}")
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default)
    try:
        with tempfile.TemporaryFile(dir=standing(folder)):
            return Check(True, f"{folder} can be written")
    except OSError as error:
        fix = "set TORCHINDUCTOR_CACHE_DIR to a folder of this host that can be written"
        return Check(False, f"torch.compile cannot write {folder}: {error.strerror}", fix)


# --- the network -----------------------------------------------------------------------------------------------------


def own_address() -> Check:
    """Whether the address of this host's name is one for other hosts: gloo tells it to them."""
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        return Check(False, f"the name {name} has no address here: {error}", f"add `ADDRESS {name}` to /etc/hosts")
    fix = f"in /etc/hosts give {name} the address at which the others reach it; Debian writes 127.0.1.1 there"
    return Check(not address.startswith("127.") and address != "::1", f"the name {name} is {address} here", fix)


def interfaces() -> Check:
    """Whether the network interfaces exist that variables name for NCCL and gloo."""
    known = [name for _, name in socket.if_nameindex()]
    given = {key: os.environ[key] for key in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if os.environ.get(key)}
    for key, value in given.items():
        # NCCL takes beginnings of names, =name for a whole one, and ^name for all but these; gloo takes whole ones
        for name in () if value.startswith("^") else value.lstrip("=").split(","):
            by_start = key.startswith("NCCL") and not value.startswith("=")
            if not any(other.startswith(name) if by_start else other == name for other in known):
                fix = f"set {key} to one of {', '.join(known)}, or unset it"
                return Check(False, f"{key}={value}: there is no interface {name} here", fix)
    told = ", ".join(f"{key}={value}" for key, value in given.items())
    return Check(True, f"{told or 'no variable names one'}; there are {', '.join(known)}")


def listen(held: ExitStack, port: int) -> int:
    """Serve a port for other hosts to `reach`, and return it. 0: any that is free. Raises OSError: it is taken."""
    return held.enter_context(socket.create_server(("", port), backlog=1024)).getsockname()[1]


def reach(host: str, port: int, limit_s: float = 5.0) -> Check:
    """Whether a process here can connect to the first host, where the ranks meet."""
    try:
        with socket.create_connection((host, port), timeout=limit_s) as s:
            return Check(True, f"{host}:{port} is reached, at {s.getpeername()[0]}")
    except OSError as error:
        fix = f"open the ports of {host} for the other hosts, and see that `getent hosts {host}` gives its address here"
        return Check(False, f"{host}:{port} is not reached: {error}", fix)


# --- limits and devices ----------------------------------------------------------------------------------------------


def limits(world_size: int) -> Check:
    """Whether processes may open enough files, and lock memory where there is InfiniBand."""
    files, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 512 + 8 * world_size
    if files != resource.RLIM_INFINITY and files < needed:
        fix = f"`ulimit -n {max(65536, needed)}`, or nofile in /etc/security/limits.conf for logins by ssh"
        return Check(False, f"{files} open files (ulimit -n), {world_size} ranks want {needed}", fix)
    memory = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if not any(Path("/sys/class/infiniband").glob("*")):
        return Check(True, f"{files} open files; no InfiniBand, so locked memory is not looked at")
    fix = "`ulimit -l unlimited`, memlock in /etc/security/limits.conf, or LimitMEMLOCK=infinity for the service"
    told = "unlimited" if memory == resource.RLIM_INFINITY else _size(memory)
    return Check(memory == resource.RLIM_INFINITY, f"{files} open files, {told} of locked memory for InfiniBand", fix)


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU. Raises OSError: it fails, or there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode != 0:
        raise OSError(f"nvidia-smi: {' '.join((done.stdout + done.stderr).split())}")
    return [dict(zip(GPU_FIELDS, map(str.strip, line.split(",")))) for line in done.stdout.splitlines()]


def gpu_health(n_slots: int | None) -> Check:
    """Whether there is a GPU for each slot of the hostfile, and each is healthy by what its driver says."""
    if shutil.which("nvidia-smi") is None:
        return Check(None, "no nvidia-smi here")
    try:
        found = gpus()
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(False, str(error), "restart the driver or the host: `dmesg | grep -i xid` says more")
    kinds = ", ".join(dict.fromkeys(gpu["name"] for gpu in found))
    if len(found) < (n_slots or 1):
        fix = "lower slots= in the hostfile; if a GPU has fallen off the bus, `dmesg | grep -i xid` and a restart"
        return Check(False, f"{len(found)} GPUs for {n_slots or 1} slots: {kinds}", fix)
    for index, gpu in enumerate(found):
        ecc = gpu[GPU_FIELDS[2]]
        if ecc.isdigit() and int(ecc):
            fix = f"take the host out, then `nvidia-smi --gpu-reset -i {index}` or replace the GPU"
            return Check(False, f"GPU {index} has {ecc} uncorrected ECC errors", fix)
        if slow := [name.rpartition(".")[2] for name in GPU_FIELDS[3:] if gpu[name] == "Active"]:
            fix = f"look at its cooling and power: `nvidia-smi -q -d PERFORMANCE -i {index}`"
            return Check(False, f"GPU {index} is slowed down: {', '.join(slow)}", fix)
    return Check(True, f"{len(found)} GPUs ({kinds}, driver {found[0]['driver_version']}), no ECC errors, not slowed")


def shared_memory() -> Check:
    """Whether NCCL has room in /dev/shm."""
    if shutil.which("nvidia-smi") is None:
        return Check(None, "no GPUs, and only NCCL uses /dev/shm")
    free = shutil.disk_usage("/dev/shm").free
    fix = "`mount -o remount,size=16G /dev/shm`; in a container --shm-size=16g, in Kubernetes an emptyDir of Memory"
    return Check(free >= SHM_BYTES, f"{_size(free)} free in /dev/shm, NCCL may take {_size(SHM_BYTES)}", fix)


def _size(n: float) -> str:
    unit, power = next((u, p) for u, p in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if n >= 2**p or p == 10)
    return f"{n / 2**power:.3g} {unit}"
