"""Memory: what is saved for backward, and that no operator writes outside its outputs."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from device import generator
from problems import DTYPES, FFN_FORMS, FORMS, MOE_FORMS, Problem, dtype_name, results
from torch import Tensor

import ffn_ops

SIZES = {"T": 64, "D": 12, "F": 20, "O": 16}


def saved_bytes(call: Callable[..., Tensor], tensors: dict[str, Tensor]) -> int:
    """Unique storage that forward keeps for backward, parameters apart."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    given = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    parameters = {t.untyped_storage().data_ptr() for n, t in given.items() if n[:2] in ("w_", "b_")}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(**given)
    assert y.requires_grad
    return sum(size for data, size in kept.items() if data not in parameters)


def numbers_saved(problem: Problem, dtype: torch.dtype = torch.float32, **keywords: bool) -> float:
    tensors, _ = problem.draw(dtype=dtype)
    return saved_bytes(lambda **t: problem.ours(**t, **keywords), tensors) / torch.finfo(dtype).bits * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_swiglu(dtype: torch.dtype) -> None:
    """x and two pre-activations; the plain formula keeps five tensors of width F."""
    T, D, F = SIZES["T"], SIZES["D"], SIZES["F"]
    assert numbers_saved(Problem("gated", **SIZES), dtype) == T * (D + 2 * F)
    problem = Problem("gated", **SIZES)
    tensors, _ = problem.draw(dtype=dtype)
    plain = saved_bytes(problem.plain, tensors) / torch.finfo(dtype).bits * 8
    assert plain >= T * (D + 4 * F)  # the measurement sees what eager keeps


def test_every_form() -> None:
    T, D, F = SIZES["T"], SIZES["D"], SIZES["F"]
    width = {"act": F, "gated_act": 2 * F, "gated_linear": D + 2 * F, "branches": D + 6 * F}
    width |= {"plain": D + F, "gated": D + 2 * F, "fused": D + 2 * F}
    forms = [form for form in FORMS if form not in MOE_FORMS]  # these also save their routing: below
    assert {form: numbers_saved(Problem(form, **SIZES)) for form in forms} == {f: T * w for f, w in width.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("form", MOE_FORMS)
def test_mixture_of_experts(form: str, dtype: torch.dtype) -> None:
    """x, logits and the pre-activations of every row, of 2 or 4 bytes; the routing; nothing of R rows of width D or O.
    The same for every granularity at equal K * F."""
    T, D, O, E = SIZES["T"], SIZES["D"], SIZES["O"], 8
    width = 1 if form == "moe" else 2
    for K, F in ((1, 24), (2, 12), (4, 6)):
        problem = Problem(form, T=T, D=D, F=F, O=O, E=E, K=K)
        tensors, _ = problem.draw(dtype=dtype)
        wide = 8 if dtype is torch.float64 else 4
        # ids for the router's backward; token, row, weight; offsets and slot_offsets
        routing = T * K * 8 + T * K * (8 + 8 + wide) + (E + 1 + T + 1) * 8
        size = torch.finfo(dtype).bits // 8
        expected = size * (T * (D + E) + width * T * K * F) + routing
        assert saved_bytes(problem.ours, tensors) == expected
        recompute = saved_bytes(lambda p=problem, **t: p.ours(recompute=True, **t), tensors)
        assert recompute == size * T * (D + E) + routing


def test_large_gradients_do_not_share_memory() -> None:
    """Blocks are used again only once nobody holds them: kept gradients keep their values over further steps, and a
    gradient in a used block has the bits of the first."""
    w_in, w_down = torch.randn(1200, 1000), torch.randn(900, 1200)  # 4 MB and more

    def step(T: int) -> tuple[Tensor, ...]:
        g = generator(T)
        leaves = [w_in.requires_grad_(), w_down.requires_grad_()]
        y = ffn_ops.ffn(torch.randn(T, 1000, generator=g), *leaves)
        return torch.autograd.grad(y, leaves, torch.randn(y.shape, generator=g))

    first = step(3)
    copies = [t.clone() for t in first]
    held = [step(T) for T in (4, 1100, 5, 6)]
    assert len({t.data_ptr() for grads in (first, *held) for t in grads}) == 10
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    del held
    for _ in range(3):
        again = step(3)
        assert all(torch.equal(a, b) for a, b in zip(again, copies, strict=True))
    again[0].add_(1)  # in place, as optimisers do
    assert torch.equal(first[0], copies[0])


@pytest.mark.parametrize("form", FFN_FORMS)
def test_recompute_saves_x_alone(form: str) -> None:
    assert numbers_saved(Problem(form, **SIZES), recompute=True) == SIZES["T"] * SIZES["D"]


def test_modules_save_no_more() -> None:
    """Through the module and with dropout off: the same."""
    layer = ffn_ops.FeedForward(12, 30, 4, 0.0)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(64, 12, requires_grad=True))
    assert sum(n for data, n in kept.items() if data not in own) == 4 * 64 * (12 + 2 * layer.w1.out_features)


GUARD = 64  # numbers on either side
CANARY = -77.0


def guarded(t: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of the tensor between two guard bands, and the whole that holds them."""
    whole = t.new_full((t.numel() + 2 * GUARD,), CANARY)
    view = whole[GUARD : GUARD + t.numel()].view(t.shape)
    return view.copy_(t), whole


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_written_around_inputs(form: str, dtype: torch.dtype, isa: str) -> None:
    """Inputs, saved tensors and gradients lie between guard bands; partial vectors must not spill into them."""
    problem = Problem(form, T=13, D=21, F=19, O=11)
    tensors, d_y = problem.draw(dtype=dtype)
    pairs = {n: guarded(t) for n, t in {**tensors, "d": d_y}.items()}
    views = {n: view for n, (view, _) in pairs.items()}
    d_view = views.pop("d")
    results(problem.ours, views, d_view)
    for name, (view, whole) in pairs.items():
        assert torch.equal(view, {**tensors, "d": d_y}[name]), name
        bands = torch.cat([whole[:GUARD], whole[-GUARD:]])
        assert (bands == CANARY).all(), name


TESTS = Path(__file__).parent
guarded_on_the_host = pytest.mark.cpu_only("the guarding allocator is the host's; on a GPU compute-sanitizer looks")
COMPILER = os.environ.get("CXX", "c++").split()


@pytest.fixture(scope="session")
def guard_allocator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the guarding allocator is written for glibc")
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler {COMPILER[0]!r} to build the guarding allocator")
    library = tmp_path_factory.mktemp("guard") / "libguard.so"
    source = str(TESTS / "guard_allocator.cpp")
    subprocess.run(
        [*COMPILER, "-std=c++20", "-O1", "-fno-builtin", "-shared", "-fPIC", source, "-o", library], check=True
    )
    return library


def under_guard(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TESTS / "guarded_run.py"), *arguments]
    paths = [str(TESTS), str(Path(ffn_ops.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@guarded_on_the_host
def test_nothing_is_touched_outside_tensors(guard_allocator: Path) -> None:
    """Every output, workspace and input ends at a page that faults; fresh memory is NaN, and no NaN comes out."""
    done = under_guard(guard_allocator)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"
    assert int(done.stdout) > 1000  # blocks that were guarded


@guarded_on_the_host
@pytest.mark.parametrize(
    ("how", "signal_number"), [("write", signal.SIGSEGV), ("read", signal.SIGSEGV), ("gap", signal.SIGABRT)]
)
def test_the_guard_notices(guard_allocator: Path, how: str, signal_number: signal.Signals) -> None:
    assert under_guard(guard_allocator, how).returncode == -signal_number
