"""What training needs of the students: gradients everywhere, recomputation, data parallel, compilation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sam3.backbones.student import BACKBONES, StudentEncoder
from tests.backbones.samples import filled, pictures

ONE_OF_EACH_FAMILY = ["efficientvit_b0", "repvit_m0_9", "tiny_vit_5m"]


def fast_only(fast: list[str]) -> list:
    """All students, those that are not in `fast` marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES]


def backward(student: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    weights = torch.linspace(-1, 1, 8)[:, None, None]  # a plain mean would be blind behind a norm
    student.zero_grad()
    (student(x) * weights).mean().backward()
    return {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("name", fast_only(ONE_OF_EACH_FAMILY))
def test_gradient_reaches_every_parameter(name: str) -> None:
    """In eval mode, since batch statistics cancel the biases in front of a norm."""
    gradients = backward(filled(name, embed_dim=8, embed_size=4, drop_path=0.0), pictures(2, 64))
    assert [k for k, g in gradients.items() if g is None or not torch.isfinite(g).all() or not g.any()] == []
    again = filled(name, embed_dim=8, embed_size=4, drop_path=0.0)
    for _ in range(2):  # nothing of the first graph may be left over in eval mode
        repeated = backward(again, pictures(2, 64))
    assert all(torch.equal(repeated[k], g) for k, g in gradients.items())


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_recomputation_changes_neither_gradients_nor_statistics(name: str) -> None:
    plain = filled(name, embed_dim=8, embed_size=4).train()
    recomputed = copy.deepcopy(plain)
    recomputed.set_grad_checkpointing(True)
    saved = {False: 0, True: 0}
    gradients = {}
    for student in (plain, recomputed):
        checkpointing = student.backbone.model.grad_checkpointing

        def count(tensor: Tensor, checkpointing: bool = checkpointing) -> Tensor:
            saved[checkpointing] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            gradients[checkpointing] = backward(student, pictures(2))
    for key, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][key], gradient, msg=key)
    for (key, ours), theirs in zip(recomputed.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    assert plain.head[1].num_batches_tracked == 1
    assert saved[True] < saved[False] / 2  # counts what the blocks keep
    recomputed.set_grad_checkpointing(False)
    assert not recomputed.backbone.model.grad_checkpointing


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_a_recomputed_graph_may_go_backward_twice(name: str) -> None:
    student = filled(name, embed_dim=8, embed_size=4).train()
    student.set_grad_checkpointing(True)
    loss = student(pictures(2)).square().mean()
    for _ in range(2):
        student.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        gradients = [parameter.grad for parameter in student.parameters()]
        assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assert student.head[1].num_batches_tracked == 1


@pytest.fixture
def one_process_group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
@pytest.mark.usefixtures("one_process_group")
def test_data_parallel_steps(name: str, recompute: bool) -> None:
    """DDP without `find_unused_parameters` fails in the second step if a parameter gets no gradient."""
    student = filled(name, embed_dim=8, embed_size=4).train()
    student.set_grad_checkpointing(recompute)
    alone = copy.deepcopy(student)
    parallel = DistributedDataParallel(student)
    for _ in range(2):
        gradients = backward(parallel, pictures(2, 64))
        wanted = backward(alone, pictures(2, 64))
        for key, gradient in wanted.items():
            torch.testing.assert_close(gradients[f"module.{key}"], gradient, msg=key)
    assert list(parallel.module.state_dict()) == list(alone.state_dict())


@pytest.mark.parametrize("name", fast_only(["efficientvit_b0"]))
def test_traced_into_one_graph(name: str) -> None:
    """`torch.compile` without a compiler behind it: the whole forward pass is one graph."""
    torch._dynamo.reset()  # students traced before count towards the limit of recompilations
    student = filled(name, embed_dim=8, embed_size=4)
    with torch.inference_mode():
        torch.testing.assert_close(
            torch.compile(student, backend="eager", fullgraph=True)(pictures()), student(pictures())
        )


@pytest.mark.parametrize("name", ["efficientvit_b0"])
def test_recomputation_under_compile(name: str) -> None:
    student = filled(name, embed_dim=8, embed_size=4).train()
    wanted = backward(copy.deepcopy(student), pictures(2, 64))
    student.set_grad_checkpointing(True)
    compiled = backward(torch.compile(student, backend="eager"), pictures(2, 64))
    for key, gradient in wanted.items():
        torch.testing.assert_close(compiled[f"_orig_mod.{key}"], gradient, msg=key)
    assert student.state_dict()["backbone.model.stages.0.op_list.0.main.point_conv.norm.num_batches_tracked"] == 1


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_bfloat16_autocast_stays_near_float32(name: str) -> None:
    student: StudentEncoder = filled(name, embed_dim=8, embed_size=4)
    with torch.inference_mode():
        exact = student(pictures())
        with torch.autocast("cpu", torch.bfloat16):
            rough = student(pictures())
    assert torch.nn.functional.cosine_similarity(exact, rough.float(), dim=1).mean() > 0.99
