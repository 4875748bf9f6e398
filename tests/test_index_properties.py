"""The index against a dict, on programs that Hypothesis makes up."""

from __future__ import annotations

import pytest
import torch

from cupy_sparse_adamw import HashTable

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

#: Few values, so that programs hit known ids often, and the ends of the range.
IDS = st.one_of(st.integers(-3, 12), st.sampled_from([2**63 - 1, -(2**63), 2**32, 2**62]))
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["train", "eval", "insert", "delete", "delete", "clear"]),
        st.lists(IDS, max_size=12),
    ),
    max_size=12,
)


# The fixture only chooses the engine, so it may serve all examples.
@hypothesis.settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(STEPS)
def test_a_table_is_a_dict_of_rows(engine, program):
    """Lookups, insertions, deletions and clears in any order; values count up, to be told apart."""
    table, expected, count = HashTable([1], block_size=2, device=torch.ones(0).device), {}, 0.0
    for what, ids in program:
        keys = torch.tensor(ids, dtype=torch.int64)
        if what == "clear":
            table.clear()
            expected.clear()
            continue
        if what == "delete":
            table.delete(keys)
            for id_ in ids:
                expected.pop(id_, None)
        elif what == "insert":
            values = torch.arange(count + 1, count + 1 + len(ids), dtype=torch.float32)
            count += len(ids)
            table.insert(keys, values[:, None])
            expected.update(zip(ids, values.tolist(), strict=True))
        else:
            table.train(what == "train")
            found = table(keys).flatten().tolist()
            assert found == [expected.get(id_, 0.0) for id_ in ids]
            if what == "train":
                for id_ in ids:
                    expected.setdefault(id_, 0.0)
        assert len(table) == len(expected)
    ids, rows = (x.tolist() for x in table.ids_map())
    values = table.embeddings().flatten().tolist()
    assert {id_: values[row] for id_, row in zip(ids, rows, strict=True)} == expected
    assert rows == sorted(rows)
    assert sum(value != 0 for value in values) <= len(ids)  # free rows read as zeros
    deleted = any(what == "delete" for what, _ in program)
    if engine in ("reference", "cpu") and not deleted:  # a GPU's threads take rows in any order
        assert ids == list(expected)
