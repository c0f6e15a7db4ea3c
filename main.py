"""A production-grade FastAPI service in one module: users, access tokens and items.

Read it from the top: a section uses only names that are defined above it. At a first
reading, skip the bodies of FairPool, timeout_in_steps, MonitoredBackend and the rate
limiters: to understand the other parts, their docstrings are enough.

A request passes through middleware, dependencies, route, service, repository and
database. The verb of a route, service or repository function tells its layer: get_user
is a route, read_user a service, find_user a repository function.

    Settings       every variable is validated before the server starts
    Logging        one JSON object per record; clients cannot forge a line
    Errors         every error has one format and reveals nothing internal
    Models         the tables; missing ones are created, existing ones never altered
    Database       a request holds a connection only while it talks to the database
    Schemas        bodies of requests and responses; text is bounded and valid Unicode
    Security       passwords are hashed in threads; tokens can be revoked
    Repositories   SQL; functions named add_ find_ list_ update_ remove_
    Services       business logic; register_ create_ read_ change_ discard_ and others
    Rate limiting  exact sliding windows, in shared memory or in Redis
    Middleware     what every request passes and every response gets
    Dependencies   what a route asks for, and what a test overrides
    Health routes  what orchestrators and monitors ask
    API routes     HTTP; get_ post_ patch_ delete_
    Application    create_app puts the parts together

    Run:     ENVIRONMENT=development gunicorn
    Test:    pytest
    Develop: ENVIRONMENT=development uvicorn main:app --reload
"""

import asyncio
import ctypes
import fcntl
import gc
import ipaddress
import json
import logging
import math
import mmap
import os
import pathlib
import re
import resource
import secrets
import select
import socket
import sqlite3
import sys
import tempfile
import time
import unicodedata
import warnings
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import Context, ContextVar
from datetime import UTC, datetime
from functools import cache, lru_cache, partial
from io import BufferedRandom
from operator import attrgetter
from traceback import clear_frames
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

import psycopg
import pydantic
import sqlalchemy as sa
from dotenv.parser import parse_stream
from fastapi import APIRouter, Depends, FastAPI, Form, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError, ResponseValidationError
from fastapi.routing import iter_route_contexts
from fastapi.security import OAuth2PasswordBearer
from jose import jwt
from jose.utils import base64url_decode, base64url_encode
from psycopg.conninfo import make_conninfo, timeout_from_conninfo
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from pydantic import MISSING, AfterValidator, BaseModel, BeforeValidator, Field
from pydantic.types import SecretStr, StringConstraints
from pydantic_core import ErrorDetails, PydanticCustomError, from_json, to_json
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError
from python_multipart.multipart import parse_options_header
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from sqlalchemy import event, orm
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry
from sqlalchemy.util import await_  # awaits in sync methods: see FairPool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# --- Settings -------------------------------------------------------------------------
# What an operator can set. No other section reads the environment.

DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",  # an older name that some platforms still use
}
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def check_libpq_options(url: sa.URL) -> None:
    """Raise an exception for options with which every connect would fail."""
    # create_connect_args turns the URL into libpq's options, as create_engine does.
    dialect_class = url.get_dialect()
    _, options = dialect_class().create_connect_args(url)
    make_conninfo(**options)  # checks their names
    if "connect_timeout" in options:
        # Check that it is a number, but only if it is given: otherwise, psycopg would
        # check PGCONNECT_TIMEOUT, which postgresql_parameters always overrides.
        timeout_from_conninfo(dict(options))  # a dict for mypy


def parse_database_url(value: str) -> sa.URL:
    """Check the URL of a database, and return it with the name of the async driver."""
    try:
        url = sa.make_url(value)
        url = url.set(drivername=DRIVERS[url.get_backend_name()])
        if url.get_backend_name() == "postgresql":
            check_libpq_options(url)
    except (sa_exc.ArgumentError, psycopg.ProgrammingError, ValueError, KeyError):
        raise ValueError("not a PostgreSQL or SQLite URL with valid options") from None
    # A password must have %40 for an @. In user:pass@word@host, SQLAlchemy takes
    # word@host for the host. Drivers log the host, and so a part of the password.
    if url.get_backend_name() == "postgresql" and value.count("@") > 1:
        raise ValueError("has an @ that is not encoded as %40")
    if url.port is not None and not 1 <= url.port <= 65535:
        raise ValueError("has a bad port")
    # libpq checks the values of other options only when it connects. sslmode is the
    # most usual one, so check its value here.
    if url.query.get("sslmode", "prefer") not in SSL_MODES:
        raise ValueError(f"has an sslmode that is not one of {', '.join(SSL_MODES)}")
    if url.get_backend_name() == "sqlite":
        # Compare the URL with one that has only a file name. This refuses a host, as in
        # sqlite://./app.db, and options, such as mode=memory. (In memory, each
        # connection of the pool would have its own database.)
        file_url = sa.URL.create(url.drivername, database=url.database)
        path = url.database
        if url != file_url or not path or path == ":memory:" or path.endswith("/"):
            raise ValueError("should name a file, without options: sqlite:///./app.db")
    # SQLAlchemy hides only the password before the @ when it prints the URL.
    if "password" in url.query:
        raise ValueError("has a password in its options: use user:password@host")
    return url


# Matches a URL that redis-py cannot misread. In a password, a /, ? or # must be
# encoded. Example: in redis://me:12/34@host, the password is 12/34, but redis-py takes
# me:12 for host and port, which get into the log.
# What redis-py would ignore is also refused: a path that is no number, or a host in
# unix://host/path.
REDIS_URL_PATTERN = re.compile(
    r"""
    (
        rediss?://
        ([^/?#]*@)?     # user:password@
        [^/?#@\s]*      # host:port
        (/[0-9]*/?)?    # number of the database, if any
    |
        unix://
        ([^/?#]*@)?     # user:password@
        /[^?#@]*        # path of the socket
    )
    ([?][^#@]*)?        # options
    """,
    re.VERBOSE,
)


def check_redis_url(value: str) -> str:
    """Raise ValueError if redis-py refuses the URL, or would misread it."""
    if not REDIS_URL_PATTERN.fullmatch(value):
        raise ValueError("should be like redis://:pass@host:6379/0, with /?#@ encoded")
    try:
        pool: Any = Redis.from_url(value).connection_pool  # its methods have no types
        pool.get_encoder().encode("")  # checks the option "encoding"
        pool.make_connection()  # checks the other options; it does not connect
    except Exception:  # noqa: BLE001 - ValueError, TypeError, LookupError, RedisError
        raise ValueError("not a Redis URL with valid options") from None
    if urlsplit(value).port == 0:  # redis-py would take 6379
        raise ValueError("has a bad port")
    return value


def parse_origin(value: str) -> str:
    """Return the origin as browsers send it: in lower case, without :80 or :443."""
    if value == "*":
        return value
    # AnyUrl drops the scheme's default port, such as 443, and appends "/".
    origin = str(pydantic.AnyUrl(value)).removesuffix("/").lower()
    # scheme://host without path, query, fragment, user or wildcard.
    if not re.fullmatch(r"[^:]+://[^/?#@*]+", origin):
        raise ValueError("should be an origin such as https://app.example")
    return origin


def parse_json(value: object) -> object:
    """Decode JSON. (Settings(CORS_ORIGINS=[…]) in code passes the list itself.)"""
    if isinstance(value, str):
        try:
            return from_json(value)
        except (ValueError, TypeError):  # TypeError: the text is not valid Unicode
            raise ValueError('should be JSON, such as ["https://a.example"]') from None
    return value


# pydantic-settings decodes a variable as JSON if its type is a list or a tuple.
# NoDecode prevents this. DatabaseUrl needs it, because sa.URL is a kind of tuple, but
# not written as JSON. Origins needs it so that parse_json's error shows an example.
DatabaseUrl = Annotated[sa.URL, NoDecode, BeforeValidator(parse_database_url)]
RedisUrl = Annotated[str, AfterValidator(check_redis_url)]
Origin = Annotated[str, AfterValidator(parse_origin)]
Origins = Annotated[list[Origin], NoDecode, BeforeValidator(parse_json)]
# pydantic checks that a str is valid Unicode only if its length or pattern is given.
# (A lone surrogate is invalid. It comes from "\ud800" in JSON, or from a variable that
# is not UTF-8.) The length is arbitrary.
ValidText = Annotated[str, Field(max_length=1000)]
# One segment, such as /api, /v1.2 or /.api, but no single or double dot: clients remove
# these from a URL.
PATH_SEGMENT = r"/\.?[A-Za-z0-9_~-][A-Za-z0-9._~-]*"
# Bounded, because the rate limiter keeps one timestamp per allowed request in memory.
RequestCount = Annotated[int, Field(ge=1, le=10_000)]
# The names that logging knows. WARN and FATAL are older ones.
LogLevel = Literal[
    "NOTSET", "DEBUG", "INFO", "WARN", "WARNING", "ERROR", "FATAL", "CRITICAL"
]
# At most a day, because more is surely a mistake.
Seconds = Annotated[float, Field(gt=0, le=86_400)]
ENV_FILE = ".env"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_file=ENV_FILE,
        env_ignore_empty=True,  # an empty variable counts as not set
        extra="ignore",  # .env may have variables of other programs
        hide_input_in_errors=True,  # an invalid value may be a secret
    )
    PROJECT_NAME: ValidText = "Items"
    PROJECT_DESCRIPTION: ValidText = "Users and their items."
    VERSION: ValidText = "1.0.0"
    ENVIRONMENT: Literal["development", "test", "production"] = "production"
    DEBUG: bool = False
    API_V1_PREFIX: str = Field(default="/api/v1", pattern=rf"^({PATH_SEGMENT})+$")
    # The prefix that a reverse proxy strips from the path.
    ROOT_PATH: str = Field(default="", pattern=rf"^({PATH_SEGMENT})*$")
    # The random default is for development only: see refuse_unsafe_values. All workers
    # have the same key, because gunicorn imports this module before it forks.
    # (RFC 7518 § 3.2 wants 32 bytes for HS256. For HS384 and HS512, it wants 48 and 64:
    # this is not checked, so that the key need not change with the algorithm.)
    SECRET_KEY: SecretStr = Field(default=SecretStr(secrets.token_hex()), min_length=32)
    ACCESS_TOKEN_EXPIRE_MINUTES: int = Field(default=30, gt=0)
    ALGORITHM: Literal["HS256", "HS384", "HS512"] = "HS256"
    # This URL and REDIS_URL can have passwords. With exclude=True, they are missing in
    # model_dump(), and so in the JSON of a log line with extra={"settings": settings}.
    # (The default is parsed, because mypy wants it to have the field's type.)
    DATABASE_URL: DatabaseUrl = Field(
        default=parse_database_url("sqlite:///./app.db"), exclude=True
    )
    DATABASE_POOL_SIZE: int = Field(default=5, ge=1)
    DATABASE_MAX_OVERFLOW: int = Field(default=10, ge=0)
    DATABASE_TIMEOUT_SECONDS: Seconds = 5
    CORS_ORIGINS: Origins = []
    RATE_LIMIT_REQUESTS: RequestCount = 100
    # The limiter counts nanoseconds in 64 bits: 10**9 seconds still fit.
    RATE_LIMIT_WINDOW_SECONDS: int = Field(default=60, gt=0, le=10**9)
    RATE_LIMIT_LOGIN_REQUESTS: RequestCount = 10
    # repr=False, because a str shows its password. (The text of a sa.URL hides it.)
    REDIS_URL: RedisUrl | None = Field(default=None, exclude=True, repr=False)
    MAX_BODY_BYTES: int = Field(default=64 * 1024, gt=0)
    REQUEST_TIMEOUT_SECONDS: Seconds = 30
    LOG_LEVEL: LogLevel = "INFO"

    @pydantic.model_validator(mode="before")
    @classmethod
    def strip_white_space(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Strip texts: `docker run --env-file` keeps spaces at the ends of lines.

        A text that has only spaces then counts as not set, like an empty one.
        """
        texts = {k: v.strip() for k, v in values.items() if isinstance(v, str)}
        stripped = values | texts
        return {k: v for k, v in stripped.items() if v != ""}

    @pydantic.model_validator(mode="after")
    def refuse_unsafe_values(self) -> "Settings":
        """Raise ValueError for values that are safe in development only."""
        if self.ENVIRONMENT == "development":
            return self
        # The messages begin with the name: this validator belongs to no field, so
        # pydantic's error does not name one.
        if "SECRET_KEY" not in self.model_fields_set:
            raise ValueError("SECRET_KEY: is required outside development")
        if "*" in self.CORS_ORIGINS:
            raise ValueError("CORS_ORIGINS: * is allowed in development only")
        if self.DEBUG and self.ENVIRONMENT == "production":
            raise ValueError("DEBUG: is refused in production, because it logs SQL")
        return self


def describe_invalid_value(error: ErrorDetails) -> str:
    """Return text such as "DEBUG: …", without the value, which may be secret.

    `loc` has the name. An error of refuse_unsafe_values has an empty `loc`: its message
    begins with the name.
    """
    names = [str(part) for part in error["loc"]]
    message = error["msg"].removeprefix("Value error, ")  # pydantic adds it
    # For a SecretStr, pydantic says "Value should have at least 32 items after …".
    if message.startswith("Value should"):
        message = message.replace("items after validation", "characters")
    return ": ".join([*names, message])


SECRETS_FOLDER = "/run/secrets"  # a file for each variable


def check_env_file() -> None:
    """Raise ValueError for a line that cannot be parsed: python-dotenv only warns."""
    # Some password managers provide .env as a FIFO, which can be read only once: leave
    # it to Settings.
    if pathlib.Path(ENV_FILE).is_fifo():
        return
    with suppress(FileNotFoundError), open(ENV_FILE, encoding="utf-8") as file:
        bindings = parse_stream(file)
        bad_lines = [binding.original.line for binding in bindings if binding.error]
        if bad_lines:
            raise ValueError(f"no NAME=value near line {bad_lines[0]}")


@lru_cache
def get_settings() -> Settings:
    """Read the settings. A bad value ends the process with a line that names it."""
    # The folder is an argument here, and not in model_config, so that Settings() in
    # tests does not read it. (If it is missing, pydantic-settings warns: pass None.)
    folder = SECRETS_FOLDER if os.path.isdir(SECRETS_FOLDER) else None
    try:
        check_env_file()
        # If a secret is a folder (Docker makes one in place of a missing file),
        # pydantic-settings only warns, and goes on without it. With action="error", the
        # warning is raised, and arrives below as the cause of a SettingsError.
        with warnings.catch_warnings(action="error", category=UserWarning):
            # Without pydantic's plugin, mypy does not know this argument.
            return Settings(_secrets_dir=folder)  # type: ignore[call-arg]
    except pydantic.ValidationError as error:
        reason = "; ".join(describe_invalid_value(e) for e in error.errors())
    except SettingsError as error:
        # A secret that is no file or cannot be read. The error names the variable; its
        # cause says what is wrong.
        reason = f"{error}: {error.__cause__}"
    except (OSError, ValueError) as error:  # .env cannot be read, decoded or parsed
        reason = f"{error}: in {ENV_FILE}"
    raise SystemExit(f"bad settings: {reason}")


# The rest of this section is for gunicorn.conf.py, whose settings come from the
# environment only. It is here so that all settings are read in one section.
def read_text(name: str, default: str) -> str:
    return os.getenv(name, "").strip() or default


def read_number(name: str, default: int, minimum: int = 1, maximum: int = 10**6) -> int:
    """Read a number. A bad value ends the process, as in get_settings."""
    text = read_text(name, str(default))
    if re.fullmatch("[0-9]{1,7}", text) and minimum <= int(text) <= maximum:
        return int(text)
    raise SystemExit(f"bad settings: {name}: not a number from {minimum} to {maximum}")


def read_addresses() -> list[str]:
    """Read BIND, else PORT. BIND is checked: gunicorn's own errors do not name it."""
    port = read_number("PORT", 8000, maximum=65535)
    addresses = re.split(r"\s*,\s*", read_text("BIND", f"0.0.0.0:{port}"))
    pattern = r"(?:\[.+\]|[^:/]*):(?P<port>[0-9]{1,5})|unix:.+|fd://[0-9]+"
    for address in addresses:
        match = re.fullmatch(pattern, address)
        if not match or int(match["port"] or 0) > 65535:
            raise SystemExit(
                f"bad settings: BIND: {address!r} is not host:port, unix:… or fd://…"
            )
    return addresses


def usable_cpus(quota_file: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Return how many CPUs the container may use: its host may have more.

    (A test passes another `quota_file`.)
    """
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    with suppress(OSError, ValueError), open(quota_file) as file:
        quota, period = file.read().split()  # "200000 100000": two CPUs
        cpus = min(cpus, math.ceil(int(quota) / int(period)))  # ValueError for "max"
    return cpus


# --- Logging --------------------------------------------------------------------------
# Each record is one JSON line on stdout; in development, it is text, with its further
# lines indented. Control characters are escaped, so that no client can forge a record.

logger = logging.getLogger(__name__)
request_id_context: ContextVar[str | None] = ContextVar("request_id", default=None)
# The attributes that each record has. All others come from `extra`, and are logged.
# (color_message is uvicorn's copy of the message for terminals.)
STANDARD_FIELDS = set(vars(logging.makeLogRecord({}))) | {"color_message"}
# Linux writes a line of up to 4 KiB (PIPE_BUF) to a pipe in one piece; a longer one
# could be mixed with others. 2800 leaves room for the other fields.
MAX_TRACEBACK_BYTES = 2800
# A library's part of a traceback: the line "  File …", and the indented code under it.
# (The folder is site-packages, or on Debian's own Python dist-packages.)
LIBRARY_FRAME = re.compile(
    r"^  File .*(site|dist)-packages.*\n(    .*\n)*", re.MULTILINE
)
LIBRARY_LEVELS = {
    "asyncio": "WARNING",  # logs the name of its selector at each start
    # These log each statement or URL, some with parameters.
    "aiosqlite": "WARNING",
    "httpx": "WARNING",  # used by the tests only; requirements.txt says more
    "sqlalchemy": "WARNING",
    "uvicorn.asgi": "WARNING",  # with LOG_LEVEL=NOTSET, it would log query strings
    # These repeat what the request's own line says.
    "psycopg": "ERROR",
    "python_multipart": "ERROR",
    # SQLAlchemy names a pool's logger after the module and the class of the pool. The
    # logger writes a harmless ERROR if a request is cancelled while it returns a
    # connection.
    f"{__name__}.FairPool": "CRITICAL",
}
# The servers' loggers. Their own handlers write another format, so setup_logging
# replaces these handlers.
SERVER_LOGGERS = ("gunicorn.error", "uvicorn.error", "uvicorn")


def shorten_traceback(text: str) -> str:
    """Cut the beginning, so that the text has at most MAX_TRACEBACK_BYTES as JSON.

    The error itself is at the end, and stays.
    """
    if len(text) > MAX_TRACEBACK_BYTES:
        # First leave out the frames of libraries: SQLAlchemy's alone exceed the limit,
        # and would push out those of your code.
        text = LIBRARY_FRAME.sub("", text)[-MAX_TRACEBACK_BYTES:]
    # The JSON is ASCII, so its length is its number of bytes. It can be longer than the
    # text, because it writes "é" as \u00e9. So cut until it fits.
    while len(json.dumps(text)) > MAX_TRACEBACK_BYTES:
        text = text[50:]  # 50 at a time, because each step writes the JSON again
    return text


def safe_text(value: object) -> str:
    """Return str(value), or the name of the value's class if str() fails."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a __repr__ can raise anything
        return f"<{type(value).__name__}>"


class JsonFormatter(logging.Formatter):
    """Write a record as one JSON object, with the fields of its `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = self.collect_fields(record)
        try:
            # This is four times as fast as json.dumps.
            line = to_json(fields, ensure_ascii=True, fallback=str, inf_nan_mode="null")
            return line.decode()
        except ValueError:  # such as invalid Unicode
            return self.format_slowly(fields)

    def format_slowly(self, fields: dict[str, object]) -> str:
        """Write what to_json refuses, such as invalid Unicode, or a cycle."""
        try:
            return json.dumps(fields, default=str, allow_nan=False)  # NaN is not JSON
        except Exception:  # noqa: BLE001 - a failing __str__ can raise anything
            return json.dumps({name: safe_text(v) for name, v in fields.items()})

    def safe_message(self, record: logging.LogRecord) -> str:
        try:
            return record.getMessage()
        except Exception:  # noqa: BLE001 - such as logger.info("%d", "a")
            return f"{safe_text(record.msg)} {safe_text(record.args)}"

    def collect_fields(self, record: logging.LogRecord) -> dict[str, Any]:
        moment = datetime.fromtimestamp(record.created, UTC)
        fields = {
            "timestamp": moment.isoformat().replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": self.safe_message(record),
            "request_id": request_id_context.get(),
        }
        for name, value in vars(record).items():
            if name in STANDARD_FIELDS:
                continue
            # An extra field such as "level" must not replace the record's own.
            key = f"{name}_" if name in fields else name
            # A sa.URL is a tuple with the password. Its text hides the password.
            fields[key] = str(value) if isinstance(value, sa.URL) else value
        if record.exc_info:
            traceback = self.formatException(record.exc_info)
            fields["exception"] = shorten_traceback(traceback)
        return fields


class TextFormatter(JsonFormatter):
    """Write the same fields as text for people."""

    def format(self, record: logging.LogRecord) -> str:
        fields = self.collect_fields(record)
        # uvicorn logs an exception in `lifespan` as a message of many lines. (An empty
        # message has no line.)
        first_line, *lines = fields["message"].splitlines() or [""]
        fields["message"] = first_line
        lines += safe_text(fields.pop("exception", "")).splitlines()
        parts = [str(fields.pop(name)) for name in ("timestamp", "level", "message")]
        parts += [f"{name}={safe_text(value)}" for name, value in fields.items()]
        # ascii() escapes control characters, and adds quotes, which [1:-1] removes.
        safe_lines = [ascii(line)[1:-1] for line in [" ".join(parts), *lines]]
        # With "    | ", none of the other lines can look like a record.
        return "\n    | ".join(safe_lines)


def setup_logging(settings: Settings) -> None:
    """Give all loggers one handler and one format: also uvicorn's and gunicorn's."""
    is_development = settings.ENVIRONMENT == "development"
    level = "DEBUG" if settings.DEBUG else settings.LOG_LEVEL
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(TextFormatter() if is_development else JsonFormatter())
    # A logger in LIBRARY_LEVELS has a level of its own, and ignores the root's. So if
    # LOG_LEVEL is ERROR, only the handler's level stops the warnings of that logger.
    handler.setLevel(level)
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name, library_level in LIBRARY_LEVELS.items():
        logging.getLogger(name).setLevel(library_level)
    if settings.DEBUG:
        logging.getLogger("sqlalchemy").setLevel("INFO")  # it logs SQL at INFO
    for name in SERVER_LOGGERS:
        server_logger = logging.getLogger(name)
        # Each needs the handler itself: UvicornWorker copies the handlers of
        # gunicorn.error to uvicorn.error, and stops uvicorn.error from propagating.
        # (Under uvicorn alone, "uvicorn" has a handler, which this replaces.)
        server_logger.handlers = [handler]
        server_logger.setLevel("NOTSET")  # no level of its own: it takes the root's
        server_logger.propagate = False  # or the root's handler would write it, too
    # uvicorn writes its access log only if this logger or a parent has a handler. So
    # remove its handlers and its link to parents: RequestLoggingMiddleware writes ours.
    access_logger = logging.getLogger("uvicorn.access")
    access_logger.handlers = []
    access_logger.propagate = False
    logging.captureWarnings(True)  # or Python would write them to stderr, as text
    # Do not collect the line of code, the thread and the process: this saves 7 µs per
    # record. (Python's Logging HOWTO describes these switches, under "Optimization".)
    logging._srcfile = None
    logging.logThreads = False
    logging.logProcesses = False
    logging.logMultiprocessing = False
    # If stdout is closed or full, logging would print a traceback for each record.
    logging.raiseExceptions = False


def summarize_error(error: BaseException) -> str:
    """Return one line for a log: the error's message, else the name of its class.

    For a database error, it is the driver's message, which is shorter.
    """
    # SQLAlchemy keeps the driver's exception in `orig`.
    text = str(getattr(error, "orig", None) or error)
    words = text.split()  # at line breaks, too
    return " ".join(words)[:500] or type(error).__name__


# --- Errors ---------------------------------------------------------------------------
# Services raise AppExceptions; error_response writes the body of every error. (The
# handler of database errors is in the section Database.)

ERROR_CODES = {  # status code: the `error` in the body
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "payload_too_large",
    415: "unsupported_media_type",  # no route here gives it, but yours may
    422: "validation_error",
    429: "rate_limited",
    500: "internal_error",
    503: "service_unavailable",
    504: "timeout",
}
# For errors that do not set these headers themselves. Retry-After is 1 s, because the
# database is checked every second in an outage.
DEFAULT_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}


class AppException(Exception):
    """Base class of errors. A client gets the attribute `message`.

    In `raise SomeException("a reason")`, the reason never reaches clients. It is in the
    request's log line, if the status is 500 or more.
    """

    status_code = 500
    error: str | None = None  # None: use ERROR_CODES[status_code]
    message = "Something went wrong. Quote the request_id if you report it."
    headers: Mapping[str, str] | None = None  # they override DEFAULT_HEADERS
    details: list[dict[str, str]] | None = None


class UnauthorizedException(AppException):
    # One error for every invalid token, so that a forger does not learn what is wrong.
    status_code = 401
    message = "The access token is not valid."
    # RFC 6750 § 3.1: invalid_token is the code for every invalid token.
    # (ruff wants a ClassVar, but RateLimitedException sets `headers` per instance.)
    headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}  # noqa: RUF012


class WrongCredentialsException(AppException):
    # Raised for an unknown username, too: a login must not tell which ones exist.
    status_code = 401
    message = "Wrong username or password."


class WrongPasswordException(AppException):
    # Not 401, because the token is valid: clients log out on a 401.
    status_code = 403
    message = "The current password is wrong."


class NotFoundException(AppException):
    # Also raised for items of other users: a 403 would confirm that the id exists.
    status_code = 404
    message = "There is nothing here."


class UsernameTakenException(AppException):
    status_code = 409
    message = "This username is taken."


class InvalidRequestException(AppException):
    status_code = 422
    message = "The request is not valid."


class RateLimitedException(AppException):
    status_code = 429
    message = "Too many requests; try again later."

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__()
        self.headers = {"Retry-After": str(retry_after_seconds)}


class ServiceUnavailableException(AppException):
    status_code = 503
    message = "The service is not available; try again soon."


class RequestTimeoutException(AppException):
    status_code = 504
    message = "The request took too long."


class ErrorDetail(BaseModel):
    field: str = Field(examples=["body.title"])
    message: str
    type: str = Field(examples=["string_too_short"])


class ErrorResponse(BaseModel):
    error: str = Field(examples=["validation_error"])
    message: str
    details: list[ErrorDetail] | None
    request_id: str


def document_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses=` for these errors."""
    return {status: {"model": ErrorResponse} for status in statuses}


def error_response(request: Request, exc: AppException) -> Response:
    """Write an error in the format of `ErrorResponse`."""
    status_code = exc.status_code
    body = {
        "error": exc.error or ERROR_CODES.get(status_code, f"http_{status_code}"),
        "message": exc.message,
        "details": exc.details,
        "request_id": request.state.request_id,
    }
    # In `details`, the name of an unknown field can have a lone surrogate. json.dumps
    # writes it as \ud800. ErrorResponse and JSONResponse would raise an exception.
    content = json.dumps(body, separators=(",", ":"))
    response = Response(
        content, status_code, headers=exc.headers, media_type="application/json"
    )
    for name, value in DEFAULT_HEADERS.get(status_code, {}).items():
        response.headers.setdefault(name, value)
    return response


async def app_exception_handler(request: Request, exc: AppException) -> Response:
    if exc.status_code >= 500:
        request.state.reason = summarize_error(exc)  # for the request's log line
    return error_response(request, exc)


def allowed_methods(request: Request) -> str:
    """Return the methods of all routes with this path, for Allow (RFC 9110 § 15.5.6).

    (The framework's own 405 names the methods of one route only.)
    """
    # In an application that you mount at /x, Starlette sets root_path to /x, and only
    # matches the rest of the path. Its 405s also arrive here, and one for /x/health
    # would list the methods of our /health. So match the whole path, by our root_path.
    scope = {**request.scope, "root_path": request.app.state.settings.ROOT_PATH}
    allowed: set[str] = set()
    # app.routes has one entry for an included router (since FastAPI 0.137). FastAPI's
    # iter_route_contexts also yields the routes inside. A mounted application has no
    # `methods`.
    for route in iter_route_contexts(request.app.routes):
        if route.methods and route.matches(scope)[0] != Match.NONE:
            allowed |= route.methods
    return ", ".join(sorted(allowed))


async def http_exception_handler(request: Request, exc: HTTPException) -> Response:
    """Turn an HTTPException of the framework or of your code into a response.

    Clients get its detail, as a text, unless the status is 500, which means a bug. The
    log line of a 5xx has it, too.
    """
    if exc.status_code in {204, 304}:  # must not have a body
        return Response(None, exc.status_code, exc.headers)
    error = AppException(exc.detail)  # the reason, for the log line of a 5xx
    error.status_code = exc.status_code
    error.headers = exc.headers
    if exc.status_code != 500:
        error.message = str(exc.detail)
    response = await app_exception_handler(request, error)
    if exc.status_code == 405:
        allowed = allowed_methods(request)
        if allowed:  # else the path belongs to a mounted application: keep its header
            response.headers["Allow"] = allowed
    return response


async def validation_exception_handler(
    request: Request, exc: RequestValidationError
) -> Response:
    """Turn a validation error into a 422. No value is echoed: it can be a password."""
    error = InvalidRequestException()
    error.details = [
        {"field": ".".join(map(str, e["loc"])), "message": e["msg"], "type": e["type"]}
        for e in exc.errors()
    ]
    return error_response(request, error)


def remove_values(exc: ResponseValidationError) -> None:
    """Leave only `type` and `loc`: the rest can quote what the route returned."""
    # errors() returns the exception's own dicts, not copies. So what is removed here is
    # missing in the traceback, too.
    for error in exc.errors():
        for key in ("input", "ctx", "msg"):
            error.pop(key, None)


async def unhandled_exception_handler(request: Request, exc: BaseException) -> Response:
    """Turn an unhandled exception into a 500; the log line has the traceback.

    `exc` is a BaseException, because a route can raise CancelledError: for example, if
    it awaits a task that was cancelled.

    LimitsAndErrorsMiddleware calls this function. A handler that is registered for
    Exception runs outside all middleware, so its response has no id and no security
    headers.
    """
    if isinstance(exc, ResponseValidationError):
        remove_values(exc)  # they can be secrets, and the traceback would show them
    request.state.exception = exc
    return error_response(request, AppException())


# --- Models ---------------------------------------------------------------------------
# The tables. Database.create_missing_tables creates them. The service never alters one.

# SQLite autoincrements only primary keys of type INTEGER, which has 64 bits in SQLite.
BigInt = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {int: BigInt, datetime: sa.DateTime(timezone=True)}
    id: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(default=now)


class User(Base):
    __tablename__ = "users"
    # Without autoincrement, SQLite gives the id of a deleted user to the next new user,
    # and a link to the deleted user would lead to the new one.
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012
    username: Mapped[str] = mapped_column(sa.String(32), unique=True)
    password_hash: Mapped[str]
    # Each token carries this number. Incrementing it makes all earlier tokens invalid.
    # It starts at random: after a backup is restored, a new user can get the id of a
    # lost one, whose tokens must not be valid for the new user.
    token_version: Mapped[int] = mapped_column(default=lambda: secrets.randbits(31))


class Item(Base):
    __tablename__ = "items"
    __table_args__ = (
        sa.Index("items_of_owner", "owner_id", "id"),
        # As in User.
        {"sqlite_autoincrement": True},
    )
    owner_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id, ondelete="CASCADE"))
    title: Mapped[str] = mapped_column(sa.String(200))
    description: Mapped[str | None] = mapped_column(sa.String(2000))
    # No default=now, which would differ from created_at: create_item sets both times.
    updated_at: Mapped[datetime] = mapped_column(onupdate=now)


# --- Database -------------------------------------------------------------------------
# A session takes a connection at its first statement, and returns it at commit(), at
# rollback(), or when the dependency closes it. Each worker has three engines, all in
# autocommit: so a read needs no round trips for BEGIN and COMMIT.
#
#     read_engine   for sessions that only read
#     write_engine  for sessions that write: begin_transaction sends their BEGIN
#     check_engine  for health checks, so that they do not wait for requests
#
# On PostgreSQL, read_engine and write_engine share their connections.

CHECK_INTERVAL_SECONDS = 1  # from a failed check to the next one
HEALTH_CHECK_TIMEOUT_SECONDS = 2  # the longest time until a health check is answered
TABLES_TIMEOUT_SECONDS = 60  # how long creating the tables may take
START_TIMEOUT_SECONDS = 2  # how long the start waits for the first checks
STOP_TIMEOUT_SECONDS = 1  # how long the stop waits for a check that it has cancelled
# SQLite's WAL file grows during a long read, such as a backup. Later, SQLite cuts it to
# this size. (By default, it would keep its size. Its usual size is 4 MiB.)
MAX_WAL_BYTES = 16 * 2**20


def shut_down_socket(descriptor: int) -> None:
    """End both directions of a connection. Its owner still has to close it."""
    connection_socket = socket.socket(fileno=descriptor)
    with suppress(OSError):  # the other side has closed the connection
        connection_socket.shutdown(socket.SHUT_RDWR)
    connection_socket.detach()  # or Python would close the descriptor


def is_readable(descriptor: int) -> bool:
    """Return True if a socket has received data, or was closed by either side."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


class FairPool(AsyncAdaptedQueuePool):
    """A pool that serves requests in the order in which they came.

    In SQLAlchemy's own pool, newcomers overtake: under load, some requests wait until
    they fail. Here, a request first waits for a slot of a semaphore, which is fair.
    Then a timer limits how long the request may hold a connection. Without the timer,
    requests to a silent server would hold all connections. `pool_timeout` limits both
    times.

    Like every pool of SQLAlchemy, it overrides two private methods, which SQLAlchemy
    calls. It also calls a third one, QueuePool's (all as of 2.1.9):

        _do_get          takes a connection out of the pool
        _do_return_conn  gives it back; not called if _do_get has raised an exception
        _dec_overflow    tells the pool that it has one connection less

    The first two are not async, but SQLAlchemy runs them in a greenlet. In it,
    `await_(coroutine)` waits as `await coroutine` does in an async function.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # A slot for each connection. (size() and timeout() are QueuePool's: they return
        # pool_size and pool_timeout. Database.create_engine sets max_overflow to 0.)
        self.slots = asyncio.Semaphore(self.size())
        # A timer for each connection. A ConnectionPoolEntry, or record, stays in the
        # pool. It holds one connection, and opens another if that is lost.
        self.timers: dict[ConnectionPoolEntry, asyncio.TimerHandle] = {}
        # A request holds a connection from "checkout" to "checkin". But the engine asks
        # the first connection that it opens for the server's version, before there is a
        # "checkout". This query can hang, too, so the timer also starts at "connect".
        event.listen(self, "connect", self.start_timer)
        event.listen(self, "checkout", self.start_timer)
        event.listen(self, "checkin", self.stop_timer)

    def _do_get(self) -> ConnectionPoolEntry:
        await_(self.wait_for_slot())
        try:
            record = super()._do_get()
            self.replace_if_closed(record)
            return record
        except BaseException:
            self.slots.release()
            raise

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        try:
            if record.driver_connection:
                super()._do_return_conn(record)
            else:
                # The connection was lost during the request, or could not be opened.
                # Forget the record: if it were put back, a request could get it, and
                # would have to connect, although open connections are idle.
                self._dec_overflow()
        finally:
            self.slots.release()

    async def wait_for_slot(self) -> None:
        try:
            async with asyncio.timeout(self.timeout()):
                await self.slots.acquire()
        except TimeoutError:
            raise sa_exc.TimeoutError("no connection was free in time") from None

    def replace_if_closed(self, record: ConnectionPoolEntry) -> None:
        """Replace an idle connection that PostgreSQL has closed, as a restart does.

        Otherwise, the request would fail. If an idle connection has something to read,
        the server has nearly always closed it. (To replace a good one does no harm.)
        Looking for that costs no round trip, unlike SQLAlchemy's own pool_pre_ping.
        """
        connection = record.driver_connection
        if not isinstance(connection, psycopg.AsyncConnection):
            return  # SQLite has no server
        if connection.closed or is_readable(connection.fileno()):
            # `soft` only marks it. After _do_get, SQLAlchemy looks at the mark, and
            # opens a new connection for this request.
            record.invalidate(soft=True)

    def start_timer(
        self, dbapi_connection: object, record: ConnectionPoolEntry, *proxy: object
    ) -> None:
        # ("checkout" passes a third argument, `proxy`. "connect" does not.)
        self.stop_timer(dbapi_connection, record)  # "connect" may have started one
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.timeout(), self.abort_connection, record)
        self.timers[record] = timer

    def stop_timer(self, dbapi_connection: object, record: ConnectionPoolEntry) -> None:
        if record in self.timers:
            self.timers.pop(record).cancel()

    def abort_connection(self, record: ConnectionPoolEntry) -> None:
        """Make the statement that runs on a PostgreSQL connection fail now.

        A silent server would not answer a request to cancel it. So shut down the
        socket: this wakes psycopg, which then raises OperationalError. (SQLite has no
        server. The wait for its lock has a timeout in driver_arguments.)
        """
        del self.timers[record]
        # driver_connection is None if a new connection failed before its "checkout".
        connection = record.driver_connection
        if isinstance(connection, psycopg.AsyncConnection) and not connection.closed:
            shut_down_socket(connection.fileno())
            # Now the socket is readable, so replace_if_closed replaces the connection.


async def connect_to_postgresql(*args: Any, **options: Any) -> Any:
    """Connect, and leave nothing open if that fails or is cancelled.

    A failed connect leaves a reference cycle: exception, traceback, frame, and a local
    variable that refers to the exception (psycopg 3.3, SQLAlchemy 2.1). It keeps the
    socket open until the garbage collector runs, maybe for minutes. clear_frames
    empties the local variables.
    """
    try:
        return await psycopg.AsyncConnection.connect(*args, **options)
    except BaseException as error:
        clear_frames(error.__traceback__)
        raise


def cut_message(context: sa.engine.ExceptionContext) -> None:
    """Keep the first line of a message. PostgreSQL's second line can quote a row.

    If a stored text is not UTF-8, sqlite3's message quotes it after "with text '": cut
    this, too.
    """
    # SQLAlchemy copies the driver's message, and a traceback shows both exceptions.
    # Both have it in args[0].
    for error in (context.original_exception, context.sqlalchemy_exception):
        if error is not None and error.args:
            line = str(error.args[0]).partition("\n")[0]
            error.args = (line.partition(" with text '")[0],)


def drop_read_only_connections(context: sa.engine.ExceptionContext) -> None:
    """Treat a read-only connection as lost: then SQLAlchemy replaces the whole pool.

    After a failover, a read-only connection leads to the former primary. On SQLite, a
    connection that was opened while the file was not writable stays read-only.
    """
    error = context.original_exception
    sqlite_error = getattr(error, "sqlite_errorname", "")
    is_read_only = isinstance(error, psycopg.errors.ReadOnlySqlTransaction)
    if is_read_only or sqlite_error.startswith("SQLITE_READONLY"):
        context.is_disconnect = True


def prepare_sqlite_connection(connection: Any, record: ConnectionPoolEntry) -> None:
    """Set up a new connection. `connection` is SQLAlchemy's sync wrapper of it."""
    # If two workers switch to WAL at the same time, one gets "locked". Ignore it: the
    # other has switched the file, and the mode is stored in the file.
    with suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA journal_size_limit = {MAX_WAL_BYTES}")
    connection.execute("PRAGMA foreign_keys = ON")


def roll_back_sqlite_connection(connection: Any, *_: object) -> None:
    """Roll back a connection that SQLAlchemy invalidates, as after a cancelled request.

    SQLAlchemy only closes it. But sqlite3 keeps the file locked until the last cursor
    is gone. The cursor of a cancelled request stays until the garbage collector runs.
    """
    with suppress(sqlite3.Error):  # the connection may be unusable
        connection.rollback()


BEGIN_STATEMENTS = {
    # IMMEDIATE takes the write lock at once. Without it, a transaction that reads
    # before it writes fails if another one has written in between.
    "sqlite": "BEGIN IMMEDIATE",
    # The level is named, because the server's default can be another one.
    "postgresql": "BEGIN ISOLATION LEVEL READ COMMITTED",
}


def begin_transaction(connection: sa.Connection) -> None:
    """Begin a transaction: in autocommit, the driver sends no BEGIN itself.

    This is all that is needed: the driver's commit() and rollback() look at whether a
    transaction is open, and end this one, too, in spite of autocommit. (With DEBUG,
    SQLAlchemy logs that COMMIT has no effect in autocommit: ignore that.)

    SQLAlchemy's own way, execution_options(isolation_level=…), would switch autocommit
    off and on for each transaction. If a request is cancelled during the switch, its
    connection does not return to the pool until the garbage collector runs.
    """
    connection.exec_driver_sql(BEGIN_STATEMENTS[connection.dialect.name])


class ReadOnlySession(Session):
    """A session that refuses to write: in autocommit, no write can be rolled back.

    It cannot detect a write in sa.text(), in a CTE, through `await db.connection()` or
    by a legacy method `bulk_…`: such a write takes effect at once.

    What needs a transaction needs a WriteSession: FOR UPDATE locks nothing here, and on
    PostgreSQL the cursor of `stream` and the savepoint of `begin_nested` fail.
    """


WRITE_REFUSED = "a ReadSession cannot write: the route needs a WriteSession"


@event.listens_for(ReadOnlySession, "before_flush")
def refuse_changes(session: Session, *_: object) -> None:
    # (`dirty` also has objects whose attribute was set to the same value again.)
    is_changed = any(session.is_modified(row) for row in session.dirty)
    if is_changed or session.new or session.deleted:
        raise RuntimeError(WRITE_REFUSED)


@event.listens_for(ReadOnlySession, "do_orm_execute")
def refuse_write_statement(state: orm.ORMExecuteState) -> None:
    if state.is_insert or state.is_update or state.is_delete:
        raise RuntimeError(WRITE_REFUSED)


class SteppedTimer:
    """A timer in several steps, each of which starts the next: see timeout_in_steps."""

    def __init__(self, timeout: asyncio.Timeout, step_seconds: float) -> None:
        self.timeout = timeout
        self.step_seconds = step_seconds

    def start(self, steps: int) -> None:
        loop = asyncio.get_running_loop()
        if steps == 0:
            self.timeout.reschedule(loop.time())  # it ends now
        else:
            self.timer = loop.call_later(self.step_seconds, self.start, steps - 1)


@asynccontextmanager
async def timeout_in_steps(seconds: float) -> AsyncIterator[None]:
    """Like asyncio.timeout, but a blocked event loop alone does not make it end.

    If a loop was blocked, it first runs the timers that are due, and only then the task
    whose answer has come. So asyncio.timeout would end a task that has its answer in
    time. Here, four timers follow each other, each for a quarter of the time: a block
    ends only one of them, and the task runs before the next one ends.
    """
    async with asyncio.timeout(None) as timeout:  # no end yet: SteppedTimer sets it
        stepped_timer = SteppedTimer(timeout, seconds / 4)
        stepped_timer.start(steps=4)
        try:
            yield
        finally:
            stepped_timer.timer.cancel()


class MonitoredBackend:
    """A server that can be unreachable: base class of Database and RedisRateLimiter.

    After a failure, it is checked every second until it is available again. In normal
    operation, nothing runs in the background. A check calls these methods:

        not yet prepared  prepare, then ping
        in an outage      recover, then ping
        otherwise         ping
    """

    name: str

    def __init__(self) -> None:
        self.in_outage = False  # True from a failure to the next successful check
        self.is_prepared = False  # True after the first success of `prepare`
        self.check_task: asyncio.Task[None] | None = None  # the latest check
        self.retry_timer: asyncio.TimerHandle | None = None  # starts the next one

    async def ping(self) -> None:
        """Raise an exception if the backend cannot be used."""
        raise NotImplementedError

    async def prepare(self) -> None:
        """Do what the first use needs, such as to create tables."""
        raise NotImplementedError

    async def recover(self) -> None:
        """Do what is needed after an outage."""
        await self.prepare()

    def start_check(self) -> asyncio.Task[None]:
        """Return the check that is running, or start one."""
        if self.check_task is None or self.check_task.done():
            # An empty context: its log lines have no request_id.
            self.check_task = asyncio.create_task(self.run_check(), context=Context())
        return self.check_task

    async def run_check(self) -> None:
        try:
            if not self.is_prepared:
                await self.prepare()
                self.is_prepared = True
            elif self.in_outage:
                await self.recover()
            await self.ping()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is logged
            self.handle_failure(error)
            return
        if self.in_outage:
            logger.info("%s is ready again", self.name)
        self.in_outage = False

    def handle_failure(self, error: Exception) -> None:
        """Begin an outage, or continue it. Check again in a second."""
        if not self.in_outage:
            extra = {"reason": summarize_error(error)}
            logger.warning("%s is not ready", self.name, extra=extra)
        self.in_outage = True
        if self.retry_timer is not None:
            self.retry_timer.cancel()  # if requests fail together, keep one timer
        loop = asyncio.get_running_loop()
        self.retry_timer = loop.call_later(CHECK_INTERVAL_SECONDS, self.start_check)

    async def is_ready(self) -> bool:
        """Return False at once in an outage, else the result of a check.

        If the check takes longer than HEALTH_CHECK_TIMEOUT_SECONDS, this returns False,
        while the check goes on for the next caller.
        """
        if self.in_outage:
            return False
        task = self.start_check()
        with suppress(TimeoutError):
            async with timeout_in_steps(HEALTH_CHECK_TIMEOUT_SECONDS):
                await asyncio.wait({task})  # a timeout does not cancel the task
        # run_check does not raise an exception: it sets in_outage if the check fails.
        return task.done() and not self.in_outage

    async def stop_checks(self) -> None:
        if self.retry_timer is not None:
            self.retry_timer.cancel()
        if self.check_task is not None:
            self.check_task.cancel()
            await asyncio.wait({self.check_task}, timeout=STOP_TIMEOUT_SECONDS)


class Database(MonitoredBackend):
    """The engines of one worker. Made after the fork: no connection is shared."""

    name = "the database"

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.is_sqlite = settings.DATABASE_URL.get_backend_name() == "sqlite"
        size = settings.DATABASE_POOL_SIZE + settings.DATABASE_MAX_OVERFLOW
        self.read_engine = self.create_engine(size)
        self.write_engine = self.create_write_engine()
        self.check_engine = self.create_engine(1)

    def driver_arguments(self) -> dict[str, Any]:
        """Return the arguments of create_async_engine that depend on the database.

        (libpq's parameters are not here, but in postgresql_parameters: in connect_args,
        they would override those of DATABASE_URL.)
        """
        if self.is_sqlite:  # the longest wait for the lock of the file
            return {"connect_args": {"timeout": self.settings.DATABASE_TIMEOUT_SECONDS}}
        return {
            "connect_args": {
                # SQLAlchemy calls this in place of psycopg's own function.
                "async_creator_fn": connect_to_postgresql,
                # No prepared statements: after ALTER TABLE, PostgreSQL refuses them.
                "prepare_threshold": None,
            },
            # Otherwise, SQLAlchemy looks for the type hstore: three round trips.
            "use_native_hstore": False,
        }

    def postgresql_parameters(self) -> dict[str, Any]:
        """Return libpq's parameters: our defaults, overridden by DATABASE_URL's.

        One of them, `options`, has settings for the server.
        """
        url_parameters = self.settings.DATABASE_URL.query
        seconds = math.ceil(self.settings.DATABASE_TIMEOUT_SECONDS)
        milliseconds = math.ceil(self.settings.DATABASE_TIMEOUT_SECONDS * 1000)
        # The server ends a slow statement before FairPool closes its connection.
        statement_timeout = f"-c statement_timeout={milliseconds * 9 // 10}"
        # The server ends the transaction of a lost worker, which frees its locks.
        idle_timeout = f"-c idle_in_transaction_session_timeout={milliseconds}"
        # psycopg reads times only in ISO format, and those close to datetime.min and
        # .max only in UTC. (A field of yours may have such a time.)
        time_format = "-c datestyle=ISO -c timezone=UTC"
        defaults = f"{statement_timeout} {idle_timeout} {time_format}"
        return {
            "application_name": self.settings.PROJECT_NAME,
            "client_encoding": "utf8",  # libpq has another default in some databases
            "connect_timeout": str(seconds),
            "keepalives_idle": "60",  # NAT routers drop what is idle for minutes
            "target_session_attrs": "read-write",  # never connect to a replica
            **url_parameters,
            # If there are two -c for one setting, the last one counts.
            "options": f"{defaults} {url_parameters.get('options', '')}".rstrip(),
        }

    def create_engine(
        self, pool_size: int, timeout_seconds: float | None = None
    ) -> AsyncEngine:
        url = self.settings.DATABASE_URL
        if not self.is_sqlite:
            url = url.set(query=self.postgresql_parameters())
        engine = create_async_engine(
            url,
            **self.driver_arguments(),
            isolation_level="AUTOCOMMIT",  # write_engine sends BEGIN itself
            poolclass=FairPool,
            pool_size=pool_size,
            # pool_size includes DATABASE_MAX_OVERFLOW, so all connections stay open. To
            # close and reopen some of them under load would be slow.
            max_overflow=0,
            pool_timeout=timeout_seconds or self.settings.DATABASE_TIMEOUT_SECONDS,
            hide_parameters=True,  # or every error would log them
            # Otherwise, SQLAlchemy would warn about the query in `ping`, which selects
            # from all tables without a join.
            enable_from_linting=False,
        )
        event.listen(engine.sync_engine, "handle_error", cut_message)
        event.listen(engine.sync_engine, "handle_error", drop_read_only_connections)
        if self.is_sqlite:
            event.listen(engine.sync_engine, "connect", prepare_sqlite_connection)
            event.listen(engine.sync_engine, "invalidate", roll_back_sqlite_connection)
        return engine

    def create_write_engine(self) -> AsyncEngine:
        """Return an engine that sends BEGIN at the start of each transaction."""
        if self.is_sqlite:
            # SQLite has one writer at a time: they take turns with one connection.
            engine = self.create_engine(1)
        else:
            # This returns a copy of the engine, with the same pool and listeners. The
            # copy alone gets the listener added below: so read_engine sends no BEGIN.
            engine = self.read_engine.execution_options()
        # SQLAlchemy sends this event before the first statement, in autocommit, too.
        event.listen(engine.sync_engine, "begin", begin_transaction)
        return engine

    def session(self, writes: bool) -> AsyncSession:
        """Return a new session.

        Raises ServiceUnavailableException until `prepare` has succeeded. (A script that
        makes a Database has to await `start_check()` first, and `close()` at the end.)
        """
        if not self.is_prepared:
            raise ServiceUnavailableException("the database is not ready")
        return AsyncSession(
            self.write_engine if writes else self.read_engine,
            sync_session_class=Session if writes else ReadOnlySession,
            # Objects are read after the commit, so they must not expire.
            expire_on_commit=False,
            # Using a closed session is an error. By default, it would open again: if a
            # StreamingResponse used it, it would take a connection and never return it.
            close_resets_only=False,
        )

    async def table_names(self, engine: AsyncEngine) -> set[str]:
        async with engine.connect() as connection:
            names = await connection.run_sync(lambda c: sa.inspect(c).get_table_names())
        return set(names)

    async def create_missing_tables(self) -> None:
        """Create missing tables, under a lock: many workers and hosts may do so."""
        # An engine of its own, with a longer timeout: each table takes several round
        # trips, so many tables, or a slow network, would exceed that of requests. (A
        # single statement still has the timeout of requests: if the wait for the lock
        # exceeds it, the check fails, and is repeated after a second.)
        engine = self.create_engine(1, TABLES_TIMEOUT_SECONDS)
        event.listen(engine.sync_engine, "begin", begin_transaction)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(engine.dispose)
            connection = await stack.enter_async_context(engine.begin())
            if not self.is_sqlite:  # BEGIN IMMEDIATE has locked SQLite's file
                lock = sa.func.pg_advisory_xact_lock(7411)  # an arbitrary number
                await connection.execute(sa.select(lock))
            await connection.run_sync(Base.metadata.create_all)

    async def prepare(self) -> None:
        """Create the tables that the database lacks: this version may have new ones."""
        # Use read_engine: so its first connection, which takes long to open, is open
        # before a request needs one.
        names = await self.table_names(self.read_engine)
        if Base.metadata.tables.keys() - names:
            await self.create_missing_tables()

    def replace_connections(self) -> None:
        """Let SQLAlchemy replace the connections for requests when they are next used.

        After a failover of PostgreSQL, those to the former primary can be silent, but
        not closed: each would make a request time out. At a checkout, SQLAlchemy
        replaces a connection that was opened before the pool's `_invalidate_time` (a
        private attribute, as of 2.1.9). write_engine shares this pool. check_engine
        needs nothing: SQLAlchemy replaces its connection if it is lost or read-only.

        dispose() is no alternative: it would begin a new pool while connections of the
        old one are in use, and together, they could be too many.
        """
        self.read_engine.pool._invalidate_time = time.time()

    async def recover(self) -> None:
        self.replace_connections()
        # No table at all: the server has come back empty (a new disk), so create them.
        # Some are missing: a migration may be running, so leave them.
        if not await self.table_names(self.check_engine):
            await self.create_missing_tables()

    async def ping(self) -> None:
        """Check that it answers, has all columns, and (PostgreSQL) is not read-only."""
        query = (
            sa.select(*Base.metadata.tables.values())  # names every column
            .limit(0)  # so no row is read or locked
            .with_for_update()  # refused by a replica; SQLAlchemy omits it on SQLite
        )
        async with self.check_engine.connect() as connection:
            await connection.execute(query)

    async def close(self) -> None:
        await self.stop_checks()
        # On PostgreSQL, the first two share a pool. To dispose of it twice is harmless.
        for engine in (self.read_engine, self.write_engine, self.check_engine):
            await engine.dispose()


# SQLSTATEs, or their first two characters, that mean that PostgreSQL cannot serve now.
OUTAGE_STATES = (
    "08",  # no connection
    "28",  # the login is refused: a fault of the setup, not of the code
    "40",  # a deadlock, or a conflict of transactions
    "53",  # no room for data or connections
    "55P03",  # a lock was not free in time
    "57",  # a shutdown or a timeout
    "58",  # a system error, for example of a disk
)


def is_bug_on_sqlite(error: BaseException | None) -> bool:
    """Return True if the SQL is wrong, or a stored value is invalid."""
    # Names that begin with SQLITE_ERROR mean wrong SQL, and SQLITE_SCHEMA that a table
    # was changed, so that the SQL no longer fits. Without a name, the error is not
    # SQLite's, but Python's: for example, a stored text is not UTF-8.
    name: str = getattr(error, "sqlite_errorname", "")
    return not name or name.startswith(("SQLITE_ERROR", "SQLITE_SCHEMA"))


def is_bug_on_postgresql(error: psycopg.Error, statement: str | None) -> bool:
    """Return True if the statement is wrong: it would fail again."""
    if error.sqlstate is not None:
        return not error.sqlstate.startswith(OUTAGE_STATES)
    # Without a SQLSTATE, the error is psycopg's own. If there was a statement, psycopg
    # has refused it (for example, because it has 70,000 parameters), which is a bug. If
    # there was none, the connect has failed.
    return statement is not None


def is_outage(error: sa_exc.SQLAlchemyError) -> bool:
    """Return True if the database cannot serve now, False for any other error."""
    # The connection was lost, or drop_read_only_connections has marked it as lost.
    if isinstance(error, sa_exc.DBAPIError) and error.connection_invalidated:
        return True
    if isinstance(error, sa_exc.TimeoutError):  # no connection was free in time
        return True
    if not isinstance(error, sa_exc.OperationalError):
        return False
    # Drivers raise OperationalError if they cannot connect, or SQLite's file is locked,
    # full or not there. But they also raise it for some bugs, such as wrong SQL
    # (sqlite3), or a text that is too long for its index (psycopg).
    if isinstance(error.orig, psycopg.Error):
        return not is_bug_on_postgresql(error.orig, error.statement)
    return not is_bug_on_sqlite(error.orig)


async def database_exception_handler(
    request: Request, exc: sa_exc.SQLAlchemyError
) -> Response:
    """Turn the error into a 503 in an outage, else into a 500."""
    if not is_outage(exc):
        raise exc  # a bug, which LimitsAndErrorsMiddleware makes a 500
    database: Database = request.app.state.database
    if not database.in_outage:
        database.start_check()  # to find out whether only this request has failed
    unavailable = ServiceUnavailableException(f"database: {summarize_error(exc)}")
    return await app_exception_handler(request, unavailable)


# --- Schemas --------------------------------------------------------------------------
# The bodies of requests and responses. Each text of a request has a pattern or a
# bounded length: only then, pydantic refuses invalid Unicode (see ValidText).

MAX_ID = 2**63 - 1
NO_NUL = r"^[^\x00]*$"  # for texts that reach the database: PostgreSQL refuses NUL


def to_utc(moment: datetime) -> datetime:
    """Return the time in UTC."""
    if moment.tzinfo is None:  # from SQLite, which stores no zone
        return moment.replace(tzinfo=UTC)
    # A request (if you add a time to one) can have any zone. So can PostgreSQL, if
    # something overrides the option timezone=UTC.
    try:
        return moment.astimezone(UTC)
    except OverflowError:  # 9999-12-31T23:00-05:00 would be in the year 10000
        raise ValueError("is out of range") from None


UtcTime = Annotated[datetime, AfterValidator(to_utc)]
# Keyboards send an "é" as one character or as two; NFC makes them equal (NIST SP
# 800-63B-4 § 3.1.1.2).
NormalizeUnicode = AfterValidator(partial(unicodedata.normalize, "NFC"))
NewUsername = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{2,31}$", to_lower=True)
]
# NIST SP 800-63B-4: at least 15 characters without a second factor, and no other rules.
NewPassword = Annotated[str, Field(min_length=15, max_length=128), NormalizeUnicode]
# A login accepts nearly any text, so that a name such as "?!", which nobody can have,
# gets 401, as any wrong name does. The length is arbitrary.
LoginText = Annotated[str, Field(min_length=1, max_length=1024)]
LoginName = Annotated[LoginText, StringConstraints(pattern=NO_NUL, to_lower=True)]
LoginPassword = Annotated[LoginText, NormalizeUnicode]  # can have NUL: it is hashed
Title = Annotated[str, Field(min_length=1, max_length=200, pattern=NO_NUL)]
Description = Annotated[str, Field(max_length=2000, pattern=NO_NUL)]
# Without a format, openapi-generator gives an id only 32 bits in Go, Java and others.
# (The format sets no bounds.)
Int64 = Annotated[int, Field(json_schema_extra={"format": "int64"})]
NextCursor = Annotated[
    Int64 | None, Field(description="Send it as `after`; null on the last page")
]


# extra="forbid": a misspelt field gets 422. By default, pydantic ignores it silently.
# hide_input_in_errors: if your own code makes, for example, a UserIn with an invalid
# password, the traceback in the log does not show it.
class RequestBody(BaseModel, extra="forbid", hide_input_in_errors=True):
    @pydantic.model_validator(mode="before")
    @classmethod
    def refuse_many_fields(cls, value: object) -> object:
        """Refuse more than 20 fields: pydantic would write thousands of errors."""
        if isinstance(value, dict) and len(value) > 20:
            raise PydanticCustomError("too_many_fields", "There are too many fields")
        return value


class UserIn(RequestBody):
    username: NewUsername = Field(examples=["ada"])
    password: NewPassword = Field(examples=["correct horse battery staple"])


# For responses that are made from rows, such as a UserOut from a User.
# from_attributes: model_validate accepts rows, also in the list of a UserPage.
# hide_input_in_errors: if a row does not fit, the log does not show it.
class ResponseBody(BaseModel, from_attributes=True, hide_input_in_errors=True):
    pass


class UserOut(ResponseBody):
    id: Int64
    username: str
    created_at: UtcTime


class UserPage(ResponseBody):
    users: list[UserOut]
    next: NextCursor


class PasswordChange(RequestBody):
    current_password: LoginPassword = Field(examples=["correct horse battery staple"])
    new_password: NewPassword = Field(examples=["battery staple correct horse"])


class LoginForm(BaseModel, hide_input_in_errors=True):
    # OAuth2's password form (RFC 6749 § 4.3.2), with bounded lengths. Other fields are
    # ignored, because clients also send `scope` and `client_id`.
    grant_type: Literal["password"] = "password"
    username: LoginName
    password: LoginPassword


class TokenOut(BaseModel):
    access_token: str
    token_type: Literal["bearer"]
    expires_in: int = Field(description="In seconds")


class ItemIn(RequestBody):
    title: Title = Field(examples=["tea"])
    description: Description | None = Field(default=None, examples=["green"])


class ItemPatch(RequestBody):
    # MISSING is pydantic's value of a field that was not sent. model_dump() leaves such
    # a field out. Unlike `title: Title | None = None`, it does not allow null.
    title: Title | MISSING = Field(default=MISSING, examples=["tea"])
    description: Description | None | MISSING = Field(
        default=MISSING, examples=["green"]
    )


class ItemOut(ResponseBody):
    id: Int64
    title: str
    description: str | None
    created_at: UtcTime
    updated_at: UtcTime


class ItemPage(ResponseBody):
    items: list[ItemOut]
    next: NextCursor


class ProbeStatus(BaseModel):
    status: Literal["alive", "ready", "not_ready"]


class CheckResult(BaseModel):
    status: Literal["healthy", "unhealthy"]


class HealthChecks(BaseModel):
    database: CheckResult
    redis: CheckResult | MISSING = MISSING  # left out of the response without Redis


class HealthStatus(BaseModel):
    status: Literal["healthy", "degraded"]
    timestamp: UtcTime
    version: str
    checks: HealthChecks


# --- Security -------------------------------------------------------------------------
# Passwords are hashed. Tokens are signed, and carry a number by which they are revoked.
# (python-jose is what the usual guides use. What it does not check is checked here.)

# Argon2id with OWASP's parameters: a guess costs 19 MiB and some 30 ms of a CPU.
ARGON2ID = Argon2Hasher(time_cost=2, memory_cost=19456, parallelism=1)
PASSWORD_HASHER = PasswordHash([ARGON2ID])
# A login verifies this hash if the username does not exist, so that its time does not
# tell which usernames exist. Keep its parameters equal to those of ARGON2ID. Its salt
# and its hash are zeros in base64.
DUMMY_HASH = "$argon2id$v=19$m=19456,t=2,p=1$" + "A" * 22 + "$" + "A" * 43
HASHES_AT_A_TIME = 2  # to bound the memory
MAX_WAITING_HASHES = 100  # the last one waits for 50 turns of some 30 ms: 1.5 s
# The threads run beside other Python code, because argon2 releases the GIL. They start
# at the first hash, so after the fork.
HASH_THREADS = ThreadPoolExecutor(HASHES_AT_A_TIME)
# The futures of hashes that wait or run. (If a request is cancelled, its future is
# removed at once, but its hash may still run: up to HASHES_AT_A_TIME are not counted.)
UNFINISHED_HASHES: set[object] = set()

Result = TypeVar("Result")


async def run_in_hash_thread(hasher: Callable[..., Result], *texts: str) -> Result:
    """Call `hasher(*texts)` in a thread.

    Raises ServiceUnavailableException if too many calls wait for a thread already.
    """
    if len(UNFINISHED_HASHES) >= HASHES_AT_A_TIME + MAX_WAITING_HASHES:
        raise ServiceUnavailableException("too many passwords wait to be hashed")
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(HASH_THREADS, hasher, *texts)
    UNFINISHED_HASHES.add(future)
    future.add_done_callback(UNFINISHED_HASHES.discard)
    return await future


async def hash_password(password: str) -> str:
    return await run_in_hash_thread(PASSWORD_HASHER.hash, password)


async def verify_password(password: str, stored_hash: str) -> tuple[bool, str | None]:
    """Return whether the hash is of this password, and a new hash if it is outdated."""
    verify = PASSWORD_HASHER.verify_and_update
    return await run_in_hash_thread(verify, password, stored_hash)


TOKEN_OPTIONS = {
    # python-jose requires no claim by default: a token without `exp` never expires.
    "require_sub": True,
    "require_iat": True,
    "require_exp": True,
    # A token is invalid from `exp` on (RFC 7519 § 4.1.4). python-jose would accept it
    # for one second more.
    "leeway": -1,
}


class TokenClaims(BaseModel):
    """What a token says of its user. (python-jose itself checks the times.)

    If you add tokens of another kind, such as refresh tokens, check a claim that tells
    the kinds apart: otherwise, those would be access tokens, too.
    """

    # Another program with the same key could sign any number. With more than 64 bits,
    # the driver or PostgreSQL would raise an exception: a 500 in place of a 401.
    sub: Annotated[int, Field(ge=1, le=MAX_ID)]  # in the token, it is a text: "5"
    version: pydantic.StrictInt  # strict, or `false` would count as 0


def signing_key(settings: Settings) -> dict[str, str]:
    """Return the secret as a JSON Web Key.

    If the secret were a text that is also JSON, such as "abc" with the quotes,
    jwt.decode would parse it, but jwt.encode would not: every token would be refused.
    """
    # SECRET_KEY may have bytes that are not UTF-8, because pydantic does not check the
    # Unicode of a SecretStr. Python reads them as surrogates; surrogateescape restores
    # the bytes.
    secret = settings.SECRET_KEY.get_secret_value().encode(errors="surrogateescape")
    return {"kty": "oct", "k": base64url_encode(secret).decode()}


def create_access_token(user: User, settings: Settings) -> str:
    issued_at = int(time.time())
    claims = {
        "sub": str(user.id),
        "iat": issued_at,
        "exp": issued_at + settings.ACCESS_TOKEN_EXPIRE_MINUTES * 60,
        "version": user.token_version,
    }
    return jwt.encode(claims, signing_key(settings), settings.ALGORITHM)


def decode_access_token(token: str, settings: Settings) -> TokenClaims:
    """Return the claims of a token. Raises UnauthorizedException if it is not valid.

    It cannot tell that a token was revoked: read_token_owner does that.
    """
    key = signing_key(settings)
    try:
        # Python's base64 ignores foreign characters, and some bits of the last one: so
        # a changed signature could pass. Accept it only as an encoder would write it.
        signature = token.rpartition(".")[2].encode()
        if base64url_encode(base64url_decode(signature)) != signature:
            raise UnauthorizedException
        # Without this list, python-jose would accept the algorithm that a token names.
        claims = jwt.decode(
            token, key, algorithms=[settings.ALGORITHM], options=TOKEN_OPTIONS
        )
        return TokenClaims.model_validate(claims)
    except Exception:  # noqa: BLE001 - such as RecursionError for deeply nested JSON
        raise UnauthorizedException from None


# --- Repositories ---------------------------------------------------------------------
# SQL only: no business rules, no commit.

Rows = Sequence[Any]  # of objects such as User, or of plain rows
# The queries of the busiest routes are built once, because that takes 0.2 ms.
FIND_USER_QUERY = sa.select(User).where(User.id == sa.bindparam("id"))
# `Item.__table__`, not `Item`: plain rows are cheaper than ORM objects, but have only
# the columns, under their names in the table. The order is that of the index
# items_of_owner, so no sorting is needed.
ITEMS_QUERY = sa.select(Item.__table__).order_by(Item.owner_id, Item.id)
# The types are given, because sa.tuple_ (below) does not infer them.
OWNER = sa.bindparam("owner", type_=BigInt)
AFTER = sa.bindparam("after", type_=BigInt)
# The items of an owner with an id greater than `after`, in two forms of the same query:
# each database is sure to use both columns of the index items_of_owner only for its own
# form. Otherwise, later pages would be slower than the first.
#
#     SQLite      owner_id = :owner AND id > :after
#     PostgreSQL  (owner_id, id) > (:owner, :after) AND owner_id <= :owner
#
# For PostgreSQL's form, SQLite would use only the first column, and read all items of
# the owner. For SQLite's form, PostgreSQL may scan the primary key, and skip the items
# of all other owners one by one. (PostgreSQL's form needs `owner_id <= :owner`, because
# (8, 1) > (7, 100) is true: otherwise, items of later owners would appear.)
LIST_ITEMS_QUERIES = {
    "sqlite": ITEMS_QUERY.where(Item.owner_id == OWNER, Item.id > AFTER),
    "postgresql": ITEMS_QUERY.where(
        sa.tuple_(Item.owner_id, Item.id) > sa.tuple_(OWNER, AFTER),
        Item.owner_id <= OWNER,
    ),
}


async def add_row(db: AsyncSession, row: Base) -> None:
    """Send the INSERT now, and not at the commit. Raises IntegrityError."""
    db.add(row)
    await db.flush()


async def find_user(db: AsyncSession, user_id: int) -> User | None:
    return await db.scalar(FIND_USER_QUERY, {"id": user_id})


async def find_user_by_name(db: AsyncSession, username: str) -> User | None:
    return await db.scalar(sa.select(User).where(User.username == username))


async def list_users(db: AsyncSession, after: int, limit: int) -> Rows:
    query = sa.select(User).where(User.id > after).order_by(User.id).limit(limit)
    return (await db.scalars(query)).all()


async def update_user(db: AsyncSession, user: User, **changes: object) -> bool:
    """Update the user, unless its token_version has changed since `user` was read.

    Return whether it was updated. This is optimistic locking: a password change
    increments the version, so one of two simultaneous changes fails.
    """
    condition = (User.id == user.id) & (User.token_version == user.token_version)
    query = sa.update(User).where(condition).values(**changes)
    return await db.scalar(query.returning(User.id)) is not None


async def update_token_version(db: AsyncSession, user_id: int) -> None:
    """Add 1 to the user's token_version, which makes all earlier tokens invalid."""
    query = sa.update(User).where(User.id == user_id)
    # The database adds, not Python: another request may have done so in the meantime.
    await db.execute(query.values(token_version=User.token_version + 1))


async def remove_user(db: AsyncSession, user_id: int) -> None:
    """Delete a user, and by ON DELETE CASCADE the user's items."""
    await db.execute(sa.delete(User).where(User.id == user_id))


async def find_item(db: AsyncSession, owner_id: int, item_id: int) -> Item | None:
    query = sa.select(Item).where(Item.id == item_id, Item.owner_id == owner_id)
    return await db.scalar(query)


async def list_items(db: AsyncSession, owner_id: int, after: int, limit: int) -> Rows:
    query = LIST_ITEMS_QUERIES[db.get_bind().dialect.name].limit(limit)
    parameters = {"owner": owner_id, "after": after}
    return (await db.execute(query, parameters)).all()


async def update_item(
    db: AsyncSession, owner_id: int, item_id: int, **changes: object
) -> Item | None:
    query = sa.update(Item).where(Item.id == item_id, Item.owner_id == owner_id)
    return await db.scalar(query.values(**changes).returning(Item))


async def remove_item(db: AsyncSession, owner_id: int, item_id: int) -> bool:
    query = sa.delete(Item).where(Item.id == item_id, Item.owner_id == owner_id)
    return await db.scalar(query.returning(Item.id)) is not None


# --- Services -------------------------------------------------------------------------
# Business logic. A service that changes data calls commit() as its last step. No
# service holds a connection while a password is hashed, which takes 30 ms.

Page = dict[str, Any]  # from which a route makes a UserPage or ItemPage


def make_page(name: str, rows: Rows, limit: int) -> Page:
    """Return the first `limit` rows under `name`, and the id of the last as `next`.

    Callers ask for `limit + 1` rows. If that many came, there is a next page. If not,
    `next` is None.
    """
    last_id = rows[limit - 1].id if len(rows) > limit else None
    return {name: rows[:limit], "next": last_id}


async def register_user(db: AsyncSession, user_in: UserIn) -> User:
    """Store a new user. Raises UsernameTakenException.

    (If you add a second UNIQUE column, also look up its value here, and raise another
    exception if it is taken. Otherwise, a value that is taken gets a 500.)
    """
    password_hash = await hash_password(user_in.password)
    user = User(username=user_in.username, password_hash=password_hash)
    try:
        await add_row(db, user)
    except sa_exc.IntegrityError:
        await db.rollback()
        if await find_user_by_name(db, user_in.username):
            raise UsernameTakenException from None
        # The name was taken at our INSERT, but is free now: its user was deleted in
        # between. So insert again. (After rollback(), `user` can be added again.) A
        # second IntegrityError is a bug: another constraint was violated.
        await add_row(db, user)
    await db.commit()
    return user


async def authenticate_user(
    read_db: AsyncSession, write_db: AsyncSession, username: str, password: str
) -> User:
    """Return the user with this name and password. Raises WrongCredentialsException.

    An unknown name takes as long as a known one.

    `write_db` is used only to store a new hash, so most logins do not wait for SQLite's
    single writer. By then, `read_db` has returned its connection.
    """
    user = await find_user_by_name(read_db, username)
    # Nothing was written: this gives the connection back, before verify_password.
    await read_db.commit()
    stored_hash = user.password_hash if user else DUMMY_HASH
    is_valid, new_hash = await verify_password(password, stored_hash)
    if user is None or not is_valid:
        raise WrongCredentialsException
    if new_hash:  # the stored one was made with older parameters
        # If the password has been changed in the meantime, this does nothing.
        await update_user(write_db, user, password_hash=new_hash)
        await write_db.commit()
    return user


async def read_user(db: AsyncSession, user_id: int) -> User:
    """Return the user. Raises NotFoundException."""
    user = await find_user(db, user_id)
    if user is None:
        raise NotFoundException
    return user


async def read_token_owner(db: AsyncSession, user_id: int, version: int) -> User:
    """Return the owner of a token.

    Raises UnauthorizedException if the user is gone or the token was revoked.
    """
    user = await find_user(db, user_id)
    if user is None or user.token_version != version:
        raise UnauthorizedException
    return user


async def read_users(db: AsyncSession, after: int, limit: int) -> Page:
    return make_page("users", await list_users(db, after, limit + 1), limit)


async def change_password(db: AsyncSession, user: User, change: PasswordChange) -> None:
    """Set the password and make all tokens invalid.

    Raises WrongPasswordException, or UnauthorizedException if the user's tokens were
    revoked in the meantime, for example by another change, or the user was deleted.
    """
    is_valid, _ = await verify_password(change.current_password, user.password_hash)
    if not is_valid:
        raise WrongPasswordException
    new_hash = await hash_password(change.new_password)
    # Python may add here, because update_user fails if the version has changed.
    version = user.token_version + 1
    if not await update_user(db, user, password_hash=new_hash, token_version=version):
        raise UnauthorizedException
    await db.commit()


async def revoke_tokens(db: AsyncSession, user: User) -> None:
    await update_token_version(db, user.id)
    await db.commit()


async def discard_user(db: AsyncSession, user: User) -> None:
    await remove_user(db, user.id)
    await db.commit()


async def create_item(db: AsyncSession, owner: User, item_in: ItemIn) -> Item:
    """Store a new item.

    Raises UnauthorizedException if the owner has been deleted in the meantime.
    """
    moment = now()
    values = item_in.model_dump()
    item = Item(owner_id=owner.id, created_at=moment, updated_at=moment, **values)
    try:
        await add_row(db, item)
    except sa_exc.IntegrityError:
        await db.rollback()
        if await find_user(db, owner.id):
            raise  # another constraint was violated, which is a bug
        raise UnauthorizedException from None
    await db.commit()
    return item


async def read_item(db: AsyncSession, owner: User, item_id: int) -> Item:
    """Return an item of this owner. Raises NotFoundException for any other."""
    item = await find_item(db, owner.id, item_id)
    if item is None:
        raise NotFoundException
    return item


async def read_items(db: AsyncSession, owner: User, after: int, limit: int) -> Page:
    return make_page("items", await list_items(db, owner.id, after, limit + 1), limit)


async def change_item(
    db: AsyncSession, owner: User, item_id: int, patch: ItemPatch
) -> Item:
    """Change the fields that were sent. (The model's onupdate changes `updated_at`.)

    Raises NotFoundException.
    """
    changes = patch.model_dump()
    if not changes:
        return await read_item(db, owner, item_id)  # `updated_at` stays
    item = await update_item(db, owner.id, item_id, **changes)
    if item is None:
        raise NotFoundException
    await db.commit()
    return item


async def discard_item(db: AsyncSession, owner: User, item_id: int) -> None:
    """Delete an item of this owner. Raises NotFoundException for any other."""
    if not await remove_item(db, owner.id, item_id):
        raise NotFoundException
    await db.commit()


# --- Rate limiting --------------------------------------------------------------------
# Exact sliding windows: the limiter keeps the times of a client's allowed requests.
# Each limit has a name, such as "api" or "login". SlidingWindowRateLimiter counts in
# shared memory, RedisRateLimiter in Redis, and RateLimiter chooses one of them.


class RateLimitResult(NamedTuple):
    allowed: bool
    limit: int
    remaining: int
    reset_seconds: int  # until the oldest request leaves the window


SHARED_MEMORY_BYTES = 64 * 2**20  # for all limits together
# With more rows in a bucket, a table fills more evenly, but a search takes longer.
ROWS_IN_BUCKET = 16
NANOSECONDS_PER_SECOND = 10**9
REDIS_TIMEOUT_SECONDS = 0.1
REDIS_CONNECT_SECONDS = 1  # for each step of `prepare`, such as opening a connection
# The longest wait of a request for one of the worker's connections. After that, Redis
# counts as failed. It is long, because a wait usually means that this worker is busy.
# (REQUEST_TIMEOUT_SECONDS does not include the wait in RateLimitMiddleware, because
# LimitsAndErrorsMiddleware, which limits the time, comes after it.)
REDIS_WAIT_SECONDS = 10
REDIS_CONNECTIONS = 9  # of a worker: 8 for requests at the same time, 1 for `ping`
# The times of allowed requests are in a sorted set, in microseconds of Redis's clock.
# ARGV[3] is random, because each member of a set must be different.
REDIS_SCRIPT = """
local key, limit, window = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
redis.call('ZREMRANGEBYSCORE', key, '-inf', now - window)
-- Forget times that are a window or more in the future: Redis's clock was set back.
redis.call('ZREMRANGEBYSCORE', key, now + window, '+inf')
-- Remove all but the newest `limit` times. (Rank 0 is the oldest one, -1 the newest.)
-- There can be more if the limit was lowered.
redis.call('ZREMRANGEBYRANK', key, 0, -(limit + 1))
local count = redis.call('ZCARD', key)
local allowed = count < limit
if allowed then
    redis.call('ZADD', key, now, ARGV[3])
    redis.call('PEXPIRE', key, math.ceil(window / 1000))
    count = count + 1
end
-- The set is not empty here: it has this request, or it is full.
local oldest_member_and_time = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
local reset_time = tonumber(oldest_member_and_time[2]) + window
local reset_seconds = math.ceil((reset_time - now) / 1000000)
-- The fields of RateLimitResult. Redis sends true as 1, and false as null.
return {allowed, limit, limit - count, reset_seconds}
"""


@lru_cache(8192)  # because it takes 6 µs for IPv4, and 35 µs for IPv6
def client_key(address: str) -> str:
    """Return an IPv4 address, or an IPv6 /64 network: most sites have a whole /64."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"  # not the text: a client could send a new one each time
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((ip, 64), strict=False))


@cache  # one file for all limiters
def open_lock_file() -> BufferedRandom:
    """Return the file that a worker locks while it uses the shared memory.

    It is locked by fcntl.lockf: that lock belongs to one process, and the kernel
    releases it if the process is killed. Two other locks would not work:

        fcntl.flock           belongs to the open file, which all workers share: a lock
                              of one would not keep the others out
        multiprocessing.Lock  if its owner is killed, it stays locked for ever
    """
    return tempfile.TemporaryFile()


class SlidingWindowRateLimiter:
    """Allow at most `limit` requests of a client in any period of `seconds`, exactly.

    It is a hash table of fixed size in shared memory:

        table = buckets, of which a client's hash selects one
        bucket = 16 rows, each of which belongs to one client
        row = the times of the client's allowed requests, in a ring buffer

    In a full bucket, a new client takes the row of the one that was idle for longest,
    whose requests are then forgotten.

    Cost: one lock, one hash and a search of 16 rows (a second search for a new client),
    whatever the limit. Old times are dropped one by one, each only once. The memory is
    fixed at the start, and shared by the processes that are forked later. Other hosts
    need Redis.
    """

    def __init__(self, limit: int, seconds: int, table_bytes: int) -> None:
        # A struct, as in C. In ctypes, `type * n` is the type of an array.
        class Row(ctypes.Structure):
            _fields_ = (
                ("client_hash", ctypes.c_int64),
                ("last_seen_ns", ctypes.c_int64),
                ("times", ctypes.c_int64 * limit),  # a ring buffer
                ("oldest", ctypes.c_int64),  # the index of the oldest time
                ("count", ctypes.c_int64),  # how many times it holds
            )

        bucket_type = Row * ROWS_IN_BUCKET
        bucket_count = table_bytes // ctypes.sizeof(bucket_type)  # as many as fit
        table_type = bucket_type * bucket_count
        # Anonymous memory, which forked processes share. buckets[i][j] is a Row in it.
        self.buckets = table_type.from_buffer(mmap.mmap(-1, table_bytes))
        self.limit = limit
        self.seconds = seconds
        self.window_ns = seconds * NANOSECONDS_PER_SECOND
        # The same clock in all processes of a machine. Tests replace it.
        self.clock_ns = time.monotonic_ns
        self.hash_key = secrets.token_hex()
        self.lock_file = open_lock_file()

    def hit(self, key: str) -> RateLimitResult:
        """Count a request, if the limit allows it. `key` stands for the client."""
        # While another worker has the lock, this blocks the event loop, but only for
        # microseconds (or 2 ms, if 10,000 old times are dropped).
        fcntl.lockf(self.lock_file, fcntl.LOCK_EX)
        try:
            return self.record_request(self.find_row(key))
        finally:
            fcntl.lockf(self.lock_file, fcntl.LOCK_UN)

    def find_row(self, key: str) -> ctypes.Structure:
        """Return the client's row. A new client gets an unused one, else an idle one.

        The hash has a secret key: otherwise, a client with many addresses could choose
        some that fall into one bucket, and so make the limiter forget requests.
        (Python's hash() has a random seed, but PYTHONHASHSEED can set it. All workers
        have the same seed and key, because they are forked.)
        """
        client_hash = hash(self.hash_key + key)
        index = client_hash % len(self.buckets)
        bucket: Iterable[ctypes.Structure] = self.buckets[index]
        for row in bucket:
            if row.client_hash == client_hash:  # (clients hardly ever share a hash)
                return row
        # An unused row (its last_seen_ns is 0), else the one that was idle for longest.
        row = min(bucket, key=attrgetter("last_seen_ns"))
        row.client_hash = client_hash
        row.count = 0  # `oldest` may stay: an empty ring buffer may begin anywhere
        return row

    def drop_old_times(self, row: ctypes.Structure, now_ns: int) -> None:
        times = row.times  # the shared memory, not a copy
        while row.count and times[row.oldest] <= now_ns - self.window_ns:
            row.oldest = (row.oldest + 1) % self.limit
            row.count -= 1

    def record_request(self, row: ctypes.Structure) -> RateLimitResult:
        times = row.times
        now_ns = self.clock_ns()
        row.last_seen_ns = now_ns
        self.drop_old_times(row, now_ns)
        allowed = row.count < self.limit
        if allowed:
            times[(row.oldest + row.count) % self.limit] = now_ns
            row.count += 1
        # The window is not empty here: it has this request, or it is full.
        reset_ns = times[row.oldest] + self.window_ns - now_ns
        reset_seconds = math.ceil(reset_ns / NANOSECONDS_PER_SECOND)
        remaining = self.limit - row.count
        return RateLimitResult(allowed, self.limit, remaining, reset_seconds)


class RedisRateLimiter(MonitoredBackend):
    """The same sliding windows, in Redis, for all processes and hosts together."""

    name = "Redis"

    def __init__(self, url: str, project_name: str) -> None:
        super().__init__()
        # Retry once, because Redis may have closed an idle connection (its setting
        # `timeout`). NoBackoff: a pause would use up REDIS_TIMEOUT_SECONDS. To connect
        # with protocol 2 takes fewer round trips than with 3, the default.
        self.client = Redis.from_url(url, retry=Retry(NoBackoff(), 1), protocol=2)
        self.script = self.client.register_script(REDIS_SCRIPT)
        self.key_prefix = f"{project_name}:rate-limit"
        self.slots = asyncio.Semaphore(REDIS_CONNECTIONS - 1)

    async def ping(self) -> None:
        # The result does not matter, but run_script raises an exception if Redis needs
        # more than REDIS_TIMEOUT_SECONDS, or is read-only (ZREMRANGEBYSCORE writes). A
        # ping takes no slot, because it must not wait behind requests.
        await self.run_script("ping", limit=1, seconds=1)

    async def prepare(self) -> None:
        """Open all connections now, so that a burst of requests need not wait."""
        # After an outage, `recover` calls this. Idle connections may be dead then, so
        # close them. Connections in use can stay: if one is dead, its command fails,
        # and redis-py closes it.
        await self.close_connections(inuse_connections=False)
        try:
            await self.open_connections()
        except Exception:
            # Redis may have no room for all. Then close those that it has accepted, so
            # that other clients can connect.
            await self.close_connections()
            raise

    async def close_connections(self, inuse_connections: bool = True) -> None:
        """Close connections, but wait at most REDIS_CONNECT_SECONDS for Redis.

        To close a TLS connection, redis-py waits for Redis, and raises an exception if
        Redis is silent. In this case, it has already discarded the connection.
        """
        pool = self.client.connection_pool
        with suppress(TimeoutError, RedisError):
            async with asyncio.timeout(REDIS_CONNECT_SECONDS):
                await pool.disconnect(inuse_connections)

    async def check_lookup(self) -> None:
        """Try a lookup of the host. Raise an exception if it fails or is slow.

        This waits for the end of the lookup, however long. There is one check at a
        time, so lookups that hang do not pile up. (uvloop runs at most two at a time:
        while this one hangs, PostgreSQL's host can still be looked up.)
        """
        host = self.client.connection_pool.connection_kwargs.get("host")
        if host is None:  # a unix socket, or the default, localhost
            return
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            # No timeout, because a lookup cannot be cancelled. (With SOCK_STREAM,
            # uvloop skips the lookup if the host is an address.)
            await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConnectionError(f"{host}: {error}") from None
        if loop.time() - started > REDIS_CONNECT_SECONDS:
            raise TimeoutError(f"the lookup of {host} took too long")

    async def open_connections(self) -> None:
        await self.check_lookup()
        pool = self.client.connection_pool
        async with AsyncExitStack() as stack:
            # One after the other, so that only one lookup runs at a time. Keep each
            # until all are open: otherwise, the pool would return the first one again.
            for _ in range(REDIS_CONNECTIONS):
                connecting = pool.get_connection()  # type: ignore[no-untyped-call]
                connection = await asyncio.wait_for(connecting, REDIS_CONNECT_SECONDS)
                stack.push_async_callback(pool.release, connection)
        async with asyncio.timeout(REDIS_CONNECT_SECONDS):
            await self.client.script_load(REDIS_SCRIPT)

    async def hit(self, key: str, limit: int, seconds: int) -> RateLimitResult | None:
        """Count a request. Returns None if Redis cannot be used now."""
        try:
            # Wait for a slot before the timeout of run_script begins: if all slots are
            # taken, this worker is busy, but Redis need not be slow.
            async with asyncio.timeout(REDIS_WAIT_SECONDS), self.slots:
                return await self.run_script_if_usable(key, limit, seconds)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is logged
            self.handle_failure(error)
            return None

    async def run_script_if_usable(
        self, key: str, limit: int, seconds: int
    ) -> RateLimitResult | None:
        # An outage may have begun during the wait for a slot. Until `prepare` has
        # succeeded, each request would have to connect.
        if self.in_outage or not self.is_prepared:
            return None
        return await self.run_script(key, limit, seconds)

    async def run_script(self, key: str, limit: int, seconds: int) -> RateLimitResult:
        keys = [f"{self.key_prefix}:{key}"]
        arguments: list[int | str] = [limit, seconds * 1_000_000, secrets.token_hex(8)]
        async with timeout_in_steps(REDIS_TIMEOUT_SECONDS):
            allowed, *numbers = await self.script(keys, arguments)
        return RateLimitResult(bool(allowed), *numbers)


class RateLimiter:
    """All limits: counted in Redis, or in shared memory if Redis cannot be used.

    Made before the fork, so that the workers share the memory. Each worker connects to
    Redis when it starts.
    """

    def __init__(self, settings: Settings) -> None:
        limits = {
            "api": settings.RATE_LIMIT_REQUESTS,
            "login": settings.RATE_LIMIT_LOGIN_REQUESTS,
        }
        seconds = settings.RATE_LIMIT_WINDOW_SECONDS
        table_bytes = SHARED_MEMORY_BYTES // len(limits)
        self.memory_limiters = {
            name: SlidingWindowRateLimiter(limit, seconds, table_bytes)
            for name, limit in limits.items()
        }
        url = settings.REDIS_URL
        self.redis = RedisRateLimiter(url, settings.PROJECT_NAME) if url else None

    async def hit(self, name: str, client: str) -> RateLimitResult:
        """Count a request, if the limit of this name allows it.

        `client` is a client_key or, for example, a user's id: any text in valid
        Unicode, because redis-py encodes it as UTF-8.
        """
        limiter = self.memory_limiters[name]
        key = f"{name}:{client}"
        if self.redis:
            in_redis = await self.redis.hit(key, limiter.limit, limiter.seconds)
            if in_redis is not None:
                return in_redis
        return limiter.hit(key)

    async def close(self) -> None:
        if self.redis:
            await self.redis.stop_checks()
            await self.redis.close_connections()


async def enforce_rate_limit(
    limiter: RateLimiter, name: str, scope: Scope, client: str | None = None
) -> None:
    """Count a request of `client`, by default its address. Raises RateLimitedException.

    It sets `rate_limit` in `scope["state"]`, which is `request.state`, for the headers
    of the response. A login counts in two limits, for example: the headers show the one
    that refused, else the one with the fewest requests remaining.
    """
    state = scope["state"]  # RequestLoggingMiddleware (below) sets `client` in it
    rate_limit = await limiter.hit(name, client or client_key(state["client"]))
    previous: RateLimitResult | None = state.get("rate_limit")
    if not rate_limit.allowed:
        state["rate_limit"] = rate_limit
        raise RateLimitedException(rate_limit.reset_seconds)
    if previous is None or rate_limit.remaining < previous.remaining:
        state["rate_limit"] = rate_limit


# --- Middleware -----------------------------------------------------------------------
# Pure ASGI, because BaseHTTPMiddleware is several times slower. Middleware and routes
# share data in scope["state"], which is `request.state`: request_id, client, trace_id,
# user_id, rate_limit, status_code, timed_out, and, for the log line, reason, exception.

# A caller's id that does not match is replaced: ids get into headers and log lines.
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Version, trace id, parent id, flags, and what later versions may append.
TRACEPARENT_PATTERN = re.compile(
    rb"([\da-f]{2})-([\da-f]{32})-([\da-f]{16})-[\da-f]{2}(-.*)?"
)
# Starlette needs 0.1 s to parse a Content-Type of 60,000 semicolons.
MAX_CONTENT_TYPE_BYTES = 1000
MAX_PATH_CHARACTERS = 500  # keeps a log line under 4 KiB, as Logging explains
CSP = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
# MDN's HTTP Observatory rates this set A+.
SECURITY_HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "accelerometer=(), camera=(), geolocation=(), microphone=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-XSS-Protection": "0",  # off: the filter of old browsers could be exploited
    "Cache-Control": "no-store",  # a response can have personal data
}
# RFC 6797 § 7.2: over https only. Not for subdomains: they may be somebody else's.
HTTPS_HEADERS = {"Strict-Transport-Security": "max-age=63072000"}
LIMIT_HEADERS = ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")
# Set by routes, errors and RequestLoggingMiddleware.
OTHER_HEADERS = ("Location", "Retry-After", "X-Request-ID", "X-Response-Time")
# Browsers hide headers from scripts of other origins. None that the service adds is
# secret, so the scripts of CORS_ORIGINS may read them all.
EXPOSED_HEADERS = (*SECURITY_HEADERS, *HTTPS_HEADERS, *LIMIT_HEADERS, *OTHER_HEADERS)
# FastAPI's defaults. If you change its docs_url or redoc_url, change these, too.
DOCS_PATHS = ("/docs", "/docs/oauth2-redirect", "/redoc")
# Swagger UI and ReDoc load scripts and styles from a CDN, and have some inline.
DOCS_CSP = (
    f"{CSP}; connect-src 'self'; worker-src blob:; "
    "script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'unsafe-inline' https://cdn.jsdelivr.net https://fonts.googleapis.com; "
    "font-src https://fonts.gstatic.com; "
    "img-src data: https://cdn.redoc.ly https://fastapi.tiangolo.com"
)
DOCS_HEADERS = SECURITY_HEADERS | {
    "Content-Security-Policy": DOCS_CSP,
    "Cross-Origin-Embedder-Policy": "credentialless",  # the CDN is of another origin
}


def parse_traceparent(header: bytes) -> str | None:
    """Return the trace id; None if the header is invalid (W3C Trace Context § 3.2)."""
    match = TRACEPARENT_PATTERN.fullmatch(header)
    if match is None:
        return None
    version, trace_id, parent_id, appended = match.groups()
    if version == b"ff" or (version == b"00" and appended):
        return None
    if trace_id == b"0" * 32 or parent_id == b"0" * 16:
        return None
    return str(trace_id, "ascii")


@cache  # so that it runs once in each process
def warn_of_untrusted_proxy() -> None:
    logger.warning(
        "X-Forwarded-For came from a peer that FORWARDED_ALLOW_IPS does not name. If "
        "it is your proxy, all its clients share one rate limit."
    )


class RequestLoggingMiddleware:
    """Give each request its root path, id and client, and log it with its time.

    It is the outermost, because all others need these.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        # If a client asks for /shop/health, a proxy that strips /shop sends /health. In
        # ASGI, the prefix is in both root_path and `path`, so put it back. (FastAPI's
        # argument root_path would set only root_path.)
        scope["root_path"] = self.root_path
        scope["path"] = self.root_path + scope["path"]
        state = scope.setdefault("state", {})
        self.set_request_context(scope, state)

        async def send_with_id_and_time(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status_code"] = message["status"]
                milliseconds = (time.perf_counter() - started) * 1000
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", state["request_id"].encode()),
                    (b"x-response-time", b"%.2fms" % milliseconds),
                ]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id_and_time)
        finally:
            self.log(scope, state, time.perf_counter() - started)

    def set_request_context(self, scope: Scope, state: dict[str, Any]) -> None:
        headers = dict(scope["headers"])
        # httptools keeps white space after a value, which is no part of it (RFC 9110).
        request_id = headers.get(b"x-request-id", b"").strip(b" \t").decode("latin-1")
        if not REQUEST_ID_PATTERN.fullmatch(request_id):
            request_id = os.urandom(16).hex()
        state["request_id"] = request_id
        # This needs no reset: uvicorn runs each request in a task with its own context.
        request_id_context.set(request_id)
        trace_id = parse_traceparent(headers.get(b"traceparent", b"").strip(b" \t"))
        if trace_id:
            state["trace_id"] = trace_id
        address, _ = scope["client"] or ("unknown", 0)
        state["client"] = address[:64]  # a proxy may send any text
        if headers.get(b"x-forwarded-for"):
            # If uvicorn trusts the peer, it has replaced `address` by an entry of this
            # header. (Search the text, because an entry can be "address:port".)
            forwarded_for = Headers(scope=scope).getlist("x-forwarded-for")
            if address not in ", ".join(forwarded_for):
                warn_of_untrusted_proxy()

    def log(self, scope: Scope, state: dict[str, Any], seconds: float) -> None:
        # Without a status, no response has started: a middleware has raised an
        # exception, and Starlette is about to answer 500.
        status_code = state.get("status_code", 500)
        exception = state.get("exception")
        fields = {
            "method": scope["method"],
            "path": quote(scope["path"], errors="replace")[:MAX_PATH_CHARACTERS],
            "status_code": status_code,
            "duration_ms": round(seconds * 1000, 2),
        }
        optional = ("client", "user_id", "trace_id", "reason")
        fields |= {name: state[name] for name in optional if name in state}
        # If an error occurs after the headers were sent, the status can be 200. So a
        # `reason` makes the line a WARNING, too, and an `exception` an ERROR.
        is_warning = status_code >= 500 or "reason" in state
        level = logging.WARNING if is_warning else logging.INFO
        if exception:
            level = logging.ERROR
        logger.log(level, "request", exc_info=exception, extra=fields)


class SecurityHeadersMiddleware:
    """Add the security headers to every response, unless its route has set them.

    (A route that returns a page with scripts, styles or images has to set a
    Content-Security-Policy of its own.)
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        # Encoded once, as ASGI wants them.
        self.headers = Headers(SECURITY_HEADERS).raw
        self.docs_headers = Headers(DOCS_HEADERS).raw
        self.https_headers = Headers(HTTPS_HEADERS).raw

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = self.headers_for(scope)

        async def send_with_security_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = dict(message["headers"])
                missing = [header for header in headers if header[0] not in present]
                message["headers"] = [*message["headers"], *missing]
            await send(message)

        await self.app(scope, receive, send_with_security_headers)

    def headers_for(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        # Called before the app runs: a Mount at /x changes root_path to /x in the
        # scope, and then /x/docs would look like our /docs.
        is_docs = scope["path"].removeprefix(scope["root_path"]) in DOCS_PATHS
        headers = self.docs_headers if is_docs else self.headers
        if scope["scheme"] == "https":
            return headers + self.https_headers
        return headers


class OriginCORSMiddleware(CORSMiddleware):
    """Starlette's CORSMiddleware, skipped if there is no Origin header.

    Starlette itself passes on such requests, too, but takes 8 µs to find that out.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # (The scope of the lifespan has no headers.)
        if b"origin" not in dict(scope.get("headers", ())):
            return await self.app(scope, receive, send)
        await super().__call__(scope, receive, send)


class RateLimitMiddleware:
    """Count every API request, before its body is read and its route is found."""

    def __init__(self, app: ASGIApp, settings: Settings, limiter: RateLimiter) -> None:
        self.app = app
        # If you add a second prefix, make this a tuple of both.
        self.prefix = f"{settings.ROOT_PATH}{settings.API_V1_PREFIX}/"
        self.rate_limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self.prefix):
            return await self.app(scope, receive, send)

        async def send_with_rate_limit(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Read it here, not earlier: the route may have applied another limit.
                rate_limit: RateLimitResult = scope["state"]["rate_limit"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-ratelimit-limit", b"%d" % rate_limit.limit),
                    (b"x-ratelimit-remaining", b"%d" % rate_limit.remaining),
                    (b"x-ratelimit-reset", b"%d" % rate_limit.reset_seconds),
                ]
            await send(message)

        try:
            await enforce_rate_limit(self.rate_limiter, "api", scope)
        except RateLimitedException as error:
            response = await app_exception_handler(Request(scope), error)
            return await response(scope, receive, send_with_rate_limit)
        await self.app(scope, receive, send_with_rate_limit)


class LimitsAndErrorsMiddleware:
    """Limit the body and the time of a request, and answer what goes wrong.

    400 for a multipart form in another charset than UTF-8, 404 for a path that ends
    with a line break, 413 for a large body, 504 for a request that takes too long, 500
    for an unhandled exception, 503 for a request that a shutdown interrupts.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.max_body_bytes = settings.MAX_BODY_BYTES
        self.timeout_seconds = settings.REQUEST_TIMEOUT_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].endswith("\n"):
            # Starlette's patterns of paths end with "$", which also matches before a
            # last "\n". So POST /items%0A would store an item, and then fail, because
            # uvicorn refuses to send a Location with a line break.
            error = HTTPException(404)  # as for any path that has no route
            not_found = await http_exception_handler(Request(scope), error)
            return await not_found(scope, receive, send)
        self.drop_long_content_type(scope)
        receive_limited = self.limit_body(scope, receive)
        response: Response | None = None
        task = asyncio.current_task()
        assert task is not None  # for mypy
        loop = asyncio.get_running_loop()
        # Not asyncio.timeout, which makes a health check 4 % slower. When the time is
        # over, time_out cancels this task. This raises a CancelledError here, from
        # which answer_error makes a 504.
        timer = loop.call_later(self.timeout_seconds, self.time_out, task, scope)
        try:
            await self.app(scope, receive_limited, send)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - logged
            response = await self.answer_error(Request(scope), error, task)
        finally:
            timer.cancel()
            if "timed_out" in scope["state"]:
                task.uncancel()  # undo time_out's cancel(), as asyncio.timeout does
        # If status_code is set (by RequestLoggingMiddleware), a response has started. A
        # second one cannot be sent: only the log line tells of the error. If the first
        # one is incomplete, uvicorn closes the connection.
        if response and "status_code" not in scope["state"]:
            await response(scope, receive, send)

    def time_out(self, task: asyncio.Task[object], scope: Scope) -> None:
        scope["state"]["timed_out"] = True
        task.cancel()

    async def answer_error(
        self, request: Request, error: BaseException, task: asyncio.Task[object]
    ) -> Response:
        """Return the response to an error. Set `reason` or `exception` for the log."""
        if isinstance(error, ClientDisconnect):  # in a route that reads the body itself
            # If a response was cut short, set a `reason`: it makes the line a WARNING.
            if "status_code" in request.scope["state"]:
                request.state.reason = "the client has disconnected"
            # Nobody receives this 400, but RequestLoggingMiddleware logs its status.
            return await http_exception_handler(request, HTTPException(400))
        if "timed_out" in request.scope["state"]:
            late = RequestTimeoutException("REQUEST_TIMEOUT_SECONDS is over")
            return await app_exception_handler(request, late)
        if isinstance(error, asyncio.CancelledError) and task.cancelling():
            # This task was cancelled: by uvicorn, at a shutdown. It does so only once,
            # so this response can still be sent.
            stopping = ServiceUnavailableException("the server is shutting down")
            return await app_exception_handler(request, stopping)
        # A CancelledError is the route's own here: it awaits a task that was cancelled.
        return await unhandled_exception_handler(request, error)

    def drop_long_content_type(self, scope: Scope) -> None:
        """Drop a Content-Type that is too long, because it is slow to parse.

        A route with a body then answers 422, as if the client had sent none. Routes
        without a body do not need it, so they answer as usual.
        """
        scope["headers"] = [
            (name, value)
            for name, value in scope["headers"]
            if name != b"content-type" or len(value) <= MAX_CONTENT_TYPE_BYTES
        ]

    def limit_body(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` that raises HTTPException for a bad body.

        It raises when a route reads the body, so 404 and 405 come first. It raises only
        HTTPException: FastAPI, which reads the body, turns nearly any other exception
        into a 400.
        """
        received_bytes = 0

        async def receive_limited() -> Message:
            nonlocal received_bytes
            if received_bytes == 0:  # before the first part of the body
                self.check_body_headers(Headers(scope=scope))
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > self.max_body_bytes:
                raise HTTPException(413)
            return message

        return receive_limited

    def check_body_headers(self, headers: Headers) -> None:
        # uvicorn has checked that this is a number.
        if int(headers.get("content-length", 0)) > self.max_body_bytes:
            raise HTTPException(413)
        # The login also accepts a multipart form. Starlette decodes it with the charset
        # that the client names. Some codecs of Python, such as punycode, are so slow
        # that they block the event loop.
        content_type, options = parse_options_header(headers.get("content-type"))
        charset = options.get(b"charset", b"utf-8").lower()
        if content_type == b"multipart/form-data" and charset != b"utf-8":
            raise HTTPException(400, "The charset must be utf-8")


# --- Dependencies ---------------------------------------------------------------------
# What a route asks for, and what a test overrides. All are async: sync functions would
# wait for one of FastAPI's 40 threads.

# A placeholder, because the prefix is a setting: customize_openapi writes the real URL.
oauth2_scheme = OAuth2PasswordBearer("auth/token")
BearerToken = Annotated[str, Depends(oauth2_scheme)]


async def get_db(request: Request) -> AsyncIterator[AsyncSession]:
    """A session for a route that writes. What the service does not commit is lost.

    On SQLite, such sessions run one after the other. On PostgreSQL, they run at the
    same time: two can both read that a seat is free, and both take it. So put the
    condition into the UPDATE, as update_user does, or read by `with_for_update()`.
    """
    async with request.app.state.database.session(writes=True) as session:
        yield session


async def get_read_db(request: Request) -> AsyncIterator[AsyncSession]:
    """A session for a route that only reads: in autocommit, which is cheaper."""
    async with request.app.state.database.session(writes=False) as session:
        yield session
        # Refuse changes that were not flushed, which would be lost silently.
        refuse_changes(session.sync_session)


async def get_current_user(request: Request, token: BearerToken) -> User:
    """Return the owner of the token. Raises UnauthorizedException.

    The user's session is closed: what a route sets on the user is not stored.
    """
    if not token:  # "Authorization: Bearer" alone: as if there were no header
        raise oauth2_scheme.make_not_authenticated_error()  # FastAPI's own 401
    claims = decode_access_token(token, request.app.state.settings)
    # A session of its own, which gives its connection back before the route's session
    # takes one. If a request held one and waited for a second, requests could wait for
    # each other, and get 503 after DATABASE_TIMEOUT_SECONDS.
    async with request.app.state.database.session(writes=False) as session:
        user = await read_token_owner(session, claims.sub, claims.version)
    request.state.user_id = user.id
    return user


def rate_limit_dependency(limit_name: str) -> Callable[[Request], Awaitable[None]]:
    """Return a dependency that applies a limit, in addition to RateLimitMiddleware.

    Write `Depends(rate_limit_dependency("login"))`, with the name of a limit.
    """

    async def apply_limit(request: Request) -> None:
        rate_limiter: RateLimiter = request.app.state.rate_limiter
        await enforce_rate_limit(rate_limiter, limit_name, request.scope)

    return apply_limit


# scope="function" closes the session before the response is sent, which can be slow.
# Then an exception after `yield`, as from refuse_changes, can still become a 500.
WriteSession = Annotated[AsyncSession, Depends(get_db, scope="function")]
ReadSession = Annotated[AsyncSession, Depends(get_read_db, scope="function")]
CurrentUser = Annotated[User, Depends(get_current_user)]


# --- Health routes --------------------------------------------------------------------
# For orchestrators and monitors: no rate limit, and only the log says what is wrong.
# Some monitors send HEAD requests, which need a route of their own in FastAPI.

health_router = APIRouter(
    prefix="/health",
    tags=["health"],
    # Every route can get 500, 503 and 504 from LimitsAndErrorsMiddleware. /health/ready
    # and /health also send a 503 with another body, and document both bodies.
    responses=document_errors(500, 503, 504),
    # The operation id is the function's name: generated clients name methods after it.
    # (create_app sets it for the routers that it includes. This one is not included:
    # create_app says why, at `routes=`.)
    generate_unique_id_function=attrgetter("name"),
)
HEALTHY = CheckResult(status="healthy")
UNHEALTHY = CheckResult(status="unhealthy")


async def check_database(request: Request) -> CheckResult:
    if await request.app.state.database.is_ready():
        return HEALTHY
    request.state.reason = "the database is not ready"  # for the request's log line
    return UNHEALTHY


async def check_redis(request: Request) -> CheckResult | MISSING:
    redis: RedisRateLimiter | None = request.app.state.rate_limiter.redis
    if redis is None:
        return MISSING  # not configured: the field is left out of the response
    # Do not set `reason`: the log line would be a WARNING, but this is still a 200.
    return HEALTHY if await redis.is_ready() else UNHEALTHY


@health_router.head("/live", include_in_schema=False)
@health_router.get("/live")
async def liveness_probe() -> ProbeStatus:
    """Does the process answer? If not, restart it."""
    return ProbeStatus(status="alive")


@health_router.head("/ready", include_in_schema=False)
@health_router.get("/ready", responses={503: {"model": ProbeStatus | ErrorResponse}})
async def readiness_probe(request: Request, response: Response) -> ProbeStatus:
    """Can it serve requests? If not, send them elsewhere."""
    if await check_database(request) == HEALTHY:
        return ProbeStatus(status="ready")
    response.status_code = 503
    return ProbeStatus(status="not_ready")


@health_router.head("", include_in_schema=False)
@health_router.get("", responses={503: {"model": HealthStatus | ErrorResponse}})
async def health_check(request: Request, response: Response) -> HealthStatus:
    """Tell the state of the service, and of the servers that it depends on."""
    database, redis = await asyncio.gather(
        check_database(request), check_redis(request)
    )
    if database == UNHEALTHY:
        response.status_code = 503  # not for Redis: without it, the service works
    return HealthStatus(
        status="degraded" if UNHEALTHY in (database, redis) else "healthy",
        timestamp=now(),
        version=request.app.version,
        checks=HealthChecks(database=database, redis=redis),
    )


# --- API routes -----------------------------------------------------------------------
# HTTP and nothing else: a route has a few lines. Callers read its docstring in /docs.
# A route returns the response model, not a row, so that mypy can check it.
# Routes with a body document 413 (body too large) and 400 (body not decodable). A
# `user: CurrentUser` that a route does not use still requires a valid token.

IdPath = Annotated[Int64, Path(ge=1, le=MAX_ID)]
After = Annotated[
    Int64, Query(ge=0, le=MAX_ID, description="`next` of the page before")
]
Limit = Annotated[int, Query(ge=1, le=100)]
LoginFormBody = Annotated[LoginForm, Form()]
# For all routes that hash a password: login, registration and password change.
LOGIN_LIMIT = [Depends(rate_limit_dependency("login"))]

users_router = APIRouter(prefix="/users", tags=["users"])
# `form_limits` is FastAPI's: a form with more than 10 fields, or with a file, gets 400,
# because parsing it takes time. (By default, FastAPI allows 1,000 fields.)
auth_router = APIRouter(
    prefix="/auth", tags=["auth"], form_limits={"max_fields": 10, "max_files": 0}
)
items_router = APIRouter(
    prefix="/items", tags=["items"], responses=document_errors(401)
)


@users_router.post(
    "",
    status_code=201,
    dependencies=LOGIN_LIMIT,
    responses=document_errors(400, 409, 413, 422),
)
async def post_user(
    user_in: UserIn, request: Request, response: Response, db: WriteSession
) -> UserOut:
    """Register a user."""
    user = await register_user(db, user_in)
    # Not a full URL: it would contain the Host header, which the client chooses. (The
    # path includes ROOT_PATH: see RequestLoggingMiddleware.)
    response.headers["Location"] = f"{request.scope['path']}/{user.id}"
    return UserOut.model_validate(user)


@users_router.get("", responses=document_errors(401, 422))
async def get_users(
    user: CurrentUser, db: ReadSession, after: After = 0, limit: Limit = 20
) -> UserPage:
    """List all users, in the order of their ids."""
    return UserPage.model_validate(await read_users(db, after, limit))


@users_router.get("/me", responses=document_errors(401))
async def get_me(user: CurrentUser) -> UserOut:
    """Read the user whose token this is."""
    return UserOut.model_validate(user)


@users_router.patch(
    "/me",
    status_code=204,
    dependencies=LOGIN_LIMIT,
    responses=document_errors(400, 401, 403, 413, 422),
)
async def patch_me(change: PasswordChange, user: CurrentUser, db: WriteSession) -> None:
    """Change the password. Every token issued before becomes invalid."""
    await change_password(db, user, change)


@users_router.delete("/me", status_code=204, responses=document_errors(401))
async def delete_me(user: CurrentUser, db: WriteSession) -> None:
    """Delete the account and all that it owns."""
    await discard_user(db, user)


@users_router.get("/{user_id}", responses=document_errors(401, 404, 422))
async def get_user(user_id: IdPath, user: CurrentUser, db: ReadSession) -> UserOut:
    """Read one user."""
    return UserOut.model_validate(await read_user(db, user_id))


@auth_router.post(
    "/token", dependencies=LOGIN_LIMIT, responses=document_errors(400, 401, 413, 422)
)
async def post_token(
    form: LoginFormBody, request: Request, read_db: ReadSession, write_db: WriteSession
) -> TokenOut:
    """Log in. Send the token as `Authorization: Bearer`."""
    user = await authenticate_user(read_db, write_db, form.username, form.password)
    settings: Settings = request.app.state.settings
    token = create_access_token(user, settings)
    seconds = settings.ACCESS_TOKEN_EXPIRE_MINUTES * 60
    return TokenOut(access_token=token, token_type="bearer", expires_in=seconds)


@auth_router.delete("/token", status_code=204, responses=document_errors(401))
async def delete_token(user: CurrentUser, db: WriteSession) -> None:
    """Log out everywhere. Every token issued before becomes invalid."""
    await revoke_tokens(db, user)


@items_router.post("", status_code=201, responses=document_errors(400, 413, 422))
async def post_item(
    item_in: ItemIn,
    user: CurrentUser,
    request: Request,
    response: Response,
    db: WriteSession,
) -> ItemOut:
    """Add an item."""
    item = await create_item(db, user, item_in)
    response.headers["Location"] = f"{request.scope['path']}/{item.id}"
    return ItemOut.model_validate(item)


@items_router.get("", responses=document_errors(422))
async def get_items(
    user: CurrentUser, db: ReadSession, after: After = 0, limit: Limit = 20
) -> ItemPage:
    """List your own items, in the order of their ids."""
    return ItemPage.model_validate(await read_items(db, user, after, limit))


@items_router.get("/{item_id}", responses=document_errors(404, 422))
async def get_item(item_id: IdPath, user: CurrentUser, db: ReadSession) -> ItemOut:
    """Read one of your items."""
    return ItemOut.model_validate(await read_item(db, user, item_id))


@items_router.patch("/{item_id}", responses=document_errors(400, 404, 413, 422))
async def patch_item(
    item_id: IdPath, patch: ItemPatch, user: CurrentUser, db: WriteSession
) -> ItemOut:
    """Change the fields that are sent, and nothing else."""
    return ItemOut.model_validate(await change_item(db, user, item_id, patch))


@items_router.delete("/{item_id}", status_code=204, responses=document_errors(404, 422))
async def delete_item(item_id: IdPath, user: CurrentUser, db: WriteSession) -> None:
    """Delete one of your items."""
    await discard_item(db, user, item_id)


# --- Application ----------------------------------------------------------------------
# Wiring only: create_app reads as a list of parts, which are defined above.

# create_app puts API_V1_PREFIX before these routes. (A second prefix has no rate limit
# until you add it in RateLimitMiddleware. There are no redirects, so an application
# that you mount at /x answers only /x/: for /metrics, write a route.)
api_router = APIRouter(responses=document_errors(429, 500, 503, 504))
api_router.include_router(users_router)
api_router.include_router(auth_router)
api_router.include_router(items_router)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Check the database and Redis. After 2 s, start even if they are silent.

    Your own code for the start and the end goes here: with a lifespan, FastAPI ignores
    `on_event`. Keep objects in `app.state`, not in the state that a lifespan can yield:
    httpx, which the tests use, does not pass this state to requests.

    A background task that you start here runs in every worker. Log exceptions inside
    of its loop: otherwise, the first one ends it, and no log line says so. Before
    `database.close()`, cancel the task, and wait for its end by `asyncio.wait({task})`.
    """
    database = Database(app.state.settings)
    app.state.database = database
    checks = {database.start_check()}
    if app.state.rate_limiter.redis:
        checks.add(app.state.rate_limiter.redis.start_check())
    await asyncio.wait(checks, timeout=START_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        await database.close()
        await app.state.rate_limiter.close()


def setup_middleware(settings: Settings, rate_limiter: RateLimiter) -> list[Middleware]:
    """Return the middleware for `FastAPI(middleware=…)`, outermost first.

    Put yours at the end. Two kinds come second, after RequestLoggingMiddleware:

        one that must see every response, as for metrics: at the end, it would miss
            those of the middleware before it, such as 429 and 504. (In memory, each
            worker counts for itself.)
        a BaseHTTPMiddleware: at the end, it would wrap the HTTPException of a large
            body in an ExceptionGroup, and the client would not get a 413. (Behind it,
            a request that a shutdown cancels gets a 500 in place of a 503, a stream
            that fails looks complete to the client, and some tests fail: so better
            write a class like those above.)

    Do not use `app.add_middleware`: it puts yours outside RequestLoggingMiddleware,
    which then logs neither its time nor its errors.
    """
    cors = Middleware(
        OriginCORSMiddleware,
        allow_origins=settings.CORS_ORIGINS,
        # If a route uses another method or header, add it, or browsers will refuse it.
        allow_methods=("GET", "POST", "PATCH", "DELETE"),
        allow_headers=("Authorization", "Content-Type", "X-Request-ID"),
        # No allow_credentials, because the token is in a header, not in a cookie.
        expose_headers=EXPOSED_HEADERS,
    )
    return [
        Middleware(RequestLoggingMiddleware, settings.ROOT_PATH),  # all need the id
        Middleware(SecurityHeadersMiddleware),  # its headers are also for preflights
        # Outside all that can refuse a request: without CORS headers, a page's script
        # could not read a 429, for example.
        *([cors] if settings.CORS_ORIGINS else []),
        Middleware(RateLimitMiddleware, settings, rate_limiter),  # before work is done
        Middleware(LimitsAndErrorsMiddleware, settings),  # its errors get all headers
    ]


def register_exception_handlers(app: FastAPI) -> None:
    """Register all handlers but unhandled_exception_handler: its docstring says why."""
    # Not app.add_exception_handler: its type wants handlers that accept any Exception,
    # so mypy refuses these, which accept one class each.
    app.exception_handler(AppException)(app_exception_handler)
    app.exception_handler(HTTPException)(http_exception_handler)
    app.exception_handler(RequestValidationError)(validation_exception_handler)
    app.exception_handler(sa_exc.SQLAlchemyError)(database_exception_handler)


def customize_openapi(app: FastAPI) -> None:
    """Put the token URL into the OpenAPI document, for /docs's Authorize button."""
    settings: Settings = app.state.settings
    token_url = f"{settings.ROOT_PATH}{settings.API_V1_PREFIX}/auth/token"
    generate_document = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate_document()
        scheme = document["components"]["securitySchemes"][oauth2_scheme.scheme_name]
        scheme["flows"]["password"]["tokenUrl"] = token_url
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application. Logging is left to the caller."""
    settings = settings or get_settings()
    if "SECRET_KEY" not in settings.model_fields_set:
        # This warning is not in Settings, because they are read before setup_logging.
        logger.warning("no SECRET_KEY: a restart or --reload ends all tokens")
    rate_limiter = RateLimiter(settings)
    app = FastAPI(
        title=settings.PROJECT_NAME,
        description=settings.PROJECT_DESCRIPTION,
        version=settings.VERSION,
        openapi_url=f"{settings.API_V1_PREFIX}/openapi.json",
        # The base URL of the requests that /docs sends. (RequestLoggingMiddleware says
        # why ROOT_PATH is not FastAPI's argument root_path.)
        servers=[{"url": settings.ROOT_PATH or "/"}],
        redirect_slashes=False,  # its redirects would be made from the Host header
        generate_unique_id_function=attrgetter("name"),
        middleware=setup_middleware(settings, rate_limiter),
        lifespan=lifespan,
        # Not include_router: since FastAPI 0.137, it nests the router, which makes a
        # health check a fifth slower. The price: generate_unique_id_function and
        # dependency_overrides do not reach these routes. So give them no Depends.
        routes=health_router.routes,
        # FastAPI has OpenTelemetry built in (as of 0.165), which costs time. To use it,
        # see "Operate" in README.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.settings = settings
    app.state.rate_limiter = rate_limiter
    register_exception_handlers(app)
    app.include_router(api_router, prefix=settings.API_V1_PREFIX)
    # Build the included routes now, before the fork. FastAPI builds them at their first
    # use: each worker's first API request would block its event loop for 30 ms or more.
    list(iter_route_contexts(app.routes))
    customize_openapi(app)
    return app


@cache
def build_app() -> FastAPI:
    """Set up logging and build `main:app`, which servers ask for."""
    setup_logging(get_settings())
    try:
        return create_app()
    except AttributeError as error:
        # __getattr__ (below) calls this. If it raised AttributeError, servers would say
        # that there is no `app`, and hide the cause. With an ImportError, they show it.
        raise ImportError("create_app has failed") from error


# `app = create_app()` would read the settings at the import. But tests import this
# module, and set no variables. So `app` is built when a server asks for it: Python
# calls a module's __getattr__ for a name that is missing (PEP 562).
if TYPE_CHECKING:  # for mypy: if it saw __getattr__, it would accept any name
    app: FastAPI
else:

    def __getattr__(name: str) -> FastAPI:
        if name == "app":
            return build_app()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def prepare_process(server: object) -> None:
    """Prepare gunicorn's main process. (`server` is gunicorn's Arbiter.)

    gunicorn calls this as on_starting, before it forks workers. (With preload_app, the
    application is already loaded then.) It is here to keep gunicorn.conf.py short.
    """
    # `gunicorn 'main:create_app()'` does not call build_app, which sets up logging.
    if not logger.hasHandlers():
        setup_logging(get_settings())
    # Each connection is an open file. So raise the soft limit to the hard one.
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS refuses its own hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    # Otherwise, a garbage collection in a worker would write to memory that the workers
    # share, and the kernel would copy it.
    gc.freeze()
