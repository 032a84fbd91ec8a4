"""A Hugging Face checkpoint folder: its configuration, its small files, and its tensors, read one at a time when asked.

Law: the folder is never changed, nothing in it is run, and no tensor is in memory that was not asked for.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, cast

from protos.errors import UnsupportedModel
from shard.quantised import block_scaled, microscaled, quantisation
from shard.stored import Stored, same
from shard.unit_file import DamagedFileError, read_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from shard.stored import Source
    from shard.unit_file import Placed

CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
SMALL_FILES: Final = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)
"""What the text unit takes, where the checkpoint has it."""

SMALL_FILE_BYTES_MAX: Final = 256 * 1024 * 1024
"""One small file; the largest published tokenizer.json has below 40 MB."""

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"


class Checkpoint:
    """One folder.  Raises UnsupportedModel, naming the file and what is wrong with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_json(folder / CONFIG)
        self.files = _weight_files(folder)
        self.quantised = quantisation(self.config)
        stored: dict[str, Stored] = {}
        for path in self.files:
            for name, placed in _header(path).items():
                if name in stored:
                    raise UnsupportedModel(f"{folder}: tensor {name} is in {stored[name].path.name} and in {path.name}")
                stored[name] = Stored(path, name, placed)
        _check_index(folder, stored)
        self.sources: dict[str, Source] = self._sources(stored)

    def _sources(self, stored: dict[str, Stored]) -> dict[str, Source]:
        if self.quantised == "fp8":
            return block_scaled(stored, self.config["quantization_config"])
        if self.quantised == "mxfp4":
            return microscaled(stored)
        return dict(stored)

    def small_files(self) -> dict[str, bytes]:
        """Configuration, tokenizer and chat template, by file name."""
        paths = [self.folder / name for name in SMALL_FILES]
        return {path.name: _read_small(path) for path in paths if path.is_file()}

    def same(self, one: str, other: str) -> bool:
        """True if two tensors lie in the files with the same bytes."""
        a, b = self.sources[one], self.sources[other]
        return isinstance(a, Stored) and isinstance(b, Stored) and same(a, b)


def _read_small(path: Path) -> bytes:
    if path.stat().st_size > SMALL_FILE_BYTES_MAX:
        raise UnsupportedModel(f"{path} has {path.stat().st_size} bytes; at most {SMALL_FILE_BYTES_MAX} are expected")
    return path.read_bytes()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UnsupportedModel(f"{path} does not exist: {path.parent} is no Hugging Face checkpoint folder")
    return parse_object(str(path), _read_small(path))


def parse_object(name: str, data: bytes) -> dict[str, Any]:
    """The JSON object in a file of that name.  Raises UnsupportedModel."""
    try:
        document = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{name} is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise UnsupportedModel(f"{name} must be a JSON object")
    return document


def _weight_map(folder: Path) -> dict[str, str]:
    names = _read_json(folder / INDEX).get("weight_map")
    plain = isinstance(names, dict) and all(
        isinstance(file, str) and file.endswith(".safetensors") and "/" not in file and "\\" not in file
        for file in names.values()
    )
    if not plain or not names:
        raise UnsupportedModel(f"{folder / INDEX}: weight_map must name .safetensors files of this folder")
    return cast("dict[str, str]", names)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that transformers would load: model.safetensors before an index."""
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if not (folder / INDEX).is_file():
        raise UnsupportedModel(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; other formats (such as .bin, which is a pickle) are never"
            " read: convert the checkpoint to safetensors"
        )
    paths = tuple(folder / name for name in sorted(set(_weight_map(folder).values())))
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UnsupportedModel(
            f"{folder}: {INDEX} names {missing[0]}, which is not there; download the checkpoint again"
        )
    return paths


def _check_index(folder: Path, stored: Mapping[str, Stored]) -> None:
    if (folder / WEIGHTS).is_file():
        return
    lost = sorted(name for name, file in _weight_map(folder).items() if name not in stored)
    if lost:
        raise UnsupportedModel(f"{folder}: {INDEX} names tensor {lost[0]}, which is in no file; download it again")


def _header(path: Path) -> dict[str, Placed]:
    try:
        return read_header(path)
    except DamagedFileError as error:
        raise UnsupportedModel(f"{path} is damaged: {error}; download it again") from error
