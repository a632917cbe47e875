import distributed_worker
import pytest
import torch
from launching import run_together


# Weights are float64.
TOLERANCE = {"atol": 1e-12, "rtol": 1e-12}


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=["two processes", "three processes"]
)
def outcomes(request, tmp_path_factory) -> list[dict]:
    """What real processes, each with its share of the batch, computed: by rank, then by objective."""
    path = tmp_path_factory.mktemp("distributed")
    finished = run_together(distributed_worker.__file__, path, num_processes=request.param)
    assert finished.returncode == 0, finished.stderr
    return [torch.load(path / f"rank_{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("objective", distributed_worker.OBJECTIVES)
def test_processes_on_shares_of_a_batch_equal_one_process_on_the_whole(outcomes, objective):
    model = distributed_worker.seeded_model(objective)
    loss = model(**distributed_worker.joined_batch()).loss
    loss.backward()
    expected = distributed_worker.outcome(model, loss)
    by_rank = [outcome[objective] for outcome in outcomes]

    mean_loss = torch.stack([outcome["loss"] for outcome in by_rank]).mean()
    torch.testing.assert_close(mean_loss, expected["loss"], **TOLERANCE)
    for outcome in by_rank:
        for name, gradient in expected["gradients"].items():
            largest = gradient.abs().max().item()
            assert largest > 0, name
            torch.testing.assert_close(
                outcome["gradients"][name], gradient, atol=1e-10 * max(largest, 1), rtol=1e-10, msg=name
            )
        for name, buffer in expected["buffers"].items():
            torch.testing.assert_close(outcome["buffers"][name], buffer, **TOLERANCE, msg=name)


@pytest.mark.parametrize("objective", distributed_worker.OBJECTIVES)
def test_processes_exchange_as_seldom_as_they_can(outcomes, objective):
    # The statistics of the projector's batch norms and the projections, of both views at once; SimSiam compares a pair
    # where it is. The backward pass sends as many back.
    assert {outcome[objective]["exchanges"] for outcome in outcomes} == {4 if objective == "simsiam" else 6}
