"""Options and fixtures that every test file shares. No test, no reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import ffn_ops  # noqa: F401  (loads the operators)

ISAS = torch.ops.ffn_ops._isas().split()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what takes minutes or many gigabytes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # One case on every instruction set in a row, so that the rule of accuracy computes its references once.
    place: dict[str, int] = {}

    def case(item: pytest.Item) -> str:
        params = getattr(item, "callspec", None) and item.callspec.params
        return item.nodeid.replace(params["isa"], "", 1) if params and "isa" in params else item.nodeid

    for i, item in enumerate(items):
        place.setdefault(case(item), i)
    items.sort(key=lambda item: place[case(item)])

    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: minutes or many gigabytes; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with every instruction set of this machine."""
    before = torch.ops.ffn_ops._isa()
    torch.ops.ffn_ops._use_isa(request.param)
    yield request.param
    torch.ops.ffn_ops._use_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts back the number of threads that a test sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dynamo() -> Iterator[None]:
    """A compiler without earlier tests' graphs."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
