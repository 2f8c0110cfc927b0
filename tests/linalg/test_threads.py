"""Work on threads of our own, and the one number of threads that the process has."""

import threading

import pytest
import torch

from paraboloid.linalg import threads


@pytest.fixture
def two():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_with_one_thread_for_each_operation(two):
    def work(i):
        return i, torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident()

    with torch.no_grad():
        found = threads.side_by_side(work, 3)
    assert [f[:3] for f in found] == [(0, 1, False), (1, 1, False), (2, 1, False)]
    assert len({f[3] for f in found}) > 1 and found[0][3] == threading.get_ident()
    assert threads.side_by_side(work, 1)[0][1:3] == (2, True)  # alone it has all of them
    assert torch.get_num_threads() == 2


def test_tensors_made_in_inference_mode_are_inference_tensors():
    with torch.inference_mode():
        assert all(t.is_inference() for t in threads.side_by_side(lambda i: torch.ones(2), 2))


def test_an_error_of_any_thread_is_raised_and_the_number_of_threads_is_put_back(two):
    def work(i):
        if i == 1:
            raise ValueError("the second")
        return i

    with pytest.raises(ValueError, match="the second"):
        threads.side_by_side(work, 2)
    assert torch.get_num_threads() == 2


def test_changes_that_overlap_leave_the_number_of_threads_as_it_was(two):
    first, second = threads.one_thread(), threads.one_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_num_threads() == 1
    second.__exit__(None, None, None)
    assert torch.get_num_threads() == 2


def test_workers_are_worth_their_start(two):
    cpu = torch.device("cpu")
    assert threads.workers(100, cpu) == 1 and threads.workers(10**8, cpu) == 2
    assert threads.workers(10**8, torch.device("cuda")) == 1
