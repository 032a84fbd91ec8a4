"""The node's configuration: flags over environment (SHOAL_*) over a TOML file over defaults.

Law: a wrong value is one line that names the field, the value and the range, before anything is loaded or bound.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import platformdirs
from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from node import address, operator_files
from node import network as networks
from protos.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE_NAME = "shoal.toml"
PREFIX = "SHOAL_"
FILE_VARIABLE = "SHOAL_CONFIG"
# Listening on all of a machine's addresses; nobody can call these.
WILDCARDS = ("0.0.0.0", "::")  # noqa: S104  (compared with, not bound to)

# In the environment a list is words with spaces between.
Words = Annotated[tuple[str, ...], NoDecode]


class Config(BaseSettings):
    """Every field may stand in shoal.toml by its name, or in the environment as SHOAL_<NAME>."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", validate_default=True)

    store: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("shoal"),
        description="Folder with packed models: units by their hash, and manifests.",
    )
    model: str = Field(
        default="",
        max_length=64,
        description="Model id, or a unique beginning of one. Empty: the only model in the store.",
    )
    hold: Words = Field(
        default=("all",),
        max_length=256,
        description="What to hold: all, span:A-B, trunk:A-B, experts:LAYERS/EXPERTS; several add up.",
    )
    join: Words = Field(
        default=(),
        max_length=64,
        description="Nodes to join, as host:port or host:port#PEERID. None: others may join this one.",
    )
    identity: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("shoal") / "node.key",
        description="File with the node's Ed25519 key; made if it is not there.",
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        max_length=255,
        description="Address to listen on, such as 127.0.0.1, or 0.0.0.0 for all of this machine's.",
    )
    port: int = Field(default=7645, ge=0, le=65535, description="TCP port, 0 to 65535. 0: any free one.")
    advertise: str = Field(
        default="",
        max_length=300,
        description="host:port where other nodes reach this one. Unset: where it listens; needed with 0.0.0.0.",
    )
    lan: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="on: find the network's nodes on this LAN and tell them of this one (mDNS); off: do not. "
        "auto: on unless host is loopback.",
    )
    peers_file: Path | None = Field(
        default=None,
        description="File with the peers of the last run, which the next one tries. Unset: beside identity.",
    )
    zone: str = Field(default="", max_length=64, description="What fails together with this node: a rack, a site.")
    owner: str = Field(default="", max_length=64, description="Who runs this node.")
    network: str = Field(
        default=networks.NAME,
        max_length=4096,
        description="Whose records belong together: an open network's name, a permissioned one's id as 'shoal network "
        "create' prints it, or the file of its operator's key.",
    )
    grant: Path | None = Field(
        default=None, description="File with the grant that lets this node into a permissioned network."
    )
    revocations: Path | None = Field(
        default=None,
        description="File with the operator's list of grants that were taken back, which this node reads whenever it "
        "changes, and passes on. Unset: what other nodes pass on, and what lies beside the operator's key.",
    )
    clients: Words = Field(
        default=("loopback",),
        max_length=1024,
        description="Who may ask: loopback (whoever is on this machine), any, or peer ids of clients' keys.",
    )
    plaintext: bool = Field(
        default=False,
        description="No TLS, on loopback only: everybody on this machine can read and alter what is sent.",
    )
    device: str = Field(default="cpu", pattern=r"^(cpu|mps|cuda(:\d+)?)$", description="cpu, cuda, cuda:N, or mps.")
    threads: int = Field(
        default=0, ge=0, le=1024, description="Threads of one computation, 0 to 1024. 0: one for each core."
    )
    memory_limit: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Bytes for weights and KV together, such as 4GiB or 512MB. A model that does not fit is refused. "
        "Unset: no limit but the machine's.",
    )
    kv_limit: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Bytes for KV, such as 1GiB; the memory of all running answers. "
        "Unset: what memory_limit leaves, or a quarter of the memory that is free at the start.",
    )
    sessions_max: int = Field(default=8, ge=1, le=256, description="Answers computed at once, 1 to 256.")
    queue_max: int = Field(
        default=16, ge=0, le=1024, description="Answers that wait for a place, 0 to 1024; what exceeds it is refused."
    )
    queue_wait_s: float = Field(
        default=60.0, gt=0, le=3600, description="Seconds after which a waiting answer is refused, up to 3600."
    )
    step_deadline_s: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="Seconds that one token, or 256 tokens of a prompt, may take before the answer fails, up to 3600.",
    )
    client_wait_s: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="Seconds that a client may not read before its answer is given up, up to 3600.",
    )
    expert_wait_s: float = Field(
        default=10.0, gt=0, le=600, description="Seconds that a layer waits for experts that nobody answers, up to 600."
    )
    repair_wait_s: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="Seconds that an answer waits for another holder of what was lost, up to 3600.",
    )
    step_streams_max: int = Field(
        default=64, ge=2, le=1024, description="Streams of steps and results from other nodes, 2 to 1024."
    )
    expert_streams_max: int = Field(
        default=64, ge=1, le=1024, description="Nodes whose stages may use the experts held here, 1 to 1024."
    )
    expert_queue_max: int = Field(
        default=64, ge=1, le=4096, description="Expert calls that may wait here, 1 to 4096; what exceeds it is refused."
    )
    profile: Literal["lan", "wan"] = Field(
        default="lan",
        description="How fast gossip runs. lan: nodes within milliseconds, a death is noticed in seconds; or wan.",
    )
    probe_period_s: float = Field(
        default=0.0,
        ge=0,
        le=60,
        description="Seconds between two probes of other nodes, up to 60; what follows from it is scaled alike. "
        "0: as profile says.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="debug, info, warning or error."
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="console: for people. json: one object a line."
    )

    @field_validator("hold", "join", "clients", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("lan", mode="before")
    @classmethod
    def _yes_or_no(cls, value: object) -> object:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("join")
    @classmethod
    def _are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for seed in value:
                address.parse(seed)
        except InvalidRequest as error:
            raise ValueError(error.message) from None
        return value

    @field_validator("clients")
    @classmethod
    def _are_clients(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for word in value:
            if word not in ("loopback", "any") and not address.is_peer_id(word):
                raise ValueError(
                    f"{word!r:.80} is no client: give loopback, any, or a peer id (52 characters, of a to z and 2 to 7)"
                )
        return value

    @field_validator("network")
    @classmethod
    def _is_network(cls, value: str) -> str:
        if not operator_files.is_path(value):
            try:
                networks.parse(value)
            except InvalidRequest as error:
                raise ValueError(error.message) from None
        return value

    @model_validator(mode="after")
    def _reachable_and_safe(self) -> Self:
        if self.plaintext and not is_loopback(self.host):
            raise ValueError(f"plaintext is for loopback only, and host is {self.host}; leave one of the two out")
        if self.host in WILDCARDS and not self.advertise:
            raise ValueError(f"host is {self.host}, which nobody can call: say advertise, such as my-machine:7645")
        if not self.hold:
            raise ValueError("hold is empty; leave it out to hold all")
        return self

    @property
    def searches_lan(self) -> bool:
        return self.lan == "on" or (self.lan == "auto" and not is_loopback(self.host))

    @property
    def remembered(self) -> Path:
        """Beside the key, because it is this node's memory: two nodes of one user do not share it."""
        return self.peers_file or self.identity.with_suffix(".peers")

    @property
    def marks_file(self) -> Path:
        """Sequences of records that were seen; beside the key for the same reason."""
        return self.identity.with_suffix(".marks")

    @property
    def operators_list(self) -> Path | None:
        """The operator's revocation list, where this node is to look for it."""
        if self.revocations is None and operator_files.is_path(self.network):
            return operator_files.revocations_path(Path(self.network).expanduser())
        return self.revocations

    @property
    def revocations_file(self) -> Path:
        """The node's own copy of the revocation list in force."""
        return self.identity.with_suffix(".revocations")


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach, or be, `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load(flags: dict[str, Any] | None = None, file: Path | None = None) -> Config:
    """The configuration.  A flag that is None is not set.  Raises InvalidRequest with one line for what is wrong."""
    path = _find(file)
    _refuse_unknown(os.environ)
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        return _layered(path)(**given)
    except ValidationError as error:
        raise InvalidRequest(_explain(error, path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InvalidRequest(f"the configuration file {path} cannot be read: {error}") from None


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    """A misspelt SHOAL_MEMORY_LIMIT must not become a node without a limit."""
    known = {f"{PREFIX}{name.upper()}" for name in Config.model_fields} | {FILE_VARIABLE}
    for name in environment:
        if name.startswith(PREFIX) and name not in known:
            raise InvalidRequest(f"{name} is no setting; there are {', '.join(sorted(known))}")


def _layered(path: Path | None) -> type[Config]:
    class Layered(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=path)

    return Layered


def _find(file: Path | None) -> Path | None:
    """The file named by the flag or SHOAL_CONFIG, which must exist; else ./shoal.toml or the user's, if any."""
    named = file or (Path(os.environ[FILE_VARIABLE]) if os.environ.get(FILE_VARIABLE) else None)
    if named is not None:
        if not named.is_file():
            raise InvalidRequest(f"there is no configuration file {named}")
        return named
    usual = (Path(FILE_NAME), platformdirs.user_config_path("shoal") / FILE_NAME)
    return next((path for path in usual if path.is_file()), None)


def _explain(error: ValidationError, path: Path | None) -> str:
    lines = [_explain_field(".".join(map(str, detail["loc"])), detail) for detail in error.errors()]
    return "; ".join(lines) + (f" (from a flag, {PREFIX}* or {path})" if path else "")


def _explain_field(name: str, detail: Any) -> str:
    if not name:  # what contradicts something else names both
        return str(detail["msg"]).removeprefix("Value error, ")
    field = Config.model_fields.get(name)
    if field is None:
        return f"{name} is no setting; there are {', '.join(Config.model_fields)}"
    reason = detail["msg"].removeprefix("Value error, ")
    return f"{name} is {detail['input']!r:.80}: {reason[:1].lower()}{reason[1:]}. {field.description}"
