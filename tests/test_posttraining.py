"Wanda, SparseGPT, LAMP and OBD against closed forms, and through `prune`."
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from neuronprune.allocate import allocate
from neuronprune.core import generator, methods
from neuronprune.data import get_dls
from neuronprune.patterns import best_of
from neuronprune.pipeline import prune
from neuronprune.posttraining import fisher_diagonal, input_moments, obs_prune
from neuronprune.train import fit, learner

rnd = lambda *s, seed=0: torch.randn(*s, generator=generator(seed))


@pytest.mark.parametrize('conv', [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
                                  nn.Conv2d(4, 4, (1, 3), padding=(0, 1), groups=4, padding_mode='circular'),
                                  nn.Conv2d(4, 6, 3, padding='same')])
def test_moments_give_the_output_energy_of_a_convolution(conv):
    x = rnd(5, 4, 8, 8); n, H = input_moments(nn.Sequential(conv), x, ['0'])['0']
    w = conv.weight.detach().double().flatten(1).unflatten(0, (conv.groups, -1))
    y = F.conv2d(F.pad(x, conv._reversed_padding_repeated_twice, mode='circular' if conv.padding_mode == 'circular'
                       else 'constant'), conv.weight, None, conv.stride, 0, conv.dilation, conv.groups)
    torch.testing.assert_close((w @ H @ w.mT).diagonal(dim1=1, dim2=2).flatten(),
                               y.double().square().sum((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert n == 5*y[0, 0].numel()


def test_moments_are_the_same_in_slices():
    net, x = nn.Sequential(nn.Linear(5, 3)), rnd(50, 7, 5)
    a, b = (input_moments(net, x, ['0'], bs=bs)['0'] for bs in (8, 50))
    assert a[0] == b[0] == 350
    torch.testing.assert_close(a[1], b[1])


def test_wanda_is_the_price_of_one_weight():
    "Squared, the error of the layer's output when that weight alone goes."
    lin, x = nn.Sequential(nn.Linear(6, 4)), rnd(30, 6)
    s = methods()['wanda'](lin, batch=(x, torch.zeros(30).long()))['0']
    for i, j in ((0, 0), (3, 5), (2, 1)):
        w = lin[0].weight.detach().clone(); w[i, j] = 0
        assert float((x @ (w-lin[0].weight.detach()).T).square().sum()) == pytest.approx(float(s[i, j])**2, rel=1e-4)


def test_lamp_by_hand_and_its_ties():
    net = nn.Sequential(nn.Linear(4, 1, bias=False)); net[0].weight.data = torch.tensor([[1., -2, 2, 0]])
    torch.testing.assert_close(methods()['lamp'](net)['0'], torch.tensor([[1/9, 4/8, 4/8, 0]]).double())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(.05, .95))
def test_lamp_ranks_a_layer_by_magnitude_and_empties_none(seed, s):
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    for k,l in enumerate(net): l.weight.data = rnd(*l.weight.shape, seed=seed+k)*100**k
    sc = methods()['lamp'](net)
    for k,v in sc.items():
        assert torch.equal(v.flatten().argsort(), net[int(k)].weight.detach().abs().flatten().argsort())
    assert all(v.any() for v in allocate(sc, s).values())
    assert all(float(v.max()) == 1 for v in sc.values())


def test_fisher_is_the_mean_of_squared_single_gradients():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3*4, 4)).train()
    x, y = rnd(9, 1, 4, 4), torch.arange(9) % 4
    got = fisher_diagonal(net, x, y, ['0', '4'], bs=4)
    assert net.training and all(p.grad is None for p in net.parameters())
    net.eval(); want = {k:0. for k in got}
    for i in range(9):
        net.zero_grad(); F.cross_entropy(net(x[i:i+1]), y[i:i+1]).backward()
        for k in want: want[k] = want[k] + net[int(k)].weight.grad.double().square()/9
    for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-4, atol=1e-10)


def test_obs_repairs_as_well_as_the_columns_ahead_can():
    "Column by column, what is lost is what a least squares fit on the columns ahead leaves."
    X = rnd(60, 5).double() @ rnd(5, 5, seed=1).double(); w = rnd(1, 5, seed=2).double()
    new, kept = obs_prune(w, X.T @ X, 1, damp=0.)
    j = int((~kept[0]).nonzero()); rest = X[:, j+1:]
    fit = torch.linalg.lstsq(rest, X[:, j:j+1]*w[0, j]).solution[:, 0] if j < 4 else torch.zeros(0).double()
    torch.testing.assert_close(new[0, j+1:], w[0, j+1:]+fit)
    assert torch.equal(new[0, :j], w[0, :j]) and new[0, j] == 0


def test_obs_takes_the_cheapest_by_brute_force():
    "Of all single weights of a row, the one whose best repair by the columns ahead costs least."
    X = rnd(80, 6, seed=4).double() @ rnd(6, 6, seed=5).double(); w = rnd(1, 6, seed=6).double()
    _, kept = obs_prune(w, X.T @ X, 1, damp=0.)
    def price(j):
        y = X[:, j:j+1]*w[0, j]
        if j == 5: return float(y.square().sum())
        A = X[:, j+1:]; return float((A @ torch.linalg.lstsq(A, y).solution - y).square().sum())
    assert int((~kept[0]).nonzero()) == min(range(6), key=price)


@pytest.mark.parametrize('block', [3, 4, 128])
def test_obs_counts_exactly_and_blocks_only_change_the_order(block):
    X, w = rnd(100, 10).double(), rnd(8, 10, seed=1)
    gone = torch.zeros(8, 10, dtype=torch.bool); gone[0, 3] = gone[5, 9] = True
    new, kept = obs_prune(w, X.T @ X, 35, gone=gone, block=block)
    assert int((~kept).sum()) == 37 and not kept[gone].any() and not new[~kept].any()
    _, two = obs_prune(w[:, :8], (X.T @ X)[:8, :8], pattern=(2, 4), block=block)
    assert (two.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_with_uncorrelated_inputs_obs_is_wanda():
    w, H = rnd(6, 8), torch.diag(torch.arange(1., 9)).double()
    new, kept = obs_prune(w, H, 24, damp=0.)
    s = w.abs()*H.diagonal().sqrt().float()
    assert torch.equal(kept, s >= s.flatten().kthvalue(25).values)
    torch.testing.assert_close(new.float(), w*kept)


@pytest.fixture(scope='module')
def trained():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(),
                        nn.Linear(8*16, 32), nn.ReLU(), nn.Linear(32, 10))
    return fit(learner(net, get_dls('digits', bs=64, device='cpu'), opt='adam', lr=.005), 3)


@pytest.mark.parametrize('name', ['wanda', 'lamp', 'obd', 'sparsegpt'])
def test_prune_takes_them(trained, name):
    import copy
    res = prune(copy.deepcopy(trained), name, .5, fine_tune_epochs=0)
    n = sum(v.numel() for v in res.mask.values()); kept = sum(int(v.sum()) for v in res.mask.values())
    if name != 'wanda': assert kept == n - n//2
    for k,v in res.mask.items(): assert not res.model.get_submodule(k).weight.detach()[~v].any()
    if name == 'wanda':
        assert all((v.flatten(1).sum(1) == v[0].numel()-v[0].numel()//2).all() for v in res.mask.values())
    assert res.rows.pruned_k[0] > .5*res.rows.pruned_n[0]


def test_sparsegpt_beats_its_mask_without_repair_and_keeps_a_pattern(trained):
    import copy
    x = trained.dls.test.one_batch()[0]; trained.model.eval(); dense = trained.model(x).detach()
    res = prune(copy.deepcopy(trained), 'sparsegpt', .5, pattern='2:4', fine_tune_epochs=0)
    bare = copy.deepcopy(trained.model)
    for k,v in res.mask.items():
        w = bare.get_submodule(k).weight; w.data *= v
        if w.shape[1] % 4 == 0: assert torch.equal(v, best_of(v.float(), 2, 4))
    err = lambda m: float((m.eval()(x)-dense).square().mean())
    assert err(res.model) < .7*err(bare)


def test_sparsegpt_is_exact_after_an_uneven_pruning_and_spares_what_it_cannot_repair():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.conv = nn.Linear(64, 40), nn.Conv1d(1, 4, 3)
            self.out, self.never = nn.Linear(4*38, 10), nn.Linear(5, 5)
        def forward(self, x): return self.out(self.conv(self.wide(x.flatten(1))[:, None]).flatten(1))
    learn = learner(Odd(), get_dls('digits', bs=64, device='cpu'), opt='adam', lr=.005)
    prune(learn, 'magnitude', .5, fine_tune_epochs=0)
    before = {k:learn.model.get_submodule(k).weight.detach().clone() for k in ('wide', 'conv', 'out', 'never')}
    res = prune(learn, 'sparsegpt', .7, fine_tune_epochs=0)
    n = sum(v.numel() for v in res.mask.values()); assert sum(int(v.sum()) for v in res.mask.values()) == n - int(.7*n)
    assert set(res.mask.meta['skipped']) == {'conv', 'never'}
    for k in ('conv', 'never'): assert torch.equal(res.model.get_submodule(k).weight, before[k])
    for k,w in before.items(): assert not res.mask[k][w == 0].any()


def test_what_they_refuse():
    with pytest.raises(ValueError, match='wanda needs images'): methods()['wanda'](nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(Exception, match='no layer to score'):
        methods()['wanda'](nn.Sequential(nn.Conv1d(1, 1, 1)), batch=(torch.rand(2, 1, 3), torch.zeros(2).long()))
    with pytest.raises(ValueError, match="did you mean '0'"):
        batch = torch.rand(2, 2), torch.zeros(2).long()
        methods()['wanda'](nn.Sequential(nn.Linear(2, 2)), layers=['00'], batch=batch)
