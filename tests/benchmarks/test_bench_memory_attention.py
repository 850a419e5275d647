"""The memory attention benchmark on the tiny preset."""

from __future__ import annotations

import json

import pytest

from benchmarks.bench_memory_attention import MEMORIES, build, main, print_table
from sam3.model.tracker_config import MemoryConfig, TrackerConfig


def test_wrong_arguments_end_with_2():
    for argv in (["--frames", "0"], ["--pointers", "-1"], ["--preset", "huge"], ["--memory", "dense"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


def test_what_is_compared_at_full_size():
    """The weights and tokens of the tracker: 5184 a frame become 1296, 512 or 320."""
    found = {}
    for name in MEMORIES:
        attention, perceiver = build(name, TrackerConfig(), MemoryConfig())
        weights = [sum(p.numel() for p in m.parameters()) for m in (attention, perceiver) if m is not None]
        found[name] = (*weights, getattr(attention, "tokens_per_frame", attention.grid**2))
    assert found == {
        "dense": (5_922_304, 5184),
        "pooled": (2_961_408, 1296),
        "latents": (2_961_408, 3_315_520, 512),
        "pooled latents": (2_961_408, 3_315_520, 320),
    }


def test_ratios_of_the_table(capsys):
    same = {"weights": 1e6, "tokens_per_frame": 4, "tokens": 8, "device": "cpu"}
    dense = {**same, "call_ms": 90.0, "call_cpu_ms": 80.0, "compress_ms": 0.0, "call_gib": 0.5}
    ours = {**same, "call_ms": 20.0, "call_cpu_ms": 10.0, "compress_ms": 10.0, "call_gib": 0.25}
    args = {"preset": "tiny", "frames": 1, "pointers": 1, "dtype": "float32", "threads": 1, "repeats": 1}
    print_table(type("Args", (), args), {"dense": dense, "pooled": ours})
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == [
        "pooled",
        "1.00M",
        "4",
        "8",
        "20.0",
        "4.50",
        "10.0",
        "8.00",
        "10.0",
        "30.0",
        "3.00",
        "0.250",
        "2.00",
    ]


@pytest.mark.slow
def test_tiny_table(tmp_path, capsys):
    argv = ["--preset", "tiny", "--frames", "3", "--pointers", "2", "--repeats", "1", "--threads", "1"]
    assert main([*argv, "--device", "cpu", "--json", str(tmp_path / "f.json")]) == 0
    out = capsys.readouterr().out
    assert "3 frame(s) and 2 pointer(s)" in out and all(memory in out for memory in MEMORIES)
    memories = json.loads((tmp_path / "f.json").read_text())["memories"]
    assert {name: found["tokens"] for name, found in memories.items()} == {
        "dense": 3 * 256 + 8,
        "pooled": 3 * 64 + 8,
        "latents": 3 * 32 + 8,
        "pooled latents": 3 * 20 + 8,
    }
    assert all(found["call_ms"] > 0 and found["compress_ms"] > 0 for found in memories.values())
