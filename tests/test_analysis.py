"""What a mask did: rows that count right, attacks with known answers, calibration by hand.
Nothing borrowed is left changed."""
import copy, math
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.data.core import DataLoaders
from hypothesis import given, settings, strategies as st
from sklearn.calibration import calibration_curve
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from neuronprune.allocate import allocate
from neuronprune.analysis import (KINDS, attack, calibration, confidences, ece, fine_tuned, measured, one_shot,
                                  paired, percent, plot_reliability,
                                  plot_robustness, plot_study, reliability, removed, robustness, summary)
from neuronprune.core import layers
from neuronprune.shown import colours
from neuronprune.masks import Mask, Scores
from neuronprune.data import get_dls
from neuronprune.graph import trace
from neuronprune.sources import dense
from neuronprune.surgery import apply
from neuronprune.train import fit, learner
from neuronprune.evaluation import evaluate, wilson
from neuronprune.retrain import MaskCallback

COLUMNS = ['rule', 'k', 'n', 'accuracy', 'lo', 'hi', 'loss', 'units_pruned', 'zeroed_pct', 'params_pct']

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', bs=64, valid_pct=.2)

@pytest.fixture(scope='module')
def learn(dls): return dense(dls, 'fc_baseline', 8, opt='adam', lr=5e-3)

@pytest.fixture(scope='module')
def masks(learn, dls):
    ws = layers(learn.model); graph = trace(learn.model, dls.one_batch()[0]); g = torch.Generator().manual_seed(0)
    weight = Scores({k:m.weight.detach().abs() for k,m in ws.items()}, 'weight')
    channel = Scores({k:m.weight.detach().norm(dim=1) for k,m in list(ws.items())[:-1]}, 'channel', graph=graph)
    idx = lambda n: torch.arange(n)*5//n
    block = Scores({k:torch.rand(5, 5, generator=g) for k in ('fc2', 'fc3')}, 'group',
                   labels={k:tuple(map(idx, ws[k].weight.shape)) for k in ('fc2', 'fc3')})
    return dict(weight=allocate(weight, .7), channel=allocate(channel, .4), group=allocate(block, .6))

def state_of(model):
    return ({k:v.clone() for k,v in model.state_dict().items()}, [m.training for m in model.modules()],
            [(p.requires_grad, p.grad) for p in model.parameters()],
            [len(m._forward_hooks)+len(m._forward_pre_hooks) for m in model.modules()])

def assert_same(a, b): assert all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1:] == b[1:]

@pytest.fixture
def untouched(learn):
    "Weights, modes, flags, hooks, optimiser, histories and the random state are as before."
    old = state_of(learn.model), (learn.opt, learn.n_fits, len(learn.history)), torch.get_rng_state()
    yield
    assert_same(state_of(learn.model), old[0])
    assert (learn.opt, learn.n_fits, len(learn.history)) == old[1] and torch.equal(torch.get_rng_state(), old[2])

# Rows

@pytest.mark.parametrize('unit', ['weight', 'channel', 'group'])
def test_removed_counts_zeros_and_holes(learn, dls, masks, unit):
    m, net = masks[unit], copy.deepcopy(learn.model); n = sum(p.numel() for p in net.parameters())
    for p in net.parameters(): p.data = torch.rand_like(p)+.5 # no zero by accident
    r = removed(net, m, dls.one_batch()[0]); cut = apply(copy.deepcopy(net), m)
    assert r['units_pruned'] == sum(int((~v).sum()) for v in m.values())
    assert (r['zeroed_pct'] == pytest.approx(100*sum(int((p == 0).sum()) for p in cut.parameters())/n)
            and r['zeroed_pct'] > 5)
    if unit == 'channel':
        a, b = (int(m[k].sum()) for k in ('fc1', 'fc2'))
        assert (r['params_pct'] == pytest.approx(100*(1 - (64*a+a + a*b+b + b*10+10)/n))
                and r['params_pct'] > r['zeroed_pct'])
    norm = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    x = torch.rand(2, 1, 4, 4)
    half = removed(norm, Mask({'0': torch.tensor([True, False, True, False])}, 'channel', graph=trace(norm, x)), x)
    # running means are no parameters
    assert half['zeroed_pct'] == pytest.approx(100*20/74) and half['params_pct'] == pytest.approx(100*36/74)
    assert removed(net, None, None) == dict(units_pruned=0, zeroed_pct=0., params_pct=0.)

def test_one_shot(learn, dls, masks, untouched):
    df = one_shot(learn, masks)
    assert list(df) == COLUMNS and list(df.rule) == ['dense', *masks] and (df.n == 359).all()
    for r in df.itertuples():
        e = evaluate(learn.model if r.rule == 'dense' else apply(copy.deepcopy(learn.model), masks[r.rule]), dls.test)
        assert (r.k, r.loss) == (e.k, e.loss) and (r.lo, r.hi) == wilson(r.k, r.n) and r.accuracy == r.k/r.n
    assert df.k.nunique() > 2 and one_shot(learn, {}, dls.valid).n.tolist() == [288]
    own = one_shot(learn, masks, sizes=lambda model, mask, xb: dict(mine=0 if mask is None else len(mask)))
    assert own.mine.tolist() == [0, 3, 2, 2] and 'params_pct' not in own

def test_fine_tuned(learn, masks, untouched):
    a, b = (fine_tuned(learn, masks, 2, lr=1e-3) for _ in range(2)); pd.testing.assert_frame_equal(a, b)
    before = one_shot(learn, masks); assert (a.loss[1:] < before.loss[1:]).all() and a.epochs.tolist() == [2]*4
    assert a.zeroed_pct.tolist() == before.zeroed_pct.tolist()
    assert fine_tuned(learn, masks, 0).k.tolist() == before.k.tolist()
    for k,m in masks.items(): # the same by hand: Adam, the learner's seed and count of fits
        new = learner(copy.deepcopy(learn.model), learn.dls, opt='adam', lr=1e-3)
        fit(new, 2, seed=learn.n_fits, cbs=MaskCallback(m))
        assert a[a.rule == k].loss.item() == evaluate(new, learn.dls.test).loss
    early = fine_tuned(learn, {}, 0, start='init'); net = copy.deepcopy(learn.model)
    net.load_state_dict(learn.rewind.init)
    assert early.k[0] == evaluate(net, learn.dls.test).k

def test_a_scale_is_multiplied_in_once(learn, masks):
    m = masks['weight']; m = Mask(m.units, 'weight', scale={'fc3': torch.full(m['fc3'].shape, 3.)})
    old, new = one_shot(learn, {'m': m}), fine_tuned(learn, {'m': m}, 0)
    assert new.loss.tolist() == old.loss.tolist() and new.loss[1] != one_shot(learn, {'m': masks['weight']}).loss[1]

def test_fine_tuned_refuses_foreign_masks_and_data(learn, masks):
    for kw, words in ((dict(dls=get_dls('digits', size=16)), 'size=16.*size=8'),
                      (dict(dls=get_dls('digits', c_in=3)), 'c_in=3')):
        with pytest.raises(ValueError, match=words): fine_tuned(learn, masks, 1, **kw)
    for bad in (Mask({'fc1': torch.ones(300, dtype=bool)}, 'channel'),
                Mask({'fc9': torch.ones(10, 20, dtype=bool)}, 'weight')):
        with pytest.raises(ValueError, match=r"masks\['x'\]: mask"): fine_tuned(learn, {'x': bad}, 1)
    with pytest.raises(TypeError, match='masks'): fine_tuned(learn, list(masks.values()))

def test_paired_by_hand():
    d = [.1, .2, .3]
    df = pd.DataFrame([dict(seed=i, rule=r, accuracy=.5+v*(r == 'a')) for i,v in enumerate(d) for r in 'ab'])
    r = paired(df, 'a', 'b'); half = 4.302653*.1/math.sqrt(3)
    assert r['difference'] == pytest.approx(.2) and (r['lo'], r['hi']) == pytest.approx((.2-half, .2+half), abs=1e-6)
    assert r['verdict'] == 'inconclusive' and r['pairs'] == 3
    many = pd.concat([df.assign(seed=df.seed+3*i) for i in range(4)])
    assert paired(many, 'a', 'b')['verdict'] == 'higher' and paired(many, 'b', 'a')['verdict'] == 'lower'
    assert paired(many.rename(columns=dict(seed='batch')), 'a', 'b', on='batch')['pairs'] == 12
    with pytest.raises(ValueError, match="rule='c'"): paired(df, 'a', 'c')
    with pytest.raises(ValueError): paired(pd.concat([df, df]), 'a', 'b')

def test_summary_keeps_the_parts_of_the_data_apart():
    df = pd.DataFrame(
        [dict(rule='mip', part=p, accuracy=a) for p,a in (('train', .9), ('train', .8), ('test', .7), ('test', .5))])
    s = summary(df); assert s.repeats.tolist() == [2, 2] and s['mean'].tolist() == pytest.approx([.85, .6])
    assert summary(df.drop(columns='part')).repeats.tolist() == [4] and math.isnan(summary(df[:1])['std'].iloc[0])

def test_plot_study_draws_what_the_rows_say():
    df = pd.DataFrame([dict(rule=r, x=x, k=k, n=10, accuracy=k/10, lo=wilson(k, 10)[0], hi=wilson(k, 10)[1])
                       for r in 'ab' for x,k in ((1, 9), (2, 7))])
    ax = plot_study(df, 'x').axes[0]; assert ax.get_legend_handles_labels()[1] == ['a', 'b'] and ax.get_xlabel() == 'x'
    assert ([l.get_ydata().tolist() for l in ax.lines if len(l.get_ydata()) == 2 and l.get_linestyle() == '-'][0]
            == [90, 70])
    fig, ax = plt.subplots(); assert plot_study(df, 'x', ax=ax) is fig and plt.fignum_exists(fig.number); plt.close(fig)

def test_shares_are_drawn_and_tabled_in_percent():
    df = pd.DataFrame(
        [dict(rule=r, sparsity=s, zeroed_pct=50., units=3, k=9, n=10, accuracy=.9, lo=.6, hi=.98)
         for r in ('mint', 'own') for s in (.5, .75)])
    ax = plot_study(df, 'sparsity').axes[0]
    assert ax.get_xlabel() == 'sparsity, %' and ax.containers[0][0].get_xdata().tolist() == [50, 75]
    assert plot_study(df, 'zeroed_pct').axes[0].get_xlabel() == 'zeroed, %' and plot_study(df, 'units').axes[
        0].get_xlabel() == 'units'
    assert ax.containers[0][0].get_color() == colours(['mint'])['mint'] != ax.containers[1][0].get_color()
    got = percent(df)
    assert list(got) == ['rule', 'sparsity, %', 'zeroed, %', 'units', 'k', 'n', 'accuracy, %', 'lo, %',
                         'hi, %'] and 'lo' in percent(df.drop(columns='accuracy'))
    assert got.iloc[0].tolist()[1:3] == [50, 50] and got['hi, %'].tolist() == pytest.approx([98]*4)

def test_an_interval_that_leaves_what_a_share_can_be_is_left_out():
    df = pd.DataFrame(
        [dict(seed=i, rule=r, accuracy=a, loss=a) for r,v in dict(a=(.99, .9, .999), b=(.5, .51, .52)).items()
         for i,a in enumerate(v)])
    s = summary(df)
    assert math.isnan(s.lo['a']) and math.isnan(s.hi['a']) and 0 < s.lo['b'] < .51 < s.hi['b'] < 1
    assert s.loc['a', ['median', 'min', 'max']].tolist() == [.99, .9, .999] and summary(df, value='loss').hi['a'] > 1
    far = pd.DataFrame(
        [dict(seed=i, rule=r, accuracy=a) for i in range(12) for r,a in (('a', 1.), ('b', .0 if i else .9))])
    r = paired(far, 'a', 'b')
    assert math.isnan(r['hi']) and r['verdict'] == 'higher' and (r['median'], r['min'], r['max']) == (1,
                                                                                                      pytest.approx(
                                                                                                          .1), 1)

# Attacks

def literal(model, x, y, eps, steps, step, kind, project, lo, hi):
    "The two iterations of Kurakin et al. (2017), image by image and pixel by pixel, in doubles."
    model, res = copy.deepcopy(model).double().eval(), []
    for x0,c in zip(x.double(), y):
        if kind == 'least_likely': c = model(x0[None])[0].argmin()
        z = x0.clone()
        for _ in range(steps):
            z.requires_grad_(True); g, = torch.autograd.grad(F.cross_entropy(model(z[None]), c[None]), z)
            z = z.detach() + step*(1 if kind == 'fgsm' else -1)*g.sign(); flat, base = z.view(-1), x0.view(-1)
            for i in range(len(flat)):
                v = float(flat[i])
                if project: v = min(max(v, float(base[i])-eps), float(base[i])+eps); v = min(max(v, lo), hi)
                else: v = min(max(v, lo-eps), hi+eps)
                flat[i] = v
        res.append(z)
    return torch.stack(res)

def smooth(seed=0): # tanh: no gradient is ever exactly 0
    torch.manual_seed(seed); return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('project', [True, False])
def test_attack_equals_the_formula(kind, project):
    net = smooth(); g = torch.Generator().manual_seed(1)
    x, y = torch.rand(6, 3, 2, 2, generator=g), torch.tensor([0, 1, 2, 3, 0, 1])
    a, b = float(x.min()), float(x.max())
    for eps, steps in ((.05, 1), (.1, 5), (.3, 7)):
        want = literal(net, x, y, eps, steps, 2.5*eps/steps if project else eps, kind, project, a, b)
        torch.testing.assert_close(attack(net, x, y, eps, steps=steps, kind=kind, project=project).double(), want,
                                   atol=1e-5, rtol=0)
    want = literal(net, x, y, .1, 3, .02, kind, project, -1., 1.5)
    torch.testing.assert_close(attack(net, x, y, .1, steps=3, step_size=.02, kind=kind, project=project, lo=-1,
                                      hi=1.5).double(), want, atol=1e-5, rtol=0)

@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0, .5), st.integers(1, 6), st.sampled_from(KINDS), st.floats(.001, 2))
def test_projection_stays_in_ball_and_range(seed, eps, steps, kind, step):
    g = torch.Generator().manual_seed(seed); x = torch.rand(5, 3, 2, 2, generator=g)
    y = torch.randint(0, 4, (5,), generator=g)
    z = attack(smooth(seed), x, y, eps, steps=steps, kind=kind, step_size=step, lo=0, hi=1)
    assert (z-x).abs().max() <= eps+1e-6 and z.min() >= 0 and z.max() <= 1
    free = attack(smooth(seed), x, y, eps, steps=steps, kind=kind, project=False, lo=0, hi=1)
    assert free.min() >= -eps-1e-6 and free.max() <= 1+eps+1e-6 and (free-x).abs().max() <= steps*eps+1e-5

@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
def test_linear_has_a_closed_form(seed, eps, project):
    g = torch.Generator().manual_seed(seed); net = nn.Linear(5, 2)
    with torch.no_grad(): net.weight.copy_(torch.randn(2, 5, generator=g))
    x, y = torch.randn(4, 5, generator=g), torch.randint(0, 2, (4,), generator=g); w = net.weight.detach()
    way = (w[1-y]-w[y]).sign()
    z = attack(net, x, y, eps, project=project, lo=-99, hi=99)
    torch.testing.assert_close(z, x + (1 if project else 5)*eps*way, atol=1e-5, rtol=0)

def test_a_linear_binary_network_only_gets_worse():
    g = torch.Generator().manual_seed(3); x, net = torch.randn(400, 6, generator=g), nn.Linear(6, 2)
    y = (x[:, 0] + .5*x[:, 1] > 0).long()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-1., -.5, 0, .1, 0, 0], [1., .5, 0, 0, .1, 0]])); net.bias.zero_()
    ks = robustness({'m': net}, [(x, y)], np.linspace(0, 1.5, 16), 'fgsm').k
    assert (ks.diff().dropna() <= 0).all() and ks.iloc[0] > 380 and ks.iloc[-1] < 40

def test_a_very_sure_network_is_attacked_all_the_same():
    net = nn.Linear(4, 2); x, y = torch.ones(2, 4), torch.tensor([0, 0])
    with torch.no_grad(): net.weight.copy_(torch.tensor([[99.]*4, [-99.]*4]))
    assert F.cross_entropy(net(x), y) == 0 # flat, in floats
    torch.testing.assert_close(attack(net, x, y, .1, lo=-9, hi=9), x-.1)

def test_radius_per_channel():
    eps = torch.tensor([.1, 0., .3]).view(3, 1, 1); x = torch.rand(4, 3, 2, 2)
    d = (attack(smooth(), x, torch.zeros(4).long(), eps, lo=-9, hi=9)-x).abs()
    torch.testing.assert_close(d.amax((0, 2, 3)), eps.flatten(), atol=1e-6, rtol=0)

def test_pixels_outside_the_range_may_stay():
    x = torch.tensor([[-.5, .5, 1.5]]); z = attack(nn.Linear(3, 2), x, torch.tensor([0]), .1, lo=0, hi=1)
    assert (z-x).abs().max() <= .1+1e-6

def test_attack_refuses():
    net, x, y = smooth(), torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
    for kw, words in ((dict(eps=-1), 'eps=-1'), (dict(eps=math.nan), 'eps=nan'), (dict(eps=True), 'eps=True'),
                      (dict(eps=.1, steps=0), 'steps=0'), (dict(eps=.1, kind='fsgm'), "did you mean 'fgsm'"),
                      (dict(eps=.1, step_size=-1), 'step_size=-1')):
        with pytest.raises(ValueError, match=words): attack(net, x, y, **kw)
    with pytest.raises(ValueError, match='xb'): attack(net, x*math.nan, y, .1)
    with pytest.raises(ValueError, match='empty'): attack(net, x[:0], y[:0], .1)
    with torch.no_grad(): net[3].weight.fill_(math.inf)
    with pytest.raises(ValueError, match='outputs of the model'): attack(net, x, y, .1)

def test_attack_leaves_the_model_and_the_images_alone(dls):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.5), nn.Flatten(),
                        nn.Linear(144, 10)).train()
    net[0].requires_grad_(False); net[5].weight.grad = torch.ones_like(net[5].weight); net[1].eval()
    xb, yb = dls.one_batch(); keep, rng, old = xb.clone(), torch.get_rng_state(), state_of(net)
    grad = net[5].weight.grad
    with torch.no_grad(): a = attack(net, xb, yb, .1); b = attack(net, xb, yb, .1)
    assert (torch.equal(a, b) and not a.requires_grad and torch.equal(xb, keep)
            and torch.equal(rng, torch.get_rng_state()))
    assert_same(state_of(net), old); assert net[5].weight.grad is grad and (grad == 1).all()
    with pytest.raises(ValueError): attack(net, xb*1e38*1e5, yb, .1)
    assert_same(state_of(net), old)

# Robustness

def test_robustness(learn, dls, masks, untouched):
    models = {'dense': learn.model, 'cut': apply(copy.deepcopy(learn.model), masks['weight'])}; eps = (0, .05, .2)
    df = robustness(models, dls.test, eps)
    assert (list(df) == ['model', 'kind', 'eps', 'k', 'n', 'accuracy', 'lo', 'hi'] and len(df) == 12
            and (df.n == 359).all())
    for r in df.itertuples():
        bs = [(attack(models[r.model], xb, yb, r.eps, kind=r.kind, lo=0, hi=1), yb) for xb,yb in dls.test]
        assert r.k == evaluate(models[r.model], bs).k and (r.lo, r.hi) == wilson(r.k, r.n)
    worst = df[df.eps == .2]; assert (worst.k.values < df[df.eps == 0].k.values).all()
    fig = plot_robustness(df)
    assert ([a.get_title() for a in fig.axes] == ['fgsm', 'least likely']
            and len(plot_robustness(df[df.kind == 'fgsm']).axes) == 1)
    assert (robustness({'dense': learn.model}, dls.test, .05, 'fgsm').k.tolist()
            == df[(df.model == 'dense') & (df.kind == 'fgsm') & (df.eps == .05)].k.tolist())
    with pytest.raises(TypeError, match='models'): robustness([learn.model], dls.test)
    with pytest.raises(ValueError, match='eps=-1'): robustness(models, dls.test, -1)

def test_radius_in_pixels():
    mean, std = (.3, .4, .5), (.2, .25, .5); kw = dict(c_in=3, valid_pct=.2, bs=64)
    plain, normed = get_dls('digits', normalize='unit', **kw), get_dls('digits', normalize=(mean, std), **kw)
    torch.manual_seed(0); net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    m, s = (torch.tensor(o).repeat_interleave(64) for o in (mean, std))
    inside = copy.deepcopy(net) # the same function of the pixels: W x = (W s) (x - m)/s + W m
    with torch.no_grad(): inside[1].weight.mul_(s); inside[1].bias.add_(net[1].weight @ m)
    a, b = (robustness({'m': net}, plain.test, (0, .03, .1)),
            robustness({'m': inside}, normed.test, (0, .03, .1), pixels=True))
    assert (a.k-b.k).abs().max() <= 1 and a.k.nunique() > 2
    assert (robustness({'m': inside}, normed.test, (.1,)).k.values != b[b.eps == .1].k.values).any()
    with pytest.raises(ValueError, match='pixels=True'):
        robustness({'m': net}, [(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))], pixels=True)

def test_the_loader_is_left_alone_and_not_augmented(learn):
    rough = get_dls('digits', bs=64, valid_pct=.2, augment='crop+flip'); calm = get_dls('digits', bs=64, valid_pct=.2)
    state = rough.train.g.get_state()
    a, b = (robustness({'m': learn.model}, o.train, .05, 'fgsm') for o in (rough, calm))
    assert a.equals(b) and a.n[0] == 1150
    assert calibration(learn.model, rough.train).equals(calibration(learn.model, calm.train))
    assert torch.equal(state, rough.train.g.get_state()) and rough.train.shuffle and rough.train.prep.augment
    x, y = next(iter(calm.test)); torchs = TorchLoader(TensorDataset(x, y), batch_size=10, shuffle=True)
    assert (robustness({'m': learn.model}, torchs, .05, 'fgsm').k[0]
            == evaluate(learn.model, [(attack(learn.model, x, y, .05), y)]).k)
    with pytest.raises(ValueError, match='dl: no batches'): robustness({'m': learn.model}, [])

# Calibration

def test_ece_by_hand():
    df = reliability([.2, .4, .7, .9, .9], [True, False, True, True, False], 2)
    assert (df.n.tolist() == [2, 3] and df.k.tolist() == [1, 2] and df.confidence.tolist() == pytest.approx([.3, 2.5/3])
            and df.accuracy.tolist() == pytest.approx([.5, 2/3]))
    assert ece(df) == pytest.approx(2/5*.2 + 3/5*(2.5/3-2/3)) and (df.lo[1], df.hi[1]) == wilson(2, 3)
    assert ece(reliability([.8]*10, [True, False]*5)) == pytest.approx(.3)
    assert ece(reliability([1., 1.], [True, True])) == 0 and ece(reliability([0., 0.], [True, True])) == 1

def test_a_calibrated_source_has_no_error():
    p = np.repeat(np.arange(1, 15)/15 + .02, 1000)
    right = np.concatenate([np.arange(1000) < 1000*v for v in np.unique(p)])
    assert ece(reliability(p, right)) < 1e-3
    rng = np.random.default_rng(0); p = rng.random(200_000); assert ece(reliability(p, rng.random(len(p)) < p)) < .005
    assert ece(reliability(p, rng.random(len(p)) < p**2)) == pytest.approx(1/6, abs=.005) # integral of p - p^2

@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 20), st.booleans())
def test_reliability_equals_the_loop(seed, n, n_bins, edges):
    rng = np.random.default_rng(seed); p = rng.integers(0, n_bins+1, n)/n_bins if edges else rng.random(n)
    ok = rng.random(n) < .5
    df, total = reliability(p, ok, n_bins), 0.
    ends = np.linspace(0, 1, n_bins+1)
    for b in range(n_bins):
        inside = ((p > ends[b]) | ((b == 0) & (p == 0))) & (p <= ends[b+1])
        assert df.n[b] == inside.sum() and df.k[b] == ok[inside].sum()
        if inside.any(): total += inside.sum()/n*abs(ok[inside].mean()-p[inside].mean())
        else: assert df.loc[b, ['confidence', 'accuracy', 'lo', 'hi']].isna().all()
    assert ece(df) == pytest.approx(total, abs=1e-12) and df.n.sum() == n
    if not edges:
        y, x = calibration_curve(ok, p, n_bins=n_bins); full = df[df.n > 0]
        assert (full.accuracy.tolist() == pytest.approx(y.tolist())
                and full.confidence.tolist() == pytest.approx(x.tolist()))

class Stated(nn.Module):
    "Two classes; the input is the probability of class 1."
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1))
    def forward(self, x): return torch.cat([(1-x).log(), x.log()], 1)*self.w

def test_calibration_of_stated_probabilities():
    p = torch.tensor([.55, .65, .75, .85, .25]); y = torch.tensor([1, 0, 1, 1, 0])
    conf, ok = confidences(Stated(), [(p[:2, None], y[:2]), (p[2:, None], y[2:])])
    assert (conf.tolist() == pytest.approx([.55, .65, .75, .85, .75], abs=1e-6)
            and ok.tolist() == [True, False, True, True, True])
    assert ece(calibration(Stated(), [(p[:, None], y)], 10)) == pytest.approx((.45 + .65 + 2*.25 + .15)/5, abs=1e-6)

def test_calibration_leaves_all_alone(learn, dls, untouched):
    df = calibration(learn.model, dls.test); e = evaluate(learn, dls.test)
    assert df.n.sum() == e.n and df.k.sum() == e.k and len(df) == 15 and 0 < ece(df) < .2
    conf, ok = confidences(learn.model, dls.test)
    assert conf.dtype == np.float64 and ok.dtype == bool and ok.sum() == e.k

def test_bins_with_few_images_are_not_drawn_but_counted():
    p = [.1]*3 + [.5]*20 + [.9]*60; df = reliability(p, [True]*len(p), 5); b = reliability([.8]*10, [True, False]*5)
    for kw,drawn in ((dict(), [[.5, .9], []]), (dict(fewest=10), [[.5, .9], [.8]]),
                     (dict(fewest=1), [[.1, .5, .9], [.8]])):
        top, below = plot_reliability({'a': df, 'b': b}, **kw).axes
        assert top.get_legend_handles_labels()[1] == [f'a, ECE {100*ece(df):.1f} %', 'b, ECE 30.0 %'] and [
            o[0].get_xdata().tolist() for o in top.containers] == [pytest.approx([100*v for v in o]) for o in drawn]
        assert [top.get_ylabel(), below.get_xlabel()] == ['accuracy, %', 'confidence, %'] and top.containers[0][
            0].get_color() == colours(['a', 'b'])['a']
        assert below.get_yscale() == 'log' and below.patches[0].get_data().values.tolist() == [3, 0, 20, 0, 60]
    with pytest.raises(ValueError, match='fewest=0'): plot_reliability({'a': df}, fewest=0)

def test_calibration_refuses(learn, dls):
    for args, words in ((([.5], [True, False]), 'shape'), (([], []), 'shape'), (([1.1], [True]), r'\[0, 1\]'),
                        (([math.nan], [True]), r'\[0, 1\]'), (([.5], [True], 0), 'n_bins=0')):
        with pytest.raises(ValueError, match=words): reliability(*args)
    with pytest.raises(ValueError, match='dl: no batches'): confidences(learn.model, [])
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(ValueError, match='yb'): confidences(learn.model, [(x, torch.tensor([0, 10]))])
    net = copy.deepcopy(learn.model); net.fc1.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match='outputs of the model'): confidences(net, [(x, torch.tensor([0, 1]))])
