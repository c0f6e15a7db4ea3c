"""gunicorn reads this file at its start. Its values come from the environment only."""

import os
import signal
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]

from main import prepare_process, read_addresses, read_number, read_text, usable_cpus

MAX_HEADER_BYTES = 64 * 1024  # request line and headers together
HEADER_SECONDS = 10  # from the connect, or from the first byte of a later request

wsgi_app = "main:app"
bind = read_addresses()
workers = read_number("WORKERS", read_number("WEB_CONCURRENCY", usable_cpus()))
errorlog = None  # gunicorn adds no handler of its own: main.setup_logging adds ours
preload_app = True  # so bad settings end gunicorn, and workers share the rate limits
max_requests = read_number("MAX_REQUESTS", 0, minimum=0)  # 0: replace no worker
max_requests_jitter = max_requests // 10  # or all workers would be replaced at once
graceful_timeout = read_number("GRACEFUL_TIMEOUT", 30)
timeout = graceful_timeout + 30  # a stopping worker sends no heartbeats
keepalive = read_number("KEEP_ALIVE_SECONDS", 75)  # most load balancers have 60 s
forwarded_allow_ips = read_text("FORWARDED_ALLOW_IPS", "127.0.0.1,::1")
control_socket_disable = True  # the socket of `gunicornc` needs a writable home
# For the files of the heartbeats: on a disk, a heartbeat could block a worker.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
on_starting = prepare_process  # before the workers are forked


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol (0.54), limited as README's "Practices" explain.

    An early response is complete before the body of its request has arrived. uvicorn's
    `cycle` (a request and its response) would then close the connection, and the client
    could lose the response. So a cycle gets this object in place of the real transport,
    of which it calls write, is_closing and close: our close waits for the body's end.
    """

    is_in_body = False  # True between the end of the headers and the end of the body
    header_bytes = 0  # of the headers that are arriving
    is_stopping = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.write = transport.write
        self.is_closing = transport.is_closing
        host, port = self.client or ("127.0.0.1", 0)  # a unix socket counts as local
        self.client = (host.removeprefix("::ffff:"), port)  # the IPv4 form
        self.header_timer = self.loop.call_later(HEADER_SECONDS, self.refuse_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.header_timer.cancel()
        self._unset_keepalive_if_required()  # private: stops the keep-alive timer
        self.write = lambda _: None  # or an earlier, pipelined request would raise
        if self.cycle:  # no circular reference: the memory is freed at once then
            self.cycle.transport = self.transport

    def refuse_slow(self) -> None:
        # If a response is due, the client would take the 408 for that response.
        if not self.cycle or self.cycle.response_complete:
            self.refuse(408)

    def data_received(self, data: bytes) -> None:
        if not self.is_in_body:
            self.header_bytes += len(data)
        try:
            self.parse(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.refuse(400)  # HttpParserUpgrade: from a CONNECT; see `parse`
        if self.header_bytes > MAX_HEADER_BYTES:  # on_headers_complete sets it to 0
            self.refuse(431)

    def parse(self, data: bytes) -> None:
        # httptools raises after headers with `Upgrade`, which our callbacks have only
        # collected. Then a new parser gets the same headers without `Upgrade`, and, by
        # the loop, the rest of `data`. (A CONNECT raises again.)
        while data:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]  # args[0]: where the rest begins
            version = self.parser.get_http_version().encode()
            lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
            lines += [k + b": " + v for k, v in self.headers if k != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            # As in uvicorn: data after a request with `Connection: close` is no error.
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n")

    def on_message_begin(self) -> None:  # the parser has found a request's first byte
        super().on_message_begin()  # which empties `url` and `headers`
        self._unset_keepalive_if_required()
        if self.header_timer.cancelled():  # at the first request, it is running
            self.header_timer = self.loop.call_later(HEADER_SECONDS, self.refuse_slow)

    def on_headers_complete(self) -> None:
        # header_bytes can include a part of the body: count again, without it.
        size = len(self.parser.get_method() + self.url + b"  HTTP/1.1\r\n\r\n")
        size += sum(len(k + v + b": \r\n") for k, v in self.headers)
        if size > MAX_HEADER_BYTES:
            self.refuse(431)
            raise httptools.HttpParserError  # stops parsing; refuse(400) adds nothing
        if self.parser.should_upgrade():
            return  # `parse` repeats these headers, which calls this again
        self.is_in_body = True
        self.header_bytes = 0
        self.header_timer.cancel()
        self._unset_keepalive_if_required()  # the last response may have started it
        super().on_headers_complete()
        self.cycle.keep_alive = False  # so an early response says `Connection: close`
        self.cycle.transport = self  # type: ignore[assignment]
        self.headers = []  # or uvicorn would add trailers to the request's headers

    def close(self) -> None:
        if self.is_in_body and self.cycle.response_complete:
            return  # an early response: on_message_complete will close the connection
        self.transport.close()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # httptools calls this before it raises HttpParserUpgrade
        super().on_message_complete()
        self.is_in_body = False
        if self.cycle.response_complete:  # an early response: now close
            self.transport.close()
            raise httptools.HttpParserError  # stops the parser, as above
        if not self.cycle.response_started:  # else it has said `Connection: close`
            is_kept = self.parser.should_keep_alive() and not self.is_stopping
            is_http_1_0 = self.scope["http_version"] == "1.0"  # as in uvicorn: not kept
            self.cycle.keep_alive = is_kept and not is_http_1_0

    def refuse(self, status: int) -> None:
        if self.cycle and not self.cycle.response_complete and not self.is_in_body:
            self.cycle.keep_alive = False  # send only the response that is due
            self.flow.pause_reading()  # or an endless head could fill the memory
        elif not self.transport.is_closing():  # else nothing more may be sent
            lines = [b"%s: %s\r\n" % pair for pair in self.server_state.default_headers]
            ending = b"content-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + b"".join(lines) + ending)
            self.transport.close()

    def shutdown(self) -> None:
        self.is_stopping = True
        # An early response also starts uvicorn's keep-alive timer, which closes the
        # connection. Let it do so after 1 s, so that no endless body holds up the stop.
        self.timeout_keep_alive = 1
        if self.cycle:
            self.cycle.keep_alive = False  # the response has "Connection: close"
        self.loop.call_later(0.5, super().shutdown)  # a request may be on its way


class ServiceWorker(UvicornWorker):  # type: ignore[misc]
    def run(self) -> None:
        self.config.http = LimitedHttpProtocol
        self.config.server_header = False
        self.config.lifespan = "on"  # with "auto", an exception at the start is hidden
        # Each second, uvicorn calls callback_notify if now - last > timeout_notify.
        self.config.timeout_notify = float("-inf")  # always, even if a clock goes back
        # At 80 % of the time, uvicorn cancels the requests; the rest is for their 503s.
        self.config.timeout_graceful_shutdown = self.cfg.graceful_timeout * 4 // 5
        # After its shutdown, uvicorn raises SIGTERM again: handle_quit exits with 0.
        signal.signal(signal.SIGTERM, self.handle_quit)
        # Listen 4 times on each socket: see the row "Gunicorn" in README's "Practices".
        self.sockets += [s.dup() for s in self.sockets for _ in range(3)]
        super().run()

    def handle_exit(self, *_: object) -> None:  # SIGQUIT: gunicorn sends it at Ctrl+C
        signal.raise_signal(signal.SIGTERM)

    async def callback_notify(self) -> None:
        await super().callback_notify()
        if os.getppid() != self.ppid:  # gunicorn was killed
            signal.raise_signal(signal.SIGTERM)


worker_class = ServiceWorker
