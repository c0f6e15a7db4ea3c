"""gunicorn reads this file by itself, in the folder in which it is started.

BIND or PORT, WORKERS, MAX_REQUESTS, GRACEFUL_TIMEOUT and FORWARDED_ALLOW_IPS (gunicorn's
own) come from the environment, and only from there: `.env` is read later, by main.py.
"""

import asyncio
import gc
import math
import os
import signal
import sys
from http import HTTPStatus
from pathlib import Path

from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.util import parse_address
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 10  # also for the rest of a body that was answered before it had come
STALL_SECONDS = 60  # without a byte taken from an answer
LINGER_SECONDS = 0.5


def number(name: str, default: int, least: int) -> int:
    text = os.getenv(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise SystemExit(f"bad settings: {name}: should be a number from {least} on")
    return int(text)


def usable_cpus() -> int:
    """What the container may use: its affinity and cgroup quota, not its host's count."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cgroup = Path("/sys/fs/cgroup")
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except OSError:
        try:  # version 1
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().replace("-1", "max")
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            quota = period = "max"
    share = math.inf if "max" in quota else int(quota) / int(period)
    return max(1, min(len(affinity(0)), math.ceil(min(share, 1024))))


def address(text: str) -> str:
    try:
        parse_address(text)
    except RuntimeError as error:
        raise SystemExit(f"bad settings: BIND: {error}") from None
    return text


class Protocol(HttpToolsProtocol):
    """uvicorn's, with the bounds that it lacks: a proxy usually has them.

    A head may have 64 KiB and 10 s; the rest of a body that nobody reads has 10 s, and
    an answer that is not taken 60 s. (nginx: large_client_header_buffers 32 KiB,
    client_header_timeout, client_body_timeout and send_timeout 60 s.)
    """

    in_head = True  # or between two requests
    head_bytes = 0
    deadline = stall = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.await_client()
        if self.config.server.should_exit:  # accepted in the very moment
            self.shutdown()

    def connection_lost(self, error) -> None:
        self.forget_deadline()
        self.resume_writing()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self.in_head:
            self.head_bytes += len(data)
            if self.deadline is None:
                self.await_client()
        super().data_received(data)
        if self.in_head and self.head_bytes > HEAD_BYTES:
            self.refuse(431)

    def on_headers_complete(self) -> None:
        # The bytes may be those of the body, too; only then is it worth to count again.
        sizes = (len(name) + len(value) + 4 for name, value in self.headers)
        if self.head_bytes > HEAD_BYTES < len(self.url) + sum(sizes):
            raise ValueError("the head is too large")  # the parser stops: see below
        self.in_head = False
        self.forget_deadline()
        super().on_headers_complete()

    def send_400_response(self, message: str) -> None:
        self.refuse(431 if self.in_head and self.head_bytes > HEAD_BYTES else 400)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.in_head, self.head_bytes = True, 0
        if self.cycle.response_complete:
            self.await_client()
        else:
            self.forget_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.in_head:
            self.await_client()

    def await_client(self) -> None:
        self.forget_deadline()
        self.deadline = self.loop.call_later(HEAD_SECONDS, self.on_deadline)

    def forget_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def on_deadline(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.await_client()  # the next head has begun while this answer is made
        elif self.in_head and self.head_bytes:
            self.refuse(408)
        else:
            self.transport.abort()

    def refuse(self, status: int) -> None:
        phrase = HTTPStatus(status).phrase.encode()
        head = (
            b"content-type: text/plain\r\nconnection: close\r\ncontent-length: %d\r\n"
        )
        self.transport.write(
            STATUS_LINE[status] + head % len(phrase) + b"\r\n" + phrase
        )
        self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # close() would wait for ever until the answer is taken

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stall is not None:
            self.stall.cancel()
            self.stall = None

    def shutdown(self) -> None:
        # Requests that are on their way to an idle connection still get their answer.
        self.loop.call_later(LINGER_SECONDS, super().shutdown)


class Worker(UvicornWorker):
    """uvicorn's, which ends in time and on every signal that gunicorn sends."""

    CONFIG_KWARGS = {
        "loop": "uvloop",
        "http": Protocol,
        "ws": "none",
        "lifespan": "on",
        "server_header": False,
    }

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        grace = self.cfg.graceful_timeout
        # What is cancelled then needs a moment before gunicorn's SIGKILL.
        self.config.timeout_graceful_shutdown = max(grace - 3, grace / 2)
        server = self.config.server = Server(self.config)
        # The master's word for SIGINT and SIGQUIT; the worker's own handler ignores it.
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGQUIT, setattr, server, "should_exit", True)
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)


class ServiceLogger(Logger):
    """main.py has set its handlers up; gunicorn would add its own at each SIGHUP."""

    def setup(self, cfg) -> None:
        self.cfg, self._access_log_enabled = cfg, False


def when_ready(server: Arbiter) -> None:
    gc.collect()
    gc.freeze()  # the collector would touch, so copy, pages that workers share


wsgi_app = "main:app"
bind = address(os.getenv("BIND") or f"0.0.0.0:{number('PORT', 8000, 1)}")
workers = number("WORKERS", usable_cpus(), 1)
worker_class = Worker
logger_class = ServiceLogger
preload_app = True  # a bad setting ends the start; the limiter's memory is shared
max_requests = number("MAX_REQUESTS", 0, 0)  # 0: never; see the README
max_requests_jitter = max_requests // 10
graceful_timeout = number("GRACEFUL_TIMEOUT", 30, 1)
timeout = graceful_timeout + 30  # of a loop that stands still, not of a request
keepalive = 75  # longer than a load balancer's 60, which else sends into the closing
control_socket_disable = True  # it would need a home to write to
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None
