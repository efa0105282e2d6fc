"""Ray: a run on many processes and machines: where, how many workers, and what each takes.

Groups of prompts are those of the local run, and so are rows, bit for bit, where as many threads compute them on the
same kind of machine.
"""

import logging
import math
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

from resid_surgery import _check
from resid_surgery.errors import ArgumentError, RunError

CONNECT_SECONDS = 5.0
UNREACHED = (OSError, RuntimeError, ValueError, ImportError)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ENVIRONMENT = ("RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE")
ADDRESS = re.compile(r"(?:ray://)?(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


@final
@dataclass(frozen=True)
class OnRay:
    """Where and how many workers carry a run out: Ray actors, one model each.

    Args:
        workers: how many; None for as many as the cluster has room for, one a CPU core by default.
        address: of the cluster: None for the one that this machine is part of, or else a new one on this machine,
            which is shut down at the end; "local" for a new one in any case; "auto", "host:port" or "ray://host:port".
        num_cpus, num_gpus: what an actor takes of its machine's; a part of a GPU, such as 0.5, lets two share it.
        threads: that an actor computes with. As many as locally give the local rows bit for bit.
        device: of the actors' models; "cuda" by default where they have GPUs, else "cpu".
        runtime_env: Ray's own description of what the actors' processes need (``pip``, ``env_vars``, ...).

    Raises:
        ArgumentError: Ray is not installed, or an argument is no good.

    Source:
        Moritz et al. 2018, "Ray: A Distributed Framework for Emerging AI Applications".
    """

    workers: int | None = None
    address: str | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    threads: int = 1
    device: str | None = None
    runtime_env: Mapping[str, Any] | None = field(default=None, repr=False, hash=False)

    def __post_init__(self) -> None:
        if find_spec("ray") is None:
            raise ArgumentError("`executor` needs Ray, which is not installed: pip install 'resid-surgery[ray]'.")
        if self.workers is not None:
            _check.whole("workers", self.workers, 1)
        _check.whole("threads", self.threads, 1)
        for name, value in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus)):
            if _check.finite(name, value) < 0 or (value > 1 and value != int(value)):
                raise ArgumentError(_check.message(name, "a whole number, or a share in 0..1", value))
        if self.address is not None and not _is_address(self.address):
            must = "None, 'auto', 'local', 'host:port' or 'ray://host:port'"
            raise ArgumentError(_check.message("address", must, self.address))
        if self.device is not None and (not isinstance(self.device, str) or not self.device.strip()):
            raise ArgumentError(
                _check.message("device", "a torch device such as 'cpu' or 'cuda', or None", self.device)
            )
        if self.runtime_env is not None and not isinstance(self.runtime_env, Mapping):
            raise ArgumentError(_check.message("runtime_env", "a mapping, as Ray takes it", self.runtime_env))
        if self.num_cpus + self.num_gpus == 0:
            raise ArgumentError(_check.message("num_cpus", "above 0 where `num_gpus` is 0", self.num_cpus))

    @property
    def place(self) -> str | None:
        """The device of the actors' models; None for GPUs that are not named."""
        return self.device or (None if self.num_gpus else "cpu")


def join(engine: OnRay) -> bool:
    """Connect this process to a cluster, or begin one on this machine.

    Returns:
        Whether it was not connected before.

    Raises:
        RunError: no cluster can be reached at the address.
    """
    import ray

    if ray.is_initialized():
        if engine.address not in (None, "auto"):
            raise RunError(
                "this process is part of a Ray cluster already: leave `address` out, or call ray.shutdown() before a "
                f"run at {engine.address}."
            )
        return False
    with _ours():
        try:
            _begin(engine)
        except BaseException as error:
            ray.shutdown()
            if not isinstance(error, (*UNREACHED, ray.exceptions.RayError)):
                raise
            where = f"at {engine.address}" if engine.address else "on this machine"
            raise RunError(
                f"no Ray cluster can be used {where} ({brief(error)}). Start one with `ray start --head`, or use "
                "OnRay(address='local'); the environment's RAY_ADDRESS goes before None and 'auto'. A cluster that "
                "asks for Ray's token needs RAY_AUTH_MODE=token in this process' environment, too."
            ) from error
    return True


def room(engine: OnRay) -> int:
    """How many actors the cluster's machines can hold."""
    import ray

    wanted = {"CPU": engine.num_cpus, "GPU": engine.num_gpus}
    each = [[math.floor(node["Resources"].get(name, 0) / share + 1e-9) for name, share in wanted.items() if share]
            for node in ray.nodes() if node["Alive"]]  # fmt: skip
    return sum(min(one) for one in each)


def brief(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:200] + " ... " + text[-195:]


def _is_address(given: Any) -> bool:
    return isinstance(given, str) and (given in ("auto", "local") or _host_and_port(given) is not None)


def _host_and_port(address: Any) -> tuple[str, int] | None:
    found = ADDRESS.fullmatch(address) if isinstance(address, str) else None
    return None if found is None else (found[1].strip("[]"), int(found[2]))


def _begin(engine: OnRay) -> None:
    """Ray's own connecting; nobody at an address is told at once, where Ray itself would wait for minutes."""
    import ray

    address, named = engine.address, _named(engine.address)
    if there := _host_and_port(named):
        try:
            socket.create_connection(there, timeout=CONNECT_SECONDS).close()
        except OSError:
            if address is not None or "RAY_ADDRESS" in os.environ:
                raise
            address = "local"  # Ray's note is of a cluster that is gone
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    env = None if engine.runtime_env is None else dict(engine.runtime_env)
    if address not in (None, "local"):
        ray.init(address, runtime_env=env, **quiet)
        return
    cores = os.cpu_count() or 1
    cpus = None if engine.workers is None else max(cores, math.ceil(engine.workers * engine.num_cpus))
    try:
        ray.init(address, num_cpus=cpus, resources={}, include_dashboard=False, runtime_env=env, **quiet)
    except ValueError:  # there is a cluster already, whose resources are its own
        ray.init(address, runtime_env=env, **quiet)


def _named(address: str | None) -> str | None:
    """The address that Ray will use: the environment's and the last `ray start`'s stand in for None and "auto"."""
    if address not in (None, "auto"):
        return address
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    note = Path(temporary, "ray", "ray_current_cluster")
    return os.environ.get("RAY_ADDRESS") or (note.read_text().strip() if note.is_file() else None)


@contextmanager
def _ours() -> Iterator[None]:
    """This process' signals and environment stay as they were; a cluster that is begun sends no statistics."""
    main = threading.current_thread() is threading.main_thread()
    handlers = {one: signal.getsignal(one) for one in SIGNALS} if main else {}
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        yield
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}
