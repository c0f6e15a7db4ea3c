"""A small FastAPI service: settings, application factory, SQLite, users with tokens and items."""

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm
from jose import JWTError, jwt
from pwdlib import PasswordHash
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_file=".env", extra="ignore")

    SECRET_KEY: SecretStr = Field(
        default_factory=lambda: SecretStr(secrets.token_hex(32))
    )
    DATABASE_URL: str = "sqlite+aiosqlite:///./app.db"


class Base(DeclarativeBase): ...


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    username: Mapped[str] = mapped_column(unique=True)
    password_hash: Mapped[str]


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int] = mapped_column(sa.ForeignKey("users.id"))
    title: Mapped[str]


class UserIn(BaseModel):
    username: str
    password: str


class ItemIn(BaseModel):
    title: str


class ItemOut(ItemIn):
    model_config = ConfigDict(from_attributes=True)
    id: int


PASSWORDS = PasswordHash.recommended()
router = APIRouter(prefix="/api/v1")
Token = Annotated[str, Depends(OAuth2PasswordBearer(tokenUrl="/api/v1/auth/token"))]


async def get_session(request: Request) -> AsyncIterator[AsyncSession]:
    async with request.app.state.session_maker() as session:
        yield session


SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]


async def current_user(request: Request, token: Token, session: SessionDep) -> User:
    key = request.app.state.settings.SECRET_KEY.get_secret_value()
    try:
        claims = jwt.decode(token, key, ["HS256"])
    except JWTError:
        raise HTTPException(401) from None
    user = await session.get(User, int(claims["sub"]))
    if user is None:
        raise HTTPException(401)
    return user


CurrentUser = Annotated[User, Depends(current_user)]


@router.post("/users", status_code=201)
async def post_user(user_in: UserIn, session: SessionDep) -> dict[str, Any]:
    password_hash = PASSWORDS.hash(user_in.password)
    user = User(username=user_in.username, password_hash=password_hash)
    session.add(user)
    await session.commit()
    return {"id": user.id, "username": user.username}


@router.post("/auth/token")
async def post_token(
    request: Request,
    form: Annotated[OAuth2PasswordRequestForm, Depends()],
    session: SessionDep,
) -> dict[str, Any]:
    user = await session.scalar(sa.select(User).where(User.username == form.username))
    if user is None or not PASSWORDS.verify(form.password, user.password_hash):
        raise HTTPException(401)
    claims = {"sub": str(user.id), "exp": int(time.time()) + 1800}
    key = request.app.state.settings.SECRET_KEY.get_secret_value()
    return {"access_token": jwt.encode(claims, key, "HS256"), "token_type": "bearer"}


@router.post("/items", status_code=201, response_model=ItemOut)
async def post_item(item_in: ItemIn, user: CurrentUser, session: SessionDep) -> Item:
    item = Item(owner_id=user.id, title=item_in.title)
    session.add(item)
    await session.commit()
    return item


@router.get("/items/{item_id}", response_model=ItemOut)
async def get_item(item_id: int, user: CurrentUser, session: SessionDep) -> Item:
    query = sa.select(Item).where(Item.id == item_id, Item.owner_id == user.id)
    if (item := await session.scalar(query)) is None:
        raise HTTPException(404)
    return item


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    engine = create_async_engine(app.state.settings.DATABASE_URL)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    app.state.session_maker = async_sessionmaker(engine, expire_on_commit=False)
    yield
    await engine.dispose()


def create_app(settings: Settings | None = None) -> FastAPI:
    app = FastAPI(lifespan=lifespan, redirect_slashes=False)
    app.state.settings = settings or Settings()
    app.include_router(router)
    return app


def __getattr__(name: str) -> FastAPI:
    """`main:app` for servers, built when it is asked for."""
    if name != "app":
        raise AttributeError(name)
    global app
    app = create_app()
    return app
