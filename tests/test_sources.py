"""Which groups a step holds, for one process and for several, and rows sampled online."""
import numpy as np
import pytest
import torch
from loop_cases import lists, write
from tiny_models import tokenizer

from data_tools import formats, prepare
from data_tools.batch import Batch
from prefopt.sources import Dataset, Online, prompts, with_online


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return prepare.prepare(formats.load(write(folder / "lists.jsonl", lists(11))), tokenizer(), folder / "prepared")


def texts(batch: Batch) -> set:
    return {tuple(t[a.bool()].tolist()) for t, a in zip(batch["tokens"], batch["attend"], strict=True)}


def test_every_group_once_an_epoch(data):
    source = Dataset(data, 4, epochs=2, seed=3)
    assert (source.steps_per_epoch, source.steps) == (3, 6)
    steps = [source.indices(i) for i in range(6)]
    assert [len(s) for s in steps] == [4, 4, 3, 4, 4, 3]
    first, second = (np.concatenate(steps[i:i + 3]) for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(11)) and list(first) != list(second)


def test_order_depends_on_seed_and_epoch_alone(data):
    whole = [Dataset(data, 4, seed=3).indices(i).tolist() for i in range(6)]
    source = Dataset(data, 4, seed=3)
    assert [source.indices(i).tolist() for i in (5, 0, 4, 1, 3, 2)] == [whole[i] for i in (5, 0, 4, 1, 3, 2)]
    assert [Dataset(data, 4, seed=4).indices(i).tolist() for i in range(6)] != whole
    in_order = Dataset(data, 4, shuffle=False)
    assert [in_order.indices(i).tolist() for i in (0, 2, 3)] == [[0, 1, 2, 3], [8, 9, 10], [0, 1, 2, 3]]


@pytest.mark.parametrize("epochs, steps", [(1, 3), (0.5, 2), (0.1, 1), (1.4, 4), (3, 9)])
def test_steps_of_part_of_an_epoch(data, epochs, steps):
    """3 steps an epoch; half of it is 1.5, which rounds to even."""
    assert Dataset(data, 4, epochs=epochs).steps == steps


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("mismatched", [False, True])
def test_shares_are_the_step(data, ranks, mismatched):
    """Processes take consecutive shares; where there are too few groups, one takes a group that counts nothing."""
    alone = Dataset(data, 4, seed=1, mismatched=mismatched)
    many = [Dataset(data, 4, seed=1, rank=r, ranks=ranks, mismatched=mismatched) for r in range(ranks)]
    for step in range(3):
        batch, other = alone.take(alone.indices(step))
        shares = [source.take(source.indices(step)) for source in many]
        real = [(b, o) for b, o in shares if "train" not in b]
        assert sum(b.groups for b, _ in real) == batch.groups and max(b.groups for b, _ in shares) <= -(-4 // ranks)
        assert set().union(*(texts(b) for b, _ in real)) == texts(batch)
        assert all(not b["train"].any() for b, _ in shares if "train" in b)
        if mismatched:
            assert set().union(*(texts(o) for _, o in real)) == texts(other)
            for b, o in shares:
                assert len(b["group"].unique()) == b.groups == o.groups
                assert all(texts(x).isdisjoint(texts(y)) for x, y in zip(b.minibatches(1), o.minibatches(1), strict=True))


def test_a_step_of_one_group_is_mismatched_with_another(data):
    """11 groups, 5 to a step: the last step holds one group, and KTO still needs the response of another prompt."""
    source = Dataset(data, 5, seed=1, mismatched=True)
    batch, other = source.take(source.indices(2))
    assert batch.groups == other.groups == 1 and texts(batch).isdisjoint(texts(other))


def test_state_is_the_position(data):
    source, again = Dataset(data, 4, seed=1), Dataset(data, 4, seed=1)
    walk = iter(source)
    for _ in range(4):
        next(walk)
    again.load_state_dict(source.state_dict())
    assert texts(next(iter(again))[0]) == texts(next(walk)[0])


def test_no_groups():
    with pytest.raises(ValueError, match="no groups: nothing to train on"):
        Dataset([], 4)


# ------------------------------------------------------------------------------------------------------------ online rows
def pair(**columns) -> Batch:
    """Two groups: prompt 5 6 with responses 7 and 8 9, prompt 4 with responses 3 and 2."""
    return Batch({"tokens": torch.tensor([[5, 6, 7, 0], [5, 6, 8, 9], [4, 3, 0, 0], [4, 2, 0, 0]]),
                  "attend": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]).bool(),
                  "mask": torch.tensor([[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]).bool(),
                  "group": torch.tensor([7, 7, 3, 3]), "prompt_length": torch.tensor([2, 2, 1, 1]), **columns})


SAMPLES = [[torch.tensor([8]), torch.tensor([9, 9, 9])], [torch.tensor([2, 2]), torch.tensor([1])]]      # of groups 3 and 7


def test_online_rows_by_hand():
    batch = pair(relevance=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert [p.tolist() for p in prompts(batch)] == [[4], [5, 6]]       # group b is the b-th smallest id
    grown = with_online(batch, SAMPLES)
    assert grown["tokens"][4:].tolist() == [[4, 8, 0, 0], [4, 9, 9, 9], [5, 6, 2, 2], [5, 6, 1, 0]]
    assert grown["mask"][4:].int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]]
    assert grown["attend"][4:].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert grown["group"].tolist() == [7, 7, 3, 3, 3, 3, 7, 7] and grown["online"].tolist() == [False] * 4 + [True] * 4
    assert torch.equal(grown["relevance"][:4], batch["relevance"]) and grown["relevance"][4:].isnan().all()
    assert "train" not in grown and grown.width == 4 and texts(pair()) <= texts(grown)


def test_online_rows_widen_the_batch():
    grown = with_online(pair(), [[torch.tensor([1, 2, 3, 4, 5, 6])], [torch.tensor([1])]])
    assert grown["tokens"].shape == (6, 7) and grown["tokens"][4].tolist() == [4, 1, 2, 3, 4, 5, 6]
    assert grown["tokens"][0].tolist() == [5, 6, 7, 0, 0, 0, 0] and grown["relevance"].isnan().all()


def test_online_rows_beside_other_columns():
    """Weights are the group's; probe rows stay probes; wins grow by what nobody compared; other columns stay silent."""
    nan = torch.nan
    wins = torch.tensor([[[nan, 0.2], [0.8, nan]], [[nan, 1.0], [0.0, nan]]])
    grown = with_online(pair(weight=torch.tensor([2.0, 2.0, 3.0, 3.0]), train=torch.tensor([True, True, True, False]),
                             wins=wins, level=torch.tensor([0, 0, 1, 1]), reward=torch.arange(4.0),
                             logp_rollout=torch.ones(4, 4)), SAMPLES)
    assert grown["weight"].tolist() == [2, 2, 3, 3, 3, 3, 2, 2]
    assert grown["train"].tolist() == [True, True, True, False, True, True, True, True]
    assert grown["level"].tolist() == [0, 0, 1, 1, 0, 0, 0, 0] and grown["reward"][4:].isnan().all()
    assert torch.equal(grown["wins"][:, :2, :2].nan_to_num(-1), wins.nan_to_num(-1)) and grown["wins"][:, 2:].isnan().all()
    assert grown["wins"].shape == (2, 4, 4) and not grown["logp_rollout"][4:].any()
    assert grown["relevance"][:2].tolist() == pytest.approx([0.75, 0.25])          # group 7: (1/2)(1/2 + 1), (1/2)(0 + 1/2)
    assert grown["relevance"][4:].isnan().all()                # so that the samples stay unlabelled


def test_online_rows_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match=r"column 'rewards' \(N D\)"):
        with_online(pair(rewards=torch.ones(4, 2)), SAMPLES)


def test_online_samples_each_prompt_and_no_idle_group(data):
    asked = []

    def sample(prompts):
        asked.append([p.tolist() for p in prompts])
        return [[torch.tensor([5]), torch.tensor([6, 7])] for _ in prompts]

    source = Online(Dataset(data, 4, shuffle=False), sample)
    assert (source.steps, source.steps_per_epoch) == (3, 3)
    batch, other = next(iter(source))
    assert other is None and int(batch["online"].sum()) == 8 and len(asked[0]) == 4
    assert source.state_dict() == {"position": 1}
    for row in batch["online"].nonzero().squeeze(1):
        n, p = int(row), int(batch["prompt_length"][row])
        assert batch["tokens"][n][:p].tolist() == asked[0][int(batch.index[n])]
    idle = Online(Dataset(data, 4, shuffle=False, rank=4, ranks=5), sample)        # a fifth process of four groups
    batch, _ = idle.take(idle.indices(0))
    assert len(asked) == 1 and not batch["online"].any() and not batch["train"].any()
