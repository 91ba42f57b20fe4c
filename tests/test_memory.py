# SPDX-License-Identifier: BSD-3-Clause
"""Memory: tensors saved for backward, workspace kept between calls, outputs as ordinary tensors, and no writes outside
of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import platform
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
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


LARGE = {  # gradients and saved tensors of a megabyte and more
    "gated_linear": Problem("gated_linear", T=600, D=520, F=530),
    "gated": Problem("gated", T=600, D=520, F=530, O=510),
    "moe_gated": Problem("moe_gated", T=600, D=260, F=270, O=250, E=3),
}


@pytest.mark.parametrize("problem", LARGE.values(), ids=LARGE)
def test_storage_is_like_any_other(problem: Problem) -> None:
    """Gradients and what is saved for backward can be freed and resized in place, shared and pickled."""
    tensors, d_y = problem.draw(dtype=torch.float32)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = problem.ours(**leaves)
    expected = torch.autograd.grad(y, list(leaves.values()), d_y, retain_graph=True)
    grads = torch.autograd.grad(y, list(leaves.values()), d_y)
    del y
    own = {t.untyped_storage().data_ptr() for t in tensors.values()}
    assert max(t.untyped_storage().nbytes() for t in saved if t.untyped_storage().data_ptr() not in own) >= 1 << 20
    for t in {t.untyped_storage().data_ptr(): t for t in (*grads, *saved)}.values():
        storage = t.untyped_storage()
        if storage.data_ptr() in own or t.numel() == 0:
            continue
        before, size = t.clone(), storage.nbytes()
        storage.resize_(0)
        assert storage.nbytes() == 0
        storage.resize_(size)
        t.copy_(before)
        t.resize_(2, *before.shape)
        assert torch.equal(t[0], before)
        if not t.is_cuda:
            t.share_memory_()
        assert torch.equal(pickle.loads(pickle.dumps(t))[0], before)
    assert all(torch.equal(t[0], e) for t, e in zip(grads, expected, strict=True))


@pytest.mark.cpu_only("asks the host's allocator")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_usable_size is glibc's")
def test_held_gradients_take_their_own_size() -> None:
    """Small gradients that live long do not hold the memory of larger ones that came before."""
    usable = ctypes.CDLL(None).malloc_usable_size
    usable.restype, usable.argtypes = ctypes.c_size_t, [ctypes.c_void_p]

    def gradient(columns: int) -> Tensor:
        w = torch.ones(1024, columns, requires_grad=True)
        return torch.autograd.grad(ffn_ops.ffn(torch.ones(1, columns), w, torch.ones(1, 1024)), w)[0]

    held = []
    for _ in range(3):
        gradient(1024)
        held.append(gradient(520))
    for t in held:
        assert t.untyped_storage().nbytes() == 4 * 1024 * 520
        assert t.untyped_storage().nbytes() <= usable(t.data_ptr()) <= 4 * 1024 * 520 + 8192


@pytest.fixture
def empty_cache() -> Iterator[None]:
    ffn_ops.empty_cache()
    yield
    ffn_ops.set_cache_limit(None)
    ffn_ops.empty_cache()


def step(T: int = 4, F: int = 96) -> list[Tensor]:
    """A forward and a backward pass whose workspace grows with T and F."""
    g = generator(T)
    leaves = [torch.randn(s, generator=g).requires_grad_() for s in ((T, 8), (F, 8), (9, F))]
    y = ffn_ops.ffn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones(y.shape))]


def cached() -> int:
    return int(torch.ops.ffn_ops._cached_bytes())


kept_on_the_cpu = pytest.mark.cpu_only("on a GPU all memory is torch's")


@kept_on_the_cpu
def test_one_block_is_kept(empty_cache: None) -> None:
    """Of the size of the largest call, however many came and in whatever order; it changes no result."""
    assert cached() == 0
    first = step()
    small = cached()
    assert 0 < small <= 8 << 20
    for _ in range(2):
        step(500, 2200)
    large = cached()
    assert 8 << 20 < large < 32 << 20  # h and d_hidden are of 4.4 MB each
    for T, F in ((4, 96), (200, 1000), (500, 2200)):
        step(T, F)
    assert cached() == large
    assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


@kept_on_the_cpu
def test_cache_limit(empty_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the limit is kept; None restores the environment's limit."""
    step(500, 2000)
    ffn_ops.set_cache_limit(5 << 20)
    assert cached() == 0
    first = step(500, 2000)
    assert cached() == 0
    step()
    assert cached() > 0
    ffn_ops.empty_cache()
    assert cached() == 0
    ffn_ops.set_cache_limit(0)
    assert all(torch.equal(a, b) for a, b in zip(step(500, 2000), first, strict=True))
    assert cached() == 0
    monkeypatch.setenv("FFN_OPS_CACHE_LIMIT", "5000000")
    ffn_ops.set_cache_limit(None)
    assert torch.ops.ffn_ops._cache_limit() == 5000000
    monkeypatch.setenv("FFN_OPS_CACHE_LIMIT", "5 MB")
    with pytest.raises(ValueError, match="FFN_OPS_CACHE_LIMIT: expected a number of bytes, got '5 MB'"):
        ffn_ops.set_cache_limit(None)
    monkeypatch.delenv("FFN_OPS_CACHE_LIMIT")
    for wrong, error in (("1", TypeError), (True, TypeError), (-1, ValueError)):
        with pytest.raises(error, match="limit: expected"):
            ffn_ops.set_cache_limit(wrong)  # type: ignore[arg-type]


def wide(rows: int, columns: int) -> Tensor:
    return torch.ones(1, 1).expand(rows, columns)


def recomputing_backward(x: Tensor, w_in: Tensor, w_down: Tensor) -> Tensor:
    gate, form = x.new_empty(0), (False, False, "relu", [0.0, 0.0])
    return torch.ops.ffn_ops.ffn_backward(x, x, w_in, None, w_down, None, None, gate, gate, *form, [True] * 7)  # type: ignore[no-any-return]


TOO_LARGE = {
    "an output": (lambda n: ffn_ops.gated_act(wide(n, n)), r"a tensor of shape \[1048576, 1048576\]"),
    "the workspace": (lambda n: recomputing_backward(wide(n, 1), wide(n, 1), wide(1, n)), "the workspace: gate"),
}


@kept_on_the_cpu
@pytest.mark.parametrize(("call", "message"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_out_of_memory(call: Callable[[int], Tensor], message: str, empty_cache: None) -> None:
    """The error names the bytes and their use; the kept workspace was freed before, and later calls work."""
    first = step()
    assert cached() > 0
    expected = f"not enough memory on the CPU: tried to allocate 4398046511104 bytes for {message}"
    with no_overcommit(), pytest.raises(RuntimeError, match=expected):
        call(1 << 20)
    assert cached() == 0
    assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


@contextlib.contextmanager
def no_overcommit(more: int = 1 << 30) -> Iterator[None]:
    """Limits the address space to so many bytes more than are in use."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def holes(size: int) -> list[Tensor]:
    """Tensors that fill what earlier tests freed and the process still holds: a large one can't come from there."""
    tensors: list[Tensor] = []
    with no_overcommit(size // 2), contextlib.suppress(RuntimeError):
        while True:
            tensors.append(torch.empty(size, dtype=torch.uint8))
    return tensors


@kept_on_the_cpu
def test_kept_memory_is_given_back_before_failing(empty_cache: None) -> None:
    """A tensor that fits only if the kept workspace is freed."""
    filled = holes(32 << 20)
    x = torch.ones(3000, 1, requires_grad=True)
    y = ffn_ops.ffn(x, wide(3000, 1), wide(1, 3000), activation="relu", recompute=True)
    torch.autograd.grad(y.sum(), x)  # gate and d_hidden are of 36 MB each
    kept = cached()
    assert kept > 72_000_000
    with no_overcommit(kept // 2):
        assert ffn_ops.gated_act(wide(4000, 5750), activation="relu").sum() == 4000 * 5750
    assert cached() == 0
    del filled


@kept_on_the_cpu
def test_forks_while_threads_run() -> None:
    """200 children, forked at any moment of two threads' steps, run a step themselves: none waits for a lock."""
    paths = [str(Path(ffn_ops.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(TESTS / "forked_run.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.split() == ["200"], f"{done.returncode}\n{done.stdout}{done.stderr}"


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
def test_the_guard_notices(guard_allocator: Path) -> None:
    done = under_guard(guard_allocator, "write", "read", "gap")
    wanted = (signal.SIGSEGV, signal.SIGSEGV, signal.SIGABRT)
    assert done.stdout.split() == [str(int(each)) for each in wanted], f"{done.stdout}{done.stderr}"
