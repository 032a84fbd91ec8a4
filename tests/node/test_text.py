"""Words in and out against transformers' tokenizer, and streams against the whole answer decoded at once.
Law: every tokenizer here is made here; nothing is fetched."""

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig

from node.text import REPLACEMENT, WINDOW_TOKENS_MAX, StopStrings, Text
from protos.errors import InvalidRequest, UnsupportedModel
from protos.limits import STOP_STRING_CHARS_MAX, STOP_STRINGS_MAX

SENTENCES = [
    "The shoal turns as one, and no fish leads it for long.",
    "Der Schwarm dreht sich; kein Fisch führt ihn für länger als 10 Sekunden.",
    "群れは一つのように向きを変える。 Стая поворачивает как одна. 🐟🐠🐡 e\u0301",
    "def turn(fish: int) -> None:\n    return None  # 12345\n",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a fish.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [("user", "Who leads the shoal? <&>"), ("assistant", 'No "one" 🐟.'), ("user", "Für wie lange?")]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama's and Mixtral's: words with ▁, bytes for what is not in the vocabulary, one leading space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ abcdefgé群", "▁a", "bc", "▁▁"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("b", "c"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def words(decoder: decoders.Decoder | None, pieces: list[str]) -> Tokenizer:
    vocab = {piece: index for index, piece in enumerate(["[UNK]", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


def metaspace() -> Tokenizer:
    return words(decoders.Metaspace(), ["▁a", "b", "▁", "▁▁", "群", "c▁"])


def suffixed() -> Tokenizer:
    """Its decoder looks ahead: a word's suffix becomes a space unless it is the last."""
    return words(decoders.BPEDecoder("</w>"), ["fish</w>", "tur", "n</w>", "群"])


def undecoded() -> Tokenizer:
    return words(None, ["fish", "turn", "群"])


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make for make in (byte_level, byte_fallback, metaspace, suffixed, undecoded)
}


def files_of(tokenizer: Tokenizer | None = None, **contents: Any) -> dict[str, bytes]:
    """Files named by their stem: JSON, or text where the value is a string."""
    files = {"config.json": b"{}"} if tokenizer is None else {"tokenizer.json": tokenizer.to_str().encode()}
    for stem, content in contents.items():
        if isinstance(content, str):
            files[f"{stem}.jinja"] = content.encode()
        else:
            files[f"{stem}.json"] = json.dumps(content).encode()
    return files


def oracle(files: dict[str, bytes], folder: Path) -> Any:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": {
        "__type": "AddedToken",
        "content": "<|pad|>",
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
    },
    "clean_up_tokenization_spaces": False,
}
TEXTS = [*SENTENCES, "", " ", "a <|im_end|> b<tool>c<|pad|>", "\n\n  x", "🐟" * 3, "nul\0 \ufffd"]


TOKENIZER = {name: make() for name, make in TOKENIZERS.items()}
TEXT = {name: Text(files_of(tokenizer)) for name, tokenizer in TOKENIZER.items()}

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_CHARS = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(256 + index) for index, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)
}
"""GPT-2's alphabet of bytes."""

# --- encoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"extra_special_tokens": ["<tool>"]},
        {"additional_special_tokens": ["<new>"]},
        {"extra_special_tokens": {"image_token": "<new>"}},
        {"own_token": "<new>", "add_bos_token": True},
    ],
)
def test_ids_and_text_are_those_of_transformers(extra: dict[str, Any], tmp_path: Path) -> None:
    files = files_of(byte_level(), tokenizer_config=CONFIG | extra)
    text, theirs = Text(files), oracle(files, tmp_path)
    for prompt in [*TEXTS, "x<new>y"]:
        ids = text.encode(prompt)
        assert ids == theirs(prompt)["input_ids"]
        assert text.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_listed_tokens_are_added_as_transformers_adds_them(tmp_path: Path) -> None:
    size = byte_level().get_vocab_size()
    listed = {
        str(size + 1): {"content": "<late>", "special": True},
        str(size): {"content": "<early>", "special": False, "normalized": True},
        "1": {"content": "<|im_start|>", "special": True, "lstrip": True},
    }
    files = files_of(byte_level(), tokenizer_config=CONFIG | {"added_tokens_decoder": listed})
    text, theirs = Text(files), oracle(files, tmp_path)
    for prompt in ("<late> <early>  <|im_start|> x<|pad|>", *TEXTS):
        assert text.encode(prompt) == theirs(prompt)["input_ids"]
        assert text.decode(text.encode(prompt)) == theirs.decode(theirs(prompt)["input_ids"], skip_special_tokens=True)


def test_an_older_checkpoint_names_its_special_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    special = {"eos_token": {"content": "<stop>", "lstrip": False, "rstrip": False}, "bos_token": "<|im_start|>"}
    files = files_of(byte_level(), tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"}) | files_of(
        special_tokens_map=special
    )
    text, theirs = Text(files), oracle(files, tmp_path)
    ids = text.encode("a<stop>b")
    assert ids == theirs("a<stop>b")["input_ids"]
    assert text.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "ab"


def test_a_prompt_gets_the_tokens_that_the_tokenizer_adds_and_a_chat_does_not() -> None:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    text = Text(files_of(tokenizer, tokenizer_config=CONFIG, chat_template="{{ messages[0].content }}"))
    assert text.encode("fish") == [0, *text.chat([("user", "fish")])]


def test_a_tokenizer_that_truncates_and_pads_does_neither_here() -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    assert Text(files_of(tokenizer)).encode(SENTENCES[0]) == byte_level().encode(SENTENCES[0]).ids


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode at character 2"):
        TEXT["byte_level"].encode("a \ud800")


def test_a_vocabulary_in_an_older_format_is_converted(tmp_path: Path) -> None:
    byte_level().model.save(str(tmp_path))
    files = {name: (tmp_path / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    files |= files_of(config={"model_type": "gpt2"}, tokenizer_config=names | {"tokenizer_class": "GPT2Tokenizer"})
    text, theirs = Text(files), oracle(files, tmp_path)
    for prompt in SENTENCES:
        assert text.encode(prompt) == theirs(prompt)["input_ids"]
        assert text.decode(text.encode(prompt)) == prompt


def test_without_a_tokenizer_only_token_ids_serve() -> None:
    text = Text(files_of(config={"eos_token_id": 2}, chat_template=CHATML))
    assert not text.has_tokenizer
    assert text.eos_ids == (2,)
    for use in (lambda: text.encode("x"), lambda: text.chat(CHAT), text.detokenizer, lambda: text.decode([1])):
        with pytest.raises(InvalidRequest, match="this model has no tokenizer; use --token-ids"):
            use()


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": b"{}"},
        {"tokenizer.json": b"\xff\xfe"},
        {"tokenizer_config.json": b"[]"},
        {"config.json": b"{"},
        {"generation_config.json": b"nonsense"},
        {"vocab.json": b"{}", "config.json": b'{"model_type": "gpt2"}'},
        {"tokenizer.model": b"garbage", "config.json": b'{"model_type": "mixtral"}'},
        {"chat_template.jinja": b"{% if %}"},
    ],
)
def test_a_file_that_cannot_be_read_is_named(files: dict[str, bytes]) -> None:
    with pytest.raises(UnsupportedModel, match=r"tokenizer|json|template"):
        Text(files)


def test_words_need_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    program = (
        "import sys; from pathlib import Path; from node.text import Text;"
        f"text = Text({{'tokenizer.json': Path({str(tmp_path)!r}, 'tokenizer.json').read_bytes(),"
        "'chat_template.jinja': b'{{ messages[0].content }}'}); text.chat([('user', 'fish')]);"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- chat ---------------------------------------------------------------------------------------------------------

TEMPLATES = {
    "chatml": CHATML,
    "trimmed blocks": "\n  {% for m in messages %}\n    {{ m.role }}: {{ m.content | trim }}\n  {% endfor %}\n",
    "tojson": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "named tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ own_token }}|",
    "loop controls": "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m.content }}"
    "{% break %}{% endfor %}",
    "generation marks": "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ m.content }}"
    "{% endgeneration %}{% endfor %}{{ x }}",
    "namespace": "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ ns.self }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['b'], 2) }}{{ messages[0].get('name', 'nobody') }}",
    "absent": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ other is defined }}",
    "date": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_chat_becomes_the_ids_that_transformers_makes_of_it(template: str, tmp_path: Path) -> None:
    files = files_of(byte_level(), tokenizer_config=CONFIG | {"own_token": "<own>"}, chat_template=template)
    messages = [{"role": role, "content": content} for role, content in CHAT]
    theirs = oracle(files, tmp_path).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert Text(files).chat(CHAT) == theirs


@pytest.mark.parametrize(
    "template", ["{{ 'plain' }}", [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]]
)
@pytest.mark.parametrize("file", [{}, {"chat_template": "{{ 'from the file' }}"}])
def test_the_template_is_found_where_transformers_finds_it(template: Any, file: dict[str, str], tmp_path: Path) -> None:
    files = files_of(byte_level(), tokenizer_config=CONFIG | {"chat_template": template}, **file)
    messages = [{"role": "user", "content": "x"}]
    theirs = oracle(files, tmp_path).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert Text(files).chat([("user", "x")]) == theirs


def test_the_year_in_a_template_is_this_year() -> None:
    text = Text(files_of(byte_level(), chat_template=TEMPLATES["date"]))
    years = {datetime.now().year, datetime.now().year}
    assert int(text.decode(text.chat(CHAT))) in years


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(_Namespace__attrs=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ dict.__init__.__globals__ }}",
        "{{ range(10000000) }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_of_its_sandbox_is_a_refusal(template: str) -> None:
    text = Text(files_of(byte_level(), chat_template=template))
    with pytest.raises(InvalidRequest, match=r"the model's chat template refuses these messages: ."):
        text.chat([("user", "x")])


def test_a_chat_without_messages_or_template_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no messages"):
        Text(files_of(byte_level(), chat_template=CHATML)).chat([])
    with pytest.raises(InvalidRequest, match="no chat template"):
        Text(files_of(byte_level())).chat(CHAT)
    named = {"chat_template": [{"name": "tool_use", "template": "x"}]}
    with pytest.raises(InvalidRequest, match="no chat template"):
        Text(files_of(byte_level(), tokenizer_config=named)).chat(CHAT)


# --- what ends an answer, and the defaults ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "contents",
    [
        {"generation_config": {"eos_token_id": 7}, "config": {"eos_token_id": 9}},
        {"generation_config": {"eos_token_id": [7, 8, 7]}},
        {"generation_config": {"do_sample": True}, "config": {"eos_token_id": 9}},
        {"config": {"eos_token_id": 9}},
        {"config": {"eos_token_id": None}},
    ],
)
def test_the_end_tokens_are_those_at_which_generate_stops(contents: dict[str, Any], tmp_path: Path) -> None:
    for stem, content in contents.items():
        (tmp_path / f"{stem}.json").write_text(json.dumps(content))
    name = "generation_config.json" if "generation_config" in contents else "config.json"
    theirs = GenerationConfig.from_pretrained(tmp_path, config_file_name=name).eos_token_id
    expected = set() if theirs is None else {theirs} if isinstance(theirs, int) else set(theirs)
    text = Text(files_of(**contents))
    assert set(text.eos_ids) == expected
    assert len(text.eos_ids) == len(expected)


def test_sampling_defaults_are_what_the_generation_config_sets() -> None:
    given = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": None, "max_length": 99}
    assert Text(files_of(generation_config=given)).defaults == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert Text(files_of(generation_config={"do_sample": True})).defaults == {"temperature": 1.0, "top_k": 50}
    assert Text(files_of(generation_config={"do_sample": True, "top_k": 0})).defaults["top_k"] == 0
    greedy = {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}
    assert Text(files_of(generation_config=greedy)).defaults == {"temperature": 0.0, "repetition_penalty": 1.1}
    assert Text(files_of()).defaults == {"temperature": 0.0}
    assert Text(files_of(config={"min_p": 0.2})).defaults == {"temperature": 0.0, "min_p": 0.2}


@pytest.mark.parametrize(
    "config", [{"top_k": "many"}, {"temperature": True}, {"eos_token_id": "</s>"}, {"eos_token_id": [-1]}]
)
def test_a_generation_config_of_wrong_types_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=next(iter(config))):
        Text(files_of(generation_config=config))


# --- text as it comes ---------------------------------------------------------------------------------------------


def streamed(text: Text, ids: list[int]) -> list[str]:
    detokenizer = text.detokenizer()
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_all_emitted_text_is_the_whole_answer_decoded_at_once(name: str, data: st.DataObject) -> None:
    text = TEXT[name]
    size = TOKENIZER[name].get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=120))
    assert "".join(streamed(text, ids)) == text.decode(ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(max_examples=300, deadline=None)
@given(data=st.lists(st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xED, 0xA0, 0x41]), max_size=150))
def test_bytes_that_are_no_characters_come_out_as_in_the_whole_answer(name: str, data: list[int]) -> None:
    tokenizer = TOKENIZER[name]
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>" if name == "byte_fallback" else BYTE_CHARS[byte]) for byte in data]
    assert "".join(streamed(TEXT[name], ids)) == TEXT[name].decode(ids)


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(max_size=60))
def test_each_character_is_emitted_with_the_token_that_completes_it(prompt: str) -> None:
    text = TEXT["byte_level"]
    ids = text.encode(prompt)
    detokenizer, so_far = text.detokenizer(), ""
    for count, token in enumerate(ids, start=1):
        so_far += detokenizer.push(token)
        assert so_far == text.decode(ids[:count]).removesuffix(REPLACEMENT)


def test_half_of_an_emoji_is_held_back() -> None:
    ids = TOKENIZER["byte_fallback"].encode("a 🐟 b").ids
    assert len(ids) > 6
    assert [part for part in streamed(TEXT["byte_fallback"], ids) if part] == ["a", " ", "🐟 ", "b"]


def test_an_unfinished_character_at_the_end_is_flushed_as_a_replacement() -> None:
    detokenizer = TEXT["byte_level"].detokenizer()
    half = [TOKENIZER["byte_level"].token_to_id(BYTE_CHARS[byte]) for byte in "€".encode()[:2]]
    assert [detokenizer.push(token) for token in half] == ["", ""]
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "metaspace", "undecoded"])
def test_a_long_answer_is_not_decoded_again_and_again(name: str) -> None:
    """Only a run of byte tokens makes the window longer than its limit."""
    text, tokenizer = TEXT[name], TOKENIZER[name]
    ids = [token for token in tokenizer.encode("a bc 群 é 🐟 fish turn " * 200).ids if token]
    detokenizer, longest, emitted = text.detokenizer(), 0, ""
    for token in ids:
        emitted += detokenizer.push(token)
        longest = max(longest, len(detokenizer._window))
    assert longest <= 2 * WINDOW_TOKENS_MAX
    assert emitted + detokenizer.flush() == text.decode(ids)


def test_a_decoder_that_looks_ahead_streams_nothing_but_ends_right() -> None:
    parts = streamed(TEXT["suffixed"], [1, 2, 3, 1])
    assert parts == ["", "", "", "", "fish turn fish"]


# --- stop strings -------------------------------------------------------------------------------------------------


def stopped_naively(text: str, stops: list[str]) -> tuple[str, bool]:
    """The first end at which some stop string is complete, and of those the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


LETTERS = st.text(alphabet="abc", max_size=12)


@settings(max_examples=1000, deadline=None)
@given(
    chunks=st.lists(LETTERS, max_size=12), stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)
)
def test_stop_strings_cut_the_stream_where_a_search_of_the_whole_would(chunks: list[str], stops: list[str]) -> None:
    stream, emitted, stopped = StopStrings(stops), "", False
    for chunk in chunks:
        part, stopped = stream.push(chunk)
        emitted += part
        if stopped:
            break
    emitted += stream.flush()
    assert (emitted, stopped) == stopped_naively("".join(chunks), stops)


@settings(max_examples=300, deadline=None)
@given(text=LETTERS, stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4))
def test_only_the_beginning_of_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    stream = StopStrings(stops)
    emitted, stopped = stream.push(text)
    if not stopped:
        held = stream.flush()
        assert emitted + held == text
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(stop.startswith(text[i:]) for i in range(len(emitted)) for stop in stops)


def test_after_a_stop_string_nothing_more_comes() -> None:
    stream = StopStrings(["\n\n"])
    assert stream.push("one\n") == ("one", False)
    assert stream.push("\ntwo") == ("", True)
    assert stream.push("three") == ("", True)
    assert stream.flush() == ""


def test_stop_strings_have_limits() -> None:
    StopStrings(["x" * STOP_STRING_CHARS_MAX, *map(str, range(STOP_STRINGS_MAX - 1))])
    with pytest.raises(InvalidRequest, match="at most 16"):
        StopStrings(map(str, range(STOP_STRINGS_MAX + 1)))
    for bad in ("", "x" * (STOP_STRING_CHARS_MAX + 1)):
        with pytest.raises(InvalidRequest, match="1 to 256"):
            StopStrings([bad])
