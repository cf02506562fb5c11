"""What a launch hands to Triton."""

from collections.abc import Callable
from typing import Any

from fastskip.kernels.launch import Launch, launch


class Kernel:
    """Notes how it is launched."""

    arg_names = ("x_ptr", "OVERLAP")

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **given: self.seen.append((grid, given))


def test_products_and_sums_fuse_whatever_triton_does_by_default() -> None:
    kernel = Kernel()
    launch(kernel, (3,), {"num_warps": 2}, x_ptr=1)
    options = {"num_warps": 2, "enable_fp_fusion": True}
    assert kernel.seen == [((3,), {"x_ptr": 1, "OVERLAP": False, **options})]
    assert Launch("x", (3,), kernel, {}, {"num_warps": 2}).compiler_options == options


def test_an_empty_grid_launches_nothing() -> None:
    kernel = Kernel()
    launch(kernel, (3, 0), {}, x_ptr=1)
    assert not kernel.seen
