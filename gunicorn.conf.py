"""gunicorn reads this file at its start. Its values come from the environment only."""

import gc
import math
import os
import re
import resource
import signal
from contextlib import suppress
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]

import main  # it reads no settings when it is imported

MAX_HEADER_BYTES = 64 * 1024  # request line and headers together
HEADER_SECONDS = 10  # from the connect, or from the first byte of a later request


def read_number(name: str, default: int, minimum: int = 1, maximum: int = 10**6) -> int:
    text = os.getenv(name, "").strip() or str(default)
    if re.fullmatch("[0-9]{1,7}", text) and minimum <= int(text) <= maximum:
        return int(text)
    raise SystemExit(f"bad settings: {name}: not a number from {minimum} to {maximum}")


def usable_cpus(quota_file: str = "/sys/fs/cgroup/cpu.max") -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    with suppress(OSError, ValueError), open(quota_file) as file:
        quota, period = file.read().split()  # "200000 100000": two CPUs
        cpus = min(cpus, math.ceil(int(quota) / int(period)))  # ValueError for "max"
    return cpus


wsgi_app = "main:app"
default_bind = f"0.0.0.0:{read_number('PORT', 8000, maximum=65535)}"
bind = re.split(r"\s*,\s*", os.getenv("BIND", "").strip() or default_bind)
for address in bind:  # checked here, because gunicorn's message would not name BIND
    match = re.fullmatch(r"(?:\[.+\]|[^:/]*):([0-9]{1,5})|unix:.+|fd://[0-9]+", address)
    if not match or int(match[1] or 0) > 65535:  # match[1] is the port
        raise SystemExit(f"bad settings: BIND: {address!r}: no host:port, unix: or fd:")
workers = read_number("WORKERS", read_number("WEB_CONCURRENCY", usable_cpus()))
errorlog = None  # gunicorn adds no handler of its own: main.setup_logging adds ours
preload_app = True  # before the fork: bad settings end gunicorn, limits are shared
max_requests = read_number("MAX_REQUESTS", 0, minimum=0)  # 0: replace no worker
max_requests_jitter = max_requests // 10  # or all workers would be replaced at once
graceful_timeout = read_number("GRACEFUL_TIMEOUT", 30)
timeout = graceful_timeout + 30  # a worker sends no heartbeats during a shutdown
keepalive = read_number("KEEP_ALIVE_SECONDS", 75)  # most load balancers have 60 s
forwarded_allow_ips = os.getenv("FORWARDED_ALLOW_IPS", "").strip() or "127.0.0.1,::1"
control_socket_disable = True  # the socket of `gunicornc` needs a writable home
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # heartbeats


def on_starting(server: Any) -> None:  # before the workers are forked
    if not main.logger.hasHandlers():  # create_app alone sets up no logging
        main.setup_logging(main.get_settings())
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # connections are files
    with suppress(OSError, ValueError):  # macOS refuses its own hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    gc.freeze()  # else garbage collections copy memory that the workers share


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol (0.54), limited as README's "Practices" explain."""

    is_in_body = False  # True between the end of the headers and the end of the body
    header_bytes = 0  # received since the last complete headers; can include some body
    is_last_request = False  # True if the connection is to be closed after it

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        host, port = self.client or ("127.0.0.1", 0)  # a unix socket counts as local
        self.client = (host.removeprefix("::ffff:"), port)  # the IPv4 form
        self.header_timer = self.loop.call_later(HEADER_SECONDS, self.refuse_slow)

    def refuse_slow(self) -> None:
        if not self.cycle or self.cycle.response_complete:  # not during a response
            self.refuse(408)

    def data_received(self, data: bytes) -> None:  # uvicorn's stops at an `Upgrade`
        if not self.is_in_body:
            self.header_bytes += len(data)
        try:
            self.parse(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.refuse(400)  # CONNECT raises HttpParserUpgrade in the new parser, too
        if self.header_bytes > MAX_HEADER_BYTES:  # complete headers set it to 0
            self.refuse(431)

    def parse(self, data: bytes) -> None:
        """Feed the parser. After headers with `Upgrade`, feed a new one, without it."""
        while data:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]  # args[0]: where the rest starts
            version = self.parser.get_http_version().encode()
            lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
            lines += [k + b": " + v for k, v in self.headers if k != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n")

    def on_message_begin(self) -> None:  # the parser has found a request's first byte
        super().on_message_begin()
        self._unset_keepalive_if_required()  # private: ends the keep-alive timer
        # The timer runs already for a first request, or if `parse` repeats the headers.
        if self.header_timer.cancelled():
            self.header_timer = self.loop.call_later(HEADER_SECONDS, self.refuse_slow)

    def on_headers_complete(self) -> None:
        # header_bytes can include some body, so count anew. (4: for ": " and "\r\n".)
        size = len(self.url) + sum(len(k) + len(v) + 4 for k, v in self.headers)
        if size > MAX_HEADER_BYTES:
            self.refuse(431)
            raise httptools.HttpParserError  # data_received: refuse(400) does nothing
        if self.parser.should_upgrade():
            return  # `parse` repeats these headers, which calls this again
        self.is_in_body = True
        self.header_bytes = 0
        self.header_timer.cancel()
        self._unset_keepalive_if_required()  # a response may have ended meanwhile
        super().on_headers_complete()
        self.is_last_request = self.is_last_request or not self.cycle.keep_alive
        self.cycle.keep_alive = not self.expect_100_continue  # or a body is on its way
        self.headers = []  # a new list: uvicorn would add trailers to the scope's

    def on_body(self, body: bytes) -> None:
        self.cycle.keep_alive = True  # also if the client has not waited
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():  # else the new parser calls this again
            super().on_message_complete()
            self.is_in_body = False
            self.cycle.keep_alive = not self.is_last_request
            if self.is_last_request and self.cycle.response_complete:
                self.transport.close()
                raise httptools.HttpParserError  # ends feed_data, as above

    def refuse(self, status: int) -> None:
        if not self.transport.is_closing():  # no other refusal has been sent
            lines = [b"%s: %s\r\n" % pair for pair in self.server_state.default_headers]
            ending = b"content-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + b"".join(lines) + ending)
            self.transport.close()

    def shutdown(self) -> None:
        self.is_last_request = True
        self.timeout_keep_alive = 1  # if the body of an answered request does not end
        if self.cycle:
            self.cycle.keep_alive = False  # the response has "Connection: close"
        self.loop.call_later(0.5, super().shutdown)  # requests may be on their way


class ServiceWorker(UvicornWorker):  # type: ignore[misc]
    def run(self) -> None:
        self.config.http = LimitedHttpProtocol
        self.config.server_header = False
        self.config.lifespan = "on"  # with "auto", an exception at the start is hidden
        self.config.timeout_notify = 1  # each second, call callback_notify (see below)
        # At 80 % of the time, uvicorn cancels the requests; the rest is for their 503s.
        self.config.timeout_graceful_shutdown = self.cfg.graceful_timeout * 4 // 5
        signal.signal(signal.SIGTERM, self.handle_quit)  # for uvicorn's own, at its end
        super().run()

    def handle_exit(self, *_: object) -> None:  # SIGQUIT: gunicorn sends it at Ctrl+C
        signal.raise_signal(signal.SIGTERM)  # then uvicorn finishes the requests

    async def callback_notify(self) -> None:
        await super().callback_notify()
        if os.getppid() != self.ppid:  # gunicorn was killed
            signal.raise_signal(signal.SIGTERM)


worker_class = ServiceWorker
