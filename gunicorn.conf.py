"""gunicorn reads this file by itself, in the folder in which it is started.

BIND or PORT, WORKERS, MAX_REQUESTS, GRACEFUL_TIMEOUT and gunicorn's own
FORWARDED_ALLOW_IPS come from the environment, and only from there: `.env` is read
later, by main.py.
"""

import asyncio
import gc
import math
import os
import signal
import sys
from http import HTTPStatus
from pathlib import Path
from typing import ClassVar

from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.util import parse_address
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 10  # also for the rest of a body that was answered before it had come
STALL_SECONDS = 60  # without a byte taken from an answer
PIPELINED = 64  # requests that wait for the answers before theirs
LINGER_SECONDS = 0.5


def number(name: str, default: int, least: int, most: int = 1_000_000_000) -> int:
    text = os.getenv(name) or str(default)
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        raise SystemExit(f"bad settings: {name}: should be from {least} to {most}")
    return int(text)


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What the container may use: its affinity and cgroup quota, not the host's."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
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


def addresses(text: str) -> list[str]:
    try:
        for part in text.split(","):
            place = parse_address(part)
            if isinstance(place, tuple) and not 0 <= place[1] <= 65535:
                raise RuntimeError(f"{place[1]} is not a port")
    except RuntimeError as error:
        raise SystemExit(f"bad settings: BIND: {error}") from None
    return text.split(",")


class Protocol(HttpToolsProtocol):
    """uvicorn's, with the bounds that it lacks: a proxy usually has them.

    A head may have 64 KiB and 10 s, trailers 64 KiB; the rest of a body that nobody
    reads has 10 s, an answer that is not taken 60 s. (nginx:
    large_client_header_buffers 32 KiB; client_header_timeout, client_body_timeout and
    send_timeout 60 s.)
    """

    in_head = True  # or between two requests
    overhead = 0  # bytes that are not of a body: of a head, of chunks, of trailers
    counted = True  # whether `overhead` has all bytes of the head
    lingers = False  # until the body of who wants to close is read
    deadline = stall = running = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.await_client()
        if self.server and self.server[1] is None:  # a unix socket: as local as that
            self.client = "127.0.0.1", 0
        elif self.client:  # on [::] IPv4 comes mapped, in FORWARDED_ALLOW_IPS it is not
            self.client = self.client[0].removeprefix("::ffff:"), self.client[1]
        if self.config.server.should_exit:  # accepted in the very moment
            self.shutdown()

    def connection_lost(self, error) -> None:
        self.forget_deadline()
        self.forget_stall()
        if self.running is not None:  # uvicorn tells only the last of a pipeline
            self.running.disconnected = True
            self.running.message_event.set()
        self.pipeline.clear()
        super().connection_lost(error)

    def _start_asgi_task(self, cycle, app) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, app)

    def eof_received(self) -> bool:
        # Who has asked, and has no more to say, may still listen.
        waits = self.cycle is not None and not self.cycle.response_complete
        listens = waits and self.in_head
        if listens:
            self.cycle.keep_alive = False
        return listens

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.counted = self.overhead > 0  # not behind another one in the same segment
        self.overhead = self.overhead or 1

    def data_received(self, data: bytes) -> None:
        self.overhead += len(data)
        super().data_received(data)
        if self.in_head and self.overhead and self.deadline is None:
            self.await_client()  # not for a head that came whole, as nearly all do
        if self.overhead > HEAD_BYTES and not self.transport.is_closing():
            self.refuse(431)

    def on_headers_complete(self) -> None:
        if self.overhead > HEAD_BYTES or not self.counted:  # with a body, perhaps
            sizes = (len(name) + len(value) + 4 for name, value in self.headers)
            if (size := len(self.url) + sum(sizes)) > HEAD_BYTES:
                self.overhead = size
                raise ValueError  # which stops the parser: see send_400_response
        if len(self.pipeline) >= PIPELINED:
            raise ValueError
        self.in_head, self.overhead = False, 0
        self.forget_deadline()
        super().on_headers_complete()
        self.headers = []  # for trailers, which are nobody's
        # To close before all is read would reset the connection, the answer with it.
        self.lingers = not (self.cycle.keep_alive or self.expect_100_continue)
        self.cycle.keep_alive |= self.lingers

    def on_body(self, body: bytes) -> None:
        self.overhead -= len(body)
        super().on_body(body)

    def on_chunk_complete(self) -> None:
        self.overhead -= 5  # a digit and two ends of lines: small chunks are no attack

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.in_head, self.overhead = True, 0
        self.forget_deadline()
        if not self.cycle.response_complete:
            self.cycle.keep_alive &= not self.lingers
        elif self.lingers:
            self.transport.close()
            self.await_reader()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()  # uvicorn reads on, however many wait
        if not self.in_head:
            self.await_client()
        if self.transport.is_closing():
            self.await_reader()

    def await_client(self) -> None:
        self.forget_deadline()
        self.deadline = self.loop.call_later(HEAD_SECONDS, self.on_deadline)

    def await_reader(self) -> None:
        if self.stall is None:
            self.stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def forget_deadline(self) -> None:
        self._unset_keepalive_if_required()
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def on_deadline(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.await_client()  # the next head has begun while this answer is made
        elif self.in_head and self.overhead:
            self.refuse(408)
        else:
            self.transport.abort()

    def send_400_response(self, message: str) -> None:
        self.refuse(431 if self.in_head and self.overhead > HEAD_BYTES else 400)

    def refuse(self, status: int) -> None:
        phrase = HTTPStatus(status).phrase.encode()
        head = (
            b"content-type: text/plain\r\nconnection: close\r\ncontent-length: %d\r\n"
        )
        self.transport.write(
            STATUS_LINE[status] + head % len(phrase) + b"\r\n" + phrase
        )
        self.transport.close()
        self.await_reader()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # close() would wait for ever until the answer is taken

    def pause_writing(self) -> None:
        super().pause_writing()
        self.await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self.forget_stall()

    def forget_stall(self) -> None:
        if self.stall is not None:
            self.stall.cancel()
            self.stall = None

    def _unsupported_upgrade_warning(self) -> None:
        """Servers may ignore it, and there is one line a request already."""

    def shutdown(self) -> None:
        # Requests that are on their way to an idle connection still get their answer.
        self.loop.call_later(LINGER_SECONDS, super().shutdown)


class PatientServer(Server):
    """uvicorn's, which would end before those whom it cancels have answered."""

    async def _wait_tasks_to_complete(self) -> None:
        try:
            await super()._wait_tasks_to_complete()
        except asyncio.CancelledError:  # the grace is over
            patience = min(1, self.config.timeout_graceful_shutdown / 3)
            for _ in range(2):  # the second time they let go of a statement that hangs
                if tasks := set(self.server_state.tasks):
                    for task in tasks:
                        task.cancel()
                    await asyncio.wait(tasks, timeout=patience)
            raise


class Worker(UvicornWorker):
    """uvicorn's, which ends in time and on every signal that gunicorn sends."""

    CONFIG_KWARGS: ClassVar = {
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
        self.config.timeout_graceful_shutdown = max(grace - 4, grace / 2)
        server = self.config.server = PatientServer(self.config)
        # The master's word for SIGINT and SIGQUIT; the worker's handler ignores it. As
        # SIGTERM, because that ends without waiting for the threads of a database.
        loop, handle = asyncio.get_running_loop(), server.handle_exit
        loop.add_signal_handler(signal.SIGQUIT, handle, signal.SIGTERM, None)
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def callback_notify(self) -> None:
        await super().callback_notify()
        if os.getppid() != self.ppid:  # killed: nobody would ever end this one
            self.config.server.should_exit = True


class ServiceLogger(Logger):
    """main.py has set its handlers up; gunicorn would add its own at each SIGHUP."""

    def setup(self, cfg) -> None:
        self.cfg, self._access_log_enabled = cfg, False


def when_ready(server: Arbiter) -> None:
    gc.collect()
    gc.freeze()  # the collector would touch, so copy, pages that workers share


wsgi_app = "main:app"
bind = addresses(os.getenv("BIND") or f"0.0.0.0:{number('PORT', 8000, 1, 65535)}")
workers = number("WORKERS", usable_cpus(), 1)
worker_class = Worker
logger_class = ServiceLogger
preload_app = True  # a bad setting ends the start; the limiter's memory is shared
max_requests = number("MAX_REQUESTS", 0, 0)  # 0: never; see the README
max_requests_jitter = max_requests // 10
graceful_timeout = number("GRACEFUL_TIMEOUT", 30, 1)
forwarded_allow_ips = os.getenv("FORWARDED_ALLOW_IPS") or "127.0.0.1,::1"
timeout = graceful_timeout + 30  # of a loop that stands still, not of a request
keepalive = 75  # longer than a load balancer's 60, which else sends into the closing
control_socket_disable = True  # it would need a home to write to
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None
