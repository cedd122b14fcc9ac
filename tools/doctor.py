#!/usr/bin/env python
"""Look for what would make a launch fail, hang or be slow: on this machine, or on all hosts of a hostfile.

A line a check: ok, FAIL or skip, the hosts, what was looked at, and for FAIL what to do.
"""

import argparse
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

from megakexue import doctor, launcher
from megakexue.config import Config, EngineConfig, UserError, as_integer, as_number, load_config, require, run_program
from megakexue.doctor import Check
from megakexue.facts import REMEDIES, ROOT, host_facts
from megakexue.files import read_json
from megakexue.hosts import Host, hosts_variable, passed, read_hostfile, ssh_command
from megakexue.text.manifest import check_inputs

EPILOG = """\
With a hostfile (lines such as `n1 slots=8`) each host is asked by ssh, with the environment that launch/cluster.py
gives to a run, but no credentials. A host that does not answer fails its own lines, and the others are still looked at.
Nothing is left behind. Without CONFIG the run folder, the data and the disk are left out. docs/clusters.md explains
the lines.

examples:
  tools/doctor.py configs/1b.yaml train.run=runs/1b                       this machine alone
  tools/doctor.py configs/1b.yaml train.run=runs/1b --hostfile hosts      all hosts, as the launch will use them
  tools/doctor.py --hostfile hosts --gb-per-s 100                         the network must give 100 GB/s

exit status: 0 all is well, 1 something failed, 2 a mistake in the command, the config or the hostfile
"""
MARK = "megakexue-doctor "
"""Begins each answer of a host: what its login scripts print is none."""
SECRET = ("AWS_", "S3_", "GOOGLE_", "GCS_", "AZURE_", "OCI_", "HF_")
"""Variables that a run needs and the doctor does not: a command line can be seen by all users of a host."""
ASK_S, REDUCE_S, MEET_S = 75.0, 180.0, 60.0
"""Limits of an answer, of the whole all-reduce, and in it of the ranks to meet."""
CLOCK_S = 2.0
"""By which clocks may differ: the times of files and of logs are compared between hosts."""
LOGIN = {
    "Permission denied": "`ssh-copy-id {host}`, with a key that asks for no passphrase",
    "Host key verification": "`ssh {host}` once by hand, and accept its key",
    "Could not resolve": "add `ADDRESS {address}` to /etc/hosts, or correct the name in the hostfile",
    "": "see that {host} runs and has sshd: `ping {address}`, then `ssh -v {host}`",
}
"""What to do, by what ssh says."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="*", metavar="CONFIG KEY=VALUE", help="those of launch/train.py")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="look at all hosts of it (default: this one)")
    parser.add_argument(
        "--port", type=as_integer, default=29500, metavar="N", help="where ranks meet on the first host (29500)"
    )
    parser.add_argument("--gb-per-s", type=as_number, metavar="N", help="least bus bandwidth of the all-reduce")
    parser.add_argument("--on-host", action="store_true", help=argparse.SUPPRESS)  # answers another doctor
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)  # a rank of its all-reduce
    return parser.parse_intermixed_args()


# --- on each host ----------------------------------------------------------------------------------------------------


def answer_all(words: list[str]) -> None:
    """Answer the requests on stdin, a line each, until the doctor that asks has gone."""
    with ExitStack() as held:
        answers: dict[str, Callable[..., Any]] = {
            "checks": partial(check_host, words), "hold": partial(doctor.hold, held), "seek": doctor.seek,
            "listen": partial(doctor.listen, held), "reach": doctor.reach, "release": held.close, "reduce": start_ranks,
        }  # fmt: skip
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = answers[request.pop("do")](**request)
            except (OSError, UserError) as error:
                answer = Check(False, str(error), "see that this user may do that there")
            print(f"{MARK}{json.dumps([time.time(), answer])}", flush=True)
    os._exit(0)  # a check that hangs must not keep the process


def check_host(words: list[str], n_slots: int | None, world_size: int, checkpoint_bytes: int) -> dict[str, Any]:
    """All checks of this host alone, and what must be equal on all."""
    facts: dict[str, str] = {}
    checks: dict[str, Callable[[], Check]] = {
        "name": doctor.own_address, "interface": doctor.interfaces, "limits": partial(doctor.limits, world_size),
        "extensions": doctor.extension_locks, "compile cache": doctor.compile_cache,
        "shared memory": doctor.shared_memory, "GPUs": partial(doctor.gpu_health, n_slots),
    }  # fmt: skip

    def load() -> Check:
        # code and versions are the same with any config
        config = load_config(words[0], words[1:]) if words else load_config(ROOT / "configs" / "tiny_gqa.yaml", [])
        of_config = () if words else ("config", "data", "tokenizer")
        facts.update({name: value for name, value in host_facts(config).items() if not name.startswith(of_config)})
        if not words:
            return Check(None, "no CONFIG was given")
        checks.update({
            "data": partial(data, config), "run folder": partial(doctor.run_folder, config),
            "locks": partial(doctor.file_locks, config), "disk": partial(doctor.disk, config, checkpoint_bytes),
        })  # fmt: skip
        return Check(True, f"{words[0]} is valid")

    found = doctor.run_checks({"config": load})
    found |= doctor.run_checks(dict(checks))
    gpus: list[dict[str, str]] = []
    with suppress(OSError, subprocess.TimeoutExpired):  # its own line says so
        gpus = doctor.gpus() if found["GPUs"].ok else []
    if gpus:
        facts["device GPUs"] = ", ".join(sorted({f"{gpu['name']} driver {gpu['driver_version']}" for gpu in gpus}))
    return {"checks": found, "facts": facts, "n_gpus": len(gpus)}


def data(config: Config) -> Check:
    """Whether tokenizer, manifests, the first shard of each local source, and the bundle can be read."""
    check_inputs(config)
    local = [Path(source.path) for source in config.data.sources if not source.is_remote]
    for folder in local:
        shard = read_json(folder / "train" / "index.json", "the index of shards")["shards"][0]
        file = shard.get("zip_data") or shard["raw_data"]
        path = folder / "train" / file["basename"]
        if (size := len(path.read_bytes())) != file["bytes"]:
            return Check(False, f"{path} has {size} bytes instead of {file['bytes']}", f"copy {folder} again")
    if config.train.init_from:
        read_json(Path(config.train.init_from, "manifest.json"), "the manifest of train.init_from")
    n_remote = len(config.data.sources) - len(local)
    remote = f"; {n_remote} remote ones are not looked at" if n_remote else ""
    return Check(True, f"tokenizer, manifest and first shard of {len(local)} sources{remote}")


def start_ranks(n: int, environment: dict[str, str]) -> dict[str, list[Any]]:
    """Run this host's ranks of the all-reduce; return what they found, and the last words of those that failed."""
    with ExitStack() as stack:
        ranks = []
        for i in range(n):
            own = {"RANK": str(int(environment["RANK"]) + i), "LOCAL_RANK": str(i), "LOCAL_SIZE": str(n)}
            out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            process = subprocess.Popen(
                [sys.executable, __file__, "--as-rank"], env=os.environ | environment | own, stdin=subprocess.DEVNULL,
                stdout=out, stderr=err,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            ranks.append((process, out, err))
        end = time.monotonic() + REDUCE_S
        while any(process.poll() is None for process, _, _ in ranks) and time.monotonic() < end:
            if select.select([sys.stdin], [], [], 0.1)[0]:
                break  # nothing is asked meanwhile: whoever waits for the answer has gone
        errors = [last_line(err) or "no answer" for process, _, err in ranks if process.poll() != 0]
        return {"errors": errors, "results": [json.loads(last_line(out)) for p, out, _ in ranks if p.poll() == 0]}


def last_line(file: Any) -> str:
    file.seek(0)
    return next((line for line in reversed(file.read().splitlines()) if line.strip()), "")


def reduce_as_rank() -> None:
    """Meet the other ranks as a run does; multiply matrices, add up over ranks, and print what came of it as JSON."""
    import torch
    from torch import distributed

    from megakexue.run import rendezvous

    ranks, backend = launcher.read_ranks(), os.environ["MEGAKEXUE_DOCTOR"]
    device = torch.device("cuda" if backend == "nccl" else "cpu", ranks.local_rank)
    if device.type == "cuda":
        require(torch.cuda.is_available(), f"torch {torch.__version__} cannot use the GPUs that nvidia-smi shows")
        torch.cuda.set_device(device)
    try:
        rendezvous.join(ranks, {}, backend, EngineConfig(rendezvous_s=MEET_S, timeout_s=MEET_S))
    except rendezvous.NotAllHere as error:
        raise UserError(str(error)) from error
    hosts, n = launcher.host_of_each_rank(), ranks.world_size
    groups = {host: distributed.new_group([i for i in range(n) if hosts[i] == host]) for host in dict.fromkeys(hosts)}
    # small whole numbers: their products and sums are exact in any order
    a, b = (torch.randint(-8, 9, (1024, 1024), dtype=torch.float32) for _ in range(2))
    is_product = torch.equal((a.to(device) @ b.to(device)).cpu().double(), a.double() @ b.double())
    pattern = torch.arange(2**26 if device.type == "cuda" else 2**22, device=device) % 100
    values = (pattern + ranks.rank).float()
    distributed.all_reduce(values)
    is_sum = torch.equal(values, (n * pattern + n * (n - 1) // 2).float())

    def rate(group: Any, size: int) -> float:
        """GB/s that each link carries: 2 (n - 1) / n of the bytes (nccl-tests' bus bandwidth)."""
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            distributed.all_reduce(values, group=group)
            values[-1].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        return 2 * (size - 1) / size * values.nbytes / min(seconds) / 1e9

    values.zero_()
    rates = [rate(groups[hosts[ranks.rank]], ranks.local_world_size), rate(None, n)]
    print(json.dumps({"rank": ranks.rank, "product": is_product, "sum": is_sum, "rates": rates}), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


# --- the doctor that asks --------------------------------------------------------------------------------------------


class Session:
    """A doctor on one host, which answers one request at a time and ends with this process."""

    def __init__(self, command: list[str]) -> None:
        self.errors, self.clock_s = tempfile.TemporaryFile("w+"), -float("inf")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """Return the answer. Raises TimeoutError: there is none, and there will be none to other requests."""
        assert self.process.stdin is not None and self.process.stdout is not None
        limit_s = 2 * REDUCE_S if request["do"] == "reduce" else ASK_S
        timer = Timer(limit_s, self.process.kill)
        timer.start()
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            while line := self.process.stdout.readline():
                if line.startswith(MARK):
                    sent, answer = json.loads(line.removeprefix(MARK))
                    # by the answer that was quickest on its way
                    self.clock_s = max(self.clock_s, sent - time.time())
                    return answer
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        self.close()
        raise TimeoutError(last_line(self.errors) or f"no answer within {limit_s:g} s")

    def leave(self) -> None:
        """Let it end by itself: its ranks and what it holds end with it."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> None:
        """End it, at the latest after 5 s."""
        self.leave()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Hosts:
    """All hosts, and a session with each that still answers."""

    def __init__(self, hosts: Mapping[str, Host | None], words: list[str]) -> None:
        self.hosts, self.words, self.n_failed = hosts, words, 0
        self.sessions: dict[str, Session] = {}

    def say(self, name: str, checks: Mapping[str, Any]) -> None:
        """Print what was found: hosts with the same finding in one line."""
        alike: dict[Check, list[str]] = {}
        for host, check in checks.items():
            alike.setdefault(Check(*check), []).append(host)
        for (ok, text, fix), hosts in alike.items():
            who = ", ".join(hosts[:3]) + f" and {len(hosts) - 3} more" * (len(hosts) > 3)
            word = "skip" if ok is None else "ok" if ok else "FAIL"
            remedy = f". Fix: {fix}" if ok is False else ""
            print(f"{word:<5} {who:<8} {name}: {' '.join(text.split())}{remedy}", flush=True)
            self.n_failed += ok is False

    def ask(
        self, do: str, hosts: Collection[str] | None = None, own: Callable[[str], Any] = lambda _: {}, **request: Any
    ) -> dict[str, Any]:
        """Ask all hosts at once, and return their answers. One that has none fails, and is asked no more.

        Args:
            hosts: None: all that still answer.
            own: what is asked of one host alone, by its name.
        """

        def ask_one(host: str) -> tuple[str, Any]:
            try:
                return host, self.sessions[host].ask({"do": do} | request | own(host))
            except TimeoutError as error:
                return host, error

        asked = [host for host in self.sessions if hosts is None or host in hosts]
        with ThreadPoolExecutor(1000) as pool:
            try:
                found = dict(pool.map(ask_one, asked))
            except KeyboardInterrupt:
                for host in asked:
                    self.sessions[host].leave()  # or the pool would wait for their answers
                raise
        for host, error in [(host, answer) for host, answer in found.items() if isinstance(answer, TimeoutError)]:
            del found[host], self.sessions[host]
            fix = f"see that {sys.executable} runs {Path(__file__).resolve()} in {Path.cwd()} there, and nothing hangs"
            self.say("answer", {host: Check(False, f"to {do!r}: {error}", fix)})
        return found

    def close(self) -> None:
        for session in self.sessions.values():
            session.close()

    def open(self) -> None:
        """Log in to all hosts, and start a doctor on each."""
        command = [sys.executable, str(Path(__file__).resolve()), *self.words, "--on-host"]
        remote = {name: host for name, host in self.hosts.items() if host is not None and not host.is_here}
        with ThreadPoolExecutor(1000) as pool:
            logins = dict(zip(remote, pool.map(login, remote.values())))
        self.say("ssh", logins)
        environment = {name: value for name, value in passed(os.environ).items() if not name.startswith(SECRET)}
        for name in self.hosts:
            if name not in remote:
                self.sessions[name] = Session(command)
            elif logins[name].ok:
                self.sessions[name] = Session(ssh_command(remote[name], command, env=environment, folder=Path.cwd()))


def login(host: Host) -> Check:
    """Whether ssh gets to a host without a question."""
    try:
        done = subprocess.run(
            ssh_command(host, ["true"]), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ASK_S
        )
    except subprocess.TimeoutExpired:
        return Check(False, f"no login within {ASK_S:g} s", LOGIN[""].format(host=host.name, address=host.address))
    if done.returncode == 0:
        return Check(True, "a login asks no questions")
    fix = next(fix for part, fix in LOGIN.items() if part in done.stderr)
    return Check(
        False,
        (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1],
        fix.format(host=host.name, address=host.address),
    )


# --- what hosts must have in common ----------------------------------------------------------------------------------


def compare(hosts: Hosts, facts: dict[str, dict[str, str]]) -> None:
    """What must be equal: a line for each kind of facts."""
    names = list(dict.fromkeys(name for own in facts.values() for name in own))
    for kind in dict.fromkeys(name.split()[0] for name in names):
        own = [name for name in names if name.split()[0] == kind]
        differing = [name for name in own if len({of.get(name) for of in facts.values()}) > 1]
        check = Check(True, f"{len(own)} value{'s' if len(own) > 1 else ''}")
        if differing:
            by_value: dict[str, str] = {}
            for host, of in facts.items():
                by_value.setdefault(of.get(differing[0]) or "none", host)
            told = ", ".join(f"{host} has {value}" for value, host in by_value.items())
            more = f"; and {len(differing) - 1} more" if len(differing) > 1 else ""
            check = Check(False, f"{differing[0].partition(' ')[2]}: {told}{more}", REMEDIES[kind])
        hosts.say(f"same {kind}", {"all": check})


def compare_clocks(hosts: Hosts) -> None:
    """The way of an answer back to this host makes a clock look late, by much less than what may differ."""
    first, *others = hosts.sessions
    found = {}
    for host in others:
        ahead = hosts.sessions[host].clock_s - hosts.sessions[first].clock_s
        text, fix = f"within {CLOCK_S:g} s of {first}'s", "`timedatectl set-ntp true` on both, or start chrony"
        is_near = abs(ahead) < CLOCK_S
        found[host] = Check(is_near, text if is_near else f"{ahead:+.1f} s from {first}'s", fix)
    hosts.say("clock", found)


def share_folder(hosts: Hosts, run: str) -> None:
    """Whether train.run is one folder: a file that the first host writes and locks is there on the others."""
    first, *others = hosts.sessions
    token = secrets.token_hex(8)
    path = hosts.ask("hold", [first], run=run, token=token).get(first)
    if isinstance(path, str):
        hosts.say("shared", hosts.ask("seek", others, path=path, token=token, first=first))
        hosts.ask("release", [first])
    else:
        hosts.say("shared", {first: Check(None, f"no file can be written for the others: {path and path[1]}")})


def find_port(hosts: Hosts, wanted: int, master: str) -> int:
    """Look at the port of the rendezvous; return one of the first host at which ranks can meet."""
    first, *others = hosts.sessions
    port = hosts.ask("listen", [first], port=wanted).get(first)
    fix = f"end what has it (`ss -ltnp sport = :{wanted}`), or choose another (--port here, --master_port of a launch)"
    if isinstance(port, int):
        hosts.say("port", {first: Check(True, f"{wanted} is free")})
    else:
        hosts.say(
            "port", {first: Check(False, f"{wanted} cannot be served: {port and port[1].partition(' (')[0]}", fix)}
        )
        port = hosts.ask("listen", [first], port=0).get(first, wanted)
    hosts.say("port", hosts.ask("reach", others, host=master, port=port))
    hosts.ask("release", [first])
    return port


def all_reduce(hosts: Hosts, n_gpus: dict[str, int], address: tuple[str, int], least: float | None) -> None:
    """Add up over all ranks of the hosts that answer: right sums and products, and how fast."""
    is_gpu = all(n_gpus.values())
    ranks = [
        Host(name, host.slots if host else n_gpus[name]) if is_gpu else Host(name, min(host.slots if host else 2, 2))
        for name, host in hosts.hosts.items() if name in hosts.sessions
    ]  # fmt: skip
    if not ranks:
        return
    world = sum(host.slots for host in ranks)
    shared = {
        "WORLD_SIZE": str(world), "MASTER_ADDR": address[0], "MASTER_PORT": str(address[1]),
        "MEGAKEXUE_HOSTS": hosts_variable(ranks), "MEGAKEXUE_DOCTOR": "nccl" if is_gpu else "gloo",
    }  # fmt: skip
    own = {
        host.name: {"n": host.slots, "environment": shared | {"RANK": str(sum(other.slots for other in ranks[:i]))}}
        for i, host in enumerate(ranks)
    }  # fmt: skip
    answers = hosts.ask("reduce", own=lambda host: own[host])
    sizes = [f"{n} {name}{'s' if n > 1 else ''}" for n, name in ((world, "rank"), (len(ranks), "host"))]
    what = f"{' on '.join(sizes)} over {shared['MEGAKEXUE_DOCTOR']}"
    errors = [f"{host}: {error}" for host, answer in answers.items() for error in answer["errors"]]
    results = [result for answer in answers.values() for result in answer["results"]]
    fix = "first what fails above; then try again with NCCL_DEBUG=INFO, or with TORCH_CPP_LOG_LEVEL=INFO for gloo"
    failed = Check(False, f"{what}: {'; '.join(errors[:2]) or 'a host did not answer'}", fix)
    hosts.say("all-reduce", {"all": failed if errors or len(answers) < len(ranks) else judge(results, what, least)})


def judge(results: list[dict[str, Any]], what: str, least: float | None) -> Check:
    """What the results of all ranks say together."""
    for key in ("product", "sum"):
        if wrong := [result["rank"] for result in results if not result[key]]:
            fix = "take the hosts of these ranks out, and have their GPUs, memory and network tested"
            return Check(False, f"{what}: wrong {key} on ranks {wrong}", fix)
    # a host of one rank has no rate of its own
    inside, every = (min([rate for result in results if (rate := result["rates"][i])], default=0.0) for i in (0, 1))
    rates = f"bus bandwidth {every:.3g} GB/s over all" + f", {inside:.3g} GB/s within a host" * (inside > 0)
    text = f"{what}: right sums and products; {rates if len(results) > 1 else 'no bandwidth of one rank'}"
    fix = f"below --gb-per-s {least}: name the fast network with NCCL_SOCKET_IFNAME or NCCL_IB_HCA (NCCL_DEBUG=INFO)"
    return Check(least is None or len(results) < 2 or every >= least, text, fix)


def checkpoint_bytes(config: Config) -> int:
    """Of a whole checkpoint: masters, or in fp32 the weights themselves, and the optimizer's state."""
    from megakexue.core.describe import model_state_bytes, n_parameters
    from megakexue.core.resolve import resolve_config

    resolved = resolve_config(config)
    return 4 * n_parameters(resolved.model) + model_state_bytes(resolved, 1)["optimizer"]


def main() -> None:
    args = parse_arguments()
    if args.as_rank:
        return reduce_as_rank()
    if args.on_host:
        return answer_all(args.config)
    require(0 < args.port < 2**16, f"--port {args.port} must be from 1 to 65535")
    config = load_config(args.config[0], args.config[1:]) if args.config else None
    listed = read_hostfile(args.hostfile) if args.hostfile else []
    hosts = Hosts({host.name: host for host in listed} or {socket.gethostname(): None}, args.config)
    try:
        examine(hosts, config, args)
    finally:
        hosts.close()
    print(f"{hosts.n_failed} of the lines above say FAIL" if hosts.n_failed else "all is well")
    sys.exit(1 if hosts.n_failed else 0)


def examine(hosts: Hosts, config: Config | None, args: argparse.Namespace) -> None:
    """Look at everything, and print it."""
    hosts.open()
    size = checkpoint_bytes(config) if config else 0  # torch is imported while the hosts start
    slots = {name: {"n_slots": host.slots if host else None} for name, host in hosts.hosts.items()}
    world = sum(host.slots if host else 8 for host in hosts.hosts.values())
    found = hosts.ask("checks", own=lambda host: slots[host], world_size=world, checkpoint_bytes=size)
    for name in dict.fromkeys(name for answer in found.values() for name in answer["checks"]):
        if name != "name" or len(hosts.hosts) > 1:  # nobody else is told it
            hosts.say(name, {h: answer["checks"][name] for h, answer in found.items() if name in answer["checks"]})
    if len(hosts.sessions) > 1:
        compare(hosts, {host: answer["facts"] for host, answer in found.items()})
        compare_clocks(hosts)
        if config:
            share_folder(hosts, config.train.run)
    if hosts.sessions:
        first = hosts.hosts[next(iter(hosts.sessions))]
        master = first.address if first and len(hosts.sessions) > 1 else "127.0.0.1"
        port = find_port(hosts, args.port, master)
        all_reduce(hosts, {host: found[host]["n_gpus"] for host in hosts.sessions}, (master, port), args.gb_per_s)


if __name__ == "__main__":
    run_program(main)
