"""`smidgen serve`: one model, a folder of deltas, HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import smidgen as sm
from smidgen.cli.options import Dtype, Model, Option, Quantize
from smidgen.cli.views import results
from smidgen.common.errors import SmidgenError


def run_serve(
    deltas: Annotated[str, Option("--deltas", help="folder with deltas, each in its own, or a URL of fsspec")],
    model: Model = "minilm",
    host: Annotated[str, Option(help="address to listen at; others than this machine's own need a key")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any that is free")] = 8000,
    api_key_file: Annotated[Path | None, Option(help="file of keys, one a line; each lets in")] = None,
    max_memory: Annotated[str | None, Option(help="of deltas in memory, such as 2GiB; others wait on the disk")] = None,
    max_queue: Annotated[int, Option(min=1, help="most requests at a time; others get 429")] = 1024,
    client_timeout: Annotated[
        float, Option(min=0.1, help="seconds a client may take to send a request, or keep an answer waiting")
    ] = 60.0,
    batch: Annotated[int, Option(min=1, help="most rows of a pass")] = 32,
    wait: Annotated[float, Option(min=0, help="milliseconds that a request waits for others to share its pass")] = 4.0,
    dtype: Annotated[Dtype, Option("--dtype", help="of the base")] = Dtype.float32,
    quantize: Quantize = None,
    on: Annotated[str | None, Option(help="ray: replicas on this machine; ray://..., auto: on a cluster")] = None,
    replicas: Annotated[int, Option(min=1, help="processes with the base in memory each, with --on")] = 1,
) -> None:
    """Answer for all deltas of a folder over HTTP, the rows of a batch each with their own."""
    try:
        from smidgen.serving.http.options import HttpOptions, check_host, read_keys
        from smidgen.serving.http.ray_replicas import ReplicaOptions, serve_on_ray
        from smidgen.serving.http.uvicorn_process import serve_http
    except ImportError as error:
        lacking = f"serving needs further packages ({error.name} is missing): pip install 'smidgen[serve]'"
        raise SmidgenError(lacking) from None
    keys = read_keys(api_key_file) if api_key_file else frozenset[str]()
    check_host(host, keys)
    limits = sm.Limits(batch=batch, wait=wait / 1e3, queue=max(4096, 4 * max_queue))
    options = HttpOptions(keys=keys, requests=max_queue, client_timeout=client_timeout)
    bank = sm.Bank(deltas, max_memory=max_memory)
    if on is not None:
        if on != "ray" and on != "auto" and not on.startswith("ray://"):
            raise SmidgenError(f"on={on!r}: ray, auto, or the ray:// address of a cluster")
        each = ReplicaOptions(model, deltas, str(dtype), max_memory, limits, options, quantize=quantize)
        told = f"answers for {len(bank)} deltas of {model} in {replicas} replicas; Ctrl-C stops it"
        address = None if on == "ray" else on
        serve_on_ray(each, replicas, host, port, address, lambda where: results.note(f"{where} {told}"))
        return
    network, processor = sm.load(model, dtype=str(dtype), quantize=quantize)

    def say(where: str) -> None:
        results.note(f"{where} answers for {len(bank)} deltas of {model} ({type(network).__name__}); Ctrl-C stops it")
        sys.stderr.flush()

    with sm.Server(network, bank, processor=processor, limits=limits) as server:
        serve_http(server, host, port, options, say)
