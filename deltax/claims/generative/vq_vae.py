"""Claims of vq-vae: the paper's equations, parity with peers, and what it measures."""

import warnings

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltax import claim
from deltax.papers.generative.vq_vae import Codebook, MovingCodebook, usage
from deltax.parts.model.autoencoder import decibels, squared


@torch.no_grad()
def told(run) -> tuple[float, Int64[Tensor, "B ..."]]:
    """Decibels of a trained autoencoder on held-out images, and the codes of the training images."""
    held, seen = run.task.all(), run.task.all("train")
    error = squared(run.model(held.images).pixels, held.images).double().mean().item()
    return decibels(error), run.model.encode(seen.images).codes


@claim
def the_encoder_gets_the_decoders_gradient():
    """Whatever the decoder says of the codes it was given reaches the encoder's output unchanged, and nothing of it
    reaches the codebook."""
    torch.manual_seed(0)
    book = Codebook(codes=7, width=5).double()
    latent = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    passed = book(latent).latent
    passed.retain_grad()
    (passed.sin() * torch.randn_like(passed)).sum().backward()
    assert torch.equal(latent.grad, passed.grad)
    assert book.table.grad is None or not book.table.grad.any()


@claim
def each_code_is_the_nearest_and_each_side_has_its_pull():
    """No entry lies nearer to a vector than its own, and the charge's gradient is 2 (e - z) summed over those who
    chose e for the codebook, and a quarter of 2 (z - e) for the encoder, over the size of the latent."""
    torch.manual_seed(0)
    book = Codebook(codes=7, width=5).double()
    nn.init.normal_(book.table)
    latent = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    passed = book(latent)
    vectors, codes = latent.detach().movedim(1, -1).flatten(0, 2), passed.codes.flatten()
    assert torch.equal(torch.cdist(vectors, book.table.detach()).argmin(1), codes)
    torch.testing.assert_close(passed.latent, book.table[passed.codes].movedim(-1, 1))
    passed.cost.sum().backward()
    size = latent[0].numel()
    away = vectors - book.table.detach()[codes]
    torch.testing.assert_close(latent.grad.movedim(1, -1).flatten(0, 2), 0.25 * 2 * away / size)
    pulled = torch.zeros_like(book.table).index_add(0, codes, -2 * away / size)
    torch.testing.assert_close(book.table.grad, pulled)


@claim
def an_entry_that_is_not_looked_up_dies():
    """Without look-ups an entry e is e decay^t / (decay^t + smoothing) after t batches, but for the common factor of
    the counts, and ends at zero, wherever the vectors are; with `revive` it becomes, bar smoothing, a vector of the
    batch in the step in which its count falls below that, and is looked up again."""
    torch.manual_seed(0)
    near, far = torch.randn(3, 50, dtype=torch.float64), torch.tensor([1e3, 0, 0], dtype=torch.float64)
    near[1] += 50
    for revive in (0.0, 0.5):
        book = MovingCodebook(codes=2, width=3, decay=0.9, revive=revive).double().train()
        book.sums.copy_(torch.stack([near[:, 0], far]))
        book.table.copy_(book.sums)
        ends = []
        for step in range(1, 301):
            codes = book(near[None]).codes
            assert codes.any() == bool(revive and step > 7)
            ends.append(book.table[1].clone())
            if revive and step == 7:  # 0.9^7 < 0.5 <= 0.9^6
                assert (book.table[1] - near.T).norm(dim=1).min() < 1e-2 and book.counts[1] == revive
        if not revive:
            left = 0.9 ** torch.arange(1, 301, dtype=torch.float64)
            total = left + 50 - 49 * left
            smoothed = (left + 1e-5) / (total + 2e-5) * total
            torch.testing.assert_close(torch.stack(ends)[:, 0], 1e3 * left / smoothed)
            assert ends[-1].abs().max() < 1e-4 and not codes.any()
        else:
            assert usage(book.eval()(near[None]).codes, 2)[0] == 1.0


@claim.parity(peer="scikit-learn KMeans of one iteration")
def without_memory_it_is_a_step_of_k_means():
    """Moving means that forget at once take on a batch the step of Lloyd's algorithm that scikit-learn takes."""
    from sklearn.cluster import KMeans

    torch.manual_seed(0)
    vectors = torch.randn(101, 3, dtype=torch.float64)
    book = MovingCodebook(codes=8, width=3, decay=0.0, smoothing=0.0).double()
    book.table.copy_(vectors[:8])
    peer = KMeans(8, init=vectors[:8].numpy(), n_init=1, max_iter=1, algorithm="lloyd")
    with warnings.catch_warnings(action="ignore"):  # that one iteration has not converged
        centres = peer.fit(vectors.numpy()).cluster_centers_
    book.train()(vectors.mT[None])
    torch.testing.assert_close(book.table, torch.from_numpy(centres))


@claim.parity(peer="vector-quantize-pytorch VectorQuantize")
def equals_vector_quantize():
    """The same codebook gives the same codes, vectors and commitment, and after a training batch the same moving means,
    of both the counts and the entries."""
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    book = MovingCodebook(codes=9, width=5, decay=0.8)
    peer = VectorQuantize(dim=5, codebook_size=9, decay=0.8, commitment_weight=0.25, eps=1e-5, rotation_trick=False)
    peer._codebook.embed.copy_(book.table[None])
    peer._codebook.embed_avg.copy_(book.sums[None])
    peer._codebook.cluster_size.copy_(book.counts[None])
    latent = torch.randn(2, 5, 12, requires_grad=True)
    ours, (theirs, codes, cost) = book.train()(latent), peer.train()(latent.mT)
    assert torch.equal(ours.codes, codes)
    torch.testing.assert_close(ours.latent, theirs.mT)
    torch.testing.assert_close(ours.cost.mean(), cost.squeeze())
    weight = torch.randn(2, 5, 12)
    ours, theirs = ((x * weight).sum() + y for x, y in ((ours.latent, ours.cost.mean()), (theirs.mT, cost.squeeze())))
    torch.testing.assert_close(*(torch.autograd.grad(y, latent)[0] for y in (ours, theirs)))
    torch.testing.assert_close(book.counts, peer._codebook.cluster_size[0])
    torch.testing.assert_close(book.table, peer._codebook.embed[0])


@claim.measured(paper="CIFAR-10 at 4.67 bits a dimension, a VAE at 4.51 (section 4.1)")
def more_codes_draw_better(lab):
    """On held-out digits of four codes each, 64 entries reconstruct at least 2 dB better than 4."""
    gains, numbers = [], {}
    for seed in lab.seeds(3):
        found = {}
        for entries in (4, 16, 64):
            found[entries], codes = told(lab.train(f"vq-vae(codes={entries})", seed=seed))
            numbers.setdefault(f"{entries} codes: dB", []).append(found[entries])
            numbers.setdefault(f"{entries} codes: perplexity", []).append(usage(codes, entries)[1])
        gains.append(found[64] - found[4])
    return lab.at_least(gains, 2.0, unit="dB", numbers=numbers)
