"""A request that leaves all open is answered as transformers' generate answers unasked from the same checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from node import model, request
from node.config import Config
from protos import inference_pb2 as pb
from protos.errors import UnsupportedModel
from protos.ids import SessionId
from shard.batch import Step
from shard.pack import pack
from shard.stage import OpenSession
from shard.weights import UnitStore

if TYPE_CHECKING:
    from pathlib import Path

    from node.request import Ask

PROMPT = [5, 17, 9, 40, 9, 17]
NEW = 24


def checkpoint(folder: Path, **generation: Any) -> Path:
    tiny.save("mixtral", folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def reference(folder: Path) -> list[int]:
    oracle: Any = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm")
    ids = torch.tensor([PROMPT])
    output = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0)
    return output[0, len(PROMPT) :].tolist()


def served(folder: Path, store: Path) -> list[int]:
    pack(folder, UnitStore(store))
    loaded = model.load(Config(store=store), lambda what, done, total: None)
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=pb.Sampling(max_tokens=NEW))
    try:
        return answer(loaded, request.read(message, loaded.manifest, loaded.text))
    finally:
        loaded.worker.shutdown()


def answer(loaded: model.Model, ask: Ask) -> list[int]:
    session, log, start = SessionId("one"), list(ask.prompt), 0
    opened = OpenSession(session, 0, ask.prompt, len(ask.prompt), ask.params, len(ask.prompt) + NEW)
    loaded.worker.open(opened).result()
    while len(log) < len(ask.prompt) + NEW and log[-1] not in (ask.params.stop_tokens if start else ()):
        token = loaded.worker.step(Step(session, 0, start, len(log), tuple(log[start:]))).result().token
        assert token is not None
        start = len(log)
        log.append(token)
    return log[len(ask.prompt) :]


def test_penalty_and_end_tokens_of_the_checkpoint_are_followed(tmp_path: Path) -> None:
    plain = reference(checkpoint(tmp_path / "plain"))
    endless = reference(checkpoint(tmp_path / "endless", repetition_penalty=1.3))
    assert endless != plain
    ends = [endless[11], endless[8], 2]
    folder = checkpoint(tmp_path / "whole", repetition_penalty=1.3, eos_token_id=ends, do_sample=False)
    expected = reference(folder)
    assert expected == endless[: len(expected)] and len(expected) < NEW
    assert served(folder, tmp_path / "store") == expected


def test_what_the_sampler_does_not_do_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint", suppress_tokens=[7])
    with pytest.raises(UnsupportedModel, match=r"generation_config.json sets suppress_tokens to \[7\]"):
        pack(folder, UnitStore(tmp_path / "store"))
    assert not (tmp_path / "store").exists()
