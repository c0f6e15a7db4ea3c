"""The laws of main.py, section by section; what needs servers runs where they are.

TEST_DATABASE_URL (PostgreSQL, may make databases) and TEST_REDIS_URL switch those tests
on; without them they are skipped. No test needs more than this file and main.py.
"""

import asyncio
import base64
import gc
import hmac
import importlib.util
import itertools
import json
import logging
import math
import mmap
import multiprocessing
import os
import random
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import (
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    redirect_stdout,
    suppress,
)
from datetime import UTC, datetime, timedelta, timezone
from functools import cache
from http.client import HTTPConnection
from io import StringIO
from pathlib import Path
from types import FrameType, MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple, Self, TypeVar

import httpx
import psycopg
import pydantic
import pytest
import sqlalchemy as sa
import uvicorn
from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from gunicorn.util import import_app  # type: ignore[import-untyped]
from jose import jwt
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm.exc import StaleDataError
from starlette.types import Message, Receive, Scope, Send
from uvicorn.server import ServerState

import main

pytestmark = pytest.mark.anyio
gc.set_threshold(100_000, 50, 50)  # a tenth of the time would go into collecting
PASSWORD = "correct horse battery staple"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable, no `.env` and no database of the developer's reaches a test."""
    for name in main.Settings.model_fields:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def make_settings(**changes: Any) -> main.Settings:
    values = {"ENVIRONMENT": "test", "SECRET_KEY": "k" * 32, "LOG_LEVEL": "ERROR"}
    limits = {"RATE_LIMIT_REQUESTS": 1000, "RATE_LIMIT_LOGIN_REQUESTS": 1000}
    return main.Settings(**values | limits | changes)


class Api(httpx.AsyncClient):
    """A client of the app in process; its verbs are those of a user."""

    async def register(self, username: str = "ada") -> httpx.Response:
        return await self.post(
            "/users", json={"username": username, "password": PASSWORD}
        )

    async def login(self, username: str = "ada", password: str = PASSWORD) -> str:
        form = {"username": username, "password": password}
        response = await self.post("/auth/token", data=form)
        return self.use(response.json()["access_token"])

    def use(self, token: str) -> str:
        self.headers["Authorization"] = f"Bearer {token}"
        return token

    async def add_item(self, title: str = "a title", **more: Any) -> int:
        response = await self.post("/items", json={"title": title, **more})
        item_id: int = response.json()["id"]
        return item_id


@pytest.fixture
async def app() -> AsyncIterator[FastAPI]:
    app = main.create_app(make_settings())
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def api(app: FastAPI) -> AsyncIterator[Api]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with Api(transport=transport, base_url="http://test/api/v1") as api:
        yield api


PATIENCE_SECONDS = 10  # for what is awaited, before its test fails


ADDRESSES = (f"198.18.{n >> 8}.{n & 255}" for n in itertools.count(1))
ALL_MAY_COME = {"RATE_LIMIT_REQUESTS": 50_000, "RATE_LIMIT_LOGIN_REQUESTS": 50_000}


def connect(app: Any, **options: Any) -> Api:
    """A client that has never been here."""
    options = {"client": (next(ADDRESSES), 5)} | options
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, **options)
    return Api(transport=transport, base_url="http://test/api/v1")


@cache
def built_app(**changes: Any) -> FastAPI:
    """One app for all tests that leave it as it is: to build one takes 60 ms.

    To open it takes 10, and each test opens it on a new file, in its own folder.
    """
    return main.create_app(make_settings(**ALL_MAY_COME | changes))


@cache
def tables() -> bytes:
    """A database with empty tables: to make them takes 10 ms, to copy them none."""
    with tempfile.TemporaryDirectory() as folder:
        engine = sa.create_engine(f"sqlite:///{folder}/app.db")
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            main.Base.metadata.create_all(connection)
            connection.commit()
        engine.dispose()
        return Path(folder, "app.db").read_bytes()


@pytest.fixture
async def opened() -> AsyncIterator[FastAPI]:
    app = built_app()
    Path("app.db").write_bytes(tables())
    async with app.router.lifespan_context(app):
        yield app


@asynccontextmanager
async def serve(**changes: Any) -> AsyncIterator[Api]:
    """A client of an app with other settings."""
    app = built_app(**changes)
    main.set_up_logging(app.state.settings)  # to this test's stdout
    Path("app.db").write_bytes(tables())
    async with app.router.lifespan_context(app), connect(app) as api:
        yield api


@cache
def known_hash() -> str:
    """PASSWORD's, made once: a hash takes 30 ms."""
    return main.PASSWORDS.hash(PASSWORD)


async def add_user(
    database: main.Database, username: str = "ada", password_hash: str = ""
) -> main.User:
    """Straight into the database: nothing is hashed."""
    user = main.User(username=username, password_hash=password_hash or known_hash())
    async with database.writer() as db:
        db.add(user)
        await db.commit()
    return user


@asynccontextmanager
async def logged_in(app: FastAPI, username: str = "ada") -> AsyncIterator[Api]:
    user = await add_user(app.state.database, username)
    async with connect(app) as api:
        api.use(app.state.tokens.issue(user))
        yield api


@pytest.fixture
async def guest(opened: FastAPI) -> AsyncIterator[Api]:
    """Not logged in."""
    async with connect(opened) as api:
        yield api


@pytest.fixture
async def ada(opened: FastAPI) -> AsyncIterator[Api]:
    """A client that is logged in as the user with the id 1."""
    async with logged_in(opened) as api:
        yield api


@pytest.fixture
async def bob(ada: Api, opened: FastAPI) -> AsyncIterator[Api]:
    """Somebody else than ada, with the id 2."""
    async with logged_in(opened, "bob") as api:
        yield api


def pools_of(app: FastAPI) -> list[sa.QueuePool]:
    """For reading and for writing; they may be one."""
    database = app.state.database
    return [make().bind.pool for make in (database.reader, database.writer)]


def held(app: FastAPI) -> int:
    return sum(pool.checkedout() for pool in pools_of(app))


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for another process."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"in vain: {what}"
        time.sleep(0.01)


def client_of(app: FastAPI) -> Api:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return Api(transport=transport, base_url="http://test/api/v1")


def cases(names: str, table: dict[str, Any]) -> pytest.MarkDecorator:
    """One case a row, called by its key."""
    return pytest.mark.parametrize(names, table.values(), ids=table.keys())


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The body of an error, once it is known to have the one form."""
    body: dict[str, Any] = response.json()
    assert list(body) == ["error", "message", "details", "request_id"]
    assert response.headers["Content-Type"] == "application/json"
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert body["error"] == main.USUAL[response.status_code][0]
    return body


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """A new database on the server that TEST_DATABASE_URL names."""
    if not (server := os.getenv("TEST_DATABASE_URL")):
        pytest.skip("TEST_DATABASE_URL is not set")
    name = f"test_{secrets.token_hex(8)}"
    plain = sa.make_url(server).set(drivername="postgresql")
    address = plain.render_as_string(hide_password=False)
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield plain.set(database=name).render_as_string(hide_password=False)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return "sqlite:///./app.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


async def soon(awaited: Awaitable[Any]) -> None:
    """Wait for what comes at once; a test that would hang fails."""
    await asyncio.wait_for(awaited, 5)


def engine_of(sessions: Any) -> AsyncEngine:
    """The engine behind a database's `reader` or `writer`."""
    engine: AsyncEngine = sessions.kw["bind"]
    return engine


async def close(database: main.Database) -> None:
    for engine in (database.reading, database.alone):
        await engine.dispose()


async def see_threads_end() -> None:
    """A connection that failed has a thread, which speaks to the loop once more."""
    async with asyncio.timeout(5):
        while any("_connection_worker" in t.name for t in threading.enumerate()):
            await asyncio.sleep(0)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[main.Database]:
    database = main.Database(make_settings(DATABASE_URL=database_url))
    await database.make_tables()
    yield database
    await close(database)


# --- Map ------------------------------------------------------------------------------


def banners_of(file: Path) -> list[str]:
    return re.findall(r"^# --- (.+?) -+$", file.read_text(), re.MULTILINE)


def test_the_docstring_names_the_sections_in_their_order() -> None:
    lines = re.findall(r"^    (\w.*?)  +\w", str(main.__doc__), re.MULTILINE)
    sections = [name for name in lines if not name.endswith(":")]
    assert sections == banners_of(Path(main.__file__))


def test_each_banner_reaches_the_margin() -> None:
    text = Path(main.__file__).read_text()
    assert {len(line) for line in re.findall(r"^# --- .*$", text, re.MULTILINE)} == {88}


# --- Settings -------------------------------------------------------------------------


def refusal(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """The last line with which the process ends."""
    for name, value in ({"SECRET_KEY": "k" * 32} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ending:
        main.load_settings()
    return str(ending.value)


REFUSED = {
    "an-unknown-environment": ("ENVIRONMENT", "hunter2"),
    "an-environment-in-capitals": ("ENVIRONMENT", "Production"),
    "a-debug-that-is-no-boolean": ("DEBUG", "hunter2"),
    "debug-in-production": ("DEBUG", "true"),
    "a-prefix-without-slash": ("API_V1_PREFIX", "hunter2"),
    "a-prefix-that-ends-with-a-slash": ("API_V1_PREFIX", "/hunter2/"),
    "an-empty-prefix": ("API_V1_PREFIX", "/"),
    "a-short-key": ("SECRET_KEY", "hunter2" + "k" * 24),
    "tokens-that-last-no-time": ("ACCESS_TOKEN_EXPIRE_MINUTES", "0"),
    "a-lifetime-that-is-no-number": ("ACCESS_TOKEN_EXPIRE_MINUTES", "hunter2"),
    "unsigned-tokens": ("ALGORITHM", "none"),
    "an-asymmetric-algorithm": ("ALGORITHM", "RS256"),
    "an-unknown-database": ("DATABASE_URL", "mysql://u:hunter2@localhost/d"),
    "a-url-that-is-none": ("DATABASE_URL", "hunter2"),
    "a-port-that-is-no-number": ("DATABASE_URL", "postgres://u:hunter2@localhost:x/d"),
    "a-port-beyond-all": ("DATABASE_URL", "postgres://u:hunter2@localhost:65536/d"),
    "a-password-with-an-at": ("DATABASE_URL", "postgres://u:p@hunter2@localhost/d"),
    "a-name-that-is-not-utf-8": ("PROJECT_NAME", "hunter2\udce9"),
    "sqlite-without-a-file": ("DATABASE_URL", "sqlite://"),
    "sqlite-in-memory": ("DATABASE_URL", "sqlite:///:memory:"),
    "an-empty-pool": ("DATABASE_POOL_SIZE", "0"),
    "a-negative-overflow": ("DATABASE_MAX_OVERFLOW", "-1"),
    "origins-that-are-no-list": ("CORS_ORIGINS", "https://hunter2.example"),
    "an-origin-without-scheme": ("CORS_ORIGINS", '["hunter2.example"]'),
    "an-origin-with-a-path": ("CORS_ORIGINS", '["https://hunter2.example/"]'),
    "any-origin-in-production": ("CORS_ORIGINS", '["https://hunter2.example", "*"]'),
    "no-request-at-all": ("RATE_LIMIT_REQUESTS", "0"),
    "more-requests-than-fit": ("RATE_LIMIT_REQUESTS", "1000001"),
    "no-login-at-all": ("RATE_LIMIT_LOGIN_REQUESTS", "0"),
    "more-logins-than-fit": ("RATE_LIMIT_LOGIN_REQUESTS", "1000001"),
    "a-window-of-no-time": ("RATE_LIMIT_WINDOW_SECONDS", "0"),
    "a-redis-that-is-none": ("REDIS_URL", "https://:hunter2@localhost"),
    "a-redis-port-out-of-range": ("REDIS_URL", "redis://:hunter2@localhost:99999"),
    "bodies-of-nothing": ("MAX_BODY_BYTES", "0"),
    "requests-in-no-time": ("REQUEST_TIMEOUT_SECONDS", "0"),
    "requests-without-end": ("REQUEST_TIMEOUT_SECONDS", "inf"),
    "a-level-in-small-letters": ("LOG_LEVEL", "info"),
    "a-level-that-logging-lacks": ("LOG_LEVEL", "HUNTER2"),
}
refused = cases("name, value", REFUSED)


@refused
def test_a_bad_value_ends_the_process_with_a_line_that_names_it(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refusal(monkeypatch, **{name: value})
    assert re.fullmatch(rf"bad settings: .*\b{name}\b.{{10,}}", line)


@cases("name, value", {k: v for k, v in REFUSED.items() if "hunter2" in v[1].lower()})
def test_the_last_line_never_shows_the_value(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "hunter2" not in refusal(monkeypatch, **{name: value}).lower()


def test_the_last_line_names_each_bad_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    line = refusal(monkeypatch, DEBUG="maybe", LOG_LEVEL="loud")
    assert re.fullmatch(r"bad settings: DEBUG: .+; LOG_LEVEL: .+", line)


@pytest.mark.parametrize("environment_name", ["production", "test", ""])
def test_without_a_key_nothing_starts_outside_development(
    environment_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVIRONMENT", environment_name)
    with pytest.raises(SystemExit, match=r"^bad settings: SECRET_KEY: is required"):
        main.load_settings()


ACCEPTED = {
    "the-shortest-key": {"SECRET_KEY": "k" * 32},
    "a-key-that-is-not-utf-8": {"SECRET_KEY": "k" * 31 + "\udce9"},
    "the-fewest-requests": {"RATE_LIMIT_REQUESTS": "1"},
    "the-most-requests": {"RATE_LIMIT_REQUESTS": "1000000"},
    "the-fewest-logins": {"RATE_LIMIT_LOGIN_REQUESTS": "1"},
    "the-most-logins": {"RATE_LIMIT_LOGIN_REQUESTS": "1000000"},
    "the-shortest-window": {"RATE_LIMIT_WINDOW_SECONDS": "1"},
    "the-shortest-lifetime": {"ACCESS_TOKEN_EXPIRE_MINUTES": "1"},
    "the-smallest-pool": {"DATABASE_POOL_SIZE": "1", "DATABASE_MAX_OVERFLOW": "0"},
    "the-smallest-bodies": {"MAX_BODY_BYTES": "1"},
    "half-a-second": {"REQUEST_TIMEOUT_SECONDS": "0.5"},
    "debug-in-test": {"ENVIRONMENT": "test", "DEBUG": "true"},
    "debug-in-development": {"ENVIRONMENT": "development", "DEBUG": "true"},
    "any-origin-in-development": {
        "ENVIRONMENT": "development",
        "CORS_ORIGINS": '["*"]',
    },
    "some-origins": {"CORS_ORIGINS": '["https://a.example", "http://localhost:5173"]'},
    "hs384": {"ALGORITHM": "HS384"},
    "hs512": {"ALGORITHM": "HS512"},
    "redis": {"REDIS_URL": "redis://localhost:6379/0"},
    "redis-over-tls": {"REDIS_URL": "rediss://localhost"},
    "a-longer-prefix": {"API_V1_PREFIX": "/items-service/v1"},
    "a-file-that-knows-other-things": {"NO_SETTING_OF_OURS": "1"},
}


@cases("variables", ACCEPTED)
def test_a_good_value_is_accepted(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"SECRET_KEY": "k" * 32} | variables).items():
        monkeypatch.setenv(name, value)
    assert main.load_settings()


DEFAULTS: dict[str, Any] = {
    "ENVIRONMENT": "production",
    "DEBUG": False,
    "API_V1_PREFIX": "/api/v1",
    "ACCESS_TOKEN_EXPIRE_MINUTES": 30,
    "ALGORITHM": "HS256",
    "DATABASE_URL": main.parse_database_url("sqlite:///./app.db"),
    "DATABASE_POOL_SIZE": 5,
    "DATABASE_MAX_OVERFLOW": 10,
    "CORS_ORIGINS": [],
    "RATE_LIMIT_REQUESTS": 100,
    "RATE_LIMIT_WINDOW_SECONDS": 60,
    "RATE_LIMIT_LOGIN_REQUESTS": 10,
    "REDIS_URL": None,
    "MAX_BODY_BYTES": 1024 * 1024,
    "REQUEST_TIMEOUT_SECONDS": 30,
    "LOG_LEVEL": "INFO",
}


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items(), ids=DEFAULTS.keys())
def test_a_default_is_the_one_of_the_contract(name: str, value: Any) -> None:
    settings = main.Settings.model_validate({"SECRET_KEY": "k" * 32})
    assert getattr(settings, name) == value


def test_a_file_that_is_not_utf_8_ends_the_process_with_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_bytes(b"PROJECT_NAME=caf\xe9")
    assert "UTF-8" in refusal(monkeypatch)


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Three sources, of which each next one knows one variable more."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    for name in ("SECRET_KEY", "VERSION", "PROJECT_NAME"):
        (folder / name).write_text("from-the-secrets-folder-" + "k" * 32)
    Path(".env").write_text("VERSION=from-the-file\nPROJECT_NAME=from-the-file\n")
    monkeypatch.setenv("PROJECT_NAME", "from-the-environment")
    return monkeypatch


@pytest.mark.usefixtures("sources")
def test_the_environment_goes_before_the_file() -> None:
    assert main.load_settings("secrets").PROJECT_NAME == "from-the-environment"


@pytest.mark.usefixtures("sources")
def test_the_file_goes_before_the_secrets_folder() -> None:
    assert main.load_settings("secrets").VERSION == "from-the-file"


@pytest.mark.usefixtures("sources")
def test_the_secrets_folder_fills_what_is_left() -> None:
    key = main.load_settings("secrets").SECRET_KEY.get_secret_value()
    assert key.startswith("from-the-secrets-folder")


def test_an_empty_variable_is_as_good_as_none(sources: pytest.MonkeyPatch) -> None:
    sources.setenv("PROJECT_NAME", "")
    assert main.load_settings("secrets").PROJECT_NAME == "from-the-file"


@pytest.mark.usefixtures("sources")
def test_without_a_secrets_folder_there_is_no_complaint() -> None:
    with pytest.raises(SystemExit, match="SECRET_KEY: is required"):
        main.load_settings("no-such-folder")


URLS = {
    "sqlite-beside": ("sqlite:///./app.db", "sqlite+aiosqlite:///./app.db"),
    "sqlite-absolute": ("sqlite:////data/app.db", "sqlite+aiosqlite:////data/app.db"),
    "postgres": ("postgres://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
    "postgresql": ("postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
    "another-driver": ("postgresql+asyncpg://h/d", "postgresql+psycopg://h/d"),
    "with-tls": (
        "postgres://u:p%40w@h:6543/d?sslmode=require",
        "postgresql+psycopg://u:p%40w@h:6543/d?sslmode=require",
    ),
}


@cases("given, used", URLS)
def test_a_database_url_is_taken_as_platforms_hand_it_out(
    given: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "k" * 32)
    monkeypatch.setenv("DATABASE_URL", given)
    url = main.load_settings().DATABASE_URL
    assert url.render_as_string(hide_password=False) == used


def test_development_has_a_key_that_nobody_can_guess() -> None:
    settings = main.Settings.model_validate({"ENVIRONMENT": "development"})
    assert re.fullmatch("[0-9a-f]{64}", settings.SECRET_KEY.get_secret_value())


def test_a_key_that_was_made_up_is_warned_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main.create_app(main.Settings.model_validate({"ENVIRONMENT": "development"}))
    assert " WARNING SECRET_KEY is not set" in capsys.readouterr().out


def test_a_key_that_was_set_is_not_warned_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main.create_app(make_settings(ENVIRONMENT="development", LOG_LEVEL="DEBUG"))
    assert capsys.readouterr().out == ""


def test_importing_main_reads_and_opens_nothing() -> None:
    script = """if True:
        import logging, os, threading, main
        assert "app" not in vars(main) and not logging.getLogger().handlers
        assert os.listdir() == [".env"] and threading.active_count() == 1
    """
    Path(".env").write_text("ENVIRONMENT=nonsense\n")
    environment = {**os.environ, "DATABASE_URL": "nonsense"}
    environment["PYTHONPATH"] = str(Path(main.__file__).parent)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.fixture
def served() -> Iterator[None]:
    """What has been built for `main:app` is forgotten afterwards."""
    yield
    vars(main).pop("app", None)


@pytest.mark.usefixtures("served")
def test_main_app_is_built_once_when_a_server_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET_KEY", "k" * 32)
    monkeypatch.setenv("PROJECT_NAME", "from the environment")
    first, second = (getattr(main, "app") for _ in range(2))  # noqa: B009
    assert (first.title, second) == ("from the environment", first)


def test_main_has_no_other_names_than_it_defines() -> None:
    with pytest.raises(AttributeError, match="'main' has no attribute 'application'"):
        getattr(main, "application")  # noqa: B009


# --- Logging --------------------------------------------------------------------------


@pytest.fixture
def log_as(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., None]]:
    """Set the log up as with these settings, until the end of the test."""
    capsys.readouterr()

    def set_up(**changes: Any) -> None:
        logging.captureWarnings(False)
        main.set_up_logging(make_settings(**{"LOG_LEVEL": "INFO"} | changes))

    yield set_up
    logging.getLogger("sqlalchemy.engine").setLevel("NOTSET")
    with capsys.disabled():
        set_up(LOG_LEVEL="ERROR")


def record_of(message: str = "hello", **extra: Any) -> logging.LogRecord:
    fields = {"name": "service", "levelname": "INFO", "msg": message}
    return logging.makeLogRecord(fields | extra)


def test_a_line_has_the_usual_fields_first() -> None:
    fields = json.loads(main.JsonFormatter().format(record_of(colour="red")))
    usual = ["timestamp", "level", "logger", "message", "request_id"]
    assert list(fields) == [*usual, "colour"]


def test_a_line_holds_what_its_record_holds() -> None:
    fields = json.loads(main.JsonFormatter().format(record_of(created=0.25, size=3)))
    assert fields == {
        "timestamp": "1970-01-01T00:00:00.250+00:00",
        "level": "INFO",
        "logger": "service",
        "message": "hello",
        "request_id": None,
        "size": 3,
    }


def test_a_line_has_the_arguments_in_its_message() -> None:
    line = main.JsonFormatter().format(record_of("%s of %d", args=("one", 2)))
    assert json.loads(line)["message"] == "one of 2"


def test_a_line_names_the_request_in_which_it_was_written() -> None:
    token = main.REQUEST_ID.set("an-id")
    line = main.JsonFormatter().format(record_of())
    main.REQUEST_ID.reset(token)
    assert json.loads(line)["request_id"] == "an-id"


def failed_record() -> logging.LogRecord:
    try:
        raise ValueError("first line\nsecond line")
    except ValueError:
        return record_of(exc_info=sys.exc_info())


def test_an_error_carries_its_traceback() -> None:
    trace = json.loads(main.JsonFormatter().format(failed_record()))["exception"]
    assert re.match(r"Traceback(.|\n)*ValueError: first line\nsecond line$", trace)


HOSTILE_VALUES = {
    "newline": "a\n{}",
    "return": "a\r{}",
    "line-separator": "a\u2028\x85{}",
    "nul": "\x00",
    "lone-surrogate": "\ud800",
    "nan": float("nan"),
    "infinity": float("inf"),
    "bytes": b"text",
    "bytes-that-are-not-utf-8": b"\xff",
    "an-object": object(),
    "an-object-and-a-lone-surrogate": [object(), "\ud800"],
    "a-great-number": 10**400,
}
hostile_values = cases("value", HOSTILE_VALUES)


@hostile_values
@pytest.mark.parametrize("field", ["msg", "path"])
def test_whatever_is_logged_a_line_is_one_json_object(field: str, value: Any) -> None:
    line = main.JsonFormatter().format(record_of(**{field: value}))
    assert not re.search(r"[\x00-\x1f]", line)
    assert line.splitlines() == [line]
    assert isinstance(json.loads(line), dict)


@hostile_values
@pytest.mark.parametrize("field", ["msg", "path"])
def test_whatever_is_logged_a_text_is_one_line(field: str, value: Any) -> None:
    line = main.TextFormatter().format(record_of(**{field: value}))
    assert line.isascii()
    assert line.isprintable()


def test_a_text_line_is_short_and_has_the_ids() -> None:
    line = main.TextFormatter().format(record_of(created=0.25, size=3))
    head = "1970-01-01T00:00:00.250+00:00 INFO hello"
    assert line == f"{head} logger=service request_id=None size=3"


def test_a_traceback_in_a_text_cannot_be_taken_for_a_line() -> None:
    head, *lines = main.TextFormatter().format(failed_record()).split("\n")
    assert "INFO hello" in head
    assert lines[-1] == "    | second line"
    assert all(line.startswith("    | ") for line in lines)


@pytest.mark.parametrize("environment", ["production", "test"])
def test_where_machines_read_a_line_is_json(
    environment: str, log_as: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    log_as(ENVIRONMENT=environment)
    main.LOG.info("hello")
    assert [line["message"] for line in logged(capsys)] == ["hello"]


def test_in_development_a_line_is_text(
    log_as: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    log_as(ENVIRONMENT="development")
    main.LOG.info("hello")
    assert " INFO hello logger=service" in capsys.readouterr().out


OURS = ["service", "gunicorn.error", "uvicorn.error"]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
def test_the_level_is_that_of_the_service_and_its_servers(
    level: str,
    name: str,
    log_as: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_as(LOG_LEVEL=level)
    for number in range(logging.DEBUG, logging.CRITICAL + 1, 10):
        logging.getLogger(name).log(number, "hello")
    levels = [line["level"] for line in logged(capsys)]
    assert levels == ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"][-len(levels) :]
    assert levels[0] == level


@pytest.mark.parametrize("name", ["aiosqlite", "sqlalchemy.engine", "asyncio", "any"])
def test_a_library_only_warns(
    name: str, log_as: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    log_as(LOG_LEVEL="DEBUG")
    for level in ("DEBUG", "INFO", "WARNING"):
        logging.getLogger(name).log(logging.getLevelName(level), "hello")
    assert [line["level"] for line in logged(capsys)] == ["WARNING"]


@pytest.mark.parametrize("name", [*OURS, "sqlalchemy.engine"])
def test_debug_shows_more_whatever_the_level(
    name: str, log_as: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    log_as(LOG_LEVEL="ERROR", DEBUG=True)
    logging.getLogger(name).info("hello")
    assert [line["logger"] for line in logged(capsys)] == [name]


def test_a_server_does_not_log_a_request_for_a_second_time(
    log_as: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    log_as(LOG_LEVEL="DEBUG")
    assert not logging.getLogger("uvicorn.access").hasHandlers()
    logging.getLogger("uvicorn.error").error(
        "ASGI callable returned without completing response."
    )
    assert not logged(capsys)


def test_a_warning_is_a_line_like_any_other(
    log_as: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        log_as()
        warnings.warn("hello", stacklevel=1)
    assert [line["logger"] for line in logged(capsys)] == ["py.warnings"]


async def test_debug_shows_sql_without_its_parameters(
    log_as: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    log_as(DEBUG=True)
    database = main.Database(make_settings())
    await database.make_tables()
    await add_user(database, "somebody")
    await close(database)
    out = capsys.readouterr().out
    assert "INSERT INTO users" in out
    assert "somebody" not in out


async def test_no_secret_reaches_the_log(
    opened: FastAPI, log_as: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    log_as(LOG_LEVEL="DEBUG", DEBUG=True)
    async with logged_in(opened) as api:
        token = await api.login()
        await api.get("/items?after=0&hunter2=1")
        change = {"current_password": "hunter2", "new_password": PASSWORD[::-1]}
        await api.patch("/users/me", json=change)
        await api.post("/users", json={"username": "eve", "password": "hunter2"})
    out = capsys.readouterr().out
    assert out.count('"message":"request"') == 4
    assert not [
        secret
        for secret in (PASSWORD, PASSWORD[::-1], "hunter2", token, "Bearer", "argon2id")
        if secret in out
    ]


OUTAGE = sa.exc.OperationalError("SELECT 1", {}, Exception("no route\nmore"))
CHANGES = {
    "it-is-away": (False, OUTAGE, ["WARNING the database is away: no route"]),
    "without-a-reason": (
        False,
        TimeoutError(),
        ["WARNING the database is away: no answer in time"],
    ),
    "it-is-still-away": (True, OUTAGE, []),
    "it-is-back": (True, None, ["INFO the database is back: None"]),
    "it-is-still-there": (False, None, []),
}


@cases("was_away, error, told", CHANGES)
def test_an_outage_and_its_end_are_told_once(
    was_away: bool,
    error: Exception | None,
    told: list[str],
    log_as: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_as()
    main.tell_change("the database", was_away, error)
    texts = (
        "{level} {message}: {reason}".format_map({"reason": None} | line)
        for line in logged(capsys)
    )
    assert list(texts) == told


# --- Errors ---------------------------------------------------------------------------


FAILURES = {
    "crash": RuntimeError("hunter2"),
    "fault-in-the-sql": sa.exc.IntegrityError("", {}, Exception("hunter2")),
    "full-pool": TimeoutError("hunter2"),
    "no-connection": sa.exc.OperationalError("", {}, Exception("hunter2")),
    "lost-connection": sa.exc.DBAPIError("", {}, Exception("hunter2"), False, True),
    "deleted-meanwhile": StaleDataError(),
    "forbidden": HTTPException(403),
    "teapot": HTTPException(418, "short and stout"),
}
WRITING = ["POST", "PUT", "PATCH", "DELETE"]


@cache
def failing_app() -> FastAPI:
    """An app two of whose routes fail, each in its way."""
    app = main.create_app(make_settings(MAX_BODY_BYTES=1000))

    async def fail(name: str) -> None:
        raise FAILURES[name]

    async def leave_half_done(db: main.SessionDep) -> None:
        db.add(main.User(username="eve", password_hash=""))
        await db.flush()
        raise RuntimeError

    app.add_api_route("/api/v1/fail/{name}", fail)
    app.add_api_route("/api/v1/half-done", leave_half_done, methods=WRITING)
    return app


@pytest.fixture
async def failing() -> AsyncIterator[Api]:
    app = failing_app()
    async with app.router.lifespan_context(app), logged_in(app) as api:
        yield api


REQUESTS = {
    "malformed-form": (
        *("POST", "/auth/token", 400, "bad_request"),
        {"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}},
    ),
    "bad-token": (
        *("GET", "/users/me", 401, "unauthorized"),
        {"headers": {"Authorization": "Bearer x"}},
    ),
    "wrong-password": (
        *("PATCH", "/users/me", 403, "forbidden"),
        {"json": {"current_password": "x", "new_password": PASSWORD}},
    ),
    "of-a-route": ("GET", "/fail/forbidden", 403, "forbidden", {}),
    "unknown-path": ("GET", "/nowhere", 404, "not_found", {}),
    "outside-of-the-prefix": ("GET", "/../../nowhere", 404, "not_found", {}),
    "trailing-slash": ("GET", "/items/", 404, "not_found", {}),
    "unknown-item": ("GET", "/items/7", 404, "not_found", {}),
    "unknown-user": ("GET", "/users/7", 404, "not_found", {}),
    "wrong-method": ("PUT", "/items", 405, "method_not_allowed", {}),
    "taken-name": (
        *("POST", "/users", 409, "conflict"),
        {"json": {"username": "ada", "password": PASSWORD}},
    ),
    "large-body": (
        *("POST", "/items", 413, "payload_too_large"),
        {"json": {"title": "x" * 1000}},
    ),
    "bad-body": ("POST", "/items", 422, "validation_error", {"json": {}}),
    "deleted-meanwhile": ("GET", "/fail/deleted-meanwhile", 404, "not_found", {}),
    "crash": ("GET", "/fail/crash", 500, "internal_error", {}),
    "fault-in-the-sql": ("GET", "/fail/fault-in-the-sql", 500, "internal_error", {}),
    "full-pool": ("GET", "/fail/full-pool", 503, "service_unavailable", {}),
    "no-connection": ("GET", "/fail/no-connection", 503, "service_unavailable", {}),
    "lost-connection": ("GET", "/fail/lost-connection", 503, "service_unavailable", {}),
}


@cases("method, path, status, slug, sent", REQUESTS)
async def test_an_error_has_its_status_and_the_one_form(
    method: str, path: str, status: int, slug: str, sent: Any, failing: Api
) -> None:
    response = await failing.request(method, path, **sent)
    assert (response.status_code, error_of(response)["error"]) == (status, slug)


async def test_a_status_that_has_no_row_keeps_its_own_text(failing: Api) -> None:
    body = (await failing.get("/fail/teapot")).json()
    assert (body["error"], body["message"]) == ("http_418", "short and stout")


@pytest.mark.parametrize(
    "path", ["/fail/crash", "/fail/fault-in-the-sql", "/fail/full-pool"]
)
async def test_a_failure_tells_nothing_of_the_inside(path: str, failing: Api) -> None:
    body = error_of(await failing.get(path))
    assert body["details"] is None
    assert body["message"] in {main.USUAL[500][1], main.USUAL[503][1]}


async def test_an_error_names_the_request_as_its_client_does(ada: Api) -> None:
    response = await ada.get("/nowhere", headers={"X-Request-ID": "my-own.id_1"})
    assert error_of(response)["request_id"] == "my-own.id_1"


async def test_a_crash_is_logged_with_its_traceback(
    failing: Api, log_as: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    log_as()
    response = await failing.get("/fail/crash")
    (line,) = logged(capsys)
    assert line["exception"].endswith("RuntimeError: hunter2")
    assert line["request_id"] == error_of(response)["request_id"]


async def test_what_takes_too_long_is_a_504() -> None:
    app = main.create_app(make_settings(REQUEST_TIMEOUT_SECONDS=0.01))
    app.add_api_route("/api/v1/slow", asyncio.Event().wait)
    async with client_of(app) as api:
        response = await api.get("/slow")
    assert (response.status_code, error_of(response)["error"]) == (504, "timeout")


async def test_a_wrong_method_is_told_the_right_ones(ada: Api) -> None:
    assert (await ada.put("/users")).headers["Allow"] in {"GET", "POST", "GET, POST"}


@pytest.mark.parametrize("path", ["/fail/full-pool", "/fail/lost-connection"])
async def test_who_meets_an_outage_is_told_to_retry(path: str, failing: Api) -> None:
    assert (await failing.get(path)).headers["Retry-After"] == "1"


async def test_an_outage_in_a_request_makes_the_watch_look(failing: Api) -> None:
    await failing.get("/fail/full-pool")
    assert failing_app().state.database.suspect.is_set()


CHALLENGES = {
    "no-token": ({"Authorization": ""}, "Bearer"),
    "another-scheme": ({"Authorization": "Basic YTpi"}, "Bearer"),
    "a-bad-token": ({"Authorization": "Bearer x"}, 'Bearer error="invalid_token"'),
}


@cases("headers, challenge", CHALLENGES)
async def test_a_401_speaks_of_a_token_only_where_one_came(
    headers: dict[str, str], challenge: str, ada: Api
) -> None:
    response = await ada.get("/users/me", headers=headers)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == challenge


async def test_a_failed_login_has_a_challenge_without_an_error(ada: Api) -> None:
    form = {"username": "nobody", "password": PASSWORD}
    response = await ada.post("/auth/token", data=form)
    assert response.headers["WWW-Authenticate"] == "Bearer"


async def test_a_detail_says_where_what_and_which(ada: Api) -> None:
    response = await ada.post("/items", json={"title": "", "description": None})
    message = "String should have at least 1 character"
    (detail,) = error_of(response)["details"]
    assert detail == {
        "field": "body.title",
        "message": message,
        "type": "string_too_short",
    }


INVALID: dict[str, tuple[str, str, Any]] = {
    "password": (
        *("POST", "/users"),
        {"json": {"username": "eve", "password": "hunter2"}},
    ),
    "two-passwords": (
        *("PATCH", "/users/me"),
        {"json": {"current_password": ["hunter2"], "new_password": "hunter2"}},
    ),
    "password-of-a-login": (
        *("POST", "/auth/token"),
        {"data": {"password": "hunter2" * 200}},
    ),
    "unknown-field": ("POST", "/items", {"json": {"title": "x", "unknown": "hunter2"}}),
    "query": ("GET", "/items?limit=hunter2", {}),
    "path": ("GET", "/items/hunter2", {}),
    "body-that-is-no-object": ("POST", "/items", {"json": "hunter2"}),
    "body-that-is-no-json": ("POST", "/items", {"content": b"hunter2"}),
}


@cases("method, path, sent", INVALID)
async def test_a_detail_never_echoes_what_was_sent(
    method: str, path: str, sent: Any, ada: Api
) -> None:
    response = await ada.request(method, path, **sent)
    assert error_of(response)["error"] == "validation_error"
    assert "hunter2" not in response.text


@pytest.mark.parametrize(("unknown", "told"), [(99, 99), (100, 100), (101, 100)])
async def test_there_are_at_most_a_hundred_details(
    unknown: int, told: int, ada: Api
) -> None:
    fields = {"title": "x"} | {f"field{n}": n for n in range(unknown)}
    response = await ada.post("/items", json=fields)
    assert len(error_of(response)["details"]) == told


async def test_an_unknown_field_is_named_whatever_its_name(ada: Api) -> None:
    response = await ada.post("/items", json={"title": "x", "\u00e9\n": 1})
    assert error_of(response)["details"][0]["field"] == "body.\u00e9\n"


# --- Database -------------------------------------------------------------------------


def count_of(table: type[main.Base]) -> sa.Select[int]:
    return sa.select(sa.func.count()).select_from(table)


async def test_tables_are_made_once_by_all_who_start_together(
    database_url: str,
) -> None:
    settings = make_settings(DATABASE_URL=database_url)
    databases = [main.Database(settings) for _ in range(8)]
    await asyncio.gather(*(database.make_tables() for database in databases))
    assert all([await database.answers() for database in databases])
    for database in databases:
        await close(database)


def start_with_others(database_url: str, barrier: Any) -> None:
    """What a worker does, in a process of its own."""

    async def start() -> None:
        database = main.Database(make_settings(DATABASE_URL=database_url))
        barrier.wait(10)
        await database.make_tables()
        await close(database)

    asyncio.run(start())


def test_tables_are_made_once_by_all_processes(database_url: str) -> None:
    processes = multiprocessing.get_context("fork")
    barrier = processes.Barrier(4)
    workers = [
        processes.Process(target=start_with_others, args=(database_url, barrier))
        for _ in range(4)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other tests had threads
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4


async def test_what_is_there_outlives_another_start(database: main.Database) -> None:
    await add_user(database)
    await database.make_tables()
    async with database.reader() as db:
        assert await db.scalar(count_of(main.User)) == 1


async def test_the_id_of_who_has_gone_is_not_given_again(
    database: main.Database,
) -> None:
    gone = await add_user(database)
    async with database.writer() as db:
        await main.discard_user(db, gone)
    assert (await add_user(database)).id > gone.id


async def test_items_go_with_their_owner(database: main.Database) -> None:
    owner = await add_user(database)
    async with database.writer() as db:
        await main.create_item(db, owner, main.ItemIn(title="x"))
        await main.discard_user(db, owner)
        assert await db.scalar(count_of(main.Item)) == 0


async def test_items_are_found_by_their_owner(database: main.Database) -> None:
    async with engine_of(database.reader).connect() as connection:
        indexes = await connection.run_sync(
            lambda c: sa.inspect(c).get_indexes(main.Item.__tablename__)
        )
    assert [index["column_names"] for index in indexes] == [["owner_id", "id"]]


async def test_ids_have_64_bits(database: main.Database) -> None:
    async with database.writer() as db:
        db.add(main.User(id=main.MAX_ID, username="last", password_hash=""))
        await db.commit()
        assert await main.read_user(db, 2**63 - 1)


@pytest.mark.parametrize("method", WRITING)
async def test_what_a_failing_route_has_written_is_undone(
    method: str, failing: Api
) -> None:
    response = await failing.request(method, "/half-done")
    assert response.status_code == 500
    users = (await failing.get("/users")).json()["users"]
    assert [user["username"] for user in users] == ["ada"]


async def test_a_read_does_not_wait_for_a_writer(ada: Api, opened: FastAPI) -> None:
    async with opened.state.database.writer() as db:
        await db.execute(sa.update(main.User).values(username="eve"))
        response = await ada.get("/users/me")
    assert response.json()["username"] == "ada"


async def test_a_reader_sees_what_is_committed_between_its_reads(
    database: main.Database,
) -> None:
    async with database.reader() as db:
        before = await db.scalar(count_of(main.User))
        await add_user(database)
        assert (before, await db.scalar(count_of(main.User))) == (0, 1)


async def test_a_reader_on_postgresql_is_in_no_transaction(postgres_url: str) -> None:
    database = main.Database(make_settings(DATABASE_URL=postgres_url))
    async with database.reader() as db:
        await db.execute(sa.text("SELECT 1"))
        query = sa.text("SELECT now() = statement_timestamp()")
        assert await db.scalar(query)
    await close(database)


async def test_writers_wait_for_each_other(database: main.Database) -> None:
    """A write that was read before it is not lost."""
    user = await add_user(database)

    async def count_up() -> None:
        async with database.writer() as db:
            query = sa.select(main.User).where(main.User.id == user.id)
            row = (await db.scalars(query.with_for_update())).one()
            row.token_version += 1
            await db.commit()

    await asyncio.gather(*(count_up() for _ in range(10)))
    async with database.reader() as db:
        assert (await main.read_user(db, user.id)).token_version == 10


PRAGMAS = {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 5000}


@pytest.mark.parametrize(("pragma", "value"), PRAGMAS.items(), ids=PRAGMAS.keys())
@pytest.mark.parametrize("session", ["reader", "writer"])
async def test_each_sqlite_connection_is_prepared(
    session: str, pragma: str, value: Any
) -> None:
    database = main.Database(make_settings())
    async with getattr(database, session)() as db:
        assert await db.scalar(sa.text(f"PRAGMA {pragma}")) == value
    await close(database)


async def test_an_error_of_the_database_does_not_show_parameters(
    database: main.Database,
) -> None:
    await add_user(database, "somebody", "hunter2")
    with pytest.raises(sa.exc.IntegrityError) as error:
        await add_user(database, "somebody", "hunter2")
    assert "hunter2" not in str(error.value)


@asynccontextmanager
async def small_pool(patience_seconds: float = 5) -> AsyncIterator[AsyncEngine]:
    """One connection for all."""
    url = "sqlite+aiosqlite:///./small.db"
    engine = create_async_engine(url, poolclass=main.FairPool, pool_size=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(main, "PATIENCE_SECONDS", patience_seconds)
        yield engine
    await engine.dispose()


async def let_others_run() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_who_waits_for_a_connection_is_served_in_turn() -> None:
    served: list[int] = []
    async with small_pool() as engine, asyncio.TaskGroup() as clients:

        async def ask(number: int) -> None:
            async with engine.connect():
                served.append(number)

        async with engine.connect():
            for number in range(5):
                clients.create_task(ask(number))
            await let_others_run()
        await ask(5)
    assert served == [0, 1, 2, 3, 4, 5]


async def test_who_waits_in_vain_is_told_so() -> None:
    async with small_pool(patience_seconds=0.01) as engine, engine.connect():
        with pytest.raises(TimeoutError):
            await engine.connect()


async def test_who_waits_in_vain_takes_no_turn() -> None:
    async with small_pool(patience_seconds=0.01) as engine:
        async with engine.connect():
            with pytest.raises(TimeoutError):
                await engine.connect()
        async with engine.connect() as connection:
            assert await connection.scalar(sa.text("SELECT 1")) == 1


async def test_who_cannot_connect_takes_no_turn() -> None:
    async with small_pool(patience_seconds=0.01) as engine:
        os.mkdir("small.db")
        with pytest.raises(sa.exc.OperationalError):
            await engine.connect()
        os.rmdir("small.db")
        async with engine.connect() as connection:
            assert await connection.scalar(sa.text("SELECT 1")) == 1
    await see_threads_end()


async def test_as_many_are_served_at_once_as_the_settings_say() -> None:
    settings = make_settings(DATABASE_POOL_SIZE=2, DATABASE_MAX_OVERFLOW=1)
    database = main.Database(settings)
    engine = engine_of(database.reader)
    connections = [await engine.connect() for _ in range(3)]
    waiting = asyncio.create_task(engine.connect().start())
    await let_others_run()
    assert not waiting.done()
    for connection in connections:
        await connection.close()
    await (await waiting).close()
    await close(database)


async def use_at_once(database: main.Database, count: int) -> None:
    """As many connections as that."""
    async with AsyncExitStack() as stack:
        for _ in range(count):
            db = await stack.enter_async_context(database.reader())
            await soon(db.execute(sa.text("SELECT 1")))


async def test_the_watch_closes_what_has_been_idle_beyond_the_size(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "RETRY_SECONDS", 0)
    monkeypatch.setattr(main, "LOOK_SECONDS", 0)
    size = {"DATABASE_POOL_SIZE": 2, "DATABASE_MAX_OVERFLOW": 3}
    database = main.Database(make_settings(DATABASE_URL=database_url, **size))
    await use_at_once(database, 5)
    assert database.reading.pool.checkedin() == 5
    watch = asyncio.create_task(database.watch())
    async with asyncio.timeout(5):
        while database.reading.pool.checkedin() != 2:
            await asyncio.sleep(0)
        database.suspect.set()
        while database.suspect.is_set():  # until it looks for another time
            await asyncio.sleep(0)
    watch.cancel()
    await asyncio.wait({watch})
    await use_at_once(database, 5)  # what was closed has left its place
    await close(database)


async def test_a_full_pool_is_a_503_for_who_has_waited_in_vain(app: FastAPI) -> None:
    async with small_pool(patience_seconds=0.01) as engine, engine.connect():

        async def get_session() -> AsyncIterator[AsyncSession]:
            async with AsyncSession(engine) as session:
                yield session

        app.dependency_overrides[main.get_session] = get_session
        token = app.state.tokens.issue(main.User(id=1, token_version=0))
        async with client_of(app) as api:
            api.use(token)
            response = await api.get("/users/me")
    assert (response.status_code, error_of(response)["error"]) == (
        *(503, "service_unavailable"),
    )


@pytest.fixture
async def narrow() -> AsyncIterator[Api]:
    """A client of an app with one connection."""
    app = built_app()
    usual, app.state.settings = app.state.settings, make_settings(**ONE_CONNECTION)
    async with app.router.lifespan_context(app), logged_in(app) as api:
        yield api
    app.state.settings = usual


ONE_CONNECTION = {"DATABASE_POOL_SIZE": 1, "DATABASE_MAX_OVERFLOW": 0}


@pytest.fixture
def collected() -> Iterator[None]:
    yield
    gc.collect()


# aiosqlite leaves what it was cancelled in opening to the collector, and since Python
# 3.13 sqlite3 complains of that.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_cancelled_request_gives_a_clean_connection_back(
    method: str, narrow: Api
) -> None:
    for steps in range(25):
        request = narrow.request(method, "/items", json={"title": "x"})
        task = asyncio.create_task(request)
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
    assert (await narrow.post("/items", json={"title": "x"})).status_code == 201


@pytest.fixture
async def missing(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    """A client of an app whose database is away."""
    app, url = built_app(), "sqlite:///./no-such-folder/app.db"
    database = main.Database(make_settings(DATABASE_URL=url))
    monkeypatch.setattr(app.state, "database", database, raising=False)
    async with client_of(app) as api:
        api.use(app.state.tokens.issue(main.User(id=1, token_version=0)))
        yield api
    await close(database)
    await see_threads_end()


async def test_a_missing_database_is_a_503_in_the_one_form(missing: Api) -> None:
    response = await missing.get("/users/me")
    assert (response.status_code, error_of(response)["error"]) == (
        *(503, "service_unavailable"),
    )


async def test_without_a_database_the_service_is_alive(missing: Api) -> None:
    response = await missing.get("http://test/health/live")
    assert (response.status_code, response.json()) == (200, {"status": "alive"})


async def test_without_a_database_the_service_is_not_ready(missing: Api) -> None:
    response = await missing.get("http://test/health/ready")
    assert (response.status_code, response.json()) == (503, {"status": "not_ready"})


class Attempts:
    """Counts a database's attempts to connect, and says when there have been enough."""

    def __init__(self, database: main.Database, enough: int) -> None:
        self.left, self.done = enough, asyncio.Event()
        sa.event.listen(
            engine_of(database.writer).sync_engine, "do_connect", self.count
        )

    def count(self, *_: Any) -> None:
        self.left -= 1
        if self.left <= 0:
            self.done.set()


@asynccontextmanager
async def watched(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[main.Database]:
    """A database that is away, and watched without a pause."""
    monkeypatch.setattr(main, "RETRY_SECONDS", 0)
    url = "sqlite:///./no-such-folder/app.db"
    database = main.Database(make_settings(DATABASE_URL=url))
    watch = asyncio.create_task(database.watch())
    yield database
    Path("no-such-folder").mkdir(exist_ok=True)
    await soon(database.up.wait())
    watch.cancel()
    await close(database)
    await see_threads_end()


async def test_a_database_that_is_away_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch,
    log_as: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_as()
    async with watched(monkeypatch) as database:
        await soon(Attempts(database, 4).done.wait())
        lines = [(line["level"], line["message"]) for line in logged(capsys)]
    assert lines == [("WARNING", "the database is away")]


async def test_a_database_that_comes_is_made_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with watched(monkeypatch) as database:
        await soon(Attempts(database, 2).done.wait())
        Path("no-such-folder").mkdir()
        await soon(database.up.wait())
        assert await database.answers()


async def test_a_database_that_comes_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch,
    log_as: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_as()
    async with watched(monkeypatch) as database:
        await soon(Attempts(database, 2).done.wait())
        Path("no-such-folder").mkdir()
        await soon(database.up.wait())
    messages = [line["message"] for line in logged(capsys)]
    assert messages == ["the database is away", "the database is back"]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch makes no pause; named before what opens the app."""
    monkeypatch.setattr(main, "RETRY_SECONDS", 0)


async def test_a_database_that_has_lost_its_tables_gets_them_again(
    hasty: None, ada: Api, opened: FastAPI
) -> None:
    database: main.Database = opened.state.database
    async with engine_of(database.writer).begin() as connection:
        await connection.run_sync(main.Base.metadata.drop_all)
    assert (await ada.get("http://test/health/ready")).status_code == 503
    async with asyncio.timeout(5):
        while not await database.answers():
            await database.up.wait()


async def test_checks_that_come_together_are_one(database: main.Database) -> None:
    checkouts: list[Any] = []
    pool = engine_of(database.reader).sync_engine.pool
    sa.event.listen(pool, "checkout", lambda *each: checkouts.append(each))
    assert all(await asyncio.gather(*(database.answers() for _ in range(10))))
    assert len(checkouts) == 1


async def test_a_password_of_the_database_stays_out_of_the_log(
    log_as: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    log_as()
    url = "postgresql://ada:hunter2@127.0.0.1:1/items"
    database = main.Database(make_settings(DATABASE_URL=url))
    watch = asyncio.create_task(database.watch())
    async with asyncio.timeout(5):
        while not (out := capsys.readouterr().out):
            await asyncio.sleep(0)
    watch.cancel()
    await asyncio.wait({watch})
    assert "the database is away" in out
    assert "hunter2" not in out


ADMIT_NOBODY = "ALTER DATABASE {name} ALLOW_CONNECTIONS false"
END_ALL = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
)


def tell_server(postgres_url: str, *queries: str) -> None:
    url = sa.make_url(postgres_url)
    server = url.set(database="postgres").render_as_string(hide_password=False)
    with psycopg.connect(server, autocommit=True) as connection:
        for query in queries:
            connection.execute(query.format(name=url.database).encode())


async def test_a_connection_that_postgresql_has_ended_is_not_used(
    postgres_url: str,
) -> None:
    database = main.Database(make_settings(DATABASE_URL=postgres_url))
    await database.make_tables()
    tell_server(postgres_url, END_ALL)
    async with database.reader() as db:
        assert await db.scalar(count_of(main.User)) == 0
    await close(database)


async def test_a_connection_that_postgresql_ends_in_a_request_is_a_503(
    postgres_url: str,
) -> None:
    app = main.create_app(make_settings(DATABASE_URL=postgres_url))

    async def break_off(db: main.SessionDep) -> None:
        await db.execute(sa.text("SELECT 1"))
        tell_server(postgres_url, END_ALL)
        await db.execute(sa.text("SELECT 1"))

    app.add_api_route("/break-off", break_off)
    async with app.router.lifespan_context(app), client_of(app) as api:
        response = await api.get("http://test/break-off")
    assert error_of(response)["error"] == "service_unavailable"


@asynccontextmanager
async def watched_postgres(
    url: str, patience: float, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[main.Database]:
    """A database whose watch looks all the time, and hangs up soon."""
    monkeypatch.setattr(main, "PATIENCE_SECONDS", patience)
    monkeypatch.setattr(main, "RETRY_SECONDS", 0)
    monkeypatch.setattr(main, "LOOK_SECONDS", 0)
    database = main.Database(make_settings(DATABASE_URL=url, **ONE_CONNECTION))
    await database.make_tables()
    watch = asyncio.create_task(database.watch())
    yield database
    watch.cancel()
    await asyncio.wait({watch})
    await close(database)


async def test_the_watch_waits_in_no_line(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = watched_postgres(postgres_url, 5, monkeypatch)
    async with watched as database, database.reader() as db:
        await db.execute(sa.text("SELECT 1"))  # on the only connection of requests
        database.up.clear()
        await soon(database.up.wait())


async def test_the_watch_looks_though_nothing_is_suspect(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched_postgres(postgres_url, 5, monkeypatch) as database:
        async with engine_of(database.writer).begin() as connection:
            await connection.run_sync(main.Base.metadata.drop_all)
        async with asyncio.timeout(5), database.reader() as db:
            while not await db.scalar(sa.text("SELECT to_regclass('items')")):
                await asyncio.sleep(0)


SLEEP = sa.text("SELECT pg_sleep(60)")


async def test_who_waits_for_a_silent_server_is_told_so(postgres_url: str) -> None:
    database = main.Database(make_settings(DATABASE_URL=postgres_url))
    async with database.reader() as db:
        await db.execute(sa.text("SELECT 1"))
        waiting = asyncio.create_task(db.execute(SLEEP))
        await asyncio.sleep(0)
        database.hang_up()
        with pytest.raises(sa.exc.OperationalError):
            await soon(waiting)
    await close(database)


async def test_who_hangs_up_does_not_use_the_idle_connections_either(
    postgres_url: str,
) -> None:
    database = main.Database(make_settings(DATABASE_URL=postgres_url))
    for _ in range(2):
        async with database.reader() as db:
            assert await db.scalar(sa.text("SELECT 1")) == 1
        database.hang_up()
    await close(database)


class Network:
    """Between a service and its database; cut, it swallows what is sent."""

    def __init__(self, url: str) -> None:
        self.there, self.open = sa.make_url(url), asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        self.sinks: list[asyncio.StreamWriter] = []
        self.open.set()

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        host, port = self.server.sockets[0].getsockname()
        self.url = self.there.set(host=host, port=port).render_as_string(False)
        return self

    async def connect(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self.open.wait()
        answers, requests = await asyncio.open_connection(
            self.there.host, self.there.port or 5432
        )
        self.sinks += requests, writer
        for source, sink in ((reader, requests), (answers, writer)):
            self.tasks.add(asyncio.create_task(self.forward(source, sink)))

    async def forward(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while sent := await source.read(65536):
                await self.open.wait()
                sink.write(sent)
        sink.close()

    async def __aexit__(self, *error: object) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        for sink in self.sinks:
            sink.close()
        endings = [sink.wait_closed() for sink in self.sinks]
        await asyncio.gather(*self.tasks, *endings, return_exceptions=True)


async def test_the_watch_hangs_up_on_a_silent_server(
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
    log_as: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_as()
    monkeypatch.setattr(main, "CHECK_SECONDS", 0.1)
    async with (
        Network(postgres_url) as network,
        watched_postgres(network.url, 0.2, monkeypatch) as database,
    ):
        await soon(database.up.wait())
        async with database.reader() as db:
            await db.execute(sa.text("SELECT 1"))
            waiting = asyncio.create_task(db.execute(SLEEP))
            network.open.clear()
            with pytest.raises(sa.exc.OperationalError):
                await soon(waiting)
        async with asyncio.timeout(5):
            while database.up.is_set():
                await asyncio.sleep(0)
        network.open.set()
        await soon(database.up.wait())
        async with asyncio.timeout(5):
            while len(told := logged(capsys)) < 2:
                await asyncio.sleep(0)
    assert [(line["message"], line.get("reason")) for line in told][:1] == [
        ("the database is away", "no answer in time"),
    ]


async def test_a_lock_that_requests_do_not_need_is_no_outage(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[bool] = []
    async with watched_postgres(postgres_url, 0.2, monkeypatch) as database:
        await soon(database.up.wait())
        with psycopg.connect(postgres_url) as other:
            other.execute("SELECT pg_advisory_xact_lock(7411)")
            sa.event.listen(
                database.alone.pool,
                "checkout",
                lambda *_: states.append(database.up.is_set()),
            )
            async with asyncio.timeout(5):
                while len(states) < 4:
                    await asyncio.sleep(0)
    assert all(states)


async def test_the_watch_waits_for_a_lock_for_less_than_its_patience(
    postgres_url: str,
) -> None:
    database = main.Database(make_settings(DATABASE_URL=postgres_url))
    with psycopg.connect(postgres_url) as other:
        other.execute("SELECT pg_advisory_xact_lock(7411)")
        async with asyncio.timeout(main.PATIENCE_SECONDS):
            with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
                await database.make_tables()
    await close(database)


async def test_what_a_vanished_host_has_locked_is_free_after_a_minute(
    postgres_url: str,
) -> None:
    database = main.Database(make_settings(DATABASE_URL=postgres_url))
    async with database.writer() as db:
        setting = sa.text("SHOW idle_in_transaction_session_timeout")
        assert await db.scalar(setting) == "1min"
    await close(database)


async def test_an_idle_connection_is_kept_alive_and_a_dead_one_noticed(
    postgres_url: str,
) -> None:
    database = main.Database(make_settings(DATABASE_URL=postgres_url))
    async with database.reader() as db:
        await db.execute(sa.text("SELECT 1"))
        (connection,) = database.connections
        options = {o.keyword.decode(): o.val for o in connection.pgconn.info}
    assert options["keepalives_idle"] == b"60"
    assert options["tcp_user_timeout"] == b"5000"
    await close(database)


async def test_of_two_who_delete_an_item_at_once_neither_fails(
    database: main.Database,
) -> None:
    user = await add_user(database)
    await add_items(database, user, "tea")
    async with database.reader() as one, database.reader() as two:
        for db in (one, two):
            await db.delete(await main.read_item(db, user, 1))
        await one.commit()
        await two.commit()
    async with database.reader() as db:
        assert await db.scalar(count_of(main.Item)) == 0


async def test_a_change_of_what_is_deleted_meanwhile_is_noticed(
    database: main.Database,
) -> None:
    user = await add_user(database)
    await add_items(database, user, "tea")
    async with database.reader() as one, database.reader() as two:
        (await main.read_item(one, user, 1)).title = "coffee"
        await main.discard_item(two, user, 1)
        with pytest.raises(StaleDataError):
            await one.commit()


async def test_a_postgresql_that_lets_nobody_in_is_a_503(postgres_url: str) -> None:
    app = main.create_app(make_settings(DATABASE_URL=postgres_url))
    async with app.router.lifespan_context(app), logged_in(app) as api:
        tell_server(postgres_url, ADMIT_NOBODY, END_ALL)
        response = await api.get("/users/me")
    assert error_of(response)["error"] == "service_unavailable"


# --- Schemas --------------------------------------------------------------------------

DEEP = b"[" * 100_000 + b"]" * 100_000
HOSTILE_JSON = {
    "nothing": b"",
    "null": b"null",
    "a-number": b"42",
    "a-list": b"[]",
    "cut-off": b'{"title": "x',
    "two-values": b'{"title": "x"} {}',
    "nul": rb'{"title": "a\u0000b"}',
    "raw-nul": b'{"title": "a\x00b"}',
    "lone-surrogate": rb'{"title": "\ud800"}',
    "lone-surrogate-in-a-name": rb'{"title": "x", "\udfff": 1}',
    "nul-in-a-description": rb'{"title": "x", "description": "\u0000"}',
    "lone-surrogate-in-a-description": rb'{"title": "x", "description": "\ud800"}',
    "not-utf-8": b'{"title": "\xff"}',
    "lone-surrogate-in-utf-8": b'{"title": "\xed\xa0\x80"}',
    "lone-surrogate-in-utf-16": '{"title": "\ud800"}'.encode("utf-16", "surrogatepass"),
    "nan": b'{"title": NaN}',
    "infinity": b'{"title": -Infinity}',
    "nan-in-an-unknown-field": b'{"title": "x", "more": NaN}',
    "integer-beyond-64-bits": b'{"title": 18446744073709551616}',
    "integer-of-5000-digits": b'{"title": %s}' % (b"9" * 5000),
    "number-beyond-a-double": b'{"title": 1e999}',
    "deep": DEEP,
    "deep-in-a-field": b'{"title": %s}' % DEEP,
    "deep-in-an-unknown-field": b'{"title": "x", "more": %s}' % DEEP,
    "deep-objects": b'{"title":' * 50_000 + b"1" + b"}" * 50_000,
}


BODIES = [
    ("POST", "/users"),
    ("PATCH", "/users/me"),
    ("POST", "/items"),
    ("PATCH", "/items/1"),
]


@cases("content", HOSTILE_JSON)
async def test_hostile_json_is_refused(content: bytes, ada: Api) -> None:
    headers = {"Content-Type": "application/json"}
    for method, path in BODIES:
        response = await ada.request(method, path, content=content, headers=headers)
        assert error_of(response)["error"] in {"bad_request", "validation_error"}


OTHER_CONTENT_TYPES = {
    "none": "",
    "text": "text/plain",
    "form": "application/x-www-form-urlencoded",
    "multipart-without-boundary": "multipart/form-data",
    "not-ascii": "application/json\xff",
    "garbage": ";;;/",
}


@cases("content_type", OTHER_CONTENT_TYPES)
async def test_what_is_not_sent_as_json_is_refused(content_type: str, ada: Api) -> None:
    headers = {b"Content-Type": content_type.encode("latin-1")}
    response = await ada.post("/items", content=b'{"title": "x"}', headers=headers)
    assert response.status_code == 422
    assert error_of(response)


HOSTILE_TEXTS = {
    "nul": "%00",
    "lone-surrogate": "%ED%A0%80",
    "not-utf-8": "%FF",
    "beyond-64-bits": "9223372036854775808",
    "below-64-bits": "-9223372036854775809",
    "5000-digits": "9" * 5000,
    "negative": "-1",
    "nan": "NaN",
    "infinity": "Infinity",
    "fraction": "1.5",
    "exponent": "1e400",
    "empty-list": "[]",
    "newline": "a%0A%0D",
    "deep": "[" * 5000,
}
hostile_texts = cases("text", HOSTILE_TEXTS)


@hostile_texts
async def test_hostile_text_in_a_path_is_refused(text: str, ada: Api) -> None:
    for parent in ("/users/", "/items/"):
        (detail,) = error_of(await ada.get(parent + text))["details"]
        assert detail["field"].startswith("path.")


@hostile_texts
async def test_hostile_text_in_a_query_is_refused(text: str, ada: Api) -> None:
    for path in ("/users", "/items"):
        response = await ada.get(f"{path}?after={text}&limit={text}")
        fields = [detail["field"] for detail in error_of(response)["details"]]
        assert fields in (["query.after", "query.limit"], ["query.limit"])


@pytest.mark.parametrize("query", ["%00=%FF&%ED%A0%80=%", "&&==&"])
async def test_hostile_text_in_the_rest_of_a_query_is_ignored(
    query: str, ada: Api
) -> None:
    assert (await ada.get(f"/items?{query}")).status_code == 200


FORM = "application/x-www-form-urlencoded"
HOSTILE_FORMS = {
    "nothing": (FORM, b""),
    "nul-in-a-name": (FORM, b"username=a%00b&password=x"),
    "long-name": (FORM, b"username=" + b"a" * 1025 + b"&password=x"),
    "long-password": (FORM, b"username=ada&password=" + b"a" * 1025),
    "no-password": (FORM, b"username=ada"),
    "another-grant": (FORM, b"grant_type=implicit&username=ada&password=x"),
    "json": ("application/json", b'{"username": "ada", "password": "x"}'),
    "no-type": ("", b"username=ada&password=x"),
    "too-many-fields": (FORM, b"&".join(b"%d=" % n for n in range(1001))),
    "no-boundary": ("multipart/form-data", b"--x"),
    "wrong-boundary": ("multipart/form-data; boundary=y", b"--x\r\n"),
    "a-file-for-a-name": (
        "multipart/form-data; boundary=x",
        b"--x\r\nContent-Disposition: form-data; name=username; filename=f\r\n\r\n"
        + b"ada\r\n--x\r\nContent-Disposition: form-data; name=password\r\n\r\n"
        + b"x\r\n--x--\r\n",
    ),
    "a-part-without-name": (
        "multipart/form-data; boundary=x",
        b"--x\r\nContent-Disposition: form-data\r\n\r\nada\r\n--x--\r\n",
    ),
}


@cases("content_type, content", HOSTILE_FORMS)
async def test_a_hostile_form_is_refused(
    content_type: str, content: bytes, ada: Api
) -> None:
    headers = {"Content-Type": content_type}
    response = await ada.post("/auth/token", content=content, headers=headers)
    assert response.status_code in {400, 422}
    assert error_of(response)


UNKNOWN_LOGINS = {
    "lone-surrogate-in-a-name": b"username=%ED%A0%80&password=x",
    "raw-bytes-in-a-name": b"username=\xff\xfe&password=x",
    "lone-surrogate-in-a-password": b"username=ada&password=%ED%A0%80",
}


@cases("form", UNKNOWN_LOGINS)
async def test_hostile_credentials_are_wrong_credentials(form: bytes, ada: Api) -> None:
    headers = {"Content-Type": FORM}
    response = await ada.post("/auth/token", content=form, headers=headers)
    assert (response.status_code, error_of(response)["error"]) == (401, "unauthorized")


HOSTILE_HEADERS = {
    "request-id-not-ascii": {b"X-Request-ID": b"\xff"},
    "request-id-with-nul": {b"X-Request-ID": b"a\x00"},
    "request-id-with-newline": {b"X-Request-ID": b"a\n"},
    "request-id-too-long": {b"X-Request-ID": b"a" * 129},
    "origin-not-ascii": {b"Origin": b"\xff\x00"},
    "accept-not-ascii": {b"Accept": b"\xff"},
    "cookie-garbage": {b"Cookie": b"\xff=;\x00"},
    "forwarded-garbage": {b"X-Forwarded-For": b"\xff, \x00"},
}


@cases("headers", HOSTILE_HEADERS)
async def test_hostile_text_in_other_headers_is_ignored(
    headers: dict[bytes, bytes], ada: Api
) -> None:
    response = await ada.get("/items", headers=list(headers.items()))
    assert response.status_code == 200
    assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-ID"])


@pytest.mark.parametrize("method", ["TRACE", "FOO", "GET\xff", "\u00e9"])
async def test_an_unknown_method_is_refused(method: str, ada: Api) -> None:
    response = await ada.request(method, "/items")
    assert response.status_code == 405
    assert error_of(response)


BOUNDS: dict[str, tuple[type[pydantic.BaseModel], str, int, int]] = {
    "username": (main.UserIn, "username", 3, 32),
    "password": (main.UserIn, "password", 15, 128),
    "new-password": (main.PasswordChange, "new_password", 15, 128),
    "current-password": (main.PasswordChange, "current_password", 1, 1024),
    "title": (main.ItemIn, "title", 1, 200),
    "patched-title": (main.ItemPatch, "title", 1, 200),
    "description": (main.ItemIn, "description", 0, 2000),
    "patched-description": (main.ItemPatch, "description", 0, 2000),
}
VALID: dict[Any, dict[str, str]] = {
    main.UserIn: {"username": "ada", "password": PASSWORD},
    main.PasswordChange: {"current_password": "x", "new_password": PASSWORD},
    main.ItemIn: {"title": "x"},
    main.ItemPatch: {},
}
bounds = cases("schema, field, least, most", BOUNDS)


def lengths_accepted(schema: Any, field: str, lengths: list[int]) -> list[int]:
    def fits(length: int) -> bool:
        try:
            schema.model_validate(VALID[schema] | {field: "x" * length})
        except pydantic.ValidationError:
            return False
        return True

    return [length for length in lengths if length >= 0 and fits(length)]


@bounds
def test_what_is_as_short_as_may_be_is_accepted_and_no_shorter(
    schema: type[pydantic.BaseModel], field: str, least: int, most: int
) -> None:
    assert most > least
    assert lengths_accepted(schema, field, [least - 1, least]) == [least]


@bounds
def test_what_is_as_long_as_may_be_is_accepted_and_no_longer(
    schema: type[pydantic.BaseModel], field: str, least: int, most: int
) -> None:
    assert most > least
    assert lengths_accepted(schema, field, [most, most + 1]) == [most]


async def test_lengths_are_counted_in_characters(ada: Api) -> None:
    fields = {"title": "\U0001f600" * 200, "description": "\u00e9" * 2000}
    response = await ada.post("/items", json=fields)
    assert response.status_code == 201
    assert fields.items() <= response.json().items()


QUERIES = {
    "limit=0": 422,
    "limit=1": 200,
    "limit=100": 200,
    "limit=101": 422,
    "after=-1": 422,
    "after=0": 200,
    "after=9223372036854775807": 200,
    "after=9223372036854775808": 422,
}


@pytest.mark.parametrize(("query", "status"), QUERIES.items(), ids=QUERIES.keys())
async def test_a_page_has_bounds(query: str, status: int, ada: Api) -> None:
    answers = [await ada.get(f"{path}?{query}") for path in ("/users", "/items")]
    assert [answer.status_code for answer in answers] == [status, status]


IDS = {0: 422, 2: 404, 9223372036854775807: 404, 9223372036854775808: 422}


@pytest.mark.parametrize(("number", "status"), IDS.items())
async def test_an_id_has_64_bits_and_is_positive(
    number: int, status: int, ada: Api
) -> None:
    answers = [await ada.get(f"{path}/{number}") for path in ("/users", "/items")]
    assert [answer.status_code for answer in answers] == [status, status]


@pytest.mark.parametrize("username", ["ada", "0da", "a.b", "a_b", "a-b", "a..", "z9-"])
def test_a_username_may_have_these_characters(username: str) -> None:
    user = main.UserIn(username=username, password=PASSWORD)
    assert user.username == username


@pytest.mark.parametrize(
    "username",
    [
        ".ada",
        "_ada",
        "-ada",
        "a da",
        "ada\n",
        "\u00e4da",
        "a@b",
        "ad\u0130",
        "a/b",
        "aa\u212a",
    ],
    ids=ascii,
)
def test_a_username_may_have_no_others(username: str) -> None:
    with pytest.raises(pydantic.ValidationError):
        main.UserIn(username=username, password=PASSWORD)


async def test_a_username_is_lower_cased_when_it_is_made(opened: FastAPI) -> None:
    async with client_of(opened) as api:
        assert (await api.register("Ada.Z")).json()["username"] == "ada.z"


async def test_a_username_is_lower_cased_at_the_login(ada: Api) -> None:
    assert await ada.login("ADA")


@pytest.mark.parametrize(
    "password",
    ["\x00" * 15, " " * 7 + "\U0001f600" * 8],
    ids=["nul", "spaces-and-emoji"],
)
async def test_a_password_may_have_any_characters(
    password: str, database: main.Database
) -> None:
    fields = main.UserIn(username="eve", password=password)
    async with database.writer() as db:
        await main.register_user(db, fields)
        assert await main.authenticate_user(db, "eve", password)


@pytest.mark.parametrize("field", ["password", "current_password", "new_password"])
def test_a_password_has_no_lone_surrogates(field: str) -> None:
    schema = main.UserIn if field == "password" else main.PasswordChange
    with pytest.raises(pydantic.ValidationError) as error:
        schema.model_validate(VALID[schema] | {field: "\ud800" * 15})
    assert [fault["loc"] for fault in error.value.errors()] == [(field,)]


@pytest.mark.parametrize("schema", VALID, ids=lambda schema: schema.__name__)
def test_an_unknown_field_is_refused(schema: type[pydantic.BaseModel]) -> None:
    with pytest.raises(pydantic.ValidationError) as error:
        schema.model_validate(VALID[schema] | {"id": 7})
    assert [fault["type"] for fault in error.value.errors()] == ["extra_forbidden"]


@pytest.mark.parametrize("schema", [main.ItemIn, main.ItemPatch])
def test_a_title_may_not_be_null(schema: type[pydantic.BaseModel]) -> None:
    with pytest.raises(pydantic.ValidationError) as error:
        schema.model_validate({"title": None})
    assert [fault["loc"] for fault in error.value.errors()] == [("title",)]


async def test_a_patch_that_sets_the_title_to_null_is_refused(ada: Api) -> None:
    item_id = await ada.add_item("kept")
    response = await ada.patch(f"/items/{item_id}", json={"title": None})
    assert error_of(response)["details"][0]["field"] == "body.title"


TIMES = {
    "naive": datetime(2026, 1, 2, 3, 4, 5),
    "utc": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    "elsewhere": datetime(2026, 1, 2, 5, 4, 5, tzinfo=timezone(timedelta(hours=2))),
}


@cases("time", TIMES)
def test_a_time_is_written_in_utc_with_its_offset(time: datetime) -> None:
    user = main.UserOut(id=1, username="ada", created_at=time)
    assert json.loads(user.model_dump_json())["created_at"] == "2026-01-02T03:04:05Z"


async def test_a_time_that_is_read_is_the_one_that_was_written(
    database: main.Database,
) -> None:
    owner = await add_user(database)
    async with database.writer() as db:
        await db.execute(sa.text(ELSEWHERE[engine_of(database.writer).dialect.name]))
        item = await main.create_item(db, owner, main.ItemIn(title="x"))
        written = main.ItemOut.model_validate(item)
        db.expunge_all()
        read = await main.read_item(db, owner, item.id)
        assert main.ItemOut.model_validate(read) == written


ELSEWHERE = {
    "sqlite": "SELECT 1",
    "postgresql": "SET TIME ZONE 'Asia/Kolkata'",
}


async def test_a_time_is_the_present_one(ada: Api) -> None:
    before = datetime.now(UTC)
    item = (await ada.post("/items", json={"title": "x"})).json()
    created = datetime.fromisoformat(item["created_at"])
    assert before <= created <= datetime.now(UTC)
    assert item["updated_at"] == item["created_at"]


# --- Security -------------------------------------------------------------------------


def test_a_password_is_kept_as_argon2id_with_owasps_parameters() -> None:
    parameters = r"\$argon2id\$v=19\$m=19456,t=2,p=1\$"
    assert re.match(rf"{parameters}[\w+/]{{22,}}\$[\w+/]{{43,}}$", known_hash())


def test_the_same_password_has_two_hashes() -> None:
    assert main.PASSWORDS.hash(PASSWORD) != known_hash()


Work = TypeVar("Work")


class SlowHasher:
    """The real one, which begins when it is let, and knows how many are at work."""

    def __init__(self) -> None:
        self.begun, self.let = asyncio.Event(), threading.Event()
        self.loop, self.lock = asyncio.get_running_loop(), threading.Lock()
        self.at_work, self.most, self.known = 0, 0, [""]

    def verify_and_update(self, password: str, known: str) -> tuple[bool, str | None]:
        self.known = [*self.known, known]
        return self.wait_and(lambda: PASSWORDS.verify_and_update(password, known))

    def verify(self, password: str, known: str) -> bool:
        return self.verify_and_update(password, known)[0]

    def hash(self, password: str) -> str:
        return self.wait_and(lambda: PASSWORDS.hash(password))

    def wait_and(self, work: Callable[[], Work]) -> Work:
        with self.lock:
            self.at_work += 1
            self.most = max(self.most, self.at_work)
        self.loop.call_soon_threadsafe(self.begun.set)
        assert self.let.wait(5), "nobody could let it go on"
        try:
            return work()
        finally:
            with self.lock:
                self.at_work -= 1


PASSWORDS = main.PASSWORDS


@pytest.fixture
async def hasher(monkeypatch: pytest.MonkeyPatch) -> SlowHasher:
    hasher = SlowHasher()
    monkeypatch.setattr(main, "PASSWORDS", hasher)
    return hasher


HASHING = {
    "registration": (
        *("POST", "/users"),
        {"json": {"username": "eve", "password": PASSWORD}},
    ),
    "login": (
        *("POST", "/auth/token"),
        {"data": {"username": "ada", "password": PASSWORD}},
    ),
    "password-change": (
        *("PATCH", "/users/me"),
        {"json": {"current_password": PASSWORD, "new_password": PASSWORD}},
    ),
}


@cases("method, path, sent", HASHING)
async def test_others_are_served_while_a_password_is_hashed(
    method: str, path: str, sent: Any, narrow: Api, hasher: SlowHasher
) -> None:
    """The loop is free, and so is the only connection."""
    request = asyncio.create_task(narrow.request(method, path, **sent))
    await soon(hasher.begun.wait())
    response = await narrow.post("/items", json={"title": "x"})
    hasher.let.set()
    assert response.status_code == 201
    assert (await request).is_success


async def test_at_most_two_passwords_are_hashed_at_a_time(
    ada: Api, hasher: SlowHasher
) -> None:
    hasher.let.set()
    form = {"username": "ada", "password": PASSWORD}
    await asyncio.gather(*(ada.post("/auth/token", data=form) for _ in range(5)))
    assert hasher.most == 2


async def test_a_login_without_user_takes_a_hash_that_is_as_costly(
    ada: Api, hasher: SlowHasher
) -> None:
    hasher.let.set()
    await ada.post("/auth/token", data={"username": "nobody", "password": PASSWORD})
    decoy, usual = hasher.known[-1].split("$"), known_hash().split("$")
    assert decoy[:4] == usual[:4]
    assert [len(part) for part in decoy] == [len(part) for part in usual]


def test_the_decoy_is_a_hash_that_argon2_computes_to_the_end() -> None:
    with pytest.raises(VerifyMismatchError):
        PasswordHasher().verify(main.DECOY_HASH, PASSWORD)


async def test_a_wrong_name_and_a_wrong_password_are_answered_alike(ada: Api) -> None:
    answers = []
    for username in ("ada", "nobody"):
        form = {"username": username, "password": "wrong"}
        headers = {"X-Request-ID": "same"}
        response = await ada.post("/auth/token", data=form, headers=headers)
        answers.append((response.status_code, response.content, list(response.headers)))
    assert answers[0] == answers[1]


OLD = PasswordHash([Argon2Hasher(time_cost=1, memory_cost=8, parallelism=1)])


async def test_an_old_hash_is_renewed_at_the_login(database: main.Database) -> None:
    await add_user(database, "ada", OLD.hash(PASSWORD))
    async with database.writer() as db:
        await main.authenticate_user(db, "ada", PASSWORD)
    async with database.reader() as db:
        user = await main.read_user(db, 1)
    assert user.password_hash.startswith(known_hash()[:29])
    assert PASSWORDS.verify(PASSWORD, user.password_hash)


async def test_a_renewed_hash_leaves_the_tokens_alive(opened: FastAPI) -> None:
    await add_user(opened.state.database, "ada", OLD.hash(PASSWORD))
    async with client_of(opened) as api:
        await api.login()
        await api.login()
        assert (await api.get("/users/me")).status_code == 200


async def test_a_wrong_password_renews_nothing(database: main.Database) -> None:
    user = await add_user(database, "ada", old := OLD.hash(PASSWORD))
    async with database.writer() as db:
        with pytest.raises(main.WrongCredentials):
            await main.authenticate_user(db, "ada", "wrong")
    async with database.reader() as db:
        assert (await main.read_user(db, user.id)).password_hash == old


KEY = "k" * 32
CLAIMS = {"sub": "1", "iat": 1, "exp": 2**40, "version": 0}


def token_of(changes: dict[str, Any], **options: Any) -> str:
    """Signed as the service does, with other claims; what is None is left out."""
    claims = {k: v for k, v in (CLAIMS | changes).items() if v is not None}
    return jwt.encode(claims, **{"key": KEY, "algorithm": "HS256"} | options)


def segment(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def signed(header: bytes, claims: bytes) -> str:
    """Raw text, well signed: what no library would write."""
    text = f"{segment(header)}.{segment(claims)}"
    return f"{text}.{segment(hmac.digest(KEY.encode(), text.encode(), 'sha256'))}"


HS256, UNSIGNED = b'{"alg":"HS256"}', b'{"alg":"none"}'
GOOD = json.dumps(CLAIMS).encode()
HEAD, BODY, SIGNATURE = signed(HS256, GOOD).split(".")
OTHER_BODY = segment(GOOD.replace(b'"1"', b'"2"'))
BAD_TOKENS = {
    "text": "x",
    "two-dots": "..",
    "no-signature": f"{HEAD}.{BODY}.",
    "unsigned": f"{segment(UNSIGNED)}.{BODY}.",
    "unsigned-with-signature": signed(UNSIGNED, GOOD),
    "no-algorithm": signed(b"{}", GOOD),
    "hs512": token_of({}, algorithm="HS512"),
    "hs384": token_of({}, algorithm="HS384"),
    "claims-to-be-hs512": signed(b'{"alg":"HS512"}', GOOD),
    "claims-to-be-rs256": signed(b'{"alg":"RS256"}', GOOD),
    "of-another-key": token_of({}, key="j" * 32),
    "tampered": f"{HEAD}.{OTHER_BODY}.{SIGNATURE}",
    "cut-off": f"{HEAD}.{BODY}.{SIGNATURE[:-2]}",
    "other-spare-bits": f"{HEAD}.{BODY}.{SIGNATURE[:-1]}{chr(ord(SIGNATURE[-1]) + 1)}",
    "padded": f"{HEAD}.{BODY}.{SIGNATURE}=",
    "with-what-is-no-base64": f"{HEAD}.{BODY}.{SIGNATURE[:9]}**{SIGNATURE[9:]}",
    "with-a-tail": f"{HEAD}.{BODY}.{SIGNATURE}!!!!",
    "expired": token_of({"exp": int(time.time()) - 1}),
    "without-sub": token_of({"sub": None}),
    "without-iat": token_of({"iat": None}),
    "without-exp": token_of({"exp": None}),
    "without-version": token_of({"version": None}),
    "sub-that-is-no-number": token_of({"sub": "ada"}),
    "exp-null": signed(HS256, GOOD.replace(b"1099511627776", b"null")),
    "exp-infinity": signed(HS256, GOOD.replace(b"1099511627776", b"Infinity")),
    "exp-nan": signed(HS256, GOOD.replace(b"1099511627776", b"NaN")),
    "exp-text": signed(HS256, GOOD.replace(b"1099511627776", b'"soon"')),
    "claims-in-a-list": signed(HS256, b"[]"),
    "claims-that-are-not-utf-8": signed(HS256, b"\xff"),
    "deep-header": signed(b"[" * 1000 + b"]" * 1000, GOOD),
    "deep-header-object": signed(b'{"a":' * 1000 + b"1" + b"}" * 1000, GOOD),
    "deep-claims": signed(HS256, b"[" * 10_000 + b"]" * 10_000),
    "not-ascii": "\xff.\xff.\xff",
    "nul": "a\x00.b.c",
    "long": "a." * 5000,
}
bad_tokens = cases("token", BAD_TOKENS)


@bad_tokens
def test_a_bad_token_is_not_read(token: str) -> None:
    with pytest.raises(main.InvalidToken):
        main.Tokens(make_settings()).read(token)


DEAD_TOKENS = {
    name: BAD_TOKENS[name]
    for name in ("unsigned", "tampered", "expired", "deep-header", "not-ascii", "nul")
} | {
    "of-a-later-version": token_of({"version": 1}),
    "of-an-earlier-version": token_of({"version": -1}),
    "of-nobody": token_of({"sub": "2"}),
    "sub-zero": token_of({"sub": "0"}),
    "sub-beyond-64-bits": token_of({"sub": "9223372036854775808"}),
    "version-null": signed(HS256, GOOD.replace(b'"version": 0', b'"version": null')),
}


@cases("token", DEAD_TOKENS)
async def test_bad_tokens_are_all_the_same_401(token: str, ada: Api) -> None:
    headers = {b"Authorization": f"Bearer {token}".encode("latin-1")}
    response = await ada.get("/users/me", headers=headers)
    assert error_of(response)["message"] == "A valid access token is required."
    challenge = response.headers["WWW-Authenticate"]
    assert (response.status_code, challenge) == (401, 'Bearer error="invalid_token"')


async def test_a_token_of_the_same_making_is_good(ada: Api) -> None:
    ada.use(signed(HS256, GOOD))
    assert (await ada.get("/users/me")).json()["id"] == 1


def test_a_token_names_its_user_its_times_and_its_version() -> None:
    settings = make_settings(ACCESS_TOKEN_EXPIRE_MINUTES=7)
    token = main.Tokens(settings).issue(main.User(id=5, token_version=3))
    claims = jwt.get_unverified_claims(token)
    age = time.time() - claims.pop("iat")
    assert claims.pop("exp") - time.time() == pytest.approx(7 * 60 - age, abs=1)
    assert (claims, 0 <= age < 60) == ({"sub": "5", "version": 3}, True)


async def test_a_login_says_how_long_its_token_lasts(ada: Api) -> None:
    form = {"username": "ada", "password": PASSWORD}
    fields = (await ada.post("/auth/token", data=form)).json()
    fields.pop("access_token")
    assert fields == {"token_type": "bearer", "expires_in": 30 * 60}


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_the_algorithm_is_the_one_that_is_set(algorithm: str) -> None:
    tokens = main.Tokens(make_settings(ALGORITHM=algorithm))
    token = tokens.issue(main.User(id=5, token_version=3))
    assert jwt.get_unverified_header(token)["alg"] == algorithm
    assert tokens.read(token) == (5, 3)


ODD_SECRETS = {
    "json": '{"kty": "oct", "k": "AAAAAAAAAAAAAAAA"}',
    "a-json-text": f'"{"k" * 40}"',
    "pem": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
    "an-ssh-key": "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQ",
    "not-ascii": "\u00e9\U0001f600" * 16,
    "not-utf-8": "\udce9" * 32,
    "long": "k" * 5000,
}


@cases("secret", ODD_SECRETS)
def test_any_text_can_be_the_secret(secret: str) -> None:
    tokens = main.Tokens(make_settings(SECRET_KEY=secret))
    assert tokens.read(tokens.issue(main.User(id=5, token_version=3))) == (5, 3)


def test_a_token_of_another_secret_is_not_read() -> None:
    tokens = [main.Tokens(make_settings(SECRET_KEY=c * 32)) for c in "jk"]
    with pytest.raises(main.InvalidToken):
        tokens[0].read(tokens[1].issue(main.User(id=5, token_version=3)))


async def test_a_new_password_kills_all_tokens(ada: Api) -> None:
    change = {"current_password": PASSWORD, "new_password": PASSWORD[::-1]}
    assert (await ada.patch("/users/me", json=change)).status_code == 204
    assert (await ada.get("/users/me")).status_code == 401


async def test_an_account_takes_its_tokens_with_it(ada: Api, opened: FastAPI) -> None:
    assert (await ada.delete("/users/me")).status_code == 204
    await add_user(opened.state.database, "ada")
    assert (await ada.get("/users/me")).status_code == 401


# --- Repositories ---------------------------------------------------------------------


async def add_items(database: main.Database, owner: main.User, *titles: str) -> None:
    async with database.writer() as db:
        for title in titles:
            await main.create_item(db, owner, main.ItemIn(title=title))


async def test_a_user_is_found_by_id_and_by_name(database: main.Database) -> None:
    user, _ = await add_user(database, "ada"), await add_user(database, "bob")
    async with database.reader() as db:
        by_id = await main.find_user(db, user.id)
        by_name = await main.find_user_named(db, "ada")
    assert by_id is not None
    assert by_id is by_name
    assert by_id.username == "ada"


async def test_a_password_is_set_only_on_the_one_that_was_read(
    database: main.Database,
) -> None:
    user = await add_user(database)
    async with database.writer() as db:
        assert await main.set_password(db, user, password_hash="second")
        other = main.User(id=user.id, password_hash="another")
        assert not await main.set_password(db, other, password_hash="third")


async def test_a_password_is_set_for_one_user_only(database: main.Database) -> None:
    ada, bob = await add_user(database, "ada"), await add_user(database, "bob")
    async with database.writer() as db:
        await main.set_password(db, ada, password_hash="second")
        await db.commit()
    async with database.reader() as db:
        found = await main.find_user(db, bob.id)
    assert found is not None
    assert found.password_hash == known_hash()


async def test_a_list_has_the_ids_after_in_ascending_order(
    database: main.Database,
) -> None:
    owner = await add_user(database)
    await add_items(database, owner, *"edcba")
    async with database.reader() as db:
        rows = await main.list_items(db, owner.id, 1, 3)
        assert [(row.id, row.title) for row in rows] == [(2, "d"), (3, "c"), (4, "b")]


@pytest.fixture
async def others_item(database: main.Database) -> tuple[main.User, int]:
    """A user, and the id of an item that is somebody else's."""
    ada, bob = await add_user(database, "ada"), await add_user(database, "bob")
    await add_items(database, bob, "bob's")
    return ada, 1


async def test_someone_elses_item_is_not_found(
    database: main.Database, others_item: tuple[main.User, int]
) -> None:
    user, item_id = others_item
    async with database.reader() as db:
        assert await main.find_item(db, user.id, item_id) is None


async def test_someone_elses_item_is_not_listed(
    database: main.Database, others_item: tuple[main.User, int]
) -> None:
    async with database.reader() as db:
        assert not await main.list_items(db, others_item[0].id, 0, 9)


# --- Services -------------------------------------------------------------------------

PAGES = {
    "empty": (0, 2, []),
    "one-short": (1, 2, [1]),
    "one-full": (2, 2, [2]),
    "one-more": (3, 2, [2, 1]),
    "two-full": (4, 2, [2, 2]),
    "one-each": (3, 1, [1, 1, 1]),
}


@cases("count, limit, sizes", PAGES)
async def test_the_pages_are_the_whole_list_and_none_is_empty(
    count: int, limit: int, sizes: list[int], ada: Api, opened: FastAPI
) -> None:
    await add_items(opened.state.database, main.User(id=1), *"abcd"[:count])
    pages: list[list[dict[str, Any]]] = []
    after: int | None = 0
    while after is not None and len(pages) <= count:
        page = (await ada.get(f"/items?after={after}&limit={limit}")).json()
        pages, after = [*pages, page["items"]], page["next"]
    assert [len(page) for page in pages] == (sizes or [0])
    assert [item["id"] for page in pages for item in page] == [*range(1, count + 1)]


async def test_users_are_paged_like_items(ada: Api, bob: Api) -> None:
    first = (await ada.get("/users?limit=1")).json()
    last = (await bob.get(f"/users?limit=1&after={first['next']}")).json()
    names = [user["username"] for page in (first, last) for user in page["users"]]
    assert (names, first["next"], last["next"]) == (["ada", "bob"], 1, None)


async def test_a_page_has_twenty_where_nothing_is_said(
    ada: Api, opened: FastAPI
) -> None:
    await add_items(opened.state.database, main.User(id=1), *"x" * 21)
    page = (await ada.get("/items")).json()
    assert (len(page["items"]), page["next"]) == (20, 20)


async def test_a_name_is_registered_once(database: main.Database) -> None:
    await add_user(database, "ada")
    async with database.writer() as db:
        with pytest.raises(main.UsernameTaken):
            await main.register_user(db, USER_IN)


USER_IN = main.UserIn(username="ada", password=PASSWORD)


async def test_who_loses_the_race_for_a_name_is_told_that_it_is_taken(
    database: main.Database,
) -> None:
    async def register() -> main.User:
        async with database.writer() as db:
            return await main.register_user(db, USER_IN)

    race = await asyncio.gather(register(), register(), return_exceptions=True)
    kinds = sorted(type(outcome).__name__ for outcome in race)
    assert kinds == ["User", "UsernameTaken"]


async def test_who_registers_is_stored_with_a_hash(database: main.Database) -> None:
    async with database.writer() as db:
        user = await main.register_user(db, USER_IN)
    async with database.reader() as db:
        stored = await main.read_user(db, user.id)
    assert (stored.username, stored.token_version) == ("ada", 0)
    assert PASSWORDS.verify(PASSWORD, stored.password_hash)


async def test_only_the_owner_of_the_password_is_authenticated(
    database: main.Database,
) -> None:
    await add_user(database)
    async with database.writer() as db:
        assert (await main.authenticate_user(db, "ada", PASSWORD)).username == "ada"
        for username, password in (("ada", "wrong"), ("bob", PASSWORD)):
            with pytest.raises(main.WrongCredentials):
                await main.authenticate_user(db, username, password)


async def test_of_two_password_changes_at_once_one_is_refused(
    database: main.Database,
) -> None:
    user = await add_user(database)

    async def change(password: str) -> str:
        async with database.writer() as db:
            same_user = await main.read_user(db, user.id)
            fields = {"current_password": PASSWORD, "new_password": password}
            await main.change_password(db, same_user, main.PasswordChange(**fields))
            return password

    race = await asyncio.gather(
        change("a" * 15), change("b" * 15), return_exceptions=True
    )
    assert [type(outcome) for outcome in race].count(main.WrongPassword) == 1
    async with database.reader() as db:
        assert (await main.read_user(db, user.id)).token_version == 1


async def test_a_user_who_has_gone_owns_no_token(database: main.Database) -> None:
    async with database.reader() as db:
        with pytest.raises(main.InvalidToken):
            await main.read_token_owner(db, 1, 0)


async def test_only_the_user_that_is_meant_is_discarded(
    database: main.Database,
) -> None:
    ada, bob = await add_user(database, "ada"), await add_user(database, "bob")
    async with database.writer() as db:
        await main.discard_user(db, ada)
        assert [user.id for user in await main.list_users(db, 0, 9)] == [bob.id]


async def test_someone_elses_item_is_not_changed(
    database: main.Database, others_item: tuple[main.User, int]
) -> None:
    async with database.writer() as db:
        with pytest.raises(main.NotFound):
            await main.change_item(db, *others_item, main.ItemPatch(title="mine"))
        assert await db.scalar(sa.select(main.Item.title)) == "bob's"


async def test_someone_elses_item_is_not_discarded(
    database: main.Database, others_item: tuple[main.User, int]
) -> None:
    async with database.writer() as db:
        with pytest.raises(main.NotFound):
            await main.discard_item(db, *others_item)
        assert await db.scalar(count_of(main.Item)) == 1


async def test_only_the_item_that_is_meant_is_changed(database: main.Database) -> None:
    owner = await add_user(database)
    await add_items(database, owner, "a", "b", "c")
    async with database.writer() as db:
        await main.change_item(db, owner, 2, main.ItemPatch(title="B"))
        await main.discard_item(db, owner, 3)
        rows = await main.list_items(db, owner.id, 0, 9)
        assert [row.title for row in rows] == ["a", "B"]


async def test_a_user_who_has_gone_creates_no_item(database: main.Database) -> None:
    async with database.writer() as db:
        with pytest.raises(main.InvalidToken):
            await main.create_item(db, main.User(id=7), main.ItemIn(title="x"))


OTHERS: dict[str, tuple[str, dict[str, str]]] = {
    "get": ("GET", {}),
    "patch": ("PATCH", {"title": "mine"}),
    "empty-patch": ("PATCH", {}),
    "delete": ("DELETE", {}),
}


@cases("method, patch", OTHERS)
async def test_someone_elses_item_looks_like_no_item(
    method: str, patch: dict[str, str], ada: Api, bob: Api
) -> None:
    paths = [f"/items/{await bob.add_item()}", "/items/7"]
    sent: Any = {"headers": {"X-Request-ID": "same"}, "json": patch}
    first, second = [await ada.request(method, path, **sent) for path in paths]
    assert first.status_code == second.status_code == 404
    assert first.content == second.content


PATCHES: dict[str, dict[str, Any]] = {
    "title": {"title": "new"},
    "description": {"description": "new"},
    "no-description": {"description": None},
    "both": {"title": "new", "description": "new"},
    "nothing": {},
}


@cases("patch", PATCHES)
async def test_a_patch_changes_what_was_sent_and_nothing_else(
    patch: dict[str, Any], ada: Api
) -> None:
    path = f"/items/{await ada.add_item('old', description='old')}"
    before = (await ada.get(path)).json()
    answer = (await ada.patch(path, json=patch)).json()
    after = (await ada.get(path)).json()
    assert answer == after
    before.pop("updated_at"), after.pop("updated_at")
    assert after == before | patch


@cases("patch", PATCHES)
async def test_the_time_of_the_last_change_moves_when_there_was_one(
    patch: dict[str, Any], ada: Api
) -> None:
    path = f"/items/{await ada.add_item('old', description='old')}"
    before = (await ada.get(path)).json()["updated_at"]
    after = (await ada.patch(path, json=patch)).json()["updated_at"]
    moved = datetime.fromisoformat(after) > datetime.fromisoformat(before)
    assert moved == bool(patch)


async def test_an_item_is_stored_as_it_was_sent(ada: Api) -> None:
    sent = {"title": "\U0001f600 <b>", "description": "a\nb\t\u2028"}
    item_id = await ada.add_item(**sent)
    assert sent.items() <= (await ada.get(f"/items/{item_id}")).json().items()


async def test_an_item_that_was_discarded_is_not_there(ada: Api) -> None:
    path = f"/items/{await ada.add_item()}"
    statuses = [(await ada.delete(path)).status_code for _ in range(2)]
    assert [*statuses, (await ada.get(path)).status_code] == [204, 404, 404]


# --- Rate limiting --------------------------------------------------------------------

SECOND = 10**9
REDIS_URL = os.getenv("TEST_REDIS_URL", "")
needs_redis = pytest.mark.skipif(not REDIS_URL, reason="TEST_REDIS_URL is not set")
needs_own_redis = pytest.mark.skipif(
    not (REDIS_URL and shutil.which("redis-server")),
    reason="TEST_REDIS_URL is not set, or there is no redis-server to start",
)


class Hand:
    """A clock that is set by hand, in nanoseconds."""

    def __init__(self, seconds: float = 1000) -> None:
        self.now = int(seconds * SECOND)

    def __call__(self) -> int:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)


def make_window(limit: int, clock: Callable[[], int], rows: int = 64) -> Any:
    """Of 60 s."""
    window = main.MemoryWindow(limit, 60, 8 * (4 + limit) * rows)
    window.clock = clock
    return window


def admissions(window: Any, client: str, tries: int) -> int:
    return sum(window.admit(client).admitted for _ in range(tries))


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_a_client_is_admitted_up_to_the_limit_and_no_further(limit: int) -> None:
    window = make_window(limit, Hand())
    verdicts = [window.admit("a").admitted for _ in range(limit + 1)]
    assert verdicts == [True] * limit + [False]


def test_a_client_is_readmitted_in_the_nanosecond_in_which_its_oldest_leaves() -> None:
    clock = Hand()
    window = make_window(2, clock)
    window.admit("a")
    clock.forward(10)
    window.admit("a")
    clock.now += 50 * SECOND - 1
    assert not window.admit("a").admitted
    clock.now += 1
    assert [window.admit("a").admitted for _ in range(2)] == [True, False]


def test_refused_requests_do_not_count() -> None:
    clock = Hand()
    window = make_window(2, clock)
    assert admissions(window, "a", 2) == 2
    clock.forward(59)
    assert admissions(window, "a", 5) == 0
    clock.forward(1)
    assert admissions(window, "a", 5) == 2


def test_remaining_counts_what_is_left_after_this_request() -> None:
    window = make_window(3, Hand())
    assert [window.admit("a").remaining for _ in range(4)] == [2, 1, 0, 0]


@pytest.mark.parametrize(
    ("later", "reset"),
    [(0, 60), (0.5, 60), (1, 59), (59, 1), (59.999, 1)],
    ids=str,
)
def test_reset_is_when_the_oldest_leaves_in_seconds_begun(
    later: float, reset: int
) -> None:
    clock = Hand()
    window = make_window(1, clock)
    assert window.admit("a").wait_seconds == 60
    clock.forward(later)
    assert window.admit("a").wait_seconds == reset


def naive_verdict(log: list[int], now: int, limit: int) -> tuple[int, int, int, bool]:
    log[:] = [moment for moment in log if moment > now - 60 * SECOND]
    if admitted := len(log) < limit:
        log.append(now)
    reset = math.ceil((log[0] + 60 * SECOND - now) / SECOND)
    return limit - len(log), reset, limit, admitted


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_the_ring_decides_as_a_plain_list_of_times_does(limit: int, seed: int) -> None:
    chance = random.Random(seed)
    clock, logs = Hand(), {name: list[int]() for name in "abc"}
    window = make_window(limit, clock)
    steps = [0, 1, SECOND, 7 * SECOND, 20 * SECOND, 60 * SECOND - 1, 60 * SECOND]
    for _ in range(500):
        clock.now += chance.choice(steps)
        client = chance.choice("abc")
        assert window.admit(client) == naive_verdict(logs[client], clock.now, limit)


@pytest.mark.parametrize("start_ns", [1, SECOND, 59 * SECOND], ids=str)
def test_a_machine_that_has_just_booted_counts_the_same(start_ns: int) -> None:
    window = make_window(3, Hand(start_ns / SECOND))
    assert [admissions(window, client, 5) for client in "aba"] == [3, 3, 0]


def test_clients_have_budgets_of_their_own() -> None:
    window = make_window(2, Hand())
    assert [admissions(window, client, 3) for client in ("a", "b")] == [2, 2]


def test_in_a_full_bucket_the_client_idle_for_longest_gives_up_its_place() -> None:
    clock = Hand()
    window = make_window(1, clock, rows=4)
    for client in "abcda":  # a was first, but b is idle for longest
        clock.forward(1)
        window.admit(client)
    window.admit("newcomer")
    assert [admissions(window, client, 1) for client in "acd"] == [0, 0, 0]
    assert admissions(window, "b", 1) == 1


def test_a_row_that_was_given_up_brings_its_heir_no_debts() -> None:
    window = make_window(3, Hand(), rows=1)
    assert [admissions(window, client, 4) for client in "abab"] == [3] * 4


def test_a_busy_client_stays_refused_while_twenty_thousand_others_come() -> None:
    window = make_window(100, Hand(), rows=60_000)
    assert admissions(window, "busy", 101) == 100
    for thousand in range(20):
        assert all(window.admit(f"c{thousand}.{n}").admitted for n in range(1000))
        assert not window.admit("busy").admitted


def test_a_quiet_client_is_admitted_among_twenty_thousand_in_a_small_table() -> None:
    window = make_window(100, Hand())
    assert admissions(window, "quiet", 1) == 1
    assert all(window.admit(f"c{n}").admitted for n in range(20_000))
    assert admissions(window, "quiet", 1) == 1


def test_twenty_thousand_clients_leave_the_memory_as_it_was() -> None:
    window = make_window(100, Hand())
    window.admit("first")
    before = sys.getallocatedblocks()
    for n in range(20_000):
        window.admit(f"c{n}")
    assert sys.getallocatedblocks() - before < 1000


@pytest.mark.parametrize("limit", [1, 100, 1000, 1_000_000])
def test_both_tables_fit_in_64_mib(limit: int) -> None:
    limits = {"RATE_LIMIT_REQUESTS": limit, "RATE_LIMIT_LOGIN_REQUESTS": limit}
    windows = main.Limiter(make_settings(**limits)).windows.values()
    assert sum(len(bytes_of(window)) for window in windows) <= 64 * 2**20
    assert all(admissions(window, "a", 2) == min(2, limit) for window in windows)


def bytes_of(window: main.MemoryWindow) -> mmap.mmap:
    table = window.who.obj
    assert isinstance(table, mmap.mmap)
    return table


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:0db8:0001:0002::/64"),
        ("2001:db8:1:2:ffff::", "2001:0db8:0001:0002::/64"),
        ("2001:db8:1:3::", "2001:0db8:0001:0003::/64"),
        ("fe80::1%eth0", "fe80:0000:0000:0000::/64"),
        ("garbage", "unknown"),
        ("192.0.2.1:80", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_client_is_an_ipv4_address_or_an_ipv6_network(
    address: str, client: str
) -> None:
    assert main.client_of(address) == client


def fork(work: Callable[[], object]) -> int:
    """Let a child do it; the child's pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks in a process that has threads
        pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


@contextmanager
def deadline() -> Iterator[None]:
    """A lock that is never released fails the test instead of stopping it."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    usual = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, usual)


def test_processes_share_one_budget_exactly() -> None:
    window = make_window(5000, Hand())
    shared = memoryview(mmap.mmap(-1, 8 * 5)).cast("Q")

    def count(child: int) -> None:
        while not shared[4]:  # all begin together
            pass
        shared[child] = admissions(window, "a", 3000)

    children = [fork(lambda n=n: count(n)) for n in range(4)]  # type: ignore[misc]
    shared[4] = 1
    for pid in children:
        os.waitpid(pid, 0)
    assert sum(shared[:4]) == 5000


def die_at_line(number: int, work: Callable[[], object]) -> None:
    """Do the work, but be killed at the n-th line of main.py that it comes to."""
    lines = itertools.count(1)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != main.__file__:
            return None
        if event == "line" and next(lines) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    work()


def kills(work: Callable[[], object]) -> Iterator[None]:
    """Have `work` killed at its first line, its second, and so on to its end."""
    for number in itertools.count(1):
        _, status = os.waitpid(fork(lambda n=number: die_at_line(n, work)), 0)  # type: ignore[misc]
        yield
        if not os.WIFSIGNALED(status):
            assert number > 10, "the section has more lines than this"
            return


def test_a_process_killed_at_any_line_of_the_section_admits_nobody_extra() -> None:
    clock = Hand()
    window = make_window(5, clock, rows=1)
    for _ in kills(lambda: window.admit("a")):
        with deadline():
            assert admissions(window, "a", 9) in {4, 5}  # its own may have counted
        clock.forward(60)


def test_a_process_killed_between_others_admits_nobody_extra_later() -> None:
    clock = Hand()
    window = make_window(5, clock, rows=1)

    def prepare() -> None:
        for seconds in (60, 30):
            clock.forward(seconds)
            window.admit("a")

    prepare()
    for _ in kills(lambda: window.admit("a")):
        with deadline():
            at_once = admissions(window, "a", 9)
            clock.forward(30)  # the first leaves
            later = admissions(window, "a", 9)
        assert 1 + at_once + later in {4, 5}  # the killed one's may have counted
        prepare()


def test_a_process_killed_while_it_takes_a_row_over_brings_nobody_debts() -> None:
    window = make_window(5, Hand(), rows=1)
    for number, _ in enumerate(kills(lambda: window.admit("heir"))):
        with deadline():
            assert admissions(window, "heir", 9) in {4, 5}  # its own may have counted
            assert admissions(window, f"next {number}", 9) == 5


def test_a_process_killed_by_its_clock_blocks_nobody() -> None:
    window = make_window(2, Hand())
    window.clock = lambda: os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(fork(lambda: window.admit("a")), 0)
    window.clock = Hand()
    with deadline():
        assert (os.WTERMSIG(status), admissions(window, "a", 3)) == (signal.SIGKILL, 2)


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/users/me", {}, 401),
        ("GET", "/nowhere", {}, 404),
        ("PUT", "/users", {}, 405),
        ("POST", "/users", {"content": b"x" * 2000}, 413),
        ("POST", "/users", {"content": b"{"}, 422),
    ],
    ids=["401", "404", "405", "413", "malformed"],
)
async def test_a_request_counts_whatever_becomes_of_it(
    method: str, path: str, options: Any, status: int
) -> None:
    async with serve(RATE_LIMIT_REQUESTS=1, MAX_BODY_BYTES=1000) as api:
        first = await api.request(method, path, **options)
        second = await api.request(method, path, **options)
    assert [first.status_code, second.status_code] == [status, 429]


def limits(response: httpx.Response) -> tuple[int, int, int]:
    names = ("Limit", "Remaining", "Reset")
    limit, left, reset = (int(response.headers[f"X-RateLimit-{n}"]) for n in names)
    return limit, left, reset


async def test_the_three_headers_count_down_and_the_refusal_says_when_to_retry() -> (
    None
):
    app = main.create_app(make_settings(RATE_LIMIT_REQUESTS=2))
    app.state.limiter.windows["api"].clock = clock = Hand()
    async with connect(app) as api:
        answers = []
        for _ in range(4):
            answers.append(await api.get("/nowhere"))
            clock.forward(20.5)
    assert [answer.status_code for answer in answers] == [404, 404, 429, 404]
    assert [limits(answer) for answer in answers] == [
        (2, 1, 60),
        (2, 0, 40),
        (2, 0, 19),
        (2, 0, 19),
    ]
    assert [a.headers.get("Retry-After") for a in answers] == [None, None, "19", None]


async def test_a_refusal_has_the_one_form() -> None:
    async with serve(RATE_LIMIT_REQUESTS=1) as api:
        await api.get("/nowhere")
        response = await api.get("/nowhere")
    assert response.json() == {
        "error": "rate_limited",
        "message": "Too many requests; try again later.",
        "details": None,
        "request_id": response.headers["X-Request-ID"],
    }


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/docs", "/redoc"])
async def test_health_and_docs_are_free(path: str) -> None:
    async with serve(RATE_LIMIT_REQUESTS=1) as api:
        answers = [await api.get(f"http://test{path}") for _ in range(3)]
        counted = await api.get("/users/me")
    assert {answer.status_code for answer in answers} == {200}
    assert not [n for a in answers for n in a.headers if n.startswith("x-ratelimit")]
    assert counted.status_code == 401


@pytest.mark.parametrize(
    ("api_limit", "login_limit", "shown"),
    [(10, 3, (3, 2)), (3, 10, (3, 2)), (5, 5, (5, 4))],
    ids=["login", "api", "equal"],
)
async def test_the_token_route_shows_the_limit_that_leaves_less(
    api_limit: int, login_limit: int, shown: tuple[int, int]
) -> None:
    counts = {
        "RATE_LIMIT_REQUESTS": api_limit,
        "RATE_LIMIT_LOGIN_REQUESTS": login_limit,
    }
    async with serve(**counts) as api:
        response = await api.post("/auth/token")
    assert limits(response)[:2] == shown


async def test_the_token_route_shows_the_other_limit_when_that_leaves_less() -> None:
    async with serve(RATE_LIMIT_REQUESTS=6, RATE_LIMIT_LOGIN_REQUESTS=3) as api:
        for _ in range(4):
            await api.get("/nowhere")
        response = await api.post("/auth/token")
    assert limits(response)[:2] == (6, 1)


async def test_logins_have_a_limit_of_their_own_besides() -> None:
    async with serve(RATE_LIMIT_REQUESTS=5, RATE_LIMIT_LOGIN_REQUESTS=2) as api:
        logins = [await api.post("/auth/token") for _ in range(3)]
        elsewhere = await api.get("/users/me")
    assert [login.status_code for login in logins] == [422, 422, 429]
    assert int(logins[2].headers["Retry-After"]) in {59, 60}
    # What the second limit refuses counts in the first all the same.
    assert (elsewhere.status_code, limits(elsewhere)[:2]) == (401, (5, 1))


async def test_a_client_is_the_address_of_the_connection() -> None:
    app = built_app(RATE_LIMIT_REQUESTS=1)
    left = []
    for address in ("192.0.2.1", "192.0.2.2", "::ffff:192.0.2.1", "192.0.2.1"):
        async with connect(app, client=(address, 5)) as api:
            left.append((await api.get("/nowhere")).status_code)
    assert left == [404, 404, 429, 429]


class OwnRedis:
    """A redis-server of the test's own, which it may freeze and kill."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = ["--port", str(self.port), "--save", "", "--dir", str(self.folder)]
        command = ["redis-server", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until(self.listens, "redis-server")

    def listens(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def send(self, number: int) -> None:
        assert self.process
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    server = OwnRedis(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@asynccontextmanager
async def redis_limiter(url: str, limit: int = 3) -> AsyncIterator[main.Limiter]:
    settings = make_settings(REDIS_URL=url, RATE_LIMIT_REQUESTS=limit, LOG_LEVEL="INFO")
    main.set_up_logging(settings)
    limiter = main.Limiter(settings)
    assert limiter.redis
    async with limiter.redis:
        yield limiter


def new_address() -> str:
    """Of documentation, and of one test: Redis forgets more slowly than it runs."""
    return f"2001:db8:{os.urandom(2).hex()}:{os.urandom(2).hex()}::1"


async def admitted(limiter: main.Limiter, address: str, tries: int) -> int:
    verdicts = [await limiter.admit("api", address) for _ in range(tries)]
    return sum(verdict.admitted for verdict in verdicts)


async def log_in_redis(limiter: main.Limiter, address: str) -> tuple[Redis, Any]:
    """Where a client's log of admissions lies, and its key."""
    assert limiter.redis
    (key,) = await limiter.redis.keys(f"*{main.client_of(address)}")
    return limiter.redis, key


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take over 100 ms, which is another test's subject."""
    monkeypatch.setattr(main, "REDIS_SECONDS", PATIENCE_SECONDS)


@needs_redis
@pytest.mark.usefixtures("unhurried")
async def test_two_services_share_one_budget_through_redis() -> None:
    address = new_address()
    async with redis_limiter(REDIS_URL, 7) as one, redis_limiter(REDIS_URL, 7) as two:
        tries = [limiter.admit("api", address) for limiter in (one, two) * 10]
        verdicts = await asyncio.gather(*tries)
    assert sum(verdict.admitted for verdict in verdicts) == 7
    assert sorted(v.remaining for v in verdicts if v.admitted) == list(range(7))


@needs_redis
@pytest.mark.usefixtures("unhurried")
async def test_redis_gives_the_verdicts_that_memory_gives() -> None:
    address = new_address()
    async with redis_limiter(REDIS_URL, 2) as limiter:
        verdicts = [await limiter.admit("api", address) for _ in range(3)]
        login = await limiter.admit("login", address)
    window = make_window(2, Hand())
    assert verdicts == [window.admit("a") for _ in range(3)]
    assert (login.remaining, login.limit) == (999, 1000)


@needs_redis
@pytest.mark.usefixtures("unhurried")
async def test_in_redis_what_has_left_the_window_makes_room() -> None:
    address = new_address()
    async with redis_limiter(REDIS_URL, 2) as limiter, asyncio.timeout(10):
        limiter.windows["api"].window_ns = SECOND // 20
        began = time.monotonic()
        assert await admitted(limiter, address, 2) == 2
        while not (await limiter.admit("api", address)).admitted:
            pass
        assert time.monotonic() - began >= 1 / 20


@needs_redis
@pytest.mark.usefixtures("unhurried")
async def test_in_redis_refused_requests_do_not_count() -> None:
    address = new_address()
    async with redis_limiter(REDIS_URL, 2) as limiter:
        await admitted(limiter, address, 9)
        redis, key = await log_in_redis(limiter, address)
        assert len(await redis.lrange(key, 0, -1)) == 2


@needs_redis
@pytest.mark.usefixtures("unhurried")
async def test_keys_in_redis_expire_with_the_window() -> None:
    address = new_address()
    async with redis_limiter(REDIS_URL) as limiter:
        await limiter.admit("api", address)
        redis, key = await log_in_redis(limiter, address)
        assert 50_000 < await redis.pttl(key) <= 60_000


@needs_redis
@pytest.mark.usefixtures("unhurried")
async def test_in_redis_a_lower_limit_tells_when_it_admits_again() -> None:
    address = new_address()
    async with redis_limiter(REDIS_URL, 5) as wide, redis_limiter(REDIS_URL, 2) as low:
        limiters = (wide, low)
        for limiter in limiters:
            limiter.windows["api"].window_ns = 1000 * SECOND
        assert await admitted(wide, address, 5) == 5
        redis, key = await log_in_redis(wide, address)
        for n in range(5):  # as if they had come 100 s after each other
            moment = int(await redis.lindex(key, n) or 0)
            await redis.lset(key, n, str(moment - (5 - n) * 100 * 10**6))
        verdict = await low.admit("api", address)
    # of the five four have to leave before one of two places is free
    assert (verdict.remaining, verdict.admitted) == (0, False)
    assert 799 <= verdict.wait_seconds <= 800


@needs_redis
@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("gone", range(8))
async def test_in_redis_all_that_have_left_the_window_make_room(gone: int) -> None:
    address = new_address()
    async with redis_limiter(REDIS_URL, 8) as limiter:
        assert await admitted(limiter, address, 7) == 7
        redis, key = await log_in_redis(limiter, address)
        for n in range(gone):
            await redis.lset(key, n, str(n))
        assert (await limiter.admit("api", address)).remaining == gone
        assert await redis.llen(key) == 8 - gone


async def test_while_redis_is_away_memory_serves_with_one_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with redis_limiter(f"redis://127.0.0.1:{free_port()}") as limiter:
        assert await admitted(limiter, "192.0.2.1", 5) == 3
        limiter.retry_at = 0
        assert await admitted(limiter, "192.0.2.1", 1) == 0
    lines = [(line["level"], line["message"]) for line in logged(capsys)]
    assert lines == [("WARNING", "Redis is away")]


async def test_a_redis_that_does_not_answer_is_left_alone_for_a_while(
    silent_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async with redis_limiter(f"redis://127.0.0.1:{silent_port}") as limiter:
        assert await admitted(limiter, "192.0.2.1", 1) == 1
        assert limiter.retry_at > time.monotonic()
        limiter.retry_at += PATIENCE_SECONDS
        limiter.script = None  # type: ignore[assignment]  # to ask would be a crash
        assert await admitted(limiter, "192.0.2.1", 9) == 2
    assert [line["reason"] for line in logged(capsys)] == ["no answer in time"]


@pytest.mark.usefixtures("unhurried")
async def test_who_is_cancelled_leaves_no_call_to_redis_behind(
    silent_port: int,
) -> None:
    async with redis_limiter(f"redis://127.0.0.1:{silent_port}") as limiter:
        before = asyncio.all_tasks()
        request = asyncio.create_task(limiter.admit("api", "192.0.2.1"))
        while len(asyncio.all_tasks() - before) < 2:
            await asyncio.sleep(0)
        calls = asyncio.all_tasks() - before
        request.cancel()
        await asyncio.wait_for(asyncio.wait(calls), 5)


@pytest.mark.usefixtures("unhurried")
async def test_one_request_alone_tries_whether_redis_has_returned(
    silent_port: int,
) -> None:
    async with redis_limiter(f"redis://127.0.0.1:{silent_port}") as limiter:
        limiter.away = True
        tries = [asyncio.create_task(admitted(limiter, f"{n}", 1)) for n in range(3)]
        done, waiting = await asyncio.wait(tries, timeout=0.1)
        assert (len(done), len(waiting)) == (2, 1)
        waiting.pop().cancel()


@needs_own_redis
@pytest.mark.usefixtures("unhurried")
async def test_redis_is_taken_up_again_when_it_returns(
    own_redis: OwnRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    own_redis.start()
    async with redis_limiter(own_redis.url) as limiter:
        assert await admitted(limiter, "192.0.2.1", 3) == 3
        own_redis.kill()
        assert await admitted(limiter, "192.0.2.1", 3) == 3  # in memory, from the start
        own_redis.start()
        limiter.retry_at = 0
        assert await admitted(limiter, "192.0.2.1", 1) == 1  # of a new server's
    lines = [line["message"] for line in logged(capsys)]
    assert lines == ["Redis is away", "Redis is back"]


@needs_own_redis
async def test_a_frozen_redis_is_taken_up_again_when_it_thaws(
    own_redis: OwnRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    own_redis.start()
    async with redis_limiter(own_redis.url) as limiter:
        await limiter.admit("api", "192.0.2.1")
        own_redis.send(signal.SIGSTOP)
        await limiter.admit("api", "192.0.2.1")
        own_redis.send(signal.SIGCONT)
        limiter.retry_at = 0
        await limiter.admit("api", "192.0.2.1")
        assert not limiter.away
    lines = [line["message"] for line in logged(capsys)]
    assert lines == ["Redis is away", "Redis is back"]


# --- Middleware -----------------------------------------------------------------------

ORIGIN = "https://app.example"
CANCELLED = asyncio.Event()
ENTERED = asyncio.Event()


async def crash() -> None:
    raise RuntimeError("the inside shows")


async def crash_late() -> StreamingResponse:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"begun"
        raise RuntimeError("the inside shows")

    return StreamingResponse(chunks())


async def give_up() -> None:
    raise TimeoutError


async def hang() -> None:
    ENTERED.set()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        CANCELLED.set()
        raise


async def read(request: Request) -> int:
    return len(await request.body())


@cache
def probed(seconds: float = 30) -> FastAPI:
    """The app with routes that misbehave. Made once, for it takes 60 ms."""
    limits = {"MAX_BODY_BYTES": 1000, "REQUEST_TIMEOUT_SECONDS": seconds}
    app = main.create_app(
        make_settings(**limits, LOG_LEVEL="INFO", CORS_ORIGINS=[ORIGIN])
    )
    for route in (crash, crash_late, give_up, hang):
        app.add_api_route(f"/api/v1/{route.__name__}", route)
    app.add_api_route("/api/v1/read", read, methods=["POST"])
    return app


class Kind(NamedTuple):
    """A kind of response, and how to come by it."""

    status: int
    method: str = "GET"
    path: str = "/api/v1/nowhere"
    options: Mapping[str, Any] = MappingProxyType({})

    @property
    def preflight(self) -> bool:
        return self.method == "OPTIONS"

    @property
    def limited(self) -> bool:
        free = self.preflight or self.path.endswith("openapi.json")
        return self.path.startswith("/api/v1/") and not free


class Chunks:
    """A body whose length nobody declares."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(2):
            yield b" " * 600


class Trickle:
    """A body whose rest never comes."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b" "
        await asyncio.Event().wait()


def preflight(method: str, header: str = "authorization") -> dict[str, Any]:
    asked = {
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": header,
    }
    return {"headers": {"Origin": ORIGIN} | asked}


KINDS = {
    "route": Kind(200, "POST", "/api/v1/read"),
    "health": Kind(200, "GET", "/health/live"),
    "docs": Kind(200, "GET", "/docs"),
    "openapi": Kind(200, "GET", "/api/v1/openapi.json"),
    "preflight": Kind(200, "OPTIONS", "/api/v1/users", preflight("PATCH")),
    "preflight refused": Kind(400, "OPTIONS", "/api/v1/users", preflight("PUT")),
    "401": Kind(401, "GET", "/api/v1/users/me"),
    "404": Kind(404, "GET", "/api/v1/nowhere"),
    "405": Kind(405, "PUT", "/api/v1/users"),
    "413 declared": Kind(413, "POST", "/api/v1/users", {"content": b" " * 1001}),
    "413 chunked": Kind(413, "POST", "/api/v1/read", {"content": Chunks()}),
    "422": Kind(422, "POST", "/api/v1/users", {"json": {}}),
    "429": Kind(429, "GET", "/api/v1/users/me"),
    "500": Kind(500, "GET", "/api/v1/crash"),
    "504": Kind(504, "GET", "/api/v1/hang"),
    "504 trickle": Kind(504, "POST", "/api/v1/read", {"content": Trickle()}),
}
ERRORS = {name for name, kind in KINDS.items() if kind.status >= 400}
each_kind = pytest.mark.parametrize("name", KINDS)
each_error = pytest.mark.parametrize("name", sorted(ERRORS - {"preflight refused"}))


class Answer(NamedTuple):
    response: httpx.Response
    log: list[dict[str, Any]]


async def ask(kind: Kind, scheme: str = "http", **headers: str) -> Answer:
    """As a client that has never been here."""
    app, address = probed(0.001 if kind.status == 504 else 30), next(ADDRESSES)
    if kind.status == 429:
        admissions(app.state.limiter.windows["api"], address, 1000)
    options = {**kind.options, "headers": kind.options.get("headers", {}) | headers}
    with redirect_stdout(StringIO()) as stdout:
        main.set_up_logging(app.state.settings)
        Path("app.db").write_bytes(tables())
        async with (
            app.router.lifespan_context(app),
            connect(app, client=(address, 5)) as api,
        ):
            url = f"{scheme}://test{kind.path}"
            response = await api.request(kind.method, url, **options)
    return Answer(response, [json.loads(n) for n in stdout.getvalue().splitlines()])


ASKED: dict[tuple[str, str], Answer] = {}
WAYS: dict[str, dict[str, str]] = {
    "plain": {"X-Request-ID": "mine.1_a-Z"},
    "allowed": {"scheme": "https", "Origin": ORIGIN},
    "other": {"Origin": "https://evil.example"},
}


async def answer_to_kind(name: str, way: str = "plain") -> Answer:
    """The same for all laws that look at it."""
    if (name, way) not in ASKED:
        ASKED[name, way] = await ask(KINDS[name], **WAYS[way])
    return ASKED[name, way]


async def headers_of(name: str, way: str = "plain") -> httpx.Headers:
    return (await answer_to_kind(name, way)).response.headers


@each_kind
async def test_every_kind_of_response_comes_about(name: str) -> None:
    answer = await answer_to_kind(name)
    assert answer.response.status_code == KINDS[name].status


@each_kind
async def test_every_response_carries_the_callers_id(name: str) -> None:
    headers = await headers_of(name)
    assert headers.get_list("X-Request-ID") == ["mine.1_a-Z"]


@each_error
async def test_every_error_has_the_one_form_and_the_id(name: str) -> None:
    response = (await answer_to_kind(name)).response
    assert response.headers.get_list("Content-Type") == ["application/json"]
    assert list(response.json()) == ["error", "message", "details", "request_id"]
    assert response.json()["request_id"] == "mine.1_a-Z"


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("a", True),
        ("A" * 128, True),
        ("A" * 129, False),
        ("", False),
        ("a b", False),
        ("a/b", False),
        ("a\u00e9", False),
        ("a\n", False),
    ],
    ids=["1", "128", "129", "empty", "space", "slash", "latin", "line feed"],
)
async def test_an_id_is_taken_if_it_is_short_and_plain(given: str, taken: bool) -> None:
    app = probed()
    async with connect(app) as api:
        headers = [(b"X-Request-ID", given.encode("latin-1"))]
        response = await api.get("/nowhere", headers=headers)
    sent = response.headers["X-Request-ID"]
    assert (sent == given) is taken
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", sent)


async def test_requests_without_an_id_get_new_ones_which_do_not_leak() -> None:
    async with connect(probed()) as api:
        answers = [
            await api.get("/nowhere", headers=headers)
            for headers in ({"X-Request-ID": "mine"}, {}, {})
        ]
    ids = [answer.json()["request_id"] for answer in answers]
    assert ids[0] == "mine"
    assert len(set(ids)) == 3
    assert ids == [answer.headers["X-Request-ID"] for answer in answers]


@each_kind
async def test_every_response_tells_its_time(name: str) -> None:
    (duration,) = (await headers_of(name)).get_list("X-Response-Time")
    assert re.fullmatch(r"\d+\.\d\dms", duration)


SECURITY = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "accelerometer=(), camera=(), geolocation=(), microphone=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-XSS-Protection": "0",
    "Cache-Control": "no-store",
}
LOOSE = {"Content-Security-Policy", "Cross-Origin-Embedder-Policy"}


@each_kind
async def test_every_response_has_the_security_headers(name: str) -> None:
    headers = await headers_of(name)
    same = SECURITY.keys() - (LOOSE if name == "docs" else set())
    assert {n: headers.get_list(n) for n in same} == {n: [SECURITY[n]] for n in same}
    assert "Strict-Transport-Security" not in headers


@each_kind
async def test_every_response_over_https_asks_for_https(name: str) -> None:
    headers = await headers_of(name, "allowed")
    assert headers.get_list("Strict-Transport-Security") == ["max-age=63072000"]


@pytest.mark.parametrize(
    ("path", "wide"),
    [
        ("/docs", True),
        ("/docs/oauth2-redirect", True),
        ("/redoc", True),
        ("/docs/", False),
        ("/health", False),
        ("/api/v1/openapi.json", False),
    ],
)
async def test_only_the_pages_of_the_docs_have_a_policy_for_their_assets(
    path: str, wide: bool
) -> None:
    headers = (await ask(Kind(200, path=path))).response.headers
    assert ("cdn.jsdelivr.net" in headers["Content-Security-Policy"]) is wide
    assert (headers["Cross-Origin-Embedder-Policy"] == "credentialless") is wide


@pytest.mark.parametrize("path", ["/docs", "/docs/oauth2-redirect", "/redoc"])
async def test_the_policy_of_the_docs_allows_what_they_load(path: str) -> None:
    response = (await ask(Kind(200, path=path))).response
    directives = response.headers["Content-Security-Policy"].split("; ")
    policy = {name: rest for name, _, rest in (d.partition(" ") for d in directives)}
    loaded = re.findall(
        r'<(script|link)[^>]* (?:src|href)="(https://[^"]+)', response.text
    )
    for tag, url in loaded:
        kind = "script" if tag == "script" else "img" if "img/" in url else "style"
        assert any(url.startswith(source) for source in policy[f"{kind}-src"].split())
    assert "'unsafe-inline'" in policy["script-src"]
    assert (policy["connect-src"], policy["default-src"]) == ("'self'", "'none'")


@each_kind
async def test_an_allowed_origin_may_read_every_response(name: str) -> None:
    headers = await headers_of(name, "allowed")
    assert headers.get_list("Access-Control-Allow-Origin") == [ORIGIN]
    assert "Access-Control-Allow-Credentials" not in headers


@each_kind
async def test_another_origin_may_read_nothing(name: str) -> None:
    headers = await headers_of(name, "other")
    assert "Access-Control-Allow-Origin" not in headers


async def test_a_request_without_an_origin_gets_no_cors_headers() -> None:
    headers = await headers_of("route")
    assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize("name", ["route", "404", "429", "500"])
async def test_scripts_may_read_the_headers_of_this_service(name: str) -> None:
    headers = await headers_of(name, "allowed")
    exposed = set(headers["Access-Control-Expose-Headers"].split(", "))
    own = {"X-Request-ID", "X-Response-Time", "Location", "Retry-After"}
    limits = {f"X-RateLimit-{name}" for name in ("Limit", "Remaining", "Reset")}
    assert exposed == own | limits | {*SECURITY, "Strict-Transport-Security"}


@pytest.mark.parametrize(
    ("method", "header", "status"),
    [
        ("GET", "authorization", 200),
        ("POST", "content-type", 200),
        ("PATCH", "x-request-id", 200),
        ("DELETE", "authorization, content-type", 200),
        ("PUT", "authorization", 400),
        ("HEAD", "authorization", 400),
        ("GET", "x-other", 400),
    ],
)
async def test_a_preflight_allows_these_methods_and_headers_alone(
    method: str, header: str, status: int
) -> None:
    kind = Kind(status, "OPTIONS", "/api/v1/items", preflight(method, header))
    assert (await ask(kind)).response.status_code == status


@each_kind
async def test_all_responses_below_the_prefix_tell_their_limit(name: str) -> None:
    headers, kind = await headers_of(name), KINDS[name]
    named = sorted(name for name in headers if name.startswith("x-ratelimit-"))
    wanted = ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"]
    assert named == wanted or not kind.limited
    assert kind.path.startswith("/api/v1/") or not named


@each_kind
async def test_every_request_has_one_log_line(name: str) -> None:
    (line,), kind = (await answer_to_kind(name)).log, KINDS[name]
    assert (line["logger"], line["message"]) == ("service", "request")
    assert (line["method"], line["path"]) == (kind.method, kind.path)
    assert (line["status_code"], line["request_id"]) == (kind.status, "mine.1_a-Z")
    assert line["client"].startswith("198.18.")
    assert line["duration_ms"] >= 0


@each_kind
async def test_the_line_of_a_crash_and_no_other_has_the_traceback(name: str) -> None:
    (line,) = (await answer_to_kind(name)).log
    assert ("the inside shows" in line.get("exception", "")) is (name == "500")
    assert line["level"] == ("ERROR" if name == "500" else "INFO")


async def test_a_crash_tells_the_client_nothing_of_the_inside() -> None:
    response = (await answer_to_kind("500")).response
    assert response.json()["error"] == "internal_error"
    assert not re.search(r"inside|RuntimeError|Traceback|main\.py", response.text)


class Raw:
    """A request below httpx, which sees what is sent, message by message."""

    def __init__(self, app: FastAPI, path: str) -> None:
        self.app, self.sent = app, list[Message]()
        self.scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": "GET",
            "scheme": "http",
            "path": path,
            "query_string": b"",
            "headers": [],
            "client": (next(ADDRESSES), 5),
        }

    async def receive(self) -> Message:
        return {"type": "http.request"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(self) -> None:
        await self.app(self.scope, self.receive, self.send)


async def test_after_a_crash_in_a_response_that_has_begun_nothing_is_sent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main.set_up_logging(probed().state.settings)
    request = Raw(probed(), "/api/v1/crash_late")
    await request.run()
    assert [message["type"] for message in request.sent] == [
        "http.response.start",
        "http.response.body",
    ]
    (line,) = logged(capsys)
    assert (line["level"], line["status_code"]) == ("ERROR", 200)
    assert "the inside shows" in line["exception"]


async def test_what_takes_too_long_is_cancelled() -> None:
    CANCELLED.clear()
    answer = await ask(KINDS["504"])
    assert answer.response.json()["error"] == "timeout"
    assert CANCELLED.is_set()


async def test_a_timeout_of_the_routes_own_is_none_of_the_requests() -> None:
    path = "/api/v1/give_up"
    assert (await ask(Kind(500, path=path))).response.status_code != 504


async def test_what_the_server_cancels_is_a_503_with_a_time_to_retry(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main.set_up_logging(probed().state.settings)
    ENTERED.clear()
    request = Raw(probed(), "/api/v1/hang")
    task = asyncio.create_task(request.run())
    await ENTERED.wait()
    task.cancel()
    await asyncio.wait({task})
    start, body = request.sent
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"1")
    assert json.loads(body["body"])["error"] == "service_unavailable"
    (line,) = logged(capsys)
    assert (line["level"], line["status_code"]) == ("INFO", 503)


@pytest.mark.parametrize(
    ("size", "status"), [(999, 200), (1000, 200), (1001, 413)], ids=str
)
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
async def test_a_body_may_have_as_many_bytes_as_the_setting_says(
    size: int, status: int, declared: bool
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b" " * 500
        yield b" " * (size - 500)

    kind = Kind(status, "POST", "/api/v1/read")
    content = b" " * size if declared else chunks()
    answer = await ask(kind._replace(options={"content": content}))
    assert answer.response.status_code == status


async def test_a_declared_body_that_is_too_large_is_refused_unread() -> None:
    request = Raw(probed(), "/api/v1/read")
    request.scope["method"] = "POST"
    request.scope["headers"] = [(b"content-length", b"1001")]
    request.receive = None  # type: ignore[assignment,method-assign]
    await request.run()
    assert request.sent[0]["status"] == 413


async def test_an_untrusted_proxy_is_told_of_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main.WARN_ONCE.cache_clear()
    app = built_app(LOG_LEVEL="WARNING")
    main.set_up_logging(app.state.settings)
    async with connect(app, client=("192.0.2.1", 5)) as api:
        for _ in range(3):
            await api.get("/nowhere", headers={"X-Forwarded-For": "203.0.113.9"})
    (line,) = logged(capsys)
    assert line["level"] == "WARNING"
    assert "FORWARDED_ALLOW_IPS" in line["message"]


async def test_a_proxy_without_an_address_is_told_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main.WARN_ONCE.cache_clear()
    main.set_up_logging(make_settings(LOG_LEVEL="WARNING"))
    request = Raw(probed(), "/api/v1/nowhere")
    request.scope["client"] = None
    request.scope["headers"] = [(b"x-forwarded-for", b"192.0.2.1")]
    await request.run()
    assert ["FORWARDED_ALLOW_IPS" in line["message"] for line in logged(capsys)] == [
        True
    ]


async def test_an_address_has_at_most_64_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main.set_up_logging(probed().state.settings)
    request = Raw(probed(), "/api/v1/nowhere")
    request.scope["client"] = ("x" * 60_000, 0)
    await request.run()
    (line,) = logged(capsys)
    assert line["client"] == "x" * 64


async def test_a_trusted_proxy_is_not_told_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main.WARN_ONCE.cache_clear()
    app = built_app(LOG_LEVEL="WARNING")
    main.set_up_logging(app.state.settings)
    async with connect(app, client=("203.0.113.9", 0)) as api:
        await api.get("/nowhere", headers={"X-Forwarded-For": "203.0.113.9"})
    assert logged(capsys) == []


# --- Dependencies ---------------------------------------------------------------------


async def test_get_current_user_can_be_overridden(app: FastAPI, api: Api) -> None:
    user = main.User(id=7, username="eve", created_at=main.now())
    app.dependency_overrides[main.get_current_user] = lambda: user
    assert (await api.get("/users/me")).json()["username"] == "eve"


async def test_get_session_can_be_overridden(app: FastAPI) -> None:
    class Empty:
        async def scalar(self, *args: object) -> None:
            return None

    app.dependency_overrides[main.get_session] = Empty
    async with logged_in(app) as ada:
        assert (await ada.get("/users/me")).status_code == 401


async def test_the_parts_of_an_app_can_be_exchanged(app: FastAPI) -> None:
    async with logged_in(app) as ada:
        app.state.tokens = main.Tokens(make_settings(SECRET_KEY="o" * 32))
        assert (await ada.get("/users/me")).status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("GET", "/items", {}),
        ("POST", "/items", {"json": {"title": "tea"}}),
        ("GET", "/items/7", {}),
        ("POST", "/users", {"json": {"username": "bob", "password": PASSWORD}}),
        ("POST", "/auth/token", {"data": {"username": "ada", "password": PASSWORD}}),
    ],
    ids=["list", "write", "404", "register", "login"],
)
async def test_the_connection_is_given_back_before_the_response_is_sent(
    opened: FastAPI, method: str, path: str, options: Any
) -> None:
    connections = []

    async def tapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            connections.append(held(opened))
            await send(message)

        await opened(scope, receive, note)

    user = await add_user(opened.state.database)
    async with connect(tapped) as api:
        api.use(opened.state.tokens.issue(user))
        await api.request(method, path, **options)
    assert connections == [0, 0]


async def test_a_crash_gives_the_connection_back_and_keeps_nothing(
    app: FastAPI, api: Api
) -> None:
    async def write_and_crash(db: main.SessionDep) -> None:
        db.add(main.User(username="ghost", password_hash=""))
        await db.flush()
        raise RuntimeError

    app.add_api_route("/api/v1/write_and_crash", write_and_crash, methods=["POST"])
    assert (await api.post("/write_and_crash")).status_code == 500
    assert held(app) == 0
    async with app.state.database.reader() as db:
        assert await main.find_user_named(db, "ghost") is None


# --- Health routes --------------------------------------------------------------------


async def drop_a_table(opened: FastAPI) -> None:
    async with opened.state.database.writer() as db:
        await db.execute(sa.text("DROP TABLE items"))
        await db.commit()


async def test_health_tells_status_version_time_and_checks(guest: Api) -> None:
    response = await guest.get("http://test/health")
    body = response.json()
    age = main.now() - datetime.fromisoformat(body.pop("timestamp"))
    assert response.status_code == 200
    assert abs(age.total_seconds()) < PATIENCE_SECONDS
    assert body == {
        "status": "healthy",
        "version": "1.0.0",
        "checks": {"database": {"status": "healthy"}},
    }


async def test_readiness_is_plain(guest: Api) -> None:
    response = await guest.get("http://test/health/ready")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
async def test_health_answers_head_as_get_without_the_body(
    guest: Api, path: str
) -> None:
    head = await guest.head(f"http://test{path}")
    get = await guest.get(f"http://test{path}")
    assert (head.status_code, get.status_code) == (200, 200)
    assert head.headers.keys() == get.headers.keys()


async def test_without_its_tables_the_database_is_unhealthy(
    opened: FastAPI, guest: Api
) -> None:
    await drop_a_table(opened)
    response = await guest.get("http://test/health")
    assert response.status_code == 503
    assert response.json()["status"] == "degraded"
    assert response.json()["checks"] == {"database": {"status": "unhealthy"}}


async def test_a_service_without_its_tables_is_alive_not_ready_and_mends_itself(
    hasty: None,
    opened: FastAPI,
    guest: Api,
) -> None:
    await drop_a_table(opened)
    ready, alive = [
        await guest.get(f"http://test/health/{p}") for p in ("ready", "live")
    ]
    assert (ready.status_code, ready.json()) == (503, {"status": "not_ready"})
    assert (alive.status_code, alive.json()) == (200, {"status": "alive"})
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await guest.get("http://test/health/ready")).status_code != 200:
            pass


async def test_without_redis_the_service_is_degraded_but_ready() -> None:
    async with serve(REDIS_URL=f"redis://127.0.0.1:{free_port()}") as api:
        health = await api.get("http://test/health")
        ready = await api.get("http://test/health/ready")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    checks = {"database": {"status": "healthy"}, "redis": {"status": "unhealthy"}}
    assert health.json()["checks"] == checks
    assert ready.status_code == 200


@needs_redis
async def test_with_redis_the_service_says_so() -> None:
    async with serve(REDIS_URL=REDIS_URL) as api:
        body = (await api.get("http://test/health")).json()
    assert body["status"] == "healthy"
    assert body["checks"]["redis"] == {"status": "healthy"}


async def test_checks_end_even_against_frozen_servers(
    app: FastAPI, api: Api, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.CHECK_SECONDS <= 2
    monkeypatch.setattr(main, "CHECK_SECONDS", 0.05)
    address = f"127.0.0.1:{silent_port}"
    frozen = make_settings(
        DATABASE_URL=f"postgresql://u@{address}/d", REDIS_URL=f"redis://{address}"
    )
    monkeypatch.setattr(app.state, "limiter", main.Limiter(frozen))
    monkeypatch.setattr(app.state, "database", main.Database(frozen))
    async with asyncio.timeout(2):  # psycopg alone would give up after 5
        health = await api.get("http://test/health")
        ready = await api.get("http://test/health/ready")
    unhealthy = {"status": "unhealthy"}
    assert health.json()["checks"] == {"database": unhealthy, "redis": unhealthy}
    assert (health.status_code, ready.status_code) == (503, 503)


async def test_a_check_of_redis_that_takes_too_long_is_unhealthy(
    app: FastAPI, api: Api, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = main.Limiter(make_settings(REDIS_URL=f"redis://127.0.0.1:{silent_port}"))
    monkeypatch.setattr(app.state, "limiter", limiter)
    monkeypatch.setattr(main, "CHECK_SECONDS", 0.2)
    limiter.turns = asyncio.Semaphore(0)  # others wait for it
    async with asyncio.timeout(PATIENCE_SECONDS):
        checks = (await api.get("http://test/health")).json()["checks"]
    healthy, unhealthy = {"status": "healthy"}, {"status": "unhealthy"}
    assert checks == {"database": healthy, "redis": unhealthy}


async def test_a_check_that_cannot_be_cancelled_is_left_behind(
    opened: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "CHECK_SECONDS", 0.05)
    thawed = asyncio.Event()

    class Frozen:
        async def __aenter__(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await thawed.wait()

        async def __aexit__(self, *error: object) -> None: ...

    database = opened.state.database
    database.reader = Frozen
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await database.answers() is False
    thawed.set()


async def test_checks_at_the_same_time_share_one_probe(
    opened: FastAPI, guest: Api
) -> None:
    statements: list[str] = []
    sa.event.listen(
        pools_of(opened)[0],
        "checkout",
        lambda *_: statements.append("checkout"),
    )
    probes = [guest.get("http://test/health/ready") for _ in range(5)]
    answers = await asyncio.gather(*probes)
    assert {answer.status_code for answer in answers} == {200}
    assert len(statements) == 1


async def test_liveness_touches_nothing() -> None:
    # No lifespan: there is no database yet.
    async with connect(main.create_app(make_settings())) as api:
        response = await api.get("http://test/health/live")
    assert (response.status_code, response.json()) == (200, {"status": "alive"})


# --- API routes -----------------------------------------------------------------------


async def test_registering_tells_who_was_made_and_where(guest: Api) -> None:
    response = await guest.register("Ada")
    user = response.json()
    assert response.status_code == 201
    assert list(user) == ["id", "username", "created_at"]
    assert user["username"] == "ada"
    assert response.headers["Location"] == f"/api/v1/users/{user['id']}"


async def test_a_registered_user_logs_in_and_is_found_at_the_location(
    guest: Api,
) -> None:
    registered = await guest.register()
    await guest.login()
    found = await guest.get(f"http://test{registered.headers['Location']}")
    me = await guest.get("/users/me")
    assert registered.json() == found.json() == me.json()


async def test_a_token_says_what_it_is_and_how_long_it_lasts(
    opened: FastAPI, guest: Api
) -> None:
    await add_user(opened.state.database)
    form = {"username": "ADA", "password": PASSWORD}
    response = await guest.post("/auth/token", data=form)
    body = response.json()
    assert response.status_code == 200
    assert sorted(body) == ["access_token", "expires_in", "token_type"]
    assert (body["token_type"], body["expires_in"]) == ("bearer", 1800)


async def test_a_taken_name_is_a_conflict(opened: FastAPI, guest: Api) -> None:
    await add_user(opened.state.database)
    response = await guest.register("ADA")
    assert (response.status_code, response.json()["error"]) == (409, "conflict")


async def test_a_new_password_kills_the_tokens_issued_before(ada: Api) -> None:
    change = {"current_password": PASSWORD, "new_password": PASSWORD[::-1]}
    changed = await ada.patch("/users/me", json=change)
    assert (changed.status_code, changed.content) == (204, b"")
    assert (await ada.get("/users/me")).status_code == 401
    await ada.login(password=PASSWORD[::-1])
    assert (await ada.get("/users/me")).status_code == 200


async def test_a_wrong_current_password_is_forbidden(ada: Api) -> None:
    change = {"current_password": "wrong", "new_password": PASSWORD[::-1]}
    assert (await ada.patch("/users/me", json=change)).status_code == 403
    assert (await ada.get("/users/me")).status_code == 200


async def test_a_deleted_user_is_gone_with_items_and_token(ada: Api, bob: Api) -> None:
    me = (await ada.get("/users/me")).json()
    await ada.post("/items", json={"title": "tea"})
    deleted = await ada.delete("/users/me")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert (await ada.get("/items")).status_code == 401
    assert (await bob.get(f"/users/{me['id']}")).status_code == 404


async def test_a_new_item_tells_what_and_where_it_is(ada: Api) -> None:
    response = await ada.post("/items", json={"title": "tea"})
    item = response.json()
    assert response.status_code == 201
    assert list(item) == ["id", "title", "description", "created_at", "updated_at"]
    assert (item["title"], item["description"]) == ("tea", None)
    assert response.headers["Location"] == f"/api/v1/items/{item['id']}"
    assert (await ada.get(f"/items/{item['id']}")).json() == item


@pytest.mark.parametrize(
    ("patch", "changed"),
    [
        ({"title": "milk"}, {"title": "milk", "description": "hot"}),
        ({"description": "cold"}, {"title": "tea", "description": "cold"}),
        ({"description": None}, {"title": "tea", "description": None}),
        ({}, {"title": "tea", "description": "hot"}),
    ],
    ids=str,
)
async def test_a_patch_changes_what_is_sent_and_nothing_else(
    ada: Api, patch: Any, changed: Any
) -> None:
    new = {"title": "tea", "description": "hot"}
    item = (await ada.post("/items", json=new)).json()
    response = await ada.patch(f"/items/{item['id']}", json=patch)
    moved = response.json().pop("updated_at") != item["updated_at"]
    assert response.status_code == 200
    assert response.json().items() >= (changed | {"id": item["id"]}).items()
    assert moved is bool(patch)


async def test_a_deleted_item_is_gone(ada: Api) -> None:
    item = (await ada.post("/items", json={"title": "tea"})).json()
    deleted = await ada.delete(f"/items/{item['id']}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert (await ada.get(f"/items/{item['id']}")).status_code == 404


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
async def test_someone_elses_item_is_a_404(ada: Api, bob: Api, method: str) -> None:
    item = (await ada.post("/items", json={"title": "tea"})).json()
    body = {"title": "mine"} if method == "PATCH" else None
    theirs = await bob.request(method, f"/items/{item['id']}", json=body)
    none = await bob.request(method, "/items/999", json=body)
    assert theirs.status_code == none.status_code == 404
    assert theirs.json()["message"] == none.json()["message"]
    assert (await ada.get(f"/items/{item['id']}")).json() == item


async def test_lists_are_paged_by_id_up_to_a_full_last_page(ada: Api, bob: Api) -> None:
    for n in range(4):
        await ada.post("/items", json={"title": f"{n}"})
        await bob.post("/items", json={"title": "not ada's"})
    first = (await ada.get("/items?limit=2")).json()
    last = (await ada.get(f"/items?limit=2&after={first['next']}")).json()
    assert [item["title"] for item in first["items"]] == ["0", "1"]
    assert first["next"] == first["items"][1]["id"]
    assert [item["title"] for item in last["items"]] == ["2", "3"]
    assert last["next"] is None


async def test_users_are_listed_by_id_page_by_page(ada: Api, bob: Api) -> None:
    first = (await ada.get("/users?limit=1")).json()
    last = (await bob.get(f"/users?limit=1&after={first['next']}")).json()
    assert [user["username"] for user in first["users"]] == ["ada"]
    assert [user["username"] for user in last["users"]] == ["bob"]
    assert (first["next"], last["next"]) == (first["users"][0]["id"], None)


@pytest.mark.parametrize("path", ["/users", "/items"])
@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("limit=1", 200),
        ("limit=100", 200),
        (f"after={2**63 - 1}", 200),
        ("after=0", 200),
        ("limit=0", 422),
        ("limit=101", 422),
        ("after=-1", 422),
        (f"after={2**63}", 422),
        ("after=x", 422),
    ],
)
async def test_a_page_is_asked_for_within_bounds(
    ada: Api, path: str, query: str, status: int
) -> None:
    assert (await ada.get(f"{path}?{query}")).status_code == status


async def test_a_page_has_twenty_rows_unless_asked_otherwise(
    opened: FastAPI, ada: Api
) -> None:
    me = (await ada.get("/users/me")).json()
    moment = main.now()
    rows = [
        main.Item(owner_id=me["id"], title=f"{n}", updated_at=moment) for n in range(21)
    ]
    async with opened.state.database.writer() as db:
        db.add_all(rows)
        await db.commit()
    page = (await ada.get("/items")).json()
    assert (len(page["items"]), page["next"]) == (20, page["items"][19]["id"])


@pytest.mark.parametrize("kind", ["users", "items"])
@pytest.mark.parametrize("number", ["0", "-1", str(2**63), "x"])
async def test_what_is_no_id_is_not_valid(ada: Api, kind: str, number: str) -> None:
    assert (await ada.get(f"/{kind}/{number}")).status_code == 422


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/users"),
        ("GET", "/users/me"),
        ("PATCH", "/users/me"),
        ("DELETE", "/users/me"),
        ("GET", "/users/1"),
        ("POST", "/items"),
        ("GET", "/items"),
        ("GET", "/items/1"),
        ("PATCH", "/items/1"),
        ("DELETE", "/items/1"),
    ],
)
async def test_all_but_registration_and_login_want_a_token(
    guest: Api, method: str, path: str
) -> None:
    response = await guest.request(method, path)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/auth/token", "POST"),
        ("PUT", "/users/1", "GET"),
        ("POST", "/items/1", "GET"),
    ],
)
async def test_a_method_that_is_not_there_is_405_and_says_what_is(
    guest: Api, method: str, path: str, allowed: str
) -> None:
    response = await guest.request(method, path)
    assert response.status_code == 405
    assert allowed in response.headers["Allow"].split(", ")


@pytest.mark.parametrize(
    "path", ["/api/v1/items/", "/api/v1/users/", "/health/", "/docs/", "/api/v1"]
)
async def test_a_trailing_slash_is_another_path(ada: Api, path: str) -> None:
    response = await ada.get(f"http://test{path}")
    assert response.status_code == 404
    assert "Location" not in response.headers


@cache
def document() -> dict[str, Any]:
    return built_app().openapi()


def operations() -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path.removeprefix('/api/v1')}": operation
        for path, methods in document()["paths"].items()
        for method, operation in methods.items()
        if path.startswith("/api/v1/")
    }


STATUSES = {  # besides 429, 500, 503 and 504
    "POST /users": {201, 400, 409, 413, 422},
    "GET /users": {200, 401, 422},
    "GET /users/me": {200, 401},
    "PATCH /users/me": {204, 400, 401, 403, 413, 422},
    "DELETE /users/me": {204, 401},
    "GET /users/{user_id}": {200, 401, 404, 422},
    "POST /auth/token": {200, 400, 401, 413, 422},
    "POST /items": {201, 400, 401, 413, 422},
    "GET /items": {200, 401, 422},
    "GET /items/{item_id}": {200, 401, 404, 422},
    "PATCH /items/{item_id}": {200, 400, 401, 404, 413, 422},
    "DELETE /items/{item_id}": {204, 401, 404, 422},
}


def test_the_document_names_each_route_and_each_status_that_it_can_give() -> None:
    named = {n: {int(s) for s in o["responses"]} for n, o in operations().items()}
    assert named == {n: s | {429, 500, 503, 504} for n, s in STATUSES.items()}


def test_in_the_document_each_error_is_an_error_response() -> None:
    schemas = {
        response["content"]["application/json"]["schema"]["$ref"]
        for operation in operations().values()
        for status, response in operation["responses"].items()
        if int(status) >= 400
    }
    assert schemas == {"#/components/schemas/ErrorResponse"}
    assert "HTTPValidationError" not in document()["components"]["schemas"]


def test_in_the_document_operations_have_short_names() -> None:
    names = [operation["operationId"] for operation in operations().values()]
    assert len(set(names)) == 12
    assert all(re.fullmatch(r"(post|get|patch|delete)_[a-z]{2,5}", n) for n in names)


def test_the_document_asks_for_a_token_where_one_is_wanted() -> None:
    free = {name for name, o in operations().items() if not o.get("security")}
    assert free == {"POST /users", "POST /auth/token"}


def test_the_document_has_each_operation_described() -> None:
    assert all(operation["description"] for operation in operations().values())


@pytest.mark.parametrize("prefix", ["/api/v1", "/v9"])
async def test_all_of_the_api_stands_below_the_prefix(prefix: str) -> None:
    async with serve(API_V1_PREFIX=prefix) as api:
        found = await api.get(f"http://test{prefix}/openapi.json")
        unknown = await api.get(f"http://test{prefix}/users/me")
        docs = await api.get("http://test/docs")
    assert unknown.status_code == 401
    assert "X-RateLimit-Limit" in unknown.headers
    scheme = found.json()["components"]["securitySchemes"]["OAuth2PasswordBearer"]
    assert scheme["flows"]["password"]["tokenUrl"] == f"{prefix}/auth/token"
    paths = found.json()["paths"]
    assert all(path.startswith((f"{prefix}/", "/health")) for path in paths)
    assert f"{prefix}/openapi.json" in docs.text


# --- Application ----------------------------------------------------------------------


def test_an_app_bears_the_names_of_its_settings() -> None:
    names = {"PROJECT_NAME": "Tea", "PROJECT_DESCRIPTION": "Hot.", "VERSION": "9"}
    app = main.create_app(make_settings(**names))
    assert (app.title, app.description, app.version) == ("Tea", "Hot.", "9")


async def test_the_lifespan_closes_the_connections_that_it_opens() -> None:
    app = built_app()
    async with app.router.lifespan_context(app), connect(app) as api:
        await api.get("http://test/health/ready")
        pools = pools_of(app)
        assert sum(pool.checkedin() for pool in pools) > 0
    assert [pool.checkedin() + pool.checkedout() for pool in pools] == [0, 0]


async def test_after_the_lifespan_no_task_is_left() -> None:
    before = asyncio.all_tasks()
    app = built_app()
    async with app.router.lifespan_context(app):
        assert asyncio.all_tasks() > before
    assert asyncio.all_tasks() == before


@needs_redis
async def test_the_lifespan_closes_its_connections_to_redis() -> None:
    app = built_app(REDIS_URL=REDIS_URL)
    async with app.router.lifespan_context(app):
        number = await app.state.limiter.redis.client_id()
    async with Redis.from_url(REDIS_URL) as redis:
        looks = [await redis.client_list(client_id=[number]) for _ in range(100)]
    assert looks[-1] == []


@pytest.mark.parametrize("name", ["main:app", "main:create_app()"])
async def test_the_app_can_be_served_by_its_names(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "k" * 32)
    app = import_app(name)
    vars(main).pop("app", None)
    async with connect(app) as api:
        assert (await api.get("http://test/health/live")).status_code == 200


def test_the_app_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "k" * 32)
    first, second = main.app, main.app
    vars(main).pop("app")
    assert first is second


def test_a_name_that_is_not_there_is_missed() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        main.nonsense  # noqa: B018


def test_importing_reads_no_environment_and_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in main.Settings.model_fields:
        monkeypatch.setenv(name, "nonsense")
    spec = importlib.util.spec_from_file_location("again", main.__file__)
    assert spec
    assert spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert list(tmp_path.iterdir()) == []


# --- gunicorn.conf.py -----------------------------------------------------------------

ROOT = Path(main.__file__).parent
SERVER_VARIABLES = ["BIND", "PORT", "WORKERS", "MAX_REQUESTS", "GRACEFUL_TIMEOUT"]
LINE_FIELDS = ["timestamp", "level", "logger", "message", "request_id"]


class Service:
    """A real gunicorn, started with one word in a folder with the two files."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder, self.port = folder, free_port()
        for name in ("main.py", "gunicorn.conf.py"):
            (folder / name).symlink_to(ROOT / name)
        names = {*main.Settings.model_fields, *SERVER_VARIABLES, "FORWARDED_ALLOW_IPS"}
        inherited = {k: v for k, v in os.environ.items() if k not in names}
        own = {"SECRET_KEY": "k" * 32, "BIND": f"127.0.0.1:{self.port}"}
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            limits=httpx.Limits(max_keepalive_connections=0),
            timeout=PATIENCE_SECONDS,
        )
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("gunicorn")],
                cwd=folder,
                env=inherited | own | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def lines(self) -> list[dict[str, Any]]:
        text = (self.folder / "log").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def messages(self) -> list[str]:
        return [line["message"] for line in self.lines()]

    def workers(self) -> list[int]:
        """The pids of all that were ever started."""
        booting = "Booting worker with pid: "
        return [
            int(text.removeprefix(booting))
            for text in self.messages()
            if text.startswith(booting)
        ]

    def await_workers(self, count: int) -> None:
        ready = "Application startup complete."
        until(lambda: self.messages().count(ready) >= count, f"{count} workers")

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.client.get(path, headers=headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_SECONDS)


@contextmanager
def started(folder: Path, **variables: str) -> Iterator[Service]:
    service = Service(folder, **variables)
    try:
        service.await_workers(int(variables["WORKERS"]))
        with service.client:
            yield service
    finally:
        with suppress(ProcessLookupError):  # it has come to its end in the test
            os.killpg(service.process.pid, signal.SIGKILL)
        service.process.wait()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with started(folder, WORKERS="2", RATE_LIMIT_REQUESTS="20") as service:
        yield service


def answer_to(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = iter(lambda: client.recv(65536), b"")
    return b"".join(parts)


def test_one_word_starts_the_service(service: Service) -> None:
    response = service.get("/health/ready")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})
    assert (service.folder / "app.db").exists()


@pytest.mark.parametrize("path", ["/health/live", "/api/v1/users/me", "/nowhere"])
def test_no_response_names_the_server(service: Service, path: str) -> None:
    assert "Server" not in service.get(path).headers


def test_all_that_is_logged_has_one_form(service: Service) -> None:
    service.get("/health/live")
    until(lambda: "request" in service.messages(), "the request's line")
    lines = service.lines()
    assert {line["logger"] for line in lines} >= {
        "gunicorn.error",
        "uvicorn.error",
        "service",
    }
    assert all(list(line)[:5] == LINE_FIELDS for line in lines)


def test_a_request_makes_one_line(service: Service) -> None:
    sent = {"X-Request-ID": "only-once"}
    service.get("/health/live?secret=1", **sent)
    until(lambda: "only-once" in (service.folder / "log").read_text(), "the line")
    mine = [line for line in service.lines() if line["request_id"] == "only-once"]
    assert [(line["message"], line["path"]) for line in mine] == [
        ("request", "/health/live")
    ]


def test_all_workers_share_one_budget(service: Service) -> None:
    client = {"X-Forwarded-For": "203.0.113.1"}
    statuses = []
    one, two = service.workers()[-2:]
    for sleeper in (one, two):
        os.kill(sleeper, signal.SIGSTOP)
        try:
            tries = [service.get("/api/v1/nowhere", **client) for _ in range(11)]
        finally:
            os.kill(sleeper, signal.SIGCONT)
        statuses += [response.status_code for response in tries]
    assert statuses == [404] * 20 + [429] * 2


def test_the_client_of_a_trusted_proxy_is_logged(service: Service) -> None:
    sent = {"X-Request-ID": "by-proxy", "X-Forwarded-For": "203.0.113.2"}
    service.get("/health/live", **sent)
    until(lambda: "by-proxy" in (service.folder / "log").read_text(), "the line")
    (line,) = [line for line in service.lines() if line["request_id"] == "by-proxy"]
    assert line["client"] == "203.0.113.2"


def test_https_by_the_word_of_a_trusted_proxy_is_https(service: Service) -> None:
    sent = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.3"}
    assert "Strict-Transport-Security" in service.get("/health/live", **sent).headers
    assert "Strict-Transport-Security" not in service.get("/health/live").headers


@pytest.mark.parametrize(
    ("size", "status"), [(60_000, b"200"), (70_000, b"431")], ids=str
)
def test_a_head_may_have_64_kib(service: Service, size: int, status: bytes) -> None:
    filler = b"x-filler: " + b"x" * size
    with service.connect() as client:
        client.sendall(b"GET /health/live HTTP/1.1\r\nhost: test\r\n" + filler)
        if status == b"200":
            client.sendall(b"\r\nconnection: close\r\n\r\n")
        assert answer_to(client).split(b" ")[1] == status


def test_who_shuts_the_sending_side_is_answered(service: Service) -> None:
    with service.connect() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: test\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        assert answer_to(client).startswith(b"HTTP/1.1 200 ")


def test_who_sends_too_much_and_wants_to_close_can_read_the_refusal(
    service: Service,
) -> None:
    client = HTTPConnection("127.0.0.1", service.port, PATIENCE_SECONDS)
    headers = {"Connection": "close", "X-Forwarded-For": "203.0.113.40"}
    client.request("POST", "/api/v1/users", b"x" * 20_000_000, headers)
    assert client.getresponse().status == 413
    client.close()


def test_a_killed_worker_is_replaced_and_nobody_notices(service: Service) -> None:
    before = service.workers()
    os.kill(before[-1], signal.SIGKILL)
    service.await_workers(len(before) + 1)
    assert len(service.workers()) == len(before) + 1
    assert service.process.poll() is None
    assert service.get("/health/ready").status_code == 200


def test_new_workers_at_sighup_keep_the_budgets_and_the_form_of_the_log(
    service: Service,
) -> None:
    client = {"X-Forwarded-For": "203.0.113.4"}
    before = [service.get("/api/v1/nowhere", **client) for _ in range(21)]
    count = len(service.workers())
    service.process.send_signal(signal.SIGHUP)
    service.await_workers(count + 2)
    after = service.get("/api/v1/nowhere", **client)
    assert [before[-2].status_code, before[-1].status_code] == [404, 429]
    assert after.status_code == 429
    assert all(list(line)[:5] == LINE_FIELDS for line in service.lines())


def test_sigterm_answers_what_was_received_and_ends_well(tmp_path: Path) -> None:
    body = json.dumps({"username": "ada", "password": PASSWORD}).encode()
    head = "POST /api/v1/users HTTP/1.1\r\nhost: test\r\ncontent-type: application/json"
    head += f"\r\ncontent-length: {len(body)}\r\nexpect: 100-continue\r\n\r\n"
    with started(tmp_path, WORKERS="1") as service, service.connect() as client:
        client.sendall(head.encode())
        assert client.recv(100).startswith(b"HTTP/1.1 100")
        service.process.terminate()
        until(lambda: "Shutting down" in service.messages(), "SIGTERM")
        client.sendall(body)
        assert b"HTTP/1.1 201" in answer_to(client)
        assert service.process.wait(PATIENCE_SECONDS) == 0
    assert "Application shutdown complete." in service.messages()
    with sqlite3.connect(tmp_path / "app.db") as db:
        assert db.execute("SELECT username FROM users").fetchall() == [("ada",)]
    db.close()


def load_config() -> ModuleType:
    path = ROOT / "gunicorn.conf.py"
    spec = importlib.util.spec_from_file_location("gunicorn_conf", path)
    assert spec
    assert spec.loader
    config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config)
    return config


@pytest.fixture
def bare_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SERVER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("bare_server")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORKERS", "0"),
        ("WORKERS", "many"),
        ("PORT", "-1"),
        ("PORT", "0"),
        ("PORT", "65536"),
        ("BIND", "127.0.0.1:http"),
        ("BIND", "127.0.0.1:65536"),
        ("BIND", "127.0.0.1:-1"),
        ("GRACEFUL_TIMEOUT", "0"),
        ("GRACEFUL_TIMEOUT", "1.5"),
        ("MAX_REQUESTS", "-1"),
    ],
)
def test_a_bad_variable_ends_the_start_with_a_line_that_names_it(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"^bad settings: {name}: ") as ending:
        load_config()
    assert "\n" not in str(ending.value)


def test_a_bad_setting_ends_gunicorn_before_it_listens(tmp_path: Path) -> None:
    service = Service(tmp_path, WORKERS="1", ACCESS_TOKEN_EXPIRE_MINUTES="0")
    assert service.process.wait(PATIENCE_SECONDS) != 0
    log = (tmp_path / "log").read_text()
    assert "ACCESS_TOKEN_EXPIRE_MINUTES" in log.splitlines()[-1]
    assert "Listening" not in log


@pytest.mark.usefixtures("bare_server")
@pytest.mark.parametrize(
    ("variables", "bind"),
    [
        ({}, ["0.0.0.0:8000"]),
        ({"PORT": "80"}, ["0.0.0.0:80"]),
        ({"PORT": "80", "BIND": "[::1]:9"}, ["[::1]:9"]),
        ({"PORT": "", "BIND": ""}, ["0.0.0.0:8000"]),
        ({"BIND": ":80,unix:/tmp/s"}, [":80", "unix:/tmp/s"]),
        ({"BIND": "fd://3"}, ["fd://3"]),
    ],
    ids=["default", "port", "bind", "empty", "two", "descriptor"],
)
def test_bind_goes_before_port(
    variables: dict[str, str], bind: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert load_config().bind == bind


@pytest.mark.usefixtures("bare_server")
def test_workers_default_to_the_cpus_that_may_be_used() -> None:
    config = load_config()
    assert config.workers == config.usable_cpus()
    assert 1 <= config.workers <= (os.cpu_count() or 1)


@pytest.mark.usefixtures("bare_server")
def test_what_the_contract_says_of_processes_stands_in_the_file() -> None:
    config = load_config()
    assert (config.wsgi_app, config.preload_app) == ("main:app", True)
    assert (config.keepalive, config.max_requests) == (75, 0)
    assert config.control_socket_disable is True
    assert config.graceful_timeout < config.timeout


class Timer(NamedTuple):
    due: float
    callback: Callable[..., None]
    arguments: tuple[Any, ...]
    pending: list["Timer"]

    def cancel(self) -> None:
        if self in self.pending:
            self.pending.remove(self)


class Task:
    def add_done_callback(self, callback: Any) -> None: ...


class HandLoop:
    """An event loop whose time is set by hand."""

    def __init__(self) -> None:
        self.now, self.pending = 0.0, list[Timer]()

    def call_later(self, seconds: float, callback: Any, *arguments: Any) -> Timer:
        timer = Timer(self.now + seconds, callback, arguments, self.pending)
        self.pending.append(timer)
        return timer

    def create_task(self, request: Any) -> "Task":
        request.close()  # the test itself says when it is answered
        return Task()

    def forward(self, seconds: float) -> None:
        self.now += seconds
        for timer in [timer for timer in self.pending if timer.due <= self.now]:
            timer.cancel()
            timer.callback(*timer.arguments)


class Wire(asyncio.Transport):
    """A transport that remembers what is done to it."""

    def __init__(self, **extra: Any) -> None:
        super().__init__(extra)
        self.written, self.ending = b"", ""

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.ending = "closed"

    def abort(self) -> None:
        self.ending = "aborted"

    def is_closing(self) -> bool:
        return bool(self.ending)


def connect_wire(wire: Wire) -> tuple[Any, HandLoop, Wire]:
    uvicorn_config: Any = uvicorn.Config(Raw, log_config=None, timeout_keep_alive=75)
    uvicorn_config.load()
    uvicorn_config.server = SimpleNamespace(should_exit=False)
    loop = HandLoop()
    protocol = load_config().Protocol(uvicorn_config, ServerState(), {}, loop)
    protocol.connection_made(wire)
    return protocol, loop, wire


@pytest.fixture
def connection() -> tuple[Any, HandLoop, Wire]:
    """A connection that has just been made, its loop, and the wire."""
    return connect_wire(Wire())


def finish(protocol: Any) -> None:
    """What uvicorn does when the last of an answer has been written."""
    protocol.cycle.response_complete = True
    if not protocol.cycle.keep_alive:
        protocol.transport.close()
    protocol.on_response_complete()


@pytest.mark.usefixtures("bare_server")
def test_a_head_that_is_not_whole_after_10_s_gets_408(connection: Any) -> None:
    protocol, loop, wire = connection
    protocol.data_received(b"GET / HTTP/1.1\r\n")
    loop.forward(9.9)
    assert (wire.written, wire.ending) == (b"", "")
    protocol.data_received(b"x: y\r\n")  # a little more does not buy more time
    loop.forward(0.1)
    assert wire.written.startswith(b"HTTP/1.1 408 ")
    assert wire.ending == "closed"


@pytest.mark.usefixtures("bare_server")
def test_a_connection_without_a_byte_in_10_s_is_ended(connection: Any) -> None:
    _, loop, wire = connection
    loop.forward(9.9)
    assert wire.ending == ""
    loop.forward(0.1)
    assert (wire.written, wire.ending) == (b"", "aborted")


@pytest.mark.usefixtures("bare_server")
def test_a_head_that_grows_over_64_kib_gets_431(connection: Any) -> None:
    protocol, _, wire = connection
    protocol.data_received(b"GET / HTTP/1.1\r\nx: ")
    protocol.data_received(b"x" * (2**16 - 19))
    assert wire.ending == ""
    protocol.data_received(b"x")
    assert wire.written.startswith(b"HTTP/1.1 431 ")
    assert wire.ending == "closed"


@pytest.mark.usefixtures("bare_server")
def test_an_answer_that_nobody_takes_is_broken_off_after_a_minute(
    connection: Any,
) -> None:
    protocol, loop, wire = connection
    protocol.forget_deadline()
    protocol.pause_writing()
    loop.forward(59.9)
    assert wire.ending == ""
    loop.forward(0.1)
    assert wire.ending == "aborted"


GET = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 2\r\n"


@pytest.mark.usefixtures("bare_server")
def test_a_head_that_begins_behind_another_has_10_s(connection: Any) -> None:
    protocol, loop, wire = connection
    protocol.data_received(GET + b"GET / HTTP/1.1\r\n")
    finish(protocol)
    loop.forward(10)
    assert wire.written.startswith(b"HTTP/1.1 408 ")


@pytest.mark.usefixtures("bare_server")
def test_a_head_that_comes_behind_another_may_have_64_kib(connection: Any) -> None:
    protocol, _, wire = connection
    head = b"GET / HTTP/1.1\r\nx: " + b"x" * 2**16 + b"\r\n\r\n"
    protocol.data_received(GET + head)
    assert wire.written.startswith(b"HTTP/1.1 431 ")


@pytest.mark.usefixtures("bare_server")
def test_after_an_early_answer_the_connection_is_kept_as_long_as_any(
    connection: Any,
) -> None:
    protocol, loop, wire = connection
    protocol.data_received(POST + b"\r\n")
    finish(protocol)
    protocol.data_received(b"{}")
    loop.forward(74.9)
    assert wire.ending == ""
    loop.forward(0.1)
    assert wire.ending == "aborted"


@pytest.mark.usefixtures("bare_server")
@pytest.mark.parametrize(
    ("rest", "ending"), [(b"{}", "closed"), (b"", "aborted")], ids=["sent", "not"]
)
def test_who_is_answered_early_and_wants_to_close_may_send_the_rest_for_10_s(
    rest: bytes, ending: str, connection: Any
) -> None:
    protocol, loop, wire = connection
    protocol.data_received(POST + b"connection: close\r\n\r\n")
    finish(protocol)
    loop.forward(9.9)
    assert wire.ending == ""
    protocol.data_received(rest)
    loop.forward(0.1)
    assert wire.ending == ending


@pytest.mark.usefixtures("bare_server")
def test_who_waits_to_be_asked_for_the_body_has_none_to_send(connection: Any) -> None:
    protocol, _, wire = connection
    wanting = b"connection: close\r\nexpect: 100-continue\r\n\r\n"
    protocol.data_received(POST + wanting)
    finish(protocol)
    assert wire.ending == "closed"


@pytest.mark.usefixtures("bare_server")
def test_who_wants_to_close_is_closed_after_the_answer(connection: Any) -> None:
    protocol, _, wire = connection
    protocol.data_received(POST + b"connection: close\r\n\r\n{}")
    finish(protocol)
    assert wire.ending == "closed"


@pytest.mark.usefixtures("bare_server")
def test_a_server_that_stops_closes_after_the_answer(connection: Any) -> None:
    protocol, loop, wire = connection
    protocol.data_received(POST + b"\r\n")
    protocol.shutdown()
    loop.forward(1)
    protocol.data_received(b"{}")
    finish(protocol)
    assert wire.ending == "closed"


@pytest.mark.usefixtures("bare_server")
def test_who_shuts_the_sending_side_in_a_body_is_gone(connection: Any) -> None:
    protocol, _, _ = connection
    protocol.data_received(POST + b"\r\n{")
    assert not protocol.eof_received()


@pytest.mark.usefixtures("bare_server")
def test_who_shuts_the_sending_side_after_the_answer_is_gone(connection: Any) -> None:
    protocol, _, _ = connection
    protocol.data_received(GET)
    assert protocol.eof_received()
    finish(protocol)
    assert not protocol.eof_received()


@pytest.mark.usefixtures("bare_server")
def test_a_refusal_that_nobody_takes_is_broken_off_after_a_minute(
    connection: Any,
) -> None:
    protocol, loop, wire = connection
    protocol.data_received(b"no HTTP\r\n\r\n")
    assert wire.written.startswith(b"HTTP/1.1 400 ")
    loop.forward(59.9)
    assert wire.ending == "closed"
    loop.forward(0.1)
    assert wire.ending == "aborted"


@pytest.mark.usefixtures("bare_server")
@pytest.mark.parametrize(
    ("here", "there", "client"),
    [
        ("/tmp/socket", "", "127.0.0.1"),
        (("::", 80, 0, 0), ("::ffff:192.0.2.1", 5, 0, 0), "192.0.2.1"),
        (("::", 80, 0, 0), ("2001:db8::1", 5, 0, 0), "2001:db8::1"),
        (("192.0.2.2", 80), ("192.0.2.1", 5), "192.0.2.1"),
    ],
    ids=["unix", "mapped", "ipv6", "ipv4"],
)
def test_a_client_has_an_address_that_forwarded_allow_ips_can_name(
    here: Any, there: Any, client: str
) -> None:
    own = SimpleNamespace(getsockname=lambda: here, getpeername=lambda: there)
    protocol, _, _ = connect_wire(Wire(socket=own))
    assert protocol.client[0] == client


@pytest.mark.usefixtures("bare_server")
@pytest.mark.parametrize("value", ["", "10.0.0.0/8"])
def test_no_proxies_but_those_of_this_machine_are_trusted_unless_named(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", value)
    assert load_config().forwarded_allow_ips == (value or "127.0.0.1,::1")
