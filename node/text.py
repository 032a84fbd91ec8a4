"""A model's words: prompts to token ids, token ids to text as they come, and where a stop string ends it.
Law: what is emitted is never taken back; all emitted text together is the decoded answer, however it was cut.

tokenizer.json is the law where there is one, with the special tokens that tokenizer_config.json names, as transformers'
generic class reads them; other formats go through transformers' AutoTokenizer, which costs seconds and 200 MiB.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from protos.errors import InvalidRequest, UnsupportedModel
from protos.limits import STOP_STRING_CHARS_MAX, STOP_STRINGS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jinja2.parser import Parser

SLOW_TOKENIZERS: Final = ("tokenizer.model", "spiece.model", "tiktoken.model", "tekken.json", "vocab.json", "vocab.txt")
"""Files that hold a vocabulary in other formats than tokenizer.json."""

NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""transformers' SPECIAL_TOKENS_ATTRIBUTES: special, and known to chat templates by these names."""

EXTRA_TOKENS: Final = ("extra_special_tokens", "additional_special_tokens")
"""Further special tokens, a list or named ones, under transformers' new name and the old one."""

SAMPLING_DEFAULTS: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What of generation_config.json the sampler knows."""

GENERATE_TOP_K: Final = 50
"""What transformers' generate samples from where nothing says top_k (_get_default_generation_params)."""

WINDOW_TOKENS_MAX: Final = 32
"""Tokens decoded anew for each one that comes; beyond it the oldest are forgotten."""

WINDOW_TOKENS_KEPT: Final = 8
"""After forgetting; a character has at most four, the rest is context for decoders that treat the first token apart."""

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Text:
    """The `text` unit, ready for use. files: name -> content of config, generation config, tokenizer, chat template.

    Raises UnsupportedModel when a file cannot be read. What needs a tokenizer raises InvalidRequest if there is none.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._config = _tokenizer_config(files)
        self._tokenizer = _tokenizer(files, self._config)
        self._special = _special(self._tokenizer) if self._tokenizer else frozenset()
        self._template = _compiled(_template(files, self._config))
        self.eos_ids: tuple[int, ...] = _eos_ids(files)
        """End the answer: of generation_config.json, or of config.json where there is none."""
        self.defaults: dict[str, float] = _defaults(files)
        """Fields of SamplingParams that `generate` would take unasked; temperature is 0 without `do_sample`."""

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        """Without a tokenizer a template is of no use."""
        return self._tokenizer is not None and self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself."""
        return self._encode(text, add_special_tokens=True)

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation of (role, content), up to where the assistant's next words begin."""
        self._need()
        if self._template is None:
            raise InvalidRequest("this model has no chat template; send a plain prompt")
        if not messages:
            raise InvalidRequest("the chat has no messages; send at least one")
        return self._encode(self._rendered(self._template, messages), add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens; ids beyond the vocabulary have none."""
        return self._need().decode(list(tokens), skip_special_tokens=True)

    def detokenizer(self) -> Detokenizer:
        """For one answer."""
        return Detokenizer(self._need(), self._special)

    def _need(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequest("this model has no tokenizer; use --token-ids")
        return self._tokenizer

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        tokenizer = self._need()
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text is not valid Unicode at character {error.start}; send it without"
            ) from error
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _rendered(self, template: jinja2.Template, messages: Sequence[tuple[str, str]]) -> str:
        named = {name: _content(token) for name, token in _named_tokens(self._config).items()}
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return template.render(messages=turns, tools=None, documents=None, add_generation_prompt=True, **named)
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error


class Detokenizer:
    """Text of tokens as they come, for one answer: `push` each, then `flush` once.

    Held back is what later tokens could change: the last character while it may be half of one, and a run of byte
    tokens (`<0xE2>`) until it ends, since one wrong byte turns all of the run into replacement characters. Decoders
    that are not known to work from left to right hold all until `flush`. (tokenizers' own DecodeStream has no flush,
    and raises where bytes that made a character turn out wrong.)
    """

    __slots__ = ("_byte_fallback", "_emitted", "_in_order", "_special", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        steps = _decoder_steps(tokenizer)
        self._in_order = all(_works_in_order(step) for step in steps)
        self._byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
        self._window: list[int] = []
        self._emitted = 0

    def push(self, token: int) -> str:
        """What is now sure, possibly nothing."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self._special:
            return ""
        self._window.append(token)
        if not self._in_order or (self._byte_fallback and BYTE_TOKEN.fullmatch(piece)):
            return ""
        text = self._decoded()
        sure = text.removesuffix(REPLACEMENT)
        emitted = sure[self._emitted :]
        self._emitted += len(emitted)
        self._forget(text)
        return emitted

    def flush(self) -> str:
        """The rest; an unfinished character becomes U+FFFD, as in the whole answer decoded at once."""
        rest = self._decoded()[self._emitted :]
        self._window.clear()
        self._emitted = 0
        return rest

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)

    def _forget(self, text: str) -> None:
        """Keeps the last tokens only. That they may begin inside a character does not change how their text goes on."""
        if len(self._window) >= WINDOW_TOKENS_MAX:
            held_back = len(text) - self._emitted
            del self._window[:-WINDOW_TOKENS_KEPT]
            self._emitted = len(self._decoded()) - held_back


class StopStrings:
    """Ends the text before the stop string that is complete first; of several that end together, the longest.

    Raises InvalidRequest on an empty string and beyond STOP_STRINGS_MAX or STOP_STRING_CHARS_MAX.
    """

    __slots__ = ("_held", "_stopped", "_stops")

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self._stopped = False
        if len(self._stops) > STOP_STRINGS_MAX:
            raise InvalidRequest(f"stop: {len(self._stops)} strings; at most {STOP_STRINGS_MAX} are allowed")
        for stop in self._stops:
            if not 1 <= len(stop) <= STOP_STRING_CHARS_MAX:
                raise InvalidRequest(
                    f"stop: a string has {len(stop)} characters; allowed are 1 to {STOP_STRING_CHARS_MAX}"
                )

    def push(self, text: str) -> tuple[str, bool]:
        """(what can be emitted, whether a stop string was found). The possible beginning of one is held back."""
        if self._stopped:
            return "", True
        text = self._held + text
        starts = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self._stopped, self._held = True, ""
            return text[: min(starts)[1]], True
        cut = min((_possible_start(text, stop) for stop in self._stops), default=len(text))
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back, when the answer has ended otherwise."""
        rest, self._held = self._held, ""
        return rest


def _possible_start(text: str, stop: str) -> int:
    """Where the longest end of the text begins that could become the stop string; len(text) if none could."""
    first = max(0, len(text) - len(stop) + 1)
    return next((start for start in range(first, len(text)) if stop.startswith(text[start:])), len(text))


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Empty if there is no such file."""
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except ValueError as error:
        raise UnsupportedModel(f"{name} is not JSON: {error}; fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{name} is not a JSON object; fetch the checkpoint again")
    return content


def _tokenizer_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Older checkpoints name special tokens in a file of their own, which counts unless the config lists its tokens."""
    config = _json(files, "tokenizer_config.json")
    return config if "added_tokens_decoder" in config else config | _json(files, "special_tokens_map.json")


def _tokenizer(files: Mapping[str, bytes], config: dict[str, Any]) -> Tokenizer | None:
    if "tokenizer.json" in files:
        try:
            tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
            _add_special_tokens(tokenizer, config)
        except Exception as error:  # tokenizers raises bare Exception
            raise UnsupportedModel(f"tokenizer.json cannot be read: {error}; fetch the checkpoint again") from error
    elif any(name in files for name in SLOW_TOKENIZERS):
        tokenizer = _converted(files)
    else:
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """As TokenizersBackend.__init__ of transformers 5.23: listed tokens by id, then special ones that are new."""
    old = tokenizer.get_added_tokens_decoder().values()
    listed = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    added = [token for token in (AddedToken(**fields) for _, fields in listed) if repr(token) not in map(repr, old)]
    known = {token.content for token in (*old, *added)}
    special = [*_named_tokens(config).values(), *_extra_tokens(config)]
    tokenizer.add_tokens(added + [_special_token(token) for token in special if _content(token) not in known])


def _named_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """Name -> a string, or an object with `content`: what templates know by name. Models may have their own."""
    own = [name for name in config if name.endswith("_token") and name not in NAMED_TOKENS]
    named = {name: config[name] for name in (*NAMED_TOKENS, *own) if isinstance(config.get(name), str | dict)}
    return named | (extra if isinstance(extra := _extra(config), dict) else {})


def _extra_tokens(config: dict[str, Any]) -> list[Any]:
    return extra if isinstance(extra := _extra(config), list) else []


def _extra(config: dict[str, Any]) -> Any:
    return next((config[name] for name in EXTRA_TOKENS if config.get(name)), None)


def _special_token(token: str | dict[str, Any]) -> AddedToken:
    fields = {"content": token} if isinstance(token, str) else token
    return AddedToken(**{name: value for name, value in fields.items() if name != "__type"} | {"special": True})


def _special(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that leave no text, asked of the decoder itself."""
    return frozenset(
        token
        for token in tokenizer.get_added_tokens_decoder()
        if tokenizer.decode([token], skip_special_tokens=False) and not tokenizer.decode([token])
    )


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _converted(files: Mapping[str, bytes]) -> Tokenizer:
    from transformers import AutoTokenizer  # seconds, 200 MiB: only for checkpoints that need it

    with TemporaryDirectory(prefix="shoal-tokenizer-") as folder:
        for name, content in files.items():
            if Path(name).name == name:
                Path(folder, name).write_bytes(content)
        try:
            converted: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
        except (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModel(
                f"transformers cannot convert this tokenizer: {error}; save it as tokenizer.json and pack again"
            ) from error
    return converted


def _template(files: Mapping[str, bytes], config: dict[str, Any]) -> str | None:
    """The file of its own counts before the config's entry, which may be a list of named ones."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode(errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _compiled(template: str | None) -> jinja2.Template | None:
    if template is None:
        return None
    try:
        return _environment().from_string(template)
    except jinja2.TemplateError as error:
        raise UnsupportedModel(f"the chat template cannot be read: {error}; fetch the checkpoint again") from error


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers 5.23 builds it (utils/chat_template_utils.py): a template is code from strangers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it only renders what it holds."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """`dict` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` that stores no underscored names: those lead to the interpreter's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no name for self, so that namespace(self=...) works
        jinja2.utils.Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _refuse_underscore(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's own it leaves HTML characters alone."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _generation(files: Mapping[str, bytes]) -> tuple[str, dict[str, Any]]:
    """As from_pretrained: of config.json where a checkpoint has no generation_config.json."""
    name = "generation_config.json" if "generation_config.json" in files else "config.json"
    return name, _json(files, name)


def _eos_ids(files: Mapping[str, bytes]) -> tuple[int, ...]:
    name, config = _generation(files)
    found = config.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise UnsupportedModel(f"{name}: eos_token_id is {found!r}; it must be a token id or a list of them")
    return tuple(dict.fromkeys(ids))


def _defaults(files: Mapping[str, bytes]) -> dict[str, float]:
    name, config = _generation(files)
    found = {field: config[field] for field in SAMPLING_DEFAULTS if config.get(field) is not None}
    for field, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnsupportedModel(f"{name}: {field} is {value!r}; it must be a number")
    if not config.get("do_sample"):
        return found | {"temperature": 0.0}
    return {"temperature": 1.0, "top_k": GENERATE_TOP_K} | found


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _works_in_order(step: dict[str, Any]) -> bool:
    """Whether more tokens can only add text at the end, byte tokens and halves of characters apart."""
    match step:
        case {"type": "ByteLevel" | "ByteFallback" | "Fuse" | "Metaspace"}:
            return True
        case {"type": "Strip", "stop": 0}:
            return True
        case {"type": "Replace", "pattern": {"String": pattern}}:
            return len(pattern) == 1
    return False
