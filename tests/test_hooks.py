"""Admission and filtering: which ids get a row, which rows go, and what a resume keeps of it."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from oracle import bits

from cupy_sparse_adamw import (
    AdmitHook,
    BaseAdmitHookImpl,
    BaseFilterHookImpl,
    FilterHook,
    HashTable,
    HashTableFilterHook,
    HashtableHookFactory,
    NormalInitializer,
    SparseAdamW,
)


def table_with(filter_hook=None, **options) -> HashTable:
    generator = torch.Generator(device="cpu").manual_seed(0)
    return HashTable(
        [2],
        block_size=4,
        device=torch.ones(0).device,
        initializer=NormalInitializer(generator=generator),
        filter_hook=filter_hook,
        **options,
    )


def lru(max_rows, **options) -> HashTable:
    return table_with(FilterHook("LRU", {"max_rows": max_rows}), **options)


def look(table, *ids) -> torch.Tensor:
    return table(torch.tensor(ids))


def held(table) -> list[int]:
    return sorted(table.ids().tolist())


# ---------------------------------------------------------------------- filtering by step


def test_a_row_goes_that_was_not_looked_up_for_more_than_n_steps(engine):
    table = table_with(FilterHook("GlobalStepFilter", {"filter_step": 2}))
    optimizer = SparseAdamW({"items": table})
    filters = HashTableFilterHook(1, table)
    for step, ids in enumerate([[1, 2, 3], [2, 3], [3], [3]], start=1):
        look(table, *ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        filters.after_step(None, step)
        # steps now: 1, 2, 3, 4; id 1 was last seen in step 0 (counted before after_step)
        assert held(table) == ([1, 2, 3] if step < 3 else [2, 3] if step == 3 else [3])
    assert set(optimizer.state_dict()["state"]["items"]["ids"].tolist()) == {3}
    look(table, 1).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()["state"]["items"]
    first = state["exp_avg"][state["ids"].tolist().index(1)]
    assert first.tolist() == pytest.approx([0.1, 0.1])  # (1 - beta1) * 1: nothing is left of before


def test_filtering_waits_for_its_interval(engine):
    table = table_with(FilterHook("GlobalStepFilter", {"filter_step": 1}))
    filters = HashTableFilterHook(3, torch.nn.Sequential(table))
    look(table, 1)
    lengths = []
    for step in range(10, 17):
        filters.after_step(None, torch.tensor(step))
        lengths.append(len(table))
    assert lengths == [1, 1, 1, 0, 0, 0, 0]
    filters.reset_filter_interval(None)
    look(table, 1)
    for step in range(17, 40):
        filters.after_step(None, step)
    assert len(table) == 1
    with pytest.raises(ValueError, match="filter_interval must be at least 1, got 0"):
        filters.reset_filter_interval(0)


def test_an_inserted_row_counts_as_looked_up(engine):
    table = table_with(FilterHook("GlobalStepFilter", {"filter_step": 2}))
    table._filter_hook_impl.update_step(10)
    table.insert(torch.tensor([5]), torch.ones(1, 2))
    table._filter_hook_impl.do_filter()
    assert held(table) == [5]


def test_eval_lookups_keep_nothing_but_read_only_ones_do(engine):
    table = table_with(FilterHook("GlobalStepFilter", {"filter_step": 1}))
    look(table, 1, 2, 3)
    impl = table._filter_hook_impl
    impl.update_step(2)
    table.eval()
    look(table, 1)
    table.train()
    table(torch.tensor([2, 9]), AdmitHook("ReadOnly"))
    impl.do_filter()
    assert held(table) == [2]


def test_a_filter_keeps_rows_with_gradients(engine):
    table = table_with(FilterHook("GlobalStepFilter", {"filter_step": 1}))
    look(table, 1, 2).sum().backward()
    out = look(table, 3)  # its backward is to come
    with torch.no_grad():
        look(table, 4)
    impl = table._filter_hook_impl
    impl.update_step(5)
    impl.do_filter()
    assert held(table) == [1, 2, 3]
    out.sum().backward()
    assert table.grad().values().shape[0] == 3
    table.clear_grad()
    impl.do_filter()
    assert held(table) == []


# ---------------------------------------------------------------------- max_rows


def test_the_least_recently_used_go(engine):
    table = lru(4)
    for ids in ([1, 2, 3], [1], [4]):
        with torch.no_grad():
            look(table, *ids)
    with torch.no_grad():
        look(table, 5)  # of 2 and 3, which are equally old, the lower id goes
        assert held(table) == [1, 3, 4, 5]
        look(table, 3, 6)  # 3 is in this lookup; the oldest else is 1
        assert held(table) == [3, 4, 5, 6]
        look(table, 7, 8, 7)
        assert held(table) == [3, 6, 7, 8]
    assert table._store.embedding.num_rows() == 4


def test_the_least_frequently_used_go(engine):
    table = table_with(FilterHook("LFU", {"max_rows": 3}))
    with torch.no_grad():
        look(table, 1, 1, 1, 2, 2, 3)
        look(table, 3)
        look(table, 4)  # 2 and 3 were used twice: the lower id goes
        assert held(table) == [1, 3, 4]
        look(table, 5)
        assert held(table) == [1, 3, 5]
        look(table, 5, 5, 6)
        assert held(table) == [1, 5, 6]


def test_a_larger_table_lets_a_sixteenth_more_go(engine):
    table = lru(32)
    with torch.no_grad():
        look(table, *range(32))
        look(table, 100)
        assert held(table) == [*range(3, 32), 100]
        look(table, 101, 102)
        assert len(table) == 32
        look(table, *range(200, 230))
        assert held(table) == [*range(200, 230)] or len(table) <= 32
    assert set(range(200, 230)) <= set(held(table))


@pytest.mark.parametrize("kind", ["LRU", "LFU"])
def test_eviction_never_takes_a_row_that_has_a_gradient(engine, kind):
    table = table_with(FilterHook(kind, {"max_rows": 4}))
    optimizer = SparseAdamW({"items": table})
    optimizer.set_grad_accum_steps(2)
    look(table, 1, 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()  # keeps the micro-batch
    with torch.no_grad():
        look(table, 9, 9, 9)
    out = look(table, 3)
    with torch.no_grad():
        look(table, 10)
    assert held(table) == [1, 2, 3, 10]
    with pytest.raises(RuntimeError, match=r"2 new ids need rows.*max_rows.*3 of its 4 rows"):
        look(table, 11, 12)
    assert held(table) == [1, 2, 3, 10]
    out.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert set(optimizer.state_dict()["state"]["items"]["ids"].tolist()) == {1, 2, 3, 10}
    look(table, 11, 12, 13, 14)
    assert held(table) == [11, 12, 13, 14]


@pytest.mark.parametrize("kind", ["LRU", "LFU", "GlobalStepFilter"])
def test_a_gradient_that_came_after_zero_grad_keeps_its_rows(engine, kind):
    """The usual loop: forward, zero_grad, backward, step."""
    params = {"filter_step": 1} if kind == "GlobalStepFilter" else {"max_rows": 4}
    table = table_with(FilterHook(kind, params))
    optimizer = SparseAdamW({"items": table})
    optimizer.set_grad_accum_steps(2)
    loss = look(table, 1, 2).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert sorted(table.ids()[table.pending_rows()].tolist()) == [1, 2]
    with torch.no_grad():
        look(table, 3, 4)
        look(table, 5)
    table._filter_hook_impl.update_step(9)
    table._filter_hook_impl.do_filter()
    assert {1, 2} <= set(held(table))


def test_a_batch_larger_than_the_table(engine):
    table = lru(3, name="users")
    look(table, 1)
    with pytest.raises(RuntimeError, match=r"table 'users': 4 new ids"):
        look(table, 2, 3, 4, 5)
    assert held(table) == [1]
    table.clear_grad()
    with pytest.raises(RuntimeError, match="max_rows"):
        table.insert(torch.tensor([6, 7, 8, 9]), torch.zeros(4, 2))
    assert held(table) == [1]


def test_training_with_eviction_is_training_with_deletion(engine):
    """The same rows by hand: weights and moments bit for bit."""
    table, by_hand = lru(4), table_with()
    optimizers = [SparseAdamW({"items": t}, lr=0.1) for t in (table, by_hand)]
    for ids, gone in ([1, 2, 3, 4], []), ([1, 5], [2]), ([6, 7], [3, 4]), ([2, 6], [1]):
        by_hand.delete(torch.tensor(gone, dtype=torch.int64))
        for t, optimizer in zip((table, by_hand), optimizers, strict=True):
            (look(t, *ids) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    ids = held(table)
    assert ids == held(by_hand) == [2, 5, 6, 7]
    assert torch.equal(bits(look(table.eval(), *ids)), bits(look(by_hand.eval(), *ids)))
    mine, theirs = (o.state_dict()["state"]["items"] for o in optimizers)
    for key in ("exp_avg", "exp_avg_sq"):
        a, b = (s[key][s["ids"].argsort()] for s in (mine, theirs))
        assert torch.equal(bits(a), bits(b))


# ---------------------------------------------------------------------- admission


def frequency(k, **params) -> HashTable:
    return table_with(admit_hook=AdmitHook("Frequency", {"min_frequency": k, **params}))


def test_an_id_gets_a_row_when_it_is_seen_the_kth_time(engine):
    table = frequency(3)
    assert look(table, 1, 1, 2).tolist() == [[0, 0]] * 3
    assert held(table) == []
    out = look(table, 1, 2, 2, 3)
    assert held(table) == [1, 2]
    fresh = table_with()(torch.tensor([1, 2, 2])).detach()
    assert torch.equal(out[:3], fresh)
    assert out[3].tolist() == [0, 0]
    out.sum().backward()
    grad = table.grad()
    rows = dict(zip(*(x.tolist() for x in table.ids_map()), strict=True))
    assert grad.to_dense()[[rows[1], rows[2]]].tolist() == [[1, 1], [2, 2]]
    assert grad.values().shape == (2, 2)  # 3's gradient is dropped
    table.eval()
    look(table, 3, 3, 3)  # not counted
    table.train()
    look(table, 3)
    assert held(table) == [1, 2]


def test_the_sketch_never_counts_too_low_and_rarely_too_high():
    """20,000 ids seen 1 to 3 times each, beside an exact count."""
    torch.manual_seed(0)
    table = frequency(3, width=1 << 17)
    ids = torch.randint(-(2**63), 2**63 - 1, (20_000,))
    times = torch.randint(1, 4, (20_000,))
    stream = ids.repeat_interleave(times)
    stream = stream[torch.randperm(stream.numel())]
    for batch in stream.split(1000):
        table(batch)
    admitted = torch.isin(ids, table.ids())
    assert bool(admitted[times == 3].all())
    assert int(admitted[times < 3].sum()) < 20


def test_counts_are_halved_now_and_then():
    table = frequency(4, width=8)
    look(table, 1, 1, 1)
    impl = table.admit_hook_Frequency
    assert (int(impl.sightings), int(impl.counts.max())) == (3, 3)
    look(table, 2, 2, 2, 3, 3)  # 8 sightings: all counts are halved
    assert int(impl.sightings) == 0
    look(table, 1, 1)
    assert 1 not in held(table)  # 1 + 2
    look(table, 1)
    assert 1 in held(table)


def test_the_lookups_hook_goes_before_the_tables(engine):
    table = frequency(1)
    table(torch.tensor([1]), AdmitHook("ReadOnly"))
    assert held(table) == []
    look(table, 1)
    assert held(table) == [1]
    with pytest.raises(ValueError, match=r"has the admit hook .*min_frequency.: 1.*second name"):
        table(torch.tensor([2]), AdmitHook("Frequency", {"min_frequency": 2}))


def test_admission_and_eviction_together(engine):
    table = lru(2, admit_hook=AdmitHook("Frequency", {"min_frequency": 2}))
    with torch.no_grad():
        look(table, 1, 1, 2, 2)
        look(table, 3)
        assert held(table) == [1, 2]
        look(table, 3, 2)
    assert held(table) == [2, 3]


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize("kind", ["LRU", "LFU", "GlobalStepFilter"])
def test_a_resume_goes_on_bit_for_bit(engine, kind):
    """Evictions, admissions and filtering after a resume are those of a run that never stopped."""

    def make():
        params = {"filter_step": 3} if kind == "GlobalStepFilter" else {"max_rows": 40}
        table = table_with(
            FilterHook(kind, params), admit_hook=AdmitHook("Frequency", {"min_frequency": 2})
        )
        return table, SparseAdamW({"items": table}, lr=0.1)

    def train(table, optimizer, batches):
        for batch in batches:
            (table(batch) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            table._filter_hook_impl.update_step()
            table._filter_hook_impl.do_filter()

    torch.manual_seed(1)
    batches = [torch.randint(0, 60, (20,)) for _ in range(30)]
    straight, resumed = make(), make()
    train(*straight, batches)
    first = make()
    train(*first, batches[:15])
    assert len(first[0]) > 0
    for there, here in zip(resumed, first, strict=True):
        there.load_state_dict(copy.deepcopy(here.state_dict()))
    train(*resumed, batches[15:])
    a, b = straight[0], resumed[0]
    ids = held(a)
    assert ids == held(b)
    assert torch.equal(bits(look(a.eval(), *ids)), bits(look(b.eval(), *ids)))
    states = [
        {key: value for key, value in table.state_dict().items() if key not in ("seed", "fan")}
        for table in (a, b)
    ]
    for state in states:
        order = state.pop("ids").argsort()
        for key, value in state.items():
            state[key] = value[order] if value.shape[:1] == order.shape else value
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), key


def test_a_slot_is_saved_with_the_table(engine):
    table = lru(10)
    look(table, 7, 8)
    state = table.state_dict()
    assert state["lru_clock"].tolist() == [[1], [1]]
    assert set(state) == {
        "ids",
        "embedding",
        "seed",
        "fan",
        "lru_clock",
        "_filter_hook_impl._clock",
    }
    with pytest.raises(RuntimeError, match=r"Missing key.*lru_clock"):
        lru(10).load_state_dict({k: v for k, v in state.items() if k != "lru_clock"})
    state["lru_clock"] = state["lru_clock"].float()
    with pytest.raises(RuntimeError, match=r"lru_clock must be torch.int64, got torch.float32"):
        lru(10).load_state_dict(state)


def test_rows_from_a_checkpoint_without_the_slot_are_not_the_oldest(engine):
    table = table_with(FilterHook("GlobalStepFilter", {"filter_step": 2}))
    table._filter_hook_impl.update_step(10)
    plain = table_with()
    look(plain, 1, 2)
    table.load_state_dict(plain.state_dict(), strict=False)
    table._filter_hook_impl.do_filter()
    assert held(table) == [1, 2]


def test_without_a_model_all_tables_of_the_process_filter():
    """A copy's filter is its own."""
    gc.collect()  # tables of other tests
    table = table_with(FilterHook("GlobalStepFilter", {"filter_step": 1}))
    look(table, 1)
    twin = copy.deepcopy(table)
    assert twin._filter_hook_impl._ht is twin
    look(table, 2)
    filters = HashTableFilterHook(filter_interval=2)
    for step in (1, 2, 3):
        filters.after_step(None, step)
        with torch.no_grad():
            look(table, 2)
    assert (held(table), held(twin)) == ([2], [])


def test_a_resume_filters_at_the_same_steps(engine):
    def run(first, last, table, filters):
        for step in range(first, last):
            with torch.no_grad():
                look(table, step % 7, 100 + step)
            filters.after_step(None, step)

    def make():
        table = table_with(FilterHook("GlobalStepFilter", {"filter_step": 4}))
        return table, HashTableFilterHook(10, table)

    straight, first, resumed = make(), make(), make()
    run(1, 40, *straight)
    run(1, 25, *first)
    for there, here in zip(resumed, first, strict=True):
        there.load_state_dict(here.state_dict())
    run(25, 40, *resumed)
    assert held(resumed[0]) == held(straight[0])
    assert first[1].state_dict() == {"last_filter_step": 21}


def test_hooks_made_in_inference_mode_work_outside_of_it(engine):
    with torch.inference_mode():
        table = lru(3)
        table(torch.tensor([1]), AdmitHook("Frequency", {"min_frequency": 2}))
    table(torch.tensor([1, 2]), AdmitHook("Frequency", {"min_frequency": 2}))
    assert held(table) == [1]
    look(table, 2, 3)
    assert held(table) == [1, 2, 3]


def test_update_slot_checks_what_it_writes():
    table = lru(3, name="users")
    look(table, 1, 2)
    one = torch.ones(1, dtype=torch.int64)
    for index, value, error, text in [
        ([0], one.float(), TypeError, "'users', slot 'lru_clock': value .* torch.int64, got .*32"),
        ([0], 3, TypeError, "value must be a tensor of torch.int64, got int"),
        ([0, 1], torch.ones(3, dtype=torch.int64), ValueError, r"expand to \[2, 1\], got .*\[3\]"),
        ([4000], one, IndexError, "'users'.* row 4000"),
        ([-2], one, IndexError, "row -2"),
        ([[0]], one, ValueError, r"index must have shape \[N\]"),
    ]:
        with pytest.raises(error, match=text):
            table.update_slot("lru_clock", torch.tensor(index), value)
    with pytest.raises(KeyError, match="no slot 'x'; there are 'embedding', 'lru_clock'"):
        table.update_slot("x", torch.tensor([0]), one)
    table.update_slot("lru_clock", torch.tensor([1, -1]), 7 * one)
    assert torch.cat(table.get_slot("lru_clock").values())[:2].tolist() == [[1], [7]]


def test_get_filters_by_name_and_table():
    table = lru(3)
    assert HashtableHookFactory().get_filters()["LRU"][table] is table._filter_hook_impl
    assert table not in HashtableHookFactory().get_filters()["LFU"]


def test_hooks_do_not_keep_tables_alive():
    gc.collect()
    before = len(HashtableHookFactory().filters())
    table = lru(3)
    assert len(HashtableHookFactory().filters()) == before + 1
    del table
    gc.collect()
    assert len(HashtableHookFactory().filters()) == before


def test_conversions_keep_slots():
    table = lru(3)
    look(table, 1)
    table.half()
    assert table.get_slot("lru_clock").dtype == torch.int64
    look(table, 2)
    assert table.state_dict()["lru_clock"].flatten().tolist() == [1, 2]


# ---------------------------------------------------------------------- users' own policies


class OddIds(BaseAdmitHookImpl):
    """Admits odd ids, and counts what it was asked."""

    def __init__(self, by=2):
        super().__init__()
        self.by = by
        self.register_buffer("asked", torch.zeros((), dtype=torch.int64))

    def admit(self, ids, counts):
        self.asked += counts.sum()
        return ids % self.by == 1


class Tired(BaseFilterHookImpl):
    """Lets rows go that were used more than ``uses`` times, after RecIS's example."""

    def __init__(self, ht, name="uses", uses=2):
        super().__init__(ht, name)
        self.uses = uses
        ht.append_filter_slot(name, torch.float32, 3)
        self.told = []

    def update(self, index):
        for row in index.tolist():
            values = torch.stack(
                [
                    block[i]
                    for block in self._ht.get_slot(self._name).values()
                    for i in range(block.shape[0])
                ]
            )
            self._ht.update_slot(self._name, torch.tensor([row]), values[row] + 1)

    def filter(self, ids, index):
        values = torch.cat(self._ht.get_slot(self._name).values())[index, 2]
        mask = values > self.uses
        return torch.masked_select(ids, mask), torch.masked_select(index, mask)

    def after_filter(self, ids, delete_ids):
        self.told.append((sorted(ids.tolist()), delete_ids.tolist()))


@pytest.fixture
def policies():
    factory = HashtableHookFactory()
    factory.regist_admit("OddIds", OddIds)
    factory.regist_filter("Tired", Tired)
    yield factory
    del factory._admits["OddIds"], factory._filters["Tired"]


def test_policies_of_ones_own(engine, policies):
    table = table_with(FilterHook("Tired", {"uses": 1}), admit_hook=AdmitHook("OddIds", {"by": 2}))
    look(table, 1, 2, 3, 4)
    assert held(table) == [1, 3]
    out = look(table, 3, 4)
    impl = table._filter_hook_impl
    impl.do_filter()
    assert held(table) == [1, 3]  # gradients of `out` may come
    del out
    impl.do_filter()
    assert held(table) == [1]
    assert impl.told == [([1, 3], []), ([1, 3], [3])]
    assert int(table.state_dict()["admit_hook_OddIds.asked"]) == 5


def test_an_answer_that_is_no_mask(policies, monkeypatch):
    """An integer tensor would be taken for indices."""
    table = table_with(admit_hook=AdmitHook("OddIds"))
    monkeypatch.setattr(OddIds, "admit", lambda self, ids, counts: ids * 0)
    with pytest.raises(
        TypeError, match=r"OddIds.admit must return a bool .*\[3\], got torch.int64"
    ):
        look(table, 5, 6, 7)
    assert held(table) == []


def test_what_cannot_be_registered(policies):
    for name in ("my.policy", "", 3):
        with pytest.raises(ValueError, match="a string without dots"):
            policies.regist_admit(name, OddIds)
    with pytest.raises(ValueError, match="'OddIds' is registered already: OddIds"):
        policies.regist_admit("OddIds", OddIds)
    with pytest.raises(TypeError, match="subclass of BaseFilterHookImpl, got <class"):
        policies.regist_filter("New", OddIds)


def test_hooks_print_as_json():
    hook = FilterHook("LRU", {"max_rows": 3})
    assert (hook.name, hook.params, hook.type) == ("LRU", {"max_rows": 3}, "filter")
    assert str(hook) == '{"name": "LRU", "params": {"max_rows": 3}}'
    assert AdmitHook("ReadOnly").type == "admit"
    assert "max_rows=3" in repr(table_with(hook))
