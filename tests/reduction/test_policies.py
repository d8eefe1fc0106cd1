"""Every policy: against a loop over tokens, its invariants, and the authors' own R-MeeTo."""

import json
import math
from pathlib import Path

import pytest
import torch
from fitting_counts import FOR_ANY_FAMILY, fitting
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from slow_policies import mtr as slow_mtr
from slow_policies import policy as slow_policy

import mtr_lab
from mtr_lab import UserError, ops
from mtr_lab.backbones.vim import Vim
from mtr_lab.measure.flops import counted_flops
from mtr_lab.reduction import apply, make_policy, policy_config
from mtr_lab.reduction.counts import candidates
from mtr_lab.reduction.group import GROUPINGS
from mtr_lab.reduction.merge import MERGES, Merge
from mtr_lab.reduction.score import SCORES, Score
from mtr_lab.tokens import PATHS, Evidence, Layout, TokenState

GOLDEN = Path(__file__).parent.parent / "golden" / "rmeeto_official.safetensors"
BASELINES = ("evit", "tome", "rmeeto", "famba", "pumer", "utr", "hsa", "random", "adjacent")
RESTORED = {"fovea", "mtr", "resolution", "directions", "rmeeto", "utr", "hsa", "random", "write", "adjacent"}
PRUNING = {"hsa", "random", "pumer", "utr", "storm_evit", "storm_random"}
ONE_BY_ONE = [name for name in FOR_ANY_FAMILY if not make_policy(policy_config(name)).keeps_grid]
"""Policies that remove any number of tokens; tests/contract/test_lines.py has the others."""


def random_state(batch: int, length: int, channels: int, special: int, *, sized: bool = True) -> TokenState:
    hidden, residual = torch.randn(2, batch, length, channels).unbind()
    index = torch.stack([torch.randperm(2 * length)[:length].sort().values for _ in range(batch)])
    places = torch.stack([torch.randperm(length)[:special] for _ in range(batch)]).view(batch, special)
    size = torch.randint(1, 4, (batch, length)).float() if sized else torch.ones(batch, length)
    return TokenState(hidden, residual, index, size, places)


def random_evidence(batch: int, length: int) -> Evidence:
    sums = torch.rand(batch, 2, length, len(ops.STATS))
    return Evidence(sums, ops.STATS, 4, torch.randn(batch, 2, length, 3), torch.randn(batch, 2, length, 3))


def pick(state: TokenState, rows: torch.Tensor) -> TokenState:
    return TokenState(
        state.hidden[rows], state.residual[rows], state.index[rows], state.size[rows], state.special[rows]
    )


def pick_evidence(evidence: Evidence, rows: torch.Tensor) -> Evidence:
    return Evidence(evidence.sums[rows], evidence.names, evidence.channels, evidence.b[rows], evidence.c[rows])


@settings(deadline=None, max_examples=40, derandomize=True)
@given(name=st.sampled_from(BASELINES), data=st.data())
def test_equals_a_loop_over_tokens(name: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(4, 20), label="tokens")
    special = data.draw(st.integers(1, 2), label="special")
    policy = make_policy(policy_config(name))
    assume(policy.capacity(length, special) > 0)
    remove = data.draw(st.integers(1, policy.capacity(length, special)), label="removed")
    torch.manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    state, evidence = random_state(2, length, 6, special), random_evidence(2, length)
    after = apply(policy(state, evidence, remove), state)
    score = policy.importance(state, evidence)
    features = state.hidden if policy.features == "hidden" else state.stream
    for b in range(2):
        survivors, hidden, residual = slow_policy(
            name, score[b].tolist(), features[b].tolist(), state.size[b].tolist(), state.special[b].tolist(), remove
        )
        assert after.index[b].tolist() == state.index[b][survivors].tolist()
        for stream, parts, actual in ((state.hidden, hidden, after.hidden), (state.residual, residual, after.residual)):
            expected = torch.stack([sum(w * stream[b, i] for i, w in part.items()) for part in parts])
            torch.testing.assert_close(actual[b], expected)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(data=st.data())
def test_write_equals_a_loop_over_tokens(data: st.DataObject) -> None:
    """The score, token by token, and then MTR's step."""
    length = data.draw(st.integers(4, 20), label="tokens")
    remove = data.draw(st.integers(1, length - 2), label="removed")
    torch.manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    state, evidence = random_state(2, length, 6, 1), random_evidence(2, length)
    after = apply(make_policy(policy_config("write"))(state, evidence, remove), state)
    for b in range(2):
        score = [
            sum(
                math.sqrt(evidence["write"][b, g, i]) * math.hypot(*evidence.b[b, g, i].tolist())
                for g in range(evidence.sums.shape[1])
            )
            for i in range(length)
        ]
        hidden, residual, survivors, _ = slow_mtr(
            score,
            state.stream[b].tolist(),
            state.hidden[b].tolist(),
            state.residual[b].tolist(),
            state.special[b].tolist(),
            remove,
            0.5,
        )
        assert after.index[b].tolist() == state.index[b][survivors].tolist()
        torch.testing.assert_close(after.hidden[b], torch.tensor(hidden))
        torch.testing.assert_close(after.residual[b], torch.tensor(residual))


@pytest.mark.parametrize("name", ONE_BY_ONE)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data())
def test_invariants(name: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(5, 40), label="tokens")
    special = data.draw(st.integers(1, 2), label="special")
    channels = data.draw(st.integers(1, 7), label="channels")
    policy = make_policy(policy_config(name))
    assume(policy.capacity(length, special) > 0)
    remove = data.draw(st.integers(1, policy.capacity(length, special)), label="removed")
    torch.manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    state, evidence = random_state(4, length, channels, special), random_evidence(4, length)
    after = apply(policy(state, evidence, remove), state)

    assert after.hidden.shape == after.residual.shape == (4, length - remove, channels)
    assert torch.equal(after.index.gather(1, after.special), state.index.gather(1, state.special))
    rows = state.special[..., None].expand(-1, -1, channels)
    assert torch.equal(after.special_tokens(), state.hidden.gather(1, rows) + state.residual.gather(1, rows))
    if name in RESTORED:
        assert bool((after.index.diff(dim=1) > 0).all())
    if name not in PRUNING:
        assert after.size.sum(1).tolist() == state.size.sum(1).tolist()
    if policy.merge == "size" and name not in PRUNING:
        for stream in ("hidden", "residual"):
            total = (getattr(after, stream) * after.size[..., None]).sum(1)
            torch.testing.assert_close(total, (getattr(state, stream) * state.size[..., None]).sum(1))

    order = torch.randperm(4)
    shuffled = apply(policy(pick(state, order), pick_evidence(evidence, order), remove), pick(state, order))
    assert torch.equal(shuffled.hidden, after.hidden[order])
    assert torch.equal(shuffled.residual, after.residual[order])
    assert torch.equal(shuffled.index, after.index[order])
    alone = apply(policy(pick(state, order[:1]), pick_evidence(evidence, order[:1]), remove), pick(state, order[:1]))
    assert torch.equal(alone.index, after.index[order[:1]])
    torch.testing.assert_close(alone.hidden, after.hidden[order[:1]])
    torch.testing.assert_close(alone.residual, after.residual[order[:1]])


@pytest.mark.parametrize("name", FOR_ANY_FAMILY)
@settings(deadline=None, max_examples=8, derandomize=True)
@given(data=st.data())
@torch.no_grad()
def test_invariants_through_a_whole_model(name: str, data: st.DataObject) -> None:
    """Several reductions in a row, on images that are not square, of either family."""
    family = data.draw(st.sampled_from(["vim_ti", "videomamba_ti"]), label="family")
    depth = data.draw(st.integers(3, 5), label="blocks")
    size = data.draw(st.tuples(st.integers(3, 6), st.integers(3, 6)), label="patches")
    torch.manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    geometry = {"patch_size": 4, "stride": 4, "embed_dim": 16, "num_classes": 3}
    model = mtr_lab.create_model(family, img_size=(4 * size[0], 4 * size[1]), depth=depth, **geometry).eval()
    images = torch.randn(3, 3, 4 * size[0], 4 * size[1])
    policy = make_policy(policy_config(name))
    length, counts, layout = size[0] * size[1] + 1, [], model.layouts()[0]
    for block in range(depth):
        wanted = data.draw(st.integers(0, 7 if policy.keeps_grid else 5), label=f"wanted at {block}")
        counts.append(policy.possible(wanted, length - sum(counts), layout))

    unreduced = mtr_lab.trace(model, images)
    schedule = mtr_lab.patch(model, name, schedule=counts).schedule
    states = mtr_lab.trace(model, images)
    assert [state.hidden.shape[1] for state in states] == [length - sum(counts[: i + 1]) for i in range(depth)]
    assert [length, *(state.hidden.shape[1] for state in states[:-1])] == list(schedule.tokens)
    for block, state in enumerate(states):
        assert state.index.gather(1, state.special).tolist() == [[model.class_position(length - 1)]] * 3
        if name in RESTORED:
            assert bool((state.index.diff(dim=1) > 0).all())
        if name not in PRUNING:
            assert state.size.sum(1).tolist() == [length] * 3
        if not any(counts[: block + 1]):
            assert torch.equal(state.stream, unreduced[block].stream)


@pytest.mark.parametrize("name", FOR_ANY_FAMILY)
def test_every_policy_runs_in_a_model(name: str) -> None:
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_ti", img_size=48, patch_size=8, stride=8, depth=6, embed_dim=32, num_classes=5)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = model.eval()(images)
        mtr_lab.patch(model, name, ratio=0)
        assert torch.equal(model(images), expected)
        schedule = mtr_lab.patch(model, name, ratio=0.15, images=images).schedule
        assert schedule.reduction >= 0.15
        reduced = model(images)
        assert reduced.isfinite().all()
        assert not torch.allclose(reduced, expected)
        mtr_lab.unpatch(model)
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("removed", [3, 6])
def test_rmeeto_reproduces_its_authors_code(removed: int) -> None:
    with safe_open(GOLDEN, framework="pt") as file:
        arguments = {key: json.loads(value) for key, value in file.metadata().items()}
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    geometry = ("img_size", "patch_size", "stride", "depth", "embed_dim", "num_classes")
    model = mtr_lab.create_model("vim_ti", **{key: arguments[key] for key in geometry}).eval()
    model.load_state_dict({key[6:]: value for key, value in golden.items() if key.startswith("param.")})

    schedule = [removed if block in (1, 3, 5, 7) else 0 for block in range(10)]
    reduction = mtr_lab.patch(model, "rmeeto", schedule=schedule, order="index_class_approximate")
    assert list(reduction.schedule.tokens) == golden[f"rmeeto.r{removed}.tokens"].tolist()
    with torch.no_grad():
        logits = model(golden["input"])
        states = mtr_lab.trace(model, golden["input"])
    expected = golden[f"rmeeto.r{removed}.logits"]
    assert (logits - expected).norm() / expected.norm() < 1e-5
    positions = golden[f"rmeeto.r{removed}.class_position"].tolist()
    for block, state in enumerate(states[:-1]):
        assert state.special.flatten().tolist() == [positions[block + 1]] * 3


@torch.no_grad()
def test_aligned_states_decay_over_the_gaps() -> None:
    """After pruning, the next scan equals one over the full sequence with no input at the pruned positions."""
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_ti", img_size=32, patch_size=8, stride=8, depth=3, embed_dim=16, num_classes=3)
    seen = []
    images = torch.randn(2, 3, 32, 32)
    mtr_lab.patch(model.eval(), "hsa", schedule=[5, 0, 0])
    mixer = model.blocks[1].mixer
    mixer.register_forward_pre_hook(lambda _, args: seen.append(args[1].gap(mixer.paths)))
    index = mtr_lab.trace(model, images)[0].index
    (gap,) = seen
    assert gap.shape == (2, 2, 12)
    forward, backward = (gap.cumsum(2) + torch.arange(12)).unbind(1)
    assert torch.equal(forward, index - index[:, :1])
    assert torch.equal(backward, (index[:, -1:] - index).flip(1))
    assert gap.sum() > 0
    mtr_lab.patch(model, "random", schedule=[5, 0, 0])
    model(images)
    assert seen[-1] is None


SMALL_VIM = {"img_size": 32, "patch_size": 8, "stride": 8, "depth": 4, "embed_dim": 16, "num_classes": 3}


@pytest.mark.parametrize("name", ["vim_ti", "videomamba_ti"])
@pytest.mark.parametrize("policy", ["write", "tome", "pumer", "utr"])
@torch.no_grad()
def test_the_convolution_runs_over_the_original_positions(name: str, policy: str) -> None:
    """From the first reduction on: as convolving the sequence where a token stands at all positions it has absorbed."""
    torch.manual_seed(0)
    model, images = mtr_lab.create_model(name, **SMALL_VIM).eval(), torch.randn(2, 3, 32, 32)
    schedule = [3, 2, 2, 0]
    merged_alone = mtr_lab.patch(model, policy, schedule=schedule).schedule
    survivors = model(images)
    assert mtr_lab.patch(model, policy, schedule=schedule, convolution="unmerged").schedule == merged_alone  # no FLOPs
    states = [None, *mtr_lab.trace(model, images)]  # before each block
    inputs: list[torch.Tensor] = []
    convolve = ops.mixer.causal_conv1d

    def spied(x: torch.Tensor, *args: torch.Tensor, **options: object) -> torch.Tensor:
        y = convolve(x, *args, **options)
        state, reverse = states[len(inputs)], options["reverse"]
        inputs.append(x)
        for b in range(len(x)):
            alive = [i for i, t in enumerate(state.source[b]) if t >= 0] if state else list(range(x.shape[1]))
            whole = x[b, state.source[b, alive]] if state else x[b]
            places = [alive.index(i) for i in state.index[b]] if state else alive
            expected = convolve(whole[None], *args, reverse=reverse)[:, 0, places]
            torch.testing.assert_close(y[:, b], expected)
        return y

    with pytest.MonkeyPatch.context() as patched, ops.use_backend("reference"):  # kernels convolve within the mixer
        patched.setattr(ops.mixer, "causal_conv1d", spied)
        unmerged = model(images)
    assert [x.shape[1] for x in inputs] == [17, 14, 12, 10]
    assert not torch.allclose(unmerged, survivors, atol=1e-4)
    for block in model.blocks:  # called as a module, as with an adapter
        block.mixer.conv1d.register_forward_hook(lambda module, args, output: None)
    torch.testing.assert_close(model(images), unmerged)


@torch.no_grad()
def test_a_merged_token_is_scanned_as_a_run_of_equal_tokens() -> None:
    """From the first reduction on, and its FLOPs are charged in both conventions."""
    torch.manual_seed(0)
    model, images = mtr_lab.create_model("vim_ti", **SMALL_VIM).eval(), torch.randn(2, 3, 32, 32)
    seen: list[torch.Tensor | None] = []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(lambda _, args: seen.append(args[1].repeats))
    plain = mtr_lab.patch(model, "mtr", schedule=[3, 2, 2, 0]).schedule
    model(images)
    assert seen == [None] * 4
    exact = mtr_lab.patch(model, "mtr", schedule=[3, 2, 2, 0], stretch="exact").schedule
    sizes = [state.size for state in mtr_lab.trace(model, images)]
    assert seen[4] is None
    assert all(map(torch.equal, seen[5:], sizes[:3]))
    one_direction = (14 + 12 + 10) * 32 * 16  # tokens that enter after the first reduction, channels, states
    assert exact.exponentials - plain.exponentials == 2 * one_direction
    assert exact.flops - plain.flops == 4 * 2 * one_direction
    assert exact.flops_literature - plain.flops_literature == 4 * one_direction
    assert counted_flops(model, images) == (exact.flops, exact.flops_overhead)
    mtr_lab.patch(model, "mtr", schedule=[0, 0, 0, 0], stretch="exact")
    assert counted_flops(model, images)[0] == exact.flops_unreduced


@torch.no_grad()
def test_pruned_tokens_leave_the_convolution() -> None:
    torch.manual_seed(0)
    model, images = mtr_lab.create_model("vim_ti", **SMALL_VIM).eval(), torch.randn(2, 3, 32, 32)
    logits = [
        model(images)
        for convolution in ("survivors", "unmerged")
        if mtr_lab.patch(model, "hsa", schedule=[3, 2, 2, 0], convolution=convolution)
    ]
    assert torch.equal(*logits)


def test_scores_equal_their_formulas() -> None:
    torch.manual_seed(0)
    state, evidence = random_state(2, 9, 5, 1), random_evidence(2, 9)
    delta, written, output = (evidence[name] for name in ("delta", "write", "output"))
    expected = {
        "delta": (delta[:, 0] + delta[:, 1]) / 4,
        "write": sum(written[:, g].sqrt() * evidence.b[:, g].norm(dim=-1) for g in (0, 1)),
        "output": (output[:, 0] + output[:, 1]) / 4,
        "hidden": state.hidden.clamp(min=0).sum(-1),
        "b": (evidence.b[:, 0] + evidence.b[:, 1]).mean(-1),
        "c": (evidence.c[:, 0] + evidence.c[:, 1]).mean(-1),
        "norm": (state.hidden + state.residual).norm(dim=-1),
        "magnitude": state.residual.abs().mean(-1),
    }
    for name, value in expected.items():
        policy = make_policy(policy_config("mtr", score=name))
        torch.testing.assert_close(policy.importance(state, evidence), value)
        negated = make_policy(policy_config("mtr", score=f"-{name}"))
        torch.testing.assert_close(negated.importance(state, evidence), -value)
    similarity = make_policy(policy_config("mtr", score="class_token")).importance(state, evidence)
    assert torch.allclose(similarity.gather(1, state.special), torch.ones(2, 1))
    assert set(SCORES) == {*expected, "class_token", "random", "none"}


def test_random_scores_follow_the_seed_and_nothing_else() -> None:
    """Seed 0 gives the numbers of versions without seeds; batch and content of the images do not matter."""
    state, evidence = random_state(3, 40, 5, 1), random_evidence(3, 40)
    before = torch.frac(torch.sin((state.index + 1).double() * 12.9898) * 43758.5453).abs().float()
    assert torch.equal(make_policy(policy_config("random")).importance(state, evidence), before)
    positions = TokenState.start(torch.zeros(1, 2000, 1), [])
    seeds = [0, 1, 2, 3, 1000, 2**32 - 1]
    policies = [make_policy(policy_config("random", seed=seed)) for seed in seeds]
    drawn = torch.cat([policy.importance(positions, random_evidence(1, 2000)) for policy in policies])
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert (drawn.mean(1) - 0.5).abs().max() < 0.03
    assert (torch.corrcoef(drawn) - torch.eye(len(seeds))).abs().max() < 0.1
    for policy, row in zip(policies, drawn, strict=True):
        assert torch.equal(policy.importance(state, evidence), row[state.index])
    assert [make_policy(policy_config(name)).draws for name in ("random", "mtr")] == [True, False]
    assert make_policy(policy_config("mtr", score="-random")).draws


@pytest.mark.parametrize(("directions", "which"), [("forward", 0), ("backward", 1)])
def test_one_direction_alone(directions: str, which: int) -> None:
    state, evidence = random_state(2, 9, 5, 1), random_evidence(2, 9)
    for score, name in (("delta", "delta"), ("output", "output")):
        actual = make_policy(policy_config("mtr", score=score, directions=directions)).importance(state, evidence)
        torch.testing.assert_close(actual, evidence[name][:, which] / 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directions": "up"}, "unknown mtr.directions 'up'"),
        ({"score": "-dleta"}, "unknown mtr.score '-dleta'.*'delta'"),
        ({"order": "idx"}, "unknown mtr.order 'idx'.*'index'"),
        ({"convolution": "all"}, "unknown mtr.convolution 'all'"),
        ({"stretch": "half"}, r"mtr.stretch must be in \[0, 1\] or exact, got 'half'"),
        ({"stretch": True}, r"mtr.stretch must be in \[0, 1\] or exact, got True"),
        ({"seed": -1}, "mtr.seed=-1: expected an integer from 0 to 4294967295"),
        ({"seed": 0.5}, "mtr.seed=0.5: expected an integer"),
        ({"prune_share": 2}, r"prune_share must be in \[0, 1\], got 2"),
        ({"matching": "adjacent"}, "mtr.matching=adjacent .*grouping=asymmetric: it needs mtr.grouping=alternate"),
        ({"zone": -1}, "mtr.zone=-1: expected an integer of at least 0"),
        ({"merge": "fuse", "grouping": "halves"}, "mtr.merge=fuse .*grouping=halves: it needs mtr.grouping=asymmetric"),
    ],
)
def test_impossible_policies_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_policy(policy_config("mtr", **changes))


@pytest.mark.parametrize(
    ("merge", "grouping"), [(name, grouping) for name in MERGES for grouping in MERGES[name].groupings or GROUPINGS]
)
def test_all_may_be_pruned_by_score(merge: str, grouping: str) -> None:
    state, evidence = random_state(2, 11, 5, 1), random_evidence(2, 11)
    policy = make_policy(policy_config("mtr", merge=merge, grouping=grouping, prune_first=1.0))
    plan = policy(state, evidence, 3)
    least = policy.importance(state, evidence).scatter(1, state.special, torch.inf).argsort(dim=1)[:, :3]
    assert plan.removed.sort(dim=1).values.tolist() == least.sort(dim=1).values.tolist()
    assert (plan.dest.gather(1, plan.removed) == -1).all()


def by_score(state: TokenState, importance: torch.Tensor) -> torch.Tensor:
    return importance.clamp(min=0)


@pytest.mark.parametrize(
    "rule", [Merge(by_score), Merge(by_score, into="one"), Merge(into="nothing")], ids=["nearest", "one", "nothing"]
)
@pytest.mark.parametrize("grouping", GROUPINGS)
@torch.no_grad()
def test_a_merge_rule_is_a_row_of_the_table(rule: Merge, grouping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy and schedule read the row alone, in a step and in a patched model."""
    monkeypatch.setitem(MERGES, "toy", rule)
    policy = make_policy(policy_config("mtr", merge="toy", grouping=grouping, score="norm"))
    torch.manual_seed(0)
    state, evidence = random_state(2, 14, 5, 1), random_evidence(2, 14)
    plan = policy(state, evidence, 4)
    into = plan.dest.gather(1, plan.removed)
    assert plan.keep.shape == (2, 10)
    assert (into == -1).all() == (rule.into == "nothing")
    assert ((into == into[:, :1]).all(dim=1) == (rule.into != "nearest")).all() or rule.into == "nothing"
    for b in range(2):
        for target in into[b][into[b] >= 0]:
            members = plan.dest[b] == target
            mass = state.stream[b, members].norm(dim=-1)
            torch.testing.assert_close(plan.weight[b, members], mass / mass.sum())
    compared = rule.into == "nearest" or grouping != "asymmetric"
    _, sources, targets = candidates(policy, 14, 1, 4)
    assert policy.flops(14, 1, 4, channels=5) == 4 * 4 * 5 + 2 * sources * targets * 5 * compared

    model = mtr_lab.create_model("vim_ti", **SMALL).eval()
    reduction = mtr_lab.patch(model, "mtr", ratio=0.2, merge="toy", grouping=grouping, score="norm")
    assert reduction.schedule.reduction >= 0.2
    sizes = mtr_lab.trace(model, torch.randn(2, 3, 24, 24))[-1].size.sum(1)
    assert (sizes < 37).all() if rule.into == "nothing" else (sizes == 37).all()


class WithoutClassToken(Vim):
    """A stand-in for a family without a class token."""

    def embed(self, images: torch.Tensor) -> TokenState:
        return TokenState.start(self.patch_embed(images), [], self.layouts()[0])

    def layouts(self, img_size=None) -> list[Layout]:
        return [Layout(*layout.grid) for layout in super().layouts(img_size)]


SMALL = {"img_size": 24, "patch_size": 4, "stride": 4, "depth": 4, "embed_dim": 16, "num_classes": 3}


@pytest.mark.parametrize("name", FOR_ANY_FAMILY)
@torch.no_grad()
def test_policies_that_need_a_class_token_are_refused_without_one(name: str) -> None:
    model = WithoutClassToken(**SMALL).eval()
    if name in ("evit", "pumer"):
        with pytest.raises(
            UserError, match="mtr.score=class_token .* WithoutClassToken has none: choose another score"
        ):
            mtr_lab.patch(model, name, ratio=0.1)
        assert all(part.reduction is None for part in (model, *model.blocks))
    else:
        counts = fitting(name, [3, 3, 0, 0], model.layouts()[0])
        mtr_lab.patch(model, name, schedule=counts)
        assert model.forward_state(torch.randn(2, 3, 24, 24)).hidden.shape == (2, 36 - sum(counts), 16)


def test_directions_and_evidence_that_a_model_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Vim(**SMALL)
    for block in model.blocks:
        block.mixer.paths = (PATHS["columns"], PATHS["forward"])
    with pytest.raises(UserError, match=r"mtr.directions=backward: Vim scans columns, forward\. Name one"):
        mtr_lab.patch(model, "mtr", ratio=0.1, directions="backward")
    monkeypatch.setitem(SCORES, "surprise", Score(SCORES["norm"].function, needs=("entropy",)))
    with pytest.raises(UserError, match="unknown evidence that mtr.score=-surprise reads 'entropy'.*b, c, delta"):
        make_policy(policy_config("mtr", score="-surprise"))


@torch.no_grad()
def test_stretched_tokens_take_longer_steps() -> None:
    """After merging, Δ of the next block is multiplied by the square root of the tokens' sizes."""
    torch.manual_seed(0)
    model = mtr_lab.create_model("vim_ti", img_size=32, patch_size=8, stride=8, depth=3, embed_dim=16, num_classes=3)
    seen = []
    model.eval().blocks[1].mixer.register_forward_pre_hook(lambda _, args: seen.append(args[1].delta_scale))
    images = torch.randn(2, 3, 32, 32)
    mtr_lab.patch(model, "write", schedule=[5, 0, 0])
    size = mtr_lab.trace(model, images)[0].size
    torch.testing.assert_close(seen[-1], size.sqrt())
    assert size.max() > 1
    mtr_lab.patch(model, "mtr", schedule=[5, 0, 0])
    model(images)
    assert seen[-1] is None
