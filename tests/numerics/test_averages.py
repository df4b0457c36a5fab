import pytest
import torch as th

from sb3_trpo_ext.numerics.averages import StateAverage


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 10, 100])
def test_an_average_does_not_depend_on_the_chunks(chunk_size):
    x = th.randn(10, 4, dtype=th.float64)
    average = StateAverage(10, chunk_size)
    th.testing.assert_close(average(lambda rows: x[rows].sum(dim=0)), x.mean(dim=0))
    assert max(rows.stop - rows.start for rows in average.chunks) <= chunk_size


def test_one_chunk_is_built_once_and_several_each_time():
    for chunk_size, builds in ((10, 1), (5, 4)):
        average, calls = StateAverage(10, chunk_size), []
        built = average.keep_if_whole(calls.append)
        for _ in range(2):
            for rows in average.chunks:
                built(rows)
        assert len(calls) == builds


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        StateAverage(*sizes)
