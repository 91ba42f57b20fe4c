# SPDX-License-Identifier: BSD-3-Clause
"""examples/sparse_attention: the attention beside loops in float64, its losses, its FLOPs, and the whole command."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from examples.sparse_attention import attention, measure, train
from examples.sparse_attention.__main__ import QUICK_SIZE, main
from examples.sparse_attention.attention import Indexer, attend, attend_dense, attend_window, choose, dense_loss
from examples.sparse_attention.model import ARMS, BASELINE, BYTES, KINDS, VALUES, Arm, LanguageModel, Size, model_flops

pytestmark = pytest.mark.cpu_only("the example runs on the CPU")
B, T, H, WIDTH, I, INDEX, K = 2, 21, 3, 4, 2, 5, 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few tokens make several blocks, the last of them ragged."""
    monkeypatch.setattr(attention, "SCORE_BLOCK", 8)
    monkeypatch.setattr(attention, "ATTEND_BLOCK", 16)


def inputs(seed: int = 0, ties: bool = False) -> list[Tensor]:
    """q, kv, and the indexer's q, w and k; with ``ties`` of few values, so that many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, H, WIDTH), (B, T, 2 * WIDTH), (B, T, I, INDEX), (B, T, I), (B, T, INDEX))
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(t.round() if ties and i > 1 else t).requires_grad_() for i, t in enumerate(found)]


def loop_choice(q: Tensor, w: Tensor, k: Tensor, b: int, t: int) -> list[int]:
    scores = [sum(float(w[b, t, h]) * max(0.0, float(q[b, t, h] @ k[b, s])) for h in range(I)) for s in range(t + 1)]
    return sorted(range(t + 1), key=lambda s: (-scores[s], s))[:K]


def loop(q: Tensor, kv: Tensor, index: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Query by query and head by head: the output, and the sum of the KL divergences over B T."""
    index_q, index_w, index_k = index
    rows, loss = [], q.new_zeros(())
    for b, t in itertools.product(range(B), range(T)):
        keys = loop_choice(*(i.detach() for i in index), b, t)
        heads, p = [], q.new_zeros(len(keys))
        for h in range(H):
            logits = torch.stack([q[b, t, h] @ kv[b, s, :WIDTH] for s in keys]) / math.sqrt(WIDTH)
            weights = logits.exp() / logits.exp().sum()
            heads.append(sum(weights[i] * kv[b, s, WIDTH:] for i, s in enumerate(keys)))
            p = p + weights.detach() / H
        scores = torch.stack(
            [sum(index_w[b, t, h] * (index_q[b, t, h] @ index_k[b, s]).relu() for h in range(I)) for s in keys]
        )
        log_q = scores - scores.exp().sum().log()
        loss = loss + (p * (p.log() - log_q)).sum()
        rows.append(torch.stack(heads))
    return torch.stack(rows).view(B, T, H, WIDTH), loss / (B * T)


@pytest.mark.parametrize("ties", [False, True])
def test_sparse_attention_and_its_gradients_are_those_of_a_loop(ties: bool) -> None:
    tensors = inputs(ties=ties)
    q, kv, *index = tensors
    d_out = torch.randn(B, T, H, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, loss = attend(q, kv, choose(*index, K), (index[0], index[1], index[2]), with_loss=True)
    wanted, wanted_loss = loop(q, kv, index)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, wanted_loss, rtol=0, atol=1e-12)
    for found, expected in zip(
        torch.autograd.grad((out * d_out).sum() + loss, tensors),
        torch.autograd.grad((wanted * d_out).sum() + wanted_loss, tensors),
        strict=True,
    ):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_all_keys_chosen_is_dense_attention() -> None:
    tensors = inputs()
    q, kv, *index = tensors
    parts = (index[0], index[1], index[2])
    out, loss = attend(q, kv, choose(*index, T + 3), parts, with_loss=True)
    dense, whole = attend_dense(q, kv), dense_loss(q, kv, parts)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-13)
    torch.testing.assert_close(loss, whole, rtol=0, atol=1e-13)
    sparse_grads = torch.autograd.grad(out.sum() + loss, tensors)
    for found, expected in zip(sparse_grads, torch.autograd.grad(dense.sum() + whole, tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_ties_go_to_the_earliest_keys() -> None:
    q, w, k = torch.ones(1, T, 1, 1), torch.ones(1, T, 1), torch.zeros(1, T, 1)
    k[0, 9], k[0, 12] = 1, 1
    chosen = choose(q, w, k, 4)
    assert chosen[0, 8].sort().values.tolist() == [0, 1, 2, 3]  # all scores are 0
    assert chosen[0, 9].sort().values.tolist() == [0, 1, 2, 9]
    assert chosen[0, 20].sort().values.tolist() == [0, 1, 9, 12]


def test_window_is_dense_attention_under_a_mask() -> None:
    q, kv, *_ = inputs()
    wanted = torch.zeros_like(q)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        near = kv[b, max(0, t - 4) : t + 1]
        wanted[b, t, h] = torch.softmax(near[:, :WIDTH] @ q[b, t, h] / math.sqrt(WIDTH), 0) @ near[:, WIDTH:]
    torch.testing.assert_close(attend_window(q, kv, 5), wanted, rtol=0, atol=1e-12)


SMALL = Size(d_model=16, d_ff=24, width=8, index_width=4, keys=5, context=T)


def model_of(arm: Arm, mode: str | None = None) -> LanguageModel:
    model = LanguageModel(SMALL, arm, seed=0).double()
    model.set_mode(mode or arm.attention)
    return model


def tokens(count: int = T, seed: int = 0) -> Tensor:
    return torch.randint(BYTES, (B, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.key)
def test_later_tokens_change_nothing_and_decoding_gives_the_same(arm: Arm) -> None:
    model, text = model_of(arm).eval(), tokens()
    with torch.no_grad():
        whole = model(text)[0]
        for t in (4, 12, 19):
            other = torch.cat([text[:, : t + 1], tokens(T - t - 1, seed=t)], 1)
            torch.testing.assert_close(model(other)[0][:, : t + 1], whole[:, : t + 1], rtol=0, atol=1e-12)
            assert (model(other)[0][:, t + 1 :] - whole[:, t + 1 :]).abs().max() > 1e-2
    caches = model.caches(B, T)
    for t in range(T):
        torch.testing.assert_close(model.decode(text[:, t : t + 1], caches), whole[:, t : t + 1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", ["warmup", "sparse"])
def test_indexer_learns_from_its_loss_alone_and_nothing_else_does(mode: str) -> None:
    model = model_of(next(arm for arm in ARMS if arm.key == "sparse_moe"), mode)
    logits, index_loss = model(tokens())
    everything = [*model.indexers(), *model.others()]

    def reached(loss: Tensor) -> list[bool]:
        found = torch.autograd.grad(loss, everything, retain_graph=True, allow_unused=True)
        return [g is not None and bool(g.any()) for g in found]

    indexers, others = len(model.indexers()), len(model.others())
    assert indexers == 2 * 5
    assert reached(index_loss) == [True] * indexers + [False] * others
    assert reached(logits.square().sum()) == [False] * indexers + [True] * others


@pytest.mark.skipif(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry,
    reason="this torch has no formula for attention on a CPU",
)
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.key)
def test_active_flops_are_counted_and_equal(arm: Arm) -> None:
    """The formula is what torch counts for the decoding of one token; the means over a context are those of the
    baseline, but for the rounding of a width."""
    model = model_of(arm).float().eval()
    for position in (0, SMALL.keys - 1, SMALL.keys, T - 1):
        caches = model.caches(1, T)
        for cache in caches:
            cache.length = position
        with FlopCounterMode(display=False) as counter:
            model.decode(tokens()[:1, :1], caches)
        assert counter.get_total_flops() == model_flops(SMALL, arm, position)
    for size in (Size(), QUICK_SIZE):
        mine, baseline = (sum(model_flops(size, a, t) for t in range(size.context)) for a in (arm, BASELINE))
        assert abs(mine / baseline - 1) < 0.01


def test_needles_stand_before_their_questions() -> None:
    text = tokens(200)
    for asked in (1, 5):
        planted = train.plant(text, torch.Generator().manual_seed(0), asked)
        assert (planted != text).sum() >= B * KINDS * (2 * asked + 1) - 2
        for row in planted.tolist():
            for kind in range(KINDS):
                questions = [i for i, token in enumerate(row) if token == train.QUESTIONS + kind]
                needles = range(BYTES + VALUES * kind, BYTES + VALUES * (kind + 1))
                first = next(i for i, token in enumerate(row) if token in needles)
                assert len(questions) == asked and first < questions[0]
                assert {row[i + 1] for i in questions} == {row[first]}
    logits = torch.zeros(B, 199, train.QUESTIONS + KINDS)
    text_loss, answers = train.losses(logits, planted)
    torch.testing.assert_close(text_loss, answers)  # both the logarithm of the vocabulary


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.key)
def test_cost_of_a_model_has_its_parts_and_what_it_caches(arm: Arm) -> None:
    cost = measure.cost(SMALL, arm, length=T, repeats=1, tokens=2)
    parts = {"attention", "ffn", "rest"}
    parts |= {part for part, has in (("indexer", arm.attention == "sparse"), ("router", arm.mixture)) if has}
    assert {part for part, seconds in cost.step_parts.items() if seconds > 0} == parts
    assert sum(cost.step_parts.values()) == pytest.approx(cost.step_seconds)
    rows = SMALL.keys if arm.attention == "window" else T
    floats = rows * 2 * SMALL.width + T * SMALL.index_width * (arm.attention == "sparse")
    assert cost.cache_mb == SMALL.layers * floats * 4 / 2**20


def test_exponent_of_a_power() -> None:
    lengths = [512, 1024, 2048, 4096]
    assert measure.exponent(lengths, [3.0 * n**1.7 for n in lengths]) == pytest.approx(1.7)
    assert measure.exponent([512], [1.0]) is None


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The small run: every table is in the report, and the experts of ffn_ops generate the untouched model's tokens."""
    pytest.importorskip("transformers.models.deepseek_v32")
    attention.SCORE_BLOCK, attention.ATTEND_BLOCK = 64, 256
    results = main(["--quick", "--out", str(tmp_path)])
    untouched, ours, *_ = results.deepseek
    assert ours.same_tokens == 1 and ours.loss == pytest.approx(untouched.loss, abs=1e-3)
    assert ours.expert_mb == untouched.expert_mb and all(v.expert_mb < ours.expert_mb for v in results.deepseek[2:])
    assert all(run.losses[-1] < run.losses[0] and len(run.losses) == results.plan.steps for run in results.runs)
    report, record = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    shown = capsys.readouterr().out
    for run in results.runs:
        assert f"{run.validation:.3f}" in report and f"{run.validation:.3f}" in shown
    assert [run["validation"] for run in record["runs"]] == [run.validation for run in results.runs]
    assert {file.name for file in tmp_path.glob("*.png")} == {"training.png", "recall.png", "cost.png", "experts.png"}


def test_what_is_missing_shows_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.sparse_attention.__main__.Trainer", None)
    (tmp_path / "file").touch()
    pytest.importorskip("transformers.models.deepseek_v32")
    with pytest.raises(SystemExit, match=r"--out .*file: File exists"):
        main(["--out", str(tmp_path / "file")])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"transformers lacks DeepSeek-V3.2: pip install 'ffn_ops\[transformers\]'"):
        main(["--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_indexer_scales_its_scores() -> None:
    """As transformers' DeepSeek-V3.2: both scales are in the weights of the heads."""
    layer = Indexer(16, I, 8, K).double()
    x = torch.randn(1, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, w, _ = layer.project(x)
    torch.testing.assert_close(w, layer.w(x) * 8**-0.5 * I**-0.5)
