"""Ray Serve: replicas of one server, each with the base in memory, on one machine or many; extra `ray`.

The replicas share the place where deltas lie: what one adds, replaces or removes, the others see, a new name at once,
others within a second. Each replica has its own engine, so rows share a pass within one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smidgen.serving.bank import Bank
from smidgen.serving.engine import Limits
from smidgen.serving.errors import ServingError
from smidgen.serving.http.options import HttpOptions, check_host
from smidgen.serving.server import Server

if TYPE_CHECKING:
    from fastapi import FastAPI


@dataclass(frozen=True)
class ReplicaOptions:
    """What each replica is made of.

    Attributes:
        model: name of the base.
        deltas: where they lie; a place that all machines reach.
        dtype: of the base.
        max_memory: of each replica's deltas; None for no limit.
        limits, http: as of one server.
        cores: that a replica counts as.
        quantize: how the base's linear maps are stored, as for `smidgen.load`.
    """

    model: str
    deltas: str
    dtype: str = "float32"
    max_memory: str | None = None
    limits: Limits = field(default_factory=Limits)
    http: HttpOptions = field(default_factory=HttpOptions)
    cores: float = 1.0
    quantize: str | None = None

    def app(self) -> FastAPI:
        """A replica's app, with a server of its own."""
        from smidgen.inference.loading import load
        from smidgen.serving.http.app import create_app

        model, processor = load(self.model, dtype=self.dtype, quantize=self.quantize)
        bank = Bank(self.deltas, max_memory=self.max_memory)
        return create_app(Server(model, bank, processor=processor, limits=self.limits), self.http)


def application(options: ReplicaOptions, replicas: int) -> object:
    """What `ray.serve.run` takes.

    Raises:
        ServingError: Ray is not installed, or there is no replica.
    """
    if replicas < 1:
        raise ServingError(f"replicas={replicas}: at least 1")
    serve = _ray_serve()

    def build() -> FastAPI:  # a plain function: Ray takes a method for an app
        return options.app()

    @serve.deployment(
        name="smidgen",
        num_replicas=replicas,
        max_ongoing_requests=options.http.requests,
        ray_actor_options={"num_cpus": options.cores},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=60,
    )
    @serve.ingress(build)
    class Replica:
        """One server."""

    replica: Any = Replica
    return replica.bind()


def serve_on_ray(
    options: ReplicaOptions, replicas: int, host: str, port: int, address: str | None, say: Callable[[str], None],
    until: threading.Event | None = None,
) -> None:  # fmt: skip
    """Serve on a Ray cluster until SIGTERM or Ctrl-C.

    Args:
        address: of a running cluster; None for one on this machine alone, which ends with the call.
        say: told where it listens.
        until: ends it as well.

    Raises:
        ServingError: Ray is not installed; or the address can be reached by others and there is no key.
    """
    check_host(host, options.http.keys)
    serve = _ray_serve()
    import ray

    stop = until or threading.Event()
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application(options, replicas), name="smidgen", route_prefix="/")
        say(f"http://{host}:{port}")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
        stop.wait()
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


def _ray_serve() -> Any:
    """Ray's package for serving. Raises ServingError if it is not installed."""
    try:
        from ray import serve
    except ImportError:
        raise ServingError("serving on Ray needs a further package: pip install 'smidgen[ray]'") from None
    return serve
