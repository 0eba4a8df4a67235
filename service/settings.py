"""The server's settings: one frozen object, from the environment or from flags; an unknown or ill-formed one is
refused.

Every setting is `ENGRAM_<NAME>` in the environment. A flag wins over the environment.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from service.errors import InvalidSettings

if TYPE_CHECKING:
    from limits import RateLimitItem

PREFIX = "ENGRAM_"
NOT_OURS = frozenset({"ENGRAM_URL"})  # read by the command line (which server to talk to), not by the server


WINDOWS_MAX = 4  # of one rate limit: each is counted with every request


def rates(text: str) -> list[RateLimitItem]:
    """`100/second;2000/minute` as the windows it names. Raises ValueError."""
    from limits import parse_many  # a tenth of a second, which a command without limits does not take

    try:
        windows = parse_many(text)
    except ValueError:
        windows = []
    if not 1 <= len(windows) <= WINDOWS_MAX or any(window.amount < 1 for window in windows):
        raise ValueError(f"a rate limit is like 100/second;2000/minute, with at most {WINDOWS_MAX} windows")
    return windows


def _check_rates(text: str) -> str:
    rates(text)
    return text


RateLimit = Annotated[str, Field(max_length=200), AfterValidator(_check_rates)]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path = Field(default=Path("memories"), description="the data folder")
    database_url: SecretStr | None = Field(
        default=None, description="postgresql://user:password@host/name; absent: SQLite in the data folder"
    )
    redis_url: SecretStr | None = Field(
        default=None,
        description="redis://host:6379, by which servers of one database hear of writes at once; absent: each second",
    )
    originals: Path | None = Field(
        default=None,
        description="the folder of originals, one for all servers of a database; absent: blobs, in the data folder",
    )
    jobs: bool = Field(
        default=True, description="run background jobs in the server; false where workers (python -m workers) do"
    )
    host: str = Field(default="127.0.0.1", description="the address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="the port to listen on; 0 takes a free one")
    grpc_port: Annotated[int, Field(ge=0, le=65535)] | Literal["off"] | None = Field(
        default=None, description="gRPC's port; 0 takes a free one; absent: the one after `port`; off: no gRPC"
    )
    api_key: SecretStr | None = Field(
        default=None, description="an admin key besides those in the database; one of them is needed beyond loopback"
    )
    rate_limit: RateLimit | None = Field(
        default=None, description="requests of one key, or one address without: 100/second;2000/minute; absent: any"
    )
    concurrent_max: int | None = Field(
        default=None, ge=1, description="requests at once of one key, or one address without; absent: any"
    )
    threads: int = Field(
        default=1, ge=1, le=256, description="torch threads; more than one is slower under load on few cores"
    )
    encoder_device: str = Field(
        default="cpu", min_length=1, description="where encoders run, as torch names it: cpu, cuda, cuda:1, mps"
    )
    body_bytes_max: int = Field(
        default=64 * 2**20, ge=2**10, description="largest request body; a batch is held in memory whole"
    )
    import_spool_bytes_max: int = Field(
        default=64 * 2**30, ge=2**20, description="largest Parquet body of an import, kept on disk while it is read"
    )
    image_pixels_max: int = Field(
        default=50_000_000, ge=1, description="largest image; one decoded pixel takes three bytes"
    )

    encode_cache_bytes: int = Field(
        default=64 * 2**20,
        ge=0,
        description="vectors remembered by what they were made of; the default holds 30,000 sentences; 0: none",
    )

    snapshots: str | None = Field(
        default=None,
        description="where snapshots are kept: a folder, or s3://bucket/prefix?endpoint=http://host:port&region=name "
        "(credentials: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY); absent: snapshots in the data folder",
    )
    snapshot_bytes_max: int = Field(
        default=64 * 2**30, ge=2**20, description="largest snapshot that is received; it goes to disk, not to memory"
    )

    @property
    def grpc_listens_on(self) -> int | None:
        """gRPC's port; 0: a free one; None: nowhere."""
        if self.grpc_port == "off":
            return None
        if self.grpc_port is None:
            return self.port + 1 if 0 < self.port < 65535 else 0
        return self.grpc_port

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load(environ: Mapping[str, str], **flags: object) -> Settings:
    """Settings from `environ` and `flags` (None means "not given"). Raises `InvalidSettings`, naming what is wrong."""
    given: dict[str, object] = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(PREFIX) and name not in NOT_OURS
    }
    given.update({name: value for name, value in flags.items() if value is not None})
    try:
        settings = Settings.model_validate(given)
    except ValidationError as error:
        raise InvalidSettings("; ".join(_sentence(e["loc"], e["msg"]) for e in error.errors())) from None
    if settings.api_key is not None and not settings.api_key.get_secret_value().strip():
        raise InvalidSettings(f"{PREFIX}API_KEY is empty; unset it or give it a value")
    return settings


def _sentence(location: tuple[int | str, ...], message: str) -> str:
    name = f"{PREFIX}{str(location[0]).upper()}" if location else PREFIX
    if message == "Extra inputs are not permitted":
        known = ", ".join(f"{PREFIX}{field.upper()}" for field in Settings.model_fields)
        return f"{name} is not a setting; the settings are {known}"
    return f"{name}: {message.removeprefix('Value error, ')}"
