"""A production-grade FastAPI service in one module: users, tokens and items over HTTP.

Read it downwards to build it up: each section uses only what stands above it. Read it
upwards to follow a request: it enters at Application and ends in Repositories.

    Settings       every variable is checked before a socket is opened
    Logging        one line a record, one record a request; no client forges a line
    Errors         every failure leaves in one form, and what crashed stays inside
    Database       a connection is held while the database is talked to, and no longer
    Schemas        whatever passes here is safe in SQL, in JSON and in a log
    Security       passwords and tokens: costly to guess, equal in time, revocable
    Repositories   SQL and nothing else
    Services       the rules; a service commits as its last act
    Rate limiting  exact sliding windows, shared by all workers, or by all hosts
    Middleware     what every response has, whoever makes it
    Dependencies   what a route asks for, and what a test overrides
    Health routes  what orchestrators ask, without telling the public why
    API routes     HTTP and nothing else
    Application    the parts list

    Run:    ENVIRONMENT=development gunicorn
    Test:   pytest
    Change: ENVIRONMENT=development uvicorn main:app --reload
"""

import asyncio
import fcntl
import hashlib
import ipaddress
import json
import logging
import math
import mmap
import os
import re
import secrets
import select
import sys
import tempfile
import time
import unicodedata
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import sqlalchemy as sa
from fastapi import APIRouter, Depends, FastAPI, Form, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import OAuth2PasswordBearer
from fastapi.telemetry import TelemetryConfig
from jose import jwk, jwt
from jose.exceptions import JWKError
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    RedisDsn,
    SecretStr,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticSerializationError, from_json, to_json
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# --- Settings -------------------------------------------------------------------------
# A variable that is not here does not exist. Nothing else reads the environment.

ASYNC_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
}


def parse_database_url(value: str | sa.URL) -> sa.URL:
    """The URL as platforms hand it out, with the async driver filled in."""
    try:
        url = sa.make_url(value)
    except (sa.exc.ArgumentError, ValueError):
        raise ValueError("is not a database URL") from None
    if url.drivername not in {*ASYNC_DRIVERS, *ASYNC_DRIVERS.values()}:
        raise ValueError("should start with sqlite:// or postgresql://")
    if url.get_backend_name() == "sqlite" and url.database in {None, "", ":memory:"}:
        raise ValueError("should name a file: memory is not shared by connections")
    return url.set(drivername=ASYNC_DRIVERS.get(url.drivername, url.drivername))


def parse_list(value: object) -> object:
    return from_json(value) if isinstance(value, str) else value


Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")]
RateLimit = Annotated[int, Field(ge=1, le=1_000_000)]


class Settings(BaseSettings):
    """What an operator can set; `.env.example` says what each is for."""

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    PROJECT_NAME: str = "Items"
    PROJECT_DESCRIPTION: str = "Users and their items."
    VERSION: str = "1.0.0"
    ENVIRONMENT: Literal["development", "test", "production"] = "production"
    DEBUG: bool = False
    API_V1_PREFIX: str = Field("/api/v1", pattern=r"^(/[A-Za-z0-9._~-]+)+$")
    SECRET_KEY: SecretStr = Field(
        default_factory=lambda: SecretStr(secrets.token_hex(32)), min_length=32
    )
    ACCESS_TOKEN_EXPIRE_MINUTES: int = Field(30, gt=0)
    ALGORITHM: Literal["HS256", "HS384", "HS512"] = "HS256"
    DATABASE_URL: Annotated[sa.URL, NoDecode, BeforeValidator(parse_database_url)] = (
        sa.make_url("sqlite:///./app.db")
    )
    DATABASE_POOL_SIZE: int = Field(5, ge=1)
    DATABASE_MAX_OVERFLOW: int = Field(10, ge=0)
    CORS_ORIGINS: Annotated[list[Origin], NoDecode, BeforeValidator(parse_list)] = []
    RATE_LIMIT_REQUESTS: RateLimit = 100
    RATE_LIMIT_WINDOW_SECONDS: int = Field(60, ge=1)
    RATE_LIMIT_LOGIN_REQUESTS: RateLimit = 10
    REDIS_URL: RedisDsn | None = None
    MAX_BODY_BYTES: int = Field(2**20, ge=1)
    REQUEST_TIMEOUT_SECONDS: float = Field(30, gt=0, allow_inf_nan=False)
    LOG_LEVEL: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"

    @field_validator("SECRET_KEY")
    @classmethod
    def check_key(cls, value: SecretStr) -> SecretStr:
        try:
            jwk.construct(value.get_secret_value(), "HS256")
        except JWKError:
            raise ValueError("should be random text, not a PEM or SSH key") from None
        return value

    @model_validator(mode="after")
    def refuse_unsafe(self) -> Self:
        if self.ENVIRONMENT == "development":
            return self
        if "SECRET_KEY" not in self.model_fields_set:
            raise ValueError("SECRET_KEY: is required outside development")
        if "*" in self.CORS_ORIGINS:
            raise ValueError("CORS_ORIGINS: * is for development only")
        if self.DEBUG and self.ENVIRONMENT == "production":
            raise ValueError("DEBUG: is refused in production, it logs SQL")
        return self


def load_settings(secrets_dir: str = "/run/secrets") -> Settings:
    """Read the environment, then `.env`, then the files of `secrets_dir`.

    Exits with one line that names each bad variable, and never with its value.
    """
    try:
        # A folder that is not there would only make pydantic-settings warn.
        folder = secrets_dir if os.path.isdir(secrets_dir) else None
        return Settings(_secrets_dir=folder)
    except ValidationError as error:
        faults = [
            ": ".join([*map(str, e["loc"][:1]), e["msg"].removeprefix("Value error, ")])
            for e in error.errors(include_url=False, include_input=False)
        ]
        raise SystemExit(f"bad settings: {'; '.join(faults)}") from None


# --- Logging --------------------------------------------------------------------------
# Each record is one line on stdout. What clients wrote is encoded, never pasted.

# Not named like the module: SQLAlchemy logs its pool under that of FairPool's module.
LOG = logging.getLogger("service")
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
PLAIN_RECORD = {*vars(logging.makeLogRecord({})), "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object a record: the usual fields, then the record's own."""

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        created = datetime.fromtimestamp(record.created, UTC)
        fields = {
            "timestamp": created.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": REQUEST_ID.get(),
        }
        own = vars(record).items()
        fields.update({key: value for key, value in own if key not in PLAIN_RECORD})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return fields

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        try:
            return to_json(fields, fallback=str, inf_nan_mode="null").decode()
        except PydanticSerializationError:  # lone surrogates, bytes that are not UTF-8
            return json.dumps(fields, default=str)


class TextFormatter(JsonFormatter):
    """Short lines for people. Control characters are escaped, also in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        traceback = fields.pop("exception", "")
        head = [fields.pop(key) for key in ("timestamp", "level", "logger", "message")]
        rest = [f"{key}={value}" for key, value in fields.items() if value is not None]
        lines = [" ".join([*head, *rest]), *traceback.splitlines()]
        escaped = (line.encode("unicode_escape").decode("ascii") for line in lines)
        return "\n    | ".join(escaped)


def is_news(record: logging.LogRecord) -> bool:
    # The request's own line has said why its response broke off.
    return "returned without completing response" not in record.msg


def set_up_logging(settings: Settings) -> None:
    """Give the service, its servers and its libraries one handler and one form."""
    development = settings.ENVIRONMENT == "development"
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(TextFormatter() if development else JsonFormatter())
    own_level = "DEBUG" if settings.DEBUG else settings.LOG_LEVEL
    levels = {
        "": "WARNING",  # libraries: at DEBUG aiosqlite would print parameters
        "sqlalchemy.engine": "INFO" if settings.DEBUG else "WARNING",
        "service": own_level,
        "uvicorn.error": own_level,
        "gunicorn.error": own_level,
    }
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    for name in ("uvicorn.access", "gunicorn.access"):  # the request line is ours
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], False
    logging.getLogger("uvicorn.error").addFilter(is_news)
    logging.captureWarnings(True)


# --- Errors ---------------------------------------------------------------------------
# Services raise these; one function writes the body of all. A class is a row.


class Kind(NamedTuple):
    slug: str
    text: str


KINDS = {
    400: Kind("bad_request", "The request cannot be read."),
    401: Kind("unauthorized", "A valid access token is required."),
    403: Kind("forbidden", "This is not allowed."),
    404: Kind("not_found", "There is nothing here."),
    405: Kind("method_not_allowed", "This path does not have that method."),
    409: Kind("conflict", "This conflicts with what is there."),
    413: Kind("payload_too_large", "The body is too large."),
    415: Kind("unsupported_media_type", "The body is of the wrong type."),
    422: Kind("validation_error", "The request is not valid."),
    429: Kind("rate_limited", "Too many requests; try again later."),
    500: Kind("internal_error", "Something went wrong; the request_id names it."),
    503: Kind("service_unavailable", "The service is not available; try again soon."),
    504: Kind("timeout", "The request took too long."),
}
MAX_DETAILS = 100  # a body of a megabyte can be wrong in a hundred thousand places


class ErrorDetail(BaseModel):
    field: str
    message: str
    type: str


class ErrorResponse(BaseModel):
    error: str
    message: str
    details: list[ErrorDetail] | None
    request_id: str


class ServiceError(HTTPException):
    """What a service raises: a status, its own words where the usual do not do."""

    status: ClassVar[int] = 500
    text: ClassVar[str | None] = None
    with_headers: ClassVar[dict[str, str]] = {}

    def __init__(self, **headers: str) -> None:
        text = self.text or KINDS[self.status].text
        super().__init__(self.status, text, {**self.with_headers, **headers})


class Unauthorized(ServiceError):
    status = 401
    with_headers = {"WWW-Authenticate": "Bearer"}


class InvalidToken(Unauthorized):
    # RFC 6750 § 3.1: the code is for requests that came with a token. All that can be
    # wrong with one is answered alike, lest a forger learns how far he got.
    with_headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}


class WrongCredentials(Unauthorized):
    # The same for a name that does not exist: who has an account is nobody's business.
    text = "Wrong username or password."


class WrongPassword(ServiceError):
    status, text = 403, "The current password is wrong."


class UserNotFound(ServiceError):
    status, text = 404, "There is no such user."


class ItemNotFound(ServiceError):
    # Also for other people's items: a 403 would confirm that the id exists.
    status, text = 404, "There is no such item."


class UsernameTaken(ServiceError):
    status, text = 409, "This username is taken."


class BodyTooLarge(ServiceError):
    status = 413


class RateLimited(ServiceError):
    status = 429


class Unavailable(ServiceError):
    status = 503
    with_headers = {"Retry-After": "1"}


class TookTooLong(ServiceError):
    status = 504


def error_response(
    error: HTTPException, details: list[dict[str, str]] | None = None
) -> Response:
    """The one form of every error."""
    usual = KINDS.get(error.status_code)
    slug = usual.slug if usual else f"http_{error.status_code}"
    # Starlette's own words are the reason phrases, which differ by Python version.
    text = error.detail if isinstance(error, ServiceError) or not usual else usual.text
    body = {"error": slug, "message": text, "details": details}
    # ASCII, because the name of an unknown field may hold lone surrogates.
    content = json.dumps(body | {"request_id": REQUEST_ID.get()})
    headers = error.headers
    return Response(content, error.status_code, headers, "application/json")


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error)


async def on_validation_error(request: Request, error: Exception) -> Response:
    # Neither the input nor the context of a fault leaves: it may be a password.
    assert isinstance(error, RequestValidationError)
    details = [
        {"field": ".".join(map(str, e["loc"])), "message": e["msg"], "type": e["type"]}
        for e in error.errors()[:MAX_DETAILS]
    ]
    return error_response(HTTPException(422), details)


# --- Database -------------------------------------------------------------------------
# Connections are in autocommit; a writer says BEGIN itself. Who waits, waits in line.

BEGIN = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "BEGIN"}
# SQLite has locked the whole file by then.
LOCK_SCHEMA = {"sqlite": "SELECT 1", "postgresql": "SELECT pg_advisory_xact_lock(7411)"}
OUTAGES = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)
CHECK_SECONDS = 2
RETRY_SECONDS = 1


def now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    type_annotation_map = {
        int: sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        datetime: sa.DateTime(timezone=True),
    }


class User(Base):
    __tablename__ = "users"
    # Without it SQLite gives a deleted user's id, which tokens name, to the next one.
    __table_args__ = {"sqlite_autoincrement": True}

    id: Mapped[int] = mapped_column(primary_key=True)
    username: Mapped[str] = mapped_column(sa.String(32), unique=True)
    password_hash: Mapped[str]
    token_version: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Item(Base):
    __tablename__ = "items"
    __table_args__ = (
        sa.Index("items_of_owner", "owner_id", "id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id, ondelete="CASCADE"))
    title: Mapped[str] = mapped_column(sa.String(200))
    description: Mapped[str | None] = mapped_column(sa.String(2000))
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class FairPool(sa.AsyncAdaptedQueuePool):
    """Hands connections out first come, first served.

    In SQLAlchemy's queue newcomers overtake whoever it has just woken: under load some
    wait until they fail. Raises sqlalchemy.exc.TimeoutError after `timeout` seconds.
    """

    def __init__(self, *args: Any, pool_size: int, max_overflow: int, **kw: Any):
        super().__init__(*args, pool_size=pool_size, max_overflow=max_overflow, **kw)
        self._turns = asyncio.Semaphore(pool_size + max_overflow)

    async def _wait_for_turn(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._turns.acquire()
        except TimeoutError:
            raise sa.exc.TimeoutError("no connection became free in time") from None

    def _do_get(self) -> Any:
        sa.util.await_(self._wait_for_turn())
        try:
            return super()._do_get()
        except BaseException:
            self._turns.release()
            raise

    def _do_return_conn(self, record: Any) -> None:
        try:
            super()._do_return_conn(record)
        finally:
            self._turns.release()


def say_begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql(BEGIN[connection.dialect.name])


def prepare_sqlite(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("busy_timeout = 5000", "journal_mode = WAL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def prepare_postgresql(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("SET TIME ZONE 'UTC'")
    cursor.close()


def drop_if_closed(connection: Any, record: Any, proxy: Any) -> None:
    # An idle connection with something to read was closed by the server. To look costs
    # a microsecond; a ping (`pool_pre_ping`) would cost each request a round trip.
    poll = select.poll()
    poll.register(connection.driver_connection.fileno(), select.POLLIN)
    if poll.poll(0):
        raise sa.exc.InvalidatePoolError


class Database:
    """A worker's engine, and the watch that makes tables and tells of outages once.

    Made after the fork: an engine must not cross it once it has opened a connection.
    """

    def __init__(self, settings: Settings) -> None:
        url = settings.DATABASE_URL
        if (
            url.get_backend_name() == "postgresql"
            and "connect_timeout" not in url.query
        ):
            url = url.update_query_dict({"connect_timeout": "5"})
        self.engine = create_async_engine(
            url,
            poolclass=FairPool,
            pool_size=settings.DATABASE_POOL_SIZE,
            max_overflow=settings.DATABASE_MAX_OVERFLOW,
            pool_timeout=5,
            isolation_level="AUTOCOMMIT",
            hide_parameters=True,  # they would stand in the log with every error
        )
        self.writing_engine = self.engine.execution_options()  # of the same pool
        self.reader = async_sessionmaker(self.engine, expire_on_commit=False)
        self.writer = async_sessionmaker(self.writing_engine, expire_on_commit=False)
        self.listen()
        self.up = asyncio.Event()
        self.asked = asyncio.Event()  # the first answer, good or bad, has come
        self.suspect = asyncio.Event()
        self._check: asyncio.Task[bool] | None = None

    def listen(self) -> None:
        engine = self.engine.sync_engine
        sa.event.listen(self.writing_engine.sync_engine, "begin", say_begin)
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", prepare_sqlite)
        else:
            sa.event.listen(engine, "connect", prepare_postgresql)
            sa.event.listen(engine, "checkout", drop_if_closed)

    def session(self, *, writes: bool) -> AsyncSession:
        """Raises Unavailable while the database is away."""
        if not self.up.is_set():
            raise Unavailable
        return self.writer() if writes else self.reader()

    async def make_tables(self) -> None:
        """Once, however many workers and hosts start together."""
        async with self.writing_engine.begin() as connection:
            await connection.execute(sa.text(LOCK_SCHEMA[connection.dialect.name]))
            await connection.run_sync(Base.metadata.create_all)

    async def watch(self) -> None:
        """Make the tables at the start and after each outage; say what changes."""
        away = False
        while True:
            try:
                async with asyncio.timeout(5):
                    await self.make_tables()
            except Exception as error:  # whatever it is, the watch goes on
                if not away:
                    reason = str(getattr(error, "orig", error)).partition("\n")[0]
                    LOG.warning("the database is away", extra={"reason": reason})
                away = True
                self.up.clear()
                self.asked.set()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if away:
                LOG.info("the database is back")
            away = False
            self.suspect.clear()
            self.up.set()
            self.asked.set()
            await self.suspect.wait()

    async def answers(self) -> bool:
        """Whether the database has its tables; known after 2 s at the latest.

        Callers share a check, so that the public cannot fill the pool with them. One
        that hangs is left behind: to cancel it on a frozen server takes 10 s.
        """
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._has_tables())
        done, _ = await asyncio.wait({check := self._check}, timeout=CHECK_SECONDS)
        if done:
            return check.result()
        self._check = None
        return False

    async def _has_tables(self) -> bool:
        try:
            async with asyncio.timeout(CHECK_SECONDS), self.reader() as session:
                for table in Base.metadata.sorted_tables:
                    await session.execute(sa.select(table).limit(0))
            return True
        except Exception as error:
            LOG.debug("the database check failed", extra={"reason": str(error)})
            self.suspect.set()
            return False

    async def close(self) -> None:
        await self.engine.dispose()


async def on_database_error(request: Request, error: Exception) -> Response:
    """Away, full or too slow: 503. A fault in the SQL: on it goes, to be a 500."""
    assert isinstance(error, sa.exc.SQLAlchemyError)
    lost = isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
    if not lost and not isinstance(error, OUTAGES):
        raise error
    request.app.state.database.suspect.set()
    return error_response(Unavailable())


# --- Schemas --------------------------------------------------------------------------
# Bounds and patterns here keep hostile text from everything below: PostgreSQL cannot
# store NUL, a length bound makes pydantic refuse lone surrogates, ids have 64 bits.

MAX_ID = 2**63 - 1
NO_NUL = r"^[^\x00]*$"


def as_utc(value: datetime) -> datetime:
    """SQLite gives naive times back; what was stored is UTC."""
    return value if value.tzinfo else value.replace(tzinfo=UTC)


UtcTime = Annotated[datetime, AfterValidator(as_utc)]
Username = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{2,31}$", to_lower=True),
    Field(description="3 to 32 letters, digits, dots, underscores and hyphens"),
]
# NIST SP 800-63B-4 § 3.1.1.2: 15 characters where nothing else is asked for, no rules
# of composition.
NewPassword = Annotated[str, Field(min_length=15, max_length=128)]
# Whatever cannot be anybody's may be sent, so that it is answered like what is wrong.
AnyName = Annotated[str, StringConstraints(max_length=1024, pattern=NO_NUL)]
AnyPassword = Annotated[str, Field(max_length=1024)]
Title = Annotated[str, Field(min_length=1, max_length=200, pattern=NO_NUL)]
Description = Annotated[str, Field(max_length=2000, pattern=NO_NUL)]


class UserIn(BaseModel, extra="forbid"):
    username: Username
    password: NewPassword


class UserOut(BaseModel, from_attributes=True):
    id: int
    username: str
    created_at: UtcTime


class UserPage(BaseModel):
    users: list[UserOut]
    next: int | None


class PasswordChange(BaseModel, extra="forbid"):
    current_password: AnyPassword
    new_password: NewPassword


class PasswordGrant(BaseModel):
    """The form of RFC 6749 § 4.3.2; its other fields are ignored."""

    grant_type: Literal["password"] = "password"
    username: AnyName
    password: AnyPassword


class TokenOut(BaseModel):
    access_token: str
    token_type: Literal["bearer"] = "bearer"
    expires_in: int = Field(description="seconds")


class ItemIn(BaseModel, extra="forbid"):
    title: Title
    description: Description | None = None


class ItemPatch(BaseModel, extra="forbid"):
    # May be left out, may not be null: a default of None would say otherwise.
    title: Title = Field(default_factory=str)
    description: Description | None = None


class ItemOut(BaseModel, from_attributes=True):
    id: int
    title: str
    description: str | None
    created_at: UtcTime
    updated_at: UtcTime


class ItemPage(BaseModel):
    items: list[ItemOut]
    next: int | None


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Readiness(BaseModel):
    status: Literal["ready", "not_ready"]


class Check(BaseModel):
    status: Literal["healthy", "unhealthy"]


class Health(BaseModel):
    status: Literal["healthy", "degraded"]
    timestamp: datetime
    version: str
    checks: dict[str, Check]


# --- Security -------------------------------------------------------------------------
# Argon2id with OWASP's parameters: 19 MiB and some 30 ms a guess.

PASSWORDS = PasswordHash([Argon2Hasher(time_cost=2, memory_cost=19456, parallelism=1)])
# No password has this hash; to find that out takes as long as with a real one.
DECOY_HASH = f"$argon2id$v=19$m=19456,t=2,p=1${'A' * 22}${'A' * 43}"
# Two at a time bound the memory; argon2 lets go of the GIL, so that the loop goes on.
HASHING = ThreadPoolExecutor(2, "argon2")


def normalize(password: str) -> str:
    # NIST SP 800-63B-4 § 3.1.1.2: one password, however a keyboard composes its accents.
    return unicodedata.normalize("NFKC", password)


async def hash_password(password: str) -> str:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(HASHING, PASSWORDS.hash, normalize(password))


async def verify_password(password: str, known: str) -> tuple[bool, str | None]:
    """Whether it is right; and its new hash, if the known one has old parameters."""
    loop = asyncio.get_running_loop()
    verify = PASSWORDS.verify_and_update
    return await loop.run_in_executor(HASHING, verify, normalize(password), known)


class Claims(BaseModel):
    sub: int = Field(ge=1, le=MAX_ID)
    iat: int
    exp: int
    version: int


class Tokens:
    """Signs access tokens (JWT, RFC 7519), and reads its own."""

    def __init__(self, settings: Settings) -> None:
        self.algorithm = settings.ALGORITHM
        # As text it would be taken for JSON when it verifies, but not when it signs.
        secret = settings.SECRET_KEY.get_secret_value()
        self.key: Any = jwk.construct(secret, self.algorithm)
        self.seconds = settings.ACCESS_TOKEN_EXPIRE_MINUTES * 60

    def issue(self, user: User) -> str:
        issued = int(time.time())
        claims = {"sub": str(user.id), "iat": issued, "exp": issued + self.seconds}
        claims["version"] = user.token_version
        return jwt.encode(claims, self.key, self.algorithm)

    def read(self, token: str) -> Claims:
        """Raises InvalidToken."""
        try:
            return Claims.model_validate(
                jwt.decode(token, self.key, algorithms=[self.algorithm])
            )
        except Exception:
            # On hostile tokens jose also raises TypeError, OverflowError and
            # RecursionError, which its own JWTError does not cover.
            raise InvalidToken from None


# --- Repositories ---------------------------------------------------------------------
# SQL and nothing else: rows or None come back, no rule is decided, nothing committed.
# Statements of the hot paths are built once: to build one costs as much as to run it.

FIND_USER = sa.select(User).where(User.id == sa.bindparam("user_id"))
LIST_ITEMS = (
    sa.select(Item.id, Item.title, Item.description, Item.created_at, Item.updated_at)
    .where(Item.owner_id == sa.bindparam("owner_id"), Item.id > sa.bindparam("after"))
    .order_by(Item.id)
    .limit(sa.bindparam("limit"))
)


async def add_user(session: AsyncSession, username: str, password_hash: str) -> User:
    """Raises IntegrityError when the name is taken."""
    user = User(username=username, password_hash=password_hash)
    session.add(user)
    await session.flush()
    return user


async def find_user(session: AsyncSession, user_id: int) -> User | None:
    return await session.scalar(FIND_USER, {"user_id": user_id})


async def find_user_named(session: AsyncSession, username: str) -> User | None:
    return await session.scalar(sa.select(User).where(User.username == username))


async def list_users(session: AsyncSession, after: int, limit: int) -> Sequence[User]:
    query = sa.select(User).where(User.id > after).order_by(User.id).limit(limit)
    return (await session.scalars(query)).all()


async def set_password(
    session: AsyncSession, user: User, password_hash: str, *, token_version: int
) -> bool:
    """False when the hash that `user` was read with is no longer the stored one."""
    same = (User.id == user.id) & (User.password_hash == user.password_hash)
    values = {"password_hash": password_hash, "token_version": token_version}
    query = sa.update(User).where(same).values(values).returning(User.id)
    return await session.scalar(query) is not None


async def remove_user(session: AsyncSession, user_id: int) -> None:
    """Their items go with them, by the foreign key."""
    await session.execute(sa.delete(User).where(User.id == user_id))


async def add_item(
    session: AsyncSession, owner_id: int, title: str, description: str | None
) -> Item:
    """Raises IntegrityError when the owner is gone."""
    created = now()
    item = Item(owner_id=owner_id, title=title, description=description)
    item.created_at = item.updated_at = created
    session.add(item)
    await session.flush()
    return item


async def find_item(session: AsyncSession, owner_id: int, item_id: int) -> Item | None:
    query = sa.select(Item).where(Item.id == item_id, Item.owner_id == owner_id)
    return await session.scalar(query)


async def list_items(
    session: AsyncSession, owner_id: int, after: int, limit: int
) -> Sequence[sa.Row[Any]]:
    """Columns, not entities: these are read, written as JSON and forgotten."""
    page = {"owner_id": owner_id, "after": after, "limit": limit}
    return (await session.execute(LIST_ITEMS, page)).all()


async def set_item(
    session: AsyncSession, owner_id: int, item_id: int, changes: dict[str, Any]
) -> Item | None:
    query = (
        sa.update(Item)
        .where(Item.id == item_id, Item.owner_id == owner_id)
        .values(changes | {"updated_at": now()})
        .returning(Item)
    )
    return await session.scalar(query)


async def remove_item(session: AsyncSession, owner_id: int, item_id: int) -> bool:
    mine = (Item.id == item_id) & (Item.owner_id == owner_id)
    removed = await session.scalar(sa.delete(Item).where(mine).returning(Item.id))
    return removed is not None


# --- Services -------------------------------------------------------------------------
# The rules. A service commits as its last act, and before that only to give the
# connection back while a password is hashed.


async def register_user(session: AsyncSession, user_in: UserIn) -> User:
    """Raises UsernameTaken."""
    password_hash = await hash_password(user_in.password)
    try:
        user = await add_user(session, user_in.username, password_hash)
    except sa.exc.IntegrityError:
        raise UsernameTaken from None
    await session.commit()
    return user


async def authenticate_user(
    session: AsyncSession, username: str, password: str
) -> User:
    """Raises WrongCredentials, after the same time whether or not the name exists."""
    user = await find_user_named(session, username.lower())
    await session.commit()
    known = user.password_hash if user else DECOY_HASH
    valid, renewed = await verify_password(password, known)
    if user is None or not valid:
        raise WrongCredentials
    if renewed:
        await set_password(session, user, renewed, token_version=user.token_version)
        await session.commit()
    return user


async def read_user(session: AsyncSession, user_id: int) -> User:
    """Raises UserNotFound."""
    user = await find_user(session, user_id)
    if user is None:
        raise UserNotFound
    return user


async def read_token_owner(session: AsyncSession, claims: Claims) -> User:
    """Raises InvalidToken when the user is gone or has changed the password since."""
    user = await find_user(session, claims.sub)
    if user is None or user.token_version != claims.version:
        raise InvalidToken
    return user


def page_of(rows: Sequence[Any], limit: int) -> tuple[Sequence[Any], int | None]:
    """The page, and what to send as `after` for the next: one row more was fetched."""
    page = rows[:limit]
    return page, page[-1].id if len(rows) > limit else None


async def read_users(
    session: AsyncSession, after: int, limit: int
) -> tuple[Sequence[User], int | None]:
    return page_of(await list_users(session, after, limit + 1), limit)


async def change_password(
    session: AsyncSession, user: User, change: PasswordChange
) -> None:
    """Kill every token of the user. Raises WrongPassword."""
    await session.commit()
    valid, _ = await verify_password(change.current_password, user.password_hash)
    if not valid:
        raise WrongPassword
    new_hash = await hash_password(change.new_password)
    version = user.token_version + 1
    if not await set_password(session, user, new_hash, token_version=version):
        raise WrongPassword  # somebody else was faster
    await session.commit()


async def discard_user(session: AsyncSession, user: User) -> None:
    await remove_user(session, user.id)
    await session.commit()


async def create_item(session: AsyncSession, owner: User, item_in: ItemIn) -> Item:
    """Raises InvalidToken when the owner has just been deleted."""
    try:
        item = await add_item(session, owner.id, item_in.title, item_in.description)
    except sa.exc.IntegrityError:
        raise InvalidToken from None
    await session.commit()
    return item


async def read_item(session: AsyncSession, owner: User, item_id: int) -> Item:
    """Raises ItemNotFound."""
    item = await find_item(session, owner.id, item_id)
    if item is None:
        raise ItemNotFound
    return item


async def read_items(
    session: AsyncSession, owner: User, after: int, limit: int
) -> tuple[Sequence[sa.Row[Any]], int | None]:
    return page_of(await list_items(session, owner.id, after, limit + 1), limit)


async def change_item(
    session: AsyncSession, owner: User, item_id: int, patch: ItemPatch
) -> Item:
    """Change only what was sent. Raises ItemNotFound."""
    changes = patch.model_dump(exclude_unset=True)
    if not changes:
        return await read_item(session, owner, item_id)
    item = await set_item(session, owner.id, item_id, changes)
    if item is None:
        raise ItemNotFound
    await session.commit()
    return item


async def discard_item(session: AsyncSession, owner: User, item_id: int) -> None:
    """Raises ItemNotFound."""
    if not await remove_item(session, owner.id, item_id):
        raise ItemNotFound
    await session.commit()


# --- Rate limiting --------------------------------------------------------------------
# Exact sliding windows. A limiter has one method, `admit(client)`, and never raises.

WAYS = 16  # rows in a bucket
MAX_ROWS = 65_536
API_TABLE_BYTES, LOGIN_TABLE_BYTES = 48 * 2**20, 16 * 2**20
CELL_BYTES = 8


class Verdict(NamedTuple):
    """Ordered so that `min` is the stricter of two."""

    remaining: int
    limit: int
    reset_seconds: int  # until the oldest request leaves the window, and one more fits
    admitted: bool


@lru_cache(8192)
def client_of(address: str) -> str:
    """Who shares a budget: an IPv4 address, an IPv6 /64 (what one customer is given)."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"  # one for all, or a client would invent one for each request
    if isinstance(ip, ipaddress.IPv4Address):
        return address
    if ip.ipv4_mapped:
        return str(ip.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))


class MemoryWindow:
    """Admit at most `limit` requests per client in any `seconds`, exactly.

    Shared by the processes forked after it: a row a client in anonymous shared memory,
    with a ring of its last admissions. Cost: a hash, a lock and a few comparisons,
    whatever the limit and the number of clients. Memory: fixed. When a bucket is full,
    whoever has been idle for longest gives up a row; there exactness ends.

    Each change is one store of one cell, in an order in which a process killed between
    two admits nobody twice; its lock is released by the kernel.
    """

    def __init__(
        self,
        limit: int,
        seconds: int,
        table_bytes: int,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.limit, self.window_ns, self.clock = limit, seconds * 10**9, clock
        rows = min(MAX_ROWS, table_bytes // ((limit + 4) * CELL_BYTES))
        self.ways = min(WAYS, rows)
        self.buckets = rows // self.ways
        cells = memoryview(mmap.mmap(-1, rows * (limit + 4) * CELL_BYTES)).cast("Q")
        # Who; when last seen; and the window: admissions number `first` to `past`.
        self.who, self.seen = cells[:rows], cells[rows : 2 * rows]
        self.first, self.past = cells[2 * rows : 3 * rows], cells[3 * rows : 4 * rows]
        self.rings = cells[4 * rows :]
        self.hash_key = secrets.token_bytes(16)
        self.lock_file = tempfile.TemporaryFile()

    async def admit(self, client: str) -> Verdict:
        # Keyed, so that nobody can choose addresses that share a bucket with a victim.
        digest = hashlib.blake2b(client.encode(), key=self.hash_key, digest_size=8)
        who = int.from_bytes(digest.digest()) | 1  # 0 is a free row
        bucket = (who >> 1) % self.buckets
        fcntl.lockf(self.lock_file, fcntl.LOCK_EX, 1, bucket)
        try:
            return self._count(who, bucket * self.ways)
        finally:
            fcntl.lockf(self.lock_file, fcntl.LOCK_UN, 1, bucket)

    def _count(self, who: int, bucket: int) -> Verdict:
        clock_ns = self.clock()
        row = self._row_of(who, bucket)
        ring = self.rings[row * self.limit : (row + 1) * self.limit]
        first, past = self.first[row], self.past[row]
        expired = clock_ns - self.window_ns
        if first < past and ring[first % self.limit] <= expired:
            window = range(first, past)
            first += bisect_right(window, expired, key=lambda n: ring[n % self.limit])
            self.first[row] = first
        if admitted := past - first < self.limit:
            ring[past % self.limit] = clock_ns
            self.past[row] = past = past + 1
        self.seen[row] = clock_ns
        wait_ns = ring[first % self.limit] - expired
        remaining = self.limit - (past - first)
        return Verdict(remaining, self.limit, math.ceil(wait_ns / 10**9), admitted)

    def _row_of(self, who: int, bucket: int) -> int:
        rows = slice(bucket, bucket + self.ways)
        known = self.who[rows].tolist()
        if who in known:
            return bucket + known.index(who)
        seen = self.seen[rows].tolist()  # 0 for rows that nobody has had yet
        row = bucket + seen.index(min(seen))
        self.first[row] = self.past[row]
        self.who[row] = who
        return row


class RedisStore:
    """Redis, while it answers: what fails or takes over 100 ms is left for a second."""

    # The rule of MemoryWindow on a list of admission times in microseconds.
    SCRIPT = """
    local key, limit, window = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
    local time = redis.call('TIME')
    local now = time[1] * 1000000 + time[2]
    local oldest = tonumber(redis.call('LINDEX', key, 0))
    while oldest and oldest <= now - window do
        redis.call('LPOP', key)
        oldest = tonumber(redis.call('LINDEX', key, 0))
    end
    local count = redis.call('LLEN', key)
    local admitted = 0
    if count < limit then
        redis.call('RPUSH', key, string.format('%.0f', now))
        redis.call('PEXPIRE', key, math.ceil(window / 1000))
        admitted, count = 1, count + 1
    end
    return {limit - count, (oldest or now) + window - now, admitted}
    """
    PATIENCE_SECONDS = 0.1
    REST_SECONDS = 1.0

    def __init__(self, url: str) -> None:
        # The plain pool raises when it is empty, this one waits; connections are opened
        # by the first command, which comes after the fork.
        self.redis = Redis(connection_pool=BlockingConnectionPool.from_url(url))
        self.script = self.redis.register_script(self.SCRIPT)
        self.away = False
        self.rested = 0.0  # the monotonic time from which it is tried again

    async def run(self, key: str, limit: int, window: int) -> list[int] | None:
        """The script's answer, or None while Redis is away."""
        if self.away:
            if time.monotonic() < self.rested:
                return None
            self.rest()  # whoever comes meanwhile does not try, too
        try:
            async with asyncio.timeout(self.PATIENCE_SECONDS):
                answer: list[int] = await self.script([key], [limit, window])
        except (RedisError, OSError, TimeoutError) as error:
            if not self.away:
                reason = str(error) or f"no answer in {self.PATIENCE_SECONDS} s"
                LOG.warning("Redis is away", extra={"reason": reason})
            self.rest()
            return None
        if self.away:
            LOG.info("Redis is back")
        self.away = False
        return answer

    def rest(self) -> None:
        self.away = True
        self.rested = time.monotonic() + self.REST_SECONDS

    async def answers(self) -> bool:
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                return bool(await self.redis.ping())
        except (RedisError, OSError, TimeoutError):
            return False


class RedisWindow:
    """MemoryWindow's rule for all hosts, and MemoryWindow while Redis is away."""

    def __init__(self, store: RedisStore, name: str, local: MemoryWindow) -> None:
        self.store, self.name, self.local = store, name, local

    async def admit(self, client: str) -> Verdict:
        key, limit = f"rate-limit:{self.name}:{client}", self.local.limit
        answer = await self.store.run(key, limit, self.local.window_ns // 1000)
        if answer is None:
            return await self.local.admit(client)
        remaining, wait_us, admitted = answer
        return Verdict(remaining, limit, math.ceil(wait_us / 10**6), bool(admitted))


class Limiters:
    """The two budgets of each client: all API requests, and logins besides."""

    def __init__(self, settings: Settings) -> None:
        seconds = settings.RATE_LIMIT_WINDOW_SECONDS
        api = MemoryWindow(settings.RATE_LIMIT_REQUESTS, seconds, API_TABLE_BYTES)
        logins = settings.RATE_LIMIT_LOGIN_REQUESTS
        login = MemoryWindow(logins, seconds, LOGIN_TABLE_BYTES)
        self.api: MemoryWindow | RedisWindow = api
        self.login: MemoryWindow | RedisWindow = login
        self.store: RedisStore | None = None
        if settings.REDIS_URL:
            self.store = RedisStore(str(settings.REDIS_URL))
            self.api = RedisWindow(self.store, "api", api)
            self.login = RedisWindow(self.store, "login", login)

    async def close(self) -> None:
        if self.store:
            await self.store.redis.aclose()


# --- Middleware -----------------------------------------------------------------------
# Pure ASGI, outermost first. What the layers share lies in the scope as an Exchange.

Header = tuple[bytes, bytes]
ACCEPTABLE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "accelerometer=(), camera=(), geolocation=(), microphone=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-XSS-Protection": "0",  # the filters that it switched on were themselves a hole
    "Cache-Control": "no-store",
}
# What Swagger UI and ReDoc need: their CDN, their inline script, ReDoc's worker.
DOCS_HEADERS = SECURITY_HEADERS | {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; "
    "script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'unsafe-inline' https://cdn.jsdelivr.net https://fonts.googleapis.com; "
    "font-src https://fonts.gstatic.com; worker-src blob:; "
    "img-src 'self' data: https://fastapi.tiangolo.com https://cdn.redoc.ly; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Embedder-Policy": "unsafe-none",
}
DOCS_PATHS = ("/docs", "/docs/oauth2-redirect", "/redoc")
# RFC 6797 § 7.2: over https only. Not for subdomains, which may be somebody else's.
HSTS = {"Strict-Transport-Security": "max-age=63072000"}
LIMIT_HEADERS = ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")
EXPOSED_HEADERS = ("X-Request-ID", "X-Response-Time", "Location", "Retry-After")


def encode_headers(headers: dict[str, str]) -> list[Header]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


@dataclass(slots=True)
class Exchange:
    """One request and its response, as its layers tell each other."""

    request_headers: dict[bytes, bytes]
    extra_headers: list[Header] = field(default_factory=list)
    status: int | None = None  # set when the response begins
    error: BaseException | None = None

    def show(self, verdict: Verdict) -> None:
        values = (verdict.limit, verdict.remaining, verdict.reset_seconds)
        headers = dict(zip(LIMIT_HEADERS, map(str, values), strict=True))
        self.extra_headers = encode_headers(headers)


class Envelope:
    """The request's id, its log line, and the headers that every response has."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.warned = False
        kinds = {"http": {}, "https": HSTS}
        self.usual = {
            scheme: encode_headers(SECURITY_HEADERS | more)
            for scheme, more in kinds.items()
        }
        self.docs = {
            (path, scheme): encode_headers(DOCS_HEADERS | more)
            for path in DOCS_PATHS
            for scheme, more in kinds.items()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not ACCEPTABLE_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16).encode()
        REQUEST_ID.set(request_id.decode())
        scope["exchange"] = exchange = Exchange(headers)
        client = scope["client"][0] if scope.get("client") else ""
        self.warn_of_proxy(headers.get(b"x-forwarded-for", b""), client)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                scheme = scope["scheme"]
                usual = self.docs.get((scope["path"], scheme)) or self.usual[scheme]
                milliseconds = (time.perf_counter() - began) * 1000
                message["headers"] = [
                    *message["headers"],
                    *usual,
                    *exchange.extra_headers,
                    (b"x-request-id", request_id),
                    (b"x-response-time", b"%.2fms" % milliseconds),
                ]
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            LOG.log(
                logging.ERROR if exchange.error else logging.INFO,
                "request",
                exc_info=exchange.error,
                extra={
                    "method": scope["method"],
                    "path": scope["path"],
                    "status_code": exchange.status,
                    "duration_ms": round((time.perf_counter() - began) * 1000, 2),
                    "client": client,
                },
            )

    def warn_of_proxy(self, forwarded_for: bytes, client: str) -> None:
        """Once: behind a proxy that is not trusted all clients share one budget."""
        # uvicorn takes the client from the header of a peer that it trusts.
        if (
            self.warned
            or not forwarded_for
            or client in forwarded_for.decode("latin-1")
        ):
            return
        self.warned = True
        LOG.warning(
            "X-Forwarded-For came from a peer that FORWARDED_ALLOW_IPS does not name; "
            "if it is your proxy, name it there",
            extra={"client": client},
        )


class Cors(CORSMiddleware):
    """Starlette's, out of the way of requests that no page of another origin sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "exchange" in scope and b"origin" not in scope["exchange"].request_headers:
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class FailSafe:
    """Bounds the request's time and body, and answers for whatever went wrong inside.

    Stands inside of CORS, or a browser could not read these answers; and catches what
    Starlette would answer outside of every layer, without an id or a header.
    """

    def __init__(self, app: ASGIApp, seconds: float, max_bytes: int) -> None:
        self.app, self.seconds, self.max_bytes = app, seconds, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        exchange: Exchange = scope["exchange"]
        failure: ServiceError
        try:
            async with asyncio.timeout(self.seconds) as timer:
                return await self.app(scope, self.bounded(receive, exchange), send)
        except asyncio.CancelledError:  # by the server, at the end of its grace
            failure = Unavailable()
        except Exception as error:
            failure = TookTooLong() if timer.expired() else ServiceError()
            if not timer.expired() or exchange.status:
                exchange.error = error
        # Once a response has begun there is only to break it off, which the server does.
        if exchange.status is None:
            await error_response(failure)(scope, receive, send)

    def bounded(self, receive: Receive, exchange: Exchange) -> Receive:
        headers = exchange.request_headers
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            return receive
        declared = int(headers.get(b"content-length", b"0"))
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            if declared > self.max_bytes:
                raise BodyTooLarge
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise BodyTooLarge
            return message

        return receive_bounded


class RateLimitLayer:
    """Counts every request under `prefix`, whatever becomes of it."""

    def __init__(self, app: ASGIApp, prefix: str, limiters: Limiters) -> None:
        self.app, self.prefix, self.limiters = app, prefix + "/", limiters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self.prefix):
            return await self.app(scope, receive, send)
        exchange: Exchange = scope["exchange"]
        address = scope["client"][0] if scope.get("client") else ""
        verdict = await self.limiters.api.admit(client_of(address))
        exchange.show(verdict)
        scope["verdict"] = verdict
        if verdict.admitted:
            return await self.app(scope, receive, send)
        refusal = RateLimited(**{"Retry-After": str(verdict.reset_seconds)})
        await error_response(refusal)(scope, receive, send)


def middleware_stack(settings: Settings, limiters: Limiters) -> list[Middleware]:
    """Outermost first."""
    return [
        Middleware(Envelope),  # around all others, whose answers need its headers, too
        Middleware(
            Cors,
            allow_origins=settings.CORS_ORIGINS,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=[*EXPOSED_HEADERS, *LIMIT_HEADERS, *SECURITY_HEADERS, *HSTS],
        ),
        Middleware(
            FailSafe,
            seconds=settings.REQUEST_TIMEOUT_SECONDS,
            max_bytes=settings.MAX_BODY_BYTES,
        ),
        # Before anything of the body is read: dependencies run after that.
        Middleware(RateLimitLayer, prefix=settings.API_V1_PREFIX, limiters=limiters),
    ]


# --- Dependencies ---------------------------------------------------------------------
# What a route asks for. Coroutines all: FastAPI sends plain functions to a thread.

SAFE_METHODS = {"GET", "HEAD"}  # RFC 9110 § 9.2.1: these only read
bearer = OAuth2PasswordBearer("auth/token", auto_error=False)


async def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def get_database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


async def get_limiters(request: Request) -> Limiters:
    limiters: Limiters = request.app.state.limiters
    return limiters


async def get_tokens(request: Request) -> Tokens:
    tokens: Tokens = request.app.state.tokens
    return tokens


SettingsDep = Annotated[Settings, Depends(get_settings)]
DatabaseDep = Annotated[Database, Depends(get_database)]
LimitersDep = Annotated[Limiters, Depends(get_limiters)]
TokensDep = Annotated[Tokens, Depends(get_tokens)]


async def get_session(
    request: Request, database: DatabaseDep
) -> AsyncIterator[AsyncSession]:
    """One a request; a transaction only where one may write."""
    async with database.session(writes=request.method not in SAFE_METHODS) as session:
        yield session


# "function": closed before the response is sent, not after.
SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]


async def current_user(
    token: Annotated[str | None, Depends(bearer)],
    tokens: TokensDep,
    session: SessionDep,
) -> User:
    """Raises Unauthorized, InvalidToken."""
    if token is None:
        raise Unauthorized
    return await read_token_owner(session, tokens.read(token))


CurrentUser = Annotated[User, Depends(current_user)]


async def limit_logins(request: Request, limiters: LimitersDep) -> None:
    """Raises RateLimited."""
    address = request.client.host if request.client else ""
    verdict = await limiters.login.admit(client_of(address))
    request.scope["exchange"].show(min(verdict, request.scope["verdict"]))
    if not verdict.admitted:
        raise RateLimited(**{"Retry-After": str(verdict.reset_seconds)})


# --- Health routes --------------------------------------------------------------------
# For orchestrators and monitors: not limited, and silent about why.

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """What a route may answer besides, for its documentation."""
    return {
        status: {"model": ErrorResponse, "description": KINDS[status].text}
        for status in statuses
    }


async def get_health(
    response: Response,
    settings: SettingsDep,
    database: DatabaseDep,
    limiters: LimitersDep,
) -> Health:
    """How the service and what it depends on are doing."""
    parts = {"database": database.answers()}
    if limiters.store:
        parts["redis"] = limiters.store.answers()
    answers = dict(zip(parts, await asyncio.gather(*parts.values()), strict=True))
    response.status_code = 200 if answers["database"] else 503
    return Health(
        status="healthy" if all(answers.values()) else "degraded",
        timestamp=now(),
        version=settings.VERSION,
        checks={
            name: Check(status="healthy" if answer else "unhealthy")
            for name, answer in answers.items()
        },
    )


async def get_liveness() -> Alive:
    """Whether the process answers; a failure means: restart it."""
    return Alive()


async def get_readiness(response: Response, database: DatabaseDep) -> Readiness:
    """Whether requests can be served; a failure means: send them elsewhere."""
    ready = await database.answers()
    response.status_code = 200 if ready else 503
    return Readiness(status="ready" if ready else "not_ready")


def add_health_routes(app: FastAPI) -> None:
    """On the application itself, where they are found fastest."""
    routes: list[tuple[str, Callable[..., Any], Responses]] = [
        ("/health/live", get_liveness, {}),
        ("/health/ready", get_readiness, {503: {"model": Readiness}}),
        ("/health", get_health, {503: {"model": Health}}),
    ]
    for path, route, responses in routes:
        responses = responses | errors(500, 504)
        app.add_api_route(path, route, tags=["health"], responses=responses)
        # Uptime monitors ask so.
        app.add_api_route(path, route, methods=["HEAD"], include_in_schema=False)


# --- API routes -----------------------------------------------------------------------
# HTTP and nothing else: a signature and one to three lines, no `if`. Their docstrings
# are public.

Id = Annotated[int, Path(ge=1, le=MAX_ID)]
After = Annotated[int, Query(ge=0, le=MAX_ID, description="the last id that you have")]
Limit = Annotated[int, Query(ge=1, le=100)]

users = APIRouter(prefix="/users", tags=["users"])
auth = APIRouter(prefix="/auth", tags=["auth"])
items = APIRouter(prefix="/items", tags=["items"], responses=errors(401))


def location(request: Request, row: User | Item) -> str:
    # The path alone: a Host header is the client's to write.
    return f"{request.scope['path']}/{row.id}"


@users.post("", status_code=201, responses=errors(400, 409, 413, 422))
async def post_user(
    user_in: UserIn, request: Request, response: Response, session: SessionDep
) -> UserOut:
    """Register."""
    user = await register_user(session, user_in)
    response.headers["Location"] = location(request, user)
    return UserOut.model_validate(user)


@users.get("", responses=errors(401, 422))
async def get_users(
    _: CurrentUser, session: SessionDep, after: After = 0, limit: Limit = 20
) -> UserPage:
    """All users, by id. Send `next` as `after` for the next page."""
    page, following = await read_users(session, after, limit)
    return UserPage.model_validate({"users": page, "next": following})


@users.get("/me", responses=errors(401))
async def get_me(user: CurrentUser) -> UserOut:
    """The user whose token this is."""
    return UserOut.model_validate(user)


@users.patch("/me", status_code=204, responses=errors(400, 401, 403, 413, 422))
async def patch_me(
    change: PasswordChange, user: CurrentUser, session: SessionDep
) -> None:
    """Change the password. Every token issued before is dead."""
    await change_password(session, user, change)


@users.delete("/me", status_code=204, responses=errors(401))
async def delete_me(user: CurrentUser, session: SessionDep) -> None:
    """Delete the account, with all its items."""
    await discard_user(session, user)


@users.get("/{user_id}", responses=errors(401, 404, 422))
async def get_user(user_id: Id, _: CurrentUser, session: SessionDep) -> UserOut:
    """One user."""
    return UserOut.model_validate(await read_user(session, user_id))


@auth.post(
    "/token",
    dependencies=[Depends(limit_logins)],
    responses=errors(400, 401, 413, 422),
)
async def post_token(
    form: Annotated[PasswordGrant, Form()], session: SessionDep, tokens: TokensDep
) -> TokenOut:
    """Log in: send the access token as `Authorization: Bearer`."""
    user = await authenticate_user(session, form.username, form.password)
    return TokenOut(access_token=tokens.issue(user), expires_in=tokens.seconds)


@items.post("", status_code=201, responses=errors(400, 413, 422))
async def post_item(
    item_in: ItemIn,
    request: Request,
    response: Response,
    user: CurrentUser,
    session: SessionDep,
) -> ItemOut:
    """Add an item."""
    item = await create_item(session, user, item_in)
    response.headers["Location"] = location(request, item)
    return ItemOut.model_validate(item)


@items.get("", responses=errors(422))
async def get_items(
    user: CurrentUser, session: SessionDep, after: After = 0, limit: Limit = 20
) -> ItemPage:
    """Your own items, by id. Send `next` as `after` for the next page."""
    page, following = await read_items(session, user, after, limit)
    return ItemPage.model_validate({"items": page, "next": following})


@items.get("/{item_id}", responses=errors(404, 422))
async def get_item(item_id: Id, user: CurrentUser, session: SessionDep) -> ItemOut:
    """One of your items."""
    return ItemOut.model_validate(await read_item(session, user, item_id))


@items.patch("/{item_id}", responses=errors(400, 404, 413, 422))
async def patch_item(
    item_id: Id, patch: ItemPatch, user: CurrentUser, session: SessionDep
) -> ItemOut:
    """Change what is sent, and nothing else."""
    return ItemOut.model_validate(await change_item(session, user, item_id, patch))


@items.delete("/{item_id}", status_code=204, responses=errors(404, 422))
async def delete_item(item_id: Id, user: CurrentUser, session: SessionDep) -> None:
    """Delete one of your items."""
    await discard_item(session, user, item_id)


# --- Application ----------------------------------------------------------------------
# The parts list. Everything with a connection or a thread is opened by the lifespan.

START_SECONDS = 2
# Each request would ask three providers whether they are there; see the README.
TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open a worker's database and close it; a database that is away delays nobody."""
    database = app.state.database = Database(app.state.settings)
    watch = asyncio.create_task(database.watch())
    # A worker that is asked before it has looked would answer 503.
    asked = asyncio.create_task(database.asked.wait())
    await asyncio.wait({asked}, timeout=START_SECONDS)
    yield
    asked.cancel()
    watch.cancel()
    await asyncio.wait({watch, asked}, timeout=1)
    await database.close()
    await app.state.limiters.close()


def fix_token_url(app: FastAPI, prefix: str) -> None:
    """The docs log in at a path under the prefix, which the scheme could not know."""
    scheme = app.openapi()["components"]["securitySchemes"]["OAuth2PasswordBearer"]
    scheme["flows"]["password"]["tokenUrl"] = f"{prefix}/auth/token"


def create_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or load_settings()
    set_up_logging(settings)
    if "SECRET_KEY" not in settings.model_fields_set:
        LOG.warning("SECRET_KEY is not set: a restart ends all sessions")
    limiters = Limiters(settings)
    app = FastAPI(
        title=settings.PROJECT_NAME,
        description=settings.PROJECT_DESCRIPTION,
        version=settings.VERSION,
        openapi_url=f"{settings.API_V1_PREFIX}/openapi.json",
        lifespan=lifespan,
        middleware=middleware_stack(settings, limiters),
        exception_handlers={
            HTTPException: on_http_error,
            RequestValidationError: on_validation_error,
            sa.exc.SQLAlchemyError: on_database_error,
        },
        redirect_slashes=False,  # its Location is built from the Host header
        generate_unique_id_function=lambda route: route.name,
        telemetry=TELEMETRY,
    )
    app.state.settings = settings
    app.state.limiters = limiters
    app.state.tokens = Tokens(settings)
    docs = app.router.routes[:]
    app.router.routes.clear()
    add_health_routes(app)
    for router in (users, auth, items):
        responses = errors(429, 500, 503, 504)
        app.include_router(router, prefix=settings.API_V1_PREFIX, responses=responses)
    app.router.routes.extend(docs)  # last: routes are tried one after the other
    fix_token_url(app, settings.API_V1_PREFIX)
    return app


def __getattr__(name: str) -> FastAPI:
    """`main:app`, built when a server first asks for it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    app = globals()["app"] = create_app()
    return app
