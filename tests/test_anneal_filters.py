"""Neighbours of filter masks against dense masked networks: counts, logits, thresholds, drift, what is refused."""
import math, warnings
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
from torch import nn
import neuronprune.core as core
from neuronprune.anneal_convs import _few_in, _few_out, _Stage, _stages
from neuronprune.anneal_filters import FilterEvaluator, _points
from neuronprune.applying import apply
from neuronprune.core import UnsupportedLayerError, copied, generator, kappa
from neuronprune.graph import trace
from neuronprune.masks import Mask, Scores
from neuronprune.models import build, mlp
from neuronprune.surgery import shrink

def jolted(model, seed=0):
    "Biases, scales, shifts and statistics at random."
    gen = generator(seed)
    with torch.no_grad():
        for m in model.modules():
            if getattr(m, 'bias', None) is not None: m.bias.copy_(.3*torch.randn(m.bias.shape, generator=gen))
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(.3*torch.randn(m.running_mean.shape, generator=gen))
                m.running_var.copy_(.5+torch.rand(m.running_var.shape, generator=gen))
                m.weight.copy_(1+.5*torch.randn(m.weight.shape, generator=gen))
    return model

@torch.no_grad()
def masked(model, keep, x):
    "Logits of a chain, the maps of filters that are off set to zero where the next layer reads them."
    name = None
    for n,m in model.named_children():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            if name in keep: x = zeroed(x, keep[name])
            name = n
        elif isinstance(m, nn.Flatten) and name in keep: x, name = zeroed(x, keep[name]), None
        x = m(x)
    return x

def zeroed(x, keep): return x*torch.as_tensor(keep).to(x).view(-1, *[1]*(x.ndim-2))

def right(logits, y): return int((logits.argmax(1) == y).sum())
def keeps(ev, flat): return {k:v.numpy() for k,v in ev.to_mask(flat).items()}
def count(ev, model, flat, x, y): return right(masked(model, keeps(ev, flat), x), y)
def logits(ev): return torch.cat([c.a[-1] for c in ev.chunks]).flatten(1)
def half(ev, s=.5, seed=0): return np.random.default_rng(seed).permutation(ev.n) < kappa(ev.n, s)

def draw(rng, mask, h):
    return [rng.choice(np.flatnonzero(o), h, replace=False) for o in (mask, ~mask)]
def swapped(mask, off, on):
    res = mask.copy(); res[off], res[on] = False, True
    return res

def images(n, *shape, seed=1, classes=10):
    gen = generator(seed)
    return torch.randn(n, *shape, generator=gen), torch.randint(0, classes, (n,), generator=gen)

@pytest.fixture(scope='module')
def net():
    "The zoo's basiccnn, narrow; its evaluator."
    with core.seed_everything(0): model = jolted(build('basiccnn', 3, 10, 32, widths=(16, 32, 36, 48))).eval()
    x, y = images(48, 3, 32, 32)
    return model, x, y, FilterEvaluator(model, x, y, chunk=20)

@pytest.mark.parametrize('s', [.5, .8])
@pytest.mark.parametrize('h', [1, 3, 10])
def test_counts_are_those_of_the_dense_network(net, h, s):
    model, x, y, ev = net
    rng, flat = np.random.default_rng(h), half(ev, s)
    assert ev.reset(flat)*len(y) == count(ev, model, flat, x, y)
    for i in range(25):
        off, on = draw(rng, flat, h); new = swapped(flat, off, on)
        assert ev.propose(off, on)*len(y) == count(ev, model, new, x, y)
        if i % 3: ev.commit(); flat = new
        assert (ev.mask == flat).all()
    assert (logits(ev)-masked(model, keeps(ev, flat), x)).abs().max() < 1e-5

@pytest.mark.parametrize('off', range(4))
@pytest.mark.parametrize('on', range(4))
def test_swaps_between_any_two_layers(net, off, on):
    model, x, y, ev = net
    flat = half(ev, .6, 3); ev.reset(flat)
    inside = lambda l, kept: np.flatnonzero(ev.mask[ev.groups[l]] == kept)+ev.groups[l].start
    for _ in range(2):
        pair = inside(off, True)[:1], inside(on, False)[-1:]
        ev.propose(*pair); flat = swapped(flat, *pair); ev.commit()
        assert (logits(ev)-masked(model, keeps(ev, flat), x)).abs().max() < 1e-5

def test_compact_masked_and_cut_are_one_after_many_commits(net):
    model, x, y, _ = net
    ev = FilterEvaluator(model, x, y, refresh=10**6)
    rng, flat = np.random.default_rng(5), half(ev)
    ev.reset(flat)
    for _ in range(250):
        pair = draw(rng, ev.mask, 1); score = ev.propose(*pair); ev.commit()
    mask = ev.to_mask(ev.mask)
    with torch.no_grad(): zeros, small = apply(copied(model), mask)(x), shrink(model, mask, x)(x)
    assert (logits(ev)-zeros).abs().max() < 1e-5 and (logits(ev)-small).abs().max() < 1e-5
    assert score == ev.score(ev.mask) == right(zeros, y)/len(y)
    ev.reset(ev.mask)
    assert (logits(ev)-zeros).abs().max() < 1e-5

def test_refresh_forgets_the_drift(net):
    model, x, y, _ = net
    ev = FilterEvaluator(model, x, y, refresh=3); ev.reset(half(ev))
    inside = lambda kept: ev.groups[3].start+np.flatnonzero(ev.mask[ev.groups[3]] == kept)[:1]
    for i in range(1, 8):
        ev.chunks[0].z[-1] += 1 # logits gone wrong, which a swap in the last layer only adds to
        ev.propose(inside(True), inside(False)); ev.commit()
        good = (logits(ev)-masked(model, keeps(ev, ev.mask), x)).abs().max() < 1e-5
        assert good == (i % 3 == 0) and ev.commits == i % 3

def test_a_layer_that_is_emptied_and_filled_again(net):
    model, x, y, ev = net
    flat = np.ones(ev.n, dtype=bool); flat[ev.groups[3]] = False; flat[ev.groups[3].start] = True
    ev.reset(flat)
    last = ev.groups[3].start
    for off,on in [([last], [last+5]), ([last+5], []), ([], [last+1, last+2]), ([last+1, last+2], []),
                   (range(0, 16), []), ([], range(0, 16)), ([], range(last, last+48))]:
        off, on = (np.array(o, dtype=int) for o in (off, on))
        got = ev.propose(off, on); ev.commit(); flat = swapped(flat, off, on)
        assert got*len(y) == count(ev, model, flat, x, y)
        assert (logits(ev)-masked(model, keeps(ev, flat), x)).abs().max() < 1e-5

def test_many_empty_places_are_given_back(net):
    model, x, y, ev = net
    ev.reset(np.ones(ev.n, dtype=bool)); o = ev.groups[3]
    ev.propose(np.arange(o.start, o.stop-5), np.array([], dtype=int)); ev.commit()
    assert len(ev.ids[3]) == 8 and ev.chunks[0].a[3].shape[1] == 8

@pytest.mark.parametrize('objective', ['accuracy', 'ce'])
def test_threshold_is_exact_and_chunks_change_nothing(net, objective):
    model, x, y, _ = net
    evs = [FilterEvaluator(model, x, y, objective=objective, chunk=c) for c in (48, 7, 1)]
    flat, rng = half(evs[0]), np.random.default_rng(2)
    start = [ev.reset(flat) for ev in evs]
    assert np.ptp(start) < 1e-6
    early = 0
    for _ in range(12):
        pair = draw(rng, flat, 4); true = evs[0].propose(*pair)
        for t in (start[0], true, np.nextafter(true, 9), true+.3, -math.inf):
            for ev in evs[1:]:
                got = ev.propose(*pair, threshold=t)
                if true >= t+1e-6 or objective == 'accuracy' and true >= t: assert abs(got-true) < 1e-6
                elif true < t-1e-6: assert got < t and got >= true-1e-6; early += ev._pending is None
    assert early

def test_commit_needs_a_score_in_full(net):
    _, _, y, ev = net
    ev.reset(half(ev)); pair = draw(np.random.default_rng(0), ev.mask, 1); before = ev.mask.copy()
    assert ev.propose(*pair, threshold=2) < 2
    with pytest.raises(ValueError, match='no proposal that was scored in full'): ev.commit()
    assert (ev.mask == before).all()
    ev.propose(*pair); ev.commit()
    with pytest.raises(ValueError, match='no proposal'): ev.commit()

def test_proposals_leave_the_state_alone(net):
    model, x, y, ev = net
    ev.reset(half(ev)); rng = np.random.default_rng(8)
    pairs = [draw(rng, ev.mask, h) for h in (1, 1, 2, 5, 20, 40)*2]
    first = [ev.propose(*p) for p in pairs]
    assert first == [ev.propose(*p) for p in pairs]
    assert (logits(ev)-masked(model, keeps(ev, ev.mask), x)).abs().max() < 1e-5

# Odd networks

def test_ties_go_to_the_first_class():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    with torch.no_grad(): [p.zero_() for p in model.parameters()]
    x, _ = images(8, 1, 4, 4); y = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    ev = FilterEvaluator(model, x, y)
    assert ev.reset(np.array([True, False, True])) == .25 and ev.propose([0], [1]) == .25
    assert FilterEvaluator(model, x, y*0+3).score(np.ones(3, dtype=bool)) == 0

def test_nan_logits_count_as_wrong_and_are_told_once():
    "Filter 0 overflows, and the linear layer subtracts infinity from infinity."
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        for p in model.parameters(): p.fill_(.1)
        model[0].weight[0], model[2].weight[1], model[2].weight[:, :4] = 3e38, -.2, torch.tensor([.1, -.1, .1, -.1])
    x, y = torch.ones(6, 1, 4, 4), torch.zeros(6, dtype=torch.int64)
    ev, some = FilterEvaluator(model, x, y, chunk=3), np.arange(16) < 8
    with pytest.warns(UserWarning, match='NaN') as told: assert ev.reset(some) == ev.score(some) == 0
    assert len([o for o in told if 'NaN' in str(o.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fine = swapped(some, [0], [9])
        assert ev.propose([1], [9]) == 0 and ev.propose([0], [9]) == ev.score(fine) == 1
        ev.commit(); assert (ev.mask == fine).all() and ev.propose([1], [10]) == 1 and ev.propose([1], [0]) == 0

def test_points_of_nan():
    z, y = torch.tensor([[math.nan, 1.], [2, 1], [0, 0]]), torch.tensor([0, 0, 0])
    assert _points(z, y, 'accuracy') == 2 and _points(z, y, 'ce') == -math.inf
    assert _points(z[1:], y[1:], 'ce') == pytest.approx(-math.log(1+math.exp(-1))-math.log(2))

def test_layers_of_one_filter():
    with core.seed_everything(0): model = jolted(nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.ReLU(),
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))).eval()
    x, y = images(20, 1, 8, 8, classes=3)
    ev = FilterEvaluator(model, x, y, Scores({k:torch.zeros(n) for k,n in (('0', 1), ('3', 6), ('5', 1))}, 'channel'))
    flat = np.array([1, 1, 0, 0, 0, 0, 0, 1], dtype=bool)
    assert ev.reset(flat)*20 == count(ev, model, flat, x, y)
    for j in range(2, 7):
        assert ev.propose([j-1], [j])*20 == count(ev, model, swapped(flat, [j-1], [j]), x, y)
        ev.commit(); flat = swapped(flat, [j-1], [j])
    assert ev.propose([0], [1])*20 == count(ev, model, swapped(flat, [0], [1]), x, y)

def test_neurons_of_an_mlp_and_of_a_head():
    with core.seed_everything(0):
        dense = jolted(mlp((40, 30), 1, 10, 8)).eval()
        lenet = jolted(build('lenet5', 1, 10, 20)).eval()
    for model,size in ((dense, 8), (lenet, 20)):
        x, y = images(60, 1, size, size); ev = FilterEvaluator(model, x, y)
        assert ev.names == list(trace(model, x).removable)
        flat, rng = half(ev), np.random.default_rng(0); ev.reset(flat)
        for _ in range(30):
            pair = draw(rng, ev.mask, 1); new = swapped(ev.mask, *pair)
            assert ev.propose(*pair)*60 == count(ev, model, new, x, y); ev.commit()
        with torch.no_grad(): cut = shrink(model, ev.to_mask(ev.mask), x)(x)
        assert (logits(ev)-cut).abs().max() < 1e-5
    rows, y = images(30, 12); net = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 10))
    ev = FilterEvaluator(net, rows, y); flat = half(ev); ev.reset(flat)
    assert ev.propose(*draw(rng, flat, 1)) >= 0 and ev.score(flat)*30 == count(ev, net, flat, rows, y)

@pytest.mark.parametrize('pool', [nn.MaxPool2d, nn.AvgPool2d])
def test_vgg(pool):
    with core.seed_everything(0): model = jolted(build('vgg16', 3, 10, 32, head=(20,), pool=pool)).eval()
    x, y = images(4, 3, 32, 32); g = trace(model, x)
    keys = [k for k in g.removable if k in ('conv2', 'conv11', 'conv13', 'fc1')]
    ev = FilterEvaluator(model, x, y, Scores({k:torch.zeros(g.layers[k]['n_out']) for k in keys}, 'channel', graph=g))
    ev.reset(half(ev)); rng = np.random.default_rng(0)
    for _ in range(3): ev.propose(*draw(rng, ev.mask, 2)); ev.commit()
    want = apply(copied(model), ev.to_mask(ev.mask))(x)
    assert (logits(ev)-want).abs().max() < 1e-5*max(1, want.abs().max())

# Chains at random

@st.composite
def chains(draw):
    "A chain, the side of its images and their channels."
    c = draw(st.integers(1, 3)); side = draw(st.integers(5, 9)); shape = c, side; body, k = [], c
    for _ in range(draw(st.integers(1, 3))):
        w, ks = draw(st.integers(1, 20)), draw(st.integers(1, 3))
        step, pad = draw(st.integers(1, 2)), draw(st.integers(0, 1))
        if (side+2*pad-ks)//step+1 < 1: continue
        body.append(nn.Conv2d(k, w, ks, step, pad, bias=draw(st.booleans()))); k, side = w, (side+2*pad-ks)//step+1
        for o in draw(st.permutations(['act', 'norm', 'pool', 'drop']))[:draw(st.integers(0, 4))]:
            if o == 'act': body.append(draw(st.sampled_from([nn.ReLU(), nn.ReLU(True), nn.Tanh(), nn.LeakyReLU(.2)])))
            elif o == 'norm': body.append(nn.BatchNorm2d(k))
            elif o == 'drop': body.append(nn.Dropout(.5))
            elif side > 1: body.append(draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))(2)); side //= 2
    assume(body)
    if draw(st.booleans()): body.append(nn.AdaptiveAvgPool2d(1)); side = 1
    body.append(nn.Flatten()); n = k*side*side
    if draw(st.booleans()): body += [nn.Linear(n, 6), nn.BatchNorm1d(6), nn.ReLU()]; n = 6
    return nn.Sequential(*body, nn.Linear(n, 4)), shape

@settings(max_examples=60)
@given(chains(), st.integers(0, 10**6))
def test_any_chain(chain, seed):
    model, (c, side) = chain
    with core.seed_everything(seed):
        for m in model.modules(): hasattr(m, 'reset_parameters') and m.reset_parameters()
    model = jolted(model, seed).eval(); x, y = images(9, c, side, side, seed=seed, classes=4)
    widths = {n:len(m.weight) for n,m in model.named_children() if isinstance(m, (nn.Conv2d, nn.Linear))}
    widths.popitem()
    ev = FilterEvaluator(model, x, y, Scores({k:torch.zeros(n) for k,n in widths.items()}, 'channel'), chunk=4)
    rng = np.random.default_rng(seed); flat = rng.random(ev.n) < .5; ev.reset(flat)
    close = lambda flat: torch.allclose(logits(ev), masked(model, keeps(ev, flat), x), 1e-4, 1e-5)
    assert close(flat)
    for _ in range(6):
        h = min(rng.integers(1, 4), flat.sum(), (~flat).sum())
        if h < 1: break
        pair = draw(rng, flat, h); ev.propose(*pair); ev.commit(); flat = swapped(flat, *pair)
        assert close(flat)

# Slopes, masks, what is left as it was

def test_slopes_are_finite_differences():
    with core.seed_everything(0): model = jolted(build('basiccnn', 3, 10, 20, widths=(4, 5, 6, 7))).eval().double()
    x, y = images(12, 3, 20, 20); x = x.double(); ev = FilterEvaluator(model, x, y, chunk=5)
    flat = half(ev); ev.reset(flat); S, eps = ev.sensitivity(), 1e-5
    def loss(i, d):
        soft = flat.astype(float); soft[i] += d
        return F.cross_entropy(masked(model, {k:soft[o] for k,o in ev.parts.items()}, x), y).item()
    for i in range(ev.n): assert S[i] == pytest.approx((loss(i, eps)-loss(i, -eps))/(2*eps), abs=1e-7)

def test_masks_and_their_order(net):
    model, x, y, _ = net
    g = trace(model, x); order = ['conv3', 'conv1']
    ev = FilterEvaluator(model, x, y, Scores({k:torch.zeros(g.layers[k]['n_out']) for k in order}, 'channel', graph=g))
    assert ev.names == order and ev.groups == [slice(0, 36), slice(36, 52)] and ev.n == 52 and ev.quantum == 1/48
    flat = half(ev); mask = ev.to_mask(flat)
    assert list(mask) == order and (ev.from_mask(mask) == flat).all()
    assert ev.score(flat)*48 == right(apply(copied(model), mask)(x), y)
    assert (ev.batch(np.stack([flat, ~flat])) == [ev.score(flat), ev.score(~flat)]).all()

def test_filters_that_went_before_stay_off(net):
    model, x, y, _ = net
    g = trace(model, x); gone = {'conv2': torch.arange(32) % 2 == 0, 'conv1': torch.ones(16).bool()}
    zeros = {k:torch.zeros(g.layers[k]['n_out']) for k in g.removable}
    ev = FilterEvaluator(model, x, y, Scores(zeros, 'channel', graph=g, gone=gone))
    assert ev.n == 16+36+48 and ev.names == ['conv2', 'conv3', 'conv4']
    flat = half(ev); ev.reset(flat); rng = np.random.default_rng(0)
    assert not (ev.to_mask(flat)['conv2'] & gone['conv2']).any() and not ev.to_mask(flat)['conv1'].any()
    for _ in range(8):
        pair = draw(rng, ev.mask, 1); new = swapped(ev.mask, *pair)
        assert ev.propose(*pair)*48 == count(ev, model, new, x, y); ev.commit()
    assert len(ev.sensitivity()) == ev.n and (ev.from_mask(ev.to_mask(ev.mask)) == ev.mask).all()
    with pytest.raises(ValueError, match='all of them have gone'):
        FilterEvaluator(model, x, y, Scores({'conv1': torch.zeros(16)}, 'channel', gone={'conv1': gone['conv1']}))

def test_the_model_is_left_alone(net):
    model, x, y, _ = net
    model = copied(model).train(); model.bn2.eval()
    before, modes = {k:v.clone() for k,v in model.state_dict().items()}, [m.training for m in model.modules()]
    ev = FilterEvaluator(model, x, y); ev.reset(half(ev)); ev.propose(*draw(np.random.default_rng(0), ev.mask, 3))
    ev.commit(); ev.sensitivity()
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()] and all(p.grad is None for p in model.parameters())
    score = ev.score(ev.mask); [p.data.zero_() for p in model.parameters()]
    assert ev.score(ev.mask) == score, 'the weights were copied'

# What is refused

class Residual(nn.Module):
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 3, 3, padding=1)
    def forward(self, x): return x + self.conv(x)

class Doubled(nn.Sequential):
    def forward(self, x): return 2*super().forward(x)

conv, shared = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 3)
tail = lambda n: (nn.Flatten(), nn.Linear(n, 2))
REFUSED = dict(
    residual=((Residual(), *tail(108)), "'0' is a Residual"), plain=(None, "'it' is a Residual"),
    groups=((conv, nn.Conv2d(4, 4, 3, groups=2), *tail(16)), "'1' is a Conv2d, in 2 groups"),
    depthwise=((conv, nn.Conv2d(4, 4, 3, groups=4), *tail(16)), "in 4 groups"),
    circular=((nn.Conv2d(3, 4, 3, padding=1, padding_mode='circular'), *tail(144)), "padding_mode='circular'"),
    sigmoid=((conv, nn.Sigmoid(), *tail(64)), "'1' is a Sigmoid"),
    softmax=((conv, *tail(64), nn.Softmax(1)), 'Softmax'),
    norm=((conv, nn.BatchNorm2d(4, affine=False), *tail(64)), "without a scale"),
    batch=((conv, nn.BatchNorm2d(4, track_running_stats=False), *tail(64)), "without statistics"),
    first=((nn.ReLU(), conv, *tail(64)), "before the first layer"), unflat=((nn.Linear(6, 2),), "no Flatten"),
    maps=((conv,), "no row of numbers"), shared=((shared, nn.ReLU(), shared, *tail(12)), "shares its weight"),
    doubled=((Doubled(conv), *tail(64)), "'0.' is a Doubled"), layernorm=((conv, nn.Flatten(), nn.LayerNorm(64),
                                                                         nn.Linear(64, 2)), 'LayerNorm'))

@pytest.mark.parametrize('name', REFUSED)
def test_refused(name):
    parts, said = REFUSED[name]; x, y = images(4, 3, 6, 6, classes=2)
    model = Residual() if parts is None else nn.Sequential(*parts)
    with pytest.raises(UnsupportedLayerError) as e: _stages(model, x)
    assert said in str(e.value) and 'expected a chain' in str(e.value)

def test_wrong_inputs(net, monkeypatch):
    model, x, y, ev = net; zeros = {'conv1': torch.zeros(16)}
    for args,kw,said in [((model, x[:0], y[:0]), {}, 'the batch is empty'), ((model, x, y+9), {}, 'yb: labels from'),
                         ((model, x, y[:5]), {}, 'yb: 5 labels for 48'), ((model, x*math.nan, y), {}, 'xb: .* NaN'),
                         ((model, x, y), dict(chunk=0), 'chunk=0'), ((model, x, y), dict(refresh=0), 'refresh=0'),
                         ((model, x, y), dict(objective='loss'), "objective='loss'"),
                         ((model, x[:, :, :20, :20], y), {}, 'cannot digest'),
                         ((model, x[:, :2], y), {}, 'cannot digest'),
                         ((model, x, y, Scores(zeros, 'weight')), {}, "candidates: unit='weight'"),
                         ((model, x, y, Scores({'conv9': torch.zeros(3)}, 'channel')), {}, "candidates: 'conv9'"),
                         ((model, x, y, Scores({'conv1': torch.zeros(3)}, 'channel')), {}, 'the layer has 16')]:
        with pytest.raises(ValueError, match=said): FilterEvaluator(*args, **kw)
    for wrong,said in [(x[:, :, :20, :20], "'fc' reads 768 numbers, a map of 48 channels, 1x1"),
                       (x[:, :2], "'conv1' reads 3 channels, 2 arrive")]:
        with pytest.raises(ValueError, match=said): _stages(model, wrong)
    bad = copied(model); bad.conv2.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="weight of 'conv2'"): FilterEvaluator(bad, x, y, Scores(zeros, 'channel'))
    with pytest.raises(ValueError, match='expected reset'): FilterEvaluator(model, x, y).propose([0], [1])
    for off,on,said in [([0], [0], 'each once'), ([0, 0], [1, 2], 'each once'), ([0], [500], 'from 0 to')]:
        ev.reset(np.arange(ev.n) == 0)
        with pytest.raises(ValueError, match=said): ev.propose(off, on)
    for mask,err in [(np.ones(3, dtype=bool), ValueError), (np.ones(ev.n), TypeError)]:
        for f in (ev.reset, ev.score, ev.to_mask):
            with pytest.raises(err, match='mask: '): f(mask)
    monkeypatch.setattr(core, 'memory_size', lambda: 1e6)
    with pytest.raises(ValueError, match='xb: the maps of 48 images'): FilterEvaluator(model, x, y)

# Thin convolutions

@pytest.mark.filterwarnings('ignore:Using padding')
@pytest.mark.parametrize('pad', [0, 1, 'same', 'valid', (2, 1)])
@pytest.mark.parametrize('ks', [(3, 3), (2, 3), (4, 1)])
@pytest.mark.parametrize('gap', [1, 2])
def test_thin_convolutions(pad, ks, gap):
    gen = generator(0); few = nn.Conv2d(2, 7, ks, padding=pad, dilation=gap); x = torch.randn(3, 2, 9, 8, generator=gen)
    with torch.no_grad(): want = few(x)-few.bias[:,None,None]
    assert torch.allclose(_few_in(_Stage('a', few, (2, 9, 8)), x, few.weight.detach()), want, atol=1e-5)
    if gap > 1: return
    thin, x = nn.Conv2d(7, 2, ks, padding=pad), torch.randn(3, 7, 9, 8, generator=gen); s = _Stage('b', thin, (7, 9, 8))
    with torch.no_grad(): assert torch.allclose(_few_out(s, x, thin.weight, thin.bias), thin(x), atol=1e-5)

def test_wide_swaps_on_small_maps():
    "More filters at once than the thin ways take, and maps of 2 to 4 pixels, which have their own."
    for size in (6, 5, 4):
        with core.seed_everything(size): model = jolted(nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 80, 3), nn.BatchNorm2d(80), nn.ReLU(), nn.Flatten(), nn.Linear(80*(size-2)**2, 10))).eval()
        x, y = images(9, 3, size, size); ev = FilterEvaluator(model, x, y, chunk=4)
        assert ev.stages[1].toom is not None
        ev.reset(half(ev, .4)); rng = np.random.default_rng(0)
        for h in (5, 1, 9, 2):
            ev.propose(*draw(rng, ev.mask, h)); ev.commit()
            assert (logits(ev)-masked(model, keeps(ev, ev.mask), x)).abs().max() < 1e-5

def test_masks_in_one_pass(net):
    "The way of graphics cards, on a processor: many masks as groups of one network, empty layers among them."
    _, _, _, ev = net
    masks = [half(ev, s, i) for i,s in enumerate((.5, .8, .1, .9, .3))] + [np.zeros(ev.n, dtype=bool)]
    assert (ev._batch(masks) == [ev.score(m) for m in masks]).all() and (ev.batch(masks) == ev._batch(masks)).all()
    small = mlp((40, 30), 1, 10, 8); x, y = images(30, 1, 8, 8); ev = FilterEvaluator(small, x, y, chunk=11)
    masks = [half(ev, s, i) for i,s in enumerate((.5, .8, .1))]
    assert (ev._batch(masks) == [ev.score(m) for m in masks]).all()

@pytest.mark.parametrize('act,scales,folded', [
    (nn.ReLU, [(2., 0.)], 1), (nn.ReLU, [(-2., 0.)], 0), (nn.ReLU, [(2., .3)], 0), (nn.ReLU, [(2., .3), (3., 0.)], 0),
    (nn.Tanh, [(2., 0.)], 0), (nn.LeakyReLU, [(2., 0.), (.5, 0.)], 2), (nn.ReLU, [(2., 0.), (.5, 1.)], 1)])
def test_norms_that_go_into_the_weights(act, scales, folded):
    norms = [nn.BatchNorm2d(6) for _ in scales]
    for m,(scale,shift) in zip(norms, scales): m.weight.data[2:4], m.bias.data[1:] = scale, shift
    with core.seed_everything(0):
        model = nn.Sequential(nn.Conv2d(1, 6, 3), act(), *norms, nn.Flatten(), nn.Linear(24, 3)).eval()
    x, y = images(12, 1, 4, 4, classes=3); ev = FilterEvaluator(model, x, y, Scores({'0': torch.zeros(6)}, 'channel'))
    assert len(ev.stages[0].post) == 1+len(scales)-folded
    flat = np.arange(6) % 2 == 0; ev.reset(flat); ev.propose([2], [3]); ev.commit()
    assert (logits(ev)-masked(model, keeps(ev, ev.mask), x)).abs().max() < 1e-5
