# SPDX-License-Identifier: Apache-2.0
"""Start the page: check what it is given, take the port, load the network, and serve until Ctrl-C."""

import contextlib
import errno
import ipaddress
import socket
import sys
from collections.abc import Sequence

import uvicorn

from unimedi_components.errors import ConfigError
from unimedi_components.retrieval.embedder import Embedder
from unimedi_components.retrieval.index import EmbeddingIndex
from unimedi_components.retrieval.prompts import load_prompt_sets
from unimedi_components.serve.analysis import Analyser
from unimedi_components.serve.app import create_app
from unimedi_components.serve.faults import Limits
from unimedi_components.serve.guard import LOOPBACK

_GRACE = 5
_OPEN_FILES = 16384


def serve(
    checkpoint: str,
    index: str | None = None,
    prompts: Sequence[str] = ("chest_xray", "chest_ct"),
    host: str = "127.0.0.1",
    port: int = 8000,
    max_upload_mb: int = 512,
    device: str = "auto",
    allow_remote: bool = False,
    assume_hu: bool = False,
) -> None:
    """Serve the page until Ctrl-C; the arguments are those of the command, with `prompts` as a list.

    Raises:
        CheckpointError: the checkpoint does not load.
        ConfigError: an address that other machines reach, a port that is taken, an index of another model, or two
            prompt sets for one dimension.
        DataError: the index or a prompt set cannot be read.
    """
    remote = not _is_loopback(host)
    if remote and not allow_remote:
        raise ConfigError(
            f"--host {host} is reached by other machines, and the page has no login: whoever opens it can use it; "
            "add --allow_remote if that is meant"
        )
    # taken first: a port in use shows at once, not after the network is loaded
    with _listen(host, port) as taken:
        embedder = Embedder(checkpoint, device)
        found = None if index is None else EmbeddingIndex.load(index)
        analyser = Analyser(embedder, load_prompt_sets(prompts), found)
        limits = Limits(upload_bytes=max_upload_mb * 2**20, assume_hu=assume_hu)
        app = create_app(analyser, limits, () if remote else LOOPBACK)
        if remote:
            print(f"warning: other machines can reach {host}; there is no login and no encryption", file=sys.stderr)
        shown, number = f"[{host}]" if ":" in host else host, taken.getsockname()[1]
        print(f"UniMedI is at http://{shown}:{number} (Ctrl-C ends it)", flush=True)
        _allow_many_files()
        config = uvicorn.Config(
            app, log_level="warning", server_header=False, proxy_headers=False, timeout_graceful_shutdown=_GRACE
        )
        # uvicorn ends the requests and hands the signal on
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[taken])
        print("ended")


def _allow_many_files() -> None:
    """Raise the number of files that may be open, as far as the system allows: an upload can be of thousands."""
    try:
        import resource
    except ImportError:
        # there is no such limit on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    # the resolver takes a larger number modulo 65536
    if not 0 <= port < 2**16:
        raise ConfigError(f"there is no port {port}; give one below 65536 with --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
            taken.listen(128)
        except OSError:
            taken.close()
            raise
        return taken
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use; give another one with --port") from None
        reason = error.strerror or error
        raise ConfigError(
            f"cannot listen at {host}, port {port} ({reason}); give others with --host and --port"
        ) from None
