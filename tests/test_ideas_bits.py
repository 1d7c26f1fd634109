"""the exact invariants of the ideas about few numbers and few bits: where each equals what it is compared
with, a case worked by hand"""
import importlib

import pytest
import torch

from ideas import limit


@pytest.mark.parametrize("name", "limit".split())
def test_a_model_of_ones_own_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"ideas.{name}").main(["--init", "runs/mine"])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and "--init runs/mine has no effect" in error[0]
    assert not (tmp_path / "runs").exists()


# -----------------------------------------------------------------------------
# limit


def test_the_papers_own_extrapolations_of_its_cubic():
    """500k, 1.7m, 4m, 107m, 250m documents stand in its text"""
    said = {512: 500e3, 768: 1.7e6, 1024: 4e6, 3072: 107e6, 4096: 250e6}
    for d, n in said.items():
        assert limit.cubic(d) == pytest.approx(n, rel=0.04)


def test_every_pair_is_found_or_not():
    wanted = limit.relevance(3)
    assert wanted.tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
    documents = torch.eye(3)
    assert limit.all_found(wanted, documents, wanted)
    assert not limit.all_found(wanted[:, [1, 0, 2]], documents, wanted), "two queries exchanged"
    assert not limit.all_found(torch.ones(3, 3), documents, wanted), "a tie finds nothing"


def test_limits_gradient_against_autograd():
    wanted = limit.relevance(5).double()
    vectors = torch.randn(15, 4, dtype=torch.float64, requires_grad=True)
    queries, documents = vectors[:10], vectors[10:]
    logp = (queries @ documents.t() / 0.1).log_softmax(1)
    loss = -torch.stack([logp[i, j] for i, j in wanted.nonzero()]).mean()
    loss.backward()
    found, gradient = limit.loss_and_gradient(vectors.detach(), wanted)
    assert found == pytest.approx(loss.item()) and torch.allclose(gradient, vectors.grad)


def test_four_numbers_find_every_pair_on_a_circle():
    """and no more can be had in the plane: there a pair is found only if the two are neighbors"""
    for n in (3, 10, 100):
        queries, documents = limit.circle(n)
        assert queries.shape[1] == documents.shape[1] == 4
        assert torch.allclose(documents.norm(dim=1), torch.full((n,), 2.0**0.5, dtype=torch.float64))
        assert limit.all_found(queries, documents, limit.relevance(n))
    queries, documents = limit.circle(5)
    t, (a, b) = 2 * torch.pi * torch.arange(5) / 5, (0.0, 2 * torch.pi / 5)
    product = (1 - torch.cos(t - a)) * (1 - torch.cos(t - b))
    scores = documents @ queries[0]
    assert torch.allclose(scores[0] - scores, product.double(), atol=1e-6)
    assert not limit.all_found(queries[:, :2], documents[:, :2], limit.relevance(5))


def test_few_documents_are_solved_and_many_in_a_plane_are_not():
    config = limit.Config(steps=400)
    assert limit.solved("free", 4, 4, config) and limit.solved("frozen", 3, 4, config)
    assert not limit.solved("free", 8, 2, config)
