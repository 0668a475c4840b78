"""The store: bytes known before, equal after; allocated once; one lane never sees another's."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.runtime.store import CacheLayout, CacheSpec, CacheStore

CPU = torch.device("cpu")
SPECS = (
    CacheSpec("l0.slot_ids", (6, 2), torch.int64, CPU, "router", fill=-1),
    CacheSpec("l0.slot_out", (6, 2, 5), torch.float32, CPU, "branch"),
    CacheSpec("l0.attn", (2, 3, 5), torch.bfloat16, CPU, "attention"),
    CacheSpec("l0.c", (4, 3), torch.float64, CPU, "statistic"),
    CacheSpec("l0.none", (0, 3), torch.float32, CPU, "branch"),
    CacheSpec("l0.scalar", (), torch.float32, CPU, "branch"),
)
NBYTES = 6 * 2 * 8 + 6 * 2 * 5 * 4 + 2 * 3 * 5 * 2 + 4 * 3 * 8 + 0 + 4


def test_bytes_are_known_before_and_equal_after() -> None:
    layout = CacheLayout(SPECS)
    assert layout.nbytes == NBYTES == sum(layout.nbytes_by_kind().values())
    assert layout.nbytes_by_kind()["branch"] == 6 * 2 * 5 * 4 + 4
    store = CacheStore(layout)
    assert store.nbytes == 0
    for lanes, lane in enumerate((7, 3), start=1):
        store.tensors(lane)
        assert store.nbytes == layout.nbytes * lanes


def test_tensors_match_their_spec_and_are_never_reallocated() -> None:
    store = CacheStore(CacheLayout(SPECS))
    tensors = store.tensors(0)
    assert list(tensors) == [spec.name for spec in SPECS]
    for spec in SPECS:
        tensor = tensors[spec.name]
        assert (tuple(tensor.shape), tensor.dtype, tensor.device) == (
            spec.shape,
            spec.dtype,
            spec.device,
        )
        assert bool((tensor == spec.fill).all())
    before = [tensor.data_ptr() for tensor in tensors.values()]
    tensors["l0.attn"].add_(1)
    store.tensors(1)
    store.refill(0, "attention")
    assert [tensor.data_ptr() for tensor in store.tensors(0).values()] == before
    assert all(store.tensors(0)[name] is tensor for name, tensor in tensors.items())


def test_lanes_do_not_share_memory() -> None:
    store = CacheStore(CacheLayout(SPECS))
    store.tensors(0)["l0.slot_out"].fill_(3)
    assert float(store.tensors(1)["l0.slot_out"].abs().max()) == 0


def test_refill_touches_one_kind_of_one_lane() -> None:
    store = CacheStore(CacheLayout(SPECS))
    for lane in (0, 1):
        for tensor in store.tensors(lane).values():
            tensor.fill_(2)
    store.refill(0, "router")
    assert bool((store.tensors(0)["l0.slot_ids"] == -1).all())
    assert bool((store.tensors(0)["l0.c"] == 2).all())
    assert bool((store.tensors(1)["l0.slot_ids"] == 2).all())


def test_a_new_lane_takes_the_tensors_of_a_retired_one_and_reset_frees_all() -> None:
    store = CacheStore(CacheLayout(SPECS))
    for lane in (0, 1, 2):
        store.tensors(lane)
    addresses = [tensor.data_ptr() for tensor in store.tensors(1).values()]
    store.retire(1)
    store.retire(99)
    assert store.lanes == (0, 2) and store.nbytes == 3 * NBYTES
    assert [tensor.data_ptr() for tensor in store.tensors(3).values()] == addresses
    assert store.lanes == (0, 2, 3) and store.nbytes == 3 * NBYTES
    assert float(store.tensors(4)["l0.c"].max()) == 0, "none is left: allocated"
    store.retire(0)
    store.retire(2)
    assert store.nbytes == 3 * NBYTES, "one set is kept"
    store.reset()
    assert store.lanes == () and store.nbytes == 0


def test_tensors_allocated_in_inference_mode_can_be_written_outside() -> None:
    store = CacheStore(CacheLayout(SPECS))
    with torch.inference_mode():
        tensors = store.tensors(0)
        tensors["l0.c"].add_(1)
    tensors["l0.c"].add_(1)
    assert not tensors["l0.c"].is_inference() and not tensors["l0.c"].requires_grad
    assert float(tensors["l0.c"].min()) == 2


def test_two_specs_with_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"l0\.c"):
        CacheLayout([*SPECS, SPECS[3]])
