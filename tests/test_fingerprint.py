"""What a folder of `prune` is known by: everything that decides the result, and nothing that does not."""
import json, random
import numpy as np, pytest, torch
from functools import partial
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from neuronprune import pipeline as P
from neuronprune.core import seed_everything
from neuronprune.data import get_dls
from neuronprune.fingerprint import described, fingerprint
from neuronprune.masks import Scores
from neuronprune.pipeline import prune
from neuronprune.train import as_learner, learner

with seed_everything(0): X = torch.randn(64, 4)
Y = (X[:, 0] > 0).long()

def loader(x=X, bs=16, **kw): return DataLoader(TensorDataset(x, Y), bs, **{**dict(shuffle=True), **kw})
def made(train=None, loss=None, **kw):
    with seed_everything(0): net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return as_learner(net, train or loader(), loader(shuffle=False), loss_func=loss, **{**dict(lr=.1), **kw})
def pruned(d, learn=None, **kw):
    return prune(learn or made(), 'magnitude', .5, unit='channel', folder=d, latency=False, fine_tune_epochs=1, **kw)

def scaled(w): return lambda p, t: w*F.cross_entropy(p, t)
def smooth(w): return lambda p, t, s=w: F.cross_entropy(p, t, label_smoothing=s)

class Own(nn.Module):
    def __init__(self, w, share=.5): super().__init__(); self.loss, self.share = nn.CrossEntropyLoss(w), share
    def forward(self, p, t): return self.share*self.loss(p, t)

OTHER = dict(
    train=lambda: made(loader(X+5)), labels=lambda: made(DataLoader(TensorDataset(X, 1-Y), 16, shuffle=True)),
    batches=lambda: made(loader(bs=8)), loss=lambda: made(loss=nn.CrossEntropyLoss(label_smoothing=.1)),
    function=lambda: made(loss=scaled(100)), opt=lambda: made(opt='adam'), lr=lambda: made(lr=.05),
    wd=lambda: made(wd=.01), momentum=lambda: made(momentum=.5))
WORDS = dict(train='training data', labels='training data', batches='training data|number of training',
             loss='another loss', function='another loss',
             **dict.fromkeys(('opt', 'lr', 'wd', 'momentum'), 'another optimiser'))

@pytest.mark.parametrize('what', OTHER)
def test_what_decides_is_not_read_from_another_run(what, tmp_path):
    pruned(tmp_path)
    with pytest.raises(ValueError, match=f'was begun with .*({WORDS[what]})'): pruned(tmp_path, OTHER[what]())

def test_the_same_call_is_read_back_without_testing_or_training(tmp_path, monkeypatch):
    want = pruned(tmp_path)
    monkeypatch.setattr(P, 'tested', lambda learn: pytest.fail('tested although the folder is finished'))
    got = pruned(tmp_path)
    assert got.report.tuned == want.report.tuned and got.report.before == want.report.before is not None
    assert torch.equal(got.model[0].weight, want.model[0].weight)

def test_scores_of_the_user_decide(tmp_path):
    given = lambda i: Scores({'0': torch.arange(8.).roll(i)}, 'channel')
    pruned(tmp_path, scores=given(0)); pruned(tmp_path, scores=given(0))
    with pytest.raises(ValueError, match='was begun with scores'): pruned(tmp_path, scores=given(1))

def test_a_folder_of_an_earlier_version_is_refused_in_words(tmp_path):
    pruned(tmp_path); f = tmp_path/'rows.json'; d = json.loads(f.read_text())
    for k in ('train', 'batches', 'loss', 'opt'): d['fingerprint'].pop(k)
    d.pop('sha256'); f.write_text(json.dumps(d))
    with pytest.raises(ValueError, match="begun by an earlier version.*'train'.*delete this one"): pruned(tmp_path)

def test_two_losses_differ_where_their_attributes_do():
    w = torch.tensor([1., 2])
    kinds = [F.cross_entropy, F.mse_loss, scaled(1), scaled(2), smooth(.1), smooth(.2), nn.CrossEntropyLoss(),
             nn.CrossEntropyLoss(w), nn.CrossEntropyLoss(2*w), nn.CrossEntropyLoss(reduction='sum'), Own(w), Own(2*w),
             Own(w, .4), partial(F.cross_entropy, label_smoothing=.1), partial(F.cross_entropy, label_smoothing=.2)]
    said = [json.dumps(described(o)) for o in kinds]
    assert len(set(said)) == len(kinds) and said == [json.dumps(described(o)) for o in kinds]
    assert not any(' at 0x' in o for o in said)
    assert described(Own(w).train()) == described(Own(w).eval())

@pytest.mark.parametrize('make', [made, lambda: made(loader(generator=torch.Generator().manual_seed(3))),
                                  lambda: learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
                                                  get_dls('digits', augment='crop+flip'))],
                         ids=['torch', 'own', 'ours'])
def test_looking_uses_up_nothing_and_sees_the_same_again(make):
    learn = make()
    state = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    before, first = state(), fingerprint(learn)
    assert state() == before
    next(iter(learn.dls.train)); torch.rand(3)
    assert fingerprint(learn) == first
    a, b = make(), make(); fingerprint(b)
    order = lambda l: [y.tolist() for _,y in l.dls.train]
    with seed_everything(1): one = order(a)
    with seed_everything(1): assert one == order(b)

def test_batches_of_any_form_are_looked_at():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(4, 2)
        def forward(self, x): return self.l(x)
    with seed_everything(0): net = Net()
    for own in (DataLoader([(dict(x=X[i]), Y[i]) for i in range(16)], 8), [(X, Y), (X+1, Y)]):
        learn = as_learner(net, own, own, loss_func=lambda p, a, *b: F.cross_entropy(p, a))
        assert fingerprint(learn) == fingerprint(learn)
