"""Batch: rows and groups, immutability, splitting, and the checks of the column table."""
import pytest
import torch

from data_tools import Batch
from data_tools.columns import COLUMNS, column, document

GROUP = torch.tensor([7, -2, 7, 7, 30, -2])                   # groups in order of their ids: -2 (2 rows), 7 (3), 30 (1)


def batch(**more):
    return Batch({"group": GROUP, "reward": torch.arange(6.0), "mask": torch.ones(6, 4).bool(), **more})


def test_groups_by_value_and_rows_in_order():
    b = batch()
    assert (b.groups, b.N, b.width) == (3, 6, 3)
    assert b.index.tolist() == [1, 0, 1, 1, 2, 0] and b.slot.tolist() == [0, 0, 1, 2, 0, 1]
    reward, real = b.grouped("reward")
    assert reward.tolist() == [[1, 5, 0], [0, 2, 3], [4, 0, 0]]
    assert real.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert torch.equal(b.real, real)


def test_rows_is_the_inverse_of_grouped():
    b = batch()
    for value in (torch.randn(6), torch.randn(6, 4), torch.randn(6, 4, 2)):
        assert torch.equal(b.rows(b.grouped(value)[0]), value)
    assert b.rows(torch.tensor([10, 20, 30])).tolist() == [20, 10, 20, 20, 30, 10]


def test_grouped_is_differentiable():
    x = torch.arange(6.0, requires_grad=True)
    grouped, _ = batch().grouped(x)
    (grouped ** 2).sum().backward()
    assert x.grad.tolist() == [0, 2, 4, 6, 8, 10]


def test_immutable():
    b = batch()
    c = b.with_columns(relevance=torch.zeros(6))
    assert "relevance" in c and "relevance" not in b and set(c) == set(b) | {"relevance"}
    with pytest.raises(TypeError):
        b["reward"] = torch.zeros(6)
    d = b.with_columns(**{"unit@sft": torch.zeros(3)})
    assert d["unit@sft"].shape == (3,)


def test_select_and_split_keep_rows_groups_and_width():
    b = batch(wins=torch.arange(27.0).view(3, 3, 3), unit=torch.arange(3.0))
    first, rest = b.split([1, 2])
    assert first["reward"].tolist() == [1, 5] and rest["reward"].tolist() == [0, 2, 3, 4]
    assert first.width == rest.width == 3 and first["wins"].shape == (1, 3, 3)
    assert rest["unit"].tolist() == [1, 2] and torch.equal(rest["wins"], b["wins"][1:])
    with pytest.raises(ValueError, match="whole groups"):
        b.select(torch.tensor([0, 2]))


@pytest.mark.parametrize("groups, sizes", [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (5, [3])])
def test_minibatches(groups, sizes):
    assert [m.groups for m in batch().minibatches(groups)] == sizes


def test_microbatches_fill_a_budget_of_real_tokens():
    mask = torch.ones(6, 4).bool()
    mask[4] = torch.tensor([True, False, False, False])       # groups of 8, 12 and 1 tokens
    b = batch(mask=mask)
    assert [m.groups for m in b.microbatches(12)] == [1, 1, 1]
    assert [m.groups for m in b.microbatches(13)] == [1, 2]
    assert [m.groups for m in b.microbatches(20)] == [2, 1]
    assert [m.groups for m in b.microbatches(21)] == [3] and next(iter(b.microbatches(None))) is b
    with pytest.raises(ValueError, match="12 tokens does not fit .* 11 tokens: raise train.tokens to at least 12"):
        list(b.microbatches(11))
    attend = torch.ones(6, 4).long()
    assert [m.groups for m in batch(mask=mask, attend=attend).microbatches(16)] == [1, 2]        # attention counts, if there


def test_padded_micro_batches_are_of_groups_of_like_length():
    """Pairs of 2 and 9 tokens in turns, four of a micro-batch: 8 x 9 and 8 x 2 tokens in the place of twice 8 x 9. Packed rows,
    which have no padding, stay in order."""
    lengths = torch.tensor([2, 9] * 4).repeat_interleave(2)
    b = Batch({"group": torch.arange(16) // 2, "mask": torch.arange(9) < lengths[:, None]})
    padded = [(part.N * int(part["mask"].sum(1).max()), part["group"].tolist()) for part in b.microbatches(72)]
    assert padded == [(72, [1, 1, 3, 3, 5, 5, 7, 7]), (16, [0, 0, 2, 2, 4, 4, 6, 6])]
    in_order = [part["group"].unique().tolist() for part in b.microbatches(44, shared=torch.zeros(16, dtype=torch.long))]
    assert in_order == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_ragged_four_pairs_as_one_and_three():
    b = Batch({"group": torch.arange(8) // 2, "mask": torch.ones(8, 3).long()})
    assert [m.groups for m in b.split([1, 3])] == [1, 3] and [m.N for m in b.split([2, 2])] == [4, 4]


@pytest.mark.parametrize("columns, message", [
    ({"mask": torch.ones(2, 3)}, "needs the column 'group'"),
    ({"group": torch.zeros(2)}, r"must be \(N\) integers, found \(2,\) torch.float32"),
    ({"group": torch.zeros(2, 1).long()}, r"must be \(N\) integers"),
    ({"group": GROUP, "rewrad": torch.zeros(6)}, "unknown column 'rewrad', did you mean 'reward'"),
    ({"group": GROUP, "reward": torch.zeros(5)}, r"'reward' should be \(N\) with N = 6, found shape \(5,\)"),
    ({"group": GROUP, "reward": torch.zeros(6, 1)}, r"'reward' should be \(N\), found shape \(6, 1\)"),
    ({"group": GROUP, "mask": torch.ones(6, 4), "logp": torch.zeros(6, 5)}, r"'logp' should be \(N T\) with T = 4"),
    ({"group": GROUP, "wins": torch.zeros(3, 2, 2)}, r"'wins' should be \(B K K\) with K = 3"),
    ({"group": GROUP, "unit": torch.zeros(4)}, r"'unit' should be \(B ...\) with B = 3"),
])
def test_wrong_columns(columns, message):
    with pytest.raises((KeyError, ValueError), match=message):
        Batch(columns)


def test_width():
    assert Batch({"group": GROUP}, width=5).real.shape == (3, 5)
    with pytest.raises(ValueError, match="a group of 3 rows does not fit width 2"):
        Batch({"group": GROUP}, width=2)


def test_no_rows():
    b = Batch({"group": torch.zeros(0).long(), "mask": torch.zeros(0, 4).bool()}, width=2)
    assert (b.N, b.groups) == (0, 0) and b.real.shape == (0, 2)
    assert b.grouped(torch.zeros(0, 4))[0].shape == (0, 2, 4)
    assert list(b.microbatches(10)) == [] and list(b.split([])) == []


def test_to_and_repr():
    b = batch()
    assert b.to("cpu").width == b.width and repr(b).startswith("Batch(3 groups, 6 rows: group (6,), reward (6,)")


def test_own_columns_are_documented():
    with pytest.raises(KeyError, match="unknown column 'surprise'; add it with data_tools.columns.document"):
        Batch({"group": GROUP, "surprise": torch.zeros(6)})
    try:
        document("surprise", "N", "how surprising the response is")
        assert Batch({"group": GROUP, "surprise": torch.zeros(6)})["surprise"].shape == (6,)
        document("surprise", "N", "how surprising the response is")            # the same line again is no error
        with pytest.raises(ValueError, match="already documented: how surprising"):
            document("surprise", "N T", "something else")
    finally:
        COLUMNS.pop("surprise", None)


def test_the_table_is_complete():
    for name, line in COLUMNS.items():
        assert line.dims and line.meaning and line.maker, name
        assert column(f"{name}@own") is line
