"""The checkpoints of examples/kill_and_resume.py, which people copy: a file that is not whole is never taken for one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).parent.parent / "examples" / "kill_and_resume.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("kill_and_resume", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def write(example: Any, directory: Path, steps: list[int]) -> None:
    for k in steps:
        example.save(directory / f"{k:08d}.pt", {"step": k, "x": torch.full((3,), float(k))})


def test_what_is_saved_is_loaded(example: Any, tmp_path: Path) -> None:
    write(example, tmp_path, [20, 40])
    assert sorted(x.name for x in tmp_path.iterdir()) == ["00000020.pt", "00000040.pt"]
    found = example.newest(tmp_path)
    assert found["step"] == 40
    assert found["x"].tolist() == [40.0] * 3


def test_a_torn_file_is_noticed_wherever_it_ends(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(example, tmp_path, [20, 40])
    path = tmp_path / "00000040.pt"
    whole = path.read_bytes()
    for size in range(0, len(whole), 17):
        path.write_bytes(whole[:size])
        assert example.newest(tmp_path)["step"] == 20
        assert "torn: 00000040.pt" in capsys.readouterr().out
    path.write_bytes(whole)
    assert example.newest(tmp_path)["step"] == 40


def test_a_flipped_bit_is_noticed(example: Any, tmp_path: Path) -> None:
    write(example, tmp_path, [20])
    path = tmp_path / "00000020.pt"
    whole = path.read_bytes()
    for at in range(0, len(whole), 41):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert example.newest(tmp_path) is None


def test_what_was_being_written_is_no_checkpoint(example: Any, tmp_path: Path) -> None:
    write(example, tmp_path, [20])
    (tmp_path / "00000040.part").write_bytes(b"half of")
    assert example.newest(tmp_path)["step"] == 20
    assert [x.name for x in example.checkpoints(tmp_path)] == ["00000020.pt"]


def test_a_resumed_run_is_the_uninterrupted_one(example: Any, tmp_path: Path) -> None:
    """In one process; that other processes find the same, however they end, is what the example itself shows."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    expected = example.train(60, first, lambda step: None)
    told: list[int] = []
    example.train(25, second, told.append)  # an end that is no multiple of what is between two checkpoints
    found = example.train(60, second, told.append)
    assert told == [*range(26), *range(25, 61)]
    assert example.differences(expected, found) == []
    assert len(example.checkpoints(second)) == 2
    found["optimizer"]["state"][0]["momentum_buffer"][0, 0] += 1
    assert example.differences(expected, found) == ["/optimizer/state/0/momentum_buffer"]
