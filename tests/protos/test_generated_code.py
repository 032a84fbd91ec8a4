from pathlib import Path

import pytest

from protos import generate


def test_the_committed_code_is_what_the_proto_files_give():
    assert generate.stale() == []


def test_a_file_that_was_altered_or_is_left_over_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    room = tmp_path / "protos"
    room.mkdir()
    (room / "toy.proto").write_text('syntax = "proto3";\npackage toy;\nmessage Toy { int32 size = 1; }\n')
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    (room / "toy_pb2.py").write_text("")
    (room / "gone_pb2.pyi").write_text("")
    assert generate.main(["--check"]) == 1
    assert "not current: protos/gone_pb2.pyi, protos/toy_pb2.py; run" in capsys.readouterr().err


def test_a_proto_file_with_a_fault_is_an_error_and_not_a_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "protos").mkdir()
    (tmp_path / "protos" / "toy.proto").write_text("nonsense")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    with pytest.raises(generate.BrokenInvariant, match="protoc ended with status"):
        generate.generate(tmp_path)
