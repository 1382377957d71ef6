"""The composition root: `python -m server --data DIR` opens the catalog, warms the base, and serves until
told to stop.
"""

import argparse
import asyncio
import ipaddress
import logging
import os
import signal
import sqlite3
import sys
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from compose import bases, lapack
from compose.clip import Clip
from compose.errors import ComposeError, InvalidRequest
from compose.guiding import attached
from compose.residence import Residence, budget_on, check_room, estimate, golden_on_host
from compose.warm import warm_up
from registry.catalog import Catalog
from registry.errors import Damaged, InvalidFile, InvalidName, Locked, RegistryError
from registry.hub import guard
from registry.hub.endpoint import DEFAULT, endpoint, token_variable
from server import logs, tls, tracing
from server.auth import Tokens
from server.engine import Engine, InProcessEngine
from server.hub import Hubs
from server.options import parse
from server.runner import KEPT
from server.serving import start
from server.telemetry import Telemetry

log = logging.getLogger("atelier")
DRAIN_SECONDS = 30.0
LARGE = 100_000_000
"""Parameters of a base whose steps take so long that nobody notices the event loop between them."""
UNIX = "unix:"
USAGE, INVALID, CONFLICT, UNAVAILABLE = 2, 4, 5, 6
DAMAGED = CONFLICT


async def serve(catalog: Catalog, engine: Engine, *, listen: str, **how: Any) -> None:
    """Serves until SIGTERM or SIGINT, then lets accepted renders finish; `how` is that of `start`."""
    running = await start(catalog, engine, listen=listen, **how)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    scheme = "grpcs://" if how.get("tls") else ""
    where = listen if listen.startswith(UNIX) else f"{listen.rsplit(':', 1)[0]}:{running.port}"
    print(f"listening on {scheme}{where}", flush=True)
    await stop.wait()
    log.info("shutting down; what was accepted has %.0f s to finish", DRAIN_SECONDS)
    await running.stop(DRAIN_SECONDS)


def main(arguments: argparse.Namespace | None = None) -> int:
    """Serves as the command line says; the exit status."""
    arguments = arguments or parse()
    logs.configure(arguments.log_format, arguments.log_level)
    try:
        _check_listen(arguments.listen)
        device = _device(arguments.device)
        hubs = chosen_hubs(arguments.hub, offline=arguments.offline)
        if hubs.offline:
            guard.install()  # huggingface_hub asks for news of its own, too
        encrypted = tls.credentials(arguments.tls_certificate, arguments.tls_key)
        shares = dict(map(share, arguments.share))
        keep_jobs = KEPT if arguments.keep_jobs is None else _days(arguments.keep_jobs)
        with ExitStack() as stack:
            catalog = stack.enter_context(closing(_catalog(arguments.data)))
            tokens = _tokens(arguments.data, arguments.listen)
            if encrypted is None and not _local(arguments.listen):
                log.warning(
                    "tokens cross the network in clear: give --tls-certificate and --tls-key, or put a TLS "
                    "proxy before --listen"
                )
            known = _known(arguments, offline=hubs.offline)
            largest = max(base.parameters for base in known)
            torch.set_num_threads(_threads(arguments.threads, device, largest))
            lapack.start()
            clip = Clip(arguments.scorer, device=device) if arguments.scorer else None
            taken = clip.nbytes() if clip else 0
            engine = _engine(arguments, device, known, taken=taken)
            tracers = stack.enter_context(tracing.exporting())
            telemetry = Telemetry(tracers=tracers, log_prompts=arguments.log_prompts)
            if arguments.metrics:
                address = stack.enter_context(telemetry.serve(arguments.metrics))
                log.info("metrics on http://%s/metrics", address)
            asyncio.run(
                serve(
                    catalog,
                    engine,
                    listen=arguments.listen,
                    device=device,
                    tokens=tokens,
                    keep_jobs=keep_jobs,
                    adapter_bytes=_bytes(arguments.adapter_memory, "adapter-memory"),
                    telemetry=telemetry,
                    hubs=hubs,
                    tls=encrypted,
                    clip=clip,
                    shares=shares,
                )
            )
    except Locked as error:
        return _refuse(error, CONFLICT)
    except Damaged as error:
        return _refuse(error, DAMAGED)
    except (ComposeError, RegistryError) as error:
        return _refuse(error, INVALID)
    except OSError as error:
        return _refuse(error, UNAVAILABLE)
    except sqlite3.OperationalError as error:  # a full disk is no damage
        database = arguments.data / "catalog.db"
        return _refuse(f"{database} cannot be used ({error}); see to its disk, then start again", UNAVAILABLE)
    except sqlite3.DatabaseError as error:
        database = arguments.data / "catalog.db"
        return _refuse(f"{database} is damaged ({error}); restore it from a backup", DAMAGED)
    return 0


def chosen_hubs(urls: list[str] | None, *, offline: bool) -> Hubs:
    """Those that may be reached; where nobody says, as huggingface_hub's own variables do. Raises
    InvalidName.
    """
    urls = urls or [os.environ.get("HF_ENDPOINT") or DEFAULT]
    names = [token_variable(endpoint(url).url) for url in urls]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidName(f"two Hubs would share the token in {twice}; leave one out", field="hub")
    off = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return Hubs(tuple(map(endpoint, urls)), offline=offline or off)


def _stored(known: list[bases.Base], fp8: list[str]) -> list[bases.Base]:
    """The bases, those of these names in 8 bits. Raises InvalidRequest."""
    if absent := sorted({*fp8} - {base.name for base in known}):
        have = ", ".join(base.name for base in known)
        raise InvalidRequest(f"--fp8 {absent[0]} names no base; there are {have}", field="fp8")
    return [replace(base, fp8=base.name in fp8) for base in known]


def _known(arguments: argparse.Namespace, *, offline: bool) -> list[bases.Base]:
    """The bases, each with what may steer its renders. Raises InvalidRequest, IncompatibleBase."""
    found = [bases.find(base, offline=offline) for base in arguments.base or ["pocket"]]
    stored = _stored(found, arguments.fp8)
    return attached(stored, controls=arguments.control, references=arguments.ip_adapter)


def _engine(
    arguments: argparse.Namespace, device: str, known: list[bases.Base], *, taken: int
) -> InProcessEngine:
    """The first base warm, the others known, beside the scorer, which has `taken` bytes. Raises
    InvalidRequest, IncompatibleBase.
    """
    first, *others = known
    budget = None if arguments.memory is None else _bytes(arguments.memory, "memory")
    on, most = torch.device(device), budget if budget is not None else budget_on(torch.device(device))
    check_room(first.name, estimate(first, on), on, most, taken)
    warm = warm_up(first, device=device, golden_on_host=golden_on_host(first, on, most - taken))
    return InProcessEngine(Residence(warm, others, budget=budget, taken=taken))


def _bytes(gigabytes: float, option: str) -> int:
    """Raises InvalidRequest."""
    if not 0 < gigabytes < 1e6:
        raise InvalidRequest(f"--{option} {gigabytes} is no number of GB above 0", field=option)
    return int(gigabytes * 1e9)


def _device(name: str) -> str:
    """`auto` is a GPU where there is one. Raises InvalidRequest."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name not in {"cpu", *gpus, *(["cuda"] if gpus else [])}:
        have = ", ".join(["cpu", *gpus])
        raise InvalidRequest(f"the device {name!r} cannot be used; there is {have}", field="device")
    return name


def _threads(asked: int, device: str, parameters: int) -> int:
    """What rendering gets, where the largest base has so many parameters: every core, for a LARGE one on a
    CPU; else a core stays with the event loop, or each of many short steps waits for a thread that was pushed
    off it (655 ms instead of 354 for 20 steps of pocket on two cores). Raises InvalidRequest.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 0 <= asked <= cores:
        raise InvalidRequest(f"--threads {asked} is not within 0 and the {cores} cores here", field="threads")
    spared = 0 if device == "cpu" and parameters >= LARGE else 1
    return asked or max(1, min(torch.get_num_threads(), cores - spared))


def share(told: str) -> tuple[str, float]:
    """`CLIENT=N` as its two. Raises InvalidRequest."""
    client, _, number = told.rpartition("=")
    try:
        found = float(number)
    except ValueError:
        found = 0.0
    if not client or not 0.01 <= found <= 100:
        raise InvalidRequest(f"--share {told[:80]} is no CLIENT=N with an N from 0.01 to 100", field="share")
    return client, found


def _days(asked: float) -> timedelta:
    """Raises InvalidRequest."""
    if not 0 <= asked <= 36500:
        raise InvalidRequest(f"--keep-jobs {asked} is not within 0 and 36500 days", field="keep_jobs")
    return timedelta(days=asked)


def _tokens(data: Path, listen: str) -> Tokens:
    """Who may call; beyond this machine nobody without a token. Raises InvalidRequest, InvalidFile."""
    tokens = Tokens(data)
    if not tokens and not _local(listen):
        raise InvalidRequest(
            f"--listen {listen} reaches beyond this machine, where everybody could change the catalog; "
            f"make a token first: atelier token add NAME --role writer --data {data}",
            field="listen",
        )
    return tokens


def _check_listen(listen: str) -> None:
    """Raises InvalidRequest for what is no HOST:PORT: gRPC would listen on some other port."""
    host, _, port = listen.rpartition(":")
    plain = host and (":" not in host or host.startswith("["))
    if not listen.startswith(UNIX) and not (
        plain and port.isascii() and port.isdecimal() and int(port) <= 65535
    ):
        raise InvalidRequest(
            f"--listen {listen} is no HOST:PORT; write 127.0.0.1:7431, or [::1]:7431", field="listen"
        )


def _local(listen: str) -> bool:
    """Whether nobody beyond this machine is answered."""
    host = listen.rsplit(":", 1)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in {"localhost", "unix"}


def _catalog(data: Path) -> Catalog:
    """Opens the catalog. Raises Locked, InvalidFile, sqlite3.DatabaseError."""
    try:
        return Catalog(data)
    except OSError as error:
        raise InvalidFile(
            f"cannot use {data} as a catalog: {error.strerror}; choose another --data"
        ) from None


def _refuse(why: object, code: int) -> int:
    print(f"atelier serve: {why}", file=sys.stderr)
    return code
