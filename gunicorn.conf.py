"""gunicorn, started in this folder, reads its settings from this file.

They come from the environment, never from `.env`; `.env.example` has a line on each.
"""

import gc
import logging
import math
import os
import resource
import signal
from contextlib import suppress
from typing import Any

import httptools
from gunicorn.glogging import Logger  # type: ignore[import-untyped]
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]

import main

MAX_HEAD_BYTES = 64 * 1024  # of a request line and its headers, as in other servers
HEAD_SECONDS = 10  # after which a request head must have arrived


def read_number(name: str, default: int, least: int, most: int = 1_000_000) -> int:
    text = os.getenv(name, "").strip() or str(default)
    if not (text.isdecimal() and len(text) < 8 and least <= int(text) <= most):
        raise SystemExit(f"bad settings: {name}: not a number from {least} to {most}")
    return int(text)


def usable_cpus(quota_file: str = "/sys/fs/cgroup/cpu.max") -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    with suppress(OSError, ValueError), open(quota_file) as file:  # "max": no quota
        quota, period = file.read().split()
        cpus = min(cpus, math.ceil(int(quota) / int(period)))
    return cpus


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds on request heads, and without `Upgrade`.

    httptools stops after a head with `Upgrade`, so that the body would be parsed as the
    next request. A server may ignore `Upgrade` (RFC 9110 § 7.8). Private name, checked
    with uvicorn 0.54: `_unset_keepalive_if_required`, which stops the timer.
    """

    head_bytes = 0.0  # received of a request head; -inf while a body is received

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # A unix socket has no address. "::ffff:192.0.2.1" is an IPv4-mapped address.
        host, port = self.client or ("127.0.0.1", 0)
        self.client = (host.removeprefix("::ffff:"), port)
        self.start_head_timer()

    def data_received(self, data: bytes) -> None:
        self.head_bytes += len(data)
        try:
            self.parse(memoryview(data))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.refuse(431 if self.head_bytes > MAX_HEAD_BYTES else 400)
        if self.head_bytes > MAX_HEAD_BYTES:
            self.refuse(431)
        # A head has begun, and no request is being answered.
        elif self.head_bytes == len(data) and self.timeout_keep_alive_task:
            self.start_head_timer()

    def parse(self, data: memoryview) -> None:
        """Feed the parser. Parse a head with Upgrade again, without that header."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
            version = self.parser.get_http_version().encode()
            lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
            lines += [k + b": " + v for k, v in self.headers if k != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n")

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # `parse` feeds this head again
        # Count again: so far, a part of the body may have been counted, too.
        self.head_bytes = len(self.url)
        self.head_bytes += sum(len(name + value) + 4 for name, value in self.headers)
        hosts = [name for name, _ in self.headers].count(b"host")
        is_ambiguous = hosts != 1 and self.parser.get_http_version() == "1.1"
        if is_ambiguous or self.head_bytes > MAX_HEAD_BYTES:
            raise httptools.HttpParserError
        self.head_bytes = -math.inf
        self._unset_keepalive_if_required()
        super().on_headers_complete()
        self.headers = []  # trailers may come: uvicorn would add them to the headers

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            self.head_bytes = 0
            super().on_message_complete()

    def start_head_timer(self) -> None:
        self._unset_keepalive_if_required()
        timer = self.loop.call_later(HEAD_SECONDS, self.refuse, 408)
        self.timeout_keep_alive_task = timer

    def refuse(self, status: int) -> None:
        if self.head_bytes and not self.transport.is_closing():
            date = [b"%s: %s\r\n" % line for line in self.server_state.default_headers]
            ending = b"content-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + b"".join(date) + ending)
        self.transport.close()

    def shutdown(self) -> None:
        # uvicorn closes idle connections, but a request may already be on its way.
        self.loop.call_later(0.5, super().shutdown)


class ServiceWorker(UvicornWorker):  # type: ignore[misc]
    """uvicorn's worker, which stops in time, on each of gunicorn's signals."""

    def run(self) -> None:
        """Run uvicorn. It cancels requests at 4/5 of graceful_timeout."""
        self.config.app = self.wsgi
        self.config.http = BoundedHttpProtocol
        self.config.server_header = False
        self.config.timeout_notify = 1
        self.config.timeout_graceful_shutdown = self.cfg.graceful_timeout * 4 // 5
        # On SIGINT and SIGQUIT, gunicorn sends SIGQUIT; uvicorn needs SIGTERM.
        signal.signal(signal.SIGQUIT, lambda *_: signal.raise_signal(signal.SIGTERM))
        # uvicorn raises SIGTERM at its end; sys.exit then waits for cancelled requests.
        signal.signal(signal.SIGTERM, self.handle_quit)
        Server(self.config).run(self.sockets)

    async def callback_notify(self) -> None:  # each second
        await super().callback_notify()
        if os.getppid() != self.ppid:  # gunicorn was killed
            signal.raise_signal(signal.SIGTERM)


class ServiceLogger(Logger):  # type: ignore[misc]
    def setup(self, cfg: Any) -> None:
        self.cfg = cfg  # and no handlers: main.py has set them up


def when_ready(server: Any) -> None:
    if not logging.getLogger().handlers:  # main:create_app() leaves logging alone
        main.setup_logging(main.get_settings())
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS refuses its own hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    if "*" in server.cfg.forwarded_allow_ips:
        problem = "lets clients forge their address: name proxies or their networks"
        server.log.warning(f"FORWARDED_ALLOW_IPS=* {problem}")
    gc.freeze()  # the garbage collector then copies no memory that workers share


wsgi_app = "main:app"
default_bind = f"0.0.0.0:{read_number('PORT', 8000, 1, 65535)}"
bind = (os.getenv("BIND", "").strip() or default_bind).split(",")
for address in bind:
    if "/" not in address and address.rpartition(":")[2] not in map(str, range(65536)):
        raise SystemExit(f"bad settings: BIND: {address} has no port from 0 to 65535")
workers = read_number("WORKERS", read_number("WEB_CONCURRENCY", usable_cpus(), 1), 1)
worker_class = ServiceWorker
logger_class = ServiceLogger
preload_app = True  # invalid settings stop the start; workers share rate limits
max_requests = read_number("MAX_REQUESTS", 0, 0)  # 0: never, for it drops requests
max_requests_jitter = max_requests // 10
graceful_timeout = read_number("GRACEFUL_TIMEOUT", 30, 1)
timeout = graceful_timeout + 30  # longer: a worker that stops sends no heartbeat
keepalive = read_number("KEEP_ALIVE_SECONDS", 75, 1)  # load balancers keep 60 s
forwarded_allow_ips = os.getenv("FORWARDED_ALLOW_IPS", "").strip() or "127.0.0.1,::1"
control_socket_disable = True  # it would need a writable home directory
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None
