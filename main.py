"""A production-grade FastAPI service in one module: users, their tokens, their items.

Read it downwards to build it up: no section uses what stands below it. Read it upwards
to follow a request, which enters at Application and ends in Repositories.

    Settings       each variable is checked before a socket is opened
    Logging        one line a record, one record a request; no client can forge a line
    Errors         every failure leaves in one form and tells nothing of the inside
    Database       a connection is held while the database is talked to, and no longer
    Schemas        what has passed here is safe in SQL, in JSON and in a log
    Security       passwords and tokens: costly to guess, equal in time, revocable
    Repositories   SQL and nothing else
    Services       the rules; a service commits as its last act
    Rate limiting  exact sliding windows, shared by all workers, or by all hosts
    Middleware     what every response has, whoever makes it
    Dependencies   what a route asks for, and a test overrides
    Health routes  what orchestrators ask; the public does not learn why
    API routes     HTTP and nothing else
    Application    the parts list

    Run:    ENVIRONMENT=development gunicorn
    Test:   pytest
    Change: ENVIRONMENT=development uvicorn main:app --reload
"""

import asyncio
import fcntl
import ipaddress
import json
import logging
import math
import mmap
import os
import re
import secrets
import select
import socket
import sqlite3
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache, partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self
from weakref import WeakSet

import pydantic
import sqlalchemy as sa
from fastapi import APIRouter, Depends, FastAPI, Form, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import OAuth2PasswordBearer
from jose import jwk, jwt
from jose.utils import base64url_decode, base64url_encode
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr
from pydantic_core import PydanticSerializationError, to_json
from pydantic_settings import BaseSettings, NoDecode, SettingsError
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# --- Settings -------------------------------------------------------------------------
# What an operator can set. Nothing below reads the environment.

DRIVERS = {"postgres": "postgresql+psycopg", "sqlite": "sqlite+aiosqlite"}


def parse_database_url(text: str | sa.URL) -> sa.URL:
    """The URL as platforms hand it out, with the async driver filled in."""
    try:
        url = sa.make_url(text)
        driver = DRIVERS[url.drivername.partition("+")[0].removesuffix("ql")]
        if "@" in (url.host or "") or (url.port or 0) > 65535:
            raise ValueError  # a password that is not encoded would show as the host
    except (sa.exc.ArgumentError, ValueError, KeyError):
        raise ValueError("should be a valid sqlite:// or postgresql:// URL") from None
    if driver == DRIVERS["sqlite"] and url.database in {None, "", ":memory:"}:
        raise ValueError("should name a file, which all connections share")
    return url.set(drivername=driver)


DatabaseUrl = Annotated[sa.URL, NoDecode, BeforeValidator(parse_database_url)]
Text = Annotated[str, Field(max_length=1000)]  # bounded, it must be valid Unicode
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")]
RequestCount = Annotated[int, Field(ge=1, le=1_000_000)]


class Settings(BaseSettings):
    model_config = {"env_file": ".env", "env_ignore_empty": True, "extra": "ignore"}
    PROJECT_NAME: Text = "Items"
    PROJECT_DESCRIPTION: Text = "Users and their items."
    VERSION: Text = "1.0.0"
    ENVIRONMENT: Literal["development", "test", "production"] = "production"
    DEBUG: bool = False
    API_V1_PREFIX: str = Field("/api/v1", pattern=r"^(/[A-Za-z0-9._~-]+)+$")
    SECRET_KEY: SecretStr = Field(SecretStr(secrets.token_hex()), min_length=32)
    ACCESS_TOKEN_EXPIRE_MINUTES: int = Field(30, gt=0)
    ALGORITHM: Literal["HS256", "HS384", "HS512"] = "HS256"
    DATABASE_URL: DatabaseUrl = sa.make_url("sqlite:///./app.db")
    DATABASE_POOL_SIZE: int = Field(5, ge=1)
    DATABASE_MAX_OVERFLOW: int = Field(10, ge=0)
    CORS_ORIGINS: list[Origin] = []
    RATE_LIMIT_REQUESTS: RequestCount = 100
    RATE_LIMIT_WINDOW_SECONDS: int = Field(60, gt=0)
    RATE_LIMIT_LOGIN_REQUESTS: RequestCount = 10
    REDIS_URL: pydantic.RedisDsn | None = None
    MAX_BODY_BYTES: int = Field(2**20, gt=0)
    REQUEST_TIMEOUT_SECONDS: float = Field(30, gt=0, allow_inf_nan=False)
    LOG_LEVEL: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"

    @pydantic.model_validator(mode="after")
    def refuse_unsafe(self) -> Self:
        strict = self.ENVIRONMENT != "development"
        if strict and "SECRET_KEY" not in self.model_fields_set:
            raise ValueError("SECRET_KEY: is required outside development")
        if strict and "*" in self.CORS_ORIGINS:
            raise ValueError("CORS_ORIGINS: * is for development only")
        if self.DEBUG and self.ENVIRONMENT == "production":
            raise ValueError("DEBUG: is refused in production, for it logs SQL")
        return self


def load_settings(secrets_dir: str = "/run/secrets") -> Settings:
    """Exits with one line that names each bad variable, and never shows its value."""
    folder: Any = {"_secrets_dir": secrets_dir} if os.path.isdir(secrets_dir) else {}
    try:
        return Settings(**folder)
    except pydantic.ValidationError as error:
        bad = (": ".join([*map(str, e["loc"][:1]), e["msg"]]) for e in error.errors())
        line = "; ".join(bad).replace("Value error, ", "")
        raise SystemExit(f"bad settings: {line}") from None
    except (SettingsError, UnicodeError) as error:  # a list, a file that is not UTF-8
        raise SystemExit(f"bad settings: {error}: no JSON, or no UTF-8") from None


# --- Logging --------------------------------------------------------------------------
# Each record is one line on stdout. What clients wrote is encoded, never pasted.

LOG = logging.getLogger("service")  # SQLAlchemy takes the module's name, for FairPool
WARN_ONCE = cache(LOG.warning)  # each text, in each process
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
COMMON_FIELDS = {*vars(logging.makeLogRecord({})), "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        fields: Any = {"timestamp": moment.isoformat(timespec="milliseconds")}
        fields |= {"level": record.levelname, "logger": record.name}
        fields |= {"message": record.getMessage(), "request_id": REQUEST_ID.get()}
        fields |= {k: v for k, v in vars(record).items() if k not in COMMON_FIELDS}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return self.write(fields)

    def write(self, fields: dict[str, Any]) -> str:
        try:
            line = to_json(fields, ensure_ascii=True, fallback=str, inf_nan_mode="null")
            return line.decode()
        except PydanticSerializationError:  # lone surrogates, bytes that are not UTF-8
            return json.dumps(fields, default=str)


class TextFormatter(JsonFormatter):  # for people; control characters are escaped
    def write(self, fields: dict[str, Any]) -> str:
        traceback = fields.pop("exception", "").splitlines()
        head = [fields.pop(name) for name in ("timestamp", "level", "message")]
        line = " ".join([*head, *(f"{name}={value}" for name, value in fields.items())])
        return "\n    | ".join(ascii(text)[1:-1] for text in (line, *traceback))


def set_up_logging(settings: Settings) -> None:
    """Give the service, its servers and its libraries one handler and one form."""
    handler = logging.StreamHandler(sys.stdout)
    readable = settings.ENVIRONMENT == "development"
    handler.setFormatter(TextFormatter() if readable else JsonFormatter())
    # Libraries only warn: at DEBUG aiosqlite prints parameters.
    logging.basicConfig(handlers=[handler], level="WARNING", force=True)
    for name in ("psycopg", "python_multipart"):  # they warn again with each request
        logging.getLogger(name).setLevel("ERROR")
    for name in ("service", "gunicorn.error", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.setLevel("DEBUG" if settings.DEBUG else settings.LOG_LEVEL)
        # No second line for each request: uvicorn asks whether there is a handler.
        logger.handlers = [] if name == "uvicorn.access" else [handler]
        logger.propagate = False
    if settings.DEBUG:
        logging.getLogger("sqlalchemy.engine").setLevel("INFO")
    told = "ASGI callable returned without completing response."  # by our own line
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.msg != told)
    logging.captureWarnings(True)


def tell_change(of: str, was_away: bool, error: BaseException | None) -> bool:
    """Tell of an outage once, and of its end. True while it lasts."""
    if error and not was_away:
        reason = str(getattr(error, "orig", error)).partition("\n")[0]
        LOG.warning("%s is away", of, extra={"reason": reason or "no answer in time"})
    elif was_away and not error:
        LOG.info("%s is back", of)
    return error is not None


# --- Errors ---------------------------------------------------------------------------
# All leave in one form. Services raise the classes below, each of which is a row.

USUAL = {  # status: slug, text
    400: ("bad_request", "The request cannot be read."),
    401: ("unauthorized", "A valid access token is required."),
    403: ("forbidden", "This is not allowed."),
    404: ("not_found", "There is nothing here."),
    405: ("method_not_allowed", "This path does not have that method."),
    409: ("conflict", "This conflicts with what is there."),
    413: ("payload_too_large", "The body is too large."),
    422: ("validation_error", "The request is not valid."),
    429: ("rate_limited", "Too many requests; try again later."),
    500: ("internal_error", "Something went wrong; the log knows this request's id."),
    503: ("service_unavailable", "The service is not available; try again soon."),
    504: ("timeout", "The request took too long."),
}


class ErrorResponse(BaseModel):
    error: str
    message: str
    details: list[dict[Literal["field", "message", "type"], str]] | None
    request_id: str


class ServiceError(HTTPException):
    row: ClassVar[tuple[int, str, dict[str, str]]]  # status, text or "", headers

    def __init__(self) -> None:
        super().__init__(*self.row)


class InvalidToken(ServiceError):
    # RFC 6750 § 3.1. One for all faults of a token, or a forger learns how far he got.
    row = 401, "", {"WWW-Authenticate": 'Bearer error="invalid_token"'}


class WrongCredentials(ServiceError):
    # Also for a name that does not exist: who has an account is nobody's business.
    row = 401, "Wrong username or password.", {"WWW-Authenticate": "Bearer"}


class WrongPassword(ServiceError):
    row = 403, "The current password is wrong.", {}


class NotFound(ServiceError):
    row = 404, "", {}  # for other people's items, too: 403 would say that they exist


class UsernameTaken(ServiceError):
    row = 409, "This username is taken.", {}


class Unavailable(ServiceError):
    row = 503, "", {"Retry-After": "1"}


async def answer(request: Request, error: Any, details: Sequence[Any] = ()) -> Response:
    """The one form of all errors."""
    status = error.status_code
    slug, text = USUAL.get(status, (f"http_{status}", error.detail))
    # Starlette's own texts are the statuses' reason phrases, which vary by version.
    own = error.detail if type(error) is not HTTPException else None
    body = {"error": slug, "message": own or text, "details": details or None}
    # ASCII: the name of an unknown field may hold lone surrogates.
    content = json.dumps(body | {"request_id": REQUEST_ID.get()})
    return Response(content, status, error.headers, "application/json")


async def answer_invalid(request: Request, error: Any) -> Response:
    # Neither input nor context may leave: it can be a password. Nor may 100,000 faults.
    details = [
        {"field": ".".join(map(str, e["loc"])), "message": e["msg"], "type": e["type"]}
        for e in error.errors()[:100]
    ]
    return await answer(request, HTTPException(422), details)


# --- Database -------------------------------------------------------------------------
# Connections are in autocommit; who writes says BEGIN. Who waits for one waits in line.

TRY_AGAIN: Any = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError)
TRY_AGAIN += (sa.exc.TimeoutError, TimeoutError)  # away, full, slow, a standby
PATIENCE_SECONDS, CHECK_SECONDS = 5, 2  # in line or with a server; in a health check
RETRY_SECONDS, LOOK_SECONDS = 1, 10  # between looks: while it is away, while it is up
# Routers forget connections that are idle for minutes, and do not tell their ends.
LIBPQ = {"connect_timeout": 5, "keepalives_idle": 60, "tcp_user_timeout": 5_000}

now = partial(datetime.now, UTC)
ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


class Base(DeclarativeBase):
    type_annotation_map = {int: ID, datetime: sa.DateTime(True)}  # noqa: RUF012
    __mapper_args__: Any = {"confirm_deleted_rows": False}  # noqa: RUF012 - or it warns
    # Or SQLite would give the id of a deleted user, which tokens name, to the next one.
    __table_args__: Any = {"sqlite_autoincrement": True}  # noqa: RUF012
    id: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(default=now)


class User(Base):
    __tablename__ = "users"
    username: Mapped[str] = mapped_column(sa.String(32), unique=True)
    password_hash: Mapped[str]
    token_version: Mapped[int] = mapped_column(default=0)


class Item(Base):
    __tablename__ = "items"
    __table_args__ = (sa.Index("items_of_owner", "owner_id", "id"), Base.__table_args__)
    owner_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id, ondelete="CASCADE"))
    title: Mapped[str] = mapped_column(sa.String(200))
    description: Mapped[str | None] = mapped_column(sa.String(2000))
    updated_at: Mapped[datetime] = mapped_column(onupdate=now)


class FairPool(sa.AsyncAdaptedQueuePool):
    """First come, first served, or TimeoutError; SQLAlchemy lets newcomers overtake."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"max_overflow": 0})
        self._turns = asyncio.Semaphore(self.size())

    async def _wait_in_line(self) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self._turns.acquire()

    def _do_get(self) -> Any:
        sa.util.await_(self._wait_in_line())
        try:
            return super()._do_get()
        except BaseException:
            self._turns.release()
            raise

    def _do_return_conn(self, record: Any) -> None:
        self._turns.release()
        super()._do_return_conn(record)

    def shrink(self, size: int) -> None:
        """Late: to close at once what is too much would be to reconnect under load."""
        while self.checkedin() > size:
            self._dec_overflow()
            self._pool.get(False).close()


def refuse_closed(connection: Any, record: Any, proxy: Any) -> None:
    # What an idle connection can read is its end. To ping would cost a round trip.
    poll = select.poll()
    poll.register(connection.driver_connection.fileno(), select.POLLIN)
    if poll.poll(0):
        raise sa.exc.InvalidatePoolError


class Database:
    """A worker's engines, made after the fork, and the watch over what they lead to."""

    def __init__(self, settings: Settings) -> None:
        self.url, self.connections = settings.DATABASE_URL, WeakSet[Any]()
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self.size, more = settings.DATABASE_POOL_SIZE, settings.DATABASE_MAX_OVERFLOW
        self.reading, self.alone = self._open(self.size + more), self._open(1)
        # PostgreSQL's watch is in no line. SQLite's writers are: its lock has none.
        self.writing = self.alone if self.sqlite else self.reading.execution_options()
        sql = "BEGIN IMMEDIATE" if self.sqlite else "BEGIN"
        for each in {self.writing, self.alone}:
            sa.event.listen(each.sync_engine, "begin", lambda c: c.exec_driver_sql(sql))
        self.reader = async_sessionmaker(self.reading, expire_on_commit=False)
        self.writer = async_sessionmaker(self.writing, expire_on_commit=False)
        self.up, self.suspect = asyncio.Event(), asyncio.Event()
        self._check: asyncio.Task[bool] | None = None

    def _open(self, pool_size: int) -> Any:
        engine = create_async_engine(
            self.url,
            poolclass=FairPool,
            pool_size=pool_size,
            connect_args={} if self.sqlite else LIBPQ,
            isolation_level="AUTOCOMMIT",
            hide_parameters=True,  # or every error would log them
        )
        sa.event.listen(engine.sync_engine, "connect", self._prepare)
        if not self.sqlite:
            sa.event.listen(engine.sync_engine, "checkout", refuse_closed)
        return engine

    def _prepare(self, connection: Any, record: Any) -> None:
        if self.sqlite:
            # Of two who switch at once one fails at once; that one does it is enough.
            with suppress(sqlite3.OperationalError):
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA foreign_keys = ON")
        else:
            self.connections.add(connection.driver_connection)
            # What a host locked before it vanished would stay so until TCP gives up.
            connection.execute("SET idle_in_transaction_session_timeout = '1min'")

    def hang_up(self) -> None:
        """Who waits gets 503. To cancel would be to ask a silent server, for 10 s."""
        for each in [c for c in self.connections if not c.closed]:
            with suppress(OSError), socket.socket(fileno=os.dup(each.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)

    async def make_tables(self) -> None:
        """Once, however many workers and hosts start together."""
        async with self.alone.begin() as db:
            if not self.sqlite:  # which is locked by now
                await db.execute(sa.text("SET LOCAL lock_timeout = '3s'"))
                await db.execute(sa.text("SELECT pg_advisory_xact_lock(7411)"))
            await db.run_sync(Base.metadata.create_all)

    async def watch(self) -> None:
        """Make missing tables, tell of outages, and hang up when it is silent."""
        away, loop = False, asyncio.get_running_loop()
        while True:
            self.suspect.clear()
            error: Exception | None = None
            silence = loop.call_later(PATIENCE_SECONDS, self.hang_up)
            try:
                await self.make_tables()
                await sa.util.greenlet_spawn(self.reading.pool.shrink, self.size)
            except Exception as reason:  # noqa: BLE001 - the watch goes on
                error = reason if loop.time() < silence.when() else TimeoutError()
            silence.cancel()
            if error and await self.answers():  # a lock, say, that requests do not need
                error = None
            away = tell_change("the database", away, error)
            (self.up.clear if away else self.up.set)()
            await asyncio.sleep(RETRY_SECONDS)
            if not away:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.suspect.wait(), LOOK_SECONDS)

    async def answers(self) -> bool:
        """Whether the tables are there; known after 2 s. Callers share one check."""
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._has_tables())
        done, _ = await asyncio.wait({self._check}, timeout=CHECK_SECONDS)
        return any(check.result() for check in done)

    async def _has_tables(self) -> bool:
        try:
            async with asyncio.timeout(CHECK_SECONDS), self.reader() as session:
                for table in Base.metadata.sorted_tables:
                    await session.execute(sa.select(table).limit(0))
        except Exception:  # noqa: BLE001 - no reason is a reason to answer 500
            self.suspect.set()
            return False
        self.up.set()
        return True


async def answer_database_error(request: Request, error: Any) -> Response:
    """What may go better soon is a 503; a fault in the SQL goes on, to be a 500."""
    if isinstance(error, sa.orm.exc.StaleDataError):  # deleted between read and write
        return await answer(request, NotFound())
    lost = getattr(error, "connection_invalidated", False)
    if not lost and not isinstance(error, TRY_AGAIN):
        raise error
    request.app.state.database.suspect.set()
    return await answer(request, Unavailable())


# --- Schemas --------------------------------------------------------------------------
# What is refused here need not be feared below: NUL, and surrogates by length bounds.

MAX_ID = 2**63 - 1
NO_NUL = r"^[^\x00]*$"
# PostgreSQL answers in a zone of its own, SQLite in none; what was stored is UTC.
Utc = AfterValidator(lambda t: t.astimezone(UTC) if t.tzinfo else t.replace(tzinfo=UTC))
Lower = AfterValidator(str.lower)
UtcTime = Annotated[datetime, Utc]
AnyName = Annotated[str, Field(min_length=1, max_length=1024, pattern=NO_NUL), Lower]
NewName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{2,31}$"), Lower]
AnyPassword = Annotated[str, Field(min_length=1, max_length=1024)]
# NIST SP 800-63B-4 § 3.1.1.2: 15 where nothing else is asked for, no composition rules.
NewPassword = Annotated[str, Field(min_length=15, max_length=128)]
Title = Annotated[str, Field(min_length=1, max_length=200, pattern=NO_NUL)]


class UserIn(BaseModel, extra="forbid"):
    username: NewName
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


class PasswordGrant(BaseModel):  # RFC 6749 § 4.3.2; what else a form holds is ignored
    grant_type: Literal["password"] = "password"
    username: AnyName
    password: AnyPassword


class TokenOut(BaseModel):
    access_token: str
    token_type: Literal["bearer"]
    expires_in: int = Field(description="in seconds")


class ItemIn(BaseModel, extra="forbid"):
    title: Title
    description: Annotated[str, Field(max_length=2000, pattern=NO_NUL)] | None = None


class ItemPatch(ItemIn):
    title: Title = Field(default_factory=str)  # may be left out, may not be null


class ItemOut(BaseModel, from_attributes=True):
    id: int
    title: str
    description: str | None
    created_at: UtcTime
    updated_at: UtcTime


class ItemPage(BaseModel):
    items: list[ItemOut]
    next: int | None


class Probe(BaseModel):
    status: Literal["alive", "ready", "not_ready"]


class Health(BaseModel):
    status: Literal["healthy", "degraded"]
    timestamp: datetime
    version: str
    checks: dict[str, dict[Literal["status"], Literal["healthy", "unhealthy"]]]


# --- Security -------------------------------------------------------------------------
# Argon2id with OWASP's parameters: a guess costs 19 MiB and some 30 ms.

PASSWORDS = PasswordHash([Argon2Hasher(time_cost=2, memory_cost=19456, parallelism=1)])
# No password has this hash; to find that out takes as long as with anybody's.
DECOY_HASH = f"$argon2id$v=19$m=19456,t=2,p=1${'A' * 22}${'A' * 43}"
# Two at a time bound the memory. Argon2 releases the GIL: the event loop goes on.
HASHING = ThreadPoolExecutor(2, "argon2")


async def off_the_loop(work: Callable[..., Any], *texts: str) -> Any:
    return await asyncio.get_running_loop().run_in_executor(HASHING, work, *texts)


class Tokens:  # JWT, RFC 7519
    def __init__(self, settings: Settings) -> None:
        self.algorithm = settings.ALGORITHM
        self.seconds = settings.ACCESS_TOKEN_EXPIRE_MINUTES * 60
        # Given as text, jose would take some secrets for JSON or PEM.
        secret = base64url_encode(os.fsencode(settings.SECRET_KEY.get_secret_value()))
        secret_jwk = {"kty": "oct", "k": secret.decode()}
        self.key: Any = jwk.construct(secret_jwk, self.algorithm)

    def issue(self, user: User) -> str:
        issued = int(time.time())
        claims = {"sub": str(user.id), "iat": issued, "exp": issued + self.seconds}
        claims["version"] = user.token_version
        return jwt.encode(claims, self.key, self.algorithm)

    def read(self, token: str) -> tuple[int, int]:
        """The user's id and the token's version. Raises InvalidToken."""
        require = {"require_sub": True, "require_iat": True, "require_exp": True}
        try:
            signature = token.rpartition(".")[2].encode()
            if base64url_encode(base64url_decode(signature)) != signature:
                raise InvalidToken  # jose skips what is no base64, and its spare bits
            claims = jwt.decode(token, self.key, [self.algorithm], require)
            return min(max(0, int(claims["sub"])), MAX_ID), claims["version"]
        except Exception:  # noqa: BLE001 - jose raises TypeError, RecursionError, ...
            raise InvalidToken from None


# --- Repositories ---------------------------------------------------------------------
# SQL and nothing else: rows or None come back, no rule is decided, nothing committed.

Rows = Sequence[Any]
Page = dict[str, Any]
# Statements of hot paths, built once: to build one takes longer than to run it.
FIND_USER = sa.select(User).where(User.id == sa.bindparam("id"))
OWNER, AFTER = sa.bindparam("owner", type_=ID), sa.bindparam("after", type_=ID)
# For `owner_id = 1 AND id > 2 ORDER BY id` PostgreSQL may walk all owners' rows.
LIST_ITEMS = (
    sa.select(Item.id, Item.title, Item.description, Item.created_at, Item.updated_at)
    .where(sa.tuple_(Item.owner_id, Item.id) > sa.tuple_(OWNER, AFTER))
    .where(Item.owner_id <= OWNER)
    .order_by(Item.owner_id, Item.id)
    .limit(sa.bindparam("limit"))
)


async def find_user(db: AsyncSession, user_id: int) -> User | None:
    return await db.scalar(FIND_USER, {"id": user_id})


async def find_user_named(db: AsyncSession, username: str) -> User | None:
    return await db.scalar(sa.select(User).where(User.username == username))


async def list_users(db: AsyncSession, after: int, limit: int) -> Rows:
    query = sa.select(User).where(User.id > after).order_by(User.id).limit(limit)
    return (await db.scalars(query)).all()


async def set_password(db: AsyncSession, user: User, **changes: Any) -> bool:
    """False if the hash is no longer the one that `user` was read with."""
    unchanged = (User.id == user.id) & (User.password_hash == user.password_hash)
    query = sa.update(User).where(unchanged).values(changes).returning(User.id)
    return await db.scalar(query) is not None


async def find_item(db: AsyncSession, owner_id: int, item_id: int) -> Item | None:
    query = sa.select(Item).where(Item.id == item_id, Item.owner_id == owner_id)
    return await db.scalar(query)


async def list_items(db: AsyncSession, owner_id: int, after: int, limit: int) -> Rows:
    """Columns, not entities: they are written as JSON and forgotten."""
    page = {"owner": owner_id, "after": after, "limit": limit}
    return (await db.execute(LIST_ITEMS, page)).all()


# --- Services -------------------------------------------------------------------------
# The rules. A service commits as its last act, or before a password is hashed.


def page_of(what: str, rows: Rows, limit: int) -> Page:
    return {what: rows[:limit], "next": rows[limit - 1].id if rows[limit:] else None}


async def register_user(db: AsyncSession, user_in: UserIn) -> User:
    """Raises UsernameTaken."""
    password_hash = await off_the_loop(PASSWORDS.hash, user_in.password)
    user = User(username=user_in.username, password_hash=password_hash)
    db.add(user)
    try:
        await db.commit()
    except sa.exc.IntegrityError:
        raise UsernameTaken from None
    return user


async def authenticate_user(db: AsyncSession, username: str, password: str) -> User:
    """Raises WrongCredentials, as late for a name that does not exist."""
    user = await find_user_named(db, username)
    await db.commit()
    known = user.password_hash if user else DECOY_HASH
    valid, renewed = await off_the_loop(PASSWORDS.verify_and_update, password, known)
    if user is None or not valid:
        raise WrongCredentials
    if renewed:
        await set_password(db, user, password_hash=renewed)
        await db.commit()
    return user


async def read_user(db: AsyncSession, user_id: int) -> User:
    if (user := await find_user(db, user_id)) is None:
        raise NotFound
    return user


async def read_token_owner(db: AsyncSession, user_id: int, version: int) -> User:
    """Raises InvalidToken if the user is gone or has changed the password since."""
    user = await find_user(db, user_id)
    if user is None or user.token_version != version:
        raise InvalidToken
    return user


async def read_users(db: AsyncSession, after: int, limit: int) -> Page:
    return page_of("users", await list_users(db, after, limit + 1), limit)


async def change_password(db: AsyncSession, user: User, change: PasswordChange) -> None:
    """Kill all tokens of the user. Raises WrongPassword."""
    await db.commit()
    current, known = change.current_password, user.password_hash
    if not await off_the_loop(PASSWORDS.verify, current, known):
        raise WrongPassword
    new_hash = await off_the_loop(PASSWORDS.hash, change.new_password)
    version = user.token_version + 1
    if not await set_password(db, user, password_hash=new_hash, token_version=version):
        raise WrongPassword  # it has been changed meanwhile
    await db.commit()


async def discard_user(db: AsyncSession, user: User) -> None:
    await db.delete(user)  # the items go too, by their foreign key
    await db.commit()


async def create_item(db: AsyncSession, owner: User, item_in: ItemIn) -> Item:
    """Raises InvalidToken if the owner has been deleted meanwhile."""
    values = item_in.model_dump() | dict.fromkeys(("created_at", "updated_at"), now())
    item = Item(**values, owner_id=owner.id)
    db.add(item)
    try:
        await db.commit()
    except sa.exc.IntegrityError:
        raise InvalidToken from None
    return item


async def read_item(db: AsyncSession, owner: User, item_id: int) -> Item:
    if (item := await find_item(db, owner.id, item_id)) is None:
        raise NotFound
    return item


async def read_items(db: AsyncSession, owner: User, after: int, limit: int) -> Page:
    return page_of("items", await list_items(db, owner.id, after, limit + 1), limit)


async def change_item(
    db: AsyncSession, owner: User, item_id: int, patch: ItemPatch
) -> Item:
    item = await read_item(db, owner, item_id)
    for name, value in patch.model_dump(exclude_unset=True).items():
        setattr(item, name, value)
    await db.commit()
    return item


async def discard_item(db: AsyncSession, owner: User, item_id: int) -> None:
    await db.delete(await read_item(db, owner, item_id))
    await db.commit()


# --- Rate limiting --------------------------------------------------------------------
# Exact sliding windows: a log of admissions a client, in memory or in Redis.

WAYS, MAX_ROWS, REDIS_SECONDS = 16, 65_536, 0.1  # rows: in a bucket, in a table
open_lock_file = cache(tempfile.TemporaryFile)  # one, before the fork
# MemoryWindow's rule on a list of admission times, in microseconds of Redis's clock.
REDIS_SCRIPT = """
local key, limit, window = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local gone = now - window
local low, high, middle = 0, redis.call('LLEN', key), 0
while low < high do
    local moment = tonumber(redis.call('LINDEX', key, middle))
    if moment <= gone then low = middle + 1 else high = middle end
    middle = math.floor((low + high) / 2)
end
redis.call('LTRIM', key, low, -1)
local count, admitted = redis.call('LLEN', key), 0
if count < limit then
    count = redis.call('RPUSH', key, string.format('%.0f', now))
    admitted = redis.call('PEXPIRE', key, math.ceil(window / 1000))
end
-- Hosts may differ in their limits: one fits here when all beyond this one's are gone.
local last = redis.call('LINDEX', key, math.max(0, count - limit))
return {math.max(0, limit - count), math.ceil((last - gone) / 1e6), limit, admitted}
"""


class Verdict(NamedTuple):  # in an order in which `min` is the stricter of two
    remaining: int
    wait_seconds: int  # until the oldest request leaves the window, and another fits
    limit: int
    admitted: bool


@lru_cache(8192)
def client_of(address: str) -> str:
    """Who has a budget: an IPv4 address, or an IPv6 /64, which is what a site gets."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])  # without its zone
    except ValueError:
        return "unknown"  # one for all, or a client would invent one for each request
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return str(ip) if ip.version == 4 else f"{ip.exploded[:19]}::/64"


class MemoryWindow:
    """Admits at most `limit` requests of a client in any `seconds`, exactly.

    Each client has a row in memory that forked processes share: who, when last seen,
    and a ring of admission times, those numbered `first` to `past` in the window. Of a
    full bucket the longest idle is forgotten; there exactness ends. A process may be
    killed anywhere: the kernel frees its lock, and what is half done admits nobody.
    """

    def __init__(self, limit: int, seconds: int, table_bytes: int) -> None:
        self.limit, self.window_ns = limit, seconds * 10**9
        self.clock = time.monotonic_ns
        rows = min(MAX_ROWS, table_bytes // (8 * (4 + limit)))
        self.ways = min(WAYS, rows)
        self.buckets = rows // self.ways
        cells = memoryview(mmap.mmap(-1, 8 * (4 + limit) * rows)).cast("Q")
        self.who, self.seen = cells[:rows], cells[rows : 2 * rows]
        self.first, self.past = cells[2 * rows : 3 * rows], cells[3 * rows : 4 * rows]
        self.rings = cells[4 * rows :]
        self.lock_file = open_lock_file()

    def admit(self, client: str) -> Verdict:
        # SipHash, keyed alike in forked processes: nobody can choose a victim's bucket.
        who = hash(client) % 2**64 | 1  # 0 is nobody
        bucket = (who >> 1) % self.buckets
        fcntl.lockf(self.lock_file, fcntl.LOCK_EX, 1, bucket)
        try:
            return self._count(self._row(who, bucket * self.ways))
        finally:
            fcntl.lockf(self.lock_file, fcntl.LOCK_UN, 1, bucket)

    def _row(self, who: int, start: int) -> int:
        known = self.who[start : start + self.ways].tolist()
        if who in known:
            return start + known.index(who)
        seen = self.seen[start : start + self.ways].tolist()
        row = start + seen.index(min(seen))  # 0 where nobody has been
        self.first[row] = self.past[row]
        self.who[row] = who
        return row

    def _count(self, row: int) -> Verdict:
        ring = self.rings[row * self.limit : (row + 1) * self.limit]
        first, past = self.first[row], self.past[row]
        self.seen[row] = now_ns = self.clock()
        gone = now_ns - self.window_ns
        if first < past and ring[first % self.limit] <= gone:
            span = range(first, past)
            first += bisect_right(span, gone, key=lambda n: ring[n % self.limit])
            self.first[row] = first
        if admitted := past - first < self.limit:
            ring[past % self.limit] = now_ns
            self.past[row] = past = past + 1
        reset = math.ceil((ring[first % self.limit] - gone) / 10**9)
        return Verdict(self.limit - past + first, reset, self.limit, admitted)


class Limiter:  # two budgets a client, in Redis while it answers, else in memory
    def __init__(self, settings: Settings) -> None:
        seconds = settings.RATE_LIMIT_WINDOW_SECONDS
        login, api = settings.RATE_LIMIT_LOGIN_REQUESTS, settings.RATE_LIMIT_REQUESTS
        self.windows = {"login": MemoryWindow(login, seconds, 16 * 2**20)}
        self.windows["api"] = MemoryWindow(api, seconds, 48 * 2**20)
        self.redis: Redis | None = None
        self.turns, self.away, self.retry_at = asyncio.Semaphore(32), False, 0.0
        if settings.REDIS_URL:
            # In RESP3 redis-py does not look whether a connection was closed meanwhile.
            self.redis = Redis.from_url(str(settings.REDIS_URL), protocol=2)
            self.script = self.redis.register_script(REDIS_SCRIPT)

    async def admit(self, budget: str, address: str) -> Verdict:
        client = client_of(address)
        verdict = await self.ask_redis(budget, client) if self.redis else None
        return verdict or self.windows[budget].admit(client)

    async def ask_redis(self, budget: str, client: str) -> Verdict | None:
        """None while Redis is away; every second one request tries whether it is."""
        async with self.turns:  # whoever waits for a connection does not wait for Redis
            started, retries = time.monotonic(), self.away
            if retries and started < self.retry_at:
                return None
            self.retry_at = started + RETRY_SECONDS
            window, key = self.windows[budget], f"rate-limit:{budget}:{client}"
            arguments = [window.limit, window.window_ns // 1000]
            call = asyncio.ensure_future(self.script([key], arguments))
            try:
                for _ in range(5):  # a step in which the loop is late counts once
                    if not call.done():
                        await asyncio.wait({call}, timeout=REDIS_SECONDS / 5)
                error = call.exception() if call.done() else TimeoutError()
            finally:
                call.cancel()
        if error or retries:
            self.away = tell_change("Redis", self.away, error)
        if error:
            return None
        return Verdict._make(call.result())


# --- Middleware -----------------------------------------------------------------------
# One layer of pure ASGI. What it and the routes share lies in the scope: an Exchange.

ACCEPTABLE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
NEVER = "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
SECURITY_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; {NEVER}",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "accelerometer=(), camera=(), geolocation=(), microphone=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-XSS-Protection": "0",  # the filter that it switches on was a hole itself
    "Cache-Control": "no-store",
}
# What Swagger UI and ReDoc load: scripts and styles of a CDN and inline, icons, fonts.
DOCS_HEADERS = SECURITY_HEADERS | {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; worker-src "
    "blob:; script-src 'unsafe-inline' https://cdn.jsdelivr.net/npm/; style-src "
    "'unsafe-inline' https://cdn.jsdelivr.net/npm/ https://fonts.googleapis.com/css; "
    "font-src https://fonts.gstatic.com/s/; img-src data: "
    f"https://cdn.redoc.ly/redoc/ https://fastapi.tiangolo.com/img/; {NEVER}",
    "Cross-Origin-Embedder-Policy": "credentialless",
}
DOCS_PATHS = ("/docs", "/docs/oauth2-redirect", "/redoc")
# RFC 6797 § 7.2: over https only. Subdomains may be somebody else's.
HTTPS_HEADERS = {"Strict-Transport-Security": "max-age=63072000"}
LIMIT_HEADERS = ("X-RateLimit-Remaining", "X-RateLimit-Reset", "X-RateLimit-Limit")
OTHER_HEADERS = ("X-Request-ID", "X-Response-Time", "Location", "Retry-After")
LIMIT_NAMES = [name.lower().encode() for name in LIMIT_HEADERS]
EXPOSED = [*OTHER_HEADERS, *LIMIT_HEADERS, *SECURITY_HEADERS, *HTTPS_HEADERS]


def encode(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


@dataclass(slots=True)
class Exchange:  # a request and its response, as far as both need to know
    headers: dict[bytes, bytes]  # the request's
    client: str
    path: str  # without the root path of a proxy
    verdict: Verdict | None = None
    status: int | None = None  # set when the response begins
    error: BaseException | None = None  # for the log

    def count(self, verdict: Verdict) -> None:
        self.verdict = min(verdict, self.verdict or verdict)
        if not verdict.admitted:
            raise HTTPException(429, headers={"Retry-After": str(verdict.wait_seconds)})


class Edge:  # what every request passes, and every response
    def __init__(self, app: ASGIApp, settings: Settings, limiter: Limiter) -> None:
        self.app, self.settings, self.limiter = app, settings, limiter
        self.cors = CORSMiddleware(
            self.guard,
            allow_origins=settings.CORS_ORIGINS,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=EXPOSED,
        )
        self.usual, self.https = encode(SECURITY_HEADERS), encode(HTTPS_HEADERS)
        self.docs = dict.fromkeys(DOCS_PATHS, encode(DOCS_HEADERS))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not ACCEPTABLE_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16).encode()
        # Always set: the requests of one connection share their context.
        REQUEST_ID.set(request_id.decode())
        client = scope["client"][0][:64] if scope["client"] else "unknown"
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        scope["exchange"] = exchange = Exchange(headers, client, path)
        forwarded_for = headers.get(b"x-forwarded-for")
        # From a peer that it trusts uvicorn has taken the client out of this header.
        if forwarded_for and client not in forwarded_for.decode("latin-1"):
            WARN_ONCE("FORWARDED_ALLOW_IPS lacks this proxy: its clients are as one")

        async def send_enveloped(message: Message) -> None:
            if message["type"] == "http.response.start":
                lines = [*message["headers"], *self.docs.get(path, self.usual)]
                if scope["scheme"] == "https":
                    lines += self.https
                if exchange.verdict:
                    lines += zip(LIMIT_NAMES, map(b"%d".__mod__, exchange.verdict))
                duration = b"%.2fms" % ((time.perf_counter() - began) * 1000)
                lines += (b"x-request-id", request_id), (b"x-response-time", duration)
                message["headers"] = lines
            await send(message)
            exchange.status = message.get("status", exchange.status)

        app = self.cors if b"origin" in headers else self.guard
        try:
            await app(scope, receive, send_enveloped)
        finally:
            fields = {"method": scope["method"], "path": scope["path"]}
            fields |= {"status_code": exchange.status, "client": client}
            fields["duration_ms"] = round((time.perf_counter() - began) * 1000, 2)
            level = logging.ERROR if exchange.error else logging.INFO
            LOG.log(level, "request", exc_info=exchange.error, extra=fields)

    async def guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Bounds how often, how long and how much, and answers for what goes wrong."""
        exchange: Exchange = scope["exchange"]
        failure = HTTPException(500)
        timer = asyncio.timeout(self.settings.REQUEST_TIMEOUT_SECONDS)
        try:
            # Before any of the body is read, and whatever becomes of the request.
            if exchange.path.startswith(self.settings.API_V1_PREFIX + "/"):
                exchange.count(await self.limiter.admit("api", exchange.client))
            async with timer:
                return await self.app(scope, self.bounded(receive, exchange), send)
        except HTTPException as refusal:
            failure = refusal
        except asyncio.CancelledError:  # the server's grace is over
            failure = Unavailable()
        except Exception as error:  # noqa: BLE001 - here they end
            if timer.expired():
                failure = HTTPException(504)
            else:
                exchange.error = error
        # A response that has begun can only be broken off, which the server does.
        if exchange.status is None:
            await (await answer(Request(scope), failure))(scope, receive, send)

    def bounded(self, receive: Receive, exchange: Exchange) -> Receive:
        bound = self.settings.MAX_BODY_BYTES
        declared, size = int(exchange.headers.get(b"content-length", 0)), 0

        async def receive_bounded() -> Message:
            nonlocal size
            message = await receive() if declared <= bound else {}
            size += len(message.get("body", b""))
            if max(size, declared) > bound:
                raise HTTPException(413)
            return message

        return receive_bounded


# --- Dependencies ---------------------------------------------------------------------
# What a route asks for. All are coroutines: plain functions would each cost a thread.


async def get_session(request: Request) -> AsyncIterator[AsyncSession]:
    """One a request, in a transaction where the method may write."""
    database: Database = request.app.state.database
    if not database.up.is_set():
        raise Unavailable
    reads = request.method in {"GET", "HEAD"}  # RFC 9110 § 9.2.1: the safe ones
    async with (database.reader if reads else database.writer)() as session:
        yield session


# "function": closed before the response is sent, not after it.
SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]
BearerDep = Annotated[str, Depends(OAuth2PasswordBearer("auth/token"))]


async def get_current_user(token: BearerDep, request: Request, db: SessionDep) -> User:
    """Raises InvalidToken, or a plain 401 where there is no token."""
    return await read_token_owner(db, *request.app.state.tokens.read(token))


CurrentUser = Annotated[User, Depends(get_current_user)]


async def limit_logins(request: Request) -> None:
    exchange: Exchange = request.scope["exchange"]
    exchange.count(await request.app.state.limiter.admit("login", exchange.client))


# --- Health routes --------------------------------------------------------------------
# For orchestrators and monitors: not limited, and silent about why.


def errors(*statuses: int) -> dict[int | str, Any]:
    """What a route may answer besides, for its documentation."""
    return {s: {"model": ErrorResponse, "description": USUAL[s][1]} for s in statuses}


async def get_liveness() -> Probe:
    """Does the process answer? If not, restart it."""
    return Probe(status="alive")


async def get_readiness(request: Request, response: Response) -> Probe:
    """Can it serve requests? If not, send them elsewhere."""
    ready = await request.app.state.database.answers()
    response.status_code = 200 if ready else 503
    return Probe(status="ready" if ready else "not_ready")


async def get_health(request: Request, response: Response) -> Health:
    """How are the service and what it depends on?"""
    state = request.app.state
    checks = {"database": state.database.answers()}
    if state.limiter.redis:
        checks["redis"] = state.limiter.ask_redis("login", "health")
    tasks = [asyncio.ensure_future(check) for check in checks.values()]
    await asyncio.wait(tasks, timeout=CHECK_SECONDS)
    words: Any = ["healthy" if t.done() and t.result() else "unhealthy" for t in tasks]
    response.status_code = 200 if words[0] == "healthy" else 503
    return Health(
        status="degraded" if "unhealthy" in words else "healthy",
        timestamp=now(),
        version=request.app.version,
        checks={k: {"status": word} for k, word in zip(checks, words, strict=True)},
    )


def add_health_routes(app: FastAPI) -> None:
    """On the application itself: through a router each request takes 8 µs more."""
    for path, get, responses in (
        ("/health/live", get_liveness, errors(500, 504)),
        ("/health/ready", get_readiness, errors(500, 504) | {503: {"model": Probe}}),
        ("/health", get_health, errors(500, 504) | {503: {"model": Health}}),
    ):
        app.add_api_route(path, get, responses=responses, tags=["health"])
        app.add_api_route(path, get, methods=["HEAD"], include_in_schema=False)


# --- API routes -----------------------------------------------------------------------
# HTTP and nothing else: a signature and up to three lines. Callers read the docstrings.

Id = Annotated[int, Path(ge=1, le=MAX_ID)]
After = Annotated[int, Query(ge=0, le=MAX_ID, description="`next` of the last page")]
Limit = Annotated[int, Query(ge=1, le=100)]
Grant = Annotated[PasswordGrant, Form()]

users = APIRouter(prefix="/users", tags=["users"])
auth = APIRouter(prefix="/auth", tags=["auth"], dependencies=[Depends(limit_logins)])
items = APIRouter(prefix="/items", tags=["items"], responses=errors(401))


@users.post("", status_code=201, responses=errors(400, 409, 413, 422))
async def post_user(
    user_in: UserIn, request: Request, response: Response, db: SessionDep
) -> UserOut:
    """Register."""
    user = await register_user(db, user_in)
    response.headers["Location"] = f"{request.url.path}/{user.id}"
    return UserOut.model_validate(user)


@users.get("", responses=errors(401, 422))
async def get_users(
    user: CurrentUser, db: SessionDep, after: After = 0, limit: Limit = 20
) -> UserPage:
    """All users, in the order of their ids."""
    return UserPage.model_validate(await read_users(db, after, limit))


@users.get("/me", responses=errors(401))
async def get_me(user: CurrentUser) -> UserOut:
    """Whose token this is."""
    return UserOut.model_validate(user)


@users.patch("/me", status_code=204, responses=errors(400, 401, 403, 413, 422))
async def patch_me(change: PasswordChange, user: CurrentUser, db: SessionDep) -> None:
    """Change the password. Every token issued before is dead."""
    await change_password(db, user, change)


@users.delete("/me", status_code=204, responses=errors(401))
async def delete_me(user: CurrentUser, db: SessionDep) -> None:
    """Delete the account and all its items."""
    await discard_user(db, user)


@users.get("/{user_id}", responses=errors(401, 404, 422))
async def get_user(user_id: Id, user: CurrentUser, db: SessionDep) -> UserOut:
    """One user."""
    return UserOut.model_validate(await read_user(db, user_id))


@auth.post("/token", responses=errors(400, 401, 413, 422))
async def post_token(form: Grant, request: Request, db: SessionDep) -> TokenOut:
    """Log in. The token goes into `Authorization: Bearer`."""
    user = await authenticate_user(db, form.username, form.password)
    tokens: Tokens = request.app.state.tokens
    token, seconds = tokens.issue(user), tokens.seconds
    return TokenOut(access_token=token, token_type="bearer", expires_in=seconds)


@items.post("", status_code=201, responses=errors(400, 413, 422))
async def post_item(
    new: ItemIn, user: CurrentUser, db: SessionDep, request: Request, response: Response
) -> ItemOut:
    """Add an item."""
    item = await create_item(db, user, new)
    response.headers["Location"] = f"{request.url.path}/{item.id}"
    return ItemOut.model_validate(item)


@items.get("", responses=errors(422))
async def get_items(
    user: CurrentUser, db: SessionDep, after: After = 0, limit: Limit = 20
) -> ItemPage:
    """Your own items, in the order of their ids."""
    return ItemPage.model_validate(await read_items(db, user, after, limit))


@items.get("/{item_id}", responses=errors(404, 422))
async def get_item(item_id: Id, user: CurrentUser, db: SessionDep) -> ItemOut:
    """One of your items."""
    return ItemOut.model_validate(await read_item(db, user, item_id))


@items.patch("/{item_id}", responses=errors(400, 404, 413, 422))
async def patch_item(
    item_id: Id, patch: ItemPatch, user: CurrentUser, db: SessionDep
) -> ItemOut:
    """Change what is sent, and nothing else."""
    return ItemOut.model_validate(await change_item(db, user, item_id, patch))


@items.delete("/{item_id}", status_code=204, responses=errors(404, 422))
async def delete_item(item_id: Id, user: CurrentUser, db: SessionDep) -> None:
    """Delete one of your items."""
    await discard_item(db, user, item_id)


# --- Application ----------------------------------------------------------------------
# The parts list.

ANSWERS: Any = {HTTPException: answer, RequestValidationError: answer_invalid}
ANSWERS |= dict.fromkeys((sa.exc.SQLAlchemyError, TimeoutError), answer_database_error)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open what has connections, and close it; a database may delay it by a second."""
    database = app.state.database = Database(app.state.settings)
    watch = asyncio.create_task(database.watch())
    with suppress(TimeoutError):  # else a worker that has just come would answer 503
        await asyncio.wait_for(database.up.wait(), 1)
    yield
    database.hang_up()
    watch.cancel()
    await asyncio.wait({watch}, timeout=1)
    await database.reading.dispose()
    await database.alone.dispose()
    if app.state.limiter.redis:
        await app.state.limiter.redis.aclose()


def create_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or load_settings()
    set_up_logging(settings)
    if "SECRET_KEY" not in settings.model_fields_set:
        LOG.warning("SECRET_KEY is not set: tokens will not outlive a restart")
    limiter, prefix = Limiter(settings), settings.API_V1_PREFIX
    app = FastAPI(
        title=settings.PROJECT_NAME,
        description=settings.PROJECT_DESCRIPTION,
        version=settings.VERSION,
        openapi_url=f"{prefix}/openapi.json",
        servers=[{"url": "/"}],
        redirect_slashes=False,  # it would redirect to whatever host a client names
        generate_unique_id_function=lambda route: route.name,
        exception_handlers=ANSWERS,
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # see README
    )
    app.add_middleware(Edge, settings=settings, limiter=limiter)
    app.state.settings, app.state.limiter = settings, limiter
    app.state.tokens = Tokens(settings)
    docs, app.router.routes = app.router.routes, []
    add_health_routes(app)
    for router in (users, auth, items):
        app.include_router(router, prefix=prefix, responses=errors(429, 500, 503, 504))
    app.router.routes += docs  # last: one is tried after the other
    document = app.openapi()
    document["security"] = []  # but where a route says otherwise
    scheme = document["components"]["securitySchemes"]["OAuth2PasswordBearer"]
    scheme["flows"]["password"]["tokenUrl"] = f"{prefix}/auth/token"
    return app


def __getattr__(name: str) -> FastAPI:
    """`main:app`, built when a server asks for it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    app = globals()["app"] = create_app()
    return app
