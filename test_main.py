"""The tests of main.py, under the same banners and in the same order.

A test gets what it needs from five fixtures:

    app       an application on a fresh SQLite file, started
    guest     a client of it that is not logged in
    ada       a client that is logged in as "ada", the user with the id 1
    bob       another one, the user with the id 2
    database  a `main.Database` with empty tables, on SQLite and on PostgreSQL

A client is an `httpx.AsyncClient` whose base URL is the API's. A test for an endpoint
of your own reads like this one; put it under "API routes":

    async def test_item_of_another_user_is_404(ada: Client, bob: Client) -> None:
        assert (await bob.get(f"/items/{await ada.add_item()}")).status_code == 404

For other settings, use `serve(NAME=value)`; for other dependencies, see "Dependencies".
Some tests need TEST_DATABASE_URL (they create databases there) or TEST_REDIS_URL.
"""

import asyncio
import base64
import cProfile
import gc
import hmac
import io
import itertools
import json
import logging
import math
import mmap
import multiprocessing
import os
import random
import re
import resource
import runpy
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from datetime import UTC, datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import argon2
import httpx
import psycopg
import pydantic
import pytest
import sqlalchemy as sa
import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.exceptions import ResponseValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import iter_route_contexts
from gunicorn.util import import_app  # type: ignore[import-untyped]
from jose import jwt
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.server import ServerState

import main

pytestmark = pytest.mark.anyio
CapLog = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
PASSWORD = "correct horse battery staple"
KEY = "k" * 32  # of tokens
PATIENCE_SECONDS = 10  # for what another task or process does, before its test fails
ADDRESSES = (f"198.18.{n >> 8}.{n & 255}" for n in itertools.count(1))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: Patch, tmp_path: Path) -> None:  # not the developer's
    for name in [*main.Settings.model_fields, "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "START_TIMEOUT_SECONDS", PATIENCE_SECONDS)
    main.get_settings.cache_clear()


def cases(names: str, table: dict[str, Any]) -> pytest.MarkDecorator:  # key: its name
    return pytest.mark.parametrize(names, table.values(), ids=table.keys())


def rows(table: dict[str, Any]) -> pytest.MarkDecorator:  # a test for each value
    pairs = [(name, value) for name, values in table.items() for value in values]
    return pytest.mark.parametrize(("name", "value"), pairs, ids=lambda x: str(x)[:50])


def make_settings(**changes: Any) -> main.Settings:  # with high limits
    values = {"ENVIRONMENT": "test", "SECRET_KEY": KEY}
    limits = {"RATE_LIMIT_REQUESTS": 10_000, "RATE_LIMIT_LOGIN_REQUESTS": 10_000}
    return main.Settings(**{**values, **limits, **changes})


class Client(httpx.AsyncClient):  # of an application here, from an address of its own
    def __init__(self, app: Any, **options: Any) -> None:
        options = {"client": (next(ADDRESSES), 5), **options}
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, **options)
        super().__init__(transport=transport, base_url="http://test/api/v1")
        self.app = app

    def use_token(self, token: str) -> None:
        self.headers["Authorization"] = f"Bearer {token}"

    async def register(self, name: str = "ada") -> httpx.Response:
        return await self.post("/users", json={"username": name, "password": PASSWORD})

    async def login(self, name: str = "ada", secret: str = PASSWORD) -> httpx.Response:
        form = {"username": name, "password": secret}
        return await self.post("/auth/token", data=form)

    async def add_item(self, title: str = "", **fields: Any) -> int:
        item = {"title": title or secrets.token_hex(), **fields}
        response = await self.post("/items", json=item)
        return int(response.raise_for_status().json()["id"])


@cache
def built_app(**changes: Any) -> FastAPI:  # a test that changes an app makes its own
    return main.create_app(make_settings(**changes))


@cache
def empty_tables() -> bytes:  # a SQLite file: to copy it is faster than to make them
    engine = sa.create_engine("sqlite:///empty.db", poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")  # slow at each start
        main.Base.metadata.create_all(connection)
    return Path("empty.db").read_bytes()


@asynccontextmanager
async def started(app: FastAPI) -> AsyncIterator[FastAPI]:  # on a fresh SQLite file
    Path("app.db").write_bytes(empty_tables())
    async with app.router.lifespan_context(app):
        yield app


@asynccontextmanager
async def serve(**changes: Any) -> AsyncIterator[Client]:
    async with started(built_app(**changes)) as app, Client(app) as client:
        yield client


ONE_CONNECTION: dict[str, Any] = {"DATABASE_POOL_SIZE": 1, "DATABASE_MAX_OVERFLOW": 0}
KNOWN_HASH = main.PASSWORD_HASHER.hash(PASSWORD)  # made once: it takes 30 ms


async def add_user(
    database: main.Database, username: str = "ada", password_hash: str = KNOWN_HASH
) -> main.User:
    user = main.User(username=username, password_hash=password_hash, token_version=0)
    async with database.session(writes=True) as db:
        db.add(user)
        await db.commit()
    return user


@asynccontextmanager
async def logged_in(app: FastAPI, username: str = "ada") -> AsyncIterator[Client]:
    user = await add_user(app.state.database, username)
    async with Client(app) as client:
        client.use_token(main.create_access_token(user, app.state.settings))
        yield client


@asynccontextmanager
async def serve_ada(**changes: Any) -> AsyncIterator[Client]:
    async with serve(**changes) as guest, logged_in(guest.app) as client:
        yield client


@pytest.fixture
async def app() -> AsyncIterator[FastAPI]:
    async with started(built_app()) as app:
        yield app


@pytest.fixture
async def guest(app: FastAPI) -> AsyncIterator[Client]:
    async with Client(app) as client:
        yield client


@pytest.fixture
async def ada(app: FastAPI) -> AsyncIterator[Client]:
    async with logged_in(app) as client:
        yield client


@pytest.fixture
async def bob(ada: Client, app: FastAPI) -> AsyncIterator[Client]:
    async with logged_in(app, "bob") as client:
        yield client


@pytest.fixture(scope="session")
def postgresql_database() -> Iterator[str]:
    if not (server := os.getenv("TEST_DATABASE_URL")):
        pytest.skip("TEST_DATABASE_URL is not set")
    name = f"test_{secrets.token_hex(8)}"
    url = sa.make_url(server).set(drivername="postgresql")
    address = url.render_as_string(hide_password=False)
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield url.set(database=name).render_as_string(hide_password=False)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def postgresql_url(postgresql_database: str) -> str:  # emptied: faster than a new one
    with psycopg.connect(postgresql_database, autocommit=True) as connection:
        end = "SELECT pg_terminate_backend(pid, 9000) FROM pg_stat_activity"
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        connection.execute(f"{end} WHERE {others}")
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return postgresql_database


@pytest.fixture
def redis_url() -> str:
    if not (url := os.getenv("TEST_REDIS_URL")):
        pytest.skip("TEST_REDIS_URL is not set")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return "sqlite:///./app.db"
    return str(request.getfixturevalue("postgresql_url"))


@asynccontextmanager
async def connected(**changes: Any) -> AsyncIterator[main.Database]:
    database = main.Database(make_settings(**changes))
    try:
        await database.start_check()
        yield database
    finally:
        await database.close()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[main.Database]:
    async with connected(DATABASE_URL=database_url) as database:
        yield database


async def add_item(db: AsyncSession, owner_id: int, title: str) -> main.Item:
    item_in = main.ItemIn(title=title, description="green")
    return await main.create_item(db, main.User(id=owner_id), item_in)


@pytest.fixture
async def db(database: main.Database) -> AsyncIterator[AsyncSession]:  # Ada 1, Bob 2
    for username in ("ada", "bob"):
        await add_user(database, username)
    async with database.session(writes=True) as session:
        for owner_id, title in ((1, "Ada's"), (2, "Bob's")):
            await add_item(session, owner_id, title)
        yield session


SLUGS_TEXT = """400 bad_request 401 unauthorized 403 forbidden 404 not_found 504 timeout
405 method_not_allowed 409 conflict 413 payload_too_large 415 unsupported_media_type
422 validation_error 429 rate_limited 500 internal_error 503 service_unavailable"""
SLUGS = {int(code): slug for code, slug in re.findall(r"(\d+) (\w+)", SLUGS_TEXT)}


def error_of(response: httpx.Response) -> dict[str, Any]:  # after a look at its form
    status = response.status_code
    body: dict[str, Any] = response.json()
    assert list(body) == ["error", "message", "details", "request_id"]
    assert response.headers["Content-Type"] == "application/json"
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert body["error"] == SLUGS.get(status, f"http_{status}")
    assert re.match("[A-Z][a-z ]", body["message"])
    return body


class Log:  # of the service, on stdout: a call shows what came since the last one
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def start(self, **changes: Any) -> None:
        main.setup_logging(make_settings(**changes))
        self.text()

    def text(self) -> str:
        return self.capsys.readouterr().out

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Iterator[Log]:  # begin by log.start()
    handlers = logging.getLogger().handlers[:]
    yield Log(capsys)
    logging.captureWarnings(False)
    logging.raiseExceptions = True
    logging.getLogger("sqlalchemy").setLevel("NOTSET")
    logging.basicConfig(handlers=handlers, level="WARNING", force=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def eventually(condition: Callable[[], Any], description: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"in vain: {description}"
        await asyncio.sleep(0.001)


def skip_time(seconds: float) -> None:  # so that no test waits for a timer
    loop = asyncio.get_running_loop()
    real_time = loop.time
    loop.time = lambda: real_time() + seconds  # type: ignore[method-assign]


async def let_others_run(after: float = 0) -> None:  # after so many seconds
    skip_time(after)
    for _ in range(100):
        await asyncio.sleep(0)


async def end_of_outage(backend: Any) -> None:
    await let_others_run()
    skip_time(1)  # until the next check
    await eventually(lambda: not backend.in_outage, "it is ready again")


# --- Map ------------------------------------------------------------------------------


def test_docstring_names_the_sections_in_their_order() -> None:
    rows = re.findall(r"\n    (\w.*?)  +\w", str(main.__doc__))
    names = [name for name in rows if not name.endswith(":")]
    text = Path(main.__file__).read_text()
    assert names == re.findall("^# --- (.*?) -+$", text, re.MULTILINE)


# --- Settings -------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: Patch) -> Any:  # to set it and read settings
    def read_settings(**variables: str) -> main.Settings:
        for pair in {"SECRET_KEY": KEY, "PGCONNECT_TIMEOUT": "x", **variables}.items():
            monkeypatch.setenv(*pair)
        return main.get_settings()

    return read_settings


SETTINGS: dict[str, dict[str, Any]] = {
    "PROJECT_NAME": {"\tTea\r\n": "Tea"},
    "ENVIRONMENT": {"": "production"},
    "DEBUG": {"": False, "true": True},
    "API_V1_PREFIX": {"": "/api/v1", "/my-items/v1": "/my-items/v1"},
    "ROOT_PATH": {"": "", "/some/.where": "/some/.where"},
    "SECRET_KEY": {key: pydantic.SecretStr(key) for key in ("k" * 32, "\udce9" * 32)},
    "ACCESS_TOKEN_EXPIRE_MINUTES": {"": 30, "1": 1},
    "ALGORITHM": {"": "HS256", "HS384": "HS384", "HS512": "HS512"},
    "DATABASE_URL": {
        "": sa.make_url("sqlite+aiosqlite:///./app.db"),
        "sqlite:////\udce9/a.db\n": sa.make_url("sqlite+aiosqlite:////\udce9/a.db"),
        "postgres://u:p@h:65535": sa.make_url("postgresql+psycopg://u:p@h:65535"),
        "postgresql://u:%40@h/d": sa.make_url("postgresql+psycopg://u:%40@h/d"),
    },
    "DATABASE_POOL_SIZE": {"": 5, "1": 1},
    "DATABASE_MAX_OVERFLOW": {"": 10, "0": 0},
    "DATABASE_TIMEOUT_SECONDS": {"": 5, "0.5": 0.5},
    "CORS_ORIGINS": {
        **{value: [] for value in ("", " ")},
        '["*"]': ["*"],
        '["HTTPS://A.Example:443", "http://b/"]': ["https://a.example", "http://b"],
        '["http://[::1]:3000", "APP://Host"]\n': ["http://[::1]:3000", "app://host"],
    },
    "RATE_LIMIT_REQUESTS": {"": 100, "1": 1, "10000": 10_000},
    "RATE_LIMIT_WINDOW_SECONDS": {"": 60, " 1 ": 1},
    "RATE_LIMIT_LOGIN_REQUESTS": {"": 10},
    "REDIS_URL": {" ": None, "rediss://h?db=1": "rediss://h?db=1"},
    "MAX_BODY_BYTES": {"": 64 * 1024, "1": 1},
    "REQUEST_TIMEOUT_SECONDS": {"": 30, "0.5": 0.5},
    "LOG_LEVEL": {"": "INFO", "DEBUG": "DEBUG", "WARN": "WARN", "FATAL": "FATAL"},
}


@rows(SETTINGS)
def test_settings_are_parsed(name: str, value: str, environment: Any) -> None:
    settings = environment(**{"ENVIRONMENT": "development", name: value})
    assert getattr(settings, name) == SETTINGS[name][value]


REFUSED_SETTINGS = {  # some in production only; "hunter2" stands for what may be secret
    "PROJECT_NAME": ["hunter2\udce9", "hunter2" * 143],
    "ENVIRONMENT": ["hunter2", "Production"],
    "DEBUG": ["hunter2", "true"],
    "API_V1_PREFIX": ["hunter2", "/hunter2/", "/", "/.."],
    "ROOT_PATH": ["hunter2", "/hunter2/", "/", "/a/."],
    "SECRET_KEY": ["", "hunter2" + "k" * 24, "hunter2" + "k" * 24 + "\n"],
    "ACCESS_TOKEN_EXPIRE_MINUTES": ["0", "hunter2"],
    "ALGORITHM": ["none", "RS256"],
    "DATABASE_URL": [
        *("hunter2", "mysql://u:hunter2@h", "postgres://u:hunter2@h:x", "sqlite://"),
        *("postgres://u:hunter2@h:65536", "postgres://u:hunter2@h?sslmode=required"),
        *("postgres://u:p@hunter2@h", "postgres://u:hunter2@h:-1", "sqlite:///x?a=1"),
        *("sqlite:///:memory:", "postgres://h?a=1", "postgres://h?connect_timeout=x"),
        *("postgres://u:p@hunter2/x@h/d", "sqlite://./app.db", "sqlite://:hunter2@/x"),
        *("postgres://u:hunter2@h:0", "sqlite:////", "postgres://h?password=hunter2"),
    ],
    "DATABASE_MAX_OVERFLOW": ["-1"],
    **{name: ["0"] for name in ("DATABASE_POOL_SIZE", "MAX_BODY_BYTES")},
    "DATABASE_TIMEOUT_SECONDS": ["0", "inf", "nan", "86401"],
    **{f"RATE_LIMIT_{name}REQUESTS": ["0", "10001"] for name in ("", "LOGIN_")},
    "RATE_LIMIT_WINDOW_SECONDS": ["0", "9" * 99],
    "REQUEST_TIMEOUT_SECONDS": ["0", "inf"],
    "CORS_ORIGINS": [
        *("https://hunter2.example", '["hunter2.example"]', "\udce9", "[" * 999),
        *('["https://hunter2.example/a"]', '["https://hunter2.example?"]'),
        *('["https://hunter2@a.example"]', '["https://*.hunter2.example"]'),
        '["https://hunter2.example", "*"]',
    ],
    "REDIS_URL": [
        *("https://:hunter2@h", "redis://:hunter2@h:99999", "redis://h/hunter2"),
        *("redis://:hunter2@h?timeout=1", "redis://:hunter2@h?socket_timeout=one"),
        *("redis://u:1#hunter2@h", "redis://u:1/hunter2@h", "redis://h?encoding=x"),
        *("unix://:h/hunter2@/s", "unix://hunter2/s", "redis://hunter2 /0", "redis:1"),
        "redis://:hunter2@h:0",
    ],
    "LOG_LEVEL": ["info", "HUNTER2"],
}


@rows(REFUSED_SETTINGS)
def test_settings_are_refused(name: str, value: str, environment: Any) -> None:
    line = rf"\Abad settings: .*\b{name}\b.{{10,}}\Z"
    with pytest.raises(SystemExit, match=line) as ending:
        environment(**{name: value})
    assert "hunter2" not in str(ending.value).lower()


def test_settings_refused_are_all_named_with_a_reason(environment: Any) -> None:
    reasons = "SECRET_KEY: .+ 32 char.+; DATABASE_URL: not a Post.+; LOG_LEVEL: Input"
    with pytest.raises(SystemExit, match=rf"\Abad settings: {reasons}"):
        environment(SECRET_KEY="hunter2", DATABASE_URL="hunter2", LOG_LEVEL="loud")
    with pytest.raises(pydantic.ValidationError, match=r"(?s)\A(?!.*hunter2)"):
        make_settings(DATABASE_URL="hunter2")


FILES = {"é": (b"A=\xe9", "cod.*: in [.]env"), "'": (b"A\nB='1", "line 2: in [.]env")}
FILES |= {"x": (b"CORS_ORIGINS=x", "S: should be.*"), "dir": (b"", "Is.*: in [.]env")}


@cases("line, why", FILES)
def test_settings_file_is_refused(line: bytes, why: str, environment: Any) -> None:
    Path(".env").write_bytes(line) if line else Path(".env").mkdir()
    with pytest.raises(SystemExit, match=rf"\Abad settings: .*{why}\Z"):
        environment()


def test_secret_key_of_development_is_random(environment: Any) -> None:
    settings = environment(ENVIRONMENT="development", SECRET_KEY="")
    assert re.fullmatch("[0-9a-f]{64}", settings.SECRET_KEY.get_secret_value())


def test_settings_source_is_environment_file_secrets(environment: Any) -> None:
    for name in ("VERSION", "PROJECT_NAME", "PROJECT_DESCRIPTION"):
        Path(name).write_text("secret\n")
    Path(".env").write_text("VERSION=file\nPROJECT_NAME=file\nOTHER_PROGRAM=1\n")
    environment(VERSION="environment", PROJECT_NAME="")
    settings = main.Settings(_secrets_dir=".")  # type: ignore[call-arg]
    names = (settings.VERSION, settings.PROJECT_NAME, settings.PROJECT_DESCRIPTION)
    assert names == ("environment", "file", "secret")


def test_secret_in_a_folder_is_refused(environment: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(main, "SECRETS_FOLDER", ".")
    Path("VERSION").mkdir()
    warnings.simplefilter("ignore")  # as outside of `pytest -W error`
    with pytest.raises(SystemExit, match=r"\Abad settings: .*VERSION.* directory"):
        environment()


# --- Logging --------------------------------------------------------------------------


def make_record(message: str = "hello", **extra: Any) -> logging.LogRecord:
    fields = {"name": "main", "levelname": "INFO", "msg": message, "created": 0.25}
    return logging.makeLogRecord({**fields, **extra})


def failed_record(message: str = "first line\nsecond line") -> logging.LogRecord:
    try:
        raise ValueError(message)
    except ValueError:
        return make_record(exc_info=sys.exc_info())


def test_json_line_has_its_fields_in_order_and_those_of_the_record() -> None:
    token = main.request_id_context.set("an-id")
    record = make_record("%s of 2", args=("one",), size=3, level=4, color_message="x")
    line = main.JsonFormatter().format(record)
    main.request_id_context.reset(token)
    assert line == (
        '{"timestamp":"1970-01-01T00:00:00.250000Z","level":"INFO",'
        '"logger":"main","message":"one of 2","request_id":"an-id","size":3,"level_":4}'
    )


@pytest.mark.parametrize("text", ["x", "\xe9", "\0"], ids=ascii)
def test_log_line_keeps_the_end_of_a_long_traceback(text: str) -> None:
    line = main.JsonFormatter().format(failed_record("first line\n" + text * 5000))
    assert 2500 < len(line) < 4096 - 1150  # leaves room for other fields
    assert json.loads(line)["exception"].endswith(text * 400)


async def test_log_line_of_a_long_traceback_names_the_caller(db: AsyncSession) -> None:
    with pytest.raises(sa.exc.DBAPIError) as error:
        await db.execute(sa.text("SELECT nothing"))
    record = make_record(exc_info=(error.type, error.value, error.tb))
    text = json.loads(main.JsonFormatter().format(record))["exception"]
    assert "in test_log_line_of_a_long_traceback_names_the_caller" in text
    assert main.LIBRARY_FRAME.match('  File "/dist-packages/y.py", line 1, in z\n')


async def test_log_line_of_an_exception_group_has_its_errors(db: AsyncSession) -> None:
    with pytest.raises(sa.exc.DBAPIError) as error:
        await db.execute(sa.text("SELECT nothing"))
    group = ExceptionGroup("several", [error.value])
    record = make_record(exc_info=(type(group), group, None))
    assert "SELECT nothing" in main.JsonFormatter().format(record)


@pytest.mark.parametrize("formatter", [main.JsonFormatter, main.TextFormatter])
def test_log_line_with_wrong_arguments_is_kept(formatter: Any) -> None:
    record = make_record("%d", args=("ada",), exception=ValueError("eve"))
    assert re.search("%d .*ada.*eve", formatter().format(record).replace("\n", ""))


def test_log_line_of_an_error_has_its_traceback_indented_in_text() -> None:
    trace = json.loads(main.JsonFormatter().format(failed_record()))["exception"]
    assert re.fullmatch(r"Traceback(.|\n)*ValueError: first line\nsecond line", trace)
    head, *lines = main.TextFormatter().format(failed_record()).split("\n")
    assert head == "1970-01-01T00:00:00.250000Z INFO hello logger=main request_id=None"
    assert all(line.startswith("    | ") for line in lines)
    assert lines[-1] == "    | second line"
    assert main.TextFormatter().format(make_record("a\nb")).endswith("\n    | b")


HOSTILE_VALUES = {
    "newlines": "a\n{}\r{}\u2028\x85\x1b{}",
    "lone-surrogate": "\ud800",
    "nan": float("nan"),
    "nan-and-lone-surrogate": [float("nan"), "\ud800"],
    "bytes-that-are-not-utf-8": b"\xff",
    "object-and-lone-surrogate": [object(), "\ud800"],
    "great-number": 10**400,
    "nothing": "",
    "object-without-a-text": object.__new__(pydantic.SecretStr),
}


@cases("value", HOSTILE_VALUES)
@pytest.mark.parametrize("field", ["msg", "path"])
@pytest.mark.parametrize("formatter", [main.JsonFormatter, main.TextFormatter])
def test_log_line_cannot_be_forged(formatter: Any, field: str, value: Any) -> None:
    line = formatter().format(make_record(**{field: value}))
    assert line.isascii() and line.replace("\n    | ", "").isprintable()
    if formatter is main.JsonFormatter:
        assert json.loads(line, parse_constant=pytest.fail)["timestamp"].endswith("Z")


LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
CHATTY = "aiosqlite asyncio sqlalchemy.engine uvicorn.asgi"
SERVERS = {"uvicorn": 4, "uvicorn.error": 4, "uvicorn.access": 0, "gunicorn.error": 4}


def logged_levels(name: str, log: Log) -> list[str]:
    for level in LEVELS:
        logging.getLogger(name).log(logging.getLevelName(level), "hello")
    return [line["level"] for line in log.lines()]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["main", "shop", *CHATTY.split()])
def test_log_level_is_the_lowest_written(name: str, level: str, log: Log) -> None:
    log.start(LOG_LEVEL=level)
    lowest = "WARNING" if name in CHATTY and level in {"DEBUG", "INFO"} else level
    assert logged_levels(name, log) == LEVELS[LEVELS.index(lowest) :]


def test_debug_goes_before_log_level(log: Log) -> None:
    log.start(LOG_LEVEL="ERROR", DEBUG=True)
    assert logged_levels("main", log) == LEVELS
    assert logged_levels("sqlalchemy.engine", log) == LEVELS[1:]


@pytest.mark.parametrize("name", SERVERS)
def test_logging_of_a_server_is_in_the_same_form(name: str, log: Log) -> None:
    server_logger = logging.getLogger(name)
    server_logger.addHandler(logging.StreamHandler(sys.stdout))
    server_logger.setLevel("ERROR")
    server_logger.propagate = False
    log.start()
    assert len(logged_levels(name, log)) == SERVERS[name]


def test_logging_of_a_warning_is_a_line(log: Log) -> None:
    with warnings.catch_warnings(action="always"):
        log.start()
        warnings.warn("hello", stacklevel=1)
    assert [line["logger"] for line in log.lines()] == ["py.warnings"]


def test_logging_to_a_closed_stdout_is_silent(log: Log, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch, io.StringIO() as stdout:
        patch.setattr(sys, "stdout", stdout)
        log.start()
    main.logger.info("hello")
    assert log.capsys.readouterr().err == ""


async def test_logging_with_debug_shows_no_secret(log: Log, database_url: str) -> None:
    log.start(DEBUG=True)
    app = built_app(DATABASE_URL=database_url, DEBUG=True)
    change = {"current_password": "hunter2", "new_password": PASSWORD[::-1]}
    async with started(app), Client(app) as client:
        await client.register()
        client.use_token((await client.login()).json()["access_token"])
        await client.get("/items?after=0&hunter2=1")
        assert (await client.patch("/users/me", json=change)).status_code == 403
    urls = {"DATABASE_URL": "postgres://u:hunter2@h", "REDIS_URL": "redis://:hunter2@h"}
    settings = make_settings(**urls)
    main.logger.info("%s", settings, extra={"a": settings, "b": settings.DATABASE_URL})
    text = log.text()
    assert "INSERT INTO users" in text
    assert "FairPool" not in text  # the pool chatters
    secret = (PASSWORD, PASSWORD[::-1], "hunter2", "Bearer", "eyJ", "argon2id")
    assert [word for word in secret if word in text] == []


def test_description_of_an_error_is_one_line() -> None:
    assert main.summarize_error(sa.exc.DBAPIError("", {}, OSError("away"))) == "away"
    assert main.summarize_error(TimeoutError()) == "TimeoutError"
    assert main.summarize_error(ValueError("no\n" + "x" * 500)) == "no " + "x" * 497


# --- Errors ---------------------------------------------------------------------------

RESPONSE_FAULT = {"input": "hunter2", "ctx": "hunter2", "msg": "hunter2"}
USUAL_500 = "Something went wrong. Quote the request_id if you report it."
FAILURES: dict[str, tuple[BaseException, int, str]] = {
    "base": (main.AppException(), 500, USUAL_500),
    "credentials": (main.WrongCredentialsException(), 401, "Wrong username or passwo"),
    "password": (main.WrongPasswordException(), 403, "The current password is wrong."),
    "not-found": (main.NotFoundException(), 404, "There is nothing here."),
    "taken": (main.UsernameTakenException(), 409, "This username is taken."),
    "rate-limited": (main.RateLimitedException(7), 429, "Too many requests; try"),
    "away": (main.ServiceUnavailableException("hunter2"), 503, "The service is not av"),
    "own": (type("A", (main.AppException,), {"status_code": 402})(), 402, USUAL_500),
    "own-error": (HTTPException(403, headers={"X-Own": "yes"}), 403, "Forbidden"),
    "own-cache": (HTTPException(403, headers={"Cache-Control": "x"}), 403, "Forbidden"),
    "own-text": (HTTPException(403, "Not on Sundays."), 403, "Not on Sundays."),
    "own-outage": (HTTPException(503, "It burns. " * 99), 503, "It burns."),
    "own-retry": (HTTPException(503, headers={"retry-after": "9"}), 503, "Service Un"),
    "own-allow": (HTTPException(405, headers={"allow": "TRACE"}), 405, "Method Not"),
    "own-status": (HTTPException(418, "It is tea."), 418, "It is tea."),
    "own-media-type": (HTTPException(415), 415, "Unsupported Media Type"),
    "own-fault": (HTTPException(500, "hunter2"), 500, USUAL_500),
    "cancelled": (asyncio.CancelledError("hunter2"), 500, USUAL_500),
    "crash": (RuntimeError("hunter2"), 500, USUAL_500),
    "disconnect": (ClientDisconnect(), 400, "Bad Request"),
    "timeout": (TimeoutError("hunter2"), 500, USUAL_500),
    "response": (ResponseValidationError([RESPONSE_FAULT]), 500, USUAL_500),
}
ORIGIN = "https://app.example"


async def fail(name: str) -> None:
    raise FAILURES[name][0]


async def hang(request: Request) -> None:
    request.app.state.hangs = True
    try:
        await asyncio.Event().wait()
    finally:
        request.app.state.hangs = False


async def read(request: Request) -> int:
    return len(await request.body())


async def parse(numbers: list[int]) -> None: ...


async def break_off(seconds: int = 0) -> StreamingResponse:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"begun"
        await asyncio.sleep(seconds)
        raise RuntimeError("hunter2")

    return StreamingResponse(chunks())


@cache
def odd_app(timeout: float = 30) -> FastAPI:  # its routes misbehave; one request each
    limits = {"MAX_BODY_BYTES": 2000, "REQUEST_TIMEOUT_SECONDS": timeout}
    settings = make_settings(CORS_ORIGINS=[ORIGIN], RATE_LIMIT_REQUESTS=1, **limits)
    app = main.create_app(settings)
    router = APIRouter(prefix="/api/v1", include_in_schema=False)
    router.add_api_route("/fail/{name}", fail, methods=["GET", "PUT", "OPTIONS"])
    for route in (hang, read, parse, break_off):
        router.add_api_route(f"/{route.__name__}", route, methods=["GET", "POST"])
    app.include_router(router)
    app.mount("/mounted", FastAPI())
    return app


@pytest.fixture
async def odd() -> AsyncIterator[Client]:
    async with started(odd_app()) as app, logged_in(app) as client:
        yield client


@pytest.mark.parametrize("name", FAILURES)
async def test_error_of_a_route_has_its_status(name: str, odd: Client) -> None:
    _, status, message = FAILURES[name]
    response = await odd.get(f"/fail/{name}")
    assert response.status_code == status
    assert error_of(response)["message"].startswith(message)
    assert "hunter2" not in response.text


async def test_log_of_an_invalid_response_has_no_values(odd: Client, log: Log) -> None:
    log.start()
    assert (await odd.get("/fail/response")).status_code == 500
    assert "1 validation error:\\n  {}" in log.text()


@pytest.mark.parametrize("status", [204, 304])
async def test_http_exception_204_or_304_has_no_body(status: int) -> None:
    error = HTTPException(status)
    response = await main.http_exception_handler(Request({"type": "http"}), error)
    assert (response.status_code, response.body) == (status, b"")


JSON = {"Content-Type": "application/json"}
MALFORMED_FORM = {"Content-Type": "multipart/form-data"}
REFUSED_REQUESTS: dict[str, tuple[int, str, Any]] = {
    "form": (400, "POST /auth/token", {"content": b"--x", "headers": MALFORMED_FORM}),
    "not-utf-8": (400, "POST /users", {"content": b'"\xff"', "headers": JSON}),
    "outside-of-the-prefix": (404, "GET http://test/nowhere", {}),
    "short-password": (422, "POST /users", {"json": {"password": "hunter2"}}),
    "form-password": (422, "POST /auth/token", {"data": {"password": "hunter2" * 200}}),
    "unknown-field": (422, "POST /users", {"json": {"unknown": "hunter2"}}),
    "no-json": (422, "POST /users", {"content": b"hunter2", "headers": JSON}),
    "query": (422, "GET /items?limit=hunter2", {}),
    "path": (422, "GET /items/hunter2", {}),
}


@cases("status, line, sent", REFUSED_REQUESTS)
async def test_error_has_no_input(status: int, line: str, sent: Any, odd: Any) -> None:
    response = await odd.request(*line.split(), **sent)
    assert response.status_code == status
    assert (error_of(response)["details"] is None) == (status != 422)
    assert "hunter2" not in response.text


ERROR_HEADERS = {
    "no-token": ("GET /items", "", "www-authenticate: Bearer"),
    "empty-token": ("GET /items", "Bearer", "www-authenticate: Bearer"),
    "other-scheme": ("GET /items", "Basic YTpi", "www-authenticate: Bearer"),
    "login": ("GET /fail/credentials", "", "www-authenticate: Bearer"),
    "rate-limited": ("GET /fail/rate-limited", "", "retry-after: 7"),
    "away": ("GET /fail/away", "", "retry-after: 1"),
    "own-outage": ("GET /fail/own-outage", "", "retry-after: 1"),
    "own-retry": ("GET /fail/own-retry", "", "retry-after: 9"),
    "own-methods": ("GET /fail/own-allow", "", "allow: GET, OPTIONS, PUT"),
    "own": ("GET /fail/own-error", "", "x-own: yes"),
    "own-security-header": ("GET /fail/own-cache", "", "cache-control: x"),
    "methods": ("POST /fail/x", "", "allow: GET, OPTIONS, PUT"),
}


@cases("line, token, header", ERROR_HEADERS)
async def test_error_has_header(line: str, token: str, header: str, odd: Any) -> None:
    odd.headers["Authorization"] = token
    response = await odd.request(*line.split())
    assert header in [f"{name}: {value}" for name, value in response.headers.items()]


async def test_validation_detail_names_field_and_rule(odd: Client) -> None:
    body = {"username": "ada", "password": "x", "\u00e9\n": 1}
    details = error_of(await odd.post("/users", json=body))["details"]
    message = "String should have at least 15 characters"
    detail = {"field": "body.password", "message": message, "type": "string_too_short"}
    assert (details[0], details[1]["field"]) == (detail, "body.\u00e9\n")


# --- Models ---------------------------------------------------------------------------


def test_columns_have_room() -> None:
    columns: Any = (main.User.username, main.Item.title, main.Item.description)
    assert [column.type.length for column in columns] == [32, 200, 2000]


async def test_id_has_64_bits(database: main.Database) -> None:
    async with database.session(writes=True) as db:
        await main.add_row(db, main.User(id=2**63 - 1, username="z", password_hash=""))
        assert await main.find_user(db, 2**63 - 1)


async def test_id_of_a_deleted_user_is_not_given_again(database: main.Database) -> None:
    deleted = await add_user(database)
    async with database.session(writes=True) as db:
        await main.discard_user(db, deleted)
    assert (await add_user(database)).id > deleted.id


async def test_token_version_starts_at_random(db: AsyncSession) -> None:
    db.add_all(main.User(username=name, password_hash="") for name in ("eve", "fay"))
    users = await main.list_users(db, 2, 9)  # not Ada and Bob, of whom it is given
    assert len({user.token_version for user in users}) == len(users) == 2


# --- Database -------------------------------------------------------------------------


class DatabaseOfTest(main.MonitoredBackend):  # away, unless the test says otherwise
    name = "the database"
    is_away = True
    checks = 0

    async def prepare(self) -> None: ...

    async def ping(self) -> None:
        self.checks += 1
        if self.is_away:
            raise OSError("no route to it")


async def test_outage_is_checked_every_second_until_it_ends() -> None:
    database = DatabaseOfTest()
    assert database.start_check() is database.start_check()
    counts = []
    for seconds, database.is_away in ((0, True), (0.5, True), (0.5, False), (1, True)):
        await let_others_run(after=seconds)
        counts.append(database.checks)
    assert counts == [1, 1, 2, 2]


async def test_outage_logs_start_and_end_once(caplog: CapLog) -> None:
    caplog.set_level("INFO")
    database = DatabaseOfTest()
    for database.is_away in (False, True, True, False, False, True):
        database.start_check()
        await let_others_run()
        await let_others_run(after=1)
    down = ("WARNING", "the database is not ready")
    up = ("INFO", "the database is ready again")
    assert [(r.levelname, r.message) for r in caplog.records] == [down, up, down]
    assert vars(caplog.records[0])["reason"] == "no route to it"
    await database.stop_checks()


@asynccontextmanager
async def held_connection(database: main.Database) -> AsyncIterator[AsyncSession]:
    async with database.session(writes=False) as db:
        await main.find_user(db, 1)
        yield db


async def test_pool_is_first_come_first_served() -> None:
    served: list[int] = []
    async with connected(**ONE_CONNECTION) as database, asyncio.TaskGroup() as tasks:

        async def ask(number: int) -> None:
            async with held_connection(database):
                served.append(number)

        async with held_connection(database):
            for number in range(5):
                tasks.create_task(ask(number))
            await let_others_run()
        await ask(5)
    assert served == [0, 1, 2, 3, 4, 5]


async def test_pool_drops_a_lost_connection(database: Any) -> None:
    async with held_connection(database) as lost, held_connection(database):
        await (await lost.connection()).invalidate()
    assert database.read_engine.pool.checkedin() == 1


async def status_after(seconds: float, request: Any, waits: Any = lambda: True) -> int:
    task = asyncio.ensure_future(request)  # it waits for the database for so long
    await let_others_run()
    await eventually(waits, "the request waits")
    assert not task.done()
    skip_time(seconds)
    return int((await task).status_code)


def reasons(caplog: CapLog) -> list[str]:
    return [vars(r)["reason"] for r in caplog.records if r.message == "request"]


@pytest.fixture
def statements() -> Iterator[list[Any]]:  # sent to any database, with parameters
    sent: list[Any] = []

    def note(_: Any, cursor: Any, statement: str, parameters: Any, *more: Any) -> None:
        sent.append((statement, parameters))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    yield sent
    sa.event.remove(sa.Engine, "before_cursor_execute", note)


async def test_full_pool_is_503_with_reason(caplog: CapLog) -> None:
    async with serve_ada(DATABASE_POOL_SIZE=1, DATABASE_MAX_OVERFLOW=1) as ada:
        database = ada.app.state.database
        async with held_connection(database):
            assert (await ada.get("/users/me")).status_code == 200
            async with held_connection(database):
                assert await status_after(5, ada.get("/users/me")) == 503
            assert (await ada.get("/users/me")).status_code == 200
    assert reasons(caplog) == ["database: no connection was free in time"]


MOMENTS = {"checkout": "", "begin": "", "before_cursor_execute": "INSERT", "commit": ""}


@mock.patch("psycopg.waiting.MAX_BUSY_TIME", 0)  # so that each wait can be cancelled
@pytest.mark.parametrize("name", ["eve", "ada"])  # ada is taken
@pytest.mark.parametrize("at", MOMENTS)
async def test_cancelled_write_is_undone(at: str, name: str, database_url: str) -> None:
    async with serve_ada(DATABASE_URL=database_url, **ONE_CONNECTION) as ada:
        task = asyncio.create_task(ada.register(name))
        event = (sa.Engine, at, lambda *x: MOMENTS[at] in str(x) and task.cancel())
        sa.event.listen(*event)
        await task
        sa.event.remove(*event)
        ends = {201, 409} if at == "commit" else {201}  # a COMMIT may have been sent
        assert (await ada.register("eve")).status_code in ends


async def test_cancelled_connect_leaves_no_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/d"
        task = main.Database(make_settings(DATABASE_URL=url)).start_check()
        client, _ = await asyncio.to_thread(silent.accept)
        await let_others_run()
    task.cancel()
    await asyncio.wait({task})
    with client:
        client.settimeout(PATIENCE_SECONDS)
        assert b"".join(iter(lambda: client.recv(99), b"")) != b""


class Forwarder:  # a TCP proxy in front of PostgreSQL, which fails as networks do
    def __init__(self, url: str) -> None:
        self.target = sa.make_url(url)
        self.port = free_port()
        self.url = self.target.set(host="127.0.0.1", port=self.port)
        self.streams: list[Any] = []
        self.last: bytes | None = None  # the answer after which the server is silent

    async def accept(self) -> None:
        self.server = await asyncio.start_server(self.carry, "127.0.0.1", self.port)

    def refuse(self) -> None:  # close every connection, and take no new one
        self.server.close()
        for stream in self.streams:
            stream.transport.abort()

    def forget(self) -> None:  # carry nothing more on these, without a word
        for stream in self.streams:
            stream.transport.pause_reading()

    async def carry(self, reader: Any, writer: Any) -> None:
        address = (self.target.host, self.target.port or 5432)
        answers, requests = await asyncio.open_connection(*address)
        self.streams += [requests, writer]
        await asyncio.gather(copy(reader, requests), copy(answers, writer, self.last))


async def copy(source: Any, sink: Any, last: bytes | None = None) -> None:
    with suppress(OSError):
        while sent := await source.read(65536):
            sink.write(sent)
            if last and sent.endswith(last):
                return
    sink.close()


@pytest.fixture
async def forwarder(postgresql_url: str) -> AsyncIterator[Forwarder]:
    forwarder = Forwarder(postgresql_url)
    await forwarder.accept()
    yield forwarder
    forwarder.refuse()
    await let_others_run()


@pytest.fixture
async def pg_ada(forwarder: Forwarder) -> AsyncIterator[Client]:  # with one connection
    async with serve_ada(DATABASE_URL=forwarder.url, **ONE_CONNECTION) as client:
        yield client


async def test_silent_server_costs_only_waiting_requests(
    pg_ada: Client, forwarder: Forwarder, statements: list[Any]
) -> None:
    forwarder.forget()
    statements.clear()
    assert await status_after(5, pg_ada.get("/users/me"), lambda: statements) == 503
    assert (await pg_ada.get("/users/me")).status_code == 200


async def test_connection_is_used_again_unless_held_for_too_long(pg_ada: Any) -> None:
    pids = []
    for seconds in (0, 0, 5, 0):
        async with held_connection(pg_ada.app.state.database) as db:
            pids.append(await db.scalar(sa.select(sa.func.pg_backend_pid())))
            await let_others_run(after=seconds)
        await let_others_run(after=5)
    assert pids[0] == pids[1] == pids[2] != pids[3]


def waiting_for_locks(other: psycopg.Connection[Any]) -> list[Any]:
    here = "datname = current_database() AND wait_event_type = 'Lock'"
    return other.execute(f"SELECT 1 FROM pg_stat_activity WHERE {here}").fetchall()


async def test_locked_row_is_503_in_time(pg_ada: Client, postgresql_url: str) -> None:
    path = f"/items/{await pg_ada.add_item('old')}"
    with psycopg.connect(postgresql_url) as other:
        other.execute("SELECT * FROM items FOR UPDATE")
        request = pg_ada.patch(path, json={"title": "new"})
        assert await status_after(5, request, lambda: waiting_for_locks(other)) == 503
        assert (await pg_ada.get(path)).json()["title"] == "old"


async def test_restart_costs_no_request(pg_ada: Client, forwarder: Forwarder) -> None:
    forwarder.refuse()
    await forwarder.accept()
    for path in ("/users/me", "http://test/health/ready"):
        assert (await pg_ada.get(path)).status_code == 200


async def test_outage_at_start_ends(forwarder: Forwarder, caplog: CapLog) -> None:
    forwarder.refuse()
    asyncio.get_running_loop().call_later(0.1, skip_time, 1)  # in the lifespan
    async with serve(DATABASE_URL=forwarder.url) as client:
        assert error_of(await client.register())["error"] == "service_unavailable"
        await forwarder.accept()
        await end_of_outage(client.app.state.database)
        assert (await client.register()).status_code == 201
    assert reasons(caplog) == ["the database is not ready"]
    assert "connection failed" in vars(caplog.records[0])["reason"]


async def test_silence_after_the_login_ends(forwarder: Forwarder) -> None:
    forwarder.last = b"Z\0\0\0\x05I"  # ready for the first statement
    url = forwarder.url.update_query_dict({"sslmode": "disable"})
    changes = {"DATABASE_URL": url, "DATABASE_TIMEOUT_SECONDS": 0.1}
    async with asyncio.timeout(PATIENCE_SECONDS), connected(**changes) as database:
        assert database.in_outage


async def test_server_away_and_back(pg_ada: Any, forwarder: Forwarder) -> None:
    forwarder.refuse()
    for path in ("/users/me", "/users/me", "http://test/health/ready"):
        assert (await pg_ada.get(path)).status_code == 503
        await eventually(lambda: pg_ada.app.state.database.in_outage, "an outage")
    await forwarder.accept()
    await end_of_outage(pg_ada.app.state.database)
    assert (await pg_ada.get("/users/me")).status_code == 200


async def test_no_statement_while_all_is_well(database: Any, statements: Any) -> None:
    assert await database.is_ready()
    statements.clear()
    await let_others_run(after=60)
    assert not statements


async def test_readiness_has_one_check_for_all(database: Any, statements: Any) -> None:
    assert await database.is_ready()
    count = len(statements)
    assert all(await asyncio.gather(*[database.is_ready() for _ in range(10)]))
    assert len(statements) == 2 * count > 0


async def test_readiness_does_not_wait_for_requests(database_url: str) -> None:
    one = connected(DATABASE_URL=database_url, **ONE_CONNECTION)
    async with one as database, held_connection(database):
        assert await database.is_ready()


async def test_readiness_check_may_go_on(postgresql_url: str, caplog: CapLog) -> None:
    async with connected(DATABASE_URL=postgresql_url) as database:
        with psycopg.connect(postgresql_url) as other:
            other.execute("LOCK TABLE users")
            check = asyncio.create_task(database.is_ready())
            for seconds in (0, 2, 0.5, 0.5, 0.4, 0.2):  # a pause is one step of four
                assert not check.done()
                await let_others_run(after=seconds)
            assert check.done()
        assert (await check, await database.is_ready()) == (False, True)
    assert not caplog.records  # slow is not away


async def test_tables_are_made_once(database_url: str, statements: list[Any]) -> None:
    hosts = [main.Database(make_settings(DATABASE_URL=database_url)) for _ in range(4)]
    await asyncio.gather(*(host.start_check() for host in hosts))
    assert str(statements).count("CREATE TABLE") == len(main.Base.metadata.tables)
    await asyncio.gather(*(host.close() for host in hosts))


async def execute(database: main.Database, statement: str) -> None:
    async with database.session(writes=True) as db:
        await db.execute(sa.text(statement))
        await db.commit()


async def test_tables_may_take_long_to_make(postgresql_url: str) -> None:
    listen = sa.event.listens_for(main.Base.metadata, "before_create", once=True)
    listen(lambda *_, **__: await_(let_others_run(after=50)))
    async with connected(DATABASE_URL=postgresql_url) as database:
        assert database.is_prepared


async def test_tables_are_made_beside_others(database_url: str) -> None:
    table = main.Base.metadata.sorted_tables[-1]
    async with connected(DATABASE_URL=database_url) as database:
        await execute(database, f"DROP TABLE {table.name}")
    async with connected(DATABASE_URL=database_url) as database:
        await execute(database, f"{sa.select(table)}")


async def test_empty_database_gets_its_tables_again(database: main.Database) -> None:
    for table in reversed(main.Base.metadata.sorted_tables):
        await execute(database, f"DROP TABLE {table.name}")
    assert not await database.is_ready()
    await end_of_outage(database)


async def test_missing_table_is_not_made_again(database: main.Database) -> None:
    await execute(database, "DROP INDEX items_of_owner")  # or a new one would fail
    for table in ("users", "items"):
        await execute(database, f"ALTER TABLE {table} RENAME TO moved_{table}")
    assert not await database.is_ready()
    await database.start_check()
    for table in ("users", "items"):
        await execute(database, f"ALTER TABLE moved_{table} RENAME TO {table}")
    await database.start_check()
    assert not database.in_outage


async def test_old_table_is_500_and_unready(database_url: str, caplog: CapLog) -> None:
    async with serve_ada(DATABASE_URL=database_url) as ada:
        database = ada.app.state.database
        await execute(database, "ALTER TABLE items RENAME COLUMN title TO old")
        assert not any([await database.is_ready() for _ in range(2)])
        assert error_of(await ada.get("/items"))["error"] == "internal_error"
    outage, request = [r for r in caplog.records if r.name == main.logger.name]
    assert "title" in vars(outage)["reason"] and request.exc_info


SQLITE_BUGS = {
    "no such column": "absent",
    "collation": "1 ORDER BY '' COLLATE absent",
    "UTF-8": "'hunter2' || x'ff' AS c",
    "decode": "'' AS c UNION ALL SELECT 'hunter2' || x'ff'",  # not in the first row
}
BUGS = [("SELECT", 2000), ("SELECT", 70_000), ("SELECT currval('items_id_seq'),", 0)]


@pytest.mark.parametrize("sql, count", BUGS)
async def test_bug_is_no_outage(sql: str, count: int, pg_ada: Any) -> None:
    async with pg_ada.app.state.database.read_engine.connect() as connection:
        with pytest.raises(sa.exc.OperationalError) as error:
            await connection.exec_driver_sql(f"{sql} {'%s,' * count} 1", (1,) * count)
    assert not main.is_outage(error.value)


def test_outage_is_told_by_the_sqlstate() -> None:
    for state in ("08006", "28000", "40P01", "53100", "55P03", "57014", "58030"):
        error = sa.exc.OperationalError("SELECT", {}, psycopg.errors.lookup(state)())
        assert main.is_outage(error)


@pytest.mark.parametrize("reason, value", SQLITE_BUGS.items())
async def test_sqlite_bug_is_no_outage(reason: str, value: str) -> None:
    async with connected(**ONE_CONNECTION) as database, database.session(False) as db:
        with pytest.raises(sa.exc.OperationalError, match=reason) as error:
            await (await db.stream(sa.text(f"SELECT {value}"))).all()
    assert not main.is_outage(error.value)
    assert "hunter2" not in f"{error.value.orig} {error.value.args}"


async def test_alter_table_breaks_nothing(pg_ada: Client, postgresql_url: str) -> None:
    for _ in range(10):
        await pg_ada.get("/users/me")
    with psycopg.connect(postgresql_url) as other:
        other.execute("ALTER TABLE users ALTER COLUMN username TYPE text")
    assert (await pg_ada.get("/users/me")).status_code == 200


@pytest.mark.parametrize("noticed_by", ["writer", "readiness"])
async def test_demoted_primary_is_left(noticed_by: str, pg_ada: Client) -> None:
    database = pg_ada.app.state.database
    for engine in (database.read_engine, database.check_engine):
        async with engine.connect() as connection:
            await connection.exec_driver_sql("SET default_transaction_read_only = on")
    if noticed_by == "writer":
        assert (await pg_ada.delete("/auth/token")).status_code == 503
    else:
        database.start_check()
    await eventually(lambda: database.in_outage, "the outage")
    await end_of_outage(database)
    async with database.session(writes=False) as db:
        assert await db.scalar(sa.text("SHOW default_transaction_read_only")) == "off"


OPTIONS = {
    "client_encoding": "utf8",
    "connect_timeout": "3",
    "keepalives_idle": "60",
    "target_session_attrs": "read-write",
    "options": "-c statement_timeout=2250 -c idle_in_transaction_session_timeout=2500"
    " -c datestyle=ISO -c timezone=UTC",
}
OWN = {"application_name": "x", "options": f"{OPTIONS['options']} -c work_mem=8MB"}


@cases("own", {"ours": {}, "own": OWN})
async def test_connection_has_options(own: dict[str, str], postgresql_url: str) -> None:
    query = own and {**OWN, "options": "-c work_mem=8MB"}
    url = sa.make_url(postgresql_url).update_query_dict(query)
    changes = {"DATABASE_URL": url, "DATABASE_TIMEOUT_SECONDS": 2.5}
    async with connected(**changes) as database, held_connection(database) as db:
        raw: Any = await (await db.connection()).get_raw_connection()
        options = raw.driver_connection.info.get_parameters()
    assert {"application_name": "Items", **OPTIONS, **own}.items() <= options.items()


async def test_error_does_not_show_the_row(pg_ada: Client, log: Log) -> None:
    log.start()
    constraint = "ALTER TABLE users ADD CHECK (username <> 'eve')"
    await execute(pg_ada.app.state.database, constraint)
    assert error_of(await pg_ada.register("eve"))["error"] == "internal_error"
    text = log.text()
    assert "violates check constraint" in text
    assert "argon2id" not in text


FAULTS = {
    "full": ("max_page_count = 1", "database or disk is full"),
    "read-only": ("query_only = 1", "attempt to write a readonly database"),
    "locked": ("busy_timeout = 0", "database is locked"),
}
PRAGMAS = ("journal_mode", "foreign_keys", "busy_timeout", "journal_size_limit")


@cases("pragma, reason", FAULTS)
async def test_sqlite_cannot_write_is_503_with_reason(
    pragma: str, reason: str, ada: Client, caplog: CapLog
) -> None:
    await execute(ada.app.state.database, f"PRAGMA {pragma}")
    with closing(sqlite3.connect("app.db")) as other:
        other.execute("BEGIN IMMEDIATE" if reason == "database is locked" else "BEGIN")
        body = {"title": "x", "description": "\U0001f600" * 2000}
        statuses = [(await ada.post("/items", json=body)).status_code for _ in range(2)]
        assert (await ada.get("/items")).status_code == 200
    assert statuses == [503, 201 if pragma == "query_only = 1" else 503]
    assert reasons(caplog) == [f"database: {reason}"] * statuses.count(503)


async def test_sqlite_connection_is_prepared() -> None:
    async with connected() as database, held_connection(database) as db:
        found = [await db.scalar(sa.text(f"PRAGMA {name}")) for name in PRAGMAS]
    assert found == ["wal", 1, 5000, main.MAX_WAL_BYTES]


def test_sqlite_connection_needs_no_switch_to_wal() -> None:
    with closing(sqlite3.connect("app.db")) as other:
        other.execute("BEGIN EXCLUSIVE")  # another worker switches at this time
        with closing(sqlite3.connect("app.db", timeout=0)) as connection:
            main.prepare_sqlite_connection(connection, mock.sentinel.entry)
            assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


async def test_read_session_refuses_to_write(ada: Client) -> None:
    sessions: Any = main.get_read_db(Request({"type": "http", "app": ada.app}))
    db = await anext(sessions)
    user = await db.get_one(main.User, 1)
    user.username = "ada"  # as before: nothing to write
    await db.flush()
    change = main.update_user(db, user, username="eve")
    new = main.User(id=2)
    for write in (change, main.remove_user(db, 1), main.add_row(db, new)):
        with pytest.raises(RuntimeError, match="WriteSession"):
            await write
    db.expunge(new)
    user.username = "bob"
    with pytest.raises(RuntimeError, match="WriteSession"):
        await anext(sessions)


async def test_transaction_without_commit_is_undone(database: main.Database) -> None:
    async with database.session(writes=True) as db:
        await main.add_row(db, main.User(username="ada", password_hash=""))
    assert await add_user(database, "ada")


@pytest.mark.parametrize("writes", [True, False])
async def test_session_works_from_first_contact_to_its_end(writes: bool) -> None:
    with pytest.raises(main.ServiceUnavailableException):
        main.Database(make_settings()).session(writes)
    async with connected() as database:
        async with database.session(writes) as session:
            pass
        with pytest.raises(sa.exc.InvalidRequestError):
            await main.find_user(session, 1)


async def test_write_sessions_of_workers_lose_no_update(database_url: str) -> None:
    async def count_up(database: main.Database) -> None:
        async with database.session(writes=True) as db:
            user = (await db.scalars(sa.select(main.User).with_for_update())).one()
            user.token_version += 1
            await db.commit()

    url = {"DATABASE_URL": database_url}
    async with connected(**url) as one, connected(**url) as other:
        await add_user(one)
        await asyncio.gather(*(count_up(database) for database in [one, other] * 5))
        async with one.session(writes=False) as db:
            assert await main.read_token_owner(db, 1, 10)


# --- Schemas --------------------------------------------------------------------------


@cache
def openapi_document() -> dict[str, Any]:
    return built_app().openapi()


def operations() -> dict[str, dict[str, Any]]:  # by "GET /api/v1/items" and the like
    return {
        f"{method.upper()} {path}": operation
        for path, methods in openapi_document()["paths"].items()
        for method, operation in methods.items()
    }


def url_of(path: str) -> str:
    return re.sub("{.*?}", "1", f"http://test{path}")


def operations_with_json() -> Iterator[tuple[str, str]]:
    for name, operation in operations().items():
        if "application/json" in str(operation.get("requestBody")):
            method, path = name.split()
            yield method, url_of(path)


TYPES = [b"", b"text/plain", b"multipart/form-data", b"application/json\xff", b";;;/"]
HOSTILE_JSON = {
    "nothing": b"",
    "null for a title": b'{"title": null}',
    "NUL in a title": rb'{"title": "a\u0000b"}',
    "lone surrogate in a title": rb'{"title": "\ud800"}',
    "lone surrogate in a name": rb'{"title": "x", "\udfff": 1}',
    "lone surrogate in UTF-8": b'{"title": "\xed\xa0\x80"}',
    "not UTF-8": b'{"title": "\xff"}',
    "NaN in an unknown field": b'{"title": "x", "more": NaN}',
    "integer beyond 64 bits": b'{"title": 18446744073709551616}',
    "integer of 5,000 digits": b'{"title": %s}' % (b"9" * 5000),
    "deep": b"[" * 30_000 + b"]" * 30_000,
    "deep enough to be parsed": b'{"title": %s}' % (b"[" * 900 + b"]" * 900),
}


@cases("content", HOSTILE_JSON)
async def test_hostile_json_is_400_or_422(content: bytes, ada: Client) -> None:
    for method, path in operations_with_json():
        response = await ada.request(method, path, content=content, headers=JSON)
        assert error_of(response)["error"] in {"bad_request", "validation_error"}


@pytest.mark.parametrize("content_type", TYPES, ids=ascii)
async def test_content_type_not_json_is_422(content_type: bytes, ada: Client) -> None:
    headers = {b"Content-Type": content_type}
    response = await ada.post("/items", content=b'{"title": "x"}', headers=headers)
    assert error_of(response)["error"] == "validation_error"


@pytest.mark.parametrize(("sent", "details"), [(1, 1), (20, 20), (21, 1), (4000, 1)])
async def test_unknown_fields_are_bounded(sent: int, details: int, ada: Client) -> None:
    body = {f"{n}": 0 for n in range(sent)}
    for method, path in operations_with_json():
        response = await ada.request(method, path, json=body)
        found = [d["type"] for d in error_of(response)["details"]]
        assert len([t for t in found if t != "missing"]) == details


HOSTILE_TEXTS = {
    "NUL": "%00",
    "lone surrogate": "%ED%A0%80",
    "not UTF-8": "%FF",
    "beyond 64 bits": "9223372036854775808",
    "5,000 digits": "9" * 5000,
    "NaN": "NaN",
}


@cases("text", HOSTILE_TEXTS)
async def test_hostile_text_in_path_or_query_is_422(text: str, ada: Client) -> None:
    for ending in (f"/{text}", f"?after={text}", f"?limit={text}"):
        for path in ("/users", "/items"):
            (detail,) = error_of(await ada.get(path + ending))["details"]
            assert detail["field"].partition(".")[0] in {"path", "query"}


@pytest.mark.parametrize("query", ["%00=%FF&%ED%A0%80=%", "&&==&", "&" * 30_000])
async def test_hostile_query_is_ignored_if_not_read(query: str, ada: Client) -> None:
    assert (await ada.get(f"/items?{query}")).status_code == 200


LOGIN = {"username": "ada", "password": "wrong"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
REFUSED_FORMS = {
    "nothing": {"content": b"", "headers": FORM},
    "NUL in a name": {"data": LOGIN | {"username": "a\x00b"}},
    "no password": {"data": {"username": "ada"}},
    "another grant": {"data": LOGIN | {"grant_type": "implicit"}},
    "JSON": {"json": LOGIN},
    "11 fields": {"data": LOGIN | {"more": [""] * 9}},
    "11 parts": {"data": LOGIN, "files": [("m", (None, ""))] * 9},
    "a file": {"data": LOGIN, "files": [("more", ("name", ""))]},
    "not multipart": {"content": b"--y\r\n", "headers": MULTIPART},
}


@cases("options", REFUSED_FORMS)
async def test_hostile_form_is_400_or_422(options: Any, guest: Client) -> None:
    response = await guest.post("/auth/token", **options)
    assert error_of(response)["error"] in {"bad_request", "validation_error"}


async def test_multipart_content_type_is_utf_8_and_short(guest: Client) -> None:
    fields = {"username": (None, "ada"), "password": (None, "wrong")}
    longest = "utf-8; x=" + "x" * 1000
    statuses = {"UTF-8": 401, '"utf-8"': 401, "latin-1": 400, longest: 422}
    for charset, status in statuses.items():
        request = guest.build_request("POST", "/auth/token", files=fields)
        kind = request.headers.pop("Content-Type") + f"; charset={charset}"
        both = [("Content-Type", kind), ("Content-Type", "text/plain")]
        request.headers = httpx.Headers([*request.headers.multi_items(), *both])
        assert (await guest.send(request)).status_code == status, charset


HARMLESS_FORMS = {
    "lone surrogates": b"username=%ED%A0%80&password=%ED%A0%80",
    "bytes that are not UTF-8": b"username=\xff\xfe&password=\xff",
    "grant": b"grant_type=password&username=ada&password=wrong",
    "10 fields": b"username=ada&password=wrong" + b"&more=" * 8,
    "60,000 ampersands": b"&" * 60_000 + b"username=ada&password=wrong",
}
READ_HEADERS = "X-Request-ID Origin Accept Cookie X-Forwarded-For traceparent"


@cases("content", HARMLESS_FORMS)
async def test_odd_form_is_an_ordinary_login(content: bytes, guest: Client) -> None:
    response = await guest.post("/auth/token", content=content, headers=FORM)
    assert error_of(response)["message"] == "Wrong username or password."


@pytest.mark.parametrize("name", READ_HEADERS.split())
async def test_header_of_hostile_bytes_is_ignored(name: str, ada: Client) -> None:
    headers = [(name.encode(), b"\xff, \x00\n")]
    assert (await ada.get("/items", headers=headers)).status_code == 200


VALID: dict[type[pydantic.BaseModel], dict[str, Any]] = {
    main.UserIn: {"username": "ada", "password": PASSWORD},
    main.PasswordChange: {"current_password": "x", "new_password": PASSWORD},
    main.LoginForm: {"username": "ada", "password": "x"},
    main.ItemIn: {"title": "x"},
    main.ItemPatch: {},
}


class Text(NamedTuple):
    schema: type[pydantic.BaseModel]
    field: str
    least: int
    most: int

    def allows(self, value: str) -> bool:
        try:
            self.schema.model_validate(VALID[self.schema] | {self.field: value})
        except pydantic.ValidationError as error:
            assert [fault["loc"] for fault in error.errors()] == [(self.field,)]
            assert "input_value" not in str(error)  # which can be a password
            return False
        return True


TEXTS = {
    "username": Text(main.UserIn, "username", 3, 32),
    "password": Text(main.UserIn, "password", 15, 128),
    "current password": Text(main.PasswordChange, "current_password", 1, 1024),
    "username at login": Text(main.LoginForm, "username", 1, 1024),
    "password at login": Text(main.LoginForm, "password", 1, 1024),
    "title": Text(main.ItemIn, "title", 1, 200),
    "patched title": Text(main.ItemPatch, "title", 1, 200),
    "description": Text(main.ItemIn, "description", 0, 2000),
}


@cases("text", TEXTS)
def test_text_has_a_least_and_a_most_length(text: Text) -> None:
    lengths = (text.least - 1, text.least, text.most, text.most + 1)
    allowed = [n for n in lengths if n >= 0 and text.allows("x" * n)]
    assert allowed == [text.least, text.most]


@cases("text", TEXTS)
def test_text_has_no_lone_surrogate_and_only_a_password_has_nul(text: Text) -> None:
    assert not text.allows("\ud800" + "x" * text.least)
    assert text.allows("\x00" * 15) == ("password" in text.field)


@cases("text", {name: text for name, text in TEXTS.items() if "password" in name})
def test_password_typed_in_nfd_is_the_one_in_nfc(text: Text) -> None:
    body = VALID[text.schema] | {text.field: "e\u0301" * 15}
    assert getattr(text.schema(**body), text.field) == "\u00e9" * 15


def test_password_of_over_1024_characters_is_refused_before_it_is_normalized() -> None:
    assert TEXTS["password at login"].allows("e\u0301" * 512)
    assert not TEXTS["password at login"].allows("e\u0301" * 513)


def test_username_has_letters_digits_and_three_signs_but_no_sign_first() -> None:
    good = ["ada", "0da", "a.b", "a_b", "a-b", "a..", "z9-"]
    bad = [".ada", "_ada", "-ada", "a da", "ada\n", "\u00e4da", "a@b", "aa\u212a"]
    assert [name for name in good + bad if TEXTS["username"].allows(name)] == good


def test_time_is_written_in_utc_with_its_offset() -> None:
    utc = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    for moment in (utc, utc.astimezone(timezone.max), utc.replace(tzinfo=None)):
        user = main.UserOut(id=1, username="ada", created_at=moment)
        assert '"2026-01-02T03:04:05Z"' in user.model_dump_json()


def test_time_outside_of_the_utc_range_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="is out of range") as error:
        main.UserOut.model_validate({"created_at": "9999-12-31T23:59-01:00"})
    assert "9999" not in str(error.value)


# --- Security -------------------------------------------------------------------------

PARAMETERS = "$argon2id$v=19$m=19456,t=2,p=1$"


def test_dummy_hash_takes_as_long_as_a_real_one() -> None:
    assert main.DUMMY_HASH.startswith(PARAMETERS)
    assert [*map(len, main.DUMMY_HASH.split("$"))] == [*map(len, KNOWN_HASH.split("$"))]
    with pytest.raises(argon2.exceptions.VerifyMismatchError):  # computed to the end
        argon2.PasswordHasher().verify(main.DUMMY_HASH, PASSWORD)


async def test_hashing_leaves_the_event_loop_free_and_two_threads_busy() -> None:
    loop_went_on = threading.Event()
    running = set()

    class Password(str):
        def encode(self, *args: str) -> bytes:
            running.add(id(self))
            assert loop_went_on.wait(PATIENCE_SECONDS)
            return super().encode(*args)

    hashes = [asyncio.create_task(main.hash_password(Password("x"))) for _ in range(4)]
    await eventually(lambda: len(running) == 2, "two threads")
    hashes[0].cancel()
    await let_others_run()
    assert (len(running), len(main.UNFINISHED_HASHES)) == (2, 3)
    loop_went_on.set()
    assert (await hashes[2]).startswith(PARAMETERS)


@contextmanager
def busy_hashing() -> Iterator[None]:
    is_over = threading.Event()
    main.HASH_THREADS.map(lambda _: is_over.wait(), range(main.HASHES_AT_A_TIME))
    try:
        yield
    finally:
        is_over.set()


ADA = {"username": "ada", "password": PASSWORD}
CHANGE = {"current_password": PASSWORD, "new_password": PASSWORD[::-1]}
HASHING: dict[str, Any] = {
    "registration": ("POST /users", {"json": ADA | {"username": "eve"}}, 201),
    "login": ("POST /auth/token", {"data": ADA}, 200),
    "unknown name": ("POST /auth/token", {"data": ADA | {"username": "x"}}, 401),
    "password change": ("PATCH /users/me", {"json": CHANGE}, 204),
}


@cases("call", HASHING)
async def test_hashing_queue_over_100_is_503(call: Any, ada: Client) -> None:
    line, options, _ = call
    with busy_hashing():
        hashes = [asyncio.create_task(main.hash_password("x")) for _ in range(105)]
        await eventually(lambda: len(main.UNFINISHED_HASHES) == 102, "100 + 2 hashes")
        refused = [type(task.exception()) for task in hashes if task.done()]
        assert refused == [main.ServiceUnavailableException] * 3
        request = asyncio.create_task(ada.request(*line.split(), **options))
        await eventually(request.done, "an answer at once")
        for task in hashes:
            task.cancel()
        await eventually(lambda: not main.UNFINISHED_HASHES, "an empty queue")
    assert error_of(request.result())["error"] == "service_unavailable"
    assert request.result().headers["Retry-After"] == "1"


CLAIMS = {"sub": "1", "iat": 1, "exp": 2**40, "version": 0}


def token_of(*left_out: str, **changes: Any) -> str:  # with other claims
    claims = {k: v for k, v in (CLAIMS | changes).items() if k not in left_out}
    return jwt.encode(claims, KEY, "HS256")


def segment(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def signed(header: bytes, claims: bytes) -> str:  # also what no library would write
    text = f"{segment(header)}.{segment(claims)}"
    return f"{text}.{segment(hmac.digest(KEY.encode(), text.encode(), 'sha256'))}"


SECRETS = [KEY, '{"kty": "oct", "k": "AAAAAAAAA"}', "ssh-rsa " * 5, "\udce9" * 32]
HEAD, BODY, SIGNATURE = token_of().split(".")
GOOD = json.dumps(CLAIMS).encode()
HS256 = b'{"alg":"HS256"}'
BAD_TOKENS = {
    "no signature": f"{HEAD}.{BODY}.",
    "algorithm none": segment(b'{"alg":"none"}') + f".{BODY}.",
    "algorithm HS512": jwt.encode(CLAIMS, KEY, "HS512"),
    "algorithm HS512 claimed": signed(b'{"alg":"HS512"}', GOOD),
    "algorithm RS256 claimed": signed(b'{"alg":"RS256"}', GOOD),
    "another key": jwt.encode(CLAIMS, "j" * 32, "HS256"),
    "tampered": f"{HEAD}.{token_of(sub='2').split('.')[1]}.{SIGNATURE}",
    "appended": f"{token_of()}!!!!",
    "an unused bit set": token_of()[:-1] + chr(ord(SIGNATURE[-1]) + 1),
    "expired": token_of(exp=int(time.time()) - 1),
    "without sub": token_of("sub"),
    "sub beyond 64 bits": token_of(sub=str(2**63)),
    "without iat": token_of("iat"),
    "without exp": token_of("exp"),
    "without version": token_of("version"),
    "sub of nobody": token_of(sub="2"),
    "sub of letters": token_of(sub="ada"),
    "another version": token_of(version=1),
    "version null": token_of(version=None),
    "version false": token_of(version=False),
    "exp infinite": token_of(exp=float("inf")),
    "exp NaN": token_of(exp=float("nan")),
    "claims that are not UTF-8": signed(HS256, b"\xff"),
    "claims nested deeply": signed(HS256, b"[" * 10_000 + b"]" * 10_000),
    "header nested deeply": signed(b"[" * 1000 + b"]" * 1000, GOOD),
    "not ASCII": "\xff.\xff.\xff",
}


@cases("token", BAD_TOKENS)
async def test_bad_token_is_401_and_no_reason_is_told(token: str, ada: Client) -> None:
    headers = {b"Authorization": f"Bearer {token}".encode("latin-1")}
    response = await ada.get("/users/me", headers=headers)
    assert error_of(response)["message"] == "The access token is not valid."
    assert response.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


async def test_token_without_a_fault_is_good(ada: Client) -> None:
    for token in (token_of(), signed(HS256, GOOD)):
        ada.use_token(token)
        assert (await ada.get("/users/me")).json()["id"] == 1


@pytest.mark.parametrize("secret", SECRETS, ids=["plain", "JWK", "SSH", "not UTF-8"])
@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_token_has_user_times_and_version(algorithm: str, secret: str) -> None:
    changes = {"ALGORITHM": algorithm, "SECRET_KEY": secret}
    settings = make_settings(ACCESS_TOKEN_EXPIRE_MINUTES=7, **changes)
    before = int(time.time())
    token = main.create_access_token(main.User(id=5, token_version=3), settings)
    assert jwt.get_unverified_header(token)["alg"] == algorithm
    claims = jwt.get_unverified_claims(token)
    issued_at = claims.pop("iat")
    assert before <= issued_at <= time.time()
    assert claims == {"sub": "5", "version": 3, "exp": issued_at + 7 * 60}
    assert vars(main.decode_access_token(token, settings)) == {"sub": 5, "version": 3}


def test_token_is_invalid_from_its_exp_on() -> None:
    with pytest.raises(main.UnauthorizedException):
        main.decode_access_token(token_of(exp=int(time.time())), make_settings())


# --- Repositories ---------------------------------------------------------------------

LISTS: dict[str, Any] = {
    "items": lambda db: main.list_items(db, 1, 5_000, 21),
    "users": lambda db: main.list_users(db, 9_990, 21),
}
INDEXES = {
    "items-sqlite": "SEARCH items USING INDEX items_of_owner (owner_id=? AND id>?)",
    "users-sqlite": "SEARCH users USING INTEGER PRIMARY KEY (rowid>?)",
    "items-postgresql": "Index Scan using items_of_owner on items",
    "users-postgresql": "Index Scan using users_pkey on users",
}
NUMBERS = "WITH RECURSIVE r(n) AS (VALUES(1) UNION ALL SELECT n+1 FROM r WHERE n<9999)"
FILL_USERS = (
    "INSERT INTO users (username, password_hash, token_version, created_at) "
    f"{NUMBERS} SELECT n, '', 0, '2026-01-01' FROM r"
)
FILL_ITEMS = (
    "INSERT INTO items (owner_id, title, created_at, updated_at) "
    f"{NUMBERS} SELECT 1 + (n & 1), n, '2026-01-01', '2026-01-01' FROM r"
)


@pytest.mark.parametrize("name", LISTS)
async def test_list_uses_an_index(name: str, database: Any, statements: Any) -> None:
    for statement in (FILL_USERS, FILL_ITEMS, "ANALYZE"):
        await execute(database, statement)
    async with database.session(writes=False) as db:
        await LISTS[name](db)
        statement, parameters = next(x for x in statements if "LIMIT" in x[0])
        dialect = db.get_bind().dialect.name
        explain = "EXPLAIN QUERY PLAN " if dialect == "sqlite" else "EXPLAIN "
        connection = await db.connection()
        plan = await connection.exec_driver_sql(explain + statement, parameters)
    steps = "\n".join(str(row[-1]) for row in plan)
    assert INDEXES[f"{name}-{dialect}"] in steps
    assert not re.search("Filter|Sort|SCAN|TEMP", steps)


# --- Services -------------------------------------------------------------------------


@pytest.mark.parametrize("limit", range(1, 6))
async def test_pagination_has_every_row_once(limit: int, db: AsyncSession) -> None:
    ids = [1, *[(await add_item(db, 1, title)).id for title in "cba"]]
    pages = []
    after = 0
    while after is not None:
        page = await main.read_items(db, main.User(id=1), after, limit)
        pages.append([item.id for item in page["items"]])
        after = page["next"]
    assert pages == [ids[start : start + limit] for start in range(0, 4, limit)]


async def test_pagination_last_page_has_no_next(db: AsyncSession) -> None:
    for after, limit, next_id in ((0, 1, 1), (1, 1, None), (0, 2, None)):
        assert (await main.read_users(db, after, limit))["next"] == next_id
    empty = await main.read_items(db, main.User(id=7), 0, 1)
    assert empty == {"items": [], "next": None}


EVE = main.UserIn(username="eve", password=PASSWORD)
PASSWORD_CHANGE = main.PasswordChange(**CHANGE)
EDITS = [{"title": "a", "description": "b"}, {"title": "a"}, {"description": None}, {}]


async def test_registration_takes_a_freed_name(database: main.Database) -> None:
    await add_user(database, EVE.username)

    async def delete_user() -> None:
        async with database.read_engine.connect() as connection:
            await connection.execute(sa.delete(main.User))

    async with database.session(writes=True) as db:
        event = sa.event.listens_for(db.sync_session, "after_rollback", once=True)
        event(lambda _: await_(delete_user()))
        assert await main.register_user(db, EVE)


async def test_registration_race_has_one_winner(database: main.Database) -> None:
    async def register() -> main.User:
        async with database.session(writes=True) as db:
            return await main.register_user(db, EVE)

    race = await asyncio.gather(register(), register(), return_exceptions=True)
    assert {type(end) for end in race} == {main.User, main.UsernameTakenException}
    async with database.session(writes=True) as db:
        assert await main.authenticate_user(db, db, "eve", PASSWORD)


OWN_INDEXES: dict[str, Any] = {
    "user": ("users (length(username))", lambda db: main.register_user(db, EVE)),
    "item": ("items (owner_id)", lambda db: add_item(db, 1, secrets.token_hex())),
}


@cases("index, service", OWN_INDEXES)
async def test_own_constraint_is_a_bug(index: str, service: Any, database: Any) -> None:
    await add_user(database)
    await execute(database, f"CREATE UNIQUE INDEX your_own ON {index}")
    async with database.session(writes=True) as db:
        with pytest.raises(sa.exc.IntegrityError):
            for _ in range(2):
                await service(db)


async def test_login_renews_an_outdated_hash(database: main.Database) -> None:
    outdated = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    before = await add_user(database, "ada", outdated.hash(PASSWORD))
    for _ in range(2):
        async with database.session(False) as read_db, database.session(True) as db:
            await main.authenticate_user(read_db, db, "ada", PASSWORD)
    async with database.session(writes=True) as db:
        user = await main.read_token_owner(db, 1, 0)
        assert user.password_hash.startswith(PARAMETERS)
        await main.change_password(db, before, PASSWORD_CHANGE)


@cases("line, sent, status", HASHING)
async def test_hashing_holds_no_connection(line: str, sent: Any, status: int) -> None:
    async with serve_ada(**ONE_CONNECTION) as ada:
        with busy_hashing():
            request = asyncio.create_task(ada.request(*line.split(), **sent))
            await eventually(lambda: main.UNFINISHED_HASHES, "a hash")
            assert await ada.add_item() == 1
        assert (await request).status_code == status


async def test_password_change_race_has_one_winner(database: main.Database) -> None:
    user = await add_user(database)

    async def change() -> None:
        async with database.session(writes=True) as db:
            await main.change_password(db, user, PASSWORD_CHANGE)

    race = await asyncio.gather(change(), change(), return_exceptions=True)
    assert {type(end) for end in race} == {type(None), main.UnauthorizedException}
    async with database.session(writes=False) as db:
        changed = await main.read_token_owner(db, 1, 1)
    assert main.PASSWORD_HASHER.verify(PASSWORD[::-1], changed.password_hash)


async def test_password_change_needs_the_current_password(db: AsyncSession) -> None:
    change = PASSWORD_CHANGE.model_copy(update={"current_password": "wrong"})
    with pytest.raises(main.WrongPasswordException):
        await main.change_password(db, await main.read_user(db, 1), change)


async def test_logout_makes_older_tokens_invalid(db: AsyncSession) -> None:
    user = main.User(id=1, password_hash=KNOWN_HASH, token_version=0)
    await main.revoke_tokens(db, user)
    await db.rollback()
    with pytest.raises(main.UnauthorizedException):
        await main.change_password(db, user, PASSWORD_CHANGE)
    assert await main.read_token_owner(db, 1, 1)
    assert await main.read_token_owner(db, 2, 0)
    with pytest.raises(main.UnauthorizedException):
        await main.read_token_owner(db, 1, 0)


async def test_user_is_deleted_with_items_and_tokens(db: AsyncSession) -> None:
    await main.discard_user(db, main.User(id=1))
    await db.rollback()
    assert (await db.scalars(sa.select(main.Item.id))).all() == [2]
    with pytest.raises(main.NotFoundException):
        await main.read_user(db, 1)
    for late in (main.read_token_owner(db, 1, 0), add_item(db, 1, "too late")):
        with pytest.raises(main.UnauthorizedException):
            await late


@pytest.mark.parametrize("patch", EDITS, ids=str)
async def test_patch_changes_only_fields_sent(patch: Any, db: AsyncSession) -> None:
    bob = main.User(id=2)
    before = main.ItemOut.model_validate(await main.read_item(db, bob, 2)).model_dump()
    await main.change_item(db, bob, 2, main.ItemPatch(**patch))
    await db.rollback()
    after = main.ItemOut.model_validate(await main.read_item(db, bob, 2)).model_dump()
    assert (after.pop("updated_at") > before.pop("updated_at")) == bool(patch)
    assert after == before | patch


async def test_patch_after_delete_is_404(pg_ada: Client, postgresql_url: str) -> None:
    path = f"/items/{await pg_ada.add_item()}"
    with psycopg.connect(postgresql_url) as other:
        other.execute("DELETE FROM items")
        request = asyncio.create_task(pg_ada.patch(path, json={"title": "new"}))
        await eventually(lambda: waiting_for_locks(other), "it waits for the lock")
    assert (await request).status_code == 404


ITEM_SERVICES: dict[str, Any] = {
    "read": main.read_item,
    "patch": partial(main.change_item, patch=main.ItemPatch(title="new")),
    "delete": main.discard_item,
}


@cases("service", ITEM_SERVICES)
async def test_item_of_another_user_is_hidden(service: Any, db: AsyncSession) -> None:
    for item_id in (2, 7):
        with pytest.raises(main.NotFoundException):
            await service(db, main.User(id=1), item_id)
    assert (await main.read_item(db, main.User(id=2), 2)).title == "Bob's"


async def test_item_is_deleted_alone(db: AsyncSession) -> None:
    await add_item(db, 1, "Ada's second")
    await main.discard_item(db, main.User(id=1), 1)
    await db.rollback()
    assert [item.id for item in await main.list_items(db, 1, 0, 9)] == [3]
    assert [item.id for item in await main.list_items(db, 2, 0, 9)] == [2]


# --- Rate limiting --------------------------------------------------------------------

SECOND = 10**9


class Clock:  # which the test sets, in nanoseconds
    def __init__(self, seconds: float = 1000) -> None:
        self.now_ns = int(seconds * SECOND)

    def __call__(self) -> int:
        return self.now_ns


def make_limiter(limit: int, clock: Any = None, table_bytes: int = 2**20) -> Any:
    limiter = main.SlidingWindowRateLimiter(limit, 60, table_bytes)  # 60 seconds
    limiter.clock_ns = clock or Clock()
    return limiter


ADDRESS = "192.0.2.1"
BUDGETS = ("api", "login")
RATE_LIMIT_HEADERS = ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")
PROJECT_NAMES_IN_REDIS = (f"test-{secrets.token_hex(8)}" for _ in itertools.count())


async def admitted(rate_limiter: main.RateLimiter, tries: int) -> int:
    return sum([(await rate_limiter.hit("api", ADDRESS)).allowed for _ in range(tries)])


class Model:  # the rule in its plainest form: a list of admission times
    def __init__(self, limit: int, times: tuple[int, ...] = ()) -> None:
        self.limit = limit
        self.times = [*times]

    def check(self, now_ns: int) -> main.RateLimitResult:
        self.times = [time for time in self.times if time > now_ns - 60 * SECOND]
        allowed = len(self.times) < self.limit
        if allowed:
            self.times.append(now_ns)
        remaining = self.limit - len(self.times)
        reset_seconds = math.ceil((self.times[0] + 60 * SECOND - now_ns) / SECOND)
        return main.RateLimitResult(allowed, self.limit, remaining, reset_seconds)


@pytest.mark.parametrize("limit", [1, 2, 7])
@cases("start_seconds", {"just booted": 1e-9, "long running": 1000})
def test_rate_limit_window_is_exact(limit: int, start_seconds: float) -> None:
    chance = random.Random(limit)
    clock = Clock(start_seconds)
    limiter = make_limiter(limit, clock)
    models = {client: Model(limit) for client in "abc"}
    steps = [0, 1, SECOND, 7 * SECOND, 20 * SECOND, 60 * SECOND - 1, 60 * SECOND]
    for _ in range(1000):
        clock.now_ns += chance.choice(steps)
        client = chance.choice("abc")
        assert limiter.hit(client) == models[client].check(clock.now_ns)


def test_rate_limit_in_a_full_table_evicts_the_client_idle_for_longest() -> None:
    clock = Clock()
    limiter = make_limiter(1, clock, table_bytes=1000)  # which is room for one bucket
    first, second, *others = [f"client {n}" for n in range(main.ROWS_IN_BUCKET)]
    for client in [first, second, *others, first]:
        clock.now_ns += SECOND
        limiter.hit(client)
    assert limiter.hit("newcomer").allowed
    assert not any(limiter.hit(n).allowed for n in [first, *others, "newcomer"])
    assert limiter.hit(second).allowed


def test_rate_limit_row_of_a_client_cannot_be_computed() -> None:
    assert len({make_limiter(1).find_row("ada").client_hash for _ in range(3)}) == 3


async def test_rate_limit_is_exact_for_thousands_of_clients() -> None:
    rate_limiter = main.RateLimiter(make_settings(RATE_LIMIT_REQUESTS=1))
    clients = [f"user {n}" for n in range(5000)] * 2
    allowed = [(await rate_limiter.hit("api", client)).allowed for client in clients]
    assert allowed == [True] * 5000 + [False] * 5000


@pytest.mark.parametrize("limit", [1, 100, 10_000])
async def test_rate_limit_memory_is_64_mib(limit: int) -> None:
    limits = {"RATE_LIMIT_REQUESTS": limit, "RATE_LIMIT_LOGIN_REQUESTS": limit}
    with mock.patch.object(mmap, "mmap", wraps=mmap.mmap) as made:
        rate_limiter = main.RateLimiter(make_settings(**limits))
    assert 48 * 2**20 < sum(call.args[1] for call in made.mock_calls) <= 64 * 2**20
    assert await admitted(rate_limiter, limit + 1) == limit


FORK = multiprocessing.get_context("fork")
forks = pytest.mark.filterwarnings("ignore:.*fork")  # in a process that has threads


def run_processes(work: Callable[[int], object], count: int) -> list[int | None]:
    start = FORK.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        work(number)

    processes = [FORK.Process(target=run, args=[number]) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@forks
def test_rate_limit_is_shared_by_all_workers() -> None:
    def clock_ns() -> int:
        time.sleep(0)  # gives way to other processes, in the middle of a check
        return SECOND

    limiter = make_limiter(500, clock_ns)
    counts = FORK.Array("q", 4)

    def count(number: int) -> None:
        counts[number] = sum(limiter.hit("a").allowed for _ in range(300))

    run_processes(count, 4)
    assert sum(counts[:]) == 500


@forks
def test_rate_limit_goes_on_when_a_process_is_killed_with_the_lock() -> None:
    limiter = make_limiter(5)

    def be_killed(_: int) -> None:
        limiter.clock_ns = lambda: os.kill(os.getpid(), signal.SIGKILL)  # in the lock
        limiter.hit("a")

    assert run_processes(be_killed, 1) == [-signal.SIGKILL]
    assert sum(limiter.hit("a").allowed for _ in range(9)) == 5


CLIENTS = {
    "192.0.2.1": "192.0.2.1",
    "::ffff:192.0.2.1": "192.0.2.1",
    "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64",
    "2001:DB8:1:2:ffff::": "2001:db8:1:2::/64",
    "2001:db8:1:3::": "2001:db8:1:3::/64",
    "fe80::1%eth0": "fe80::/64",
    "nonsense": "unknown",
}


def test_rate_limit_client_is_ipv4_or_ipv6_network() -> None:
    assert {address: main.client_key(address) for address in CLIENTS} == CLIENTS


@pytest.mark.parametrize("limits", [(10, 3), (3, 10)], ids=str)
async def test_rate_limit_headers_show_the_tighter_of_two_limits(limits: Any) -> None:
    names = ("RATE_LIMIT_REQUESTS", "RATE_LIMIT_LOGIN_REQUESTS")
    rate_limiter = main.RateLimiter(make_settings(**dict(zip(names, limits))))
    scope: dict[str, Any] = {"state": {}}
    for number, budget in enumerate(BUDGETS * 2):
        scope["state"]["client"] = f"2001:db8::{number}"  # all of one client
        await main.enforce_rate_limit(rate_limiter, budget, scope)
    await main.enforce_rate_limit(rate_limiter, "login", scope, client="5")  # a user
    assert scope["state"]["rate_limit"] == (True, 3, 1, 60)


def set_clock(app: FastAPI) -> Clock:
    clock = Clock()
    for limiter in app.state.rate_limiter.memory_limiters.values():
        limiter.clock_ns = clock
    return clock


def rate_limit(response: httpx.Response) -> tuple[str | None, ...]:  # four headers
    return tuple(map(response.headers.get, (*RATE_LIMIT_HEADERS, "Retry-After")))


async def test_rate_limit_of_logins_refuses_with_numbers_of_its_own() -> None:
    async with serve(RATE_LIMIT_REQUESTS=4, RATE_LIMIT_LOGIN_REQUESTS=2) as guest:
        clock = set_clock(guest.app)
        await guest.get("/nowhere")
        clock.now_ns += 10 * SECOND
        logins = [await guest.post("/auth/token") for _ in range(3)]
    assert [login.status_code for login in logins] == [422, 422, 429]
    assert rate_limit(logins[2]) == ("2", "0", "60", "60")


@asynccontextmanager
async def redis_limiter(url: str, name: str = "", limit: int = 3) -> AsyncIterator[Any]:
    names = {"PROJECT_NAME": name or next(PROJECT_NAMES_IN_REDIS), "REDIS_URL": url}
    rate_limiter = main.RateLimiter(make_settings(**names, RATE_LIMIT_REQUESTS=limit))
    rate_limiter.redis.is_prepared = True  # type: ignore[union-attr]
    try:
        yield rate_limiter
    finally:
        await rate_limiter.close()


@pytest.fixture
def patience(monkeypatch: Patch) -> Patch:  # with a Redis on a busy machine
    monkeypatch.setattr(main, "REDIS_TIMEOUT_SECONDS", PATIENCE_SECONDS)
    return monkeypatch


@pytest.mark.usefixtures("patience")
async def test_rate_limit_is_shared_through_redis(redis_url: str) -> None:
    options = (redis_url, next(PROJECT_NAMES_IN_REDIS), 30)
    async with redis_limiter(*options) as one, redis_limiter(*options) as other:
        tries = [limiter.hit("api", ADDRESS) for limiter in (one, other) * 50]
        results = await asyncio.gather(*tries)
    remaining = [result.remaining for result in results if result.allowed]
    assert sorted(remaining) == list(range(30))


def make_older(url: str, project: str, seconds: float) -> None:  # as time does
    with Redis.from_url(url) as redis:
        for key in redis.keys(f"{project}:*"):
            for member, score in redis.zrange(key, 0, -1, withscores=True):
                redis.zadd(key, {member: score - seconds * 1_000_000})


@pytest.mark.usefixtures("patience")
async def test_rate_limit_in_redis_is_the_same_as_in_memory(redis_url: str) -> None:
    clock = Clock()
    model = Model(3, (clock.now_ns,) * 3)
    project = next(PROJECT_NAMES_IN_REDIS)
    async with redis_limiter(redis_url, project, 4) as higher:  # the limit is lowered
        assert await admitted(higher, 1) == 1
        make_older(redis_url, project, 10)
        assert await admitted(higher, 3) == 3
    async with redis_limiter(redis_url, project) as limiter:
        for seconds in random.Random(1).choices([0, 5, 20, 60], k=60):
            clock.now_ns += seconds * SECOND
            make_older(redis_url, project, seconds)
            result = await limiter.hit("api", ADDRESS)
            expected = model.check(clock.now_ns)
            assert result[:3] == expected[:3]
            assert -3 <= result.reset_seconds - expected.reset_seconds <= 0
        await admitted(limiter, 3)
        for seconds, count in ((-50, 0), (-550, 3)):  # as if Redis's clock was set back
            make_older(redis_url, project, seconds)
            assert await admitted(limiter, 4) == count


@pytest.mark.usefixtures("patience")
async def test_rate_limit_keys_in_redis_bear_a_name_and_expire(redis_url: str) -> None:
    project = next(PROJECT_NAMES_IN_REDIS)
    async with redis_limiter(redis_url, project) as limiter:
        for budget in BUDGETS:
            await limiter.hit(budget, ADDRESS)
    with Redis.from_url(redis_url) as redis:
        lifetimes = [redis.pttl(key) for key in redis.keys(f"{project}:*")]
    assert [50_000 < ms <= 60_000 for ms in lifetimes] == [True] * len(BUDGETS)


async def test_rate_limit_of_many_requests_at_once_asks_a_silent_redis_seldom() -> None:
    connections = []

    async def be_silent(reader: asyncio.StreamReader, writer: Any) -> None:
        connections.append(writer)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(be_silent, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, redis_limiter(url) as limiter:
        tries = [admitted(limiter, 1) for _ in range(10 * main.REDIS_CONNECTIONS)]
        assert sum(await asyncio.gather(*tries)) == 3
        assert await admitted(limiter, 10) == 0
        assert main.REDIS_CONNECTIONS > len(connections) > 0


async def test_redis_is_left_if_its_queue_is_long(monkeypatch: Patch) -> None:
    monkeypatch.setattr(main, "REDIS_WAIT_SECONDS", 0)
    async with asyncio.timeout(PATIENCE_SECONDS), redis_limiter("redis://h") as limiter:
        limiter.redis.slots = asyncio.Semaphore(0)
        assert (await limiter.hit("api", ADDRESS)).allowed
        assert limiter.redis.in_outage


async def test_close_does_not_wait_for_redis(monkeypatch: Patch) -> None:  # TLS does
    monkeypatch.setattr(main, "REDIS_CONNECT_SECONDS", 0)
    async with asyncio.timeout(PATIENCE_SECONDS), redis_limiter("redis://h") as limiter:
        limiter.redis.client.connection_pool.disconnect = partial(asyncio.sleep, 99)


@pytest.mark.parametrize(
    "seconds, reason", [(1, "h: no DNS"), (1e-9, "the lookup of h took too long")]
)
async def test_slow_dns_has_one_lookup_for_redis(
    seconds: float, reason: str, monkeypatch: Patch, caplog: CapLog
) -> None:
    found = asyncio.get_running_loop().create_future()
    lookup = mock.Mock(return_value=found)
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lookup)
    monkeypatch.setattr(main, "REDIS_CONNECT_SECONDS", seconds)
    async with redis_limiter("redis://h") as limiter:
        limiter.redis.is_prepared = False
        assert len({limiter.redis.start_check() for _ in range(3)}) == 1
        assert await admitted(limiter, 4) == 3
        found.set_result([]) if seconds < 1 else found.set_exception(OSError("no DNS"))
        await limiter.redis.start_check()
        await limiter.redis.start_check()
        assert lookup.mock_calls == [mock.call("h", None, type=socket.SOCK_STREAM)] * 2
    assert [vars(record)["reason"] for record in caplog.records] == [reason]


class OwnRedis:  # a redis-server of the test's own, which fails in each of these ways
    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}"
        self.client = Redis(port=port, retry=Retry(ConstantBackoff(0.01), 500))
        self.start()

    def close(self) -> None:
        self.client.close()
        self.kill()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client.ping()  # until it answers

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def demote(self) -> None:  # to a replica of no server, which refuses to write
        self.client.slaveof("127.0.0.1", 1)


@pytest.fixture
def own_redis() -> Iterator[OwnRedis]:
    if not shutil.which("redis-server"):
        pytest.skip("there is no redis-server")
    with closing(OwnRedis(free_port())) as redis:
        yield redis


OUTAGES = {
    "down": (OwnRedis.kill, OwnRedis.start),
    "silent": (OwnRedis.pause, lambda redis: redis.process.send_signal(signal.SIGCONT)),
    "read-only": (OwnRedis.demote, lambda redis: redis.client.slaveof()),
}


@cases("begin, end", OUTAGES)
async def test_rate_limit_is_kept_in_memory_while_redis_is_away(
    begin: Any, end: Any, own_redis: OwnRedis, patience: Patch, caplog: CapLog
) -> None:
    caplog.set_level("INFO", main.logger.name)
    async with redis_limiter(own_redis.url) as limiter:
        assert await admitted(limiter, 3) == 3
        patience.setattr(main, "REDIS_TIMEOUT_SECONDS", 0.1)
        begin(own_redis)
        assert await admitted(limiter, 4) == 3
        patience.setattr(main, "REDIS_TIMEOUT_SECONDS", PATIENCE_SECONDS)
        end(own_redis)
        await end_of_outage(limiter.redis)
        await limiter.hit("api", "192.0.2.2")
        assert own_redis.client.keys("*:192.0.2.2")
    assert caplog.messages == ["Redis is not ready", "Redis is ready again"]


@pytest.mark.usefixtures("patience")
async def test_rate_limit_goes_on_in_redis_successor(own_redis: OwnRedis) -> None:
    async with redis_limiter(own_redis.url) as limiter:
        assert await admitted(limiter, 1) == 1
        own_redis.demote()
        own_redis.client.config_set("port", free_port())
        with closing(OwnRedis(own_redis.port)) as successor:
            assert await admitted(limiter, 1) == 1
            await end_of_outage(limiter.redis)
            assert await admitted(limiter, 4) == 3
            assert successor.client.keys(f"*:{ADDRESS}")


async def test_redis_may_end_connections(own_redis: OwnRedis, patience: Patch) -> None:
    async with redis_limiter(own_redis.url) as limiter:
        await limiter.redis.start_check()
        own_redis.client.client_kill_filter(_type="normal", skipme=True)
        assert await limiter.redis.hit("key", 3, 1)


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})])
async def test_answer_of_redis_is_read_late(own_redis: OwnRedis, patience: Any) -> None:
    patience.setattr(main, "REDIS_TIMEOUT_SECONDS", 0.4)
    async with redis_limiter(own_redis.url) as limiter:
        assert await admitted(limiter, 1) == 1
        own_redis.pause()
        request = asyncio.create_task(limiter.redis.run_script("key", 3, 1))
        await asyncio.sleep(0.01)  # it is sent
        own_redis.process.send_signal(signal.SIGCONT)
        own_redis.client.blpop(["nothing"], 0.6)  # holds up the loop for over 0.4 s
        assert (await request).allowed


async def test_redis_without_room_is_left_alone(own_redis: OwnRedis) -> None:
    own_redis.client.config_set("maxclients", 5)
    async with redis_limiter(f"redis://localhost:{own_redis.port}") as limiter:
        limiter.redis.is_prepared = False
        await limiter.redis.start_check()
        assert limiter.redis.in_outage
        assert limiter.redis.client.connection_pool.get_connection_count()[0][0] == 5
        await eventually(lambda: len(own_redis.client.client_list()) == 1, "free slots")


# --- Middleware -----------------------------------------------------------------------

PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "PATCH"}
PREFLIGHT["Access-Control-Request-Headers"] = "authorization"
BAD_PREFLIGHT = PREFLIGHT | {"Access-Control-Request-Method": "LINK"}


class Kind(NamedTuple):  # a kind of response, and the request that has it
    status: int
    method: str = "GET"
    path: str = "/api/v1/nowhere"
    headers: Mapping[str, str] = {}
    content: bytes | None = None


KINDS = {
    "route": Kind(200, "POST", "/api/v1/read"),
    "health": Kind(200, "GET", "/health/live"),
    "docs": Kind(200, "GET", "/docs"),
    "docs of a mounted application": Kind(200, "GET", "/mounted/docs"),
    "openapi": Kind(200, "GET", "/api/v1/openapi.json"),
    "preflight": Kind(200, "OPTIONS", "/api/v1/users", PREFLIGHT),
    "refused preflight": Kind(400, "OPTIONS", "/api/v1/users", BAD_PREFLIGHT),
    "401": Kind(401, "GET", "/api/v1/users/me"),
    "404": Kind(404),
    "405": Kind(405, "PUT", "/api/v1/users"),
    "413": Kind(413, "POST", "/api/v1/read", {}, b" " * 2001),
    "422": Kind(422, "POST", "/api/v1/parse", {}, b"{"),
    "429": Kind(429),
    "500": Kind(500, "GET", "/api/v1/fail/crash"),
    "500 TimeoutError of a route": Kind(500, "GET", "/api/v1/fail/timeout"),
    "503": Kind(503, "GET", "/api/v1/fail/own-outage"),
    "504": Kind(504, "GET", "/api/v1/hang"),
}


class Answer(NamedTuple):
    kind: Kind
    response: httpx.Response
    lines: list[dict[str, Any]]


@pytest.fixture(params=KINDS.values(), ids=[*KINDS])
async def answer(request: pytest.FixtureRequest, log: Log) -> Answer:  # to each kind
    kind: Kind = request.param
    async with Client(odd_app(0.1 if kind.status == 504 else 30)) as client:
        client.headers.update({"Origin": ORIGIN, "X-Request-ID": "mine.1_a-Z"})
        if kind.status == 429:
            await client.get("/nowhere")
        log.start()
        sent: Any = {"headers": kind.headers, "content": kind.content}
        response = await client.request(kind.method, f"https://test{kind.path}", **sent)
    assert response.status_code == kind.status
    return Answer(kind, response, log.lines())


SECURE = """Content-Security-Policy: default-src 'none'; frame-ancestors 'none'; \
base-uri 'none'; form-action 'none'
X-Content-Type-Options: nosniff
X-Frame-Options: DENY
Referrer-Policy: no-referrer
Permissions-Policy: accelerometer=(), camera=(), geolocation=(), microphone=()
Cross-Origin-Opener-Policy: same-origin
Cross-Origin-Resource-Policy: same-origin
Cross-Origin-Embedder-Policy: require-corp
X-XSS-Protection: 0
Cache-Control: no-store
Strict-Transport-Security: max-age=63072000"""
SECURITY = dict(line.split(": ", 1) for line in SECURE.splitlines())
WIDER_IN_DOCS = ("Content-Security-Policy", "Cross-Origin-Embedder-Policy")
BREAKS = [("ERROR", b"seconds=0", "hunter2"), ("WARNING", b"seconds=999", "TIMEOUT")]
REASONS = {503: ("It burns. " * 99)[:500], 504: "REQUEST_TIMEOUT_SECONDS is over"}


async def test_response_of_each_kind_has_its_headers_once(answer: Answer) -> None:
    headers = answer.response.headers
    expected = SECURITY | {"Access-Control-Allow-Origin": ORIGIN}
    expected |= {"X-Request-ID": "mine.1_a-Z"}
    if answer.kind.path == "/docs":
        expected |= {name: headers[name] for name in WIDER_IN_DOCS}
    for name, value in expected.items():
        assert (name, headers.get_list(name)) == (name, [value])
    assert re.fullmatch(r"\d+\.\d\dms", " ".join(headers.get_list("X-Response-Time")))
    assert "Access-Control-Allow-Credentials" not in headers


async def test_response_of_each_kind_tells_the_rate_limit(answer: Answer) -> None:
    shown = rate_limit(answer.response)[:2]
    if not answer.kind.path.startswith("/api/v1/"):
        assert shown == (None, None)
    elif answer.kind.method != "OPTIONS":
        assert shown == ("1", "0")


async def test_error_of_each_kind_has_the_same_format(answer: Answer) -> None:
    if answer.kind.status >= 400 and answer.kind.method != "OPTIONS":
        error_of(answer.response)
    assert "hunter2" not in answer.response.text


async def test_log_has_one_line_for_each_kind_of_response(answer: Answer) -> None:
    (line,) = answer.lines
    assert (line["message"], line["request_id"]) == ("request", "mine.1_a-Z")
    assert (line["method"], line["path"]) == (answer.kind.method, answer.kind.path)
    assert line["status_code"] == answer.kind.status
    assert line["client"].startswith("198.18.")
    shown_ms = float(answer.response.headers["X-Response-Time"].removesuffix("ms"))
    assert shown_ms <= line["duration_ms"] < 1000 * PATIENCE_SECONDS


async def test_log_level_and_reason_follow_from_the_status(answer: Answer) -> None:
    (line,) = answer.lines
    level = {500: "ERROR", 503: "WARNING", 504: "WARNING"}
    assert line["level"] == level.get(answer.kind.status, "INFO")
    assert line.get("reason") == REASONS.get(answer.kind.status)
    assert ("hunter2" in line.get("exception", "")) is (line["level"] == "ERROR")


async def test_request_id_is_taken_over_if_it_is_short_and_plain(guest: Client) -> None:
    good = [b"a", b"A" * 128, b"0._-z", b"t \t"]
    taken = []
    for given in [*good, b"A" * 129, b"", b"a b", b"\xe9", b"a\n"]:
        response = await guest.get("/nowhere", headers=[(b"X-Request-ID", given)])
        request_id = error_of(response)["request_id"]
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", request_id)
        if request_id.encode() == given.strip(b" \t"):
            taken.append(given)
    assert taken == good


async def send_raw(app: Any, path: str, **changes: Any) -> list[Message]:  # by ASGI
    scope: dict[str, Any] = {"type": "http", "method": "GET", "query_string": b""}
    scope |= {"headers": [(b"host", b"test")], "asgi": {"spec_version": "2.4"}}
    scope |= {"path": path, "scheme": "http", "client": (next(ADDRESSES), 5), **changes}
    send = mock.AsyncMock()
    await app(scope, mock.AsyncMock(return_value={"type": "http.request"}), send)
    return [call.args[0] for call in send.await_args_list]


@pytest.mark.parametrize("text", ["x", '"', "\n", "\xe9", "\U0001f600", "\ud800"])
async def test_log_line_stays_below_4_kib_for_any_path(text: str, log: Log) -> None:
    log.start()
    headers = [(b"x-request-id", b"a" * 128)]
    client = (text * 40_000, 5)
    await send_raw(built_app(), f"/{text * 40_000}", headers=headers, client=client)
    written = log.text()
    assert len(written) < 4096
    assert len(json.loads(written)["path"]) == 500


async def test_log_line_has_the_user(ada: Client, log: Log) -> None:
    log.start()
    await ada.get("/users/me")
    await ada.get("/users/me", headers={"Authorization": ""})
    assert [line.get("user_id") for line in log.lines()] == [1, None]


TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
TRACES = {
    f"00-{TRACE_ID}-{PARENT_ID}-01": TRACE_ID,
    f"cc-{TRACE_ID}-{PARENT_ID}-01-more": TRACE_ID,  # of a later version
    f"ff-{TRACE_ID}-{PARENT_ID}-01": None,
    f"00-{'0' * 32}-{PARENT_ID}-01": None,
    f"00-{TRACE_ID}-{'0' * 16}-01": None,
    f"00-{TRACE_ID}-{PARENT_ID}-01-more": None,
    f"cc-{TRACE_ID}-{PARENT_ID}-011": None,
}


async def test_log_line_has_the_id_of_a_valid_trace(guest: Client, log: Log) -> None:
    log.start()
    for traceparent in TRACES:
        await guest.get("/nowhere", headers={"traceparent": f"{traceparent} "})
    assert [line.get("trace_id") for line in log.lines()] == [*TRACES.values()]


@pytest.mark.parametrize("trusted, n", [("10.0.0.8", 1), ("10.0.0.8,10.0.0.9", 0)])
async def test_forwarded_for_warns_once(trusted: str, n: int, log: Log) -> None:
    main.warn_of_untrusted_proxy.cache_clear()
    log.start(LOG_LEVEL="WARNING")
    app: Any = ProxyHeadersMiddleware(Client(built_app()).app, trusted_hosts=trusted)
    headers = [(b"x-forwarded-for", x) for x in (b"203.0.113.9", b"10.0.0.8")]
    for _ in range(3):
        await send_raw(app, "/nowhere", client=("10.0.0.9", 5), headers=headers)
    assert ["FORWARDED_ALLOW_IPS" in x["message"] for x in log.lines()] == [True] * n


async def test_hsts_is_sent_over_https_only(guest: Client) -> None:
    assert "Strict-Transport-Security" not in (await guest.get("/nowhere")).headers


async def test_cors_exposes_the_headers_of_the_service(odd: Client) -> None:
    response = await odd.get("/nowhere", headers={"Origin": ORIGIN})
    exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
    others = {"X-Request-ID", "X-Response-Time", "Location", "Retry-After"}
    assert set(exposed) == {*SECURITY, *RATE_LIMIT_HEADERS, *others}


async def test_cors_lets_no_other_origin_read(odd: Client) -> None:
    response = await odd.get("/nowhere", headers={"Origin": "https://evil.test"})
    assert "Access-Control-Allow-Origin" not in response.headers


async def test_cors_allows_the_methods_and_headers_of_the_api(odd: Client) -> None:
    response = await odd.options("/items", headers=PREFLIGHT)
    methods = response.headers["Access-Control-Allow-Methods"].split(", ")
    headers = response.headers["Access-Control-Allow-Headers"].split(", ")
    always = {"Accept", "Accept-Language", "Content-Language"}
    used = {name.split()[0] for name in operations()}
    assert set(methods) == used == {"GET", "POST", "PATCH", "DELETE"}
    assert set(headers) == {"Authorization", "Content-Type", "X-Request-ID", *always}


async def test_rate_limit_headers_count_down_and_say_when_to_retry() -> None:
    app = built_app(RATE_LIMIT_REQUESTS=2)
    clock = set_clock(app)
    responses = []
    async with Client(app) as client:
        for _ in range(4):
            responses.append(await client.get("/nowhere"))
            clock.now_ns += 41 * SECOND // 2
    assert [(r.status_code, *rate_limit(r)) for r in responses] == [
        (404, "2", "1", "60", None),
        (404, "2", "0", "40", None),
        (429, "2", "0", "19", "19"),
        (404, "2", "0", "19", None),
    ]


async def chunked(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


@pytest.mark.parametrize("size, status", [(2000, 200), (2001, 413)], ids=str)
@cases("form", {"declared": bytes.__add__, "chunked": chunked})
async def test_body_is_bounded(form: Any, size: int, status: int, odd: Client) -> None:
    content = form(b" " * 1000, b" " * (size - 1000))
    assert (await odd.post("/read", content=content)).status_code == status


async def test_body_declared_too_large_is_not_read(odd: Client) -> None:
    async def unread() -> AsyncIterator[bytes]:
        yield b""
        pytest.fail("it was read")

    size = {"Content-Length": "2001"}
    assert (await odd.post("/read", content=unread(), headers=size)).status_code == 413


async def test_timeout_cancels_the_route() -> None:
    async with Client(odd_app(0.1)) as client:
        await client.get("http://test/health/live")
        skip_time(1)  # a timer that the first request left would cancel the second one
        assert (await client.get("/hang")).status_code == 504
        assert client.app.state.hangs is False
    assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]


async def test_cancelled_request_is_503_with_retry_after(odd: Client, log: Log) -> None:
    log.start()
    request = asyncio.create_task(odd.get("/hang"))
    await eventually(lambda: getattr(odd.app.state, "hangs", False), "the route runs")
    request.cancel()
    response = await request
    assert error_of(response)["error"] == "service_unavailable"
    assert response.headers["Retry-After"] == "1"
    assert [(x["level"], bool(x["reason"])) for x in log.lines()] == [("WARNING", True)]


@pytest.mark.parametrize("level, query, cause", BREAKS)
async def test_cut_body_is_logged(level: str, query: Any, cause: str, log: Log) -> None:
    log.start()
    start, chunk = await send_raw(odd_app(0.1), "/api/v1/break_off", query_string=query)
    assert (start["status"], chunk["body"], chunk["more_body"]) == (200, b"begun", True)
    (line,) = log.lines()
    assert (line["level"], line["status_code"]) == (level, 200)
    assert cause in line.get("exception", line.get("reason", ""))


# --- Dependencies ---------------------------------------------------------------------


async def test_dependency_override_of_the_current_user() -> None:
    eve = main.User(id=7, username="eve", created_at=main.now())
    app = main.create_app(make_settings())
    app.dependency_overrides[main.get_current_user] = lambda: eve
    async with Client(app) as client:
        assert (await client.get("/users/me")).json()["username"] == "eve"


@pytest.mark.parametrize("path", ["/items", "/items/7", "/users/me"])
async def test_connection_is_free_before_the_response_is_sent(path: str) -> None:
    async with serve_ada(**ONE_CONNECTION) as ada:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_after_another_request(message: Message) -> None:
                assert await ada.add_item()
                await send(message)

            await ada.app(scope, receive, send_after_another_request)

        async with Client(app) as client:
            for method in ("GET", "PATCH", "POST"):
                body = {"title": "tea"} if method != "GET" else None
                await client.request(method, path, json=body, headers=ada.headers)


async def test_read_does_not_wait_for_a_writer(ada: Client, app: FastAPI) -> None:
    async with app.state.database.session(writes=True) as db:
        await main.find_user(db, 1)
        answers = [await ada.get("/items"), await ada.login()]
    assert [answer.status_code for answer in answers] == [200, 200]


async def test_rate_limit_of_credentials_is_one_for_all_requests_with_hashing() -> None:
    calls = [*HASHING.values()]
    async with serve_ada(RATE_LIMIT_LOGIN_REQUESTS=len(calls)) as ada:
        answers = [await ada.request(*c.split(), **o) for c, o, _ in calls * 2]
        assert (await ada.get("/items")).status_code != 429
    expected = [status for _, _, status in calls] + [429] * len(calls)
    assert [answer.status_code for answer in answers] == expected


# --- Health routes --------------------------------------------------------------------

HEALTH = "http://test/health"
HEALTHY = {"status": "healthy"}
UNHEALTHY = {"status": "unhealthy"}


async def test_health_tells_status_version_time_and_checks() -> None:
    async with serve(VERSION="9") as guest:
        before = main.now()
        body = (await guest.get(HEALTH)).json()
    assert before <= datetime.fromisoformat(body.pop("timestamp")) <= main.now()
    checks = {"database": HEALTHY}
    assert body == {"status": "healthy", "version": "9", "checks": checks}


async def test_liveness_needs_no_database() -> None:
    async with Client(built_app(PROJECT_NAME="that is never started")) as client:
        response = await client.get(f"{HEALTH}/live")
    assert (response.status_code, response.json()) == (200, {"status": "alive"})


@pytest.mark.parametrize("path", ["", "/live", "/ready"])
async def test_health_answers_head_as_get(path: str, guest: Client) -> None:
    head = await guest.head(HEALTH + path)
    get = await guest.get(HEALTH + path)
    assert head.status_code == get.status_code == 200
    assert head.headers.keys() == get.headers.keys()


async def test_health_and_readiness_tell_an_old_table(guest: Client, log: Log) -> None:
    assert (await guest.get(f"{HEALTH}/ready")).json() == {"status": "ready"}
    await execute(guest.app.state.database, "ALTER TABLE items DROP COLUMN description")
    log.start()
    health = await guest.get(HEALTH)
    ready = await guest.get(f"{HEALTH}/ready")
    assert (health.status_code, health.json()["status"]) == (503, "degraded")
    assert health.json()["checks"] == {"database": UNHEALTHY}
    assert (ready.status_code, ready.json()) == (503, {"status": "not_ready"})
    lines = [line for line in log.lines() if line["message"] == "request"]
    assert [line["reason"] for line in lines] == ["the database is not ready"] * 2


async def test_health_without_redis_is_degraded_but_ready(caplog: CapLog) -> None:
    async with serve(REDIS_URL=f"redis://127.0.0.1:{free_port()}") as guest:
        health = await guest.get(HEALTH)
        assert (await guest.get(f"{HEALTH}/ready")).status_code == 200
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    assert health.json()["checks"] == {"database": HEALTHY, "redis": UNHEALTHY}
    assert "Redis is not ready" in caplog.text


async def test_health_with_redis_is_healthy(redis_url: str) -> None:
    async with serve(REDIS_URL=redis_url) as guest:
        await let_others_run(after=main.REDIS_CONNECT_SECONDS)  # no timer is left
        body = (await guest.get(HEALTH)).json()
    assert (body["status"], body["checks"]["redis"]) == ("healthy", HEALTHY)


async def test_health_is_told_while_servers_are_silent(monkeypatch: Patch) -> None:
    monkeypatch.setattr(main, "HEALTH_CHECK_TIMEOUT_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        app = built_app(REDIS_URL=f"redis://{address}")
        settings = make_settings(DATABASE_URL=f"postgresql://u@{address}/d")
        app.state.database = main.Database(settings)
        async with asyncio.timeout(PATIENCE_SECONDS), Client(app) as client:
            health = await client.get(HEALTH)
        await app.state.database.close()
    assert health.json()["checks"] == {"database": UNHEALTHY, "redis": UNHEALTHY}


# --- API routes -----------------------------------------------------------------------


async def test_registration_answers_the_user_and_the_location(guest: Client) -> None:
    response = await guest.register("Ada")
    user = response.json()
    assert list(user) == ["id", "username", "created_at"]
    assert (response.status_code, user["username"]) == (201, "ada")
    assert response.headers["Location"] == f"/api/v1/users/{user['id']}"


async def test_login_answers_a_token(ada: Client, guest: Client) -> None:
    body = (await guest.login("ADA")).json()
    guest.use_token(body.pop("access_token"))
    assert body == {"token_type": "bearer", "expires_in": 30 * 60}
    assert (await guest.get("/users/me")).json() == (await ada.get("/users/1")).json()


async def test_login_is_answered_alike_for_wrong_name_and_password(ada: Client) -> None:
    ada.headers["X-Request-ID"] = "same"
    answers = [await ada.login(name, "wrong") for name in ("ada", "nobody")]
    one, other = [(a.status_code, a.content, [*a.headers]) for a in answers]
    assert (one, one[0]) == (other, 401)


LAST_REQUESTS: dict[str, Any] = {
    "password change": {"method": "PATCH", "url": "/users/me", "json": CHANGE},
    "logout": {"method": "DELETE", "url": "/auth/token"},
    "deletion": {"method": "DELETE", "url": "/users/me"},
}


@cases("call", LAST_REQUESTS)
async def test_token_becomes_invalid(call: Any, ada: Client, bob: Client) -> None:
    response = await ada.request(**call)
    assert (response.status_code, response.content) == (204, b"")
    assert error_of(await ada.get("/users/me"))["error"] == "unauthorized"
    assert (await bob.get("/users/me")).status_code == 200


async def test_item_is_found_at_its_location_until_it_is_deleted(ada: Client) -> None:
    response = await ada.post("/items", json={"title": "tea"})
    item = response.json()
    location = response.headers["Location"]
    assert (response.status_code, location) == (201, f"/api/v1/items/{item['id']}")
    assert list(item) == ["id", "title", "description", "created_at", "updated_at"]
    assert (item["title"], item["description"]) == ("tea", None)
    assert (await ada.get(f"http://test{location}")).json() == item
    deleted = await ada.delete(f"http://test{location}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert (await ada.get(f"http://test{location}")).status_code == 404


async def test_item_of_another_user_is_404(ada: Client, bob: Client) -> None:
    assert (await bob.get(f"/items/{await ada.add_item()}")).status_code == 404


async def test_patch_answers_the_changed_item(ada: Client) -> None:
    await ada.add_item("tea", description="hot")
    changed = (await ada.patch("/items/1", json={"title": "milk"})).json()
    assert (changed["title"], changed["description"]) == ("milk", "hot")
    assert (await ada.get("/items/1")).json() == changed


@pytest.mark.parametrize("kind", ["users", "items"])
async def test_pagination_has_20_rows_by_default(kind: str, ada: Client) -> None:
    for number in range(21):
        await ada.add_item(f"item {number}")
        await add_user(ada.app.state.database, f"user-{number}")
    page = (await ada.get(f"/{kind}")).raise_for_status().json()
    assert (len(page[kind]), page["next"]) == (20, 20)


MAX_ID = 2**63 - 1
BOUNDS = {
    200: ["?limit=1", "?limit=100", "?after=0", f"?after={MAX_ID}"],
    404: ["/9", f"/{MAX_ID}"],
    422: f"?limit=0 ?limit=101 ?after=-1 ?after={MAX_ID + 1} /0 /{MAX_ID + 1}".split(),
}


@pytest.mark.parametrize(("status", "endings"), BOUNDS.items())
async def test_pagination_has_bounds(status: int, endings: Any, ada: Client) -> None:
    for ending in endings:
        for path in ("/users", "/items"):
            assert (await ada.get(path + ending)).status_code == status


async def test_405_names_all_methods_of_the_path() -> None:
    guest = Client(main.create_app(make_settings()))
    for mount in ("/api", "/"):  # they match all methods
        guest.app.mount(mount, StaticFiles(directory="."))
    paths = openapi_document()["paths"]
    for path in paths:
        same = [p for p in paths if re.fullmatch(re.sub("{.*?}", "[^/]+", p), path)]
        allowed = {method.upper() for p in same for method in paths[p]}
        allowed |= {"HEAD"} if path.startswith("/health") else set()
        response = await guest.request("TRACE", url_of(path))
        assert error_of(response)["error"] == "method_not_allowed"
        assert set(response.headers["Allow"].split(", ")) == allowed


@pytest.mark.parametrize("path", ["/items", HEALTH, "http://test/docs"])
async def test_path_with_another_ending_is_404(path: str, ada: Client) -> None:
    for ending in ("/", "%0A", "%0A%0A", "/%0A"):
        assert error_of(await ada.get(path + ending))["error"] == "not_found"


# --- Application ----------------------------------------------------------------------


@pytest.fixture
def main_app(log: Log, monkeypatch: Patch) -> Iterator[None]:
    monkeypatch.setenv("ENVIRONMENT", "development")
    yield
    main.build_app.cache_clear()


def test_main_app_is_built_once_and_sets_up_logging(main_app: None, log: Log) -> None:
    assert main.app is main.app
    assert log.text().count(" WARNING no SECRET_KEY") == 1


@pytest.mark.parametrize("name", [":app", ":create_app()"])
async def test_app_can_be_served_by_its_name(name: str, main_app: None) -> None:
    async with started(import_app(main.__name__ + name)) as app, Client(app) as client:
        assert (await client.get("http://test/health/ready")).status_code == 200


def test_importing_main_reads_no_environment_and_opens_nothing() -> None:
    script = f"""if True:
        import logging, os, threading, {main.__name__} as main
        assert "app" not in vars(main) and not logging.getLogger().handlers
        assert os.listdir() == [".env"] and threading.active_count() == 1
    """
    Path(".env").write_text("ENVIRONMENT=nonsense\n")
    variables = {**os.environ, **dict.fromkeys(main.Settings.model_fields, "nonsense")}
    variables["PYTHONPATH"] = str(Path(main.__file__).parent)
    subprocess.run([sys.executable, "-c", script], env=variables, check=True)


def test_create_app_leaves_logging_alone(caplog: CapLog) -> None:
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    main.create_app(main.Settings(ENVIRONMENT="development", LOG_LEVEL="DEBUG"))
    main.create_app(make_settings(ENVIRONMENT="development"))
    assert (root.level, root.handlers) == before
    assert caplog.messages == ["no SECRET_KEY: a restart or --reload ends all tokens"]


def test_routes_are_built_before_the_first_request() -> None:
    profile = cProfile.Profile()
    profile.runcall(list, iter_route_contexts(main.create_app(make_settings()).routes))
    assert sum(row.callcount for row in profile.getstats()) < 5000  # else some 66,000


async def test_lifespan_leaves_no_task_and_no_connection() -> None:
    tasks = asyncio.all_tasks()
    threads = {*threading.enumerate()}  # aiosqlite has one for each connection
    async with serve() as client:
        assert client.app.state.database.read_engine.pool.checkedin() == 1
        await client.get("http://test/health/ready")
        assert {*threading.enumerate()} - threads
    await eventually(lambda: {*threading.enumerate()} <= threads, "connections end")
    assert asyncio.all_tasks() == tasks


async def test_lifespan_opens_and_closes_connections_to_redis(redis_url: str) -> None:
    name = f"test-{secrets.token_hex(8)}"
    with Redis.from_url(redis_url) as redis:
        async with serve(REDIS_URL=f"{redis_url}?client_name={name}") as client:
            assert str(redis.client_list()).count(name) == main.REDIS_CONNECTIONS
            limiter = client.app.state.rate_limiter
            counts = [limiter.hit("api", ADDRESS) for _ in range(48)]
            await asyncio.gather(*counts, limiter.redis.is_ready())
            assert str(redis.client_list()).count(name) == main.REDIS_CONNECTIONS
        await eventually(lambda: name not in str(redis.client_list()), "all closed")


OWN_STATUSES = {  # which only the rules of a route can give
    "POST /api/v1/users": {409},
    "PATCH /api/v1/users/me": {403},
    "POST /api/v1/auth/token": {401},
}


def test_openapi_names_every_status_of_an_error() -> None:
    for name, operation in operations().items():
        expected = {500, 503, 504} | OWN_STATUSES.get(name, set())
        expected |= set() if "/health" in name else {429}
        expected |= {401} if "security" in operation else set()
        expected |= {400, 413, 422} if "requestBody" in operation else set()
        expected |= {422} if "parameters" in operation else set()
        expected |= {404} if "_id}" in name else set()
        errors = {int(code) for code in operation["responses"]} - {200, 201, 202, 204}
        assert expected <= errors <= expected | {403, 409}, name


def model_names(response: dict[str, Any]) -> set[str]:
    return set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(response)))


def test_openapi_error_is_an_error_response() -> None:
    for name, operation in operations().items():
        responses = operation["responses"]
        for status in (status for status in responses if int(status) >= 400):
            models = {"ErrorResponse"}
            if (name, status) in {("GET /health", "503"), ("GET /health/ready", "503")}:
                models |= model_names(responses["200"])
            assert model_names(responses[status]) == models, name


def test_openapi_operation_has_tag_name_and_description() -> None:
    for name, operation in operations().items():
        assert operation["tags"][0] in name.split("/")
        assert re.fullmatch(r"[a-z]+(_[a-z]+)+", operation["operationId"]), name
        assert re.fullmatch(r"[A-Z].+[.?]", operation.get("description", "")), name


def test_openapi_schema_is_a_model_with_a_name() -> None:
    for name, schema in openapi_document()["components"]["schemas"].items():
        text = json.dumps(schema)
        assert issubclass(getattr(main, name), pydantic.BaseModel)
        assert '"additionalProperties": {' not in text
        assert "id" not in schema["properties"] or '"format": "int64"' in text
        assert '"default": ""' not in text  # which would break its own minLength
        for pattern in re.findall(r'"pattern": "(.*?)"', text):
            assert not re.search(r"\\[AzZ]|\(\?", pattern)  # unknown to ECMA-262


def test_openapi_examples_of_a_body_are_valid() -> None:
    schemas = openapi_document()["components"]["schemas"]
    bodies = [n for n, s in schemas.items() if s.get("additionalProperties") is False]
    assert bodies
    for name in bodies:
        fields = schemas[name]["properties"].items()
        getattr(main, name)(**{field: row["examples"][0] for field, row in fields})


def token_url(document: dict[str, Any]) -> str:
    (scheme,) = document["components"]["securitySchemes"].values()
    return str(scheme["flows"]["password"]["tokenUrl"])


def test_openapi_token_url_outlives_an_added_route() -> None:
    app = main.create_app(make_settings())
    app.add_api_route("/api/v1/tea", lambda: None)
    assert "/api/v1/tea" in app.openapi()["paths"]
    assert token_url(app.openapi()) == "/api/v1/auth/token"


PLACES = {  # ROOT_PATH, which a proxy has stripped from the request, and API_V1_PREFIX
    "default": ("", "/api/v1"),
    "prefix": ("", "/v9"),
    "root-path": ("/svc", "/v9"),
    "root-path-like-the-prefix": ("/api", "/api/v1"),
}
places = cases("root_path, prefix", PLACES)


@asynccontextmanager
async def serve_at(root_path: str, prefix: str) -> AsyncIterator[Client]:
    names = {"PROJECT_NAME": "Tea", "PROJECT_DESCRIPTION": "Hot.", "VERSION": "9"}
    async with serve(**names, ROOT_PATH=root_path, API_V1_PREFIX=prefix) as client:
        client.base_url = httpx.URL(f"http://test{prefix}")
        yield client


@places
async def test_openapi_has_public_paths_and_names(root_path: str, prefix: str) -> None:
    async with serve_at(root_path, prefix) as client:
        document = (await client.get("/openapi.json")).json()
    assert token_url(document) == f"{root_path}{prefix}/auth/token"
    assert document["servers"] == [{"url": root_path or "/"}]
    assert f"{prefix}/users" in document["paths"]
    assert document["info"] == {"title": "Tea", "description": "Hot.", "version": "9"}


@places
async def test_location_is_a_public_path(root_path: str, prefix: str) -> None:
    async with serve_at(root_path, prefix) as client:
        response = await client.register()
    assert response.headers["Location"] == f"{root_path}{prefix}/users/1"
    assert response.headers["X-RateLimit-Limit"] == "10000"


@places
@pytest.mark.parametrize("page", ["/docs", "/redoc", "/docs/oauth2-redirect"])
async def test_docs_load(page: str, root_path: str, prefix: str) -> None:
    async with serve_at(root_path, prefix) as client:
        response = await client.get(f"http://test{page}")
    policy = response.headers["Content-Security-Policy"].replace(";", "")
    sources = tuple(word for word in policy.split() if word.startswith("https:"))
    urls = re.findall(r'(?:src|href)="(.*?)"', response.text)
    assert response.status_code == 200 and all(u.startswith(sources) for u in urls)
    document = f"{root_path}{prefix}/openapi.json"
    paths = set(re.findall(r"[\"'](/.*?)[\"']", response.text))
    assert paths <= {document, f"{root_path}/docs/oauth2-redirect"}
    assert (document in paths) == (page in {"/docs", "/redoc"})


# --- gunicorn.conf.py -----------------------------------------------------------------

ROOT = Path(main.__file__).parent
BAD_VALUES = {
    "BIND": [
        *("127.0.0.1:http", "127.0.0.1:65536", "127.0.0.1:-1", "host", ":80,host"),
        *("80", "::1:80", "h://x:1", "fd://x", "1\n2"),
    ],
    "PORT": ["0", "65536"],
    "WORKERS": ["0", "many", "9" * 5000],
    **{name: ["0"] for name in ("WEB_CONCURRENCY", "KEEP_ALIVE_SECONDS")},
    "MAX_REQUESTS": ["-1", "\u0663"],
    "GRACEFUL_TIMEOUT": ["0", "1.5"],
}


def load_config(**variables: str) -> Any:  # gunicorn.conf.py, read with these alone
    with mock.patch.dict(os.environ, variables, clear=True):
        return runpy.run_path(f"{ROOT}/gunicorn.conf.py")


@rows(BAD_VALUES)
def test_bad_variable_ends_the_start_with_one_line(name: str, value: str) -> None:
    with pytest.raises(SystemExit, match=rf"\Abad settings: {name}: .+\Z"):
        load_config(**{name: value})


@cases(
    "variables, name, value",
    {
        "bind default": ({}, "bind", ["0.0.0.0:8000"]),
        "bind before port": ({"PORT": "8", "BIND": "[::1]:9"}, "bind", ["[::1]:9"]),
        "two addresses": ({"BIND": ":80 , unix:/s"}, "bind", [":80", "unix:/s"]),
        "no port": ({"BIND": "fd://3,unix:s"}, "bind", ["fd://3", "unix:s"]),
        "empty bind": ({"PORT": "80", "BIND": " "}, "bind", ["0.0.0.0:80"]),
        "processors": ({}, "workers", main.usable_cpus()),
        "concurrency": ({"WEB_CONCURRENCY": "4"}, "workers", 4),
        "workers first": ({"WEB_CONCURRENCY": "4", "WORKERS": " 3\n"}, "workers", 3),
        "keep-alive": ({}, "keepalive", 75),
        "preload": ({}, "preload_app", True),
        "proxies": ({}, "forwarded_allow_ips", "127.0.0.1,::1"),
    },
)
def test_gunicorn_setting_has_its_value(variables: Any, name: str, value: Any) -> None:
    assert load_config(**variables)[name] == value


@pytest.mark.parametrize("quota, cpus", [("max", 4), ("150000", 2), ("1", 1), ("", 4)])
def test_workers_default_to_quota(quota: str, cpus: int, monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    Path("cpu.max").write_text(f"{quota} 100000\n")
    assert main.usable_cpus("cpu.max") == cpus


def test_main_process_has_logs_and_many_open_files(main_app: None, log: Log) -> None:
    logging.getLogger().handlers = []  # as for gunicorn 'main:create_app()'
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        load_config()["on_starting"](None)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        main.logger.warning("tea")
        assert log.text().count(" WARNING tea ") == 1
    finally:
        gc.unfreeze()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope, receive)
    if scope["path"] == "/stream":  # its response starts before its body has arrived
        await send({"type": "http.response.start", "status": 200})
        await request.body()
        return await send({"type": "http.response.body"})
    size = len(await request.body()) if scope["path"] == "/" else 0
    if scope["path"] == "/slow":
        with suppress(asyncio.CancelledError):  # until it is cancelled or disconnected
            while (await receive())["type"] == "http.request":
                pass
    fields = {"size": size, "headers": [*request.headers], "client": scope["client"]}
    await JSONResponse(fields)(scope, receive, send)


class Connection:  # a client's end of a real connection to a LimitedHttpProtocol
    def __init__(self, client: socket.socket) -> None:
        client.setblocking(False)
        self.client = client
        self.received = b""
        self.is_open = True
        config = uvicorn.Config(echo, log_config=None, timeout_keep_alive=75)
        self.state = ServerState()
        self.state.default_headers = [(b"date", b"today")]
        self.protocol = load_config()["LimitedHttpProtocol"](config, self.state, {})

    async def forward(self, seconds: float) -> None:  # and take what the server sends
        await let_others_run(after=seconds)
        with suppress(BlockingIOError):
            while self.is_open:
                data = self.client.recv(65536)
                self.received += data
                self.is_open = bool(data)

    async def send(self, *segments_and_pauses: bytes | int) -> None:
        for step in segments_and_pauses:
            if isinstance(step, bytes):
                self.client.sendall(step)
            await self.forward(0 if isinstance(step, bytes) else step)

    def statuses(self) -> list[int]:
        return [int(code) for code in re.findall(rb"HTTP/1.1 (\d{3}) ", self.received)]

    def sizes(self) -> list[int]:
        return [int(size) for size in re.findall(rb'"size":(\d+)', self.received)]


@pytest.fixture
async def connection() -> AsyncIterator[Connection]:
    client, server = socket.socketpair()
    with client:
        connection = Connection(client)
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: connection.protocol, server)
        yield connection
        connection.protocol.transport.abort()


GET = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n"
SLOW = GET.replace(b"/", b"/slow", 1)
POST = b"POST / HTTP/1.1\r\nhost: test\r\n"
UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
SIZE_5 = b"content-length: 5\r\n\r\n"
HELLO = SIZE_5 + b"hello"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
LARGE = b"x" * 2**16
EARLY = b"POST /early HTTP/1.1\r\nhost: test\r\n" + SIZE_5
EXPECT = EARLY[:-2] + b"expect: 100-continue\r\n\r\n"
HTTP_1_0 = EARLY.replace(b"1.1", b"1.0\r\nconnection: keep-alive")
POST_LARGE = POST + b"content-length: 65536\r\n\r\n"
HEADS = {
    "64 KiB": ([POST + b"x: " + LARGE[:-36] + b"\r\n\r\n"], [200]),
    "in parts": ([POST + b"x: ", LARGE[:9000], LARGE[9000:]], [431]),
    "one byte more": ([POST + b"x: " + LARGE[:-35] + b"\r\n\r\n"], [431]),
    "path": ([b"GET /" + LARGE + b" HTTP/1.1\r\nhost: test\r\n\r\n"], [431]),
    "upgrade": ([POST + UPGRADE + b"x: " + LARGE + b"\r\n" + SIZE_5], [431]),
    "upgrades": ([GET[:-2] + UPGRADE + b"upgrade: " + LARGE + b"\r\n\r\n"], [431]),
    "after a late body": ([POST + SIZE_5, b"hello", POST + b"x: ", LARGE], [200, 431]),
}


@cases("segments, statuses", HEADS)
async def test_long_head_is_431(segments: Any, statuses: Any, connection: Any) -> None:
    await connection.send(*segments)
    assert (connection.statuses(), connection.is_open) == (statuses, statuses == [200])


async def test_request_body_does_not_count_as_head(connection: Connection) -> None:
    await connection.send(POST_LARGE + LARGE + GET[:9], GET[9:])
    assert connection.sizes() == [65536, 0]


@cases(
    "steps, seconds, statuses",
    {
        "nothing sent": ([], 10, [408]),
        "head begun": ([GET[:9]], 10, [408]),
        "head trickles": ([GET[:1], 5, GET[1:2], 4, GET[2:9]], 1, [408]),
        "second head begun": ([GET, GET[:9]], 10, [200, 408]),
        "head begun behind another": ([GET + GET[:9]], 10, [200, 408]),
        "and continued": ([GET + GET[:9], GET[9:20]], 10, [200, 408]),
        "answered": ([GET], 75, [200]),
        "head begun late": ([GET, 70, GET[:9], 9, GET[9:]], 75, [200, 200]),
        "an empty line after it": ([GET, b"\r\n"], 75, [200]),
        "answered, and no body": ([EARLY], 75, [200]),
    },
)
async def test_idle_connection_times_out(
    steps: list[Any], seconds: int, statuses: list[int], connection: Connection
) -> None:
    await connection.send(*steps)
    await connection.forward(seconds - 0.9)
    assert connection.is_open
    await connection.forward(0.9)
    assert (connection.statuses(), connection.is_open) == (statuses, False)


async def test_timeout_is_off_during_a_slow_request(connection: Connection) -> None:
    slow = (GET + SLOW[:-2], b"\r\n", 1000)
    await connection.send(GET[:9], GET[9:], *slow, GET[:9], 1000)
    connection.state.tasks.pop().cancel()
    await connection.send(GET[9:])
    assert connection.statuses() == [200, 200, 200, 200]


@cases(
    "segments",
    {
        "body later": [UPGRADE + SIZE_5, b"hello"],
        "in parts": [UPGRADE[:50], UPGRADE[50:], SIZE_5 + b"he", b"llo"],
        "chunked": [UPGRADE + CHUNKED + b"5\r\nhello", b"\r\n0\r\n\r\n"],
        "and expect": [UPGRADE + b"expect: 100-continue\r\n" + SIZE_5, b"hello"],
        "websocket": [UPGRADE.replace(b"h2c", b"websocket") + SIZE_5, b"hello"],
    },
)
async def test_upgrade_is_ignored(segments: Any, connection: Connection) -> None:
    await connection.send(POST, *segments, GET)
    assert connection.sizes() == [5, 0]
    assert b'"upgrade"' not in connection.received


async def test_upgrade_in_a_pipeline_keeps_the_order(connection: Connection) -> None:
    post = POST + UPGRADE + HELLO
    await connection.send(GET + post + GET[:-2] + UPGRADE + b"\r\n" + post + GET)
    assert connection.sizes() == [0, 5, 0, 5, 0]


LAST_REQUESTS_OF_A_CONNECTION = {
    "HTTP/1.0": [b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n" + GET],
    "upgrade and close": [POST + UPGRADE + b"connection: close\r\n" + HELLO + GET],
    "close in a trailer": [POST + CHUNKED + b"0\r\nconnection: close\r\n\r\n" + GET],
    "early stream": [EARLY.replace(b"early", b"stream"), b"hello" + GET],
    "bytes behind it": [POST + HELLO + b"xyz"],
}


@cases("segments", LAST_REQUESTS_OF_A_CONNECTION)
async def test_last_request_is_answered(segments: Any, connection: Connection) -> None:
    await connection.send(*segments)
    assert (connection.statuses(), connection.is_open) == ([200], False)


async def test_endless_head_behind_a_request_is_not_read(connection: Any) -> None:
    await connection.send(SLOW + GET[:9], LARGE, LARGE)
    assert connection.protocol.flow.read_paused


@pytest.mark.parametrize("sent", [EARLY, GET + GET[:9], SLOW])
async def test_reset_ends_timers_and_requests(sent: bytes, connection: Any) -> None:
    connection.client.sendall(sent)
    await let_others_run()
    connection.client.close()  # a reset, because the response is not read
    await let_others_run()
    end = connection.protocol
    assert (end.timeout_keep_alive_task, end.header_timer.cancelled()) == (None, True)
    assert (end.cycle.transport, connection.state.tasks) == (end.transport, set())
    assert end.write != end.transport.write  # it would raise in an earlier request


@pytest.mark.parametrize("body", [b"", b"he"])
@pytest.mark.parametrize("head", [EXPECT, HTTP_1_0])
async def test_early_answer_is_not_lost(head: Any, body: Any, connection: Any) -> None:
    await connection.send(head, body)
    assert (connection.statuses(), connection.is_open) == ([200], True)
    # Otherwise, haproxy 2.6 may send another request in place of the rest of the body.
    assert b"\r\nconnection: close\r\n" in connection.received
    await connection.send(b"hello"[len(body) :] + GET)
    assert (connection.statuses(), connection.is_open) == ([200], False)
    assert connection.protocol.scope["method"] == "POST"


@pytest.mark.parametrize("upgrade", [b"", UPGRADE], ids=["plain", "upgrade"])
@cases(
    "head",
    {
        "length and encoding": POST + SIZE_5[:-2] + CHUNKED + b"0\r\n\r\n",
        "other encoding": POST + b"transfer-encoding: gzip\r\n\r\n",
        "bare line feed": POST + b"x-bare: x\n" + SIZE_5,
        "connect": b"CONNECT test:80 HTTP/1.1\r\nhost: test\r\n\r\n",
    },
)
async def test_ambiguous_head_is_400(head: Any, upgrade: Any, connection: Any) -> None:
    await connection.send(head.replace(b"1.1\r\n", b"1.1\r\n" + upgrade) + GET)
    assert (connection.statuses(), connection.is_open) == ([400], False)
    assert b" 400 Bad Request\r\ndate: today\r\n" in connection.received


async def test_trailer_is_no_header(connection: Connection) -> None:
    await connection.send(POST + CHUNKED + b"0\r\nx-forwarded-for: forged\r\n\r\n")
    assert b'"headers":["host","transfer-encoding"]' in connection.received


async def test_client_of_a_unix_socket_is_local(connection: Connection) -> None:
    await connection.send(GET)
    assert b'"client":["127.0.0.1",0]' in connection.received


async def test_stop_closes_an_idle_connection_late(connection: Connection) -> None:
    connection.protocol.shutdown()
    for seconds, is_open in ((0.4, True), (0.1, False)):
        await connection.forward(seconds)
        assert connection.is_open == is_open


async def test_stop_does_not_wait_for_a_body(connection: Connection) -> None:
    await connection.send(EARLY.replace(b"early", b"slow"))
    connection.protocol.shutdown()
    await connection.send(1, b"he")
    connection.state.tasks.pop().cancel()
    await connection.send(0, 1)
    assert (connection.statuses(), connection.is_open) == ([200], False)


@cases("before, after", {"late request": (b"", GET), "slow request": (SLOW, b"")})
async def test_stop_says_to_close(before: bytes, after: bytes, connection: Any) -> None:
    await connection.send(GET, before)
    connection.protocol.shutdown()
    await connection.send(after)
    for task in connection.state.tasks:
        task.cancel()
    await connection.forward(0)
    assert (connection.statuses(), connection.is_open) == ([200, 200], False)
    assert connection.received.count(b"\r\nconnection: close\r\n") == 1


READY = "Application startup complete."
HOST = "[::ffff:127.0.0.1]" if socket.has_dualstack_ipv6() else "127.0.0.1"


class Service:  # gunicorn alone; its clients look like ::ffff:127.0.0.1
    def __init__(self, folder: Path, **variables: str) -> None:
        (folder / "gunicorn.conf.py").symlink_to(ROOT / "gunicorn.conf.py")
        self.port = free_port()
        env = {"SECRET_KEY": KEY, "BIND": f"{HOST}:{self.port}", **variables}
        env["PYTHONPATH"] = f"{folder}:{ROOT}"  # for main.py, where its own folders are
        options: Any = {"cwd": folder, "env": env, "process_group": 0}
        self.log = folder / "log"
        command = [Path(sys.executable).with_name("gunicorn")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_SECONDS)

    def get(self, path: str, **headers: str) -> httpx.Response:
        url = f"http://127.0.0.1:{self.port}{path}"
        options: Any = {"trust_env": False, "verify": False}  # without any proxy
        return httpx.get(url, headers=headers, timeout=PATIENCE_SECONDS, **options)

    def await_text(self, text: str, count: int = 1) -> None:
        read = self.log.read_text
        asyncio.run(eventually(lambda: read().count(text) >= count, f"{count} {text}"))

    def workers(self) -> list[int]:
        return [*map(int, re.findall(r"worker with pid: (\d+)", self.log.read_text()))]


@contextmanager
def running_service(folder: Path, **variables: str) -> Iterator[Service]:
    service = Service(folder, **variables)
    try:
        service.await_text(READY, int(variables["WORKERS"]))
        yield service
    finally:
        with suppress(ProcessLookupError):  # it has ended in the test
            os.killpg(service.process.pid, signal.SIGKILL)
        print(service.process.wait(), service.log.read_text())  # shown after a failure


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with running_service(folder, WORKERS="2", RATE_LIMIT_REQUESTS="20") as service:
        yield service


def test_server_header_is_absent(service: Service) -> None:
    assert "Server" not in service.get("/health/live").headers


@pytest.mark.skipif(not Path("/proc").exists(), reason="there is no /proc")
def test_worker_listens_on_copies_of_its_socket(service: Service) -> None:
    files = subprocess.getoutput(f"ls -l /proc/{service.workers()[-1]}/fd")
    links = re.findall(r"socket:\[\d+\]", files)
    assert max(map(links.count, links)) == 4  # so it accepts 4 connections at once


def test_proxy_on_this_host_tells_the_scheme(service: Service) -> None:
    response = service.get("/health/live", **{"X-Forwarded-Proto": "https"})
    assert "Strict-Transport-Security" in response.headers


def test_worker_stops_when_gunicorn_is_killed(tmp_path: Path) -> None:
    clock = "import time; time.time = lambda: 1e9 - time.monotonic()"  # runs backwards
    (tmp_path / "sitecustomize.py").write_text(clock)
    with running_service(tmp_path, WORKERS="1") as service:
        service.process.kill()
        service.await_text("Application shutdown complete.")


def test_sighup_replaces_workers_and_keeps_limits_and_log(service: Service) -> None:
    client = {"X-Forwarded-For": "203.0.113.4"}
    for _ in range(20):
        assert service.get("/api/v1/nowhere", **client).status_code == 404
    count = len(service.workers())
    service.process.send_signal(signal.SIGHUP)
    service.await_text(READY, count + 2)
    service.await_text("Worker exiting", 2)
    assert service.get("/api/v1/nowhere", **client).status_code == 429
    lines = service.log.read_text().splitlines()
    assert all("timestamp" in json.loads(line) for line in lines)


@cases(
    "stop, seconds, body, status",
    {
        "sigterm": (signal.SIGTERM, "9", b"{}", b"422"),
        "sigint, and the request outlasts it": (signal.SIGINT, "1", b"", b"503"),
    },
)
def test_stop_signal_answers_the_request_in_flight_and_exits_with_0(
    stop: int, seconds: str, body: bytes, status: bytes, tmp_path: Path
) -> None:
    head = POST.replace(b"/", b"/api/v1/users", 1) + b"content-length: 2\r\n"
    variables = {"WORKERS": "1", "GRACEFUL_TIMEOUT": seconds}
    with running_service(tmp_path, **variables) as service, service.connect() as client:
        client.sendall(head + b"expect: 100-continue\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100")
        service.process.send_signal(stop)
        service.await_text("Shutting down")
        client.sendall(body)
        assert client.recv(100).startswith(b"HTTP/1.1 " + status)
        assert service.process.wait(PATIENCE_SECONDS) == 0
        assert "Application shutdown complete." in service.log.read_text()
