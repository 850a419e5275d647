"""Time and memory of one call of the memory attention: SAM3's dense memory against compressed ones.

    python benchmarks/bench_memory_attention.py                     # full size, about 2 GB
    python benchmarks/bench_memory_attention.py --preset tiny

A call conditions one object of one frame on `--frames` memory frames and `--pointers` object pointers: all layers,
forward only, random weights and tokens, in eval mode. Memories:

    dense           SAM3's: 4 layers, every token of a frame's map (5184 at the full size)
    pooled          2 layers, the map averaged in squares of 2 x 2 (1296)
    latents         2 layers, global and 2-D latents of the Perceiver (256 + 256)
    pooled latents  2 layers, the same with the 2-D latents averaged (256 + 64): what stage 2 trains

`compress ms` is what turns the map of one frame into its tokens, once when it is stored; `with it` counts one such
beside the call, as tracking a frame does. `CPU ms` is processor time, which other programs disturb less. `x` = dense /
this, above 1 is better. Each memory is measured in a process of its own; `call GiB` is what the process (on CUDA: its
tensors) grew by in the first call, beyond weights and inputs.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import device_name, fastest, measure_apart
from sam3.engine.cli import make_parser, run_main
from sam3.engine.distributed import choose_device
from sam3.engine.files import write_json
from sam3.engine.meters import max_memory_gib
from sam3.model.efficient_memory_attention import EfficientMemoryAttention, TokenGroup
from sam3.model.memory_attention import MemoryAttention
from sam3.model.perceiver import EfficientSpatialPerceiver
from sam3.model.tracker_config import TINY_MEMORY, TRACKER_PRESETS, MemoryConfig, TrackerConfig

MEMORIES = ("dense", "pooled", "latents", "pooled latents")
DTYPES = ("float32", "bfloat16", "float16")
OPTIONS = ("preset", "frames", "pointers", "dtype", "repeats", "threads", "device")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=TRACKER_PRESETS, default="full", help="size of the tracker")
    parser.add_argument("--frames", type=int, default=7, help="memory frames")
    parser.add_argument("--pointers", type=int, default=16, help="object pointers, of several memory tokens each")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and tokens")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--memory", choices=MEMORIES, help="measure one memory only (used for the processes)")
    parser.add_argument("--result", type=Path, help="where --memory puts its figures")
    args = parser.parse_args(argv)
    for name in ("frames", "repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.pointers < 0:
        parser.error("--pointers must be at least 0")
    if args.memory:
        if args.result is None:
            parser.error("--memory needs --result")
        torch.set_num_threads(args.threads)
        torch.save(measure(args), args.result)
        return 0
    results = {name: measure_apart(__file__, name, ["--memory", name], args, OPTIONS) for name in MEMORIES}
    print_table(args, results)
    if args.json:
        options = {name: getattr(args, name) for name in OPTIONS}
        write_json(args.json, {**options, "torch": torch.__version__, "memories": results})
    return 0


def print_table(args: Namespace, results: dict[str, dict[str, Any]]) -> None:
    dense = results["dense"]
    print(
        f"preset {args.preset}, {args.frames} frame(s) and {args.pointers} pointer(s), one object, {args.dtype}, "
        f"{dense['device']}, {args.threads} threads, torch {torch.__version__}, fastest of {args.repeats}; "
        "x = dense / this, above 1 is better"
    )
    head = f"{'memory':<16}{'weights':>9}{'a frame':>9}{'tokens':>8}{'call ms':>11}{'x':>7}{'CPU ms':>11}{'x':>7}"
    print(head + f"{'compress ms':>13}{'with it ms':>12}{'x':>7}{'call GiB':>10}{'x':>7}")
    for memory, found in results.items():
        together, dense_together = (side["call_ms"] + side["compress_ms"] for side in (found, dense))
        print(
            f"{memory:<16}{found['weights'] / 1e6:>8.2f}M{found['tokens_per_frame']:>9}{found['tokens']:>8}"
            f"{found['call_ms']:>11.1f}{dense['call_ms'] / found['call_ms']:>7.2f}"
            f"{found['call_cpu_ms']:>11.1f}{dense['call_cpu_ms'] / max(found['call_cpu_ms'], 1e-9):>7.2f}"
            f"{found['compress_ms']:>13.1f}{together:>12.1f}{dense_together / together:>7.2f}"
            f"{found['call_gib']:>10.3f}{dense['call_gib'] / max(found['call_gib'], 1e-9):>7.2f}"
        )


@torch.inference_mode()
def measure(args: Namespace) -> dict[str, Any]:
    """Figures of one memory: `call_ms`, `call_cpu_ms`, `compress_ms`, `call_gib`, `weights` and numbers of tokens."""
    config, device, dtype = TrackerConfig.preset(args.preset), choose_device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    attention, perceiver = build(args.memory, config, TINY_MEMORY if args.preset == "tiny" else MemoryConfig())
    modules = [module.to(device, dtype).eval() for module in (attention, perceiver) if module is not None]
    efficient = isinstance(attention, EfficientMemoryAttention)
    tokens_per_frame = attention.tokens_per_frame if efficient else config.grid**2
    pointer_tokens = args.pointers * (config.dim // config.mem_dim)
    tokens = args.frames * tokens_per_frame + pointer_tokens

    def noise(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    given = [
        noise(1, config.grid**2, config.dim),
        noise(config.grid**2, config.dim),
        noise(1, tokens, config.mem_dim, dtype=torch.bfloat16),  # as the bank keeps them
        noise(1, tokens, config.mem_dim),
        *((args.frames, pointer_tokens) if efficient else (pointer_tokens,)),
    ]
    memory_map = noise(1, config.mem_dim, config.grid, config.grid)

    def compress() -> Tensor:
        frame = memory_map.flatten(2).transpose(1, 2) if perceiver is None else perceiver(memory_map)[0]
        return (attention.pool(frame) if efficient else frame).bfloat16()

    held = torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else max_memory_gib(device)
    attention(*given)  # also warms up
    call_gib = max_memory_gib(device) - held
    call_s, call_cpu_s = fastest(lambda: attention(*given), args.repeats, device)
    return {
        "call_ms": 1000 * call_s,
        "call_cpu_ms": 1000 * call_cpu_s,
        "compress_ms": 1000 * fastest(compress, args.repeats + 1, device)[0],
        "call_gib": call_gib,
        "weights": sum(parameter.numel() for module in modules for parameter in module.parameters()),
        "tokens_per_frame": tokens_per_frame,
        "tokens": tokens,
        "device": device_name(device),
    }


def build(
    name: str, config: TrackerConfig, memory: MemoryConfig
) -> tuple[MemoryAttention, EfficientSpatialPerceiver | None]:
    """Attention and compressor of one of `MEMORIES`, with random weights."""
    sizes = {"dim": config.dim, "mem_dim": config.mem_dim, "grid": config.grid}
    if name == "dense":
        attention = MemoryAttention(**sizes, ffn_dim=config.attention_ffn_dim, num_layers=config.attention_layers)
        return attention, None
    perceiver = None
    if "latents" in name:
        perceiver = EfficientSpatialPerceiver(
            mem_dim=config.mem_dim,
            dim=memory.perceiver_dim,
            depth=memory.perceiver_depth,
            heads=memory.perceiver_heads,
            dim_head=memory.perceiver_dim_head,
            num_latents=memory.num_latents,
            num_latents_2d=memory.num_latents_2d,
        )
    attention = EfficientMemoryAttention(
        **sizes,
        ffn_dim=memory.ffn_dim,
        num_layers=memory.num_layers,
        layout=perceiver.layout if perceiver else (TokenGroup(config.grid**2, config.grid),),
        pool_size=memory.pool_size if "pooled" in name else 1,
    )
    return attention, perceiver


if __name__ == "__main__":
    run_main(main)
