"""A plan launched on a GPU computes what torch computes there."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_harness.scaled_add.launch import LARGE, SMALL
from kernel_harness.scaled_add.op import OPERATOR

from trtforge.errors import PluginError
from trtforge.plugins.aot import write_bundle
from trtforge.plugins.bundle import arch_for
from trtforge.plugins.launch import Call, Plan
from trtforge.plugins.launcher import Launcher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU"),
]

SCALE = 0.5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def call_of(shape: tuple[int, int], dtype: torch.dtype) -> Call:
    name = str(dtype).removeprefix("torch.")
    return Call(
        shapes={"total": shape, "x": shape},
        dtypes={"total": name, "x": name},
        attributes={"scale": SCALE},
    )


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    major, minor = torch.cuda.get_device_capability()
    arch = arch_for(10 * major + minor)
    kernels = [
        kernel for dtype in DTYPES for kernel in OPERATOR.kernels.choices(call_of((-1, -1), dtype), arch)
    ]
    folder = tmp_path_factory.mktemp("kernels") / "bundle"
    return Launcher(write_bundle({arch: kernels}, folder, num_processes=4))


@dataclass
class Addition:
    """total += SCALE * x"""

    plan: Plan
    total: torch.Tensor
    x: torch.Tensor

    @classmethod
    def make(cls, launcher: Launcher, shape: tuple[int, int], dtype: torch.dtype) -> Addition:
        torch.manual_seed(0)
        total, x = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
        return cls(OPERATOR.kernels.plan(call_of(shape, dtype), launcher.gpu), total, x)

    def pointers(self) -> dict[str, int]:
        total = self.total.data_ptr()
        return {"total": total, "total_out": total, "x": self.x.data_ptr()}

    def launch(self, launcher: Launcher) -> None:
        launcher.launch(self.plan, self.pointers(), 0, torch.cuda.current_stream().cuda_stream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block"), [((3, 5), SMALL), ((2048, 513), LARGE)])
def test_a_launch_computes_what_torch_computes(
    launcher: Launcher, shape: tuple[int, int], block: int, dtype: torch.dtype
) -> None:
    addition = Addition.make(launcher, shape, dtype)
    assert dict(addition.plan.launches[0].kernel.constants)["BLOCK"] == block
    expected = (addition.total.float() + SCALE * addition.x.float()).to(dtype)
    addition.launch(launcher)
    torch.testing.assert_close(addition.total, expected)


def test_launches_are_captured_into_a_graph_and_replayed(launcher: Launcher) -> None:
    addition = Addition.make(launcher, (64, 33), torch.float32)
    expected = addition.total + 3 * SCALE * addition.x
    launcher.load(addition.plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        addition.launch(launcher)
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(addition.total, expected)


def test_misaligned_memory_is_refused_before_the_gpu_sees_it(launcher: Launcher) -> None:
    addition = Addition.make(launcher, (4, 8), torch.bfloat16)
    before = addition.total.clone()
    addition.x = addition.x.flatten()[1:]
    with pytest.raises(PluginError, match="x begins at address"):
        addition.launch(launcher)
    torch.testing.assert_close(addition.total, before)
